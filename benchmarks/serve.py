"""What serving costs: 32 clients at once for two minutes, each under another edit, against `generate` on as many rows.

The server is the command itself, in a process of its own on the same cores as its clients. Some of them disconnect in
between. At the end no row may be left, and the server's memory is compared between the first minute and the second.

Run: python benchmarks/serve.py [seconds]
"""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import psutil

from steer2edit.behaviours.base import Source as Prompts
from steer2edit.behaviours.safety import BUILTIN, Safety
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.models.embedded import EMBEDDED
from steer2edit.serving.catalogue import Catalogue
from steer2edit.serving.sources import Source
from timing import report, seconds
from workload import base_model, scores

ROWS, TOKENS, ROUNDS = 32, 64, 4
NAMES = ("base", "dense", "dense@0.5", "sparse", "sparse@-0.5", "dense@0.3+sparse@0.3")


def main(duration: float) -> None:
    rhos = {"dense": 0.2, "sparse": 0.3}
    edits = {name: scores().edit(rho_attn=rho, rho_mlp=None, alpha=0.2) for name, rho in rhos.items()}
    prompts = [p.text for p in Safety().items(Prompts(BUILTIN, {"probe": {"benign": ROWS}}), "probe")]
    with tempfile.TemporaryDirectory() as folder:
        for name, edit in edits.items():
            edit.save(Path(folder) / f"{name}.safetensors")
        with serving([f"{name}={folder}/{name}.safetensors" for name in edits]) as (process, address):
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            throughput([Source(name, edit) for name, edit in edits.items()], client, prompts)
            if duration:
                endure(process, address, client, prompts, duration)


@contextlib.contextmanager
def serving(edits: list[str]) -> Iterator[tuple[psutil.Process, str]]:
    """The command while it runs, and its address."""
    command = [sys.executable, "-m", "steer2edit", "serve", EMBEDDED, *edits, "--port", "0", "--rows", str(ROWS)]
    options = ["--dtype", "float32", "--device", "cpu"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            said: list[str] = []
            for line in server.stderr:
                said.append(line)
                if found := re.search(r"http://[\d.]+:\d+", line):
                    break
            else:
                raise RuntimeError("".join(said))
            address = found[0]
            threading.Thread(target=server.stderr.read, daemon=True).start()
            yield psutil.Process(server.pid), address
        finally:
            server.terminate()


def throughput(edits: list[Source], client: openai.OpenAI, prompts: list[str]) -> None:
    model, tokenizer = base_model()
    engine = TransformersEngine(model, tokenizer, rows=ROWS)
    catalogue = Catalogue(model, EMBEDDED, edits)
    table = [catalogue.intervention(name) for name in NAMES]
    ids = [engine.tokens([{"role": "user", "content": prompt}]) for prompt in prompts]
    requests = [Request(one, i % len(NAMES)) for i, one in enumerate(ids)]
    texts: dict[str, list[str]] = {"generate": [], "serve": []}

    def plain() -> None:
        texts["generate"] = [answer.text for answer in engine.generate(requests, table, TOKENS)]

    def served() -> None:
        texts["serve"] = [""] * ROWS

        def ask(i: int) -> None:
            texts["serve"][i] = streamed(client, NAMES[i % len(NAMES)], prompts[i])

        side_by_side(ask, ROWS)
        assert all(texts["serve"]), "a client got no answer"

    seconds(plain), seconds(served)
    ratios = []
    for i in range(ROUNDS):
        if i % 2:
            b, a = seconds(served), seconds(plain)
        else:
            a, b = seconds(plain), seconds(served)
        print(f"  generate {a:.2f} s, serve {b:.2f} s", flush=True)
        ratios.append(a / b)
    same = sum(a == b for a, b in zip(texts["generate"], texts["serve"], strict=True))
    label = f"tokens/s of serve with {ROWS} streaming clients / of generate on as many rows"
    report(label, statistics.median(ratios), (">=", 0.85), f"{same} of {ROWS} answers the same")


def endure(process: psutil.Process, address: str, client: openai.OpenAI, prompts: list[str], duration: float) -> None:
    started = time.monotonic()
    memory: list[int] = []
    finished = [0] * ROWS

    def watch() -> None:
        while time.monotonic() - started < duration:
            memory.append(process.memory_info().rss)
            time.sleep(1)

    def ask(i: int) -> None:
        turn = i
        while time.monotonic() - started < duration:
            streamed(client, NAMES[turn % len(NAMES)], prompts[turn % ROWS], leave=turn % 5 == 0)
            finished[i] += 1
            turn += 1

    watching = threading.Thread(target=watch)
    watching.start()
    side_by_side(ask, ROWS)
    watching.join()
    time.sleep(0.5)
    with urllib.request.urlopen(f"{address}/health") as answer:
        left = {key: value for key, value in json.load(answer).items() if key != "status"}
    assert not any(left.values()), left
    # Medians, since the batch takes more or less while it grows and shrinks. The first seconds are those of the start.
    half = len(memory) // 2
    growth = (statistics.median(memory[half:]) - statistics.median(memory[min(5, half // 2) : half])) / 2**20
    print(f"  {sum(finished)} requests of {ROWS} clients in {duration:.0f} s; left: {left}")
    report("memory of the second half less that of the first, MB", growth, ("<=", 30))


def streamed(client: openai.OpenAI, name: str, prompt: str, leave: bool = False) -> str:
    """The text of an answer; a client that leaves goes after the first pieces."""
    stream = client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
    )
    text = ""
    with stream:
        for count, chunk in enumerate(stream):
            text += chunk.choices[0].delta.content or ""
            if leave and count == 5:
                break
    return text


def side_by_side(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 120)
