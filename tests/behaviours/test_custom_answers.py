"""A behaviour of one's own: its traces, whether its sides contrast, its choices, and what it measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import make_pico, make_tokenizer
from own_behaviour import LOUD, SOFT, _files, _prompts, custom, of_files
from runs import FakeEngine
from sides import chatml, nll_by_hand, small_recipe, source, three_parts, write_rows
from steer2edit.behaviours.base import Item, Outcome
from steer2edit.behaviours.custom import PAIR, PROMPT
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import TraceError
from steer2edit.searching.bench import Bench
from steer2edit.searching.candidates import BASE, Candidate, Trial
from steer2edit.searching.front import choose
from steer2edit.searching.plan import Evaluation

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
