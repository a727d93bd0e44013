"""A search in Python, without a recipe: from two sides of a behaviour to the trials, the front and the best edit."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from ..behaviours.base import SPLITS, UTILITY_LOSS, Item, Measure, Prompt, Source, search_defaults
from ..behaviours.contrast import Side
from ..behaviours.custom import PAIR, PROMPT, Custom
from ..behaviours.prompts import BUILTIN, load_neutral
from ..edits import Combination, Edit, Scores
from ..engines.base import Engine, Progress
from ..errors import EditError, RecipeError
from ..files.schema import nearest, parse
from ..files.writing import make_folder, write_jsonl
from ..method.variants import FULL, SCORED
from ..probing.chat import CHAT, Chat
from ..probing.collect import collect
from ..probing.probe import Probe
from ..probing.rivals import rival_edit
from ..probing.score import score as score_probe
from ..probing.traces import Trace
from .bench import Bench
from .candidates import BASE, TITLES, Candidate, Trial, edit_of, of_kind
from .choice import chosen_edit, moved
from .front import Aim, choose, pareto
from .own_answers import Journalled
from .plan import Evaluation, Search
from .rounds import run_study
from .statistics import interval
from .study import Study
from .utility import engine_of, refuse_other_base

# One side of a behaviour: an instruction, a file of responses, traces, or pairs of prompt and response.
Given = str | Path | Sequence[Trace] | Sequence[tuple[Prompt, str]]
ScoreGiven = str | Mapping[str, Any] | Callable[[str, str], float]


@dataclass(frozen=True, repr=False)
class SearchResult:
    """What `search` found on validation prompts.

    Attributes:
        study: everything that was tried. trials: each with its measures, the original model first.
        front: the edits that no other beats, by rising KL.
        best: the edit that the rule takes; None if none is within the limits or nothing moved.
        chosen: its trial.
        scores, probe: what the edits are made from: `scores.edit(...)` makes any other.
        measures: the behaviour's, the attribute first.

    >>> result = s2e.search(
    ...     *(model, tokenizer, "builtin:pirate", "builtin:pirate"),
    ...     counts={"probe": 4, "validation": 4, "test": 4},
    ...     options={"rho_attn": [0.3], "rho_mlp": [None], "baselines": []},
    ...     evaluation={"new_tokens": 4, "utility_prompts": 2, "utility_tokens": 4},
    ... )
    >>> [trial.candidate.kind for trial in result.trials]  # the original model first; two ranges of layers
    ['base', 'edit', 'edit']
    >>> [measure.name for measure in result.measures][:2]
    ['preference', 'margin']
    """

    study: Study
    best: Edit | None
    chosen: Trial | None
    scores: Scores
    probe: Probe
    aim: Aim
    measures: tuple[Measure, ...]

    @property
    def trials(self) -> list[Trial]:
        return self.study.trials

    @property
    def front(self) -> list[Trial]:
        return pareto(self.study.of_kind("edit"), self.aim)

    @property
    def table(self) -> str:
        """The original model, the edits' front and the best of every baseline, as text."""
        best = {kind: choose(of_kind(self.trials, kind), self.aim) for kind in TITLES if kind not in ("base", "edit")}
        shown = [*of_kind(self.trials, "base"), *(trial for trial in best.values() if trial), *self.front]
        columns = [m for m in self.measures if m.column and any(trial.count(m.name) for trial in shown)]
        rows = [["", *(m.title for m in columns)]]
        for trial in shown:
            mark = " *" if trial is self.chosen else ""
            means = [trial.mean(m.name) for m in columns]
            rows.append([trial.candidate.id + mark, *("–" if x is None else f"{x:.2f}" for x in means)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)

    def __repr__(self) -> str:
        tried = {kind: len(self.study.of_kind(kind)) for kind in TITLES if self.study.of_kind(kind)}
        return f"SearchResult({tried}, best={self.best!r})"


def search(
    model: Engine | nn.Module,
    tokenizer: Any,
    more: Given,
    less: Given,
    *,
    prompts: str | Path | Sequence[Prompt] | None = None,
    score: ScoreGiven = "preference",
    title: str = "behaviour shown",
    folder: str | Path | None = None,
    seed: int = 0,
    chat: Chat = CHAT,
    counts: Mapping[str, int] | None = None,
    options: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Finds an edit that makes a model show a behaviour, with calibrated strengths, against every baseline.

    Args:
        model: a transformers model, or a TransformersEngine.
        more, less: the responses that show the behaviour and those that don't: an instruction under which the model
            itself answers, a JSON Lines file with prompt and response, traces, or pairs of prompt and response.
        prompts: unseen prompts: a list or a file. None takes those of the responses or, with instructions, prompts
            that come with the package.
        score: "preference", or what a recipe's `behaviour.score` takes; or a function (prompt, response) → number.
        title: of the behaviour, in tables.
        folder: where the journal lies, so that a search that was stopped goes on; None keeps nothing.
        seed: of the split into probe, validation and test.
        chat: how a model's prompts are written; an engine has its own.
        counts: {"probe": …, "validation": …, "test": …}: how many prompts each split takes.
        options: of a recipe's `search` section, such as {"points": 6, "limits": {"utility_loss": 0.3}}.
        evaluation: of a recipe's `evaluation` section, such as {"new_tokens": 48}.
        progress: called with (steps done, steps planned).

    Returns:
        The trials on validation and the best edit. Its `table` is for people. The test prompts are not read.

    Raises:
        RecipeError, FileError, TraceError: the sides, prompts or options cannot be used, or the two sides do not
            differ. EditError: the model is edited already. ModelError: it is not supported.

    >>> result = s2e.search(
    ...     *(model, tokenizer, "builtin:lists", "builtin:lists"),
    ...     score={"pattern": "(?m)^[-*] "},
    ...     counts={"probe": 4, "validation": 4, "test": 4},
    ...     options={"rho_attn": [0.2, 0.4], "rho_mlp": [None], "layers": [None], "baselines": []},
    ...     evaluation={"new_tokens": 4, "utility_prompts": 2, "utility_tokens": 4},
    ... )
    >>> [dict(trial.candidate.config)["rho_attn"] for trial in result.trials if trial.candidate.kind == "edit"]
    [0.2, 0.4]
    """
    engine = engine_of(model, tokenizer, chat)
    live = getattr(engine, "model", None)
    if live is None:
        raise EditError(
            "a search needs the model's weights", got=type(engine).__name__, fix="Give the model and its tokenizer."
        )
    with _folder(folder) as place:
        behaviour, source = _behaviour_of(more, less, prompts, score, title, place, seed, counts)
        written = options or {}
        plan = parse(Search, {**search_defaults(behaviour.search, written), **written}, under="search")
        names = [measure.name for measure in behaviour.measures]
        if unknown := [name for name in plan.limits if name not in names]:
            fix = nearest(unknown[0], names, "Measures of this behaviour")
            raise RecipeError("a limit is of no measure", got=unknown[0], fix=fix)
        measured = parse(Evaluation, {**behaviour.evaluation, **(evaluation or {})}, under="evaluation")
        # Not the score: what is answered is judged again, and a function is another object in each process.
        mark = _mark(live, behaviour.model_dump(exclude={"score"}), engine.chat)
        writer = Journalled(engine, place / f"own-{mark}.jsonl")
        traces = behaviour.make_traces(writer, behaviour.items(source, "probe"), None)
        preserve = behaviour.preserved if plan.needs_evidence else ()
        if plan.needs_evidence and not preserve:
            raise RecipeError(
                f"{plan.needs_evidence[0]} has nothing to preserve",
                got="a behaviour without prompts that an edit should leave alone",
                fix="Leave it out, or write a recipe with probe.preserve.",
            )
        probe = collect(live, engine.tokenizer, traces, chat=engine.chat, preserve=preserve)
        agreement = [cosine for cosine in probe.provenance["halves_agree"].values() if cosine is not None]
        if agreement:
            behaviour.check_contrast(max(agreement))
        scores: dict[str, Scores] = {FULL: score_probe(live, probe)}
        for variant in plan.variants:
            if variant in SCORED:
                scores[variant] = score_probe(live, probe, variant=variant)
        rivals: dict[str, Edit] = {kind: rival_edit(live, probe, scores[FULL], kind) for kind in plan.rivals}
        validation = behaviour.completed(writer, behaviour.items(source, "validation"))
        neutral = load_neutral(str(behaviour.neutral_prompts), "validation", 0, measured.utility_prompts)
        journal = place / f"journal-{_mark(traces, mark, seed)}.jsonl"
        bench = Bench(
            engine,
            scores,
            validation,
            behaviour,
            measured,
            journal,
            neutral=neutral,
            probe=probe,
            rivals=rivals,
            seed=seed,
        )
        default = behaviour.limits
        limits = {m: plan.limits.get(m.name, default.get(m.name, m.limit)) for m in behaviour.measures}
        aim = Aim(behaviour.attribute, limits, plan.rule, plan.tolerance, plan.reference, behaviour.ranked)
        study = run_study(bench, plan, aim, seed, progress)
    chosen = chosen_edit(study.trials, aim, plan.pick)
    base = study.of_kind("base")[0]
    if chosen is not None and plan.pick is None and not moved(chosen, base, aim):
        chosen = None
    best = None if chosen is None else edit_of(chosen.candidate.config, scores)
    return SearchResult(study, best, chosen, scores[FULL], probe, aim, behaviour.measures)


def _mark(*parts: Any) -> str:
    """A short hash of what a journal's answers depend on beside what each line holds itself."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            # No `state_dict`: of a 4-bit weight that was repacked for the CPU bitsandbytes' own changes the weight.
            for name, weight in chain(
                part.named_parameters(remove_duplicate=False), part.named_buffers(remove_duplicate=False)
            ):
                digest.update(f"{name} {tuple(weight.shape)}".encode())
                if not weight.is_meta:
                    some = weight.detach().flatten()[:: max(1, weight.numel() // 64)]
                    digest.update(some.float().cpu().numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def evaluate(
    model: Engine | nn.Module,
    tokenizer: Any,
    edit: Edit | Combination,
    prompts: Sequence[Prompt] | Sequence[tuple[Prompt, str, str]],
    score: ScoreGiven = "preference",
    *,
    title: str = "behaviour shown",
    chat: Chat = CHAT,
    evaluation: Mapping[str, Any] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """How much of a behaviour a model shows without and with an edit, and what the edit costs.

    Args:
        model: without the edit: a transformers model, or an engine.
        prompts: texts or chat messages. With "preference" triples (prompt, response that shows it, response that
            doesn't).
        score: as in `search`.
        evaluation: of a recipe's `evaluation` section.

    Returns:
        attribute: its name. systems: "base" and "edit" → measure → mean, low, high (95 %), n.

    Raises:
        EditError: no prompt is given, or the model has the edit in it already. RecipeError: the score cannot be used.

    >>> options = {"new_tokens": 4, "utility_prompts": 2, "utility_tokens": 4}
    >>> score = {"phrases": ["aye", "matey"]}
    >>> found = s2e.evaluate(model, tokenizer, edit, ["How are you?", "Why?"], score, evaluation=options)
    >>> found["systems"]["edit"][found["attribute"]]["n"]
    2
    """
    engine = engine_of(model, tokenizer, chat)
    refuse_other_base(engine, edit)
    if isinstance(prompts, str) or not prompts:
        raise EditError("there are no prompts to evaluate on", got=repr(prompts)[:40], fix="Give a list of prompts.")
    side = Side(system="more"), Side(system="less")
    raw = {"name": "custom", "title": title, "more": side[0], "less": side[1], "score": score}
    behaviour = parse(Custom, raw, under="behaviour")
    items = [_item(prompt, score == "preference") for prompt in prompts]
    measured = parse(Evaluation, {**behaviour.evaluation, **(evaluation or {})}, under="evaluation")
    # Others than those of a search, which come first in the file.
    count = measured.utility_prompts
    neutral = load_neutral(str(behaviour.neutral_prompts), "test", count, count)
    edited = Candidate("edit", "edit", {"id": edit.id})
    with _folder(None) as place:
        bench = Bench(
            engine,
            {},
            items,
            behaviour,
            measured,
            place / "journal.jsonl",
            neutral=neutral,
            given={"edit": edit.intervention()},
            seed=seed,
        )
        trials = bench.run([BASE, edited], "evaluation")
    systems = {
        trial.candidate.kind: {
            m.name: interval(trial.values[m.name], m.rate, resamples, seed, measured.samples)
            for m in behaviour.measures
            if trial.count(m.name)
        }
        for trial in trials
    }
    return {"attribute": behaviour.attribute.name, "utility": UTILITY_LOSS.name, "systems": systems}


def _item(prompt: Any, compared: bool) -> Item:
    if not compared:
        return Item(PROMPT, prompt)
    if not (isinstance(prompt, tuple | list) and len(prompt) == 3 and all(isinstance(x, str) for x in prompt[1:])):
        raise RecipeError(
            "preference compares two responses",
            got=repr(prompt)[:60],
            fix="Give triples (prompt, response that shows it, response that doesn't), or another score.",
        )
    return Item(PAIR, prompt[0], (prompt[1], prompt[2]))


def _folder(folder: str | Path | None) -> Any:
    """A context that gives the folder, or one for the time being."""
    import contextlib

    @contextlib.contextmanager
    def opened() -> Any:
        if folder is None:
            with tempfile.TemporaryDirectory() as temporary:
                yield Path(temporary)
            return
        make_folder(folder)
        yield Path(folder)

    return opened()


def _behaviour_of(
    more: Given,
    less: Given,
    prompts: str | Path | Sequence[Prompt] | None,
    score: ScoreGiven,
    title: str,
    folder: Path,
    seed: int,
    counts: Mapping[str, int] | None,
) -> tuple[Custom, Source]:
    sides = {name: _side(name, given, folder) for name, given in (("more", more), ("less", less))}
    behaviour = parse(Custom, {"name": "custom", "title": title, "score": score, **sides}, under="behaviour")
    if prompts is not None and not isinstance(prompts, str | Path):
        path = folder / "prompts.jsonl"
        write_jsonl(path, ({"prompt": prompt} for prompt in prompts))
        prompts = path
    if unknown := [name for name in counts or {} if name not in SPLITS]:
        raise RecipeError("there is no such split", got=unknown[0], fix=f"Name {', '.join(SPLITS)}.")
    wanted = {split: {PROMPT: counts[split]} if counts and split in counts else None for split in SPLITS}
    return behaviour, Source(None if prompts is None else str(prompts), wanted, seed)


def _asked(trace: Trace) -> Prompt:
    """A trace's prompt, with its system prompt as the first message.

    Raises:
        RecipeError: its answer begins after a thinking, which a pair of responses does not tell apart.
    """
    if trace.answer_start:
        raise RecipeError(
            "a search does not tell thinking and answer of a trace apart",
            got=f"an answer that begins at character {trace.answer_start}",
            fix="Give the answers alone, or use collect and score with part=.",
        )
    return trace.prompt if trace.system is None else [dict(message) for message in trace.messages()]


def _side(name: str, given: Given, folder: Path) -> dict[str, str]:
    """A recipe's section of one side."""
    if isinstance(given, Path) or (isinstance(given, str) and (given.endswith(".jsonl") or given.startswith(BUILTIN))):
        return {"file": str(given)}
    if isinstance(given, str):
        return {"system": given}
    path = folder / f"{name}.jsonl"
    rows = []
    for one in given:
        prompt, response = (_asked(one), one.response) if isinstance(one, Trace) else one
        rows.append({"prompt": prompt, "response": response})
    if not rows:
        raise RecipeError(f"the side {name} has no response", got="an empty list", fix="Give responses.")
    write_jsonl(path, rows)
    return {"file": str(path)}
