"""What serving costs: 32 clients at once for two minutes, each under another edit, against `generate` on as many rows.

Clients disconnect in between. At the end no row is left, and the memory of the second minute is that of the first.

Run: python benchmarks/serve.py [seconds]
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable

import openai
import psutil

from steer2edit.behaviours.base import Source as Prompts
from steer2edit.behaviours.safety import BUILTIN, Safety
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.serving.catalogue import Catalogue
from steer2edit.serving.server import listening, server_on
from steer2edit.serving.sources import Source
from steer2edit.serving.worker import Worker
from timing import report, seconds
from workload import base_model, scores

ROWS, TOKENS, ROUNDS = 32, 64, 4
NAMES = ("base", "dense", "dense@0.5", "sparse", "sparse@-0.5", "dense@0.3+sparse@0.3")


def main(duration: float) -> None:
    model, tokenizer = base_model()
    rhos = {"dense": 0.2, "sparse": 0.3}
    edits = [Source(name, scores().edit(rho_attn=rho, rho_mlp=None, alpha=0.2)) for name, rho in rhos.items()]
    engine = TransformersEngine(model, tokenizer, rows=ROWS)
    catalogue = Catalogue(model, "smollm2", edits)
    worker = Worker(engine)
    bound = listening("127.0.0.1", 0)
    server = server_on(worker, catalogue, bound, None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{bound.getsockname()[1]}/v1", api_key="none", max_retries=0)
    prompts = [p.text for p in Safety().items(Prompts(BUILTIN, {"probe": {"benign": ROWS}}), "probe")]
    try:
        throughput(engine, worker, catalogue, client, prompts)
        if duration:
            endure(worker, client, prompts, duration)
    finally:
        server.should_exit = True
        thread.join()
        worker.close()


def throughput(
    engine: TransformersEngine, worker: Worker, catalogue: Catalogue, client: openai.OpenAI, prompts: list[str]
) -> None:
    names = [NAMES[i % len(NAMES)] for i in range(ROWS)]
    table = [catalogue.intervention(name) for name in NAMES]
    ids = [worker.encode([{"role": "user", "content": prompt}]) for prompt in prompts]
    requests = [Request(one, i % len(NAMES)) for i, one in enumerate(ids)]
    texts: dict[str, list[str]] = {"generate": [], "serve": []}

    def plain() -> None:
        texts["generate"] = [answer.text for answer in engine.generate(requests, table, TOKENS)]

    def served() -> None:
        texts["serve"] = [""] * ROWS

        def ask(i: int) -> None:
            texts["serve"][i] = streamed(client, names[i], prompts[i])

        side_by_side(ask, ROWS)

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


def endure(worker: Worker, client: openai.OpenAI, prompts: list[str], duration: float) -> None:
    process = psutil.Process()
    started = time.monotonic()
    memory: list[tuple[float, int]] = []
    finished = [0] * ROWS

    def ask(i: int) -> None:
        turn = i
        while time.monotonic() - started < duration:
            streamed(client, NAMES[turn % len(NAMES)], prompts[turn % ROWS], leave=turn % 5 == 0)
            finished[i] += 1
            turn += 1
            if i == 0:
                memory.append((time.monotonic() - started, process.memory_info().rss))

    side_by_side(ask, ROWS)
    time.sleep(0.5)
    halves = [[size for at, size in memory if (at < duration / 2) == first] for first in (True, False)]
    growth = (max(halves[1]) - max(halves[0])) / 2**20
    print(f"  {sum(finished)} requests of {ROWS} clients in {duration:.0f} s; left: {worker.counts()}")
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
