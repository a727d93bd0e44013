"""Edits by the block types that they may change: as many of each, and the best of each by the rule."""

from __future__ import annotations

from typing import Any

import pytest

from steer2edit.behaviours.base import UTILITY_LOSS
from steer2edit.behaviours.safety import OVER_REFUSAL, REFUSAL
from steer2edit.searching.candidates import Trial, edited
from steer2edit.searching.choice import by_block
from steer2edit.searching.front import Aim, hypervolume
from steer2edit.searching.grid import evenly
from steer2edit.searching.study import Study

AIM = Aim(REFUSAL, {OVER_REFUSAL: 0.5, UTILITY_LOSS: 0.6})


def _trial(rho_attn: float | None, rho_mlp: float | None, cost: float, refusal: float, over: float = 0.1) -> Trial:
    means = {"utility_loss": cost, "refusal": refusal, "over_refusal": over}
    return Trial(edited(rho_attn, rho_mlp, 0.4), {name: (mean,) for name, mean in means.items()}, "0")


ATTENTION = [
    _trial(rho, None, cost, refusal) for rho, cost, refusal in ((0.5, 0.1, 0.2), (0.4, 0.2, 0.9), (0.3, 0.5, 0.4))
]
MLP = [_trial(None, 0.5, 0.2, 0.3), _trial(None, 0.2, 0.3, 0.8, over=0.9)]
BOTH = [_trial(0.5, 0.5, 0.4, 0.5), _trial(0.3, 0.3, 0.8, 1.0)]


def _shown(trials: list[Trial]) -> dict[str, Any]:
    return by_block(Study(trials), AIM, resamples=20, seed=0)


def test_each_sort_has_as_many_configurations_as_the_rarest_spread_evenly() -> None:
    shown = _shown([*ATTENTION, *MLP, *BOTH])
    assert list(shown) == ["attention alone", "MLP alone", "both"]
    assert [(row["tried"], row["compared"]) for row in shown.values()] == [(3, 2), (2, 2), (2, 2)]
    # The best attention edit is the middle one, which has no place among two of three.
    assert shown["attention alone"]["best"]["id"] == ATTENTION[2].candidate.id
    assert shown["attention alone"]["best"]["refusal"] == 0.4
    # Within the limits: the second MLP edit refuses too much, the second of both costs too much.
    assert shown["MLP alone"]["best"]["id"] == MLP[0].candidate.id
    assert shown["both"]["best"]["config"] == {"rho_attn": 0.5, "rho_mlp": 0.5, "alpha": 0.4}
    volumes = [row["hypervolume"]["mean"] for row in shown.values()]
    points = [[(0.1, 0.2), (0.5, 0.4)], [(0.2, 0.3)], [(0.4, 0.5), (0.8, 1.0)]]  # the loss's own limit does not count
    assert volumes == pytest.approx([hypervolume(some, 1.0) for some in points])


def test_a_sort_without_any_edit_within_the_limits_has_no_best() -> None:
    shown = _shown([*ATTENTION, MLP[1]])
    assert list(shown) == ["attention alone", "MLP alone"]
    assert shown["MLP alone"]["best"] is None
    assert shown["MLP alone"]["hypervolume"]["mean"] == 0


def test_a_search_of_one_sort_alone_has_nothing_to_compare() -> None:
    assert _shown(ATTENTION) == {}
    assert _shown([]) == {}


@pytest.mark.parametrize(("count", "most", "kept"), [(7, 3, [0, 3, 6]), (5, 2, [0, 4]), (3, 5, [0, 1, 2]), (4, 1, [0])])
def test_items_are_thinned_evenly(count: int, most: int, kept: list[int]) -> None:
    assert evenly(range(count), most) == kept
