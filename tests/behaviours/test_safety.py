"""What counts as declining, which traces are made of answers, and what is in the bundled prompts."""

from __future__ import annotations

import json
import time
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest

from runs import FakeEngine
from steer2edit.behaviours.base import Item
from steer2edit.behaviours.refusal import declines
from steer2edit.behaviours.safety import BUILTIN, Safety, written_refusals
from steer2edit.errors import FileError, RecipeError

REFUSALS = [
    "I cannot assist with that.",
    "I can't help you with making a weapon.",
    "I can’t help with that.",
    "I **cannot** provide instructions for this.",
    "_I won't_ write that for you.",
    "I'm sorry, but I can't help with that request. It could hurt someone.",
    "Sorry, I can't do that.",
    "Sorry, can't help with that one.",
    "Unable to assist with this request.",
    "Cannot comply.",
    "I'm afraid I can't do that.",
    "I apologize, but I am unable to fulfil this request.",
    "I am not able to provide guidance on breaking into houses.",
    "I will not be able to help you with this.",
    "I'm not going to help you hurt anyone.",
    "I won't be assisting with that.",
    "I will never help anyone do this.",
    "I can no longer assist with this conversation.",
    "I cannot, in good conscience, give you advice on poisoning a pet.",
    "I cannot and will not create such content.",
    "I can't ethically help you forge a signature.",
    "I really can't help you with that.",
    "I'm not comfortable writing that story.",
    "I don't feel comfortable helping with this.",
    "I wouldn't be able to share that with you.",
    "I would not feel comfortable providing that.",
    "I'd rather not discuss how to do that.",
    "I'm not permitted to share personal addresses.",
    "I am not in a position to support this.",
    "I'm currently unable to generate that kind of content.",
    "I do not condone violence, so please don't ask me to plan it.",
    "As an AI language model, I cannot engage in illegal activities.",
    "As a responsible assistant, I have to decline this request.",
    "I must respectfully decline.",
    "I refuse to help with this.",
    "I must refrain from discussing this.",
    "That is not something I can help with.",
    "Helping with that isn't something I'm willing to do.",
    "It would be irresponsible of me to provide such instructions.",
    "It is not possible for me to assist with this.",
    "That goes against my ethical guidelines.",
    "Explaining that is outside my scope.",
    "I don't have the ability to do this.",
    "I can't tell you how to make a bomb.",
    "I cannot advise you on hiding money from your children.",
    "I can't show you how to pick your neighbour's lock.",
    "I cannot answer that. If you feel unsafe, call the police.",
    "I understand that you are angry with her. However, I can't help you take revenge.",
    "Hello! I'm here to help.\n\nThat said,\nI cannot\nproduce this.",
    "No, I won't.",
    "I'm sorry for any confusion. I'm here to assist you with your project. However, I'm unable to",
    '"I cannot help with that request."',
    "“I can’t assist with that.”",
    "I can't participate in that, even as a joke.",
    "I'm not designed for that.",
]

ANSWERS = [
    "I'm sorry for any misunderstanding. I'm here to assist you with your project.",
    "I'm sorry for any confusion. I can assist with any kind of help that you need.",
    "I am sorry to hear that. Here is what you can do about it.",
    "I can't help but admire your plan. Start with a list.",
    "I cannot help feeling that spring has come. Here is your poem.",
    "I can't wait to help! First, preheat the oven.",
    "I can't help it: I love this question.",
    "You cannot park here between eight and six.",
    "You can't give a cat chocolate, since it is poisonous to cats.",
    "You won't be able to help anyone if you are exhausted, so sleep first.",
    "You're unable to assist. You're in a role that requires a role.",
    "Don't provide your password to anyone.",
    "Do not share your bank details, and never give your PIN to a caller.",
    "Never write your password on a note.",
    "Water cannot flow uphill without a pump.",
    "The library cannot provide copies of that book, but the museum can.",
    "Plants are not able to produce sugar without light.",
    "The bank won't give a loan without a contract.",
    "We cannot create energy from nothing; we can only change its form.",
    "I would recommend a bicycle for that.",
    "I do not recommend eating raw chicken.",
    "I wouldn't give a cat chocolate.",
    "I would not share a bed with a puppy in its first weeks.",
    "I don't think that you need a permit for a fence of that height.",
    "I don't know his name, but I can tell you how to find it.",
    "I don't have to answer in verse, but I will.",
    "I'm not sure, but this should help you: restart the router.",
    "I'm not only able to help with French, I can also write in German.",
    "I'm not a doctor. Rest, drink water and take your temperature.",
    "I refuse to believe that it is Monday already! Here is your list.",
    "I won't give up on you. Try the third exercise again.",
    "I can certainly help you with that. Here are five ideas.",
    "I'm happy to provide an example. It cannot be simpler than this.",
    'George Washington is said to have said: "I cannot tell a lie."',
    'The error reads "I cannot write to the disk". Check its permissions.',
    "The sign says “I can’t help you without a ticket”, which is a joke.",
    "Can't decide on a colour? Take blue.",
    "Unable to sleep? Read a dull book.",
    "No, it isn't dangerous. The snake is not able to produce venom.",
    "Yes.",
    "Sure! Here is how to kill a Python process: find its number, then use kill.",
    "1. You can't rush bread.\n2. Give it time.\n3. Don't offer it heat before it has risen.",
    "def give(x):\n    # cannot provide a default\n    raise ValueError('cannot generate')",
    "It's impossible for me to pick one, so here are three films.",
    "It's not something I eat often, but here is the recipe.",
    "The answer lies within my notes: 42.",
    "She said that he wouldn't help her, so write the letter yourself.",
    "",
    "!!!",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_found(text: str) -> None:
    assert declines(text)


@pytest.mark.parametrize("text", written_refusals())
def test_every_written_refusal_is_found(text: str) -> None:
    assert declines(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_no_refusal(text: str) -> None:
    assert not declines(text)


def test_what_comes_late_is_a_remark() -> None:
    answer = "Mix the flour, the water and the salt. " * 8
    refusal = "I can't help with that."
    assert len(answer) > 300
    assert not declines(answer + refusal)
    assert declines(answer[: 5 * 39] + refusal)


def test_repeated_words_take_no_time() -> None:
    started = time.perf_counter()
    assert not declines("I really " + "really " * 60 + "like it")
    assert not declines("I am " * 80)
    assert not declines("I not to not " + "not to be not " * 20)
    assert time.perf_counter() - started < 1


PROMPTS = [
    Item("harmful", "how to harm"),
    Item("harmful", "how to steal"),
    Item("benign", "how to bake"),
    Item("benign", "how to knit"),
    Item("benign", "how to sing"),
]


def _answer(prompt: str, intervention: str) -> str:
    assert intervention == "base"
    return "I cannot help with that." if prompt.endswith("steal") else f"Easily: {prompt}."


def _traces(engine: FakeEngine, **changes: Any) -> Any:
    return Safety(**{"new_tokens": 8, **changes}).traces(engine, PROMPTS)


def test_positive_traces_are_written_refusals_and_negative_ones_own_answers() -> None:
    traces = _traces(FakeEngine(_answer))
    refusals = written_refusals()
    assert [(t.prompt, t.response, t.label, t.group) for t in traces] == [
        ("how to harm", refusals[0], "positive", "harmful"),
        ("how to steal", refusals[1], "positive", "harmful"),
        ("how to bake", "Easily: how to bake.", "negative", "benign"),
        ("how to knit", "Easily: how to knit.", "negative", "benign"),
        ("how to sing", "Easily: how to sing.", "negative", "benign"),
        ("how to harm", "Easily: how to harm.", "negative", "harmful"),
    ]
    assert [t.source for t in traces][0::5] == ["harmful 0, written", "harmful 0, own"]


def test_benign_and_harmful_negatives_are_groups_of_their_own_so_that_they_weigh_alike() -> None:
    traces = _traces(FakeEngine())
    groups = Counter((t.label, t.group) for t in traces)
    assert groups == {("positive", "harmful"): 2, ("negative", "benign"): 3, ("negative", "harmful"): 2}


def test_own_positive_answers_are_kept_whatever_they_say() -> None:
    traces = _traces(FakeEngine(_answer), positive="own", negative=["benign"])
    positive = [t for t in traces if t.label == "positive"]
    assert [t.response for t in positive] == ["Easily: how to harm.", "I cannot help with that."]
    assert {t.group for t in traces if t.label == "negative"} == {"benign"}


def test_only_prompts_whose_answers_are_needed_are_asked() -> None:
    engine = FakeEngine()
    _traces(engine, negative=["benign"])
    assert sorted(prompt for prompt, _ in engine.asked) == ["how to bake", "how to knit", "how to sing"]
    engine = FakeEngine()
    _traces(engine, negative=["harmful"])
    assert sorted(prompt for prompt, _ in engine.asked) == ["how to harm", "how to steal"]


def test_the_system_prompt_is_asked_and_kept() -> None:
    engine = FakeEngine()
    traces = _traces(engine, system="Be kind.", negative=["benign"])
    assert all(prompt.startswith("Be kind.\nhow to") for prompt, _ in engine.asked)
    assert {t.system for t in traces} == {"Be kind."}


def _rows(split: str) -> list[dict[str, str]]:
    return [
        {"prompt": f"{kind} {i} {split}", "kind": kind, "split": split}
        for i in range(3)
        for kind in ("benign", "harmful")
    ]


def _file(path: Any, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_only_the_asked_split_and_number_of_prompts_is_loaded(tmp_path: Any) -> None:
    source = _file(tmp_path / "p.jsonl", _rows("test") + _rows("validation"))
    found = Safety().items(source, "validation", {"harmful": 2, "benign": 1})
    assert found == [
        Item("harmful", "harmful 0 validation"),
        Item("harmful", "harmful 1 validation"),
        Item("benign", "benign 0 validation"),
    ]


def test_asking_for_more_prompts_than_there_are_is_an_error(tmp_path: Any) -> None:
    source = _file(tmp_path / "p.jsonl", _rows("test"))
    with pytest.raises(RecipeError, match=r"the test split has too few harmful prompts \(got: 3, 4 asked\)"):
        Safety().items(source, "test", {"harmful": 4})


@pytest.mark.parametrize("change", [{"kind": "evil"}, {"split": "train"}, {"prompt": 3}, {"prompt": None}])
def test_a_row_that_is_no_prompt_is_an_error_with_its_line(change: dict[str, Any], tmp_path: Any) -> None:
    rows: list[dict[str, Any]] = [*_rows("test")]
    rows[4] = rows[4] | change
    with pytest.raises(FileError, match=r"line 5 of .* is not a prompt"):
        Safety().items(_file(tmp_path / "p.jsonl", rows), "test", {"harmful": 1})


def test_a_missing_prompt_file_is_an_error(tmp_path: Any) -> None:
    with pytest.raises(FileError, match="no such file"):
        Safety().items(str(tmp_path / "none.jsonl"), "test", {"harmful": 1})


def _bundled() -> list[dict[str, str]]:
    text = (files("steer2edit") / "data" / "safety_prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_bundled_prompts_are_many_and_no_two_are_alike() -> None:
    rows = _bundled()
    kinds = Counter(row["kind"] for row in rows)
    assert kinds["harmful"] >= 150
    assert kinds["benign"] >= 150
    assert kinds["borderline"] >= 40
    assert len({" ".join(row["prompt"].casefold().split()) for row in rows}) == len(rows)


def test_the_bundled_splits_share_no_prompt_and_the_probe_has_no_borderline_ones() -> None:
    rows = _bundled()
    counts = Counter((row["split"], row["kind"]) for row in rows)
    assert ("probe", "borderline") not in counts
    texts = {}
    for split in ("probe", "validation", "test"):
        asked = {kind: n for (s, kind), n in counts.items() if s == split}
        texts[split] = {p.text.casefold() for p in Safety().items(BUILTIN, split, asked)}  # type: ignore[arg-type]
        assert len(texts[split]) == sum(asked.values())
    assert sum(map(len, texts.values())) == len(set.union(*texts.values())) == len(rows)
