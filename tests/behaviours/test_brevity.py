"""Brevity: which of a model's own answers are traces, and that tokens are counted as the engine makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import make_pico, make_tokenizer
from runs import FakeEngine, is_one_sentence, said_by, save_pico
from sides import chatml, small_recipe, source, three_parts, write_rows
from steer2edit.behaviours.base import SPLITS, Item, Outcome, Source
from steer2edit.behaviours.brevity import PROBLEM, Brevity
from steer2edit.engines.base import Answer
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import FileError, RecipeError, TraceError
from steer2edit.files.schema import parse
from steer2edit.recipe import parse_recipe
from steer2edit.searching.bench import Bench
from steer2edit.searching.candidates import BASE, Candidate, Trial
from steer2edit.searching.plan import Evaluation


def brevity(**options: Any) -> Brevity:
    return parse(Brevity, options, under="behaviour")


class Writer(FakeEngine):
    """Answers each prompt with what it is given: tokens, ended, and perhaps a text, where it starts, and thinking."""

    def __init__(self, answers: Mapping[str, Any]):
        super().__init__()
        self.answers = answers
        self.new_tokens = 0

    def generate(self, requests: Any, table: Any, max_new_tokens: int, progress: Any = None, *rest: Any) -> Any:
        self.new_tokens = max_new_tokens
        made = []
        for request in requests:
            prompt = "".join(map(chr, request.ids))
            self.asked.append((prompt, table[request.row].name))
            given = self.answers[prompt]
            tokens, ended, *other = given if isinstance(given, tuple) else (given, True)
            text, start, thinking = [*other, *(f"It has {tokens} tokens.", 0, 0)[len(other) :]]
            made.append(Answer(tuple(range(tokens)), text, ended, start, thinking))
        return made


def _problems(answers: Mapping[str, Any], target: str | None = None) -> list[Item]:
    return [Item(PROBLEM, prompt, target=target) for prompt in answers]


def _traces(answers: Mapping[str, Any], target: str | None = None, **options: Any) -> dict[str, list[str]]:
    """The prompts of each side's traces."""
    traces = brevity(**options).make_traces(Writer(answers), _problems(answers, target))
    return {label: [t.prompt for t in traces if t.label == label] for label in ("positive", "negative")}


def _lengths(lengths: Sequence[int]) -> dict[str, int]:
    return {f"Q{i}": length for i, length in enumerate(lengths)}


# Traces ---------------------------------------------------------------------------------------------------------------


def test_the_shortest_share_is_positive_and_the_longest_negative() -> None:
    lengths = [30, 12, 44, 5, 71, 9, 33, 18, 90, 27]
    traces = _traces(_lengths(lengths), share=0.3)
    assert traces == {"positive": ["Q3", "Q5", "Q1"], "negative": ["Q2", "Q4", "Q8"]}  # 5, 9, 12 and 44, 71, 90


@pytest.mark.parametrize(
    ("share", "count", "k"),
    [(0.05, 20, 1), (0.05, 39, 1), (0.05, 40, 2), (0.05, 10, 1), (0.3, 10, 3), (0.5, 9, 4), (0.29, 100, 29)],
)
def test_k_is_the_whole_part_of_the_share_and_one_at_least(share: float, count: int, k: int) -> None:
    traces = _traces(_lengths(range(1, count + 1)), share=share)
    assert traces["positive"] == [f"Q{i}" for i in range(k)]
    assert traces["negative"] == [f"Q{i}" for i in range(count - k, count)]


def test_traces_are_whole_answers_with_their_thinking() -> None:
    text = "<think>Hm, hm.</think>\n\nSeven."
    answers = {"short": (3, True), "thoughtful": (40, True, text, text.index("Seven"), 36), "plain": (20, True)}
    behaviour = brevity(system="Count.", share=0.34)
    engine = Writer({f"Count.\n{prompt}": answer for prompt, answer in answers.items()})
    short, long = behaviour.make_traces(engine, _problems(answers))
    assert (short.prompt, short.response, short.label) == ("short", "It has 3 tokens.", "positive")
    # By its answer alone, of four tokens, this would be a short one.
    assert (long.prompt, long.response, long.label) == ("thoughtful", text, "negative")
    assert (long.answer_start, long.source, long.system) == (text.index("Seven"), "own, 40 tokens", "Count.")
    assert engine.new_tokens == behaviour.new_tokens == 256


def test_an_answer_that_was_cut_is_no_short_one() -> None:
    answers = {"a": (4, False), "b": (5, False), "c": 8, "d": 9, "e": 30, "f": (64, False)}
    assert _traces(answers, share=0.34) == {"positive": ["c", "d"], "negative": ["e", "f"]}


def test_empty_answers_count_for_nothing() -> None:
    answers = {"none": 0, "a": 3, "b": 6, "c": 9, "nothing": 0, "d": 12}
    assert _traces(answers, share=0.5) == {"positive": ["a", "b"], "negative": ["c", "d"]}


def test_only_correct_answers_if_they_alone_are_to_count() -> None:
    texts = {"a": "It is 41.", "b": "It is 42.", "c": "It is 42.", "d": "<think>42</think> It is 7.", "e": "So 42"}
    lengths = {"a": 2, "b": 5, "c": 9, "d": 30, "e": 20}
    answers = {
        name: (lengths[name], True, text, len("<think>42</think> ") if name == "d" else 0)
        for name, text in texts.items()
    }
    assert _traces(answers, "42", share=0.34) == {"positive": ["a"], "negative": ["d"]}
    assert _traces(answers, "42", share=0.34, correct_only=True) == {"positive": ["b"], "negative": ["e"]}


@pytest.mark.parametrize(
    ("answers", "options", "got"),
    [
        ({"a": 5}, {}, "1 answers, 1 of which ended"),
        (_lengths([7] * 10), {}, "10 answers, 10 of which ended"),
        ({"a": (9, False), "b": (9, False), "c": (9, False)}, {}, "3 answers, 0 of which ended"),
        ({"a": (4, False), "b": 8, "c": (6, False)}, {}, "3 answers, 1 of which ended"),
        ({"a": 0, "b": 0}, {}, "0 answers, 0 of which ended"),
        (_lengths([3, 9]), {"correct_only": True, "target": "42"}, "0 answers, 0 of which ended"),
    ],
)
def test_without_short_and_long_answers_there_is_no_contrast(
    answers: dict[str, Any], options: dict[str, Any], got: str
) -> None:
    with pytest.raises(TraceError) as error:
        _traces(answers, **options)
    assert three_parts(error.value) == (
        "there is no contrast between short and long answers",
        got,
        "Give more probe questions, a larger behaviour.share, or a larger behaviour.new_tokens.",
    )


def test_what_is_said_is_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    _traces(_lengths([30, 12, 44, 5, 71, 9, 33, 18, 90, 27]), share=0.2)
    said = capsys.readouterr().err
    assert "of 10 answers the 2 shortest have 7 tokens on average, the longest 80" in said


def test_both_sides_have_as_many_traces() -> None:
    """Five of ten are asked for, and two ended."""
    answers = _lengths([3, 5]) | {f"cut {i}": (20 + i, False) for i in range(8)}
    traces = _traces(answers, share=0.5)
    assert {label: sorted(prompts) for label, prompts in traces.items()} == {
        "positive": ["Q0", "Q1"],
        "negative": ["cut 6", "cut 7"],
    }


# Measures -------------------------------------------------------------------------------------------------------------


def test_tokens_ended_and_correct_are_measured() -> None:
    item = Item(PROBLEM, "Q", target="6 * 7 = 42 #### 42")
    base = Outcome("It is 42.", tokens=30)
    measure = brevity().measure
    assert measure(item, Outcome("So it is 42.", tokens=12), base) == {
        "tokens": 12.0,
        "ended": 1.0,
        "correct": 1.0,
        "correct_loss": 0.0,
    }
    assert measure(item, Outcome("First 6 and", tokens=24, ended=False), base) == {
        "tokens": 24.0,
        "ended": 0.0,
        "correct": 0.0,
        "correct_loss": 1.0,
    }
    worse = Outcome("No idea.", tokens=3)
    assert measure(item, base, worse)["correct_loss"] == -1.0
    assert measure(Item(PROBLEM, "Q"), base, worse) == {"tokens": 30.0, "ended": 1.0}


def test_thinking_counts_apart_and_its_numbers_are_no_answer() -> None:
    text = "<think>6, 41</think>\n\nIt is 42."
    thought = Outcome(text, answer_start=text.index("It"), tokens=50, thinking=38)
    item = Item(PROBLEM, "Q", target="42")
    values = brevity().measure(item, thought, Outcome("It is 42.", tokens=5))
    assert values["tokens"] == 50.0
    assert (values["thinking_tokens"], values["answer_tokens"]) == (38.0, 12.0)
    assert values["correct"] == 1.0
    # One that thinks no more is compared with one that did.
    values = brevity().measure(item, Outcome("It is 42.", tokens=5), thought)
    assert (values["thinking_tokens"], values["answer_tokens"]) == (0.0, 5.0)
    endless = Outcome("<think>It is 42", answer_start=15, tokens=24, ended=False, thinking=24)
    values = brevity().measure(item, endless, thought)
    assert (values["answer_tokens"], values["correct"], values["ended"]) == (0.0, 0.0, 0.0)


def test_fewer_tokens_are_better_up_to_the_longest() -> None:
    attribute = brevity(longest=96).attribute
    assert (attribute.name, attribute.better, attribute.rate) == ("tokens", "lower", False)
    assert [attribute.scaled(x) for x in (0, 24, 96, 200)] == [1.0, 0.75, 0.0, 0.0]
    assert [m.name for m in brevity().measures][:4] == ["tokens", "correct", "ended", "correct_loss"]


def _greedy(model: Any, ids: Sequence[int], stops: set[int], new_tokens: int) -> tuple[list[int], bool]:
    made: list[int] = []
    for _ in range(new_tokens):
        with torch.inference_mode():
            token = int(model(torch.tensor([[*ids, *made]])).logits[0, -1].argmax())
        if token in stops:
            return made, True
        made.append(token)
    return made, False


def test_counts_are_the_tokens_that_the_engine_made_ended_or_cut(tmp_path: Path) -> None:
    model, tokenizer = make_pico(max_position_embeddings=512), make_tokenizer()
    prompts = [f"What is {i} and {i + 1}?" for i in range(8)]
    ids = [tokenizer(chatml(prompt))["input_ids"] for prompt in prompts]
    # A token that some answers have early and others late or never ends a turn here.
    first = [_greedy(model, some, {tokenizer.eos_token_id}, 12)[0] for some in ids]
    seen = [token for made in first for token in dict.fromkeys(made)]
    stop = next(t for t in seen if 2 <= sum(t in made for made in first) < 8 and not any(m[:1] == [t] for m in first))
    model.generation_config.eos_token_id = stop
    expected = [_greedy(model, some, {stop, tokenizer.eos_token_id}, 12) for some in ids]
    assert {ended for _, ended in expected} == {True, False}
    for rows in (1, 8):
        engine = TransformersEngine(model, tokenizer, rows=rows)
        items = [Item(PROBLEM, prompt, target="42") for prompt in prompts]
        plan = Evaluation(new_tokens=12, utility_prompts=1)
        bench = Bench(engine, {}, items, brevity(), plan, tmp_path / f"journal-{rows}.jsonl")
        (trial,) = bench.run([BASE], "0")
        assert list(trial.values["tokens"]) == [len(made) for made, _ in expected]
        assert list(trial.values["ended"]) == [float(ended) for _, ended in expected]
        assert trial.count("thinking_tokens") == 0
    # Traces go by the same counts.
    kept = sorted((len(made), prompt) for (made, ended), prompt in zip(expected, prompts, strict=True) if ended)
    traces = brevity(share=0.1, new_tokens=12).make_traces(engine, [Item(PROBLEM, prompt) for prompt in prompts])
    short, long = traces
    assert len(tokenizer(short.response)["input_ids"]) >= 1
    assert short.source == f"own, {kept[0][0]} tokens"
    assert long.source == "own, 12 tokens"


def test_a_bench_measures_thinking_apart(tmp_path: Path) -> None:
    text = "<think>Hm.</think>It is 42."
    answers = {"a": (20, True, text, text.index("It"), 14), "b": (8, False, "It is 4", 0, 0)}
    items = _problems(answers, "42")
    plan = Evaluation(new_tokens=24, utility_prompts=1)
    bench = Bench(Writer(answers), {}, items, brevity(), plan, tmp_path / "journal.jsonl")
    (trial,) = bench.run([BASE], "0")
    assert trial.values["tokens"] == (20.0, 8.0)
    assert (trial.values["thinking_tokens"], trial.values["answer_tokens"]) == ((14.0,), (6.0,))
    assert (trial.values["correct"], trial.values["ended"]) == ((1.0, 0.0), (1.0, 0.0))


# Items and recipes ----------------------------------------------------------------------------------------------------


def _source(path: str, seed: int = 0, **counts: Any) -> Source:
    return source(path, seed, kind=PROBLEM, **counts)


def _file(folder: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    return write_rows(folder / "problems.jsonl", rows)


def test_items_are_questions_with_their_answers(tmp_path: Path) -> None:
    rows = [{"question": f"Problem {i}?", "answer": str(i)} for i in range(20)]
    items = {split: brevity().items(_source(_file(tmp_path, rows), test=5), split) for split in SPLITS}
    assert [len(items[split]) for split in SPLITS] == [10, 4, 5]
    assert all(item.text == f"Problem {item.target}?" for split in SPLITS for item in items[split])
    assert len({item.text for split in SPLITS for item in items[split]}) == 19
    other = brevity().items(_source(_file(tmp_path, rows), seed=1), "probe")
    assert {item.text for item in other} != {item.text for item in items["probe"]}


def test_problems_that_differ_in_signs_alone_are_different_problems(tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} {sign} 2?", "answer": "0"} for i in range(4) for sign in "+-*"]
    items = [item.text for split in SPLITS for item in brevity().items(_source(_file(tmp_path, rows)), split)]
    assert len(items) == len(set(items)) >= 11


def test_an_answer_is_a_text(tmp_path: Path) -> None:
    rows = [{"question": f"Problem {i}?", "answer": "7"} for i in range(9)]
    with pytest.raises(FileError, match=r"line 10 of problems\.jsonl is no question"):
        brevity().items(_source(_file(tmp_path, [*rows, {"question": "P?"}])), "test")
    with pytest.raises(FileError) as error:
        brevity().items(_source(_file(tmp_path, [*rows, {"question": "P?", "answer": 42}])), "test")
    assert three_parts(error.value) == (
        "line 10 of problems.jsonl is no question",
        "{'question': 'P?', 'answer': 42}",
        'Write a row like {"question": …, "answer": "42"}.',
    )


def test_the_bundled_problems_fit() -> None:
    items = {split: brevity().items(_source("builtin:word_problems"), split) for split in SPLITS}
    assert [len(items[split]) for split in SPLITS] == [60, 40, 80]
    assert all(float(item.target) == float(item.target) for split in SPLITS for item in items[split])


@pytest.mark.parametrize("evaluation", [None, {}, {"rows": 8}, {"new_tokens": 96}])
def test_the_scale_ends_where_answers_are_cut(evaluation: dict[str, Any] | None) -> None:
    raw: dict[str, Any] = {"name": "a", "model": {"name": "m"}, "behaviour": {"name": "brevity"}}
    recipe = parse_recipe(raw if evaluation is None else raw | {"evaluation": evaluation})
    assert recipe.behaviour.attribute.worst == recipe.evaluation.new_tokens
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    stated = parse_recipe(raw | {"behaviour": {"name": "brevity", "longest": 50}, "evaluation": {"new_tokens": 96}})
    assert stated.behaviour.attribute.worst == 50


def _trial(values: Mapping[str, float]) -> Trial:
    common = {"degenerate": (0.0,), "utility_loss": (0.1,), "nll_rise": (0.1,)}
    return Trial(Candidate("edit", "edit", {}), common | {name: (x,) for name, x in values.items()}, "0")


def test_an_edit_that_loses_right_answers_is_not_allowed_by_default() -> None:
    recipe = parse_recipe({"name": "a", "model": {"name": "m"}, "behaviour": {"name": "brevity"}})
    item = Item(PROBLEM, "Q", target="42")
    right, wrong, base = Outcome("42", tokens=3), Outcome("7", tokens=3), Outcome("It is 42", tokens=30)
    assert recipe.aim.allows(_trial(recipe.behaviour.measure(item, right, base)))
    assert not recipe.aim.allows(_trial(recipe.behaviour.measure(item, wrong, base)))


@pytest.mark.parametrize(
    ("behaviour", "data", "said"),
    [
        ({"share": 0.6}, {}, "behaviour.share"),
        ({"share": 0}, {}, "behaviour.share"),
        ({"share": True}, {}, "behaviour.share"),
        ({"shares": 0.1}, {}, "Did you mean 'share'?"),
        ({}, {"probe": 4000}, "has too few lines"),
        ({}, {"prompts": "nowhere.jsonl"}, "no such file (got: nowhere.jsonl)"),
        ({}, {"probe": {"problems": 4}}, "Did you mean 'problem'?"),
        ({"new_tokens": 1}, {"probe": 4}, "there is no contrast between short and long answers"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    behaviour: dict[str, Any],
    data: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    raw = {"name": "a", "model": {"name": save_pico(tmp_path / "model"), "device": "cpu"}, "data": data}
    raw["behaviour"] = {"name": "brevity", **behaviour}
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(raw), encoding="utf-8")
    is_one_sentence(said_by(monkeypatch, capfd, "run", wrong, "--out", tmp_path / "run", "--quiet"), said)


def test_a_limit_on_what_is_measured_can_be_given() -> None:
    recipe = small_recipe("m", {"name": "brevity"}, search={"limits": {"correct_loss": 0.3, "thinking_tokens": 9}})
    limits = {measure.name: limit for measure, limit in recipe.aim.limits.items()}
    assert (limits["correct_loss"], limits["thinking_tokens"], limits["utility_loss"]) == (0.3, 9, 0.45)
    with pytest.raises(RecipeError, match=r"unknown key search\.limits\.corect_loss .*Did you mean 'correct_loss'"):
        small_recipe("m", {"name": "brevity"}, search={"limits": {"corect_loss": 0.3}})
