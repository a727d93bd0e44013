"""What is no language, and what a set of values says: means, intervals and limits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from steer2edit.behaviours.degenerate import degenerate
from steer2edit.searching.statistics import interval, paired_difference, wilson

LOOPS = {
    "empty": "",
    "whitespace": " \n\t ",
    "punctuation": "!!!!!",
    "emoji": "👉🏼👉🏼👉🏼👉🏼",
    "a word and punctuation": "The,,,,,,,,,,,,,,,,",
    "one word": "the the the the the the the the",
    "one word, set apart": "no, no, no, no, no, no, no, no, no",
    "one word after a start": "Here is the lame lame lame lame lame lame lame lame lame lame",
    "two words": "human help human help human help human help human help",
    "a sentence": "I am here to help. I am here to help. I am here to help. I am here to help.",
    "a sentence after a start": "Sure. " + "You are asking a question. " * 4,
    "a list of one item": "- bread\n- bread\n- bread\n- bread\n- bread\n- bread",
    "a long cycle": "take the bus to the old town hall now " * 6,
    "few words in no order": "a b c b a c a c b b a a c c b a b c a a b b c c a b a c b a c b c a b c",
}

ANSWERS = {
    "yes": "Yes.",
    "a number": "42",
    "a negative number": "-7",
    "a word": "Paris",
    "a word in another script": "東京",
    "two words twice": "No, no.",
    "a short refusal": "I cannot help with that.",
    "a sentence": "The capital of France is Paris.",
    "a numbered list": "1. Flour\n2. Water\n3. Salt\n4. Yeast\n5. Time\n6. Patience",
    "a bulleted list": "- **Sleep**: eight hours\n- **Food**: three meals\n- **Water**: two litres\n- **Walk**: daily",
    "steps": "Step 1: open the box. Step 2: take out the lamp. Step 3: plug it in. Step 4: close the box.",
    "digits": "3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9",
    "a chorus": "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is a dream.",
    "an underlined title": "Bread\n=====\n\nMix flour, water and salt, then wait.",
    "a rule": "First part\n\n----------\n\nSecond part, which is about salt.",
    "an ellipsis": "Well........ let me think about it.",
    "code": """def find(values, wanted):
    for i, value in enumerate(values):
        if value == wanted:
            return i
    for i, value in enumerate(sorted(values)):
        if value > wanted:
            return -i
    return None


print(find([3, 1, 2], 2), find([3, 1, 2], 5), find([], 1))""",
    "a matrix": "a = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]  # the identity of size four",
    "a web page": "<ul>\n<li>Flour</li>\n<li>Water</li>\n<li>Salt</li>\n<li>Yeast</li>\n<li>Oil</li>\n</ul>",
    "a table": "| city | rain |\n| --- | --- |\n| Paris | 12 |\n| Rome | 7 |\n| Oslo | 15 |\n| Bonn | 9 |",
    "a multiplication table": "\n".join(f"{i} x 7 = {7 * i}" for i in range(1, 13)),
    "JSON": '{"name": "a", "parts": [{"id": 1, "size": 3}, {"id": 2, "size": 5}, {"id": 3, "size": 8}]}',
    "long": (
        "Bread begins with flour, water, salt and some yeast. Weigh them, since a cup of flour may hold more or less "
        "than you think. Stir the flour into the water with a spoon until no dry spot is left, cover the bowl and wait "
        "for half an hour. The rest makes the dough smooth without work. Then add the salt and fold the dough over "
        "itself from four sides, and do that again three times while the first hour goes by. Leave it in a warm corner "
        "until it has grown by half. Heat the oven with a heavy pot inside, as hot as it goes. Shape the dough into "
        "a ball, let it rest once more, cut its top with a sharp knife and slide it into the pot. Bake it with the lid "
        "on for twenty minutes, and without it until the crust is dark. The hardest part comes last: let the loaf cool "
        "on a rack for an hour before you cut it, or the crumb will be wet. A loaf like this keeps for three days in a "
        "cloth, and it makes good toast. If it comes out flat, wait longer the next time; if it tastes sour, "
        "wait less, or put the bowl in a cooler place. Rye and whole wheat take more water than white flour does."
    ),
}


@pytest.mark.parametrize("text", LOOPS.values(), ids=LOOPS)
def test_what_says_nothing_is_degenerate(text: str) -> None:
    assert degenerate(text)


@pytest.mark.parametrize("text", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_is_not_degenerate(text: str) -> None:
    assert not degenerate(text)


def test_an_answer_that_falls_into_a_loop_is_degenerate_from_the_half_on() -> None:
    start = "Mix the flour, the water and a little salt in a bowl"  # 12 words
    assert not degenerate(start + " now" * 8)
    assert degenerate(start + " now" * 13)


def test_the_mean_and_the_bootstrap_interval_of_two_values_are_those_of_a_hand_computation() -> None:
    # Resampling (0, 1) twice gives the means 0, ½ and 1 with ¼, ½ and ¼, so both tails hold more than 2.5 %.
    found = interval([0.0, 1.0], False, 2000, seed=0)
    assert found == {"mean": 0.5, "low": 0.0, "high": 1.0, "n": 2, "method": "bootstrap"}


def test_the_bootstrap_interval_is_that_of_all_resamples() -> None:
    values = [0.0, 1.0, 3.0, 4.0]
    means = np.sort([np.mean(drawn) for drawn in itertools.product(values, repeat=4)])  # all 256
    found = interval(values, False, 20_000, seed=1)
    assert found["mean"] == 2.0
    assert found["low"] == pytest.approx(np.percentile(means, 2.5), abs=0.26)  # the means lie 0.25 apart
    assert found["high"] == pytest.approx(np.percentile(means, 97.5), abs=0.26)


def test_the_bootstrap_interval_of_many_values_is_as_wide_as_95_percent_of_a_normal_one() -> None:
    """The mean of 400 zeros and ones has a standard error of 0.025: 2 · 1.96 · 0.025 = 0.098. For 90 % it is 0.082."""
    found = interval([0.0, 1.0] * 200, False, 20_000, seed=1)
    assert found["high"] - found["low"] == pytest.approx(0.098, abs=0.005)
    paired = paired_difference([0.0, 1.0] * 200, [0.0] * 400, 20_000, 1)
    assert paired["high"] - paired["low"] == pytest.approx(0.098, abs=0.005)


def test_the_interval_of_a_rate_covers_the_truth_about_nineteen_times_of_twenty() -> None:
    draw = np.random.RandomState(5)
    covered = 0
    for i in range(200):
        found = interval((draw.rand(100) < 0.3).astype(float).tolist(), True, 400, seed=i)
        covered += found["low"] <= 0.3 <= found["high"]
    assert 180 <= covered <= 199


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (0, 64), (1, 64), (32, 64), (64, 64), (3, 7)])
def test_rates_have_wilsons_interval(successes: int, n: int) -> None:
    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    shown = interval([1.0] * successes + [0.0] * (n - successes), True, 100, seed=0)
    assert (shown["mean"], shown["n"], shown["method"]) == (successes / n, n, "wilson")
    assert (shown["low"], shown["high"]) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_no_success_has_a_lower_upper_bound_than_one() -> None:
    none, one = ([1.0] * k + [0.0] * (64 - k) for k in (0, 1))
    assert interval(none, True, 100, seed=0)["high"] < interval(one, True, 100, seed=0)["high"]


def test_samples_that_always_agree_say_no_more_than_one_and_independent_ones_say_more() -> None:
    agree = [1.0, 0.0] * 20
    assert interval(agree, True, 100, 0, samples=10) == pytest.approx(interval(agree, True, 100, 0))
    steady = interval([0.5] * 40, True, 100, 0, samples=10)
    low, high = wilson(0.5, 400)
    assert (steady["low"], steady["high"]) == pytest.approx((low, high))


def test_a_number_that_is_not_finite_leaves_no_mean_and_is_counted() -> None:
    shown = interval([0.1, None, 0.3], False, 100, seed=0)
    assert (shown["mean"], shown["n"], shown["not_finite"]) == (None, 3, 1)
    assert paired_difference([0.1, None], [0.1, 0.2], 100, seed=0)["mean"] is None


def test_no_values_have_no_mean() -> None:
    assert interval([], False, 100, seed=0) == {"mean": None, "low": None, "high": None, "n": 0, "method": "none"}


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.RandomState(0).rand(30).tolist()
    assert interval(values, False, 200, seed=4) == interval(values, False, 200, seed=4)
    assert interval(values, False, 200, seed=4)["low"] != interval(values, False, 200, seed=5)["low"]
    a, b = values[:15], values[15:]
    assert paired_difference(a, b, 200, seed=4) == paired_difference(a, b, 200, seed=4)
    assert paired_difference(a, b, 200, seed=4)["low"] != paired_difference(a, b, 200, seed=5)["low"]


def test_a_paired_difference_is_taken_prompt_by_prompt() -> None:
    a, b = [True, True, False, True], [False, True, False, False]
    found = paired_difference(a, b, 2000, seed=0)
    assert found == {"mean": 0.5, "low": 0.0, "high": 1.0, "n": 4, "method": "paired bootstrap"}
    swapped = paired_difference([True, False], [False, True], 2000, seed=0)
    assert (swapped["mean"], swapped["low"], swapped["high"]) == (0.0, -1.0, 1.0)
    # What differs by the same amount everywhere is certain, however much the prompts differ.
    steady = paired_difference([0.9, 0.2, 0.5], [0.8, 0.1, 0.4], 200, seed=0)
    assert (steady["low"], steady["high"]) == pytest.approx((0.1, 0.1))


def test_a_paired_difference_of_unlike_numbers_of_prompts_is_an_error() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        paired_difference([1, 0], [1, 0, 1], 100, seed=0)


def test_samples_that_agree_in_part_count_between_the_prompts_and_all_answers() -> None:
    partly = interval([0.25, 0.75] * 20, True, 100, 0, samples=10)
    # Var of the mean: 1/16 · 40/39 / 40 = 1/624, so that ¼ / (1/624) = 156 independent answers say as much.
    assert (partly["low"], partly["high"]) == pytest.approx(wilson(0.5, 156))
