"""Who writes a side's responses: this model, another one, or a server, and what is said when that one fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import make_pico, make_tokenizer
from runs import FakeEngine, command, save_pico
from sides import SENTENCE, ChatServer, chatml, small_recipe, three_parts
from steer2edit.behaviours.contrast import Side
from steer2edit.behaviours.custom import Custom
from steer2edit.behaviours.writers import whole_sentences, write_responses
from steer2edit.engines.base import Answer
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import ModelError, Steer2EditError, TraceError
from steer2edit.files.schema import parse

KEY = "sk-very-secret-0123456789"
PROMPTS = [f"Question {i}?" for i in range(20)]


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits between tries, and no key or proxy from outside."""
    import openai._base_client as client

    monkeypatch.setattr(client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(client, "MAX_RETRY_DELAY", 0.002)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve() -> Iterator[Callable[..., ChatServer]]:
    servers: list[ChatServer] = []

    def start(answer: Callable[[dict[str, Any]], Any] = lambda body: f"To {body['messages'][-1]['content']}") -> Any:
        servers.append(ChatServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def _side(url: str, **options: Any) -> Side:
    return Side(system="Be loud.", model="large-1", endpoint=url, **options)


def _write(side: Side, prompts: Any = PROMPTS[:2], system: str | None = None, progress: Any = None) -> list[str]:
    return write_responses(FakeEngine(), side, prompts, system, 24, progress)


# A server -------------------------------------------------------------------------------------------------------------


def test_a_server_gets_the_instruction_the_prompt_and_the_limits(serve: Any) -> None:
    server = serve()
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    ]
    assert _write(_side(server.url), ["How?", talk]) == ["To How?", "To Go"]
    assert set(server.paths) == {"/v1/chat/completions"}
    by_length = sorted(server.bodies, key=lambda body: len(body["messages"]))
    assert by_length[0]["messages"] == [
        {"role": "system", "content": "Be loud."},
        {"role": "user", "content": "How?"},
    ]
    assert by_length[1]["messages"] == [{"role": "system", "content": "Be loud."}, *talk]
    for body in server.bodies:
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("large-1", 24, 0)


def test_the_behaviours_system_prompt_stands_before_the_instruction(serve: Any) -> None:
    server = serve()
    _write(_side(server.url), ["How?"], system="You are a clerk.")
    assert server.bodies[0]["messages"][0] == {"role": "system", "content": "You are a clerk.\n\nBe loud."}


def test_responses_come_in_the_order_of_the_prompts(serve: Any) -> None:
    import time

    def answer(body: dict[str, Any]) -> str:
        number = int(body["messages"][-1]["content"].split()[-1][:-1])
        time.sleep(0.03 if number % 3 == 0 else 0)
        return f"Answer {number}."

    seen: list[tuple[int, int]] = []
    written = _write(_side(serve(answer).url), PROMPTS, progress=lambda done, total: seen.append((done, total)))
    assert written == [f"Answer {i}." for i in range(20)]
    assert seen == [(i, 20) for i in range(1, 21)]


def test_a_response_that_was_cut_ends_with_a_sentence(serve: Any) -> None:
    server = serve(lambda body: ("  Mix it. Bake it! Then wait for", "length"))
    assert _write(_side(server.url), ["How?"]) == ["Mix it. Bake it!"]
    server = serve(lambda body: ("  Mix it. Bake it! Then wait for ", "stop"))
    assert _write(_side(server.url), ["How?"]) == ["Mix it. Bake it! Then wait for"]


def test_a_reply_without_a_text_is_an_empty_response(serve: Any) -> None:
    assert _write(_side(serve(lambda body: (None, "stop")).url), ["How?"]) == [""]


def test_each_side_can_have_another_writer(serve: Any) -> None:
    server = serve()
    raw = {"more": {"system": "Be loud.", "model": "m", "endpoint": server.url}, "less": {"system": "Be soft."}}
    behaviour = parse(Custom, raw)
    engine = FakeEngine()
    items = behaviour.completed(engine, [_pair("one"), _pair("two")])
    assert [item.choices for item in items] == [
        ("To one", "An answer to Be soft.\none"),
        ("To two", "An answer to Be soft.\ntwo"),
    ]
    traces = behaviour.make_traces(engine, [_pair("one")])
    assert [(t.response, t.label, t.system) for t in traces] == [
        ("To one", "positive", None),
        ("An answer to Be soft.\none", "negative", None),
    ]


def _pair(text: str) -> Any:
    from steer2edit.behaviours.base import Item

    return Item("pair", text, target=[None, None])


# The key --------------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_stands_in_no_error(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server = serve()
    _write(_side(server.url, key="MY_KEY"))
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    refusing = serve(lambda body: (401, json.dumps({"error": {"message": f"no such key: {KEY}"}})))
    with pytest.raises(TraceError) as error:
        _write(_side(refusing.url, key="MY_KEY"))
    what, got, fix = three_parts(error.value)
    assert what == f"the server {refusing.url[7:-3]} does not write the responses"
    assert "401" in got
    assert "$MY_KEY" in fix
    assert not any(KEY in text for text in (str(error.value), repr(error.value), got))
    assert error.value.__cause__ is None


def test_a_server_without_a_key_gets_nothing_from_the_environment(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "of-another-server")
    server = serve()
    assert _write(_side(server.url), ["How?"]) == ["To How?"]
    assert "of-another-server" not in str(server.headers)


@pytest.mark.parametrize("key", [f"{KEY}\n", f" {KEY}"])
def test_white_space_around_a_key_is_no_part_of_it(serve: Any, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("MY_KEY", key)
    server = serve()
    assert _write(_side(server.url, key="MY_KEY"), ["How?"]) == ["To How?"]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("key", [f"{KEY}…", f"{KEY} b\nc"])
def test_a_key_that_cannot_be_sent_is_a_users_mistake(serve: Any, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(Steer2EditError) as error:
        _write(_side(serve().url, key="MY_KEY"), ["How?"])
    three_parts(error.value)
    assert KEY not in str(error.value)


# Servers that fail ----------------------------------------------------------------------------------------------------


def test_a_server_that_is_down_is_one_sentence(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve()
    server.close()
    with pytest.raises(TraceError) as error:
        _write(_side(server.url), PROMPTS)
    assert three_parts(error.value) == (
        f"the server {server.url[7:-3]} does not write the responses",
        "Connection error.",
        "Check the address, the model's name and $OPENAI_API_KEY; then run the same command again.",
    )
    assert KEY not in str(error.value)


def test_a_passing_failure_is_tried_again(serve: Any) -> None:
    calls: list[int] = []

    def answer(body: dict[str, Any]) -> Any:
        calls.append(1)
        return (503, '{"error": {"message": "busy"}}') if len(calls) < 3 else "At last."

    assert _write(_side(serve(answer).url), ["How?"]) == ["At last."]
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, '{"error": {"message": "no model large-1"}}', "no model large-1"),
        (401, '{"error": {"message": "no such key"}}', "no such key"),
        (500, '{"error": {"message": "broken"}}', "broken"),
        (404, "<html>\n<p>not here</p>\n</html>", "404"),
    ],
)
def test_a_lasting_failure_is_one_sentence(serve: Any, status: int, body: str, said: str) -> None:
    with pytest.raises(TraceError) as error:
        _write(_side(serve(lambda _: (status, body)).url))
    what, got, _ = three_parts(error.value)
    assert what.endswith("does not write the responses")
    assert said in got or status == 404


@pytest.mark.parametrize("body", ["<html>Welcome</html>", '{"hello": 1}', '{"choices": []}', '{"choices": [{"mess'])
def test_a_reply_that_is_no_completion_is_one_sentence(serve: Any, body: str) -> None:
    with pytest.raises(TraceError) as error:
        _write(_side(serve(lambda _: (200, body)).url))
    assert three_parts(error.value)[0].endswith("does not write the responses")


def test_without_the_package_there_is_one_sentence(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(TraceError) as error:
        _write(_side(serve().url))
    assert three_parts(error.value) == (
        "responses from a server need the package openai",
        "not installed",
        "pip install 'steer2edit[judge]'",
    )


def test_a_server_that_is_down_ends_a_run_with_exit_code_2(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve()
    server.close()
    sides = {"more": {"system": "Be loud.", "model": "m", "endpoint": server.url}, "less": {"system": "Be soft."}}
    recipe = small_recipe(
        save_pico(tmp_path / "model"), {"name": "custom", "new_tokens": 2, **sides}, data={"probe": 2}
    )
    (tmp_path / "r.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert command(monkeypatch, "run", tmp_path / "r.yaml", "--out", tmp_path / "run", "--quiet") == 2
    said = capsys.readouterr().err
    assert SENTENCE.fullmatch(said)
    assert said.count("\n") == 1
    assert "does not write the responses (got: Connection error.)" in said
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(KEY.encode() in data for data in [*written, said.encode()])


# A model here ---------------------------------------------------------------------------------------------------------


def test_this_model_writes_greedily_under_the_instruction() -> None:
    model, tokenizer = make_pico(max_position_embeddings=512), make_tokenizer()
    engine = TransformersEngine(model, tokenizer)
    written = write_responses(engine, Side(system="Be loud."), ["How?", "Why?"], "A clerk.", 6)
    for prompt, response in zip(("How?", "Why?"), written, strict=True):
        assert response == _greedy(model, tokenizer, chatml(prompt, "A clerk.\n\nBe loud."), 6)


def _greedy(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    import torch

    ids = list(tokenizer(prompt)["input_ids"])
    start = len(ids)
    for _ in range(new_tokens):
        with torch.inference_mode():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            return str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()
        ids.append(token)
    return whole_sentences(tokenizer.decode(ids[start:], skip_special_tokens=True), ended=False)


def test_another_model_writes_in_its_place(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "large", seed=5)
    other = make_pico(seed=5, max_position_embeddings=512)
    engine = FakeEngine()
    side = Side(system="Be loud.", model=folder)
    (written,) = write_responses(engine, side, ["How?"], None, 5)
    assert written == _greedy(other, make_tokenizer(), chatml("How?", "Be loud."), 5)
    assert engine.asked == []


def test_another_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        _write(Side(system="Be loud.", model=str(tmp_path / "nowhere")))
    three_parts(error.value)


def test_what_a_model_thinks_is_no_part_of_its_response() -> None:
    class Thinking(FakeEngine):
        def generate(self, requests: Any, *_: Any) -> list[Answer]:
            return [Answer((1, 2, 3), "<think>Hm.</think>\n\nNo, never.", True, start=20, thinking=2) for _ in requests]

    assert write_responses(Thinking(), Side(system="Be loud."), ["How?"], None, 9) == ["No, never."]


# Responses that were cut ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ended", "whole"),
    [
        ("Mix it. Bake it. Then wait for", False, "Mix it. Bake it."),
        ("Mix it. Bake it. Then wait for", True, "Mix it. Bake it. Then wait for"),
        (" Why? Because! And", False, "Why? Because!"),
        ("- one\n- two\n- thr", False, "- one\n- two"),
        ("Then wait for", False, "Then wait for"),
        ("It is 3.14 and", False, "It is 3.14 and"),
        ("\nNo end", False, "No end"),
        ("", False, ""),
    ],
)
def test_a_cut_text_is_cut_back_to_its_last_whole_sentence_or_line(text: str, ended: bool, whole: str) -> None:
    assert whole_sentences(text, ended) == whole
