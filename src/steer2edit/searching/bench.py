"""The bench: candidates on items, in batches whose rows carry them all, and what each of them showed and cost.

Scores do not depend on (ρ, α), so that a configuration costs a soft threshold and its rows in a batch. What a batch
gave is journalled, so that a killed study goes on from its last whole batch, and can be judged again without a model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..behaviours.base import NLL_RISE, UTILITY_LOSS, Behaviour, Item, Outcome, judge
from ..behaviours.degenerate import degenerate
from ..edits import Edit, Scores
from ..engines.base import Answer, Engine, Progress, Request, Sampling
from ..errors import RecipeError
from ..method.intervention import NOTHING, Intervention
from ..probing.probe import Probe
from ..probing.spans import response_span
from ..probing.traces import Trace
from ..progress import Sample, current_screen, say
from .candidates import BASE, Candidate, Trial, Values, intervention_of
from .journal import Journal
from .plan import Evaluation
from .statistics import finite

# Answers whose losses are journalled at once.
_LOSSES = 8
# Answers on which a calibration measures KL.
_CALIBRATION = 4
Ids = tuple[int, ...]


class Bench:
    """Where candidates are tried: an engine, the scores, the items, and the journal of what was made already.

    Args:
        engine: None to judge the journal alone, without a model.
        scores: the full method's under "full", and those of variants that score in another way.
        items: what every candidate is asked.
        neutral: the items whose base answers give KL and the rise of their NLL.
        plan: how answers are made.
        journal: its file.
        probe: with the means of the residual stream, for the baselines on it.
        rivals: kind → what it does at strength 1, for rivals of the edit.
        given: a candidate's id → what it does, where that is not made from the scores.
        seed: of sampled answers.

    Attributes:
        labels: of each candidate that was run, by its id: what each open item counted for, measure → number.
    """

    def __init__(
        self,
        engine: Engine | None,
        scores: Mapping[str, Scores],
        items: Sequence[Item],
        behaviour: Behaviour,
        plan: Evaluation,
        journal: Path,
        *,
        neutral: Sequence[Item] = (),
        probe: Probe | None = None,
        rivals: Mapping[str, Edit] | None = None,
        given: Mapping[str, Intervention] | None = None,
        seed: int = 0,
    ):
        self.given, self.rivals = given or {}, rivals or {}
        self._engine, self.scores, self.items, self.probe = engine, scores, items, probe
        self.behaviour, self.plan, self.seed = behaviour, plan, seed
        self.journal = Journal(journal, replay=engine is None)
        self.sampling = Sampling(plan.temperature, plan.top_p, plan.top_k)
        self.open = [item for item in items if not item.choices]
        self.closed = [item for item in items if item.choices]
        self.base: list[list[Outcome]] | None = None
        self.labels: dict[str, list[dict[str, float | None]]] = {}
        self._ids_of: dict[str, Ids] = {}
        self._known: list[float] = []  # the original model's NLL per token of every choice, once it is measured
        own = self._own_answers(neutral)
        self.own = [(item, ids) for item, ids in zip(neutral, own, strict=True) if ids]
        self.empty = len(neutral) - len(self.own)

    @property
    def engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    @property
    def can_prompt(self) -> bool:
        """Whether the engine measures losses under another prompt; a journal has what it has."""
        return self._engine is None or not self.own or self.engine.measures_prompts

    @property
    def can_direct(self) -> bool:
        """Whether the engine moves the residual stream along a direction by what it holds."""
        return self._engine is None or self.engine.rows_on_stream

    @property
    def asked(self) -> int:
        """How many answers each candidate gives."""
        return len(self.open) * self.plan.samples

    @property
    def evaluations(self) -> int:
        """What budgets count for each candidate: the answers that it gives, and the given ones that it weighs."""
        return self.asked + sum(len(item.choices) for item in self.closed)

    @property
    def steps(self) -> int:
        """What progress counts for each candidate: its evaluations, and the original model's answers whose losses are
        measured.
        """
        return self.evaluations + len(self.own)

    def sane(
        self, tried: Sequence[Candidate], prompts: Sequence[str], name: str, progress: Progress | None = None
    ) -> list[float]:
        """The share of degenerate answers to short simple prompts, of each candidate; one answer to each prompt."""
        simple = [Item("sanity", prompt) for prompt in prompts]
        answers = self._answers(tried, simple, 1, name, progress)
        return [sum(degenerate(row[0].answer) for row in rows) / len(prompts) for rows in answers]

    def kl(self, tried: Sequence[Candidate], name: str) -> list[float | None]:
        """KL per token of each candidate on a few of the base model's own answers; None where one is not finite."""
        own = self.own[:_CALIBRATION]
        say(f"  {name}: {len(tried)} strengths on {len(own)} answers")
        kl, _ = self._own_losses(tried, name, None, own)
        columns = [[row[c] for row in kl] for c in range(len(tried))]
        return [None if None in column else _mean(column) for column in columns]

    def run(self, tried: Sequence[Candidate], name: str, progress: Progress | None = None) -> list[Trial]:
        """Every candidate on every item.

        Args:
            tried: the base model stands first, or was in a round before: the others are compared with its outcomes.
            name: of the round, which its journal lines carry.
        """
        steps = self.steps * len(tried)
        answers_at, losses_at = self.asked, len(self.own)
        answers = self._answers(tried, self.open, self.plan.samples, name, _shifted(progress, 0, steps))
        kl, rise = self._own_losses(tried, name, _shifted(progress, len(tried) * answers_at, steps), self.own)
        chosen, base_chosen = self._choices(
            tried, name, _shifted(progress, len(tried) * (answers_at + losses_at), steps)
        )
        if progress:
            progress(steps, steps)
        if self.base is None:
            of_base = [i for i, candidate in enumerate(tried) if candidate.kind == "base"]
            self.base = answers[of_base[0]] if of_base else answers[0]
        base = [*self.base, *base_chosen]
        outcomes = [[*answers[c], *chosen[c]] for c in range(len(tried))]
        labels = self._labels(outcomes, base)
        self.labels |= {candidate.id: labels[c][: len(self.open)] for c, candidate in enumerate(tried)}
        return [
            self._trial(candidate, name, self._values(labels[c]), [row[c] for row in kl], [row[c] for row in rise])
            for c, candidate in enumerate(tried)
        ]

    # Answers -------------------------------------------------------------------------------------------------------

    def _own_answers(self, neutral: Sequence[Item]) -> list[Ids]:
        """The base model's own answers, greedy, whatever the sampling."""
        if not neutral:
            return []

        def make() -> dict[str, Any]:
            requests = [Request(self._ids(item)) for item in neutral]
            answers = self.engine.generate(requests, [NOTHING], self.plan.utility_tokens)
            return {"ids": [list(answer.ids) for answer in answers]}

        asked = [[self._messages(item) for item in neutral], self.plan.utility_tokens]
        line = self.journal.keep("own", "answers", 0, asked, make)
        return [tuple(ids) for ids in line["ids"]]

    def _answers(
        self, tried: Sequence[Candidate], items: Sequence[Item], samples: int, name: str, progress: Progress | None
    ) -> list[list[list[Outcome]]]:
        """Outcomes [candidates][items][samples] of open items."""
        work = [(c, i, s) for c in range(len(tried)) for i in range(len(items)) for s in range(samples)]
        seeds = [[self._seed(item, s) for s in range(samples)] for item in items]
        flat: list[Outcome] = []
        for number, first in enumerate(range(0, len(work), self.plan.batch)):
            batch = work[first : first + self.plan.batch]

            def make(batch: Sequence[tuple[int, int, int]] = batch, first: int = first) -> dict[str, Any]:
                table = [self._intervention(candidate) for candidate in tried]
                requests = [Request(self._ids(items[i], tried[c]), c, seeds[i][s]) for c, i, s in batch]
                answers = self.engine.generate(
                    requests, table, self.plan.new_tokens, _shifted(progress, first, len(work)), self.sampling
                )
                return {"outcomes": [_row_of(answer) for answer in answers], "rows": self.engine.slots}

            asked = [
                [[tried[c].id, self._messages(items[i], tried[c]), seeds[i][s]] for c, i, s in batch],
                [self.plan.new_tokens, self.plan.temperature, self.plan.top_p, self.plan.top_k],
            ]
            line = self.journal.keep(name, "answers", number, asked, make)
            if self._engine is not None:
                self.engine.slots = line["rows"]  # where memory ran out before, a resumed study goes on with fewer rows
            flat += _outcomes(line)
            if (screen := current_screen()) is not None:
                outcomes = flat[len(flat) - len(batch) :]
                rows = [(tried[c], items[i], outcome) for (c, i, _), outcome in zip(batch, outcomes, strict=True)]
                screen.show_answers(_samples(rows))
        chunks = [flat[i : i + samples] for i in range(0, len(flat), samples)]
        return [chunks[c * len(items) : (c + 1) * len(items)] for c in range(len(tried))]

    def _seed(self, item: Item, sample: int) -> int:
        """The same for every candidate, so that they are compared on the same draws."""
        text = f"{self.seed} {sample} {self._messages(item)}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")

    # Losses --------------------------------------------------------------------------------------------------------

    def _own_losses(
        self, tried: Sequence[Candidate], name: str, progress: Progress | None, own: Sequence[tuple[Item, Ids]]
    ) -> tuple[list[list[float | None]], list[list[float | None]]]:
        """KL and rise of the NLL per token of the base model's own answers, [answers][candidates]."""
        asked = [[self._messages(item), list(answer)] for item, answer in own]
        kl, rise, _ = self._losses(tried, asked, lambda i: (self._ids(own[i][0]), own[i][1]), name, progress)
        for c, candidate in enumerate(tried):
            if candidate.kind != "system" or not own:
                continue

            def make(candidate: Candidate = candidate) -> dict[str, Any]:
                pairs = [(self._ids(item), answer) for item, answer in own]
                losses = self.engine.prompt_losses(pairs, [self._ids(item, candidate) for item, _ in own])
                return {"kl": _finite(losses.kl), "nll_rise": _finite(losses.nll - losses.base_nll[:, None])}

            line = self.journal.keep(f"{name} {candidate.id}", "losses", 0, [candidate.config["system"], asked], make)
            for i, (kl_of_answer, rise_of_answer) in enumerate(zip(line["kl"], line["nll_rise"], strict=True)):
                kl[i][c], rise[i][c] = kl_of_answer[0], rise_of_answer[0]
        return kl, rise

    def _losses(
        self,
        tried: Sequence[Candidate],
        asked: Sequence[Any],
        pair: Callable[[int], tuple[Ids, Ids]],
        name: str,
        progress: Progress | None,
        known: Sequence[float] = (),
    ) -> tuple[list[list[float | None]], list[list[float | None]], list[float | None]]:
        """KL and rise of the NLL per token, [answers][candidates], and the NLL of the original model [answers].

        None where one is not finite. The first two are 0 for candidates that do nothing inside the model: the original
        one, and system prompts. Without any other candidate nothing is measured, and the third is empty.

        Args:
            asked: what each answer is, for the journal. pair: i → the i-th prompt's ids and answer's ids.
            known: the original model's NLLs, where they were measured before and KL is not asked for: it is not run
                again, and KL stays 0.
        """
        changed = [c for c, candidate in enumerate(tried) if candidate.kind not in ("base", "system")]
        kl: list[list[float | None]] = [[0.0] * len(tried) for _ in asked]
        rise: list[list[float | None]] = [[0.0] * len(tried) for _ in asked]
        base: list[float | None] = []
        if not changed:
            return kl, rise, base
        for number, first in enumerate(range(0, len(asked), _LOSSES)):
            here = range(first, min(first + _LOSSES, len(asked)))

            def make(here: range = here) -> dict[str, Any]:
                table = [self._intervention(tried[c]) for c in changed]
                counted = _of_losses(progress, here, len(asked), len(tried))
                if known:
                    nll = self.engine.nll([pair(i) for i in here], table, counted)
                    return {"nll_rise": _finite(nll - torch.tensor([known[i] for i in here])[:, None])}
                losses = self.engine.losses([pair(i) for i in here], table, counted)
                rises = losses.nll - losses.base_nll[:, None]
                base_nll = finite(losses.base_nll.tolist())
                return {"kl": _finite(losses.kl), "nll_rise": _finite(rises), "base_nll": base_nll}

            what = [[tried[c].id for c in changed], [asked[i] for i in here]]
            line = self.journal.keep(name, "losses", number, what, make)
            base += line.get("base_nll", [])
            for i, rise_of_answer in zip(here, line["nll_rise"], strict=True):
                for c, value in zip(changed, rise_of_answer, strict=True):
                    rise[i][c] = value
            if "kl" not in line:
                continue
            for i, kl_of_answer in zip(here, line["kl"], strict=True):
                for c, value in zip(changed, kl_of_answer, strict=True):
                    kl[i][c] = value
        return kl, rise, base

    def _choices(
        self, tried: Sequence[Candidate], name: str, progress: Progress | None
    ) -> tuple[list[list[list[Outcome]]], list[list[Outcome]]]:
        """Outcomes [candidates][items][1] of items with choices, and the base model's: the NLL per token of each."""
        if not self.closed:
            return [[] for _ in tried], []
        flat = [(item, choice) for item in self.closed for choice in item.choices]
        asked = [[self._messages(item), choice] for item, choice in flat]
        _, rise, measured = self._losses(
            tried, asked, lambda i: self._choice_ids(*flat[i]), f"{name} choices", progress, self._known
        )
        base, lengths = self._base_choices(flat, BASE, measured)
        self._known = [] if None in base else [value for value in base if value is not None]
        rows = []
        for c, candidate in enumerate(tried):
            if candidate.kind == "system":
                rows.append(self._by_item(self._base_choices(flat, candidate)[0], lengths))
            else:
                nll = [_sum(*pair) for pair in zip(base, (row[c] for row in rise), strict=True)]
                rows.append(self._by_item(nll, lengths))
        return rows, self._by_item([_sum(nll, 0.0) for nll in base], lengths)

    def _base_choices(
        self, flat: Sequence[tuple[Item, str]], candidate: Candidate, measured: Sequence[float | None] = ()
    ) -> tuple[list[float | None], Sequence[int]]:
        """The original model's NLL per token of every choice, under a candidate's prompt, and its tokens.

        Args:
            measured: the NLLs, if they were measured beside others'.
        """

        def make() -> dict[str, Any]:
            pairs = [self._choice_ids(item, choice, candidate) for item, choice in flat]
            # Lines of older versions hold no NLL of the original model, so that none or some are known.
            values = measured if len(measured) == len(flat) else finite(self.engine.losses(pairs, []).base_nll.tolist())
            return {"nll": [[value] for value in values], "lengths": [len(ids) for _, ids in pairs]}

        asked = [[self._messages(item, candidate), choice] for item, choice in flat]
        name = "base choices" if candidate.kind == "base" else f"base choices {candidate.id}"
        line = self.journal.keep(name, "nll", 0, asked, make)
        return [row[0] for row in line["nll"]], line.get("lengths", [])

    def _by_item(self, nll: Sequence[float | None], lengths: Sequence[int]) -> list[list[Outcome]]:
        """The NLL of all choices, as one outcome an item."""
        numbers = [math.inf if value is None else value for value in nll]
        return [
            [Outcome(nll=tuple(numbers[start:end]), lengths=tuple(lengths[start:end]))]
            for start, end in _ends(self.closed)
        ]

    def _choice_ids(self, item: Item, choice: str, candidate: Candidate = BASE) -> tuple[Ids, Ids]:
        trace = Trace(item.prompt, choice, "positive", self._system(candidate))
        span, _ = response_span(self.engine.tokenizer, trace, chat=self.engine.chat, positions="response")
        if span is None:
            raise RecipeError("a choice has no text", got=item.text, fix="Give every choice a text.")
        return span.ids[: span.first], span.ids[span.first :]

    # Trials --------------------------------------------------------------------------------------------------------

    def _labels(
        self, outcomes: Sequence[Sequence[Sequence[Outcome]]], base: Sequence[Sequence[Outcome]]
    ) -> list[list[dict[str, float | None]]]:
        """What each item counts for, [candidates][items]: measure → the mean over its samples, None if not finite.

        Args:
            outcomes: [candidates][items][samples]. base: [items][samples]. Open items come first.
        """
        items = [*self.open, *self.closed]
        places = [(c, i, s) for c, rows in enumerate(outcomes) for i, row in enumerate(rows) for s in range(len(row))]
        asked = [(items[i], outcomes[c][i][s], base[i][s]) for c, i, s in places]
        judged = dict(zip(places, judge(self.behaviour, asked), strict=True))
        labels: list[list[dict[str, float | None]]] = []
        for c, rows in enumerate(outcomes):
            labels.append([_mean_label([judged[c, i, s] for s in range(len(row))]) for i, row in enumerate(rows)])
        return labels

    def _values(self, labels: Sequence[Mapping[str, float | None]]) -> dict[str, list[float | None]]:
        """Measure → a number for each item that counts for it."""
        names = [measure.name for measure in self.behaviour.measures]
        return {name: [label[name] for label in labels if name in label] for name in names}

    def _trial(
        self,
        candidate: Candidate,
        name: str,
        values: Mapping[str, Sequence[float | None]],
        kl: Sequence[float | None],
        rise: Sequence[float | None],
    ) -> Trial:
        frozen: dict[str, Values] = {measure: tuple(numbers) for measure, numbers in values.items()}
        return Trial(candidate, frozen | {UTILITY_LOSS.name: tuple(kl), NLL_RISE.name: tuple(rise)}, name)

    def outcomes(self, tried: Sequence[Candidate], name: str) -> list[list[list[Outcome]]]:
        """What a round that was run gave for the open items, from the journal: [candidates][items][samples]."""
        return self._answers(tried, self.open, self.plan.samples, name, None)

    # Prompts -------------------------------------------------------------------------------------------------------

    def _intervention(self, candidate: Candidate) -> Intervention:
        if candidate.id in self.given:
            return self.given[candidate.id]
        return intervention_of(candidate, self.scores, self.probe, self.rivals)

    def _system(self, candidate: Candidate) -> str | None:
        """The behaviour's system prompt, and a candidate's own after it."""
        own = candidate.config.get("system")
        if own is None or self.behaviour.system is None:
            return own if self.behaviour.system is None else self.behaviour.system
        return f"{self.behaviour.system}\n\n{own}"

    def _messages(self, item: Item, candidate: Candidate = BASE) -> list[dict[str, str]]:
        return item.messages(self._system(candidate))

    def _ids(self, item: Item, candidate: Candidate = BASE) -> Ids:
        messages = self._messages(item, candidate)
        key = repr(messages)
        if key not in self._ids_of:
            self._ids_of[key] = self.engine.tokens(messages)
        return self._ids_of[key]


def _samples(rows: Sequence[tuple[Candidate, Item, Outcome]]) -> list[Sample]:
    """Three answers for people: the first, the middle and the last one of the edits', or of all if there are none."""
    of_edits = [row for row in rows if row[0].kind == "edit"] or list(rows)
    places = sorted({0, len(of_edits) // 2, len(of_edits) - 1}) if of_edits else []
    return [
        Sample(candidate.kind, candidate.config, item.text, outcome.answer)
        for candidate, item, outcome in (of_edits[place] for place in places)
    ]


def _row_of(answer: Answer) -> dict[str, Any]:
    row = {"text": answer.text, "start": answer.start, "tokens": len(answer.ids), "ended": answer.ended}
    return row | ({"thinking": answer.thinking} if answer.thinking else {})


def _outcomes(line: Mapping[str, Any]) -> list[Outcome]:
    """The outcomes of a journal line; lines of older runs hold texts and starts alone."""
    if "texts" in line:
        return [Outcome(text, start) for text, start in zip(line["texts"], line["starts"], strict=True)]
    return [
        Outcome(row["text"], row["start"], row["tokens"], row["ended"], thinking=row.get("thinking", 0))
        for row in line["outcomes"]
    ]


def _ends(items: Sequence[Item]) -> list[tuple[int, int]]:
    """Where each item's choices begin and end among all choices."""
    ends = [0]
    for item in items:
        ends.append(ends[-1] + len(item.choices))
    return list(pairwise(ends))


def _mean_label(samples: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """The mean of each measure over an item's samples; None where it is not finite."""
    means = {name: sum(sample[name] for sample in samples) / len(samples) for name in samples[0]}
    return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}


def _sum(base: float | None, rise: float | None) -> float:
    return math.inf if base is None or rise is None else base + rise


def _mean(values: Sequence[float | None]) -> float:
    return sum(value for value in values if value is not None) / len(values)


def _finite(losses: torch.Tensor) -> list[list[float | None]]:
    return [finite(row) for row in losses.tolist()]


def _shifted(progress: Progress | None, start: int, steps: int) -> Progress | None:
    """The progress of a part that begins after `start` of `steps` steps."""
    return None if progress is None else lambda done, _: progress(min(start + done, steps), steps)


def _of_losses(progress: Progress | None, here: range, answers: int, tried: int) -> Progress | None:
    """Progress in answers × candidates. The engine counts its own rows, which may be one more or one fewer."""
    if progress is None:
        return None
    report = progress

    def on_rows(done: int, of: int) -> None:
        answers_done = min(here.start + done * len(here) // max(1, of), answers)
        report(answers_done * tried, answers * tried)

    return on_rows
