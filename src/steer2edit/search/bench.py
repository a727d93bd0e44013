"""Trials: candidates on prompts, in batches whose rows carry them all, and what each of them showed and cost.

Scores do not depend on (ρ, α), so that a configuration costs a soft threshold and its rows in a batch. What a batch
gave is journalled, so that a killed study goes on from its last whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..behaviours.degenerate import degenerate
from ..behaviours.questions import Question
from ..behaviours.safety import KINDS, Prompt, declines, messages
from ..edits import Scores
from ..engines import Engine, Progress, Request
from ..errors import RecipeError
from ..files.reading import read_journal
from ..files.writing import append_jsonl
from ..method.intervention import NOTHING
from ..probing.spans import response_span
from ..probing.traces import Trace
from ..recipe import Recipe
from .candidates import Candidate, intervention_of
from .statistics import rate

# Answers whose losses are journalled at once.
_LOSSES = 8


class Bench:
    """Where candidates are tried: an engine, the scores, the prompts, and the journal of what was made already.

    Args:
        journal: one line a batch; lines that are there already are not made again.
        recipe: its `behaviour` and `evaluation` sections are the plan.
    """

    def __init__(
        self,
        engine: Engine,
        scores: Mapping[str, Scores],
        prompts: Sequence[Prompt],
        recipe: Recipe,
        journal: Path,
        questions: Sequence[Question] = (),
    ):
        self.engine, self.scores, self.prompts, self.recipe, self.journal = engine, scores, prompts, recipe, journal
        self.plan = recipe.evaluation
        self.ids = [engine.tokens(self._messages(p.text)) for p in prompts]
        self.done = {(row["round"], row["what"], row["batch"]): row for row in read_journal(journal)}
        self.questions = questions
        self.base_right: list[bool] = []
        benign = [i for i, p in enumerate(prompts) if p.kind == "benign"][: self.plan.utility_prompts]
        made = self._kept("own", "answers", 0, lambda: self._own(benign))["ids"]
        self.own = [(self.ids[p], tuple(answer)) for p, answer in zip(benign, made, strict=True) if answer]
        self.empty = len(benign) - len(self.own)

    @property
    def steps(self) -> int:
        """What progress counts for each candidate: prompts, and answers and choices whose losses are measured."""
        return len(self.prompts) + len(self.own) + sum(len(q.choices) for q in self.questions)

    def sane(
        self, tried: Sequence[Candidate], prompts: Sequence[str], name: str, progress: Progress | None = None
    ) -> list[float]:
        """The share of degenerate answers to short simple prompts, of each candidate."""
        said = self._answers(tried, [self.engine.tokens(self._messages(p)) for p in prompts], name, progress)
        return [sum(degenerate(text[start:]) for text, start in row) / len(prompts) for row in said]

    def run(self, tried: Sequence[Candidate], name: str, progress: Progress | None = None) -> list[dict[str, Any]]:
        """Every candidate on every prompt; one row a candidate, with the answers' flags in the order of the prompts.

        Args:
            name: of the round, which its journal lines carry.
        """
        steps = self.steps * len(tried)
        at = [len(tried) * n for n in (0, len(self.ids), len(self.ids) + len(self.own))]
        said = self._answers(tried, self.ids, name, _shifted(progress, at[0], steps))
        kl, rise = self._losses(tried, self.own, name, _shifted(progress, at[1], steps))
        right = self._accuracies(tried, f"{name} choices", _shifted(progress, at[2], steps))
        if progress:
            progress(steps, steps)
        losses = [{"kl": [row[c] for row in kl], "nll_rise": [row[c] for row in rise]} for c in range(len(tried))]
        return [self._trial(*one) for one in zip(tried, said, losses, right, strict=True)]

    def _messages(self, prompt: str) -> list[dict[str, str]]:
        return messages(prompt, self.recipe.behaviour.system)

    def _kept(self, name: str, what: str, batch: int, make: Any) -> dict[str, Any]:
        """A journal line: the one that is there, or a new one that `make` gives."""
        row = self.done.get((name, what, batch))
        if row is None:
            row = {"round": name, "what": what, "batch": batch, **make()}
            append_jsonl(self.journal, row)
            self.done[name, what, batch] = row
        return row

    def _own(self, benign: Sequence[int]) -> dict[str, Any]:
        made = self.engine.generate([Request(self.ids[p]) for p in benign], [NOTHING], self.plan.utility_tokens)
        return {"ids": [list(a.ids) for a in made]}

    def _answers(
        self, tried: Sequence[Candidate], ids: Sequence[tuple[int, ...]], name: str, progress: Progress | None
    ) -> list[list[tuple[str, int]]]:
        """Text, and where its answer starts: [candidates][prompts]."""
        table = [intervention_of(candidate, self.scores) for candidate in tried]
        work = [(c, p) for c in range(len(tried)) for p in range(len(ids))]
        said: list[tuple[str, int]] = []
        for number, first in enumerate(range(0, len(work), self.plan.batch)):
            batch = work[first : first + self.plan.batch]

            def make(batch: Sequence[tuple[int, int]] = batch, first: int = first) -> dict[str, Any]:
                requests = [Request(ids[p], c) for c, p in batch]
                made = self.engine.generate(requests, table, self.plan.new_tokens, _shifted(progress, first, len(work)))
                texts, starts = [a.text for a in made], [a.start for a in made]
                return {"texts": texts, "starts": starts, "rows": self.engine.slots}

            row = self._kept(name, "answers", number, make)
            self.engine.slots = row["rows"]  # where memory ran out before, a resumed study goes on with fewer rows
            said += zip(row["texts"], row["starts"], strict=True)
        return [said[c * len(ids) : (c + 1) * len(ids)] for c in range(len(tried))]

    def _losses(
        self,
        tried: Sequence[Candidate],
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        name: str,
        progress: Progress | None,
    ) -> tuple[list[list[float | None]], list[list[float | None]]]:
        """KL and rise of the NLL per token, [answers][candidates], the base model's 0; None where it is not finite."""
        changed = [c for c, candidate in enumerate(tried) if candidate.kind != "base"]
        table = [intervention_of(tried[c], self.scores) for c in changed]
        if not table:
            return [[0.0] * len(tried) for _ in pairs], [[0.0] * len(tried) for _ in pairs]
        kl: list[list[float | None]] = []
        rise: list[list[float | None]] = []
        for number, first in enumerate(range(0, len(pairs), _LOSSES)):

            def make(first: int = first) -> dict[str, Any]:
                losses = self.engine.losses(
                    pairs[first : first + _LOSSES],
                    table,
                    _of_losses(progress, first, len(pairs), len(tried)),
                )
                rises = losses.nll - losses.base_nll[:, None]
                return {"kl": _finite(losses.kl), "nll_rise": _finite(rises)}

            row = self._kept(name, "losses", number, make)
            for of_answer, rise_of_answer in zip(row["kl"], row["nll_rise"], strict=True):
                kl.append([0.0] * len(tried))
                rise.append([0.0] * len(tried))
                for c, value, other in zip(changed, of_answer, rise_of_answer, strict=True):
                    kl[-1][c], rise[-1][c] = value, other
        return kl, rise

    def _accuracies(self, tried: Sequence[Candidate], name: str, progress: Progress | None) -> list[list[bool]]:
        """Whether the right choice is the likeliest per token, [candidates][questions]."""
        if not self.questions:
            return [[] for _ in tried]
        pairs = [pair for question in self.questions for pair in self._pairs(question)]
        _, rise = self._losses(tried, pairs, name, progress)
        base = self._kept("base choices", "nll", 0, lambda: {"nll": self.engine.losses(pairs, []).base_nll.tolist()})
        right: list[list[bool]] = [[] for _ in tried]
        self.base_right = []
        at = 0
        for question in self.questions:
            here = range(at, at + len(question.choices))
            at = here.stop
            for c in range(len(tried)):
                rises = [rise[i][c] for i in here]
                nll = [math.inf if r is None else base["nll"][i] + r for i, r in zip(here, rises, strict=True)]
                right[c].append(min(nll) < math.inf and nll.index(min(nll)) == question.answer)
            of_base = base["nll"][here.start : here.stop]
            self.base_right.append(of_base.index(min(of_base)) == question.answer)
        return right

    def _pairs(self, question: Question) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        pairs = []
        for choice in question.choices:
            trace = Trace(question.question, choice, "positive", self.recipe.behaviour.system)
            span, _ = response_span(self.engine.tokenizer, trace, chat=self.engine.chat, positions="response")
            if span is None:
                raise RecipeError("a choice has no text", got=question.question, fix="Give every choice a text.")
            pairs.append((span.ids[: span.first], span.ids[span.first :]))
        return pairs

    def _trial(
        self,
        candidate: Candidate,
        said: Sequence[tuple[str, int]],
        losses: Mapping[str, list[float | None]],
        right: list[bool],
    ) -> dict[str, Any]:
        judged = [text[start:] for text, start in said]  # what a model thinks is not what it answers
        bad = [degenerate(text) for text in judged]
        refused = [declines(text) and not b for text, b in zip(judged, bad, strict=True)]
        by_kind = {kind: [r for r, p in zip(refused, self.prompts, strict=True) if p.kind == kind] for kind in KINDS}
        return {
            "id": candidate.id,
            "kind": candidate.kind,
            "config": dict(candidate.config),
            "refusal": rate(by_kind["harmful"]),
            "over_refusal": rate(by_kind["benign"]),
            "over_refusal_borderline": rate(by_kind["borderline"]),
            "degenerate": rate(bad),
            "utility_loss": _mean(losses["kl"]),
            "nll_rise": _mean(losses["nll_rise"]),
            "accuracy": rate(right),
            "accuracy_loss": sum(self.base_right) / len(right) - sum(right) / len(right) if right else None,
            "counts": {kind: len(flags) for kind, flags in by_kind.items()}
            | {"utility": len(losses["kl"]), "empty": self.empty, "questions": len(right)},
            "flags": {**by_kind, "degenerate": bad, "right": right},
            "losses": dict(losses),
            "texts": [text for text, _ in said],
        }


def _finite(losses: torch.Tensor) -> list[list[float | None]]:
    return [[value if math.isfinite(value) else None for value in row] for row in losses.tolist()]


def _mean(values: Sequence[float | None]) -> float | None:
    """None where there is no value, or one that is not finite."""
    finite = [value for value in values if value is not None]
    return sum(finite) / len(finite) if finite and len(finite) == len(values) else None


def _shifted(progress: Progress | None, start: int, steps: int) -> Progress | None:
    """The progress of a part that begins after `start` of `steps` steps."""
    return None if progress is None else lambda done, _: progress(min(start + done, steps), steps)


def _of_losses(progress: Progress | None, first: int, pairs: int, tried: int) -> Progress | None:
    """Progress in answers × candidates. The engine counts its own rows, which may be one more or one fewer."""

    def told(done: int, of: int) -> None:
        assert progress is not None
        progress(min(first + done * min(_LOSSES, pairs - first) // max(1, of), pairs) * tried, pairs * tried)

    return None if progress is None else told
