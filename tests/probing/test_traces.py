"""Where a response's tokens lie, checked by counting bytes; and traces as files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import pre_tokenizers, processors

from conftest import make_tokenizer
from steer2edit.errors import FileError, ModelError, TraceError
from steer2edit.probing.chat import Chat, named_template, prompt_tokens, render
from steer2edit.probing.spans import Span, response_span
from steer2edit.probing.traces import Trace, read_traces, write_traces

BYTES = set(pre_tokenizers.ByteLevel.alphabet())
RESPONSES = [
    "I cannot help.",
    " I cannot help.",  # a leading space belongs to the first token
    "\nI cannot help.",
    "\n\n  Sure",
    "Ünïcode ✓",
    "🙂",
    "🙂👩‍🚀 yes",  # an emoji is several byte tokens
    "Yes 🙂",
    "x",
]


def counted(tokenizer: Any, text: str, prompt: str, **options: Any) -> tuple[list[int], int]:
    """The tokens of a text, and by counting bytes the first one that holds a byte after the prompt."""
    ids = tokenizer(text, **options)["input_ids"]
    done = 0
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        done += bytes_of(token)
        if done > len(prompt.encode()):
            return ids, i
    raise AssertionError("no token after the prompt")


def bytes_of(token: str) -> int:
    if re.fullmatch("<0x..>", token) or set(token) <= BYTES:  # a byte fallback, or a character for each byte
        return 1 if token.startswith("<0x") else len(token)
    return len(token.replace("▁", " ").encode())


@pytest.mark.parametrize("response", RESPONSES)
def test_a_response_starts_after_the_templates_last_newline(tokenizer: Any, response: str) -> None:
    trace = Trace("Who are you?", response, "positive", system="Be kind.")
    prompt = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    assert render(tokenizer, trace.messages()) == prompt
    ids, start = counted(tokenizer, prompt + response, prompt)
    assert tokenizer.decode(ids[start:]) == response
    assert tokenizer.convert_ids_to_tokens(ids[start - 1]) == "Ċ"
    assert response_span(tokenizer, trace, positions="response") == (Span(tuple(ids), start, len(ids)), False)


@pytest.mark.parametrize(
    ("prompt", "response", "first", "merges"),
    [
        ("The answer", " to the question is short.", "erĠto", True),
        ("Sure, here is how to bake a loaf of", " bread: mix the flour", "ofĠbre", True),
        ("What is the capital of France?", " The capital of France is Paris.", "capitalĠofĠFrance?Ġ", True),
        ("I can", "not help", "notĠhel", False),
    ],
)
def test_a_token_over_the_boundary_belongs_to_the_response(
    merging_tokenizer: Any, prompt: str, response: str, first: str, merges: bool
) -> None:
    ids, start = counted(merging_tokenizer, prompt + response, prompt)
    assert merging_tokenizer.convert_ids_to_tokens(ids[start]) == first
    assert (ids[:start] != merging_tokenizer(prompt)["input_ids"]) == merges
    trace = Trace(prompt, response, "positive")
    span, cut = response_span(merging_tokenizer, trace, chat=Chat(plain=True), positions="response")
    assert (span, cut) == (Span(tuple(ids), start, len(ids)), False)


@pytest.mark.parametrize("response", ["I cannot help.", " I cannot help.", "Ünïcode 🙂", "🙂 yes", "it is short"])
def test_a_metaspace_tokenizers_response_starts_at_its_first_character(metaspace_tokenizer: Any, response: str) -> None:
    trace = Trace("What is it?", response, "positive")
    prompt = "<s>[INST] What is it? [/INST]"
    assert render(metaspace_tokenizer, trace.messages()) == prompt
    ids, start = counted(metaspace_tokenizer, prompt + response, prompt, add_special_tokens=False)
    assert metaspace_tokenizer.decode(ids[:start]) == prompt
    span, cut = response_span(metaspace_tokenizer, trace, positions="response")
    assert (span, cut) == (Span(tuple(ids), start, len(ids)), False)


def test_predicting_positions_stand_one_before_the_responses_own(tokenizer: Any) -> None:
    trace = Trace("Who are you?", "I am sorry.", "positive")
    own, _ = response_span(tokenizer, trace, positions="response")
    predicting, _ = response_span(tokenizer, trace)
    assert own is not None
    assert predicting == Span(own.ids[:-1], own.first - 1, own.last - 1)
    assert tokenizer.decode(own.ids[own.first :]) == "I am sorry."


@pytest.mark.parametrize("ending", ["<|im_end|>", "<|im_end|><|endoftext|>"])
def test_end_of_turn_tokens_are_no_part_of_a_response(tokenizer: Any, ending: str) -> None:
    bare = response_span(tokenizer, Trace("Hello", "I am sorry.", "positive"))
    assert response_span(tokenizer, Trace("Hello", "I am sorry." + ending, "positive")) == bare
    assert response_span(tokenizer, Trace("Hello", ending, "positive")) == (None, False)


@pytest.mark.parametrize("response", ["", " ", "\n\t "])
def test_a_response_without_a_word_has_no_span(tokenizer: Any, response: str) -> None:
    assert response_span(tokenizer, Trace("Hello", response, "positive")) == (None, False)


def test_max_tokens_cuts_on_the_right_and_says_so(tokenizer: Any) -> None:
    trace = Trace("Hello", "I am sorry, but I will not do this.", "positive")
    whole, cut = response_span(tokenizer, trace, positions="response")
    assert whole is not None
    assert not cut
    for limit, was_cut in ((whole.last, False), (whole.last - 1, True), (whole.first + 1, True)):
        span = Span(whole.ids[:limit], whole.first, limit)
        assert response_span(tokenizer, trace, positions="response", max_tokens=limit) == (span, was_cut)
        predicting = Span(whole.ids[: limit - 1], whole.first - 1, limit - 1)
        assert response_span(tokenizer, trace, max_tokens=limit) == (predicting, was_cut)
    assert response_span(tokenizer, trace, max_tokens=whole.first) == (None, True)


def test_a_response_after_nothing_has_no_predicting_position(tokenizer: Any) -> None:
    trace = Trace("", "I am sorry.", "positive")
    with pytest.raises(TraceError, match="no position predicts"):
        response_span(tokenizer, trace, chat=Chat(plain=True))
    span, _ = response_span(tokenizer, trace, chat=Chat(plain=True), positions="response")
    assert span is not None
    assert (span.first, tokenizer.decode(span.ids)) == (0, "I am sorry.")


def test_bos_stands_once_whether_the_template_or_the_tokenizer_writes_it(metaspace_tokenizer: Any) -> None:
    bos = metaspace_tokenizer.bos_token_id
    trace = Trace("What is it?", "I am sorry.", "positive")
    for plain in (False, True):
        ids = prompt_tokens(metaspace_tokenizer, trace.messages(), Chat(plain))
        span, _ = response_span(metaspace_tokenizer, trace, chat=Chat(plain))
        assert span is not None
        assert ids[0] == span.ids[0] == bos
        assert ids.count(bos) == span.ids.count(bos) == 1


def test_an_eos_that_the_tokenizer_appends_is_no_part_of_a_response(tokenizer: Any) -> None:
    bare = response_span(tokenizer, Trace("Hello", " there", "positive"), chat=Chat(plain=True))
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", end)]
    )
    assert tokenizer("Hello there")["input_ids"][-1] == end
    assert response_span(tokenizer, Trace("Hello", " there", "positive"), chat=Chat(plain=True)) == bare


def test_a_tokenizer_without_a_chat_template_needs_plain(merging_tokenizer: Any) -> None:
    trace = Trace("The answer", " is short.", "positive")
    with pytest.raises(ModelError, match="no chat template"):
        response_span(merging_tokenizer, trace)
    assert render(merging_tokenizer, trace.messages(), chat=Chat(plain=True)) == "The answer"


def test_a_tokenizer_without_offsets_is_refused(tokenizer: Any) -> None:
    class Slow:
        is_fast = False
        chat_template = tokenizer.chat_template

    with pytest.raises(ModelError, match="where its tokens lie"):
        response_span(Slow(), Trace("Hello", "I am sorry.", "positive"))


def test_messages_put_the_system_prompt_first() -> None:
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert Trace("a", "r", "positive").messages() == [{"role": "user", "content": "a"}]
    assert Trace(conversation, "r", "positive", system="").messages() == [
        {"role": "system", "content": ""},
        *conversation,
    ]


def test_traces_come_back_from_a_file_as_they_went(tmp_path: Any) -> None:
    traces = [
        Trace("Who?", "I.", "positive"),
        Trace("Who?", 'Two\nlines, a "quote", a 🙂, a tab\t.', "negative", system="", group="g", source="row 1"),
        Trace([{"role": "user", "content": "a"}], "", "negative", system="Be kind."),
        Trace("Line\u2028separators", "next\x85line, form\x0cfeed, group\x1dseparator\r\n", "positive"),
    ]
    file = tmp_path / "traces.jsonl"
    write_traces(file, traces)
    assert read_traces(file) == traces
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    assert rows[0] == {"prompt": "Who?", "response": "I.", "label": "positive"}
    assert rows[1]["system"] == ""


GOOD = '{"prompt": "a", "response": "b", "label": "positive"}'


@pytest.mark.parametrize(
    ("line", "error", "says"),
    [
        ('{"prompt": "a", "respon', FileError, "line 3 .*not JSON"),
        ('["a", "b"]', FileError, "line 3 .*not an object"),
        ('{"prompt": "a", "label": "positive"}', TraceError, r"3 of .*missing \['response'\]"),
        ('{"prompt": "a", "response": "b", "label": "positive", "x": 1}', TraceError, r"3 of .*unknown \['x'\]"),
        ('{"prompt": "a", "response": "b", "label": "maybe"}', TraceError, "3 of .*unknown label.*'maybe'"),
        ('{"prompt": "a", "response": 7, "label": "positive"}', TraceError, "3 of .*wrong type"),
        ('{"prompt": "a", "response": "b", "label": "positive", "system": 7}', TraceError, "3 of .*wrong type"),
        ('{"prompt": [], "response": "b", "label": "positive"}', TraceError, "3 of .*wrong type"),
        ('{"prompt": [{"role": "user"}], "response": "b", "label": "positive"}', TraceError, "3 of .*wrong type"),
        ('{"prompt": "a", "response": "b", "label": ["positive"]}', TraceError, "3 of .*unknown label"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path: Any, line: str, error: type, says: str) -> None:
    file = tmp_path / "traces.jsonl"
    file.write_text("\n".join([GOOD, GOOD, line]) + "\n", encoding="utf-8")
    with pytest.raises(error, match=says):
        read_traces(file)


@pytest.mark.parametrize("line", ['{"prompt": "a"', '{"prompt": "a"}', GOOD.replace("positive", "maybe")])
def test_blank_lines_are_passed_over_but_counted(tmp_path: Any, line: str) -> None:
    file = tmp_path / "traces.jsonl"
    file.write_text(f"{GOOD}\n  \n\n", encoding="utf-8")
    assert read_traces(file) == [Trace("a", "b", "positive")]
    file.write_text(f"{GOOD}\n  \n\n{line}\n", encoding="utf-8")
    with pytest.raises((FileError, TraceError), match=r"(line|trace) 4 of"):
        read_traces(file)


def test_a_missing_or_binary_file_is_refused(tmp_path: Any) -> None:
    with pytest.raises(FileError, match="no such file"):
        read_traces(tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="cannot be read as text"):
        read_traces(tmp_path / "binary.jsonl")


# Templates for base models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "stop"),
    [
        ("qa", "Be brief.\n\nQuestion: Why?\nAnswer:", "\nQuestion:"),
        ("user-assistant", "Be brief.\n\nUser: Why?\n\nAssistant:", "\nUser:"),
    ],
)
def test_a_named_template_sets_prompt_and_response_apart(name: str, text: str, stop: str) -> None:
    tokenizer, chat = make_tokenizer(), named_template(name)
    trace = Trace("Why?", "Because", "positive", "Be brief.")
    assert render(tokenizer, trace.messages(), chat) == text
    assert chat.stop == (stop,)
    span, _ = response_span(tokenizer, trace, chat=chat, positions="response")
    assert span is not None
    assert tokenizer.decode(span.ids[span.first :]).strip() == "Because"
    assert list(span.ids) == tokenizer(f"{text} Because", add_special_tokens=True)["input_ids"]
    # A response that brings its own space, as a model's answer does, is not given another.
    own, _ = response_span(tokenizer, replace(trace, response=" Because"), chat=chat, positions="response")
    assert own is not None
    assert own == span


def test_a_template_that_is_no_jinja_or_not_known_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="the chat template cannot be used"):
        render(make_tokenizer(), [{"role": "user", "content": "a"}], Chat(template="{% for %}"))
    with pytest.raises(ModelError, match=r"no chat template has that name \(got: q\)\. Known: qa, user-assistant"):
        named_template("q")
