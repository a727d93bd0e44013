"""Truthfulness: what its questions become, whose answers its traces are, and its measures against lm-eval's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import steer2edit as s2e
from conftest import _byte_level, _wrapped, make_pico, make_tokenizer
from runs import FakeEngine, command, is_one_sentence, said_by, save_pico
from sides import ChatServer, chatml, nll_by_hand, small_recipe, source, three_parts, write_rows
from steer2edit.behaviours.base import SPLITS, Item, Outcome, Source
from steer2edit.behaviours.truthfulness import CHOICE, OPEN, Truthfulness, multiple_choice
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import FileError, RecipeError, Steer2EditError, TraceError
from steer2edit.files.schema import parse
from steer2edit.probing.chat import Chat, named_template
from steer2edit.probing.spans import response_span
from steer2edit.probing.traces import Trace
from steer2edit.searching.bench import Bench
from steer2edit.searching.candidates import BASE, Trial, asked, edited
from steer2edit.searching.plan import Evaluation


def truthfulness(**options: Any) -> Truthfulness:
    return parse(Truthfulness, options, under="behaviour")


def _row(number: int, correct: int = 2, incorrect: int = 2, **row: Any) -> dict[str, Any]:
    """A question whose best answer is the second of its correct ones."""
    good = [f"True {number}.{i}" for i in range(correct)]
    bad = [f"False {number}.{i}" for i in range(incorrect)]
    raw = {"question": f"Question {number}?", "best_answer": good[correct // 2]}
    return raw | {"correct_answers": good, "incorrect_answers": bad, **row}


def _file(folder: Path, count: int = 20, name: str = "questions.jsonl", **row: Any) -> str:
    return write_rows(folder / name, [_row(i, **row) for i in range(count)])


def _source(path: str, seed: int = 0, **counts: Any) -> Source:
    return source(path, seed, kind=OPEN, **counts)


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


# Losses and spans -----------------------------------------------------------------------------------------------------

ANSWERS = [
    "The capital of France is Paris.",
    "I am sorry, but no.",
    "Sure: mix the flour, the water and the salt.",
    "No.",
    "Please ask me something else!",
    "It is forty-two",
]


def _questions(folder: Path, count: int = 6) -> str:
    """Questions of unlike lengths, each with two correct and two incorrect answers, all of the test split but two."""
    rows = []
    for i in range(count):
        texts = [f"{ANSWERS[(i + k) % 6]} {'So it is. ' * (k % 2)}".strip() for k in range(4)]
        row = {"question": f"What is {'really ' * (i % 3)}so {i}?", "best_answer": texts[1], "split": "test"}
        rows.append(row | {"correct_answers": texts[:2], "incorrect_answers": texts[2:]})
    for i, split in enumerate(("probe", "validation")):
        rows.append(_row(i, split=split))
    return write_rows(folder / "questions.jsonl", rows)


class Recording(TransformersEngine):
    """Keeps what was scored."""

    def losses(self, pairs: Any, table: Any, progress: Any = None) -> Any:
        self.__dict__.setdefault("scored", []).extend(pairs)
        return super().losses(pairs, table, progress)


def _bench(engine: Any, path: str, journal: Path, scores: Any = None, **options: Any) -> Bench:
    behaviour = truthfulness(opened=0, **options)
    items = behaviour.items(_source(path), "test")
    return Bench(engine, scores or {}, items, behaviour, Evaluation(), journal)


def _by_hand(
    model: Any, tokenizer: Any, items: Sequence[Item], prompt: Callable[[Item], str]
) -> dict[str, list[float]]:
    """The measures in fp64, each choice in a pass of its own."""
    values: dict[str, list[float]] = {name: [] for name in ("truthful", "margin", "mc1", "mc2")}
    for item in items:
        scored = [nll_by_hand(model, tokenizer, prompt(item), choice) for choice in item.choices]
        correct = item.target[0]
        whole = [-nll * count for nll, count in scored]
        p = [math.exp(x - max(whole)) for x in whole]
        values["truthful"].append(float(scored[0][0] < scored[correct][0]))
        values["margin"].append(scored[correct][0] - scored[0][0])
        values["mc1"].append(float(whole[0] > max(whole[correct:])))
        values["mc2"].append(sum(p[:correct]) / sum(p))
    return values


def _assert_close(trial: Trial, values: Mapping[str, list[float]]) -> None:
    for name, wanted in values.items():
        assert list(trial.values[name]) == pytest.approx(wanted, abs=2e-5), name


def test_a_models_measures_are_those_of_losses_by_hand_with_and_without_an_edit(tmp_path: Path) -> None:
    model, tokenizer = make_pico(max_position_embeddings=512), make_tokenizer()
    engine = TransformersEngine(model, tokenizer)
    traces = truthfulness().make_traces(engine, truthfulness().items(_source(_questions(tmp_path)), "probe"))
    scores = s2e.score(model, s2e.collect(model, tokenizer, traces))
    bench = _bench(engine, _questions(tmp_path), tmp_path / "journal.jsonl", {"full": scores}, system="Be kind.")
    candidate, prompted = edited(0.05, None, 0.2), asked(0, "Be true.")
    base, with_edit, with_prompt = bench.run([BASE, candidate, prompted], "0")
    _assert_close(base, _by_hand(model, tokenizer, bench.closed, lambda item: chatml(item.text, "Be kind.")))
    both = "Be kind.\n\nBe true."
    _assert_close(with_prompt, _by_hand(model, tokenizer, bench.closed, lambda item: chatml(item.text, both)))
    edit = scores.edit(rho_attn=0.05, rho_mlp=None, alpha=0.2)
    with edit.applied(model):
        values = _by_hand(model, tokenizer, bench.closed, lambda item: chatml(item.text, "Be kind."))
    _assert_close(with_edit, values)
    moved = [abs(a - b) for a, b in zip(with_edit.values["margin"], base.values["margin"], strict=True)]
    assert min(moved) > 1e-3
    assert 0 < sum(base.values["mc2"]) < 6


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {}), ("qwen3", {"head_dim": 16}), ("mistral", {"num_key_value_heads": 4, "sliding_window": 24})],
)
def test_the_numbers_do_not_depend_on_what_is_scored_at_once(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model, tokenizer = make_pico(model_type, max_position_embeddings=512, **changes), make_tokenizer()
    probe = truthfulness().items(_source(_questions(tmp_path)), "probe")
    traces = truthfulness().make_traces(FakeEngine(), probe)
    scores = s2e.score(model, s2e.collect(model, tokenizer, traces))
    tried = [BASE, edited(0.05, None, 0.2), edited(0.1, 0.1, 0.2)]
    trials = []
    for number, logits in enumerate((None, 1)):  # one intervention beside the original model, or all of them
        engine = TransformersEngine(model, tokenizer, rows=64 if logits is None else 1)
        engine.logits = logits or engine.logits
        bench = _bench(engine, _questions(tmp_path), tmp_path / f"{number}.jsonl", {"full": scores})
        trials.append(bench.run(tried, "0"))
    alone = []
    for number, item in enumerate(bench.closed):  # each question in a bench of its own
        engine = TransformersEngine(model, tokenizer)
        behaviour = truthfulness(opened=0)
        one = Bench(engine, {"full": scores}, [item], behaviour, Evaluation(), tmp_path / f"alone-{number}.jsonl")
        alone.append(one.run(tried, "0"))
    _assert_close(trials[0][0], _by_hand(model, tokenizer, bench.closed, lambda item: chatml(item.text)))
    for c in range(len(tried)):
        for name in ("truthful", "margin", "mc1", "mc2"):
            large, small = (list(some[c].values[name]) for some in trials)
            single = [one[c].values[name][0] for one in alone]
            assert small == pytest.approx(large, abs=1e-5)
            assert single == pytest.approx(large, abs=1e-5)


def test_choices_scored_together_or_each_alone_have_the_same_nll(tmp_path: Path) -> None:
    model, tokenizer = make_pico(max_position_embeddings=512), make_tokenizer()
    engine = Recording(model, tokenizer)
    _bench(engine, _questions(tmp_path), tmp_path / "journal.jsonl").run([BASE], "0")
    pairs = engine.__dict__["scored"]
    assert len(pairs) == 24
    together = engine.losses(pairs, []).base_nll
    alone = torch.cat([TransformersEngine(model, tokenizer).losses([pair], []).base_nll for pair in pairs])
    backwards = engine.losses(pairs[::-1], []).base_nll.flip(0)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, backwards, rtol=0, atol=1e-5)


CLOSED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if not loop.last or m['role'] == 'user' %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", [None, CLOSED, "qa"], ids=["chatml", "closing", "qa"])
def test_the_span_of_a_choice_is_its_own_tokens_and_no_others(template: str | None, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    chat = named_template("qa") if template == "qa" else Chat()
    if template == CLOSED:
        tokenizer.chat_template = CLOSED
    engine = Recording(make_pico(max_position_embeddings=512), tokenizer, chat=chat)
    bench = _bench(engine, _questions(tmp_path), tmp_path / "journal.jsonl")
    (trial,) = bench.run([BASE], "0")
    choices = [(item, choice) for item in bench.closed for choice in item.choices]
    assert len(engine.__dict__["scored"]) == len(choices)
    for (item, choice), (prompt, answer) in zip(choices, engine.__dict__["scored"], strict=True):
        before = f"Question: {item.text}\nAnswer: " if template == "qa" else chatml(item.text)
        assert tokenizer.decode([*prompt, *answer]) == before + choice
        assert tokenizer.decode(answer).lstrip() == choice  # a token may begin with the space before the answer
        assert not set(answer) & set(tokenizer.all_special_ids)
    lengths = [len(answer) for _, answer in engine.__dict__["scored"]]
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["lengths"] for line in lines if line["what"] == "nll"] == [lengths]
    assert trial.count("mc2") == len(bench.closed)


def test_a_choice_that_ends_its_turn_has_the_same_span(metaspace_tokenizer: Any) -> None:
    """An end-of-turn token after the answer is not scored, whatever the tokenizer."""
    for tokenizer, end in ((make_tokenizer(), "<|im_end|>"), (metaspace_tokenizer, "</s>")):
        spans = []
        for response in ("The capital of France is Paris.", f"The capital of France is Paris.{end}"):
            span, cut = response_span(tokenizer, Trace("What is it?", response, "positive"), positions="response")
            assert span is not None
            assert not cut
            spans.append((span.ids, span.first, span.last))
        assert spans[0] == spans[1]
        ids, first, last = spans[0]
        assert (tokenizer.decode(ids[first:last]).strip(), last) == ("The capital of France is Paris.", len(ids))


# lm-eval --------------------------------------------------------------------------------------------------------------


def _lm_eval(folder: Path, model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], chat: bool) -> Any:
    """What lm-eval's own tasks say of each question: contexts, mc1 and mc2."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    docs = []
    for row in rows:
        correct = list(dict.fromkeys([row["best_answer"], *row["correct_answers"]]))
        wrong = list(row["incorrect_answers"])
        mc1 = {"choices": [row["best_answer"], *wrong], "labels": [1] + [0] * len(wrong)}
        mc2 = {"choices": [*correct, *wrong], "labels": [1] * len(correct) + [0] * len(wrong)}
        docs.append({"question": row["question"], "mc1_targets": mc1, "mc2_targets": mc2})
    (folder / "tasks").mkdir(parents=True)
    data = write_rows(folder / "docs.jsonl", docs)
    for name in ("mc1", "mc2"):
        theirs = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa" / f"truthfulqa_{name}.yaml"
        task = {
            "include": str(theirs),
            "task": f"pico_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": data}, "cache_dir": str(folder / "cache")},
        }
        (folder / "tasks" / f"pico_{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=1024),
        tasks=["pico_mc1", "pico_mc2"],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = {name: sorted(found["samples"][f"pico_{name}"], key=lambda s: s["doc_id"]) for name in ("mc1", "mc2")}
    means = {name: found["results"][f"pico_{name}"]["acc,none"] for name in ("mc1", "mc2")}
    return samples, means


PLACES = ["The moon", "Paris", "The capital", "bread", "France", "water", "The salt", "the flour", "a loaf"]
NUMBERS = ["42", "1969", "7", "360", "99"]


def _rows(tokenizer: Any, starts: Sequence[str]) -> list[dict[str, Any]]:
    """Ten questions, the answers to each of which have as many tokens, so that their probabilities are of one order."""
    by_length: dict[int, list[str]] = {}
    for end in ("is the answer", "is here", "and Paris", "and the salt", "is not to be", "or will be"):
        for start in starts:
            text = f"{start} {end}."
            by_length.setdefault(len(tokenizer.tokenize(f"A: {text}")), []).append(text)
    pool = max(by_length.values(), key=len)
    assert len(pool) >= 8
    rows = []
    for i in range(10):
        texts = [pool[(i + k) % len(pool)] for k in range(6)]
        row = {"question": f"What is the {'short ' * (i % 3)}reason {i}?", "best_answer": texts[0], "split": "test"}
        rows.append(row | {"correct_answers": texts[: 1 + i % 2], "incorrect_answers": texts[2 : 4 + i % 3]})
    return rows


def _ours(folder: Path, engine: TransformersEngine, rows: Sequence[Mapping[str, Any]]) -> Trial:
    others = [_row(i, split=split) for i, split in enumerate(("probe", "validation"))]
    path = write_rows(folder / "q.jsonl", [*rows, *others])
    bench = _bench(engine, path, folder / "journal.jsonl")
    assert [item.text for item in bench.closed] == [row["question"] for row in rows]
    return bench.run([BASE], "0")[0]


def _merging(vocabulary: int = 420) -> Any:
    """Byte-level BPE in which the space before these answers is a part of their first token, as in real tokenizers."""
    from tokenizers import Tokenizer

    made = _wrapped(
        Tokenizer.from_str(_byte_level(True, vocabulary)), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = make_tokenizer().chat_template
    return made


@pytest.mark.lm_eval
@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True], ids=["its own template", "chat template"])
def test_mc1_and_mc2_are_those_of_lm_eval(chat: bool, tmp_path: Path) -> None:
    tokenizer = _merging()
    rows = _rows(tokenizer, PLACES)
    starts = {tokenizer.tokenize(f"A: {row['best_answer']}")[2] for row in rows}
    assert all(len(start) > 1 and start[0] == "Ġ" for start in starts)
    _compare(tmp_path, tokenizer, rows, chat)


@pytest.mark.lm_eval
@pytest.mark.slow
def test_mc1_and_mc2_are_those_of_lm_eval_where_some_answers_begin_with_a_space_of_its_own(tmp_path: Path) -> None:
    tokenizer = _merging()
    rows, mixed = _rows(tokenizer, [*NUMBERS, *PLACES]), 0
    for row in rows:
        starts = [tokenizer.tokenize(f"A: {text}")[2] for text in (row["best_answer"], *row["incorrect_answers"])]
        mixed += len({len(start) > 1 for start in starts}) == 2
    assert mixed > 5
    _compare(tmp_path, tokenizer, rows, chat=False)


def _compare(folder: Path, tokenizer: Any, rows: Sequence[Mapping[str, Any]], chat: bool) -> None:
    import lm_eval

    # A gentle init, so that the answers' probabilities are of one order.
    model = make_pico(max_position_embeddings=1024, vocab_size=len(tokenizer), initializer_range=0.1)
    samples, means = _lm_eval(folder / "theirs", model, tokenizer, rows, chat)
    theirs = yaml.safe_load(
        (Path(lm_eval.__file__).parent / "tasks" / "truthfulqa" / "truthfulqa_mc1.yaml").read_text(encoding="utf-8")
    )
    if chat:  # what the task asks is what the user says
        texts = [_rendered(theirs["doc_to_text"], row["question"]) for row in rows]
        engine = TransformersEngine(model, tokenizer)
        ours = _ours(folder, engine, [{**row, "question": text} for row, text in zip(rows, texts, strict=True)])
    else:
        template = "{% set question = messages[-1]['content'] %}" + theirs["doc_to_text"]
        engine = TransformersEngine(model, tokenizer, chat=Chat(template=template))
        ours = _ours(folder, engine, rows)
    for i, row in enumerate(rows):
        prompt = engine.tokens([{"role": "user", "content": row["question"]}])
        if chat:
            prompt = engine.tokens([{"role": "user", "content": _rendered(theirs["doc_to_text"], row["question"])}])
        assert samples["mc1"][i]["arguments"][0][0] == tokenizer.decode(prompt)
    assert list(ours.values["mc1"]) == [sample["acc"] for sample in samples["mc1"]]
    assert list(ours.values["mc2"]) == pytest.approx([float(s["acc"]) for s in samples["mc2"]], rel=1e-4, abs=1e-6)
    assert ours.mean("mc1") == pytest.approx(means["mc1"], abs=1e-4)
    assert ours.mean("mc2") == pytest.approx(means["mc2"], abs=1e-4)
    assert set(ours.values["mc1"]) == {0.0, 1.0}
    assert sum(0.05 < x < 0.95 for x in ours.values["mc2"] if x is not None) >= 5


def _rendered(text: str, question: str) -> str:
    from jinja2 import Template

    return Template(text).render(question=question)


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
