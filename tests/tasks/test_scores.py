"""Every task's numbers by hand, the reading of every layout, and the tokens that log-probabilities are of."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval import utils as theirs

from steer2edit.errors import FileError
from steer2edit.tasks.base import Question, Reply, Task
from steer2edit.tasks.bench import Replies
from steer2edit.tasks.encoding import encode, fitting, pair, windows
from steer2edit.tasks.known import TASKS
from steer2edit.tasks.language import pages
from steer2edit.tasks.sets import load_set, taken, unavailable
from steer2edit.tasks.summary import difference, summarised, values_of
from steer2edit.tasks.worded import chosen_letter, same_value
from task_sets import hub_rows, local_rows, write

HUB_ONLY = ("gpqa",)


def of_one(task: str, question: Question, *replies: Reply) -> dict[str, Any]:
    (values,) = values_of(TASKS[task], Replies([question], 0, [[list(replies)]]))
    return {name: value[0] for name, value in values.items()}


def summary_of(task: Task, values: dict[str, Any]) -> dict[str, float]:
    return {m.name: summarised(m, values[m.name], 50, 0, 1)["mean"] for m in task.metrics}


# Numbers -------------------------------------------------------------------------------------------------------------


def test_choices_are_compared_whole_and_per_character() -> None:
    question = Question("Q", (" ab", " abcdefgh", " x"), 1)
    # Whole: −3 is the highest. Per character: −1.5, −0.5, −3.
    assert of_one("arc_easy", question, Reply(log_p=(-3.0, -4.0, -3.5))) == {"arc_easy": 0.0, "arc_easy_norm": 1.0}
    assert of_one("arc_challenge", question, Reply(log_p=(-2.0, -4.0, -0.4))) == {
        "arc_challenge": 0.0,
        "arc_challenge_norm": 0.0,  # per character −1, −0.5, −0.4: the third as well
    }
    assert of_one("piqa", question, Reply(log_p=(-3.0, -2.0, -1.0))) == {"piqa": 0.0, "piqa_norm": 1.0}
    assert of_one("hellaswag", question, Reply(log_p=(-9.0, -2.0, -5.0))) == {"hellaswag": 1.0, "hellaswag_norm": 1.0}
    not_finite = Reply(log_p=(float("nan"), -2.0, -5.0))
    assert of_one("openbookqa", question, not_finite) == {"openbookqa": 0.0, "openbookqa_norm": 0.0}


def test_the_last_word_is_right_if_the_model_would_write_it() -> None:
    task, questions = TASKS["lambada"], [Question("c", (" w",))] * 3
    replies = [[Reply(log_p=(p,), greedy=(g,))] for p, g in ((-1.0, True), (-2.0, False), (-6.0, False))]
    (values,) = values_of(task, Replies(questions, 0, [replies]))
    assert summary_of(task, values) == {
        "lambada": pytest.approx(1 / 3),
        "lambada_perplexity": pytest.approx(math.exp(3.0)),
    }


def test_perplexity_is_over_all_words_and_not_over_articles() -> None:
    task = TASKS["wikitext"]
    questions = [Question("a", target=(10, 40)), Question("b", target=(30, 160))]
    replies = [[Reply(log_p=(-20.0,))], [Reply(log_p=(-180.0,))]]
    (values,) = values_of(task, Replies(questions, 0, [replies]))
    assert summary_of(task, values) == {
        "wikitext": pytest.approx(math.exp(200 / 40)),
        "wikitext_bits_per_byte": pytest.approx(1 / math.log(2)),
    }


def test_several_answers_to_a_question_count_by_their_mean() -> None:
    question = Question("1 + 1?", target="2")
    said = [Reply(text) for text in ("It is 2.", r"\boxed{3}", "", "2.001")]
    assert of_one("gsm8k", question, *said) == {"gsm8k": 0.5}
    question = Question("Which?", target=["C", "ABCD"])
    assert of_one("codemmlu", question, Reply(r"\boxed{C}"), Reply("B")) == {"codemmlu": 0.5}


@pytest.mark.parametrize(
    ("name", "target", "right", "wrong"),
    [
        ("math500", r"\frac{1}{2}", r"So it is \boxed{\frac{2}{4}}.", r"\boxed{\frac{1}{3}}"),
        ("gsm8k", "1,250", "In all 1250 apples.", "125"),
        ("commonsenseqa", ["B", "ABCDE"], r"\boxed{B}", r"\boxed{A}"),
        ("gpqa", ["D", "ABCD"], "It must be D.", "A or D: A"),
        ("codemmlu", ["A", "ABCD"], r"First B, then \boxed{A}", "B"),
        ("codemmlu_knowledge", ["A", "ABCD"], r"First B, then \boxed{A}", "B"),
    ],
)
def test_each_task_of_answers_in_words_by_hand(name: str, target: object, right: str, wrong: str) -> None:
    question = Question("Q", target=target)
    assert of_one(name, question, Reply(right)) == {name: 1.0}
    assert of_one(name, question, Reply(wrong), Reply(right), Reply("")) == {name: pytest.approx(1 / 3)}


def test_every_task_is_counted_by_hand_in_this_file() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in TASKS if f'"{name}"' not in text] == []


def test_what_is_not_finite_gives_no_mean() -> None:
    task = TASKS["lambada"]
    replies = [[Reply(log_p=(float("nan"),), greedy=(False,))], [Reply(log_p=(-1.0,), greedy=(True,))]]
    (values,) = values_of(task, Replies([Question("c", (" w",))] * 2, 0, [replies]))
    of_perplexity = summarised(task.metrics[1], values["lambada_perplexity"], 50, 0, 1)
    assert (of_perplexity["mean"], of_perplexity["not_finite"]) == (None, 1)


def test_a_difference_is_paired_and_of_what_the_metric_makes_of_the_values() -> None:
    metric = TASKS["wikitext"].metrics[0]
    base: Any = [(10.0, 5.0), (20.0, 10.0), (40.0, 20.0)]
    worse: Any = [(nll * 1.5, words) for nll, words in base]
    same = difference(metric, base, base, 50, 0)
    assert (same["mean"], same["low"], same["high"], same["n"]) == (0.0, 0.0, 0.0, 3)
    between = difference(metric, worse, base, 50, 0)
    # Every article has 2 nats a word, and 3: whatever is drawn, the difference is the same.
    assert between["mean"] == pytest.approx(math.exp(3) - math.exp(2))
    assert between["low"] == pytest.approx(between["high"]) == pytest.approx(between["mean"])
    assert difference(metric, [], base, 50, 0)["mean"] is None


# Answers in words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (r"So \boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"\boxed{q-p}", "p - q", False),
        (r"\boxed{-q+p}", "p - q", True),
        (r"\boxed{70,000}", "70000", True),
        ("It costs $70,000.", "70000", True),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", True),
        ("3.141", "3.14", True),
        ("3.15", "3.14", False),
        ("I do not know.", "3", False),
        (r"\boxed{", "3", False),
        (r"\boxed{9^{9^{9^9}}}", "3", False),
    ],
)
def test_mathematics_is_compared_by_its_value(text: str, answer: str, right: bool) -> None:
    assert same_value(text, answer) is right


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{B}", "B"),
        (r"First \boxed{A}, in the end \boxed{C}.", "C"),
        (r"\boxed{\text{D}}", "D"),
        (r"\boxed{\mathbf{D) the oven}}", "D"),
        (r"The answer is \boxed{bread}.", None),
        ("(C) is right, not D", "C"),
        ("Dough, Cake", None),
        ("E", None),
        ("", None),
    ],
)
def test_the_letter_is_the_last_boxed_or_the_first_lone_one(text: str, letter: str | None) -> None:
    assert chosen_letter(text, "ABCD") == letter


# Layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TASKS if name not in HUB_ONLY])
def test_a_local_folder_is_read(name: str, tmp_path: Path) -> None:
    write(tmp_path / TASKS[name].files[0], local_rows(name, 5))
    whole = load_set(TASKS[name], tmp_path, None, "first", 0)
    assert (whole.total, whole.taken, whole.source) == (5, "all 5", TASKS[name].files[0])
    assert len(whole.revision or "") == 64
    some = load_set(TASKS[name], tmp_path, 2, "first", 0)
    assert (some.questions, some.taken) == (whole.questions[:2], "the first 2 of 5")
    drawn = load_set(TASKS[name], tmp_path, 3, "sampled", 1)
    assert drawn.taken == "3 of 5, sampled"
    assert drawn == load_set(TASKS[name], tmp_path, 3, "sampled", 1)
    assert all(question in whole.questions for question in drawn.questions)


@pytest.mark.parametrize("name", ["arc_easy", "openbookqa", "piqa", "hellaswag", "lambada", "wikitext"])
def test_rows_as_the_hub_has_them_are_read(name: str) -> None:
    questions = [TASKS[name].questions(row, "0") for row in hub_rows(name)]
    assert None not in questions


def test_both_layouts_give_the_same_question() -> None:
    row = hub_rows("arc_easy")[1]
    local = {"question": row["question"], "choices": row["choices"]["text"], "answer": 1}
    assert TASKS["arc_easy"].questions(local, "0") == TASKS["arc_easy"].questions(row, "0")
    word = {"context": "He said and", "target": "bread"}
    assert TASKS["lambada"].questions(word, "0") == TASKS["lambada"].questions({"text": "He said and bread"}, "0")


def test_prompts_are_the_papers() -> None:
    plain = TASKS["gsm8k"].questions({"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}, "0")
    assert plain == Question("1 + 1?", target="2")
    row = {"question": "Who?", "choices": {"label": ["A", "B"], "text": ["I", "you"]}, "answerKey": "B"}
    assert TASKS["commonsenseqa"].questions(row, "0") == Question(
        "Who?\nA. I\nB. you\nWrite your final answer as \\boxed{A} or \\boxed{B}.", target=["B", "AB"]
    )
    code = {"task_id": "c1", "question": "x =", "choices": ["1", "2"], "answer": "A"}
    question = TASKS["codemmlu"].questions(code, "0")
    assert question is not None
    assert str(question.prompt).startswith("Complete this code:\n\nx =\n\nOption A:\n\n1\n\nOption B:\n\n2")


def test_choices_of_gpqa_are_shuffled_by_the_seed_and_the_right_one_is_kept() -> None:
    row = {"Question": "Q?", "Correct Answer": "right", **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}}
    seen = set()
    for seed in map(str, range(12)):
        question = TASKS["gpqa"].questions(row, seed)
        assert question is not None
        assert question == TASKS["gpqa"].questions(row, seed)
        assert f"{question.target[0]}. right" in str(question.prompt)
        seen.add(question.target[0])
    assert len(seen) > 1


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize("row", [{}, {"question": 3}, {"choices": "x", "answer": 1}, {"question": "Q", "choices": []}])
def test_rows_of_no_layout_are_no_question(name: str, row: dict[str, Any]) -> None:
    assert TASKS[name].questions(row, "0") is None


def test_a_wrong_row_is_named(tmp_path: Path) -> None:
    rows = [*local_rows("arc_easy", 2), {"question": "Q", "choices": ["a", "b"], "answer": 2}]
    write(tmp_path / "arc_easy.jsonl", rows)
    with pytest.raises(FileError, match=r"row 3 of arc_easy.jsonl is no question of arc_easy"):
        load_set(TASKS["arc_easy"], tmp_path, None, "first", 0)
    write(tmp_path / "arc_easy.jsonl", [])
    with pytest.raises(FileError, match=r"arc_easy.jsonl is empty"):
        load_set(TASKS["arc_easy"], tmp_path, None, "first", 0)


def test_lines_of_articles_become_the_pages_of_the_original() -> None:
    rows: list[Any] = [
        {"article": 0, "heading": True, "text": "= Bread ="},
        {"article": 0, "heading": False, "text": "It rises ."},
        {"article": 1, "heading": True, "text": "= Salt ="},
    ]
    assert pages(rows) == [
        {"page": " \n = Bread = \n \n It rises . \n"},
        {"page": " \n = Salt = \n \n"},
    ]
    assert pages([{"page": "x"}]) == [{"page": "x"}]


def test_a_set_from_the_hub_is_recorded_with_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    asked: list[Any] = []

    def load(*arguments: Any, **named: Any) -> Any:
        asked.append((arguments, named))
        return hub_rows("arc_easy", 3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    info = type("Info", (), {"sha": "abc"})
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    whole = load_set(TASKS["arc_easy"], None, 2, "first", 0)
    assert (whole.source, whole.revision) == ("allenai/ai2_arc/ARC-Easy/test", "abc")
    assert whole.taken == "the first 2 of 3"
    assert asked == [(("allenai/ai2_arc", "ARC-Easy"), {"split": "test", "revision": "abc"})]


class GatedRepoError(Exception):
    """As the Hub's client names it."""


def test_a_gated_or_missing_set_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def raising(error: Exception) -> str:
        def load(*_: Any, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(FileError) as raised:
            load_set(TASKS["gpqa"], "/nowhere", None, "first", 0)  # it has no local file, whatever the folder
        assert "\n" not in str(raised.value)
        return str(raised.value)

    gated = raising(datasets.exceptions.DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub.\nLog in."))
    assert gated.startswith("the set of gpqa is gated (got: Idavidrein/gpqa/gpqa_diamond/train, no access).")
    offline = raising(ConnectionError("Couldn't reach the Hub"))
    assert offline.startswith("the set of gpqa cannot be loaded (got: Idavidrein/gpqa/gpqa_diamond/train, Connection")
    hidden = ValueError("no file")
    hidden.__cause__ = GatedRepoError("403")
    assert "is gated" in str(unavailable("x", "y", hidden))


# Tokens --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 12))
def test_windows_are_lm_evals(length: int, longest: int) -> None:
    ids = list(range(1, length + 1))
    wanted = [theirs.make_disjoint_window(w) for w in theirs.get_rolling_token_windows(ids, 0, longest, 1)]
    assert windows(ids, 0, longest) == [(tuple(a), tuple(b)) for a, b in wanted]
    assert [token for _, predicted in windows(ids, 0, longest) for token in predicted] == ids


def test_a_pair_is_divided_in_the_tokens_of_the_whole(tokenizer: Any, metaspace_tokenizer: Any) -> None:
    for some in (tokenizer, metaspace_tokenizer):
        context, continuation = pair(some, "The capital of", " France")
        assert (*context, *continuation) == tuple(some.encode("The capital of France"))
        assert pair(some, "The capital of ", "France") == (context, continuation)
    assert metaspace_tokenizer.encode("x")[0] == metaspace_tokenizer.bos_token_id
    assert encode(metaspace_tokenizer, "<s>x").count(metaspace_tokenizer.bos_token_id) == 1
    first, rest = pair(metaspace_tokenizer, "", "bread")
    assert first == (metaspace_tokenizer.bos_token_id,)
    assert metaspace_tokenizer.decode(rest) == "bread"


def test_what_is_too_long_is_cut_on_the_left() -> None:
    assert fitting((1, 2, 3, 4), (5, 6, 7), 4) == ((3, 4), (5, 6, 7))
    assert fitting((1, 2), (5,), 9) == ((1, 2), (5,))


def test_samples_are_drawn_by_the_seed() -> None:
    assert taken(100, 5, "sampled", "a") == taken(100, 5, "sampled", "a") != taken(100, 5, "sampled", "b")
    assert taken(100, 5, "sampled", "a") == sorted(set(taken(100, 5, "sampled", "a")))
    assert np.array_equal(taken(3, 5, "sampled", "a"), [0, 1, 2])
