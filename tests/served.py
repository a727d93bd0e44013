"""A pico model, its edits, and a server on a free port of this machine, for the tests of serving and of the chat."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai

import steer2edit as s2e
from conftest import make_pico, make_tokenizer, make_traces
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.serving.catalogue import Catalogue
from steer2edit.serving.server import listening, server_on
from steer2edit.serving.sources import Source
from steer2edit.serving.worker import Worker

HELLO = [{"role": "user", "content": "How do I bake bread?"}]


def two_edits(model: Any) -> list[Source]:
    """Edits of unlike sizes, "small" and "large", whose greedy answers differ."""
    scores = s2e.score(model, s2e.collect(model, make_tokenizer(), *make_traces()))
    rhos = {"small": 0.5, "large": 0.1}
    return [
        Source(name, scores.edit(rho_attn=rho, rho_mlp=rho, alpha=0.3), scores, gamma=0.4) for name, rho in rhos.items()
    ]


@contextlib.contextmanager
def a_worker(rows: int = 8, **options: Any) -> Iterator[tuple[Worker, Catalogue]]:
    """A worker on a pico model whose vocabulary has tokens that the tokenizer does not know."""
    model = make_pico(max_position_embeddings=512)
    worker = Worker(TransformersEngine(model, make_tokenizer(), rows=rows), **options)
    try:
        yield worker, Catalogue(model, "pico", two_edits(model))
    finally:
        worker.close()


@contextlib.contextmanager
def a_server(worker: Worker, catalogue: Catalogue, key: str | None = None) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of a server that runs while the context lasts."""
    with listening("127.0.0.1", 0) as bound:
        server = server_on(worker, catalogue, bound, key)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        until(lambda: server.started)
        port = bound.getsockname()[1]
        try:
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key or "none", max_retries=0) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


def until(condition: Any, seconds: float = 20.0) -> None:
    """Waits until a condition holds; fails after some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
