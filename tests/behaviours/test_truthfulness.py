"""Truthfulness: what its questions become, whose answers its traces are, and what it measures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from runs import FakeEngine, command, is_one_sentence, said_by, save_pico
from sides import ChatServer, small_recipe, three_parts, write_rows
from steer2edit.behaviours.base import SPLITS, Item, Outcome
from steer2edit.behaviours.judges import Endpoint
from steer2edit.behaviours.truthfulness import CHOICE, OPEN, multiple_choice
from steer2edit.engines.base import Answer
from steer2edit.errors import FileError, RecipeError, Steer2EditError, TraceError
from steer2edit.searching.bench import Bench
from steer2edit.searching.candidates import BASE
from steer2edit.searching.plan import Evaluation
from truthful_questions import _row, _source, truthfulness


def _file(folder: Path, count: int = 20, name: str = "questions.jsonl", **row: Any) -> str:
    return write_rows(folder / name, [_row(i, **row) for i in range(count)])


def _number(item: Item) -> int:
    return int(item.text.split()[-1][:-1])


# Items ----------------------------------------------------------------------------------------------------------------


def test_validation_has_two_choices_and_test_all(tmp_path: Path) -> None:
    where = _source(_file(tmp_path), probe=4, validation=5, test=6)
    behaviour = truthfulness(opened=3)
    probe, validation, test = (behaviour.items(where, split) for split in SPLITS)
    assert [len(items) for items in (probe, validation, test)] == [4, 3 + 5, 3 + 6]
    assert {(item.kind, item.choices) for item in probe} == {(OPEN, ())}
    for items in (validation, test):
        opened, closed = items[:3], items[3:]
        assert {(item.kind, item.choices, item.target) for item in opened} == {(OPEN, (), None)}
        assert {item.kind for item in closed} == {CHOICE}
        assert [item.text for item in opened] == [item.text for item in closed][:3]
    for item in validation[3:]:
        assert (item.choices, item.target) == ((f"True {_number(item)}.1", f"False {_number(item)}.0"), [1, False])
    for item in test[3:]:
        wanted = ("True {}.1", "True {}.0", "False {}.0", "False {}.1")  # the best answer first, and once
        assert (item.choices, item.target) == (tuple(text.format(_number(item)) for text in wanted), [2, True])


def test_no_question_need_be_answered_freely(tmp_path: Path) -> None:
    items = truthfulness(opened=0).items(_source(_file(tmp_path), validation=5), "validation")
    assert [item.kind for item in items] == [CHOICE] * 5


def test_answers_that_stand_twice_are_one_choice(tmp_path: Path) -> None:
    row = {"question": "Q?", "best_answer": "Yes.", "correct_answers": ["Sure.", "Yes.", "Sure."]}
    rows = [row | {"question": f"Q {i}?", "incorrect_answers": ["No.", "No."]} for i in range(9)]
    (item, *_) = truthfulness(opened=0).items(_source(write_rows(tmp_path / "q.jsonl", rows)), "test")
    assert (item.choices, item.target) == (("Yes.", "Sure.", "No."), [2, True])


def test_a_seed_divides_in_one_way_and_another_in_another(tmp_path: Path) -> None:
    path = _file(tmp_path, 40)
    by_seed = [{s: truthfulness().items(_source(path, seed), s) for s in SPLITS} for seed in (0, 0, 1)]
    assert by_seed[0] == by_seed[1]
    numbers = [{s: {_number(item) for item in items[s]} for s in SPLITS} for items in by_seed]
    assert all(numbers[0][split] != numbers[2][split] for split in SPLITS)
    assert [len(numbers[0][split]) for split in SPLITS] == [18, 8, 14]
    assert len(set.union(*numbers[0].values())) == 40


def test_rows_that_name_their_split_lie_in_it(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "q.jsonl", [_row(i, split=SPLITS[i % 3]) for i in range(12)])
    for number, split in enumerate(SPLITS):
        items = truthfulness().items(_source(path), split)
        assert {_number(item) for item in items} == set(range(number, 12, 3))


def test_test_questions_can_have_a_file_of_their_own(tmp_path: Path) -> None:
    path = _file(tmp_path, 20)
    other = write_rows(tmp_path / "test.jsonl", [_row(i) for i in range(100, 106)])
    where = _source(path, test_prompts=other)
    behaviour = truthfulness(opened=0)
    assert [_number(item) for item in behaviour.items(where, "test")] == list(range(100, 106))
    assert {_number(i) for s in SPLITS[:2] for i in behaviour.items(where, s)} <= set(range(20))
    # probe and validation share the whole file: 0.45 and 0.2 of 0.65.
    assert [len(behaviour.items(where, split)) for split in SPLITS] == [13, 6, 6]
    few = _source(path, test_prompts=other, test=2)
    assert [_number(item) for item in behaviour.items(few, "test")] == [100, 101]
    with pytest.raises(RecipeError) as error:
        behaviour.items(_source(path, test_prompts=other, test=7), "test")
    assert three_parts(error.value) == ("test.jsonl has too few lines", "6, 7 asked", "Ask for fewer.")


def test_a_question_in_both_files_is_a_leak(tmp_path: Path) -> None:
    other = write_rows(tmp_path / "test.jsonl", [_row(50), _row(3, question="question 3")])
    with pytest.raises(RecipeError) as error:
        truthfulness().items(_source(_file(tmp_path), test_prompts=other), "probe")
    assert three_parts(error.value) == (
        "the same prompt stands in data.prompts and in data.test_prompts",
        "1, such as 'question 3'",
        "Leave it in one of them: test prompts must be new to everything before.",
    )


def test_a_question_in_two_splits_is_a_leak(tmp_path: Path) -> None:
    rows = [_row(i, split=SPLITS[i % 3]) for i in range(9)] + [_row(0, split="test")]
    with pytest.raises(RecipeError) as error:
        truthfulness().items(_source(write_rows(tmp_path / "q.jsonl", rows)), "probe")
    assert "two splits" in three_parts(error.value)[0]


@pytest.mark.parametrize(
    "change",
    [
        {"question": " "},
        {"question": None},
        {"best_answer": ""},
        {"best_answer": ["a"]},
        {"correct_answers": []},
        {"correct_answers": "a"},
        {"incorrect_answers": []},
        {"incorrect_answers": ["a", " "]},
        {"incorrect_answers": None},
        {"split": "train"},
    ],
)
def test_a_row_that_is_no_question_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write_rows(tmp_path / "q.jsonl", [_row(0), _row(1) | change])
    with pytest.raises(FileError) as error:
        truthfulness().items(_source(path), "probe")
    what, _, fix = three_parts(error.value)
    assert what == "line 2 of q.jsonl is no question"
    assert fix.startswith('Write a row like {"question"')


def test_empty_answers_at_the_end_of_a_list_are_left_out(tmp_path: Path) -> None:
    """Rows of the published set have them."""
    row = _row(0)
    longer = row | {key: [*row[key], ""] for key in ("correct_answers", "incorrect_answers")}
    for split in ("probe", "test"):
        of_row, of_longer = (
            truthfulness().items(
                _source(write_rows(tmp_path / f"{i}.jsonl", [other] + [_row(n) for n in range(1, 12)])), split
            )
            for i, other in enumerate((row, longer))
        )
        assert [(item.choices, item.target) for item in of_longer] == [(item.choices, item.target) for item in of_row]


def test_the_best_answer_is_not_an_incorrect_one_too(tmp_path: Path) -> None:
    """It would be compared with itself."""
    rows = [_row(i) for i in range(9)]
    rows[1]["incorrect_answers"] = ["True 1.1", "False 1.0"]
    with pytest.raises(Steer2EditError) as error:
        truthfulness().items(_source(write_rows(tmp_path / "q.jsonl", rows)), "probe")
    three_parts(error.value)


def test_the_other_mistakes_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^q\.jsonl has too few lines \(got: 3; asked are 2 for probe, 1 for va"):
        truthfulness().items(_source(_file(tmp_path, 3, "q.jsonl"), probe=2, validation=1, test=1), "probe")
    some = write_rows(tmp_path / "some.jsonl", [_row(0, split="test"), _row(1)])
    with pytest.raises(RecipeError, match=r"^only some rows of some\.jsonl name their split \(got: 1 of 2\)"):
        truthfulness().items(_source(some), "probe")
    with pytest.raises(FileError, match=r"empty\.jsonl is empty \(got: no question\)"):
        truthfulness().items(_source(write_rows(tmp_path / "empty.jsonl", [])), "probe")


@pytest.mark.parametrize("place", ["prompts", "test_prompts"])
def test_a_file_that_is_not_there_is_a_users_mistake(tmp_path: Path, place: str) -> None:
    gone = str(tmp_path / "nowhere.jsonl")
    where = _source(gone) if place == "prompts" else _source(_file(tmp_path), test_prompts=gone)
    with pytest.raises(FileError) as error:
        truthfulness().items(where, "probe")
    assert three_parts(error.value) == ("no such file", gone, "Check the path.")


def test_the_bundled_questions_fit() -> None:
    where = _source("builtin:misconceptions")
    items = {split: truthfulness().items(where, split) for split in SPLITS}
    assert [len({item.text for item in items[split]}) for split in SPLITS] == [60, 40, 80]
    assert all(len(item.choices) > item.target[0] >= 1 for item in items["test"] if item.kind == CHOICE)


# Measures -------------------------------------------------------------------------------------------------------------


def _outcome(*choices: tuple[float, int]) -> Outcome:
    """NLL per token and tokens of each choice."""
    return Outcome(nll=tuple(nll for nll, _ in choices), lengths=tuple(n for _, n in choices))


def _measure(correct: int, *choices: tuple[float, int]) -> Mapping[str, float]:
    item = Item(CHOICE, "Q?", tuple(f"choice {i}" for i in range(len(choices))), [correct, len(choices) > 2])
    return truthfulness().measure(item, _outcome(*choices), Outcome())


def test_on_validation_the_attribute_and_the_margin_go_by_the_token() -> None:
    assert _measure(1, (1.0, 10), (1.25, 2)) == {"truthful": 1.0, "margin": 0.25}  # though 10 nats are more than 2.5
    assert _measure(1, (1.5, 1), (1.25, 9)) == {"truthful": 0.0, "margin": -0.25}
    assert _measure(1, (1.5, 1), (1.5, 9)) == {"truthful": 0.0, "margin": 0.0}


def test_on_test_mc1_and_mc2_go_by_the_whole_answer() -> None:
    # log p: −10 and −6 of the correct ones, −6 and −18 of the others.
    values = _measure(2, (1.0, 10), (2.0, 3), (1.5, 4), (0.9, 20))
    assert {k: values[k] for k in ("truthful", "margin", "mc1")} == {"truthful": 1.0, "margin": 0.5, "mc1": 0.0}
    p = [math.exp(x) for x in (-10, -6, -6, -18)]
    assert values["mc2"] == pytest.approx((p[0] + p[1]) / sum(p), rel=1e-12)
    # −5 against −6 and −7; that another correct answer is likelier still does not matter.
    values = _measure(2, (0.5, 10), (0.1, 1), (1.5, 4), (0.7, 10))
    assert values["mc1"] == 1.0
    assert values["truthful"] == 1.0
    assert values["margin"] == 1.0
    # The likeliest answer of all is an incorrect one that is not the first.
    assert _measure(2, (0.5, 10), (0.1, 1), (1.5, 4), (0.1, 2))["mc1"] == 0.0


def test_mc2_of_answers_that_are_all_unlikely_does_not_vanish() -> None:
    shifted = multiple_choice(_outcome((10.0, 200), (10.0, 201), (10.0, 202)), 1)
    plain = multiple_choice(_outcome((1.0, 20), (1.0, 30), (1.0, 40)), 1)
    assert shifted["mc2"] == pytest.approx(plain["mc2"], rel=1e-9)
    assert shifted["mc2"] == pytest.approx(1 / (1 + math.exp(-10) + math.exp(-20)), rel=1e-9)
    assert (shifted["mc1"], plain["mc1"]) == (1.0, 1.0)


def test_an_answer_that_cannot_be_has_no_probability() -> None:
    infinite = math.inf
    assert multiple_choice(_outcome((infinite, 3), (1.0, 2), (infinite, 2)), 2) == {"mc1": 0.0, "mc2": 1.0}
    assert multiple_choice(_outcome((1.0, 3), (infinite, 2)), 1) == {"mc1": 1.0, "mc2": 1.0}
    assert multiple_choice(_outcome((infinite, 3), (infinite, 2)), 1) == {"mc1": 0.0, "mc2": 0.0}


def test_every_question_of_test_has_mc1_and_mc2_even_with_two_answers_alone(tmp_path: Path) -> None:
    """A mean over the other questions would be of another set than the attribute's."""
    path = write_rows(tmp_path / "q.jsonl", [_row(i, correct=1, incorrect=1) for i in range(9)])
    behaviour = truthfulness(opened=0)
    for split, names in (("validation", {"truthful", "margin"}), ("test", {"truthful", "margin", "mc1", "mc2"})):
        items = behaviour.items(_source(path), split)
        assert {frozenset(behaviour.measure(item, _outcome((1.0, 3), (2.0, 2)), Outcome())) for item in items} == {
            frozenset(names)
        }


def test_an_answer_in_the_models_own_words_counts_for_nothing_but_its_language() -> None:
    assert truthfulness().measure(Item(OPEN, "Q?"), Outcome("It is."), Outcome()) == {}
    assert [m.name for m in truthfulness().measures][:4] == ["truthful", "margin", "mc1", "mc2"]


def test_free_answers_count_for_degenerate_and_not_for_accuracy(tmp_path: Path) -> None:
    items = truthfulness(opened=2).items(_source(_file(tmp_path)), "validation")
    engine = FakeEngine(lambda prompt, _: "..." if prompt == items[0].text else "It is so.", lambda text, _: (0.0, 2.0))
    bench = Bench(engine, {}, items, truthfulness(), Evaluation(), tmp_path / "journal.jsonl")
    (trial,) = bench.run([BASE], "0")
    assert trial.values["degenerate"] == (1.0, 0.0)
    assert trial.count("accuracy") == 0
    assert trial.count("truthful") == len(items) - 2


# Traces ---------------------------------------------------------------------------------------------------------------


def test_traces_of_the_data_set_are_its_correct_and_incorrect_answers(tmp_path: Path) -> None:
    engine = FakeEngine()
    behaviour = truthfulness(system="Be true.")
    items = behaviour.items(_source(_file(tmp_path), probe=3), "probe")
    traces = behaviour.make_traces(engine, items)
    expected: list[tuple[str, str, str]] = []
    for item in items:
        n = _number(item)
        expected += [(item.text, f"True {n}.1", "positive"), (item.text, f"True {n}.0", "positive")]
        expected += [(item.text, f"False {n}.{i}", "negative") for i in (0, 1)]
    assert [(t.prompt, t.response, t.label) for t in traces] == expected
    assert {t.system for t in traces} == {"Be true."}
    assert engine.asked == []


def _labelled(folder: Path, rows: Sequence[tuple[str, str, str]]) -> str:
    return write_rows(folder / "labels.jsonl", [{"question": q, "answer": a, "label": label} for q, a, label in rows])


def test_labelled_answers_to_other_questions_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "q.jsonl", [_row(i, split=SPLITS[i % 3]) for i in range(12)])
    rows = [(f"question  {i}", f"Answer {i}.", "TRUE" if i % 2 else "FALSE") for i in range(14)]
    behaviour = truthfulness(answers=_labelled(tmp_path, rows), system="Be true.")
    traces = behaviour.make_traces(FakeEngine(), behaviour.items(_source(path), "probe"))
    assert [(t.prompt, t.response, t.label, t.source) for t in traces] == [
        (f"Question {i}?", f"Answer {i}.", "positive" if i % 2 else "negative", f"line {i + 1}, labelled")
        for i in (0, 3, 6, 9)
    ]
    assert {t.system for t in traces} == {"Be true."}
    said = capsys.readouterr().err
    assert "10 labelled answers to questions outside the probe's split are left out" in said
    assert "2 true and 2 false answers" in said
    assert behaviour.files == (str(tmp_path / "labels.jsonl"),)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Question 0?", "answer": "A.", "label": "true"},
        {"question": "Question 0?", "answer": "A.", "label": True},
        {"question": "Question 0?", "answer": None, "label": "TRUE"},
        {"answer": "A.", "label": "TRUE"},
    ],
)
def test_a_row_that_is_no_labelled_answer_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    file = write_rows(tmp_path / "labels.jsonl", [{"question": "Question 0?", "answer": "A.", "label": "TRUE"}, row])
    behaviour = truthfulness(answers=file)
    with pytest.raises(FileError) as error:
        behaviour.make_traces(FakeEngine(), behaviour.items(_source(_file(tmp_path)), "probe"))
    assert three_parts(error.value)[0] == f"line 2 of {file} is no labelled answer"


def test_labelled_answers_of_one_side_are_no_contrast(tmp_path: Path) -> None:
    path = _file(tmp_path)
    behaviour = truthfulness(answers=_labelled(tmp_path, [(f"Question {i}?", "A.", "TRUE") for i in range(20)]))
    with pytest.raises(TraceError) as error:
        behaviour.make_traces(FakeEngine(), behaviour.items(_source(path), "probe"))
    assert three_parts(error.value) == (
        "the labelled answers have one side only",
        "9 true and 0 false ones",
        "Give more questions, or behaviour.answers: dataset.",
    )
    missing = truthfulness(answers=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(FileError, match=r"^no such file"):
        missing.make_traces(FakeEngine(), missing.items(_source(path), "probe"))


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    """Says that answers to questions with an even number are true."""
    monkeypatch.setenv("STEER2EDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def answer(body: Mapping[str, Any]) -> str:
        text = body["messages"][-1]["content"]
        number = next(i for i in range(99) if f"Question {i}?" in text)
        return "Yes." if number % 2 == 0 else "No."

    server = ChatServer(answer)
    yield server
    server.close()


def test_own_answers_are_labelled_by_the_judge(judge: ChatServer, tmp_path: Path) -> None:
    behaviour = truthfulness(
        answers="own", judge={"endpoint": judge.url, "model": "j", "question": "True?"}, system="S."
    )
    items = behaviour.items(_source(_file(tmp_path), probe=6), "probe")
    engine = FakeEngine()
    traces = behaviour.make_traces(engine, items)
    assert engine.asked == [(f"S.\n{item.text}", "base") for item in items]
    assert [(t.prompt, t.response, t.label, t.system) for t in traces] == [
        (item.text, f"An answer to S.\n{item.text}", "negative" if _number(item) % 2 else "positive", "S.")
        for item in items
    ]
    assert all("True?" in body["messages"][-1]["content"] for body in judge.bodies)


def test_own_answers_need_a_judge(tmp_path: Path) -> None:
    behaviour = truthfulness(answers="own")
    with pytest.raises(TraceError) as error:
        behaviour.make_traces(FakeEngine(), behaviour.items(_source(_file(tmp_path)), "probe"))
    assert three_parts(error.value) == (
        "own answers need a judge",
        "no behaviour.judge",
        "Give one, or behaviour.answers: dataset.",
    )


# Recipes and runs -----------------------------------------------------------------------------------------------------


def test_a_recipe_has_questions_and_neutral_prompts_by_default() -> None:
    recipe = small_recipe("nowhere", {"name": "truthfulness"}, data={"probe": 9})
    assert recipe.data.prompts == "builtin:misconceptions"
    assert recipe.source.counts == {"probe": {OPEN: 9}, "validation": None, "test": None}
    assert recipe.utility.prompts == "builtin:neutral_prompts"
    assert len(recipe.behaviour.asking()) == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_pico(tmp_path_factory.mktemp("pico") / "model")


@pytest.mark.parametrize(
    ("behaviour", "data", "said"),
    [
        ({"answers": "own"}, {}, "own answers need a judge"),
        ({"answers": "nowhere.jsonl"}, {}, "no such file (got: nowhere.jsonl)"),
        ({}, {"prompts": "nowhere.jsonl"}, "no such file (got: nowhere.jsonl)"),
        ({}, {"prompts": "builtin:misconception"}, "no such set comes with the package"),
        ({}, {"test": 4000}, "has too few lines"),
        ({"answer": "own"}, {}, "Did you mean 'answers'?"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    behaviour: dict[str, Any],
    data: dict[str, Any],
    said: str,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    raw = {"name": "a", "model": {"name": model, "device": "cpu"}, "behaviour": {"name": "truthfulness", **behaviour}}
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(raw | {"data": data}), encoding="utf-8")
    is_one_sentence(said_by(monkeypatch, capfd, "run", wrong, "--out", tmp_path / "run", "--quiet"), said)


@pytest.mark.parametrize("opened", [0, 2])
def test_a_run_measures_all_test_questions_with_and_without_free_answers(
    opened: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    behaviour = {"name": "truthfulness", "opened": opened}
    data = {"prompts": _file(tmp_path), "probe": 6, "validation": 4, "test": 5}
    recipe = small_recipe(model, behaviour, data=data)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    out = tmp_path / "run"
    assert command(monkeypatch, "run", tmp_path / "r.yaml", "--out", out, "--quiet") == 0
    seen = capsys.readouterr()
    assert seen.err == ""
    assert f"Report, figures, edit and adapter: {out}/" in seen.out
    results = json.loads((out / "evaluation/results.json").read_text(encoding="utf-8"))
    for system in ("base", "steering", "edit"):
        counts = {name: results["systems"][system][name]["n"] for name in ("truthful", "margin", "mc1", "mc2")}
        assert counts == dict.fromkeys(counts, 5)
        assert 0 <= results["systems"][system]["mc2"]["mean"] <= 1
    assert results["systems"]["base"]["degenerate"]["n"] == opened


def test_the_judge_reads_own_answers_without_their_thinking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "<think>Is it false?</think>It is so."
    start, judged = text.index("It is so"), []

    class Thinker(FakeEngine):
        def generate(self, requests: Any, *rest: Any) -> Any:
            return [Answer(tuple(map(ord, text)), text, True, start, start) for _ in requests]

    def verdicts(judge: Endpoint, pairs: Any, progress: Any = None) -> list[float]:
        judged.extend(said for _, said in pairs)
        return [0.5, 0.49]

    monkeypatch.setattr(Endpoint, "judged", verdicts)
    judge = {"endpoint": "http://localhost:1/v1", "model": "j", "question": "True?"}
    behaviour = truthfulness(answers="own", judge=judge)
    traces = behaviour.make_traces(Thinker(), behaviour.items(_source(_file(tmp_path), probe=2), "probe"))
    assert judged == ["It is so."] * 2
    assert [(t.response, t.answer_start, t.label) for t in traces] == [
        (text, start, "positive"),  # one half counts as true
        (text, start, "negative"),
    ]
