"""What is no language, and what a set of values says: means, intervals and limits."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steer2edit.behaviours.questions import Question, load_questions

from steer2edit.behaviours.degenerate import degenerate
from steer2edit.errors import FileError, RecipeError
from steer2edit.search.statistics import interval, paired_difference, rate, within

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
    found = interval([0, 1], 2000, seed=0)
    assert found == {"mean": 0.5, "low": 0.0, "high": 1.0, "n": 2, "method": "bootstrap"}


def test_the_bootstrap_interval_is_that_of_all_resamples() -> None:
    values = [0.0, 1.0, 3.0, 4.0]
    means = np.sort([np.mean(drawn) for drawn in itertools.product(values, repeat=4)])  # all 256
    found = interval(values, 20_000, seed=1)
    assert found["mean"] == 2.0
    assert found["low"] == pytest.approx(np.percentile(means, 2.5), abs=0.26)  # the means lie 0.25 apart
    assert found["high"] == pytest.approx(np.percentile(means, 97.5), abs=0.26)


def test_the_interval_of_a_rate_covers_the_truth_about_nineteen_times_of_twenty() -> None:
    draw = np.random.RandomState(5)
    covered = 0
    for i in range(200):
        found = interval(draw.rand(100) < 0.3, 400, seed=i)
        covered += found["low"] <= 0.3 <= found["high"]
    assert 180 <= covered <= 199


@pytest.mark.parametrize("n", [1, 8, 80])
def test_rates_of_zero_and_one_have_exact_intervals(n: int) -> None:
    # Clopper–Pearson with no success of n: the upper end p has (1 − p)ⁿ = 2.5 %.
    end = 1 - 0.025 ** (1 / n)
    none, every = interval([False] * n, 100, seed=0), interval([True] * n, 100, seed=0)
    assert (none["mean"], none["low"], none["n"], none["method"]) == (0.0, 0.0, n, "exact")
    assert none["high"] == pytest.approx(end, abs=1e-6)
    assert (every["mean"], every["high"], every["n"], every["method"]) == (1.0, 1.0, n, "exact")
    assert every["low"] == pytest.approx(1 - end, abs=1e-6)


def test_no_values_have_no_mean() -> None:
    assert interval([], 100, seed=0) == {"mean": None, "low": None, "high": None, "n": 0, "method": "none"}


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.RandomState(0).rand(30).tolist()
    assert interval(values, 200, seed=4) == interval(values, 200, seed=4)
    assert interval(values, 200, seed=4)["low"] != interval(values, 200, seed=5)["low"]
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
    with pytest.raises(ValueError, match="shapes"):
        paired_difference([1, 0], [1, 0, 1], 100, seed=0)


def test_a_rate_is_a_share_and_nothing_without_flags() -> None:
    assert rate([True, False, False, True, True]) == 0.6
    assert rate([]) is None


@pytest.mark.parametrize(
    ("trial", "limits", "inside"),
    [
        ({"cost": 0.2}, {"cost": 0.2}, True),
        ({"cost": 0.2}, {"cost": math.nextafter(0.2, 0)}, False),
        ({"cost": 0.2}, {"cost": None}, True),
        ({"cost": None}, {"cost": None}, True),
        ({"cost": None}, {"cost": 0.2}, False),
        ({}, {"cost": 0.2}, False),
        ({"cost": 0.1, "other": 0.9}, {"cost": 0.2, "other": 0.5}, False),
        ({"cost": 0.0}, {"cost": 0.0}, True),
        ({"cost": 0.3}, {"cost": 0.0}, False),
    ],
)
def test_a_trial_is_within_limits_if_each_limited_number_is_there_and_not_above(
    trial: dict[str, Any], limits: dict[str, float | None], inside: bool
) -> None:
    assert within(trial, limits) is inside


# Multiple choice ----------------------------------------------------------------------------------------------------


def _questions(folder: Path, *rows: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_questions_are_those_from_a_number_on(tmp_path: Path) -> None:
    rows = [{"question": f"Q{i}?", "choices": ["a", "b", "c"][: 2 + i % 2], "answer": i % 2} for i in range(5)]
    path = _questions(tmp_path, *rows)
    asked = [Question(f"Q{i}?", ("a", "b", "c")[: 2 + i % 2], i % 2) for i in range(5)]
    assert load_questions(path, 0, 2) == asked[:2]
    assert load_questions(str(path), 2, 3) == asked[2:]
    assert load_questions(path, 5, 0) == []


@pytest.mark.parametrize(
    "row",
    [
        {"choices": ["a", "b"], "answer": 0},
        {"question": "Q?", "answer": 0},
        {"question": "Q?", "choices": "ab", "answer": 0},
        {"question": "Q?", "choices": [], "answer": 0},
        {"question": "Q?", "choices": ["a", 2], "answer": 0},
        {"question": "Q?", "choices": ["a", " "], "answer": 0},
        {"question": " ", "choices": ["a", "b"], "answer": 0},
        {"question": 7, "choices": ["a", "b"], "answer": 0},
        {"question": "Q?", "choices": ["a", "b"]},
        {"question": "Q?", "choices": ["a", "b"], "answer": 2},
        {"question": "Q?", "choices": ["a", "b"], "answer": -1},
        {"question": "Q?", "choices": ["a", "b"], "answer": True},
        {"question": "Q?", "choices": ["a", "b"], "answer": "a"},
        {"question": "Q?", "choices": ["a", "b"], "answer": 1.0},
    ],
)
def test_a_row_that_is_no_question_is_refused_with_its_line(row: dict[str, Any], tmp_path: Path) -> None:
    path = _questions(tmp_path, {"question": "Q?", "choices": ["a"], "answer": 0}, row)
    with pytest.raises(FileError, match=r"line 2 of .*questions\.jsonl is not a question .* Write a question, its"):
        load_questions(path, 0, 1)


def test_too_few_questions_are_refused_with_both_numbers(tmp_path: Path) -> None:
    path = _questions(tmp_path, *[{"question": "Q?", "choices": ["a", "b"], "answer": 1}] * 3)
    with pytest.raises(RecipeError, match=r"has too few questions \(got: 3, 4 asked\)\. Ask for fewer"):
        load_questions(path, 2, 2)


def test_questions_that_are_nowhere_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no such file \(got: .*none\.jsonl"):
        load_questions(tmp_path / "none.jsonl", 0, 1)
