"""The server speaks OpenAI's protocol to its own client, mixes edits in one batch, and loses no row."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest

from runs import command
from served import HELLO, a_server, a_worker, until
from steer2edit import cli
from steer2edit.engines.base import Request, Sampling
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import Steer2EditError
from steer2edit.serving.requests import MOST_CHOICES
from steer2edit.serving.server import key_of, listening, run_until_stopped, server_on

NAMES = ["base", "small", "large@0.5", "pico", "large@-1", "small@2+large@0.25", "small@0"]


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    with a_worker() as (worker, catalogue), a_server(worker, catalogue) as client:
        yield worker, catalogue, client


def expected(worker: Any, catalogue: Any, name: str, messages: Any, tokens: int, sampling: Any = None) -> Any:
    """What generate answers alone, in an engine without the server's hooks in its model's way."""
    until(lambda: not any(worker.counts().values()))
    engine = TransformersEngine(worker.engine.model, worker.engine.tokenizer)
    request = Request(engine.tokens(messages), 0, 5)
    return engine.generate([request], [catalogue.intervention(name)], tokens, sampling=sampling or Sampling())[0]


def post(client: openai.OpenAI, body: bytes, path: str = "chat/completions", **headers: str) -> tuple[int, Any]:
    """Status and answer of a plain client's request."""
    sent = {"Content-Type": "application/json", "Authorization": f"Bearer {client.api_key}"} | headers
    asked = urllib.request.Request(str(client.base_url.join(path)), body or None, sent)
    try:
        with urllib.request.urlopen(asked, timeout=30) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_the_models_are_the_original_and_the_edits(served: Any) -> None:
    _, _, client = served
    assert [model.id for model in client.models.list()] == ["base", "pico", "small", "large"]
    assert client.models.retrieve("large@0.5").id == "large@0.5"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("strange")


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_that_of_generate_whole_and_streamed(served: Any, name: str) -> None:
    worker, catalogue, client = served
    wanted = expected(worker, catalogue, name, HELLO, 20)
    asked = {"model": name, "messages": HELLO, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == wanted.text
    assert whole.choices[0].finish_reason == ("stop" if wanted.ended else "length")
    assert whole.usage.prompt_tokens == len(worker.encode(HELLO))
    assert whole.usage.completion_tokens == len(wanted.ids)
    assert whole.model == name
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 5


def test_the_edits_answer_differently(served: Any) -> None:
    worker, catalogue, _ = served
    texts = {name: expected(worker, catalogue, name, HELLO, 20).text for name in NAMES}
    assert texts["small@0"] == texts["base"] == texts["pico"]
    assert len(set(texts.values())) == len(NAMES) - 2


def test_sampling_draws_by_the_seed(served: Any) -> None:
    worker, catalogue, client = served
    warm = Sampling(0.9, 0.8)
    wanted = expected(worker, catalogue, "small", HELLO, 16, warm)
    asked: Any = {"model": "small", "messages": HELLO, "temperature": 0.9, "top_p": 0.8}
    several = client.chat.completions.create(**asked, seed=4, n=3, max_completion_tokens=16)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.choices[1].message.content == wanted.text  # seed 4 + 1
    assert len({choice.message.content for choice in several.choices}) == 3
    free = [client.chat.completions.create(**asked, max_tokens=16).choices[0].message.content for _ in range(2)]
    assert free[0] != free[1]


def test_several_streamed_answers_keep_their_numbers(served: Any) -> None:
    _, _, client = served
    asked: Any = {"model": "large", "messages": HELLO, "seed": 1, "n": 2, "max_tokens": 12}
    whole = client.chat.completions.create(**asked)
    texts = ["", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_a_stop_string_ends_an_answer_and_is_not_streamed(served: Any) -> None:
    worker, catalogue, client = served
    wanted = expected(worker, catalogue, "base", HELLO, 40).text
    stop = wanted[12:15]
    asked: Any = {"model": "base", "messages": HELLO, "max_tokens": 40, "temperature": 0, "stop": [stop, "never"]}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.message.content == wanted[: wanted.index(stop)]
    assert whole.finish_reason == "stop"
    pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces) == whole.message.content


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"model": "strange"}, 404, "model_not_found", "model"),
        ({"model": "small@"}, 404, "model_not_found", "model"),
        ({"model": "small@nan"}, 404, "model_not_found", "model"),
        ({"model": "small+strange"}, 404, "model_not_found", "model"),
        ({"model": "<script>alert(1)</script>\x1b[31m"}, 404, "model_not_found", "model"),
        ({"model": 7}, 400, None, "model"),
        ({"messages": []}, 400, None, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, None, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 4000}]}, 400, "context_length_exceeded", "messages"),
        ({"max_tokens": 512}, 400, "context_length_exceeded", "messages"),
        ({"max_tokens": 0}, 400, None, "max_tokens"),
        ({"temperature": -1}, 400, None, "temperature"),
        ({"temperature": float("nan")}, 400, None, None),
        ({"top_p": 0}, 400, None, "top_p"),
        ({"n": MOST_CHOICES + 1}, 400, None, "n"),
        ({"stop": ""}, 400, None, "stop"),
        ({"stop": ["x"] * 17}, 400, None, "stop"),
        ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter", "tools"),
        ({"logprobs": True}, 400, "unsupported_parameter", "logprobs"),
        ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "response_format"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_has_a_status_and_says_what_is_wrong(
    served: Any, changes: Any, status: int, code: Any, param: Any
) -> None:
    worker, _, client = served
    body = {"model": "base", "messages": HELLO, "max_tokens": 4} | changes
    got, answer = post(client, json.dumps(body).encode())
    assert got == status
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["code"] == code
    assert param is None or error["param"] == param
    assert len(error["message"]) < 2000
    assert worker.counts() == {"running": 0, "waiting": 0}


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": "base", "messages": "hi"}', b"{}"],
    ids=lambda body: str(body[:12]),
)
def test_what_is_no_request_is_refused(served: Any, body: bytes) -> None:
    _, _, client = served
    status, answer = post(client, body or b" ")
    assert status == 400
    assert answer["error"]["message"]


def test_a_hostile_prompt_is_text_like_any_other(served: Any) -> None:
    worker, catalogue, client = served
    hostile = "<script>alert(1)</script>\x1b[2J\x9b31m\u202egnp.exe\u2066\r\b"
    messages = [{"role": "system", "content": hostile}, {"role": "user", "content": hostile}]
    wanted = expected(worker, catalogue, "small", messages, 6)
    whole = client.chat.completions.create(model="small", messages=messages, max_tokens=6, temperature=0)
    assert whole.choices[0].message.content == wanted.text
    messages[1]["content"] += "x" * 100_000
    status, answer = post(client, json.dumps({"model": "small", "messages": messages}).encode())
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert hostile not in answer["error"]["message"]
    assert worker.counts() == {"running": 0, "waiting": 0}


def test_half_a_surrogate_is_refused_and_harms_nobody(served: Any) -> None:
    _, _, client = served
    body = b'{"model": "base", "max_tokens": 2, "messages": [{"role": "user", "content": "\\ud800"}]}'
    assert post(client, body)[0] == 400
    assert client.chat.completions.create(model="base", messages=HELLO, max_tokens=2).usage.completion_tokens <= 2


def test_a_body_that_is_too_large_is_refused(served: Any) -> None:
    _, _, client = served
    message = {"role": "user", "content": "x" * (5 * 2**20)}
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="base", messages=[message])
    assert caught.value.status_code == 413


def test_unknown_fields_are_ignored_and_harmless_ones_accepted(served: Any) -> None:
    _, _, client = served
    body = {"model": "base", "messages": HELLO, "max_tokens": 2, "user": "me", "strange": {"a": 1}}
    harmless = {"tools": None, "logprobs": False, "presence_penalty": 0, "response_format": {"type": "text"}}
    assert post(client, json.dumps(body | harmless).encode())[0] == 200


def test_text_in_parts_and_other_roles_are_read(served: Any) -> None:
    worker, _, client = served
    parts = [{"type": "text", "text": "How do I "}, {"type": "text", "text": "bake bread?"}]
    messages: Any = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    asked = client.chat.completions.create(model="base", messages=messages, max_tokens=2)
    wanted = [{"role": "system", "content": "Be kind."}, HELLO[0]]
    assert asked.usage.prompt_tokens == len(worker.encode(wanted))


def test_pages_that_do_not_exist_answer_in_the_same_shape(served: Any) -> None:
    _, _, client = served
    for path in ("strange", "/docs", "/openapi.json", "/"):
        status, answer = post(client, b"", path)
        assert status == 404
        assert answer["error"]["type"] == "invalid_request_error"
    assert post(client, b"", "chat/completions")[0] == 405


def test_a_web_page_under_another_name_reaches_nothing(served: Any) -> None:
    _, _, client = served
    status, answer = post(client, b"", "models", Host="evil.example")
    assert (status, answer["error"]["code"]) == (400, "invalid_host")


def test_a_token_is_needed_where_one_is_set() -> None:
    with a_worker() as (worker, catalogue), a_server(worker, catalogue, key="sésame") as client:
        assert [post(client, b"", "models", Authorization=wrong)[0] for wrong in ("", "Bearer x", "Basic x")] == [
            401
        ] * 3
        body = json.dumps({"model": "base", "messages": HELLO}).encode()
        status, answer = post(client, body, Authorization="Bearer wrong")
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        right = "Bearer sésame".encode().decode("latin-1")
        assert post(client, b"", "models", Authorization=right)[0] == 200
        assert post(client, b"", "/health", Authorization="")[1] == {"status": "ok", "running": 0, "waiting": 0}
        assert worker.counts() == {"running": 0, "waiting": 0}


def test_more_than_may_wait_get_429(monkeypatch: Any) -> None:
    with a_worker(rows=2, waiting=1) as (worker, catalogue), a_server(worker, catalogue) as client:
        go = threading.Event()
        whole_step = worker._batch.step
        monkeypatch.setattr(worker._batch, "step", lambda: (go.wait(), whole_step())[1])
        asked: Any = {"model": "base", "messages": HELLO, "max_tokens": 3, "temperature": 0}
        answers: list[Any] = []
        threads = [
            threading.Thread(target=lambda: answers.append(client.chat.completions.create(**asked))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        until(lambda: sum(worker.counts().values()) == 3)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(**asked)
        assert caught.value.response.headers["retry-after"] == "1"
        go.set()
        for thread in threads:
            thread.join()
        assert len({answer.choices[0].message.content for answer in answers}) == 1


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_frees_its_rows(served: Any, streamed: bool) -> None:
    worker, _, client = served
    body = {"model": "large", "messages": HELLO, "max_tokens": 480, "n": 3, "temperature": 0, "stream": streamed}
    sent = json.dumps(body).encode()
    for _ in range(3):
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(sent)}\r\n\r\n"
            connection.sendall(head.encode() + sent)
            until(lambda: worker.counts()["running"] == 3)
        until(lambda: worker.counts() == {"running": 0, "waiting": 0}, seconds=5)
        until(lambda: not worker._batch.busy, seconds=5)
    assert worker._batch._slots is None


def test_an_edit_too_strong_fails_alone_and_leaves_nothing_behind(served: Any) -> None:
    worker, catalogue, client = served
    wanted = expected(worker, catalogue, "base", HELLO, 30).text
    asked: Any = {"messages": HELLO, "max_tokens": 30, "temperature": 0}
    results: dict[str, Any] = {}

    def ask(name: str) -> None:
        try:
            results[name] = client.chat.completions.create(model=name, **asked).choices[0].message.content
        except openai.APIStatusError as error:
            results[name] = error

    for name in ("large@1e38", "large@-3e38"):
        threads = [threading.Thread(target=ask, args=(one,)) for one in (name, "base")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results["base"] == wanted
        assert results[name].status_code == 400
        assert "not finite" in results[name].body["message"]
        ask("base")
        assert results["base"] == wanted
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.chat.completions.create(model="large@1e38", **asked, stream=True))


def test_a_mistake_of_ours_is_told_without_details_and_does_not_end_the_service(served: Any, monkeypatch: Any) -> None:
    worker, catalogue, client = served
    wanted = expected(worker, catalogue, "small", HELLO, 8).text
    asked: Any = {"model": "small", "messages": HELLO, "max_tokens": 8, "temperature": 0}
    with monkeypatch.context() as broken:
        broken.setattr(worker.engine, "next_logits", lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(**asked)
        assert "division" not in str(caught.value.body)
    assert client.chat.completions.create(**asked).choices[0].message.content == wanted
    assert worker.counts() == {"running": 0, "waiting": 0}


@pytest.mark.slow
def test_32_clients_at_once_lose_nothing() -> None:
    """Mixed edits, disconnects and mistakes for 20 seconds; the two minutes are in benchmarks/serve.py."""
    questions = [[{"role": "user", "content": f"Question {i}: {'why? ' * (i % 9)}"}] for i in range(32)]
    with a_worker(rows=32) as (worker, catalogue), a_server(worker, catalogue) as client:
        wanted = {
            (name, i): expected(worker, catalogue, name, questions[i], 16).text for name in NAMES for i in range(32)
        }
        process, seconds = psutil.Process(), 20.0
        started = time.monotonic()
        wrong: list[Any] = []
        finished, memory = [0] * 32, []

        def ask(i: int) -> None:
            turn = i
            # On a busy machine longer than 20 seconds, until every client had its turns.
            while time.monotonic() - started < (seconds if finished[i] > 3 else 6 * seconds):
                name = NAMES[turn % len(NAMES)]
                asked: Any = {"model": name, "messages": questions[i], "max_tokens": 16, "temperature": 0}
                try:
                    if turn % 7 == 0:
                        with client.chat.completions.create(**asked | {"max_tokens": 400}, stream=True) as stream:
                            next(iter(stream))
                    elif turn % 11 == 0:
                        with pytest.raises(openai.NotFoundError):
                            client.chat.completions.create(**asked | {"model": "strange"})
                    else:
                        text = client.chat.completions.create(**asked).choices[0].message.content
                        if text != wanted[name, i]:
                            wrong.append((name, i, text))
                except Exception as error:
                    wrong.append(error)
                finished[i] += 1
                turn += 1
                if i == 0:
                    memory.append((time.monotonic() - started, process.memory_info().rss))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert min(finished) > 3
        until(lambda: worker.counts() == {"running": 0, "waiting": 0}, seconds=5)
        until(lambda: not worker._batch.busy, seconds=5)
        early = [size for at, size in memory if seconds / 4 < at < seconds / 2]
        late = [size for at, size in memory if at > seconds * 3 / 4]
        assert max(late) - max(early) < 16 * 2**20


def test_who_may_reach_a_server_without_a_token(monkeypatch: Any) -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        assert key_of(None, host) is None
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.com"):
        with pytest.raises(Steer2EditError, match="needs a token"):
            key_of(None, host)
    monkeypatch.setenv("THE_TOKEN", " sesame ")
    assert key_of("THE_TOKEN", "0.0.0.0") == "sesame"
    monkeypatch.setenv("THE_TOKEN", "")
    with pytest.raises(Steer2EditError, match="takes the variable's name"):
        key_of("THE_TOKEN", "127.0.0.1")


def test_mistakes_on_the_command_line_come_before_the_model_is_loaded(
    tmp_path: Any, monkeypatch: Any, capsys: Any
) -> None:
    assert command(monkeypatch, "serve", "nowhere", tmp_path / "no.safetensors") == 2
    assert "no.safetensors" in capsys.readouterr().err
    assert command(monkeypatch, "serve", "nowhere", "--api-key", "NO_SUCH_VARIABLE") == 2
    assert "NO_SUCH_VARIABLE" in capsys.readouterr().err
    assert command(monkeypatch, "serve", "nowhere", "--host", "0.0.0.0") == 2
    assert "needs a token" in capsys.readouterr().err
    with listening("127.0.0.1", 0) as bound:
        assert command(monkeypatch, "serve", "nowhere", "--port", bound.getsockname()[1]) == 2
        assert "address cannot be used" in capsys.readouterr().err


def test_ctrl_c_ends_a_server_in_one_sentence(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with a_worker() as (worker, catalogue), listening("127.0.0.1", 0) as bound:
            server = server_on(worker, catalogue, bound, None)
            threading.Thread(
                target=lambda: (until(lambda: server.started), os.kill(os.getpid(), signal.SIGINT))
            ).start()
            monkeypatch.setattr(cli, "app", lambda **_: run_until_stopped(server, bound))
            assert command(monkeypatch, "serve") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err.endswith("\nsteer2edit: stopped; nothing is served any more.\n")
