"""A behaviour of one's own: its items, its traces, its choices, what it measures, and which mistakes it names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_pico, make_tokenizer
from runs import FakeEngine, is_one_sentence, said_by, save_pico
from sides import chatml, nll_by_hand, small_recipe, source, three_parts, write_rows
from steer2edit.behaviours.base import SPLITS, Item, Outcome, Split
from steer2edit.behaviours.contrast import read_prompts
from steer2edit.behaviours.custom import _OPEN, _PAIRS, EVERYDAY, PAIR, PROMPT, Custom
from steer2edit.behaviours.prompts import normalised
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import FileError, RecipeError, Steer2EditError, TraceError
from steer2edit.files.schema import parse
from steer2edit.recipe import parse_recipe, refuse_code
from steer2edit.searching.bench import Bench
from steer2edit.searching.candidates import BASE, Candidate, Trial
from steer2edit.searching.front import choose
from steer2edit.searching.plan import Evaluation

LOUD, SOFT = "Be loud.", "Be soft."


def custom(**options: Any) -> Custom:
    """Two instructions, unless the options say otherwise."""
    return parse(Custom, {"more": {"system": LOUD}, "less": {"system": SOFT}, **options}, under="behaviour")


def of_files(more: str, less: str, **options: Any) -> Custom:
    return custom(more={"file": more}, less={"file": less}, **options)


def _files(folder: Path, count: int, first: int = 0, **row: Any) -> tuple[str, str]:
    """Both sides of so many prompts, in another order on the side of `less`."""
    numbers = range(first, first + count)
    more = [{"prompt": f"Prompt {i}", "response": f"LOUD {i}", **row} for i in numbers]
    less = [{"prompt": f"Prompt {i}", "response": f"soft {i}", **row} for i in reversed(numbers)]
    return write_rows(folder / "more.jsonl", more), write_rows(folder / "less.jsonl", less)


def _prompts(folder: Path, count: int, name: str = "prompts.jsonl") -> str:
    return write_rows(folder / name, [{"prompt": f"Prompt {i}"} for i in range(count)])


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


@pytest.mark.parametrize(("pairs", "asked"), [(60, 20), (99, 20), (100, 20), (110, 22)])
def test_few_responses_are_all_traces_where_answers_are_scored(tmp_path: Path, pairs: int, asked: int) -> None:
    """A fifth of the pairs goes to validation; from 100 pairs on that is enough."""
    items = _by_split(of_files(*_files(tmp_path, pairs), score={"phrases": ["loud"]}), source())
    package = {pair.prompt for pair in read_prompts(EVERYDAY)}
    assert len(items["validation"]) == asked
    assert {item.kind for split in ("validation", "test") for item in items[split]} == {PROMPT}
    if pairs < 100:
        assert (len(items["probe"]), len(items["test"])) == (pairs, 40)
        assert {item.prompt for split in ("validation", "test") for item in items[split]} <= package
    else:
        assert not package & {item.prompt for split in SPLITS for item in items[split]}


def test_a_prompt_of_the_package_that_has_a_response_is_not_asked(tmp_path: Path) -> None:
    known = [pair.prompt for pair in read_prompts(EVERYDAY)][:50]
    rows = {side: [{"prompt": p, "response": f"{side} {p}"} for p in known] for side in ("more", "less")}
    more = write_rows(tmp_path / "more.jsonl", rows["more"])
    less = write_rows(tmp_path / "less.jsonl", rows["less"])
    behaviour = of_files(more, less, score={"phrases": ["loud"]})
    items = _by_split(behaviour, source())
    assert [item.prompt for item in items["probe"]] == known
    assert not set(known) & {item.prompt for split in ("validation", "test") for item in items[split]}


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
    behaviour = of_files(*_files(tmp_path, 120), score=score) if files else custom(score=score)
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
def test_prompts_of_their_own_that_the_files_answer_too_are_no_leak(tmp_path: Path, score: Any) -> None:
    """What gave the traces must not be asked on test: it is left out, or refused."""
    behaviour = of_files(*_files(tmp_path, 40), score=score)
    reversed_prompts = [{"prompt": f"Prompt {i}"} for i in reversed(range(40))]
    path = write_rows(tmp_path / "own.jsonl", reversed_prompts)
    try:
        items = _by_split(behaviour, source(path))
    except RecipeError as error:
        three_parts(error)
        return
    probe = set(_texts(items["probe"]))
    assert not probe & {*_texts(items["validation"]), *_texts(items["test"])}


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


def test_files_that_share_no_prompt_and_no_prompts_of_their_own(tmp_path: Path) -> None:
    """There is nothing to ask: other prompts are taken, or one sentence says that they are missing."""
    more, _ = _files(tmp_path, 20)
    less = write_rows(tmp_path / "other.jsonl", [{"prompt": f"Else {i}", "response": "soft"} for i in range(20)])
    behaviour = of_files(more, less, score={"phrases": ["loud"]})
    try:
        items = behaviour.items(source(), "validation")
    except Steer2EditError as error:
        three_parts(error)
        return
    assert items
    assert not {item.text for item in items} & {item.text for item in behaviour.items(source(), "probe")}


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


# Traces ---------------------------------------------------------------------------------------------------------------


def test_traces_of_files_are_the_probes_responses_on_both_sides(tmp_path: Path) -> None:
    behaviour = of_files(*_files(tmp_path, 40), system="You are a clerk.")
    engine = FakeEngine()
    items = behaviour.items(source(probe=6), "probe")
    traces = behaviour.make_traces(engine, items)
    expected = []
    for item in items:
        number = item.text.split()[-1]
        expected += [(item.prompt, f"LOUD {number}", "positive"), (item.prompt, f"soft {number}", "negative")]
    assert [(t.prompt, t.response, t.label) for t in traces] == expected
    assert len(expected) == 12
    assert {t.system for t in traces} == {"You are a clerk."}
    assert {t.source for t in traces} == {"more, a file", "less, a file"}
    assert engine.asked == []


def _loud(question: str, _: str = "") -> str:
    """Follows its instruction, which stands before the prompt."""
    said = question.splitlines()[-1]
    return f"AHOY, {said}!" if LOUD in question else f"Well, {said}."


def _items(*texts: str, kind: str = PAIR) -> list[Item]:
    return [Item(kind, text, target=[None, None] if kind == PAIR else None) for text in texts]


def test_traces_of_instructions_are_what_the_model_answers_under_each() -> None:
    engine = FakeEngine(_loud)
    behaviour = custom(system="You are a clerk.", score={"phrases": ["ahoy"]})
    items = _items("one", "two", "three")
    traces = behaviour.make_traces(engine, items)
    assert engine.asked == [
        (f"You are a clerk.\n\n{side}\n{text}", "base") for side in (LOUD, SOFT) for text in ("one", "two", "three")
    ]
    assert [(t.prompt, t.response, t.label) for t in traces] == [
        (text, response, label)
        for text in ("one", "two", "three")
        for response, label in ((f"AHOY, {text}!", "positive"), (f"Well, {text}.", "negative"))
    ]
    assert {t.system for t in traces} == {"You are a clerk."}  # and not the instruction


def test_traces_keep_their_instruction_if_they_are_to() -> None:
    traces = custom(keep_instruction=True).make_traces(FakeEngine(_loud), _items("one"))
    assert [(t.label, t.system) for t in traces] == [("positive", LOUD), ("negative", SOFT)]


def test_new_tokens_cut_what_the_model_writes() -> None:
    class Watched(FakeEngine):
        def generate(self, requests: Any, table: Any, max_new_tokens: int, *rest: Any) -> Any:
            assert max_new_tokens == 7
            return super().generate(requests, table, max_new_tokens, *rest)

    custom(new_tokens=7).make_traces(Watched(_loud), _items("one"))


# Contrast -------------------------------------------------------------------------------------------------------------


def test_a_model_that_follows_neither_instruction_stops_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    behaviour = custom(score={"phrases": ["ahoy"]}, title="pirate")
    with pytest.raises(TraceError) as error:
        behaviour.make_traces(FakeEngine(lambda prompt, _: "Well then, mate."), _items("one", "two", "three"))
    what, got, fix = three_parts(error.value)
    assert what == "the model does not follow the two instructions: there is no contrast in pirate"
    assert got == "0.00 under `more` and 0.00 under `less`, of 3 answers each"
    for way_out in ("more.file", "more.model", "instructions", "behaviour.weak_contrast: go on"):
        assert way_out in fix
    assert "pirate: 0.00 under `more`, 0.00 under `less`, of 3 answers each" in capsys.readouterr().err


def test_a_contrast_the_wrong_way_round_stops_the_run() -> None:
    behaviour = custom(more={"system": SOFT}, less={"system": LOUD}, score={"phrases": ["ahoy"]})
    with pytest.raises(TraceError, match=r"got: 0\.00 under `more` and 1\.00 under `less`"):
        behaviour.make_traces(FakeEngine(_loud), _items("one", "two"))


def _follows(share: int) -> Callable[[str, str], str]:
    """Follows the loud instruction on the first so many prompts alone."""

    def answer(question: str, _: str) -> str:
        number = int(question.split()[-1])
        return "AHOY, mate!" if LOUD in question and number < share else "Well then, friend."

    return answer


@pytest.mark.parametrize(("share", "enough"), [(0, False), (3, False), (4, True), (20, True)])
def test_a_contrast_must_be_beyond_chance(share: int, enough: bool) -> None:
    """Of 20 paired differences k are 1: mean p = k/20, standard error √(p(1 − p)/19); 3 are too few, 4 do."""
    behaviour = custom(score={"phrases": ["ahoy"]})
    items = _items(*(f"Number {i}" for i in range(20)))
    p = share / 20
    assert enough == (p - 1.96 * (p * (1 - p) / 19) ** 0.5 > 0)
    if enough:
        assert len(behaviour.make_traces(FakeEngine(_follows(share)), items)) == 40
        return
    with pytest.raises(TraceError, match="there is no contrast"):
        behaviour.make_traces(FakeEngine(_follows(share)), items)


def test_a_weak_contrast_can_be_searched_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    behaviour = custom(score={"phrases": ["ahoy"]}, weak_contrast="go on")
    items = _items(*(f"Number {i}" for i in range(20)))
    assert len(behaviour.make_traces(FakeEngine(_follows(1)), items)) == 40
    assert "0.05 under `more`, 0.00 under `less`, of 20 answers each" in capsys.readouterr().err


def test_a_contrast_in_length_goes_by_what_is_better() -> None:
    def answer(question: str, _: str) -> str:
        return "word " * (3 if "brief" in question else 12) + question.split()[-1]

    sides = {"more": {"system": "Be brief."}, "less": {"system": "Be long."}}
    items = _items("one", "two", "three")
    assert len(custom(**sides, score={"length": "lower"}).make_traces(FakeEngine(answer), items)) == 6
    with pytest.raises(TraceError, match=r"got: 18\.67 under `more` and 63\.67 under `less`"):
        custom(**sides, score={"length": "higher"}).make_traces(FakeEngine(answer), items)


def test_answers_that_were_cut_are_counted_where_there_is_no_contrast_in_length() -> None:
    items = _items("one", "two", "three")
    cut = custom(score={"length": "lower"}, new_tokens=7)
    with pytest.raises(TraceError, match=r"6 of 6 were cut at 7 tokens, which behaviour\.new_tokens raises"):
        cut.make_traces(FakeEngine(lambda *_: "word " * 30), items)
    whole = custom(score={"length": "lower"}, new_tokens=500)
    with pytest.raises(TraceError) as error:
        whole.make_traces(FakeEngine(lambda *_: "word " * 30), items)
    assert "cut" not in str(error.value)


def test_equal_answers_are_counted_where_preference_measures(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(lambda prompt, _: "Well then." if "same" in prompt else _loud(prompt))
    custom().make_traces(engine, _items("one", "same two", "same three"))
    assert "2 of 3 answers are the same under both instructions" in capsys.readouterr().err


# Choices --------------------------------------------------------------------------------------------------------------


def _mixed(question: str, _: str) -> str:
    if "same" in question:
        return "The same."
    if "empty" in question:
        return "  " if LOUD in question else "Well."
    return _loud(question)


def test_completed_makes_choices_of_both_answers(capsys: pytest.CaptureFixture[str]) -> None:
    items = [*_items("open", kind=PROMPT), *_items("one", "same", "two", "empty")]
    engine = FakeEngine(_mixed)
    completed = custom(system="You are a clerk.").completed(engine, items)
    assert completed == [
        Item(PROMPT, "open"),
        Item(PAIR, "one", ("AHOY, one!", "Well, one.")),
        Item(PAIR, "two", ("AHOY, two!", "Well, two.")),
    ]
    assert [prompt for prompt, _ in engine.asked] == [
        f"You are a clerk.\n\n{side}\n{text}" for side in (LOUD, SOFT) for text in ("one", "same", "two", "empty")
    ]
    assert "2 of 4 prompts have an empty answer, or the same on both sides: left out" in capsys.readouterr().err


def test_items_that_have_their_choices_or_need_none_are_left_as_they_are(tmp_path: Path) -> None:
    engine = FakeEngine()
    whole = of_files(*_files(tmp_path, 40)).items(source(), "validation")
    assert of_files(*_files(tmp_path, 40)).completed(engine, whole) == whole
    opened = custom(score={"length": "lower"}).items(source(_prompts(tmp_path, 40)), "test")
    assert custom(score={"length": "lower"}).completed(engine, opened) == opened
    assert engine.asked == []


def test_sides_that_answer_alike_everywhere_have_nothing_to_compare() -> None:
    with pytest.raises(TraceError) as error:
        custom().completed(FakeEngine(lambda prompt, _: "The same."), _items("one", "two"))
    what, got, fix = three_parts(error.value)
    assert (what, got) == ("the two sides answer alike", "2 prompts without a difference")
    assert "more.file" in fix


# Measures -------------------------------------------------------------------------------------------------------------


def test_preference_is_which_response_is_likelier_and_the_margin_by_how_much() -> None:
    behaviour = custom(title="loud")
    pair, opened = Item(PAIR, "Q", ("a", "b")), Item(PROMPT, "Q")
    asked = [
        (pair, Outcome(nll=(1.5, 2.0)), Outcome()),
        (pair, Outcome(nll=(2.0, 1.5)), Outcome()),
        (pair, Outcome(nll=(1.0, 1.0)), Outcome()),
        (opened, Outcome("AHOY"), Outcome()),
    ]
    assert behaviour.measure_all(asked) == [
        {"preference": 1.0, "margin": 0.5},
        {"preference": 0.0, "margin": -0.5},
        {"preference": 0.0, "margin": 0.0},
        {},
    ]
    assert behaviour.measure(*asked[0]) == {"preference": 1.0, "margin": 0.5}
    assert (behaviour.attribute.name, behaviour.attribute.title) == ("preference", "prefers loud")
    assert [m.name for m in behaviour.measures][:2] == ["preference", "margin"]


def test_of_edits_that_are_preferred_alike_the_one_with_the_larger_margin_is_taken() -> None:
    aim = small_recipe("m", {"name": "custom", "more": {"system": LOUD}, "less": {"system": SOFT}}).aim

    def trial(name: str, preference: float, margin: float) -> Trial:
        values = {"preference": (preference,), "margin": (margin,), "utility_loss": (0.1,), "degenerate": (0.0,)}
        return Trial(Candidate(name, "edit", {}), values, "0")

    chosen = choose([trial("a", 1.0, 0.2), trial("b", 1.0, 0.6), trial("c", 1.0, -0.3)], aim)
    assert chosen is not None
    assert chosen.candidate.id == "b"


def test_a_score_is_the_attribute() -> None:
    behaviour = custom(title="loud", score={"phrases": ["ahoy"]})
    item = Item(PROMPT, "Q")
    asked = [(item, Outcome(text), Outcome()) for text in ("Ahoy, mate.", "Hello, mate.")]
    assert behaviour.measure_all(asked) == [{"shown": 1.0}, {"shown": 0.0}]
    assert behaviour.attribute.title == "loud"
    assert behaviour.costs == ()


def test_preference_and_margin_are_those_of_losses_by_hand(tmp_path: Path) -> None:
    model, tokenizer = make_pico(max_position_embeddings=512), make_tokenizer()
    said = ["Sure, mix the flour.", "I cannot help with that.", "The capital is Paris.", "No.", "Please ask me!"]
    rows = [
        {"prompt": f"Question {i}?", "more": said[i % 5] + f" It is {i}.", "less": said[(i + 2) % 5], "split": split}
        for i, split in enumerate(["probe", *["validation"] * 6, "test"])
    ]
    path = write_rows(tmp_path / "both.jsonl", rows)
    behaviour = of_files(path, path, system="Be kind.")
    items = behaviour.items(source(), "validation")
    plan = Evaluation(new_tokens=2, utility_prompts=1, utility_tokens=2)
    bench = Bench(TransformersEngine(model, tokenizer), {}, items, behaviour, plan, tmp_path / "journal.jsonl")
    (trial,) = bench.run([BASE], "0")
    preference, margin = [], []
    for row in rows[1:7]:
        prompt = chatml(row["prompt"], "Be kind.")
        of_more, of_less = (nll_by_hand(model, tokenizer, prompt, row[side])[0] for side in ("more", "less"))
        preference.append(float(of_more < of_less))
        margin.append(of_less - of_more)
    assert trial.values["margin"] == pytest.approx(margin, abs=1e-5)
    assert min(map(abs, margin)) > 1e-3
    assert trial.values["preference"] == tuple(preference)
    assert set(preference) == {0.0, 1.0}
    assert trial.count("degenerate") == 6


# Asking for it --------------------------------------------------------------------------------------------------------


def test_the_baseline_asks_with_the_instruction_or_the_title() -> None:
    assert custom().asking() == [LOUD]
    assert of_files("a.jsonl", "b.jsonl", title="pirate").asking() == [
        "Answer in this manner, whatever is asked: pirate."
    ]
    assert custom(instructions=["Shout.", "Yell."]).asking() == ["Shout.", "Yell."]
    assert custom(instructions=[]).asking() == []


# Recipes and the command line -----------------------------------------------------------------------------------------


def test_a_recipe_with_any_score_comes_back_from_yaml() -> None:
    for score in (
        "preference",
        {"pattern": "(?i)ahoy"},
        {"phrases": ["ahoy", "matey"]},
        {"length": "lower", "longest": 40},
        {"classifier": "a/b", "label": "pirate", "format": "minos"},
        {"judge": {"local": "some/model", "question": "Is it a pirate?"}},
        {"judge": {"endpoint": "http://localhost:8000/v1", "model": "m", "question": "Is it a pirate?"}},
        {"python": "mine.py:pirate", "better": "lower", "worst": 5, "best": 0},
    ):
        behaviour = {"name": "custom", "more": {"system": LOUD}, "less": {"system": SOFT}, "score": score}
        recipe = small_recipe("nowhere", behaviour)
        again = parse_recipe(yaml.safe_load(recipe.to_yaml()))
        assert again == recipe
        assert type(again.behaviour.score) is type(recipe.behaviour.score)
        assert again.to_yaml() == recipe.to_yaml()


def test_a_recipe_of_custom_needs_no_counts_and_takes_numbers() -> None:
    sides = {"name": "custom", "more": {"system": LOUD}, "less": {"system": SOFT}}
    recipe = small_recipe("nowhere", sides, data={"probe": 12, "test": {"prompt": 5}})
    assert (recipe.data.probe, recipe.data.validation, recipe.data.test) == ({"prompt": 12}, None, {"prompt": 5})
    assert recipe.source.counts == {"probe": {"prompt": 12}, "validation": None, "test": {"prompt": 5}}
    assert recipe.utility.prompts == "builtin:neutral_prompts"
    bare = parse_recipe({"name": "a", "model": {"name": "m"}, "behaviour": sides})
    assert (bare.evaluation.utility_prompts, bare.evaluation.utility_tokens) == (8, 32)
    with pytest.raises(RecipeError, match=r"unknown key data\.test\.prompts .*Did you mean 'prompt'"):
        small_recipe("nowhere", sides, data={"test": {"prompts": 5}})


def test_what_a_run_depends_on_are_its_files(tmp_path: Path) -> None:
    behaviour = of_files("a.jsonl", "builtin:pirate", score={"python": "mine.py:f"}, traces="t.jsonl")
    assert behaviour.files == ("t.jsonl", "a.jsonl", "mine.py")
    assert behaviour.runs_code
    assert not custom(score={"pattern": "a"}).runs_code


def test_code_is_run_only_if_somebody_trusts_it() -> None:
    sides = {"name": "custom", "more": {"system": LOUD}, "less": {"system": SOFT}}
    recipe = small_recipe("nowhere", {**sides, "score": {"python": "mine.py:f"}})
    with pytest.raises(RecipeError) as error:
        refuse_code(recipe, False)
    assert three_parts(error.value) == (
        "the recipe's score runs a Python file",
        "mine.py",
        "Read that file; if you trust it, give --trust-recipe-code.",
    )
    refuse_code(recipe, True)
    refuse_code(small_recipe("nowhere", sides), False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_pico(tmp_path_factory.mktemp("pico") / "model")


def _wrong(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A mistake's behaviour, its data, and a part of what is said."""
    sides: dict[str, Any] = {"more": {"system": LOUD}, "less": {"system": SOFT}}
    more, less = _files(folder, 12)
    files: dict[str, Any] = {"more": {"file": more}, "less": {"file": less}}
    if name == "unknown score":
        return sides | {"score": {"patern": "a"}}, {}, "Did you mean 'pattern'?"
    if name == "same instructions":
        return sides | {"less": {"system": LOUD}}, {}, "more and less are the same"
    if name == "same files":
        return files | {"less": {"file": more}}, {}, "more and less are the same"
    if name == "too few prompts":
        return sides, {"prompts": _prompts(folder, 2)}, "prompts.jsonl has too few lines"
    if name == "too few pairs":
        return files, {"probe": 20}, "has too few lines (got: 12; asked are 20 for probe"
    if name == "empty response":
        empty = write_rows(folder / "empty.jsonl", [{"prompt": "Prompt 1", "response": ""}])
        return files | {"less": {"file": empty}}, {}, "line 1 of empty.jsonl has an empty response"
    if name == "no shared prompt":
        other = write_rows(folder / "other.jsonl", [{"prompt": "Else", "response": "soft"}])
        return files | {"less": {"file": other}}, {}, "preference compares two responses to the same prompt"
    if name == "some splits":
        some = write_rows(folder / "some.jsonl", [{"prompt": "A", "split": "test"}, {"prompt": "B"}])
        return sides, {"prompts": some}, "only some rows of some.jsonl name their split (got: 1 of 2)"
    if name == "leak":
        rows = [{"prompt": "A", "split": "test"}, {"prompt": "a!", "split": "probe"}]
        return sides, {"prompts": write_rows(folder / "leak.jsonl", rows)}, "stands in two splits"
    if name == "missing prompts":
        return sides, {"prompts": str(folder / "nowhere.jsonl")}, "no such file"
    if name == "missing side":
        return files | {"less": {"file": str(folder / "nowhere.jsonl")}}, {}, "no such file"
    if name == "no contrast":
        return sides | {"score": {"phrases": ["ahoy there"]}, "new_tokens": 2}, {"probe": 2}, "weak_contrast: go on"
    assert name == "code"
    (folder / "mine.py").write_text("raise SystemExit('it ran')\n", encoding="utf-8")
    return sides | {"score": {"python": f"{folder}/mine.py:f"}}, {}, "give --trust-recipe-code"


@pytest.mark.parametrize(
    "name",
    [
        "unknown score", "same instructions", "same files", "too few prompts", "too few pairs", "empty response",
        "no shared prompt", "some splits", "leak", "missing prompts", "missing side", "no contrast", "code",
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_exit_code_2(
    name: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    behaviour, data, said = _wrong(name, tmp_path)
    raw = {"name": "wrong", "model": {"name": model, "device": "cpu"}, "behaviour": {"name": "custom", **behaviour}}
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(raw | {"data": data}), encoding="utf-8")
    is_one_sentence(said_by(monkeypatch, capfd, "run", wrong, "--out", tmp_path / "run", "--quiet"), said)


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
