"""Files, recipes, a server and losses by hand for the tests of behaviours that a user describes."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from steer2edit.behaviours.base import SPLITS, Source, Split
from steer2edit.errors import Steer2EditError
from steer2edit.recipe import Recipe, parse_recipe

SENTENCE = re.compile(r"steer2edit: .+ \(got: .*\)\. .+\n", re.DOTALL)


def write_rows(path: Path, rows: Any) -> str:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def source(
    prompts: str | None = None, seed: int = 0, kind: str = "prompt", test_prompts: str | None = None, **counts: int
) -> Source:
    """Where items come from; a split that is not named takes its share."""
    wanted: dict[Split, Mapping[str, int] | None] = {
        split: {kind: counts[split]} if split in counts else None for split in SPLITS
    }
    return Source(prompts, wanted, seed, test_prompts)


def three_parts(error: Steer2EditError) -> tuple[str, str, str]:
    """What, got and fix of an error, each of them said, in one line."""
    parts = (error.what, error.got, error.fix)
    assert all(part.strip() for part in parts)
    assert "\n" not in str(error)
    return parts


def small_recipe(model: str, behaviour: Mapping[str, Any], **changes: Any) -> Recipe:
    """A recipe of two edits and two steering strengths, without limits, on a few prompts.

    Args:
        changes: sections in place of these.
    """
    raw: dict[str, Any] = {
        "name": "small",
        "seed": 1,
        "model": {"name": model, "dtype": "float32", "device": "cpu"},
        "behaviour": dict(behaviour),
        "data": {},
        "search": {
            "rho_attn": [0.1, 0.3],
            "rho_mlp": [None],
            "alpha": [0.2],
            "variants": ["full"],
            "steering": [0.1, 0.4],
            "baselines": [],
            "limits": {"degenerate": None, "utility_loss": None},
        },
        "evaluation": {
            "new_tokens": 4,
            "utility_prompts": 2,
            "utility_tokens": 4,
            "rows": 8,
            "batch": 10,
            "resamples": 50,
        },
    }
    return parse_recipe(raw | changes)


def chatml(prompt: str, system: str | None = None) -> str:
    """A prompt in the tests' template, up to where the answer begins."""
    before = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return f"{before}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def nll_by_hand(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, int]:
    """NLL per token of an answer in fp64, from one pass over the whole text, and how many tokens it has.

    Args:
        prompt: as the model sees it.
    """
    before, ids = (tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
    assert ids[: len(before)] == before
    with torch.inference_mode():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    count = len(ids) - len(before)
    return -sum(log_p[at - 1, ids[at]].item() for at in range(len(before), len(ids))) / count, count


class ChatServer:
    """A stand-in for a server with OpenAI's API.

    Args:
        answer: a request's body → the completion's text, (text, finish reason), or the status and body of a reply.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Any]):
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.bodies.append(body)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    server.paths.append(self.path)
                answered = answer(body)
                text, finish = answered if isinstance(answered, tuple) else (answered, "stop")
                status, sent, kind = 200, "", "application/json"
                if isinstance(text, int):
                    status, sent = answered
                    kind = "application/json" if sent.startswith("{") else "text/html"
                else:
                    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
                    sent = json.dumps({"choices": [choice]})
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(sent.encode())))
                self.end_headers()
                self.wfile.write(sent.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
