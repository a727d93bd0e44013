"""How fast the loaded model is here: a few short batches, timed, and what a run's work takes at that speed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engines.base import Engine, Progress, Request
from ..method.intervention import NOTHING, Intervention, Term
from ..models.sites import find_sites
from ..recipe import Recipe
from .work import Work, beginning

# The rows of the timed batch grow until they are the run's, or until it takes this many seconds.
_BUDGET = 0.75
_FIRST_ROWS, _GROWTH = 4, 4
_SHORT, _LONG = 2, 8
_BATCHES = 3
# Different interventions in the timed batch, as in a search's.
_TABLE = 6
# What stages take that hardly ask the model.
_FIXED: Mapping[str, float] = {"score": 1.0, "export": 2.0, "report": 6.0}


@dataclass(frozen=True)
class Speed:
    """Seconds a token, with this many rows at once.

    Attributes:
        write: of an answer. read: of its prompt. compare: of what losses are measured on.
    """

    rows: int
    write: float
    read: float
    compare: float

    def seconds(self, work: Work) -> float:
        """How long a stage's work takes. The probe's pass reads, and sums what it reads."""
        passed = 1.5 * self.read * work.passed
        return self.write * work.written + self.read * work.read + self.compare * work.compared + passed


def interventions(engine: Engine, recipe: Recipe) -> list[Intervention]:
    """Small rank-1 edits at random of the blocks that the recipe edits; nothing where the engine hides its model."""
    model: Any = getattr(engine, "model", None)
    if model is None:
        return [NOTHING]
    off = {block for block in ("attn", "mlp") if getattr(recipe.search, f"rho_{block}") == [None]}
    sites = [site for site in find_sites(model) if site.block not in off and site.expert is None]
    draw = torch.Generator().manual_seed(0)
    table = []
    for number in range(_TABLE):
        terms = {
            site.key: Term(
                1e-4 * torch.randn(site.d, 1, generator=draw), 1e-2 * torch.randn(1, site.inputs, generator=draw)
            )
            for site in sites
        }
        table.append(Intervention(f"timing {number}", terms))
    return table


def measured(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    table: Sequence[Intervention],
    recipe: Recipe,
    progress: Progress | None = None,
) -> Speed:
    """Times short batches of answers and of losses.

    Args:
        prompts: token ids, at least one prompt.
    """
    report = progress or (lambda done, total: None)
    most = max(1, min(engine.slots, recipe.evaluation.rows))
    rows = min(_FIRST_ROWS, most)
    _answer(engine, prompts, table, rows, 1)  # the first batch warms up
    while True:
        short, few = _answer(engine, prompts, table, rows, _SHORT)
        if rows == most or short > _BUDGET:
            break
        rows = min(most, _GROWTH * rows)
    report(1, _BATCHES)
    long, many = _answer(engine, prompts, table, rows, _LONG)
    report(2, _BATCHES)
    write = (long - short) / (many - few) if many > few else long / max(1, many)
    write = max(write, 1e-9)
    shared, tail = beginning(prompts)
    # The shared beginning is read once under each intervention.
    read = max(short - few * write, 0.1 * short) / (rows * tail + min(rows, len(table)) * shared)
    compare = _compare(engine, prompts, table)
    report(_BATCHES, _BATCHES)
    return Speed(rows, write, read, compare)


def _answer(
    engine: Engine, prompts: Sequence[tuple[int, ...]], table: Sequence[Intervention], rows: int, tokens: int
) -> tuple[float, int]:
    """Seconds for a number of answers of a number of tokens, and how many tokens were written."""
    requests = [Request(prompts[row % len(prompts)], row % len(table)) for row in range(rows)]
    started = time.perf_counter()
    answers = engine.generate(requests, table, tokens)
    # The token that ends an answer is written too.
    written = sum(len(answer.ids) + answer.ended for answer in answers)
    return time.perf_counter() - started, written


def _compare(engine: Engine, prompts: Sequence[tuple[int, ...]], table: Sequence[Intervention]) -> float:
    """Seconds a token of losses, under every intervention and under none."""
    some = list(prompts[:2])
    pairs = [(ids, ids[-16:]) for ids in some]
    shared, tail = beginning(some)
    read = shared + len(pairs) * tail + sum(len(answer) for _, answer in pairs)
    started = time.perf_counter()
    engine.losses(pairs, table)
    return (time.perf_counter() - started) / (read * (1 + len(table)))


def seconds_of(work: Sequence[Work], speed: Speed, waiting: Sequence[str]) -> dict[str, float]:
    """Stage → about how many seconds it takes.

    Args:
        waiting: the stages that are not whole.
    """
    by_stage = {part.stage: speed.seconds(part) for part in work}
    return {stage: by_stage.get(stage, 0.0) + _FIXED.get(stage, 0.0) for stage in waiting}


def about(seconds: float) -> str:
    """A time in words, no more exact than it is.

    >>> about(4), about(47), about(400), about(5300), about(40000)
    ('about 5 s', 'about 45 s', 'about 7 min', 'about 1.5 h', 'about 11 h')
    """
    if seconds < 55:
        return f"about {max(5, 5 * round(seconds / 5)):g} s"
    minutes = seconds / 60
    if round(minutes) < 60:
        return f"about {max(1, round(minutes)):g} min"
    hours = minutes / 60
    return f"about {round(hours, 1) if hours < 10 else round(hours):g} h"


def rounded(count: float) -> str:
    """A count to two digits, with spaces between thousands.

    >>> rounded(42_311), rounded(1_284_000), rounded(7)
    ('42 000', '1 300 000', '7')
    """
    digits = len(str(int(count)))
    return f"{round(count, 2 - digits) if digits > 2 else round(count):,.0f}".replace(",", " ")
