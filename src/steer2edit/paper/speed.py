"""How fast this machine is: a model's own speeds, by a short trial, and the parts that bound any model here.

One trial serves all runs of a model. `speed.json` in the suite's folder keeps it, so that a resumed suite measures
nothing again.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache

from ..engines.base import Engine, Request
from ..engines.host import Host
from ..errors import FileError, Steer2EditError
from ..files.reading import read_json
from ..files.writing import write_json
from ..method.intervention import NOTHING, Intervention, steering
from ..progress import say
from ..recipe import Recipe
from .facts import machines
from .machine import STEP_OF_ALL, STEP_OF_LORA, Hardware, Speed
from .traced import TEMPLATE, tokens_of

# Answers of the trial and their tokens, and configurations that share a batch of it.
_ANSWERS, _TOKENS, _CONFIGURATIONS = 64, 12, 4
# Given answers that are scored, after one prompt, and their tokens.
_GIVEN, _GIVEN_TOKENS = 6, 24
# Answers whose length is taken. Up to this many tokens most of a model's answers are cut: none is asked for.
_LENGTHS, _CUT = 12, 32
# Tokens of a trace that a step of training takes in, and the share of the memory that a step may need to be tried.
_TRACE, _OF_MEMORY = 64, 0.6
_FILE = "speed.json"


@dataclass(frozen=True)
class Trial:
    """What a short trial of a model shows.

    Attributes:
        answer: the mean tokens of its own answers; None if most are cut. size: its parameters.
    """

    speed: Speed
    answer: float | None = None
    size: float = 0.0


@dataclass
class _Known:
    """What `speed.json` holds.

    Attributes:
        models: model and machine → speed and parameters. answers: a model's behaviour → the mean tokens of an answer.
    """

    path: Path
    models: dict[str, Any]
    answers: dict[str, float | None]

    @classmethod
    def read(cls, folder: str | Path) -> _Known:
        path = Path(folder) / _FILE
        known = read_json(path) if path.is_file() else {}
        if not isinstance(known, dict) or not isinstance(known.get("models", {}), dict):
            raise FileError(f"{path} holds no speeds", got=type(known).__name__, fix="Delete it.")
        return cls(path, known.get("models", {}), known.get("answers", {}))

    def write(self) -> None:
        write_json(self.path, {"models": self.models, "answers": self.answers})


def trials_here(recipes: Sequence[Recipe], folder: str | Path) -> Iterator[Trial | Steer2EditError]:
    """What a trial of each recipe's model shows in this process. A model is loaded once for all its recipes.

    Args:
        folder: `speed.json` in it keeps what was measured.

    Yields:
        A trial for each recipe or, if the model cannot be loaded here, the error.
    """
    known = _Known.read(folder)
    by_model: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        by_model.setdefault(_model_key(recipe), []).append(recipe)
    failed: dict[str, Steer2EditError] = {}
    for key, some in by_model.items():
        try:
            _measure_missing(key, some, known)
        except Steer2EditError as error:
            failed[key] = error
    for recipe in recipes:
        key = _model_key(recipe)
        if key in failed:
            yield failed[key]
            continue
        entry = known.models[key]
        yield Trial(Speed(**entry["speed"]), known.answers.get(_answer_key(recipe)), entry["size"])


def _model_key(recipe: Recipe) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{recipe.model.name} {recipe.model.dtype} {recipe.evaluation.rows} rows {cores} cores"


def _answer_key(recipe: Recipe) -> str:
    return f"{recipe.model.name} {recipe.behaviour.name} {recipe.evaluation.new_tokens}"


def _measure_missing(key: str, recipes: Sequence[Recipe], known: _Known) -> None:
    """Measures what is not known of a model.

    Raises:
        Steer2EditError: it cannot be loaded here.
    """
    trained = next((recipe for recipe in recipes if recipe.training.methods), None)
    entry = known.models.get(key)
    long = [recipe for recipe in recipes if recipe.evaluation.new_tokens > _CUT]
    missing = {_answer_key(recipe): recipe for recipe in long if _answer_key(recipe) not in known.answers}
    of_training = trained is not None and (entry is None or not entry["speed"]["lora"])
    if entry is not None and not missing and not of_training:
        return
    say("measuring the speed of the model here")
    first = recipes[0]
    started = time.perf_counter()
    host = Host(first.model, first.engine, first.evaluation.rows)
    try:
        engine = host.engine
        loaded = time.perf_counter() - started
        if entry is None:
            size = host.call(_parameters)
            speed = replace(_speed(first, host), load=loaded, stored=_writing(known.path.parent))
            entry = {"speed": asdict(speed), "size": size}
        for name, recipe in missing.items():
            known.answers[name] = _mean_answer(engine, recipe)
        if of_training and trained is not None:  # the last, since it changes the model
            entry["speed"] |= _of_training(host, trained, entry["speed"]["scored"])
    finally:
        host.close()
    del engine
    clear_device_cache(garbage_collection=True)  # of the model and the moments that steps of training left
    known.models[key] = entry
    known.write()


def _parameters(model: Any) -> float:
    return float(sum(p.numel() for p in model.parameters()))


def _speed(recipe: Recipe, host: Host) -> Speed:
    """By the recipe's own validation prompts, under interventions as a search has them."""
    engine, behaviour = host.engine, recipe.behaviour
    table = host.call(_nothing_that_counts)
    items = behaviour.items(recipe.source, "validation")
    prompts = [engine.tokens(item.messages(behaviour.system)) for item in items]
    rows = min(recipe.evaluation.rows, _ANSWERS)
    system = tokens_of(behaviour.system or "")
    engine.generate([Request(prompts[0])], table, 2)  # what is done once is not measured
    # Prompts: the beginning that they share is read once.
    requests = [Request(prompts[i % len(prompts)], i % _CONFIGURATIONS) for i in range(rows)]
    tokens = sum(TEMPLATE + system + tokens_of(items[i % len(items)].text) for i in range(rows))
    read = tokens / _seconds(lambda: engine.generate(requests, table, 1), 1)
    # Answers to one prompt, which is all shared.
    same = [Request(prompts[0], i % _CONFIGURATIONS) for i in range(rows)]
    counts: list[int] = []
    taken = _seconds(lambda: counts.extend(len(a.ids) for a in engine.generate(same, table, _TOKENS)), 1)
    written = max(1, sum(counts)) / taken
    pairs = [(prompts[0], (prompts[0] * _GIVEN_TOKENS)[i : i + _GIVEN_TOKENS]) for i in range(_GIVEN)]
    # The original model's row leads each batch, as in a search; each row reads the prompt once.
    in_batch = 1 + _CONFIGURATIONS
    taken = _seconds(lambda: engine.losses(pairs, table), 1)
    given = max(taken - in_batch * len(prompts[0]) / read, taken / 2)
    return Speed(written, read, in_batch * _GIVEN * _GIVEN_TOKENS / given)


def _mean_answer(engine: Engine, recipe: Recipe) -> float | None:
    """The mean tokens of the model's own answers; None where most are cut, so that the most is what they have."""
    most = recipe.evaluation.new_tokens
    behaviour = recipe.behaviour
    items = [item for item in behaviour.items(recipe.source, "validation") if not item.choices][:_LENGTHS]
    requests = [Request(engine.tokens(item.messages(behaviour.system))) for item in items]
    answers = engine.generate(requests, [NOTHING], most)
    if sum(answer.ended for answer in answers) * 2 < len(answers) or not answers:
        return None
    return max(1.0, statistics.mean(len(answer.ids) for answer in answers))


def _nothing_that_counts(model: object) -> list[Intervention]:
    """Steering of strength 0 at every block: it costs what steering costs, and changes no answer."""
    import torch

    from ..models.sites import find_sites

    vectors = {site.block_key: torch.zeros(site.d) for site in find_sites(model)}  # type: ignore[arg-type]
    return [steering(vectors, 0.0, f"nothing {i}") for i in range(_CONFIGURATIONS)]


# Training ------------------------------------------------------------------------------------------------------------


def _of_training(host: Host, recipe: Recipe, scored: float) -> dict[str, float]:
    """Tokens a second of a step of training: measured, or from the forward pass where the model cannot be trained here.

    Args:
        scored: tokens a second of a forward pass with the output embedding.
    """
    if recipe.engine.name == "transformers" and host.call(_trainable):
        return dict(zip(("full", "lora"), host.call(_steps, recipe.training.batch), strict=True))
    return {"full": scored / STEP_OF_ALL, "lora": scored / STEP_OF_LORA}


def _trainable(model: Any) -> bool:
    """Whether a step can be tried: in fp32, on a CPU whose memory holds weights, gradients and two moments of each."""
    import torch

    whole = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    memory = _memory()
    fits = memory is None or 16 * _parameters(model) < _OF_MEMORY * memory
    return whole and fits and not getattr(model, "is_quantized", False)


def _steps(model: Any, batch: int) -> tuple[float, float]:
    """Tokens a second of a step of every weight, and of one of rank-1 LoRA. The model is not the same after it.

    Args:
        batch: traces in a step.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (batch, _TRACE), device=model.device)

    def seconds(trained: Any) -> float:
        optimiser = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)

        def step(rows: int) -> None:
            trained(input_ids=ids[:rows], labels=ids[:rows], use_cache=False).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

        step(1)  # makes the optimiser's moments
        return _seconds(lambda: step(batch), 1)

    with torch.enable_grad(), torch.random.fork_rng(), warnings.catch_warnings():
        # Of the libraries about each other's names.
        warnings.simplefilter("ignore", FutureWarning)
        model.requires_grad_(True)
        every = seconds(model)
        model.requires_grad_(False)
        lora = seconds(get_peft_model(model, LoraConfig(r=1, lora_alpha=1, target_modules="all-linear")))
    return ids.numel() / every, ids.numel() / lora


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
    shares = machines().cpu
    return Hardware(
        shares.forward * compute,
        bandwidth,
        _disk(Path(folder)),
        _memory(),
        4,
        decoding=shares.decoding / shares.forward,
    )


def _writing(folder: Path, size: int = 64_000_000) -> float:
    """Bytes a second of a file that is written to the disk and synced."""
    folder.mkdir(parents=True, exist_ok=True)
    data = os.urandom(size)
    started = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return size / (time.perf_counter() - started)


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
