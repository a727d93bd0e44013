"""The thread that owns the model, and the pieces of text that it gives."""

from __future__ import annotations

import contextlib
import platform
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from conftest import make_pico, make_tokenizer
from runs import command, save_pico
from served import HELLO, a_worker, two_edits, until
from steer2edit import load_model
from steer2edit.engines.base import Answer
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import Steer2EditError
from steer2edit.serving import server
from steer2edit.serving import worker as worker_module
from steer2edit.serving.stream import TextStream
from steer2edit.serving.worker import (
    Closed,
    Done,
    Piece,
    Question,
    Worker,
    answers_of,
    give_memory_back,
    one_team,
    streamed,
)


def test_only_the_worker_computes_with_several_threads(monkeypatch: Any) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)  # whatever this machine has
    try:
        seen: list[int] = []
        with one_team() as threads:
            assert (threads, torch.get_num_threads()) == (3, 1)
            engine = TransformersEngine(make_pico(), make_tokenizer(), rows=2)
            with contextlib.closing(Worker(engine, threads=threads)) as worker:
                whole_step = worker._batch.step
                monkeypatch.setattr(
                    worker._batch, "step", lambda: (seen.append(torch.get_num_threads()), whole_step())[1]
                )
                answers_of(worker, [Question((1, 2, 3), tokens=2)])
                assert set(seen) == {3}
                assert torch.get_num_threads() == 1
                with ThreadPoolExecutor(1) as later:  # as those of a web server
                    assert later.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no other C library has malloc_trim")
def test_freed_memory_goes_back_to_the_system() -> None:
    pieces = [torch.ones(25_000) for _ in range(2000)]  # small enough for the heap, 200 MB together
    last = pieces[-1]  # stays at the heap's end, so that the heap cannot shrink
    pieces.clear()
    before = psutil.Process().memory_info().rss
    assert give_memory_back()
    assert before - psutil.Process().memory_info().rss > 100e6
    assert float(last[0]) == 1


def test_a_worker_gives_memory_back_now_and_then(monkeypatch: Any) -> None:
    calls: list[int] = []
    monkeypatch.setattr(worker_module, "give_memory_back", lambda: calls.append(1))
    with a_worker() as (worker, _):
        answers_of(worker, [Question((1, 2, 3), tokens=4)])
        assert not calls
        monkeypatch.setattr(worker_module, "TRIM", -1.0)
        answers_of(worker, [Question((1, 2, 3), tokens=4)])
    assert len(calls) == 4


@pytest.mark.parametrize("verb", ["chat", "serve"])
def test_the_commands_leave_the_threads_to_the_worker(verb: str, tmp_path: Path, monkeypatch: Any) -> None:
    folder, edit = save_pico(tmp_path / "model"), tmp_path / "edit.safetensors"
    two_edits(load_model(str(folder), dtype="float32", device="cpu")[0])[0].edit.save(edit)
    seen: list[tuple[int, int]] = []

    def opened(*arguments: Any, threads: int, **options: Any) -> Any:
        seen.append((threads, torch.get_num_threads()))
        raise Steer2EditError("seen", got="enough", fix="Stop.")

    monkeypatch.setattr(server, "opened", opened)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        arguments = (edit, "--model", folder) if verb == "chat" else (folder, edit, "--port", "0")
        assert command(monkeypatch, verb, *arguments) == 2
        assert seen == [(3, 1)]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_closed_worker_tells_everyone_and_asks_nothing() -> None:
    with a_worker() as (worker, _):
        events: list[Any] = []
        started = threading.Event()

        def listen() -> None:
            for _, event in streamed(worker, [Question(worker.encode(HELLO), tokens=400)]):
                started.set()
                events.append(event)

        thread = threading.Thread(target=listen)
        thread.start()
        started.wait()
    thread.join()
    assert isinstance(events[-1].error, Closed)
    with pytest.raises(Closed):
        worker.ask([])


def test_a_listener_that_fails_harms_nobody_else() -> None:
    with a_worker() as (worker, _):
        question = Question(worker.encode(HELLO), tokens=30)

        def broken(event: Any) -> None:
            raise RuntimeError("the loop is closed")

        worker.ask([(question, broken)])
        (done,) = answers_of(worker, [question])
        assert isinstance(done, Done)
        assert isinstance(done.answer, Answer)
        until(lambda: worker.counts() == {"running": 0, "waiting": 0})


def test_pieces_are_whole_characters_and_make_the_text(tokenizer: Any) -> None:
    text = "naïve 你好 👩‍👩‍👧 end. \n\n x"
    ids = tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(ids[: n + 1]) for n in range(len(ids))]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.finish(text) == ""
    held = TextStream(tokenizer, ("end. STOP",))
    given = "".join(held.push(ids[: n + 1]) for n in range(len(ids)))
    assert given == text[: len(text) - 8]
    assert given + held.finish(text) == text
    assert Piece("x").text == "x"
