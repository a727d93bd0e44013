"""The two sides of a behaviour of one's own: how their files are read, and how prompts are divided into splits."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sides import three_parts, write_rows
from steer2edit.behaviours.base import SPLITS, Split
from steer2edit.behaviours.contrast import MOST, Pair, Side, divided, read_pairs, read_prompts
from steer2edit.errors import FileError, RecipeError, Steer2EditError
from steer2edit.files.schema import parse

NOTHING: dict[Split, int | None] = dict.fromkeys(SPLITS)


def _wanted(**counts: int) -> dict[Split, int | None]:
    return {split: counts.get(split) for split in SPLITS}


def _pairs(count: int, splits: Sequence[Split | None] = (None,)) -> list[Pair]:
    return [Pair(f"Prompt {i}", f"more {i}", f"less {i}", splits[i % len(splits)]) for i in range(count)]


def _rows(side: str, *prompts: str) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "response": f"{side} of {prompt}"} for prompt in prompts]


# Files of responses ---------------------------------------------------------------------------------------------------


def test_two_files_are_joined_by_prompt_in_the_order_of_the_first(tmp_path: Path) -> None:
    more = write_rows(tmp_path / "more.jsonl", _rows("more", "B", "A", "only more"))
    less = write_rows(tmp_path / "less.jsonl", _rows("less", "only less", " a ", "B"))
    assert read_pairs(more, less) == [
        Pair("B", "more of B", "less of B"),
        Pair("A", "more of A", "less of  a "),
        Pair("only more", "more of only more", None),
        Pair("only less", None, "less of only less"),
    ]
    assert [pair.is_whole for pair in read_pairs(more, less)] == [True, True, False, False]


def test_one_file_can_hold_both_sides(tmp_path: Path) -> None:
    rows = [{"prompt": "A", "more": "yes", "less": "no", "split": "test"}, {"prompt": "B", "more": "ja", "less": "ne"}]
    file = write_rows(tmp_path / "both.jsonl", rows)
    assert read_pairs(file, file) == [Pair("A", "yes", "no", "test"), Pair("B", "ja", "ne")]


def test_of_several_responses_to_a_prompt_the_first_is_taken_and_the_others_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        write_rows(tmp_path / f"{side}.jsonl", [{"prompt": "A", "response": f"{side} {i}"} for i in range(count)])
        for side, count in (("more", 3), ("less", 2))
    ]
    assert read_pairs(*files) == [Pair("A", "more 0", "less 0")]
    assert "3 further responses to prompts that have one already are left out" in capsys.readouterr().err


def test_the_bundled_pairs_are_whole() -> None:
    counts = dict.fromkeys(("pirate", "lists", "mood"), 150) | dict.fromkeys(("stories", "letters", "sentences"), 60)
    for name, count in counts.items():
        pairs = read_pairs(f"builtin:{name}", f"builtin:{name}")
        assert len(pairs) == count
        assert all(pair.is_whole and pair.more != pair.less for pair in pairs)


def test_prompts_that_differ_in_signs_alone_are_different_prompts(tmp_path: Path) -> None:
    prompts = ["What is 7 + 2?", "What is 7 - 2?", "What is 7 * 2?"]
    more = write_rows(tmp_path / "more.jsonl", _rows("more", *prompts))
    less = write_rows(tmp_path / "less.jsonl", _rows("less", *prompts))
    assert read_pairs(more, less) == [Pair(p, f"more of {p}", f"less of {p}") for p in prompts]


def test_conversations_that_end_alike_are_different_prompts(tmp_path: Path) -> None:
    def talk(first: str) -> list[dict[str, str]]:
        turns = [("user", first), ("assistant", "Well."), ("user", "Go on.")]
        return [{"role": role, "content": content} for role, content in turns]

    rows = [{"prompt": talk(f), "more": f"more of {f}", "less": f"less of {f}"} for f in ("Cats?", "Dogs?")]
    file = write_rows(tmp_path / "talks.jsonl", rows)
    assert [(pair.prompt, pair.more) for pair in read_pairs(file, file)] == [
        (talk("Cats?"), "more of Cats?"),
        (talk("Dogs?"), "more of Dogs?"),
    ]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "A"}, "line 2 of less.jsonl is no response"),
        ({"response": "a"}, "line 2 of less.jsonl is no response"),
        ({"prompt": 7, "response": "a"}, "line 2 of less.jsonl is no response"),
        ({"prompt": "A", "response": ["a"]}, "line 2 of less.jsonl is no response"),
        ({"prompt": "A", "response": "a", "split": "train"}, "line 2 of less.jsonl is no response"),
        ({"prompt": "A", "response": ""}, "line 2 of less.jsonl has an empty response"),
        ({"prompt": "A", "response": " \n"}, "line 2 of less.jsonl has an empty response"),
        ({"prompt": "A", "less": ""}, "line 2 of less.jsonl has an empty response"),
    ],
)
def test_a_line_that_is_no_response_is_named(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    more = write_rows(tmp_path / "more.jsonl", _rows("more", "A"))
    less = write_rows(tmp_path / "less.jsonl", [*_rows("less", "B"), row])
    with pytest.raises(FileError) as error:
        read_pairs(more, less)
    assert three_parts(error.value)[0] == what
    assert error.value.fix in (
        'Write {"prompt": …, "response": …} in each line.',
        "Write a response, or take the line out.",
    )


def test_files_without_a_line_and_files_that_are_not_there(tmp_path: Path) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(FileError) as error:
        read_pairs(empty, empty)
    assert three_parts(error.value) == (
        f"{empty} is empty",
        "no response",
        "Write one JSON object a line: prompt, response.",
    )
    with pytest.raises(FileError, match=r"^no such file \(got: .*nowhere\.jsonl\)\. Check the path\.$"):
        read_pairs(str(tmp_path / "nowhere.jsonl"), empty)
    with pytest.raises(FileError, match=r"^no such set comes with the package \(got: builtin:pirates\)"):
        read_pairs("builtin:pirates", "builtin:pirates")


@pytest.mark.parametrize("twice", [True, False], ids=["one file twice", "a copy"])
def test_sides_with_the_same_responses_are_refused(tmp_path: Path, twice: bool) -> None:
    more = write_rows(tmp_path / "more.jsonl", _rows("a", "A", "B"))
    less = more if twice else write_rows(tmp_path / "less.jsonl", _rows("a", "B", "A"))
    with pytest.raises(RecipeError) as error:
        read_pairs(more, less)
    assert three_parts(error.value) == (
        "more and less are the same",
        f"{more} and {less}",
        "Give responses that differ in the behaviour.",
    )


def test_a_prompt_in_one_split_of_more_and_another_of_less_is_a_leak(tmp_path: Path) -> None:
    rows = {side: _rows(side, "A", "B") for side in ("more", "less")}
    for side, splits in (("more", ("probe", "test")), ("less", ("test", "test"))):
        for row, split in zip(rows[side], splits, strict=True):
            row["split"] = split
    more, less = (write_rows(tmp_path / f"{side}.jsonl", rows[side]) for side in ("more", "less"))
    with pytest.raises(RecipeError) as error:
        read_pairs(more, less)
    assert "two splits" in three_parts(error.value)[0]


# Files of prompts -----------------------------------------------------------------------------------------------------


def test_a_prompt_is_taken_once(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": "How are you?"}, {"prompt": "how  are you"}, {"prompt": talk}, {"prompt": "Why?", "more": "x"}]
    first, *others = read_prompts(write_rows(tmp_path / "p.jsonl", rows))
    assert first.prompt in ("How are you?", "how  are you")
    assert others == [Pair(talk), Pair("Why?")]


def test_a_prompt_in_two_splits_is_a_leak(tmp_path: Path) -> None:
    rows = [{"prompt": "How are you?", "split": "probe"}, {"prompt": "How are you", "split": "test"}]
    with pytest.raises(RecipeError) as error:
        read_prompts(write_rows(tmp_path / "p.jsonl", rows))
    assert three_parts(error.value) == (
        "a prompt of p.jsonl stands in two splits",
        "'how are you'",
        "Leave it in one of them: test prompts must be new to everything before.",
    )


@pytest.mark.parametrize("row", [{}, {"prompt": 3}, {"prompt": []}, {"question": "A"}, {"prompt": "A", "split": "t"}])
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    file = write_rows(tmp_path / "p.jsonl", [{"prompt": "A"}, row])
    with pytest.raises(FileError) as error:
        read_prompts(file)
    assert three_parts(error.value)[:2] == ("line 2 of p.jsonl is not a prompt", str(row))


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"p\.jsonl is empty \(got: no prompt\)"):
        read_prompts(write_rows(tmp_path / "p.jsonl", []))


# Splits ---------------------------------------------------------------------------------------------------------------


def test_a_seed_divides_in_one_way_and_another_in_another() -> None:
    pairs = _pairs(60)
    first, again, other = (divided(pairs, NOTHING, seed, "p") for seed in (3, 3, 4))
    assert first == again
    assert all(first[split] != other[split] for split in SPLITS)
    assert {p.prompt for p in first["test"]} != {p.prompt for p in other["test"]}


@pytest.mark.parametrize(
    ("size", "counts"),
    [(100, (45, 20, 35)), (40, (18, 8, 14)), (20, (9, 4, 7)), (150, (60, 30, 52)), (1000, (60, 40, 80))],
)
def test_without_counts_every_split_takes_its_share(size: int, counts: tuple[int, int, int]) -> None:
    splits = divided(_pairs(size), NOTHING, 0, "p")
    assert tuple(len(splits[split]) for split in SPLITS) == counts
    assert tuple(MOST[split] for split in SPLITS) == (60, 40, 80)


def test_splits_without_a_count_share_what_the_others_leave() -> None:
    splits = divided(_pairs(30), _wanted(test=10), 0, "p")  # 20 are left, of which 0.45/0.65 and 0.2/0.65
    assert [len(splits[split]) for split in SPLITS] == [13, 6, 10]
    splits = divided(_pairs(400), _wanted(probe=200), 0, "p")  # the most that validation and test take of 200
    assert [len(splits[split]) for split in SPLITS] == [200, 40, 80]


@given(
    size=st.integers(1, 200),
    seed=st.integers(0, 9),
    counts=st.tuples(*[st.none() | st.integers(1, 90)] * 3),
)
def test_no_prompt_is_in_two_splits_and_counts_are_kept(
    size: int, seed: int, counts: tuple[int | None, int | None, int | None]
) -> None:
    wanted: dict[Split, int | None] = dict(zip(SPLITS, counts, strict=True))
    left = size - sum(count or 0 for count in counts)
    if left < (15 if None in counts else 0):  # of fifteen the smallest share is a whole one
        with contextlib.suppress(RecipeError):
            _assert_divided(divided(_pairs(size), wanted, seed, "p"), wanted, size)
        return
    _assert_divided(divided(_pairs(size), wanted, seed, "p"), wanted, size)


def _assert_divided(splits: Mapping[Split, Sequence[Pair]], wanted: Mapping[Split, int | None], size: int) -> None:
    prompts = [pair.prompt for split in SPLITS for pair in splits[split]]
    assert len(set(map(str, prompts))) == len(prompts)
    assert set(map(str, prompts)) <= {str(pair.prompt) for pair in _pairs(size)}
    for split, count in wanted.items():
        taken = len(splits[split])
        assert taken == count if count is not None else 1 <= taken <= MOST[split]


@pytest.mark.parametrize(
    ("size", "counts"), [(6, (3, 2, 2)), (6, (5, 1, None)), (2, (None, None, None)), (0, (1, 1, 1))]
)
def test_more_than_there_are_cannot_be_had(size: int, counts: tuple[int | None, ...]) -> None:
    with pytest.raises(RecipeError, match=r"^p has too few lines"):
        divided(_pairs(size), dict(zip(SPLITS, counts, strict=True)), 0, "p")


def test_rows_that_name_their_split_lie_in_it_in_the_files_order() -> None:
    pairs = _pairs(12, ("test", "probe", "validation", "test"))
    for seed in (0, 1):
        splits = divided(pairs, NOTHING, seed, "p")
        assert [pair.prompt for pair in splits["test"]] == [f"Prompt {i}" for i in (0, 3, 4, 7, 8, 11)]
        assert [pair.prompt for pair in splits["probe"]] == [f"Prompt {i}" for i in (1, 5, 9)]
        assert [pair.prompt for pair in splits["validation"]] == [f"Prompt {i}" for i in (2, 6, 10)]
    few = divided(pairs, _wanted(test=2, probe=3), 0, "p")
    assert [pair.prompt for pair in few["test"]] == ["Prompt 0", "Prompt 3"]
    assert [len(few[split]) for split in SPLITS] == [3, 3, 2]


def test_too_few_lines_are_said_with_what_was_asked() -> None:
    with pytest.raises(RecipeError) as error:
        divided(_pairs(6), _wanted(probe=3, validation=3, test=3), 0, "p.jsonl")
    assert three_parts(error.value) == (
        "p.jsonl has too few lines",
        "6; asked are 3 for probe, 3 for validation, 3 for test",
        "Add lines, or ask for fewer.",
    )
    named = _pairs(9, SPLITS)
    with pytest.raises(RecipeError, match=r"^p has too few lines .*asked are 3 for probe, 3 for validation, 4 for te"):
        divided(named, _wanted(test=4), 0, "p")
    with pytest.raises(RecipeError, match=r"^p has too few lines"):
        divided(_pairs(8, ("probe", "test")), NOTHING, 0, "p")  # no row is of validation
    with pytest.raises(RecipeError, match=r"^p has too few lines \(got: 2;"):
        divided(_pairs(2), NOTHING, 0, "p")


def test_either_all_rows_name_their_split_or_none() -> None:
    with pytest.raises(RecipeError) as error:
        divided(_pairs(9, ("probe", None, "test")), NOTHING, 0, "p.jsonl")
    assert three_parts(error.value) == (
        "only some rows of p.jsonl name their split",
        "6 of 9",
        "Name all or none.",
    )


# A side as a section --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "said"),
    [
        ({}, "Give either a system prompt or a file of responses"),
        ({"system": "Be loud.", "file": "a.jsonl"}, "Give either a system prompt or a file of responses"),
        ({"file": "a.jsonl", "model": "m"}, "A file has its responses: leave model out"),
        ({"system": "Be loud.", "endpoint": "http://localhost/v1"}, "Name the endpoint's model"),
        ({"system": " "}, "side.system"),
        ({"sistem": "Be loud."}, "Did you mean 'system'"),
    ],
)
def test_a_side_has_one_origin(side: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse(Side, side, under="side")
    assert said in " ".join(three_parts(error.value))


def test_a_side_can_be_an_instruction_a_file_or_another_models() -> None:
    assert parse(Side, {"system": "Be loud."}).system == "Be loud."
    assert parse(Side, {"file": "a.jsonl"}).file == "a.jsonl"
    served = parse(Side, {"system": "Be loud.", "model": "m", "endpoint": "http://localhost/v1", "key": "MY_KEY"})
    assert (served.model, served.endpoint, served.key) == ("m", "http://localhost/v1", "MY_KEY")


def test_a_key_in_place_of_its_name_is_not_repeated() -> None:
    secret = "sk-very-secret-0123456789"
    raw = {"system": "Be loud.", "model": "m", "endpoint": "http://localhost/v1", "key": secret}
    with pytest.raises(Steer2EditError) as error:
        parse(Side, raw)
    assert secret not in str(error.value)


def test_an_endpoint_with_a_password_in_it_is_refused() -> None:
    raw = {"system": "Be loud.", "model": "m", "endpoint": "http://user:secret-word@localhost/v1"}
    with pytest.raises(RecipeError) as error:
        parse(Side, raw)
    assert "secret-word" not in str(error.value)
