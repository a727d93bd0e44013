"""How much work a run gives the model, stage by stage, counted from the recipe before anything is run.

What is counted is tokens. How long an answer will be is not known: each counts with its longest. The test prompts are
not read for it; how many there are follows from the recipe's counts, or from the shares of the splits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..behaviours.base import Item
from ..behaviours.contrast import SHARES
from ..engines.base import Engine
from ..engines.decoding import common_prefix
from ..errors import Steer2EditError
from ..method.rivals import WITH_EVIDENCE
from ..pipeline.run import Run
from ..probing.collect import plan_pass
from ..probing.traces import Trace, read_traces
from ..searching.candidates import DEPTHS
from ..searching.grid import coarse_grid, planned_edits, strengths_each, tried_of_series
from ..searching.plan import AUTO, Search

# Answers on which a calibration measures KL, and answers whose losses are measured at once (searching/bench.py).
_CALIBRATION, _GROUP = 4, 8
# About how many rungs a ladder takes: its first ones and, for each point, those that move in on it. The ladders of the
# shipped recipes took 12 to 17 for edits and 7 for baselines.
_FIRST_OF_EDIT, _EACH_OF_EDIT = 6, 3
_FIRST_OF_BASELINE, _EACH_OF_BASELINE = 4, 1
# On test a behaviour that compares responses takes more pairs than on validation, where it takes a few.
_MORE_PAIRS = 4
# How many prompts are looked at for the mean length.
_LOOKED_AT = 24


@dataclass(frozen=True)
class Work:
    """What a stage gives the model to do, in tokens.

    Attributes:
        written: of answers, at their longest. read: of the answers' prompts, beyond what all prompts begin with.
        compared: read to measure losses, with the log-probabilities of each. passed: of the probe's pass.
    """

    stage: str
    written: float = 0.0
    read: float = 0.0
    compared: float = 0.0
    passed: float = 0.0

    @property
    def is_some(self) -> bool:
        return self.written + self.read + self.compared + self.passed > 0


@dataclass(frozen=True)
class Tried:
    """How many candidates a search tries, and how many strengths it measures to find them.

    Attributes:
        edits: at most. changed: candidates that change the model inside, edits among them. prompts: system prompts.
        rungs: strengths on which a calibration measures KL. kinds: how many methods have a candidate.
    """

    edits: int
    changed: int
    prompts: int
    rungs: int
    kinds: int


def tried_of(search: Search, instructions: int) -> Tried:
    """What a search section tries.

    Args:
        instructions: how many system prompts ask for the behaviour.
    """
    ladders, edits = _edit_ladders(search)
    rungs = ladders * (_FIRST_OF_EDIT + _EACH_OF_EDIT * search.points)
    steering = len(search.steering) if isinstance(search.steering, list) else edits
    changed = edits + steering
    if search.steering == AUTO:
        rungs += _FIRST_OF_BASELINE + _EACH_OF_BASELINE * edits
    kinds = 1 + (steering > 0)
    for kind in search.baselines:
        if kind != "system":
            ladders = len(search.layers) if kind in WITH_EVIDENCE else len(DEPTHS)
            each = strengths_each(search, edits, ladders)
            changed += tried_of_series(search, [each] * ladders)
            rungs += (_FIRST_OF_BASELINE + _EACH_OF_BASELINE * each) * ladders
            kinds += 1
    prompts = instructions if "system" in search.baselines else 0
    return Tried(edits, changed, prompts, rungs, kinds + (prompts > 0))


def _edit_ladders(search: Search) -> tuple[int, int]:
    """How many ladders of edits a calibration climbs, and how many edits are tried."""
    automatic = [block for block in (search.rho_attn, search.rho_mlp) if block == AUTO]
    if not automatic:
        return 0, planned_edits(search, coarse_grid(search))
    others = [block for block in (search.rho_attn, search.rho_mlp) if isinstance(block, list)]
    each = len(others[0]) if others else 3  # each block type alone, and both
    shapes = itertools.product(search.variants, search.layers, search.alpha)
    ladders = each * len(list(shapes))
    if search.method == "tpe":
        return ladders, search.trials
    return ladders, tried_of_series(search, [search.points] * ladders) + search.refine ** len(automatic)


def beginning(prompts: Sequence[tuple[int, ...]]) -> tuple[int, float]:
    """How many tokens all prompts begin with, and the mean number of tokens beyond them."""
    shared = len(common_prefix(prompts)) if len(prompts) > 1 else 0
    return shared, max(1.0, sum(map(len, prompts)) / max(1, len(prompts)) - shared)


@dataclass(frozen=True)
class _Prompts:
    """Mean lengths of the prompts, in tokens: of what all begin with, and of what lies beyond it."""

    shared: float
    tail: float

    @property
    def whole(self) -> float:
        return self.shared + self.tail


def prompts_of(engine: Engine, items: Sequence[Item], system: str | None) -> list[tuple[int, ...]]:
    """The token ids of some items' prompts."""
    return [engine.tokens(item.messages(system)) for item in items[:_LOOKED_AT]]


def work_of(run: Run, engine: Engine) -> list[Work]:
    """The work of every stage that is not whole.

    Raises:
        RecipeError, FileError: the prompts cannot be read.
    """
    recipe = run.recipe
    items = run.items("validation")
    prompts = _Prompts(*beginning(prompts_of(engine, items, recipe.behaviour.system)))
    tried = tried_of(recipe.search, len(recipe.behaviour.asking()))
    counted = {
        "traces": lambda: _traces(run, prompts),
        "probe": lambda: _probe(run, engine, prompts),
        "search": lambda: _search(run, engine, items, prompts, tried),
        "evaluate": lambda: _evaluate(run, engine, items, prompts, tried),
    }
    return [count() for stage, count in counted.items() if not run.is_whole(stage)]


def _traces(run: Run, prompts: _Prompts) -> Work:
    behaviour = run.recipe.behaviour
    if behaviour.traces is not None:
        return Work("traces")
    answers = behaviour.answers_wanted(run.items("probe"))
    return Work("traces", written=answers * _new_tokens(run), read=answers * prompts.tail)


def _new_tokens(run: Run) -> int:
    """The longest answer that the behaviour has the model write for traces."""
    return int(getattr(run.recipe.behaviour, "new_tokens", run.recipe.evaluation.new_tokens))


def _probe(run: Run, engine: Engine, prompts: _Prompts) -> Work:
    behaviour, p, model = run.recipe.behaviour, run.recipe.probe, run.recipe.model
    items = run.items("probe")
    answers = behaviour.answers_wanted(items)
    if answers and behaviour.traces is None:
        return Work("probe", passed=max(answers, len(items)) * (prompts.whole + _new_tokens(run)))
    try:
        # No model writes them: the traces are there already, and their tokens can be counted.
        given = behaviour.traces
        traces: list[Trace] = behaviour.make_traces(engine, items) if given is None else read_traces(given)
        plan = plan_pass(
            engine.tokenizer, traces, chat=model.chat, part=p.part, positions=p.positions, max_tokens=p.max_tokens
        )
    except Steer2EditError:  # the stage will say so itself
        return Work("probe", passed=2 * len(items) * (prompts.whole + _new_tokens(run)))
    return Work("probe", passed=sum(len(span.ids) for span in plan.spans))


def _search(run: Run, engine: Engine, items: Sequence[Item], prompts: _Prompts, tried: Tried) -> Work:
    plan, search = run.recipe.evaluation, run.recipe.search
    open_items, choices, length = _asked(run, engine, items)
    work = _bench(run, prompts, open_items, choices, length, tried.changed, tried.prompts)
    own = min(_CALIBRATION, plan.utility_prompts)
    return Work(
        "search",
        written=work.written + tried.edits * search.sanity * plan.new_tokens,
        read=work.read + tried.edits * search.sanity * prompts.tail,
        compared=work.compared + tried.rungs * (prompts.shared + own * (prompts.tail + plan.utility_tokens)),
    )


def _evaluate(run: Run, engine: Engine, items: Sequence[Item], prompts: _Prompts, tried: Tried) -> Work:
    open_items, choices, length = _asked(run, engine, items)
    counts = run.recipe.data
    if counts.test is not None and counts.validation is not None:
        more = more_pairs = sum(counts.test.values()) / max(1, sum(counts.validation.values()))
    else:
        more, more_pairs = SHARES["test"] / SHARES["validation"], _MORE_PAIRS
    asks = min(1, tried.prompts)
    work = _bench(run, prompts, more * open_items, more_pairs * choices, length, tried.kinds - asks, asks)
    return Work("evaluate", work.written, work.read, work.compared)


def _asked(run: Run, engine: Engine, items: Sequence[Item]) -> tuple[int, int, float]:
    """How many items are answered freely, how many choices are compared, and a choice's mean length in tokens."""
    behaviour = run.recipe.behaviour
    closed = [item for item in items if behaviour.choices_of(item)]
    choices = sum(behaviour.choices_of(item) for item in closed)
    known = [choice for item in closed for choice in item.choices][:_LOOKED_AT]
    length = float(_new_tokens(run))
    if known:
        tokens = [len(engine.tokenizer(choice, add_special_tokens=False)["input_ids"]) for choice in known]
        length = sum(tokens) / len(tokens)
    return len(items) - len(closed), choices, length


def _bench(
    run: Run, prompts: _Prompts, open_items: float, choices: float, length: float, changed: int, asks: int
) -> Work:
    """What candidates cost on one split.

    Args:
        choices: of all items. length: of a choice, in tokens.
        changed: candidates that change the model inside. asks: system prompts.
    """
    plan = run.recipe.evaluation
    answers = (1 + changed + asks) * open_items * plan.samples
    own = plan.utility_prompts
    # What prompts begin with is read once for each candidate: in a batch of answers, and in each group of losses.
    batches = math.ceil(answers / plan.batch)
    groups = math.ceil(own / _GROUP) + math.ceil(choices / _GROUP)
    compared = (1 + changed) * (own * (prompts.tail + plan.utility_tokens) + groups * prompts.shared)
    compared += 2 * asks * own * (prompts.whole + plan.utility_tokens)
    # The choices of an item share its prompt, which is read once for two of them or more.
    compared += (2 + changed + asks) * choices * (length + prompts.tail / 2)
    return Work(
        "",
        written=answers * plan.new_tokens + own * plan.utility_tokens,
        read=(answers + own) * prompts.tail + max(batches, 1 + changed + asks) * prompts.shared,
        compared=compared,
    )
