"""The answer that a worked solution ends in, and when two answers are the same number."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer2edit.behaviours import mathematics
from steer2edit.behaviours.mathematics import final_answer, is_right


def test_the_examples_in_the_docstrings_hold() -> None:
    results = doctest.testmod(mathematics)
    assert results.attempted == 3
    assert not results.failed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 3 + 4 = 7.", "7"),
        (r"That is \boxed{7}.", "7"),
        (r"\boxed{1}, no: \boxed{ 2 } of 9", "2"),
        (r"\boxed {\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{x^{2}}} = 3", r"\sqrt{x^{2}}"),
        (r"\boxed{7 and no end, 12", "12"),
        ("She pays $1,050.50.", "1050.50"),
        ("She pays $ 15 in all", "15"),
        ("It fell to -4 degrees", "-4"),
        ("He owes -$20", "-20"),
        ("One half is 1/2.", "1/2"),
        ("It is 50%.", "50"),
        ("1,234,567 people", "1234567"),
        ("5 apples, 6 pears, 7, done", "7"),
        ("None at all.", None),
        ("", None),
    ],
)
def test_the_last_boxed_or_else_the_last_number_is_the_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("It is 42.", "42", True),
        ("It is 42.0", "42", True),
        ("It is 41.", "42", False),
        ("6 * 7 = 42", "6 * 7 = <<6*7=42>>42 #### 42", True),
        ("Half of 84 is 42, not 43", "42", False),
        ("She has $1,050.", "1050", True),
        ("She has 1050.", "1,050", True),
        ("About 3.14159", "3.14", True),
        ("About 3.15", "3.14", False),
        ("It is 1/2.", "0.5", True),
        (r"\boxed{\frac{1}{2}}", "1/2", True),
        (r"\boxed{\$50}", "50", True),
        (r"\boxed{50\%}", "50", True),
        (r"\boxed{1{,}000}", "1000", True),
        (r"\boxed{\text{50}}", "50", True),
        (r"\boxed{\$51}", "50", False),
        (r"\boxed{\dfrac{3}{4}}", "0.75", True),
        ("It is 1/0.", "1/0", True),
        ("It is 1/0.", "0", False),
        ("It is 50%.", "50", True),
        ("It is -4.", "4", False),
        (r"\boxed{x + 1}", "x + 1", True),
        (r"\boxed{x + 1}", "x + 2", False),
        (r"\boxed{}", "0", False),
        (r"\boxed{nan}", "nan", False),
        ("No number at all.", "0", False),
        ("", "42", False),
    ],
)
def test_a_solution_is_right_if_it_ends_in_the_same_number_or_text(text: str, answer: str, right: bool) -> None:
    assert is_right(text, answer) is right


@given(number=st.integers(-(10**9), 10**9))
def test_any_whole_number_is_found_with_and_without_commas(number: int) -> None:
    assert is_right(f"In all that makes {number}.", f"some steps #### {number:,}")
    assert is_right(f"In all that makes {number:,} dollars.", str(number))
    assert not is_right(f"In all that makes {number + 1}.", str(number))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is:\n- 42", "42"),  # an item of a list, not −42
        ("It takes 10-20 minutes", "20"),
        ("It is .5 of it", "0.5"),
        ("It is **42**", "42"),
        ("The total is 42.\n", "42"),
        ("x = −4", "-4"),  # the sign that typesetters write
    ],
)
def test_signs_that_are_no_minus_and_minuses_that_are_no_hyphen(text: str, answer: str) -> None:
    assert is_right(text, answer)
