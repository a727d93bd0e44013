"""How fast this machine is: a model's own speeds, by a short trial, and the parts that bound any model here."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..engines.base import Engine, Request
from ..engines.host import Host
from ..errors import Steer2EditError
from ..files.reading import read_json
from ..files.writing import write_json
from ..method.intervention import NOTHING, Intervention, steering
from ..progress import say
from ..recipe import Recipe
from .cost import tokens_of
from .machine import Hardware, Speed

# Answers and tokens of the trial, and configurations that share a batch of it.
_ANSWERS, _TOKENS, _CONFIGURATIONS = 64, 12, 4
# Answers whose length is taken.
_LENGTHS = 16
_FILE = "speed.json"


@dataclass(frozen=True)
class Trial:
    """What a short trial of a model shows. answer: the mean tokens of its own answers; None if most are cut."""

    speed: Speed
    answer: float | None = None


def speed_here(recipe: Recipe, folder: str | Path) -> Trial:
    """The speeds of a recipe's model in this process, which `speed.json` in the folder keeps.

    Raises:
        Steer2EditError: the model cannot be loaded here.
    """
    path = Path(folder) / _FILE
    known = read_json(path) if path.is_file() else {}
    key = f"{recipe.model.name} {recipe.model.dtype} {recipe.behaviour.name} {recipe.evaluation.rows} {os.cpu_count()}"
    if key not in known:
        known[key] = asdict(_tried(recipe))
        write_json(path, known)
    return Trial(Speed(**known[key]["speed"]), known[key]["answer"])


def _tried(recipe: Recipe) -> Trial:
    """By the recipe's own validation prompts, under interventions as a search has them."""
    say("measuring the speed of the model here")
    host = Host(recipe.model, recipe.engine, recipe.evaluation.rows)
    try:
        started = time.perf_counter()
        engine = host.engine
        loaded = time.perf_counter() - started
        behaviour = recipe.behaviour
        items = behaviour.items(recipe.source, "validation")
        prompts = [engine.tokens(item.messages(behaviour.system)) for item in items]
        rows = min(recipe.evaluation.rows, _ANSWERS)
        requests = [Request(prompts[i % len(prompts)], i % _CONFIGURATIONS) for i in range(rows)]
        table = host.call(_nothing_that_counts)
        system = tokens_of(behaviour.system or "")
        read = sum(12 + system + tokens_of(items[i % len(items)].text) for i in range(rows))
        one = _seconds(lambda: engine.generate(requests, table, 1))
        answers = engine.generate(requests, table, 1 + _TOKENS)
        many = _seconds(lambda: engine.generate(requests, table, 1 + _TOKENS))
        written = sum(max(0, len(answer.ids) - 1) for answer in answers) or rows
        pairs = [(prompt, (prompt * 2)[:24]) for prompt in prompts[:4]]
        scored = sum(len(prompt) + len(answer) for prompt, answer in pairs) * _CONFIGURATIONS
        losses = _seconds(lambda: engine.losses(pairs, table))
        speed = Speed(written / max(many - one, 1e-6), read / one, scored / losses, loaded)
        return Trial(speed, _mean_answer(engine, requests[:_LENGTHS], recipe.evaluation.new_tokens))
    finally:
        host.close()


def _mean_answer(engine: Engine, requests: Sequence[Request], new_tokens: int) -> float | None:
    """The mean tokens of the model's own answers; None where most are cut, so that the most is what they have."""
    answers = engine.generate([replace(request, row=0) for request in requests], [NOTHING], new_tokens)
    if sum(answer.ended for answer in answers) * 2 < len(answers):
        return None
    return max(1.0, statistics.mean(len(answer.ids) for answer in answers))


def _nothing_that_counts(model: object) -> list[Intervention]:
    """Steering of strength 0 at every block: it costs what steering costs, and changes no answer."""
    import torch

    from ..models.sites import find_sites

    vectors = {site.block_key: torch.zeros(site.d) for site in find_sites(model)}  # type: ignore[arg-type]
    return [steering(vectors, 0.0, f"nothing {i}") for i in range(_CONFIGURATIONS)]


def _seconds(work: Callable[[], object], times: int = 2) -> float:
    """The median of a few runs."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return max(statistics.median(taken), 1e-6)


# The parts that bound a model ----------------------------------------------------------------------------------------


def cpu_here(folder: str | Path) -> Hardware:
    """What this CPU reaches in fp32, by a matrix product, a product with a vector, and a file that is not in memory."""
    import torch

    size, rows = 2048, 256
    weight, activations = torch.randn(size, size), torch.randn(rows, size)
    _seconds(lambda: activations @ weight, 1)
    compute = 2.0 * rows * size * size / _seconds(lambda: activations @ weight, 5)
    tall, vector = torch.randn(4 * size, 4 * size), torch.randn(4 * size)
    _seconds(lambda: tall @ vector, 1)
    bandwidth = tall.numel() * 4 / _seconds(lambda: tall @ vector, 5)
    return Hardware(compute, bandwidth, _disk(Path(folder)), _memory(), 4)


def _disk(folder: Path, size: int = 64_000_000) -> float:
    """Bytes a second of a file that is read from the disk, as far as the system can be told to forget it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        file.seek(0)
        while file.read(4_000_000):
            pass
        return size / (time.perf_counter() - started)


def _memory() -> float | None:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return None


def speed_or_none(recipe: Recipe, folder: str | Path) -> tuple[Trial | None, str]:
    """The speeds here, or why there are none."""
    try:
        return speed_here(recipe, folder), ""
    except Steer2EditError as error:
        return None, str(error)
