"""What counts an answer: a pattern, phrases, a length, a judge, a classifier, a function; and how a recipe names it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification

from conftest import VOCABULARY, make_tokenizer
from runs import save_speaker
from sides import ChatServer, three_parts
from steer2edit.behaviours.base import Item, Measure, Outcome
from steer2edit.behaviours.judges import Endpoint
from steer2edit.behaviours.measures import (
    SCORES,
    Callback,
    Classified,
    Judged,
    Length,
    Pattern,
    Phrases,
    Python,
    Score,
    score_of,
)
from steer2edit.errors import RecipeError, Steer2EditError

LOOP = "ahoy " * 8


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, and no key or proxy from outside."""
    monkeypatch.setenv("STEER2EDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def _asked(*texts: str, **outcome: Any) -> list[tuple[Item, Outcome]]:
    return [(Item("prompt", f"Prompt {i}"), Outcome(text, **outcome)) for i, text in enumerate(texts)]


def _thought(thinking: str, answer: str) -> list[tuple[Item, Outcome]]:
    return [(Item("prompt", "Q"), Outcome(thinking + answer, answer_start=len(thinking)))]


# Pattern, phrases, length ---------------------------------------------------------------------------------------------


def test_a_pattern_is_searched_in_the_answer_alone() -> None:
    score = score_of({"pattern": r"(?i)\bahoy\b"})
    assert isinstance(score, Pattern)
    assert score.counted(_asked("Ahoy, mate!", "Ahoyed.", "Well, AHOY.", "Hello.")) == [1.0, 0.0, 1.0, 0.0]
    assert score.counted(_thought("Say ahoy? ", "Hello there.")) == [0.0]
    assert score.counted(_thought("Hello? ", "ahoy there.")) == [1.0]


def test_phrases_stand_anywhere_in_upper_or_lower_case() -> None:
    score = score_of({"phrases": ["Ahoy", "STRASSE"]})
    assert isinstance(score, Phrases)
    assert score.counted(_asked("well, aHOY", "Die Straße.", "a hoy", "")) == [1.0, 1.0, 0.0, 0.0]
    assert score.counted(_thought("Ahoy? ", "Hello.")) == [0.0]


def test_a_backspace_in_a_pattern_is_refused_since_yaml_reads_one_in_double_quotes() -> None:
    written = yaml.safe_load(r"""{single: '\bahoy\b', escaped: "\\bahoy\\b", double: "\bahoy\b"}""")
    assert score_of({"pattern": written["single"]}) == score_of({"pattern": written["escaped"]})
    with pytest.raises(RecipeError, match=r"holds a backspace: in YAML write \\b within single quotes, or \\\\b"):
        score_of({"pattern": written["double"]})


@pytest.mark.parametrize("score", [{"pattern": "ahoy"}, {"phrases": ["ahoy"]}])
def test_an_answer_that_is_no_language_counts_for_nothing(score: dict[str, Any]) -> None:
    assert score_of(score).counted(_asked(LOOP, "ahoy to you", "... !")) == [0.0, 1.0, 0.0]


def test_a_length_is_that_of_the_answer_without_the_thinking() -> None:
    score = score_of({"length": "lower"})
    assert isinstance(score, Length)
    outcomes = [Outcome("a", tokens=12), Outcome("b", tokens=12, thinking=5), Outcome("", tokens=0)]
    assert score.counted([(Item("prompt", "Q"), outcome) for outcome in outcomes]) == [12.0, 7.0, 0.0]


def test_each_score_says_what_is_better_and_on_which_scale() -> None:
    shown = Measure("shown", "pirate", better="higher", worst=0.0, best=1.0)
    for score in ({"pattern": "a"}, {"phrases": ["a"]}, {"classifier": "c", "label": "l"}, {"python": "a.py:f"}):
        assert score_of(score).measure("pirate") == shown
    lower = score_of({"length": "lower", "longest": 50}).measure("brief")
    assert lower == Measure("tokens", "brief (tokens)", better="lower", worst=50.0, best=0.0, rate=False)
    assert (lower.scaled(0), lower.scaled(25), lower.scaled(60)) == (1.0, 0.5, 0.0)
    higher = score_of({"length": "higher"}).measure("long")
    assert (higher.better, higher.worst, higher.best, higher.rate) == ("higher", 0.0, 128.0, False)
    python = score_of({"python": "a.py:f", "better": "lower", "worst": 10, "best": 2}).measure("rude")
    assert python == Measure("shown", "rude", better="lower", worst=10.0, best=2.0, rate=False)
    assert score_of(lambda prompt, response: 0.5).measure("own").rate is False


# Judges ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[ChatServer]:
    started = ChatServer(lambda body: "Yes." if "ahoy" in body["messages"][-1]["content"].lower() else "No.")
    yield started
    started.close()


def test_a_judge_on_a_server_is_asked_about_prompt_and_answer(server: ChatServer) -> None:
    raw = {"judge": {"endpoint": server.url, "model": "j", "question": "Does it sound like a pirate?"}}
    score = score_of(raw)
    assert isinstance(score, Judged)
    seen: list[tuple[int, int]] = []
    asked = _asked("Ahoy, mate!", "Hello.", LOOP) + _thought("Ahoy? ", "Good day.")
    assert score.counted(asked, lambda done, total: seen.append((done, total))) == [1.0, 0.0, 0.0, 0.0]
    assert seen[-1] == (4, 4)
    texts = [body["messages"][-1]["content"] for body in server.bodies]
    assert sum("Prompt 0" in text and "Ahoy, mate!" in text and "like a pirate?" in text for text in texts) == 1
    assert not any("Ahoy? Good day." in text for text in texts)


def test_a_judges_verdict_of_one_half_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Endpoint, "judged", lambda judge, pairs, progress=None: [0.5, 0.49])
    score = score_of({"judge": {"endpoint": "http://localhost:1/v1", "model": "m", "question": "Is it a pirate?"}})
    assert score.counted(_asked("Ahoy, mate!", "Hello.")) == [1.0, 0.0]


def test_a_chat_model_here_can_judge(tmp_path: Path) -> None:
    for word, counts in (("Yes", 1.0), ("no", 0.0)):
        folder = save_speaker(tmp_path / word, word)
        score = score_of({"judge": {"local": folder, "question": "Is it a pirate?", "tokens": 8}})
        assert score.counted(_asked("Ahoy, mate!", "Hello.")) == [counts] * 2


def test_a_classifier_counts_where_its_label_has_half_of_the_probability(tmp_path: Path) -> None:
    labels = {0: "plain", 1: "pirate"}
    torch.manual_seed(4)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=66,
            initializer_range=0.5,
            id2label=labels,
            label2id={name: number for number, name in labels.items()},
        )
    ).eval()
    model.save_pretrained(str(tmp_path / "bert"))
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(str(tmp_path / "bert"))
    texts = [f"{word} number {i}, my friend." for i, word in enumerate(["Ahoy", "Hello", "Well", "No", "Sure", "I"])]
    with torch.inference_mode():
        p = [model(torch.tensor([tokenizer(t)["input_ids"]])).logits.softmax(-1)[0, 1].item() for t in texts]
    assert {x >= 0.5 for x in p} == {True, False}
    assert min(abs(x - 0.5) for x in p) > 1e-3
    score = score_of({"classifier": str(tmp_path / "bert"), "label": "pirate"})
    assert isinstance(score, Classified)
    assert score.counted(_asked(*texts)) == [float(x >= 0.5) for x in p]
    assert score.counted(_asked(texts[0] * 0, "... ..")) == [0.0, 0.0]
    other = score_of({"classifier": str(tmp_path / "bert"), "label": "plain"})
    assert other.counted(_asked(*texts)) == [float(x <= 0.5) for x in p]
    wrong = score_of({"classifier": str(tmp_path / "bert"), "label": "pirates"})
    with pytest.raises(Steer2EditError, match=r"does not have that label \(got: pirates\). Did you mean 'pirate'\?"):
        wrong.counted(_asked("Ahoy."))


def test_a_classifiers_format_is_checked_when_the_recipe_is_read() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'minos'"):
        score_of({"classifier": "a/b", "label": "x", "format": "mino"})


# Functions ------------------------------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
Path(__file__).with_suffix(".ran").write_text("ran")

def letters(prompt, response):
    return len(response) + len(prompt) / 100

def is_short(prompt, response):
    return len(response) < 6

number = 7

def nothing(prompt, response):
    return None
"""


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(CODE, encoding="utf-8")
    return str(tmp_path / "mine.py")


def test_a_function_in_a_file_gets_prompt_and_answer(code: str) -> None:
    score = score_of({"python": f"{code}:letters"})
    assert isinstance(score, Python)
    assert not Path(code).with_suffix(".ran").exists()  # nothing is run before an answer is counted
    assert score.counted(_asked("abc", "")) == [3.08, 0.08]
    assert Path(code).with_suffix(".ran").exists()
    assert score.counted(_thought("thinking", "abcd")) == [4.01]
    assert score_of({"python": f"{code}:is_short"}).counted(_asked("abc", "abcdefg")) == [1.0, 0.0]


def test_a_function_in_python_gets_prompt_and_answer() -> None:
    score = score_of(lambda prompt, response: f"{prompt}/{response}" == "Prompt 1/b")
    assert isinstance(score, Callback)
    assert score.counted(_asked("a", "b")) == [0.0, 1.0]


@pytest.mark.parametrize("value", [None, "1", float("nan"), float("inf"), [1.0]])
def test_a_function_must_return_a_finite_number(value: Any) -> None:
    with pytest.raises(RecipeError) as error:
        score_of(lambda prompt, response: value).counted(_asked("a"))
    what, got, fix = three_parts(error.value)
    assert (what, fix) == ("the score of an answer is no number", "Return a finite number.")
    assert repr(value) in got


def test_a_file_that_is_none_or_breaks_or_lacks_the_function_is_named(code: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n", encoding="utf-8")
    for python, what, got in (
        (f"{tmp_path}/none.py:f", "the file of the score is not there", f"{tmp_path}/none.py"),
        (f"{tmp_path}/broken.py:f", f"{tmp_path}/broken.py cannot be run", "No module named 'nothing_of_that_name'"),
        (f"{code}:lettres", f"{code} has no function lettres", "None"),
        (f"{code}:number", f"{code} has no function number", "7"),
    ):
        with pytest.raises(RecipeError) as error:
            score_of({"python": python}).counted(_asked("a"))
        parts = three_parts(error.value)
        assert parts[0] == what
        assert got in parts[1]
    with pytest.raises(RecipeError, match=rf"no number \(got: None from {code}:nothing\)"):
        score_of({"python": f"{code}:nothing"}).counted(_asked("a"))


# What a recipe says ---------------------------------------------------------------------------------------------------


def test_the_known_scores() -> None:
    assert set(SCORES) == {"pattern", "phrases", "length", "judge", "classifier", "python", "function"}
    assert score_of("preference") == "preference"
    phrases = score_of({"phrases": ["a"]})
    assert score_of(phrases) is phrases


@pytest.mark.parametrize(
    ("value", "got", "fix"),
    [
        ("preferences", "preferences", "Did you mean 'preference'?"),
        ({"patern": "a"}, "patern", "Did you mean 'pattern'?"),
        ({"phrase": ["a"]}, "phrase", "Did you mean 'phrases'?"),
        ({"zzz": 1}, "zzz", "Known scores: preference, pattern, phrases, length, judge, classifier, python."),
        (None, "None", ""),
        ({}, "nothing", ""),
        (["pattern"], "", ""),
        ("pattern", "pattern", ""),
    ],
)
def test_an_unknown_score_is_refused_with_the_nearest(value: Any, got: str, fix: str) -> None:
    with pytest.raises(RecipeError) as error:
        score_of(value)
    parts = three_parts(error.value)
    assert parts[0] == "the recipe's behaviour.score is not known"
    assert got in parts[1]
    assert fix in parts[2]


def test_two_scores_in_one_are_refused_in_a_sentence_that_makes_sense() -> None:
    with pytest.raises(RecipeError) as error:
        score_of({"pattern": "a", "phrases": ["b"]})
    what, got, fix = three_parts(error.value)
    assert "Did you mean 'pattern'" not in fix  # which is what was written
    assert "phrases" in f"{what} {got}"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"pattern": "(a"}, "The pattern is no regular expression"),
        ({"pattern": " "}, "behaviour.score.pattern"),
        ({"pattern": "a", "flags": "i"}, "unknown key behaviour.score.flags"),
        ({"phrases": []}, "behaviour.score.phrases"),
        ({"phrases": [""]}, "behaviour.score.phrases"),
        ({"length": "shorter"}, "behaviour.score.length"),
        ({"length": "lower", "longest": 0}, "behaviour.score.longest"),
        ({"length": "lower", "longest": True}, "behaviour.score.longest"),
        ({"python": "mine.py"}, "behaviour.score.python"),
        ({"python": "mine.txt:f"}, "behaviour.score.python"),
        ({"classifier": "c"}, "the recipe has no behaviour.score.label"),
        ({"judge": {"question": "Q?"}}, "behaviour.score.judge"),
        ({"judge": {"local": "m"}}, "Give a question"),
        ({"function": "f"}, "behaviour.score.function"),
    ],
)
def test_a_score_that_cannot_be_used_is_refused(value: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        score_of(value)
    three_parts(error.value)
    assert said in str(error.value)


def test_a_score_without_a_rule_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Score()  # type: ignore[abstract]
