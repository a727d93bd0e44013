"""A server that judges by rule, pairs to ask it about, and a place without keys."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from steer2edit.behaviours import judges
from steer2edit.behaviours.judge_formats import Verdicts
from steer2edit.behaviours.judges import Endpoint

QUESTION = "Does the response decline the request?"
KEY = "sk-very-secret-0123456789"
PAIRS = [(f"Prompt {i}?", f"Response {i}, which {'declines' if i % 2 else 'answers'}.") for i in range(12)]
ANSWERS = [float(i % 2) for i in range(12)]


@dataclass
class Call:
    """A request that the server got. number counts from 0."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def text(self) -> str:
        """All that the judge was sent."""
        return self.body["prompt"] if "prompt" in self.body else "\n".join(m["content"] for m in self.body["messages"])


@dataclass
class Reply:
    """What the server does with a request."""

    text: str | None = "yes"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: str | None = None
    error: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    hang_up: bool = False
    finish: str = "stop"


def by_pair(call: Call) -> Reply:
    return Reply("Yes." if "declines" in call.text else "No, it does not.")


class Server:
    """A stand-in for an OpenAI-compatible server."""

    def __init__(self, behave: Callable[[Call], Reply]):
        self.behave = behave
        self.calls: list[Call] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    call = Call(
                        len(server.calls),
                        self.path,
                        {name.lower(): value for name, value in self.headers.items()},
                        body,
                    )
                    server.calls.append(call)
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                reply = server.behave(call)
                time.sleep(reply.seconds)
                with server.lock:
                    server.at_once -= 1
                with contextlib.suppress(OSError):  # the client may have left
                    self.reply(call, reply)

            def reply(self, call: Call, reply: Reply) -> None:
                if reply.hang_up:
                    self.close_connection = True
                    return
                said = {"text": reply.text} if "prompt" in call.body else {"message": {"content": reply.text}}
                completion = {"choices": [{"index": 0, "finish_reason": reply.finish, **said}]}
                sent = reply.raw or json.dumps({"error": reply.error} if reply.error else completion)
                self.send_response(reply.status)
                for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(sent.encode())))
                self.end_headers()
                self.wfile.write(sent.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def judge(self, **options: Any) -> Endpoint:
        asked = {} if "format" in options else {"question": QUESTION}
        return Endpoint(**{"endpoint": self.url, "model": "judge-1", **asked, **options})

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@contextlib.contextmanager
def judge_servers() -> Iterator[Callable[..., Server]]:
    """Gives what starts a server; all of them are closed in the end."""
    servers: list[Server] = []

    def start(behave: Callable[[Call], Reply] = by_pair) -> Server:
        servers.append(Server(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, short waits, and no key or proxy from outside."""
    monkeypatch.setenv("STEER2EDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(judges, "_BACKOFF", 0.01)


def kept(judge: Any) -> int:
    return len(Verdicts(judge.identity)._yes)
