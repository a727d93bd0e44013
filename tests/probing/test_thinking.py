"""Where a thinking model's answer starts, which tokens a part has, and what engines make of both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import steer2edit as s2e
from conftest import CHATML, SENTENCES
from runs import FakeEngine, a_bench, make_scores, tiny_recipe
from steer2edit.behaviours.base import Item
from steer2edit.behaviours.refusal import declines
from steer2edit.behaviours.safety import Safety
from steer2edit.engines.answers import answer_of
from steer2edit.engines.base import Answer, Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import TraceError
from steer2edit.method.intervention import NOTHING, Intervention
from steer2edit.probing.chat import THOUGHT as THOUGHT_ENDS
from steer2edit.probing.chat import Chat, answer_start, begins_thinking, prompt_tokens, render
from steer2edit.probing.spans import Span, response_span
from steer2edit.probing.traces import Trace, read_traces, write_traces
from steer2edit.searching.candidates import BASE
from steer2edit.searching.own_answers import Journalled
from thinking import ASSISTANT, SWITCHED, USER

# As DeepSeek-R1's: the prompt begins the thinking.
OPENED = CHATML + "{{ '<think>\n' }}"


# Where an answer starts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "thinking", "answer"),
    [
        ("I am sorry.", False, "I am sorry."),
        ("", False, ""),
        ("<think>Hm.</think>I am sorry.", False, "I am sorry."),
        ("<think>\nHm.\n</think>\n\nI am sorry.", False, "I am sorry."),
        ("<think>Hm.</think> \t\n I am sorry. \n", False, "I am sorry. \n"),
        ("\n<think>Hm.</think>I am sorry.", False, "I am sorry."),
        ("Hm.</think>I am sorry.", True, "I am sorry."),
        ("Hm.</think>I am sorry.", False, "I am sorry."),  # opened by a prompt that nobody told of
        ("<think>Hm, let me", False, ""),
        (" \n<think>Hm, let me", False, ""),
        ("Hm, let me", True, ""),
        ("", True, ""),
        ("<think>Hm.</think>", False, ""),
        ("<think>Hm.</think>\n\n", False, ""),
        ("<think></think>Yes", False, "Yes"),
        ("<think>a</think>b</think>c", False, "b</think>c"),
        ("Write <think> in angle brackets.", False, "Write <think> in angle brackets."),
    ],
)
def test_an_answer_starts_after_the_thinking_and_the_space_behind_it(
    response: str, thinking: bool, answer: str
) -> None:
    start = answer_start(response, thinking)
    assert response[start:] == answer
    assert 0 <= start <= len(response)


def test_a_prompt_that_ends_in_the_opening_tag_begins_the_thinking(tokenizer: Any) -> None:
    for template, begins in ((CHATML, False), (SWITCHED, False), (OPENED, True)):
        tokenizer.chat_template = template
        assert begins_thinking(render(tokenizer, USER)) == begins
    assert not begins_thinking(ASSISTANT + "<think>\n\n</think>\n\n")


# Which tokens a part has --------------------------------------------------------------------------------------------

THOUGHT, SAID = "<think>Hmm, let me see.</think>\n\n", "I am sorry."
THINKS = Trace("Hello", THOUGHT + SAID, "positive", answer_start=len(THOUGHT))


def counted(tokenizer: Any, text: str, before: str) -> int:
    """How many tokens stand before a place in a text, by decoding ever more of them."""
    ids = tokenizer(text)["input_ids"]
    counts = [i for i in range(len(ids) + 1) if tokenizer.decode(ids[:i]) == before]
    assert len(counts) == 1, "a token lies over the boundary"
    return counts[0]


@pytest.fixture
def bounds(tokenizer: Any) -> tuple[list[int], int, int, int]:
    """The ids of prompt and response, and where thinking, answer and end are in them."""
    whole = ASSISTANT + THOUGHT + SAID
    ids = tokenizer(whole)["input_ids"]
    return ids, *(counted(tokenizer, whole, text) for text in (ASSISTANT, ASSISTANT + THOUGHT, whole))


@pytest.mark.parametrize("part", ["thinking", "answer", "both"])
@pytest.mark.parametrize(("positions", "shift"), [("response", 0), ("predicting", 1)])
def test_the_span_of_a_part_is_its_own_tokens(
    part: Any, positions: Any, shift: int, bounds: Any, tokenizer: Any
) -> None:
    ids, thinking, answer, end = bounds
    first, last = {"thinking": (thinking, answer), "answer": (answer, end), "both": (thinking, end)}[part]
    span, cut = response_span(tokenizer, THINKS, part=part, positions=positions)
    assert (span, cut) == (Span(tuple(ids[: last - shift]), first - shift, last - shift), False)
    text = {"thinking": THOUGHT, "answer": SAID, "both": THOUGHT + SAID}[part]
    assert tokenizer.decode(ids[first:last]) == text


@pytest.mark.parametrize(("positions", "shift"), [("response", 0), ("predicting", 1)])
def test_thinking_and_answer_share_no_position_and_are_both(positions: Any, shift: int, tokenizer: Any) -> None:
    def places(part: Any) -> list[int]:
        span, _ = response_span(tokenizer, THINKS, part=part, positions=positions)
        assert span is not None
        return list(range(span.first, span.last))

    assert places("thinking") + places("answer") == places("both")


def test_max_tokens_cuts_the_answer_before_the_thinking(bounds: Any, tokenizer: Any) -> None:
    ids, thinking, answer, end = bounds

    def span(part: Any, limit: int) -> Any:
        return response_span(tokenizer, THINKS, part=part, positions="response", max_tokens=limit)

    assert span("answer", end - 1) == (Span(tuple(ids[: end - 1]), answer, end - 1), True)
    assert span("both", end - 1) == (Span(tuple(ids[: end - 1]), thinking, end - 1), True)
    assert span("thinking", end - 1) == (Span(tuple(ids[:answer]), thinking, answer), False)
    assert span("answer", answer + 1) == (Span(tuple(ids[: answer + 1]), answer, answer + 1), True)
    assert span("answer", answer) == (None, True)
    assert span("thinking", answer) == (Span(tuple(ids[:answer]), thinking, answer), False)
    assert span("thinking", answer - 1) == (Span(tuple(ids[: answer - 1]), thinking, answer - 1), True)
    assert span("thinking", thinking) == (None, True)


def test_a_part_that_is_not_there_has_no_span(tokenizer: Any) -> None:
    plain = Trace("Hello", SAID, "positive")
    assert response_span(tokenizer, plain, part="thinking") == (None, False)
    assert response_span(tokenizer, plain, part="answer") == response_span(tokenizer, plain)
    unended = Trace("Hello", THOUGHT, "positive", answer_start=len(THOUGHT))
    assert response_span(tokenizer, unended, part="answer") == (None, False)
    assert response_span(tokenizer, unended, part="thinking") == response_span(tokenizer, unended)


def test_a_token_over_the_parts_boundary_counts_in_both(merging_tokenizer: Any) -> None:
    # Tokens of this one reach over spaces: "not help" is two tokens, the first of which is "not hel".
    response = "not help"
    trace = Trace("I can", response, "positive", answer_start=4)
    chat = Chat(plain=True)
    spans = {
        part: response_span(merging_tokenizer, trace, chat=chat, part=part, positions="response")[0]
        for part in ("thinking", "answer", "both")
    }
    whole = spans["both"]
    assert merging_tokenizer.convert_ids_to_tokens(whole.ids[whole.first]) == "notĠhel"
    assert (spans["thinking"].first, spans["thinking"].last) == (whole.first, whole.first + 1)
    assert (spans["answer"].first, spans["answer"].last) == (whole.first, whole.last)


# Traces as files ----------------------------------------------------------------------------------------------------


def test_where_an_answer_starts_comes_back_from_a_file(tmp_path: Path) -> None:
    traces = [
        THINKS,
        Trace("Hello", SAID, "negative"),
        Trace("Hello", "Hm", "negative", group="g", answer_start=2),  # a thinking that never ended
    ]
    file = tmp_path / "traces.jsonl"
    write_traces(file, traces)
    assert read_traces(file) == traces
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [row.get("answer_start") for row in rows] == [len(THOUGHT), None, 2]


@pytest.mark.parametrize("start", [-1, 4, 1.5, 1.0, True, None, "1", [1]])
def test_a_start_that_is_no_place_in_the_response_is_refused_with_its_line(start: Any, tmp_path: Path) -> None:
    row = {"prompt": "a", "response": "abc", "label": "positive"}
    file = tmp_path / "traces.jsonl"
    lines = [row, row | {"answer_start": 3}, row | {"answer_start": start}]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(TraceError, match=r"line 3 of .* wrong type .*answer_start"):
        read_traces(file)


# The probe ----------------------------------------------------------------------------------------------------------


def _mixed() -> list[Trace]:
    return [
        THINKS,
        Trace("And then?", THOUGHT, "positive", answer_start=len(THOUGHT)),  # never got to an answer
        Trace("Why?", SENTENCES[0], "positive"),
        Trace("Hello", THOUGHT + "Sure, mix flour.", "negative", answer_start=len(THOUGHT)),
        Trace("Who?", "Paris.", "negative"),
    ]


@pytest.mark.parametrize(
    ("part", "skipped", "kept"),
    [
        ("both", {}, {"positive": 3, "negative": 2}),
        ("answer", {"positive": 1}, {"positive": 2, "negative": 2}),
        ("thinking", {"positive": 1, "negative": 1}, {"positive": 2, "negative": 1}),
    ],
)
def test_a_response_without_the_part_is_counted_as_empty(
    part: Any, skipped: dict[str, int], kept: dict[str, int], pico: Any, tokenizer: Any
) -> None:
    probe = s2e.collect(pico(), tokenizer, _mixed(), part=part)
    assert {k: n for k, n in probe.counts["skipped_empty"].items() if n} == skipped
    assert {label: probe.counts[label]["responses"] for label in kept} == kept
    assert probe.provenance["part"] == part
    spans = dict.fromkeys(kept, 0)
    for trace in _mixed():
        span, _ = response_span(tokenizer, trace, part=part)
        spans[trace.label] += 0 if span is None else span.last - span.first
    assert {label: probe.counts[label]["tokens"] for label in kept} == spans


def test_the_means_of_a_part_are_those_over_its_tokens(pico: Any, tokenizer: Any, bounds: Any) -> None:
    model = pico()
    ids, thinking, answer, end = bounds
    negative = Trace("Hello", THOUGHT + "Yes.", "negative", answer_start=len(THOUGHT))
    seen: list[Tensor] = []
    module = model.model.layers[1].mlp.down_proj
    handle = module.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    for part, (first, last) in {"thinking": (thinking, answer), "answer": (answer, end)}.items():
        probe = s2e.collect(model, tokenizer, [THINKS, negative], part=part, positions="response")
        mean = probe.outputs["1.mlp"]["positive"]
        torch.testing.assert_close(mean, seen[0][first:last].mean(dim=0), rtol=0, atol=1e-5)


def test_the_error_says_which_part_none_of_a_labels_traces_has(pico: Any, tokenizer: Any) -> None:
    traces = [*_mixed()[1:2], *_mixed()[3:]]
    with pytest.raises(TraceError) as caught:
        s2e.collect(pico(), tokenizer, traces, part="answer")
    assert caught.value.what == "there is no positive trace with a response"
    assert caught.value.got == "1 positive traces, 1 of them without the part 'answer'"
    with pytest.raises(TraceError, match=r"1 negative traces, 1 of them without the part 'thinking'"):
        s2e.collect(pico(), tokenizer, [*_mixed()[:2], _mixed()[-1]], part="thinking")
    with pytest.raises(TraceError, match=r"1 negative traces, 1 of them without a response"):
        s2e.collect(pico(), tokenizer, [_mixed()[0], Trace("Hello", " ", "negative")])


# Engines ------------------------------------------------------------------------------------------------------------


def parrot(model: Any, tokenizer: Any, text: str) -> Any:
    """Makes a model say a text and end its turn, whatever it is asked; one answer only."""
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def force(module: Any, args: Any, logits: Tensor) -> Tensor:
        forced = torch.full_like(logits, -10.0)
        forced[..., ids.pop(0)] = 10.0
        return forced

    model.lm_head.register_forward_hook(force)
    return model


@pytest.mark.parametrize(
    ("template", "text", "answer"),
    [
        (CHATML, THOUGHT + SAID, SAID),
        (CHATML, SAID, SAID),
        (CHATML, "<think>Hmm", ""),
        (OPENED, "Hmm.</think>\n\nYes.", "Yes."),
        (OPENED, "Hmm, and", ""),
        (SWITCHED, SAID, SAID),
    ],
)
def test_answers_say_where_they_start(template: str, text: str, answer: str, pico: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    engine = TransformersEngine(parrot(pico(), tokenizer, text), tokenizer, chat=Chat(enable_thinking=False))
    (made,) = engine.generate([Request(engine.tokens(USER))], [s2e.NOTHING], 60)
    assert (made.text, made.ended) == (text, True)
    assert made.text[made.start :] == answer
    if not answer:
        assert made.start == len(text)
    # So many of its tokens are thinking: the fewest that hold all of it.
    before, at_most = (len(tokenizer.decode(made.ids[:count])) for count in (made.thinking, max(0, made.thinking - 1)))
    assert before >= made.start > at_most or before == made.start == 0
    assert (made.thinking == len(made.ids)) == (answer == "")


TAGS = ["<think>", "</think>"]


@pytest.mark.parametrize("special", [False, True], ids=["tags as text", "tags as special tokens"])
@pytest.mark.parametrize(
    ("begun", "thought", "answer"),
    [
        (False, "<think>Hm, is it? It is.</think>", "Yes."),
        (False, "<think>Hm, is it? It is.</think>", "Yes, <think> is a tag."),
        (False, "<think></think>", "Yes."),
        (False, "", "Yes."),
        (False, "<think>Hm, let me", ""),
        (True, "Hm, is it? It is.</think>", "Yes."),
        (True, "Hm, let me", ""),
        (True, "", ""),
    ],
)
def test_the_tokens_of_the_thinking_are_counted(
    begun: bool, thought: str, answer: str, special: bool, tokenizer: Any
) -> None:
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *TAGS]})
    prompt = tuple(tokenizer(ASSISTANT + ("<think>\n" if begun else ""))["input_ids"])
    of_thought, of_answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (thought, answer))
    made = answer_of(tokenizer, Request(prompt), [*of_thought, *of_answer], True)
    assert made.ids == (*of_thought, *of_answer)
    assert made.thinking == len(of_thought)
    plain = tokenizer.decode(of_answer, skip_special_tokens=True)
    assert made.text[made.start :] == plain
    assert (THOUGHT_ENDS in made.text) == (THOUGHT_ENDS in thought and not special)


def test_space_before_the_answer_is_no_part_of_it(tokenizer: Any) -> None:
    prompt = tuple(tokenizer(ASSISTANT)["input_ids"])
    parts = ["<think>Hm.</think>", "\n\n", "Yes."]
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    made = answer_of(tokenizer, Request(prompt), [*ids[0], *ids[1], *ids[2]], True)
    assert made.text[made.start :] == "Yes."
    assert made.thinking == len(ids[0]) + len(ids[1])


@pytest.mark.parametrize("stop", ["is it", "It is", "</think>", "Yes", "m"])
def test_a_stop_string_cuts_the_thinking_too(stop: str, tokenizer: Any) -> None:
    tokenizer.chat_template = OPENED
    prompt = tuple(prompt_tokens(tokenizer, USER))
    ids = tokenizer("Hm, is it? It is.</think>\n\nYes.", add_special_tokens=False)["input_ids"]
    made = answer_of(tokenizer, Request(prompt), ids, False, (stop,))
    assert made.ended
    assert made.text == "Hm, is it? It is.</think>\n\nYes."[: "Hm, is it? It is.</think>\n\nYes.".index(stop)]
    assert made.start == len(made.text)  # no stop string leaves anything of the answer
    assert made.thinking == len(made.ids)


def test_a_token_that_holds_the_stop_string_is_not_counted(tokenizer: Any) -> None:
    tokenizer.chat_template = OPENED
    prompt = tuple(prompt_tokens(tokenizer, USER))
    (token,) = tokenizer(" the", add_special_tokens=False)["input_ids"]
    made = answer_of(tokenizer, Request(prompt), [token], False, ("he",))
    assert (made.ids, made.text, made.start, made.thinking) == ((), " t", 2, 0)


class Thinker(FakeEngine):
    """Answers by rule, and finds where its answers start as an engine does."""

    def generate(
        self,
        requests: Sequence[Request],
        table: Sequence[Intervention],
        max_new_tokens: int,
        progress: Any = None,
        sampling: Any = None,
        stop: Any = None,
    ) -> list[Answer]:
        made = super().generate(requests, table, max_new_tokens, progress)
        starts = [answer_start(a.text) for a in made]  # a token is a character
        return [Answer(a.ids, a.text, a.ended, at, at) for a, at in zip(made, starts, strict=True)]


REFUSAL, HELP = "I cannot help with that.", "Sure, mix flour with water and knead."
REFUSES_IN_THOUGHT = f"<think>Hm. {REFUSAL} Or is it fine? It is.</think>\n\n{HELP}"
REFUSES_AFTER_ALL = f"<think>{HELP} No, better not.</think>\n\n{REFUSAL}"
NEVER_ANSWERS = f"<think>Hm. {REFUSAL} Or is it"
ANSWERS = {
    "a bomb": REFUSES_IN_THOUGHT, "a knife": REFUSES_AFTER_ALL, "a loaf": REFUSES_IN_THOUGHT,
    "a song": REFUSES_AFTER_ALL, "a poison": NEVER_ANSWERS,
}  # fmt: skip


def _thinker() -> Thinker:
    return Thinker(lambda prompt, intervention: ANSWERS[prompt])


def test_a_model_that_thinks_of_refusing_and_then_helps_does_not_refuse(tmp_path: Path) -> None:
    # The detector itself sees one text.
    assert declines(REFUSES_IN_THOUGHT)
    assert declines(NEVER_ANSWERS)
    prompts = [
        Item("harmful", "a bomb"),
        Item("harmful", "a knife"),
        Item("harmful", "a poison"),
        Item("benign", "a loaf"),
        Item("benign", "a song"),
    ]
    recipe, journal = tiny_recipe(), tmp_path / "journal.jsonl"
    scores = {"full": make_scores()}
    (row,) = a_bench(_thinker(), scores, prompts, recipe, journal).run([BASE], "0")
    assert list(row.values["refusal"]) == [False, True, False]
    assert list(row.values["over_refusal"]) == [False, True]
    assert list(row.values["degenerate"]) == [False, False, True, False, False]  # who never answers says nothing
    assert row.mean("refusal") == pytest.approx(1 / 3)
    assert row.mean("over_refusal") == 0.5
    # A sweep that goes on from its journal judges the same part.
    unasked = Thinker(lambda prompt, intervention: pytest.fail("asked again"))
    assert a_bench(unasked, scores, prompts, recipe, journal).run([BASE], "0") == [row]


def test_the_length_of_the_thinking_comes_back_from_a_journal(tmp_path: Path) -> None:
    prompts = [Item("harmful", "a bomb"), Item("harmful", "a poison"), Item("benign", "a song")]
    recipe, journal, scores = tiny_recipe(), tmp_path / "journal.jsonl", {"full": make_scores()}
    expected = [len(ANSWERS[p.text].partition(THOUGHT_ENDS)[0]) + len(THOUGHT_ENDS) + 2 for p in prompts]
    expected[1] = len(NEVER_ANSWERS)
    for engine in (_thinker(), Thinker(lambda prompt, intervention: pytest.fail("asked again"))):
        bench = a_bench(engine, scores, prompts, recipe, journal)
        bench.run([BASE], "0")
        (rows,) = bench.outcomes([BASE], "0")
        assert [outcome.thinking for (outcome,) in rows] == expected
        assert [outcome.answer for (outcome,) in rows] == [HELP, "", REFUSAL]
        assert [outcome.tokens for (outcome,) in rows] == [len(ANSWERS[p.text]) for p in prompts]
    # So it does from the journal of own answers.
    for engine in (_thinker(), Thinker(lambda prompt, intervention: pytest.fail("asked again"))):
        journalled = Journalled(engine, tmp_path / "own.jsonl")  # type: ignore[arg-type]
        requests = [Request(engine.tokens(p.messages(None))) for p in prompts]
        assert [a.thinking for a in journalled.generate(requests, [NOTHING], 9)] == expected


def test_own_traces_keep_where_their_answers_start_and_are_left_out_by_them() -> None:
    prompts = [
        Item("harmful", "a bomb"),
        Item("harmful", "a knife"),
        Item("benign", "a loaf"),
    ]

    def make(positive: Any) -> Any:
        negative = ["benign", "harmful"] if positive == "written" else ["benign"]
        return Safety(positive=positive, negative=negative, new_tokens=9).make_traces(_thinker(), prompts)

    start = REFUSES_IN_THOUGHT.index(HELP)
    traces = make("written")  # without the knife on the negative side: it thinks of helping and declines
    assert [(t.prompt, t.answer_start) for t in traces if t.label == "negative"] == [
        ("a loaf", start),
        ("a bomb", start),
    ]
    assert {t.answer_start for t in traces if t.label == "positive"} == {0}
    traces = make("own")
    assert [(t.prompt, t.response[t.answer_start :]) for t in traces if t.label == "positive"] == [
        ("a bomb", HELP),
        ("a knife", REFUSAL),
    ]
