"""A behaviour of one's own: its items, and which mistakes it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from own_behaviour import LOUD, SOFT, _files, _prompts, custom, of_files
from runs import FakeEngine, save_pico
from sides import small_recipe, source, three_parts, write_rows
from steer2edit.behaviours.base import SPLITS, Item, Split
from steer2edit.behaviours.contrast import read_prompts
from steer2edit.behaviours.custom import _OPEN, _PAIRS, EVERYDAY, PAIR, PROMPT, Custom
from steer2edit.behaviours.prompts import normalised
from steer2edit.errors import FileError, RecipeError, TraceError
from steer2edit.files.schema import parse
from steer2edit.recipe import parse_recipe


def _by_split(behaviour: Custom, where: Any) -> dict[Split, list[Item]]:
    return {split: behaviour.items(where, split) for split in SPLITS}


def _texts(items: list[Item], kind: str | None = None) -> list[str]:
    return [item.text for item in items if kind in (None, item.kind)]


# Items ----------------------------------------------------------------------------------------------------------------


def test_with_files_the_probe_gives_pairs_and_the_other_splits_prompts_and_choices(tmp_path: Path) -> None:
    items = _by_split(of_files(*_files(tmp_path, 60)), source(probe=10, validation=20, test=30))
    assert {item.kind for item in items["probe"]} == {PAIR}
    assert len(items["probe"]) == 10
    # A few are answered, which is enough to see a broken model. Some are compared on validation, and all on test.
    few, many = _OPEN["validation"], _OPEN["test"]
    assert few < _PAIRS < 20 < many < 30
    assert [item.kind for item in items["validation"]] == [PROMPT] * few + [PAIR] * _PAIRS
    assert [item.kind for item in items["test"]] == [PROMPT] * many + [PAIR] * 30
    assert _texts(items["test"], PAIR)[:many] == _texts(items["test"], PROMPT)
    assert _texts(items["validation"], PAIR)[:few] == _texts(items["validation"], PROMPT)
    for split in SPLITS:
        for item in items[split]:
            number = item.text.split()[-1]
            pair = (f"LOUD {number}", f"soft {number}")
            assert item.choices == (pair if item.kind == PAIR else ())
            assert item.target == (list(pair) if item.kind == PAIR else None)
    texts = {split: set(_texts(items[split])) for split in SPLITS}
    assert not texts["probe"] & texts["validation"]
    assert not texts["probe"] & texts["test"]
    assert not texts["validation"] & texts["test"]


def test_with_a_score_every_prompt_of_validation_is_answered_and_none_compared(tmp_path: Path) -> None:
    behaviour = of_files(*_files(tmp_path, 60), score={"phrases": ["loud"]})
    items = _by_split(behaviour, source(probe=10, validation=20, test=30))
    assert [{item.kind for item in items[split]} for split in SPLITS] == [{PAIR}, {PROMPT}, {PROMPT}]
    assert [len(items[split]) for split in SPLITS] == [10, 20, 30]
    assert not any(item.choices for item in items["test"])


def test_with_instructions_pairs_wait_for_what_the_model_answers(tmp_path: Path) -> None:
    items = _by_split(custom(), source(_prompts(tmp_path, 40)))
    assert [len(items[split]) for split in SPLITS] == [18, 8 + 8, 14 + 14]
    assert all(item.target == [None, None] for split in SPLITS for item in items[split] if item.kind == PAIR)
    assert not any(item.choices for split in SPLITS for item in items[split])


def test_without_prompts_those_of_the_package_are_asked() -> None:
    items = _by_split(custom(), source())
    known = {pair.prompt for pair in read_prompts(EVERYDAY)}
    assert {item.prompt for split in SPLITS for item in items[split]} <= known
    assert len(items["probe"]) == 60


@pytest.mark.parametrize("score", ["preference", {"phrases": ["loud"]}])
@pytest.mark.parametrize("files", [True, False])
def test_a_seed_divides_in_one_way_and_another_in_another(tmp_path: Path, score: Any, files: bool) -> None:
    behaviour = of_files(*_files(tmp_path, 40), score=score) if files else custom(score=score)
    path = None if files else _prompts(tmp_path, 40)
    first, again, other = (_by_split(behaviour, source(path, seed)) for seed in (0, 0, 1))
    assert first == again
    assert all({i.text for i in first[split]} != {i.text for i in other[split]} for split in SPLITS)


@given(size=st.integers(20, 120), seed=st.integers(0, 5), probe=st.none() | st.integers(1, 9))
def test_no_prompt_is_in_two_splits(tmp_path_factory: Any, size: int, seed: int, probe: int | None) -> None:
    path = _prompts(tmp_path_factory.mktemp("p"), size)
    counts = {} if probe is None else {"probe": probe}
    items = _by_split(custom(score={"length": "lower"}), source(path, seed, **counts))
    texts = [item.text for split in SPLITS for item in items[split]]
    assert len(set(texts)) == len(texts)
    assert probe is None or len(items["probe"]) == probe


@pytest.mark.parametrize("files", [True, False])
def test_rows_that_name_their_split_lie_in_it(tmp_path: Path, files: bool) -> None:
    named = [SPLITS[i % 3] for i in range(18)]
    rows = [{"prompt": f"Prompt {i}", "more": f"LOUD {i}", "less": f"soft {i}", "split": named[i]} for i in range(18)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    behaviour = of_files(path, path) if files else custom()
    items = _by_split(behaviour, source(None if files else path, seed=5))
    for number, split in enumerate(SPLITS):
        assert set(_texts(items[split])) == {f"Prompt {i}" for i in range(number, 18, 3)}


def test_a_response_without_its_other_side_is_a_trace_and_nothing_else(tmp_path: Path) -> None:
    more, less = _files(tmp_path, 20)
    with open(more, "a", encoding="utf-8") as file:
        file.write('{"prompt": "Alone", "response": "LOUD alone"}\n')
    items = _by_split(of_files(more, less), source())
    assert [split for split in SPLITS if "Alone" in _texts(items[split])] == ["probe"]
    (trace,) = [t for t in of_files(more, less).make_traces(FakeEngine(), items["probe"]) if t.prompt == "Alone"]
    assert (trace.response, trace.label) == ("LOUD alone", "positive")


def test_a_response_without_its_other_side_that_is_of_test_gives_no_trace(tmp_path: Path) -> None:
    rows = [{"prompt": f"Prompt {i}", "response": f"LOUD {i}", "split": SPLITS[i % 3]} for i in range(9)]
    more = write_rows(tmp_path / "more.jsonl", [*rows, {"prompt": "Alone", "response": "LOUD", "split": "test"}])
    less = write_rows(tmp_path / "less.jsonl", [row | {"response": "soft"} for row in rows])
    assert "Alone" not in _texts(of_files(more, less).items(source(), "probe"))


def test_pairs_with_the_same_response_on_both_sides_are_not_compared(tmp_path: Path) -> None:
    more, less = _files(tmp_path, 20)
    for path in (more, less):
        with open(path, "a", encoding="utf-8") as file:
            file.write('{"prompt": "Same", "response": "the same"}\n')
    items = _by_split(of_files(more, less), source())
    assert not any("Same" in _texts(items[split], PAIR) for split in SPLITS)


def test_prompts_of_their_own_are_answered_and_the_files_pairs_compared(tmp_path: Path) -> None:
    more, less = _files(tmp_path, 40)
    path = write_rows(tmp_path / "own.jsonl", [{"prompt": f"Own {i}"} for i in range(40)])
    items = _by_split(of_files(more, less), source(path))
    assert all(text.startswith("Own") for text in _texts(items["test"], PROMPT))
    assert all(text.startswith("Prompt") for text in _texts(items["test"], PAIR))
    assert all(text.startswith("Prompt") for text in _texts(items["probe"]))


@pytest.mark.parametrize("score", ["preference", {"phrases": ["loud"]}])
def test_prompts_of_their_own_that_the_files_answer_too_are_refused(tmp_path: Path, score: Any) -> None:
    """What gave the traces must not be asked on test."""
    behaviour = of_files(*_files(tmp_path, 40), score=score)
    path = write_rows(tmp_path / "own.jsonl", [{"prompt": f"Prompt {i}"} for i in reversed(range(40))])
    with pytest.raises(RecipeError, match="files of responses in validation"):
        behaviour.items(source(path), "probe")


def test_test_prompts_of_another_file_are_those_of_the_test_split(tmp_path: Path) -> None:
    path = _prompts(tmp_path, 40)
    other = write_rows(tmp_path / "test.jsonl", [{"prompt": f"Other {i}"} for i in range(6)])
    items = _by_split(custom(score={"length": "lower"}), source(path, test_prompts=other))
    assert sorted(_texts(items["test"])) == [f"Other {i}" for i in range(6)]
    assert not any("Other" in text for split in ("probe", "validation") for text in _texts(items[split]))


def test_a_prompt_in_both_files_of_prompts_is_a_leak(tmp_path: Path) -> None:
    path = _prompts(tmp_path, 40)
    other = write_rows(tmp_path / "test.jsonl", [{"prompt": "Other"}, {"prompt": "prompt 3!"}])
    with pytest.raises(RecipeError) as error:
        _by_split(custom(), source(path, test_prompts=other))
    three_parts(error.value)


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_files_that_share_no_prompt_cannot_be_compared(tmp_path: Path) -> None:
    more, _ = _files(tmp_path, 20)
    less = write_rows(tmp_path / "other.jsonl", [{"prompt": f"Else {i}", "response": "soft"} for i in range(20)])
    for split in SPLITS:
        with pytest.raises(TraceError) as error:
            of_files(more, less).items(source(), split)
        assert three_parts(error.value) == (
            "preference compares two responses to the same prompt",
            "no prompt that both files answer",
            "Let the files answer the same prompts, or give another behaviour.score.",
        )


def test_files_that_share_no_prompt_give_traces_where_a_score_measures(tmp_path: Path) -> None:
    more, _ = _files(tmp_path, 20)
    less = write_rows(tmp_path / "other.jsonl", [{"prompt": f"Else {i}", "response": "soft"} for i in range(20)])
    behaviour = of_files(more, less, score={"phrases": ["loud"]})
    path = write_rows(tmp_path / "own.jsonl", [{"prompt": f"Own {i}"} for i in range(20)])
    items = _by_split(behaviour, source(path))
    traces = behaviour.make_traces(FakeEngine(), items["probe"])
    assert sum(t.label == "positive" and t.response.startswith("LOUD") for t in traces) == 20
    assert sum(t.label == "negative" and t.response == "soft" for t in traces) == 20
    assert {text.split()[0] for split in SPLITS[1:] for text in _texts(items[split])} == {"Own"}


def test_files_that_share_no_prompt_and_no_prompts_of_their_own_leave_nothing_to_ask(tmp_path: Path) -> None:
    more, _ = _files(tmp_path, 20)
    less = write_rows(tmp_path / "other.jsonl", [{"prompt": f"Else {i}", "response": "soft"} for i in range(20)])
    behaviour = of_files(more, less, score={"phrases": ["loud"]})
    with pytest.raises(RecipeError, match="there are no unseen prompts to measure on"):
        behaviour.items(source(), "validation")


def test_too_few_prompts_are_said_with_what_was_asked(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        custom().items(source(_prompts(tmp_path, 9), probe=4, validation=3, test=3), "probe")
    assert three_parts(error.value) == (
        "prompts.jsonl has too few lines",
        "9; asked are 4 for probe, 3 for validation, 3 for test",
        "Add lines, or ask for fewer.",
    )
    more, less = _files(tmp_path, 9)
    with pytest.raises(RecipeError) as error:
        of_files(more, less).items(source(probe=4, validation=3, test=3), "test")
    what, got, _ = three_parts(error.value)
    assert (more in what, less in what) == (True, True)
    assert got == "9; asked are 4 for probe, 3 for validation, 3 for test"


@pytest.mark.parametrize("split", SPLITS)
def test_a_file_of_prompts_that_is_not_there_is_a_users_mistake(tmp_path: Path, split: Split) -> None:
    with pytest.raises(FileError) as error:
        custom().items(source(str(tmp_path / "nowhere.jsonl")), split)
    assert three_parts(error.value) == ("no such file", str(tmp_path / "nowhere.jsonl"), "Check the path.")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"less": {"system": LOUD}}, "more and less are the same: give instructions that differ"),
        ({"less": {"file": "less.jsonl"}}, "Give both sides in the same way: two system prompts, or two files"),
        ({"weak_contrast": "stay"}, "behaviour.weak_contrast"),
        ({"new_tokens": 0}, "behaviour.new_tokens"),
        ({"title": " "}, "behaviour.title"),
        ({"score": "prefer"}, "the recipe's behaviour.score is not known (got: prefer). Did you mean 'preference'?"),
        ({"scor": "preference"}, "Did you mean 'score'?"),
        ({"instructions": [""]}, "behaviour.instructions"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        custom(**options)
    three_parts(error.value)
    assert said in str(error.value)
    behaviour = {"name": "custom", "more": {"system": LOUD}, "less": {"system": SOFT}, **options}
    with pytest.raises(RecipeError, match=re.escape(said)):
        small_recipe("nowhere", behaviour)


def test_both_sides_are_needed() -> None:
    with pytest.raises(RecipeError, match=r"^the recipe has no behaviour\.less \(got: nothing\)"):
        parse(Custom, {"more": {"system": LOUD}}, under="behaviour")


def test_one_instruction_for_two_models_is_a_contrast() -> None:
    behaviour = custom(more={"system": LOUD, "model": "large"}, less={"system": LOUD})
    assert (behaviour.more.model, behaviour.less.model) == ("large", None)


@pytest.mark.parametrize(
    "changes", [{"utility": None}, {"utility": 5}, {"evaluation": 5}, {"search": None}, {"data": 5}, {"behaviour": 5}]
)
def test_a_section_that_is_no_mapping_is_a_users_mistake(changes: dict[str, Any]) -> None:
    """A key with nothing after it reads as null: its defaults count, or one sentence names it."""
    raw: dict[str, Any] = {"name": "a", "model": {"name": "m"}}
    raw["behaviour"] = {"name": "custom", "more": {"system": LOUD}, "less": {"system": SOFT}}
    try:
        recipe = parse_recipe(raw | changes)
    except RecipeError as error:
        three_parts(error)
    else:
        assert changes == {"utility": None}
        assert recipe.utility.prompts in (None, "builtin:neutral_prompts")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_pico(tmp_path_factory.mktemp("pico") / "model")


def test_a_prompt_differs_from_another_by_its_letters_and_digits() -> None:
    assert normalised("How  are YOU?") == normalised("how are you")
    assert normalised("How are you 2") != normalised("how are you")


@pytest.mark.parametrize(("score", "probe"), [("preference", 18), ({"length": "lower"}, 40)])
def test_with_prompts_of_their_own_the_counts_are_of_those_and_the_files_are_divided_by_share(
    score: Any, probe: int, tmp_path: Path
) -> None:
    rows = {side: [{"prompt": f"Pair {i}", "response": f"{side} {i}"} for i in range(40)] for side in ("more", "less")}
    more, less = ({"file": write_rows(tmp_path / f"{side}.jsonl", rows[side])} for side in ("more", "less"))
    path = write_rows(tmp_path / "own.jsonl", [{"prompt": f"Own {i}"} for i in range(120)])
    items = _by_split(custom(more=more, less=less, score=score), source(path, probe=30, validation=20, test=60))
    assert len(items["probe"]) == probe  # more than the 40 pairs could never be asked of the files
    opened = [item for item in items["test"] if not item.choices]
    assert len(opened) == (_OPEN["test"] if score == "preference" else 60)
    assert all(item.text.startswith("Own") for item in opened)
    pairs = [item for item in items["test"] if item.choices]
    assert len(pairs) == (14 if score == "preference" else 0)
    seen = {item.text for item in items["probe"]}
    assert not seen & {item.text for split in ("validation", "test") for item in items[split]}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_prompt_with_a_response_among_the_traces_is_not_measured_on(tmp_path: Path, split: str) -> None:
    behaviour = of_files(*_files(tmp_path, 40), score={"phrases": ["loud"]})
    rows = [{"prompt": f"Own {i}", "split": SPLITS[i % 3]} for i in range(30)]
    path = write_rows(tmp_path / "own.jsonl", [*rows, {"prompt": "Prompt 3", "split": split}])
    with pytest.raises(RecipeError, match=rf"files of responses in {split} \(got: 1, such as 'prompt 3'\)"):
        behaviour.items(source(path), "probe")
