"""Ratios of times taken in one run: the two sides take turns, so that a noisy machine disturbs both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def seconds(work: Callable[[], object], after: Callable[[], object] = lambda: None) -> float:
    start = time.perf_counter()
    work()
    took = time.perf_counter() - start
    after()
    return took


def ratio(
    ours: Callable[[], object],
    other: Callable[[], object],
    rounds: int,
    allowed: tuple[str, float],
    label: str,
    after: Callable[[], object] = lambda: None,
) -> float:
    """Prints and returns the median over rounds of time(ours) / time(other), after one round that does not count.

    Args:
        after: run after each side, and not counted.
    """
    seconds(ours, after), seconds(other, after)
    ratios = []
    for i in range(rounds):
        # Who goes first changes, so that what the first leaves in the caches helps neither.
        if i % 2:
            b, a = seconds(other, after), seconds(ours, after)
        else:
            a, b = seconds(ours, after), seconds(other, after)
        ratios.append(a / b)
    middle = statistics.median(ratios)
    report(label, middle, allowed, f"rounds {', '.join(f'{r:.3f}' for r in ratios)}")
    return middle


def report(label: str, value: float, allowed: tuple[str, float], note: str = "") -> None:
    """Prints one line: the figure, what it must be, and whether it is."""
    sign, bound = allowed
    holds = value <= bound if sign == "<=" else value >= bound
    print(f"{label}: {value:.3f} (must be {sign} {bound:g}: {'holds' if holds else 'MISSED'}) {note}", flush=True)
