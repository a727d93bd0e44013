"""Means over seeds, sets and prompts, products, and differences at an equal cost."""

from __future__ import annotations

import numpy as np
import pytest

from steer2edit.paper.pooling import NONE, Point, at_equal_cost, difference, draws, pooled, product
from steer2edit.searching.statistics import interval, paired_difference

RESAMPLES = 500


def test_one_seed_has_the_interval_of_every_other_table() -> None:
    values = (1.0, 0.0, 1.0, 1.0)
    number, known = pooled([values], True, RESAMPLES, 3), interval(values, True, RESAMPLES, 3)
    assert (number.mean, number.low, number.high, number.n, number.seeds) == (0.75, known["low"], known["high"], 4, 1)
    other, known = pooled([values], False, RESAMPLES, 3), interval(values, False, RESAMPLES, 3)
    assert (other.low, other.high) == (known["low"], known["high"])


def test_seeds_weigh_alike_whatever_their_prompts() -> None:
    number = pooled([(1.0, 1.0), (0.0, 0.0, 0.0, 0.0)], True, RESAMPLES, 0)
    assert (number.mean, number.n, number.seeds) == (0.5, 6, 2)
    # Nothing varies within a seed: what is left is which seeds are drawn, and two of two are both, or one twice.
    assert (number.low, number.high) == (0.0, 1.0)


def test_an_interval_over_alike_seeds_is_that_over_prompts() -> None:
    draw = np.random.default_rng(0)
    values = tuple(draw.normal(size=80).tolist())
    one, two = pooled([values], False, 4000, 0), pooled([values, values], False, 4000, 0)
    assert two.mean == pytest.approx(one.mean)
    width = [number.high - number.low for number in (one, two)]  # type: ignore[operator]
    # Each seed's prompts are drawn by themselves, so that the mean of two is narrower, but not below 1/√2.
    assert 0.65 * width[0] < width[1] < 1.02 * width[0]


def test_sets_weigh_alike_whatever_their_questions() -> None:
    found = draws([[(1.0,), (0.0, 0.0, 0.0)]], RESAMPLES, 0)
    assert found is not None
    assert (found.mean, found.n, found.seeds) == (0.5, 4, 1)
    assert set(found.drawn.tolist()) == {0.5}


@pytest.mark.parametrize("strata", [[], [[]], [[()]], [[(1.0, None)]], [[(1.0,)], [(1.0,), (0.0,)]]])
def test_what_is_missing_or_not_finite_has_no_mean(strata: list[list[tuple[float | None, ...]]]) -> None:
    assert draws(strata, RESAMPLES, 0) is None


def test_a_value_that_is_not_finite_leaves_no_number() -> None:
    assert pooled([(1.0, None)], False, RESAMPLES, 0).mean is None
    assert pooled([(1.0, None), (1.0, 0.0)], False, RESAMPLES, 0) == NONE


def test_differences_are_paired() -> None:
    a, b = (1.0, 0.0, 1.0), (0.0, 0.0, 1.0)
    known = paired_difference(a, b, RESAMPLES, 0)
    number = difference([(a, b)], RESAMPLES, 0)
    assert (number.mean, number.low, number.high) == (known["mean"], known["low"], known["high"])
    two = difference([(a, b), (b, a)], RESAMPLES, 0)
    assert two.mean == 0.0
    assert two.low is not None
    assert two.low < 0
    assert difference([(a, b[:2])], RESAMPLES, 0) == NONE


def test_a_product_is_that_of_the_means_with_the_interval_of_both() -> None:
    one, other = draws([[(0.5, 0.5)]], RESAMPLES, 0), draws([[(0.0, 1.0)]], RESAMPLES, 1)
    number = product(one, other)
    assert number.mean == 0.25
    assert (number.low, number.high) == (0.0, 0.5)
    assert product(other, one, divide=True).mean == 1.0
    assert product(one, other, divide=True) == NONE  # some resample divides by 0
    assert product(one, None) == NONE


def constant(cost: float, shown: float) -> Point:
    return Point((cost, cost), (shown, shown, shown))


def test_at_an_equal_cost_the_curve_is_interpolated() -> None:
    curve = [constant(0.0, 0.1), constant(0.4, 0.5), constant(0.2, 0.3)]
    number = at_equal_cost([(constant(0.3, 0.7), curve)], RESAMPLES, 0)
    assert number.mean == pytest.approx(0.7 - 0.4)
    assert (number.low, number.high, number.n) == (pytest.approx(0.3), pytest.approx(0.3), 3)


def test_where_the_curve_does_not_reach_the_cost_there_is_no_number() -> None:
    curve = [constant(0.0, 0.1), constant(0.2, 0.3)]
    assert at_equal_cost([(constant(0.3, 0.7), curve)], RESAMPLES, 0).mean is None
    assert at_equal_cost([(constant(0.1, 0.7), curve[:1])], RESAMPLES, 0) == NONE
    assert at_equal_cost([], RESAMPLES, 0).mean is None


def test_an_interval_at_an_equal_cost_shares_the_resampled_prompts() -> None:
    """Edit and curve differ by a constant on every prompt, so that resampling moves both alike."""
    shown = (0.0, 1.0, 0.0, 1.0, 1.0)
    more = tuple(value + 0.25 for value in shown)
    curve = [Point((0.0,), shown), Point((1.0,), shown)]
    number = at_equal_cost([(Point((0.5,), more), curve)], RESAMPLES, 0)
    assert (number.mean, number.low, number.high) == (pytest.approx(0.25),) * 3


def test_two_seeds_are_averaged() -> None:
    curve = [constant(0.0, 0.0), constant(1.0, 0.0)]
    number = at_equal_cost([(constant(0.5, 0.2), curve), (constant(0.5, 0.6), curve)], RESAMPLES, 0)
    assert number.mean == pytest.approx(0.4)
    assert (number.low, number.high, number.seeds) == (pytest.approx(0.2), pytest.approx(0.6), 2)


def test_a_relative_difference_is_a_share_of_the_curve() -> None:
    curve = [constant(0.0, 100.0), constant(1.0, 60.0)]
    assert at_equal_cost([(constant(0.5, 60.0), curve)], RESAMPLES, 0, relative=True).mean == pytest.approx(-0.25)
    none = [constant(0.0, 0.0), constant(1.0, 0.0)]
    assert at_equal_cost([(constant(0.5, 60.0), none)], RESAMPLES, 0, relative=True).mean is None


def test_an_interval_at_an_equal_cost_holds_what_the_costs_leave_open() -> None:
    """What is shown is certain; only the edit's cost varies, and with it the curve's height there."""
    edit = Point((0.0, 1.0) * 20, (0.5,))
    curve = [Point((0.0,) * 40, (0.0,)), Point((1.0,) * 40, (1.0,))]
    number = at_equal_cost([(edit, curve)], RESAMPLES, 0)
    # The mean of 40 zeros and ones has a standard error of 0.079.
    assert (number.mean, number.low, number.high) == pytest.approx((0.0, -0.155, 0.155), abs=0.04)


def test_where_most_resamples_do_not_reach_the_edits_cost_there_is_no_interval() -> None:
    """A seed reaches it in the 65 % of its resamples that draw the first item; all of three seeds do in 42 %."""
    edit = Point((0.0, *(1.0,) * 10), (0.7,))
    curve = [Point((0.0,) * 11, (0.1,)), Point((0.91,) * 11, (0.5,))]
    number = at_equal_cost([(edit, curve)] * 3, RESAMPLES, 0)
    assert number.mean is not None
    assert (number.low, number.high) == (None, None)
