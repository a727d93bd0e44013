"""a. SIGKILL at random moments of run, search, apply and serve; the same command then ends as if it had not been."""

from __future__ import annotations

import http.client
import json
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torture.ledger import Case, Outcome, miniature, times
from torture.warm import Child, command
from torture.world import World, contents, difference, half_written

# How often each command is killed at full scale: 100 together.
COUNTS = {"run": 25, "search": 35, "apply": 30, "serve": 10}
_QUESTION = {
    "messages": [{"role": "user", "content": "How do I bake bread?"}],
    "max_tokens": 200,
    "temperature": 0,
    "stream": True,
}


def cases(world: World, scale: float) -> Iterator[Case]:
    usual: dict[str, float] = {}

    def usually(kind: str, work: Any, folder: Path) -> float:
        """Seconds that the command takes undisturbed, here and today."""
        if kind not in usual:
            ended = Child(work, folder).wait()
            assert ended.code == 0, ended.err
            usual[kind] = ended.seconds
        return usual[kind]

    def killed_run(draw: random.Random, folder: Path) -> Outcome:
        arguments = ("run", world.recipe, "--quiet", "--out")
        moment = draw.uniform(0, usually("run", command(*arguments, folder / "usual"), folder))
        return _run(world, folder, arguments, moment, lambda: None)

    def killed_search(draw: random.Random, folder: Path) -> Outcome:
        _without_search(world, folder / "usual")
        arguments = ("search", world.recipe, "--quiet", "--out")
        moment = draw.uniform(0, usually("search", command(*arguments, folder / "usual"), folder))
        return _run(world, folder, arguments, moment, lambda: _without_search(world, folder / "out"))

    def killed_apply(draw: random.Random, folder: Path) -> Outcome:
        arguments = ("apply", world.base, world.file("edit"), "--quiet", "--to")
        moment = draw.uniform(0, usually("apply", command(*arguments, folder / "usual"), folder))
        return _apply(world, folder, arguments, moment)

    def killed_serve(draw: random.Random, folder: Path) -> Outcome:
        return _serve(world, draw, folder)

    kinds = {"run": killed_run, "search": killed_search, "apply": killed_apply, "serve": killed_serve}
    for kind, run in kinds.items():
        if miniature(scale) and kind != "apply":
            continue
        for number in times(COUNTS[kind], scale):
            yield Case("SIGKILL", kind, number, run)


def _without_search(world: World, folder: Path) -> None:
    """A copy of the run as it was before the stage search."""
    shutil.copytree(world.whole, folder)
    shutil.rmtree(folder / "search")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["stages"].pop("search")
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _killed(work: Callable[[], int], folder: Path, moment: float, prepare: Callable[[], None]) -> None:
    """Kills a command at a moment; if it had ended before, it runs again and is killed at half of it."""
    while True:
        shutil.rmtree(folder / "out", ignore_errors=True)
        prepare()
        ended = Child(work, folder).wait(kill_at=moment)
        if ended.killed:
            return
        assert ended.code == 0, ended.err
        moment /= 2


def _run(world: World, folder: Path, arguments: Any, moment: float, prepare: Callable[[], None]) -> Outcome:
    """After the kill the same command, and then the whole run, which has nothing more to do after a `run`."""
    out = folder / "out"
    _killed(command(*arguments, out), folder, moment, prepare)
    if bad := half_written(out, world.whole):
        return Outcome("half written", bad)
    again = Child(command(*arguments, out), folder).wait()
    if again.code == 0:
        again = Child(command("run", *arguments[1:], out), folder).wait()
    if again.code:
        return Outcome("not resumed", again.err[-300:])
    return Outcome("the same bytes", difference(out, world.whole))


def _apply(world: World, folder: Path, arguments: Any, moment: float) -> Outcome:
    shutil.rmtree(folder / "usual", ignore_errors=True)
    out = folder / "out"
    _killed(command(*arguments, out), folder, moment, lambda: None)
    if out.exists() and not (out / "manifest.json").is_file():
        return Outcome("half written", "a folder without a manifest")
    if out.exists() and (bad := difference(out, world.edited, set())):
        return Outcome("half written", bad)
    if not out.exists():
        again = Child(command(*arguments, out), folder).wait()
        if again.code:
            return Outcome("not resumed", again.err[-300:])
    left = sorted(path.name for path in folder.iterdir() if path != out)
    bad = f"left behind: {left}" if left else difference(out, world.edited, set())
    return Outcome("the same bytes", bad)


def _serve(world: World, draw: random.Random, folder: Path) -> Outcome:
    """Killed while it streams; a new one on the same port then gives the whole answer, that of an undisturbed one."""
    port = _free_port()
    work = command("serve", world.model, f"edit={world.whole}/edit.safetensors", "--port", port, "--quiet")
    answers = []
    before = contents(world.whole, set())
    for life in range(3):
        server = Child(work, folder, f"server-{life}", cpu=60)
        try:
            pieces = draw.randint(1, 12) if life == 1 else None
            answers.append(_streamed(port, pieces))
        finally:
            server.kill()
            server.wait()
    if contents(world.whole, set()) != before:
        return Outcome("changed", "the server changed its run")
    whole, part, again = answers
    same = whole == again and whole.startswith(part) and whole != ""
    return Outcome("the same answer", "" if same else f"{answers}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return bound.getsockname()[1]


def _streamed(port: int, pieces: int | None) -> str:
    """An answer's text, or the first pieces of it."""
    end = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps({"model": "edit", **_QUESTION}),
                               {"Content-Type": "application/json"})  # fmt: skip
            break
        except ConnectionRefusedError:
            assert time.monotonic() < end, "the server does not start"
            time.sleep(0.05)
    text, seen = "", 0
    response = connection.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        if line.startswith(b"data: {"):
            choice = json.loads(line[6:])["choices"]
            text += (choice[0]["delta"].get("content") or "") if choice else ""
            seen += 1
            if pieces is not None and seen >= pieces:
                break
    connection.close()
    return text
