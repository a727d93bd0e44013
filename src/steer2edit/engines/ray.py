"""An engine that is spread over machines: Ray actors hold replicas of the model and share every batch.

This process keeps the journal and the study; the replicas make text, losses and sums. If a replica dies, Ray starts it
again and repeats its part of the batch; each part's result counts once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import operator
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..errors import Steer2EditError
from ..method.intervention import Intervention
from ..probing.collect import PassSums, run_pass
from ..probing.plan import Plan
from ..progress import be_quiet, say
from .base import GREEDY, Answer, Engine, Losses, Progress, Request, Sampling
from .host import Host
from .plan import EnginePlan, Model, load_tokenizer

T = TypeVar("T")


class Replica:
    """What an actor holds: a host of the model."""

    def __init__(self, model: dict[str, Any], plan: dict[str, Any], rows: int):
        be_quiet()
        self.host = Host(Model.model_validate(model), EnginePlan.model_validate(plan), rows)

    def generate(
        self,
        requests: Sequence[Request],
        table: Sequence[Intervention],
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] | None,
    ) -> tuple[list[Answer], int]:
        """The answers, and how many slots the engine has left."""
        answers = self.host.engine.generate(requests, table, max_new_tokens, sampling=sampling, stop=stop)
        return answers, self.host.engine.slots

    def context(self) -> int | None:
        return self.host.engine.context

    def losses(self, pairs: Sequence[Any], table: Sequence[Intervention]) -> Losses:
        return self.host.engine.losses(pairs, table)

    def prompt_losses(self, pairs: Sequence[Any], prompts: Sequence[Any]) -> Losses:
        return self.host.engine.prompt_losses(pairs, prompts)

    def run_pass(self, plan: Plan, which: Sequence[int], batch_tokens: int) -> PassSums:
        return self.host.call(run_pass, plan, which, batch_tokens)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        return self.host.call(function, *arguments)

    def set_rows(self, rows: int) -> None:
        self.host.rows = self.host.engine.slots = rows


class RayEngine(Engine):
    """An engine whose rows run on other machines. A context manager; leaving it ends the replicas.

    Args:
        model: the model, which every replica loads from its own disk or from the Hub.
        plan: how many replicas there are and what each reserves; the address of a running cluster, "auto" for the one
            that this machine belongs to, None to start one on this machine.
        rows: slots of each replica.

    Raises:
        Steer2EditError: Ray is not installed, or no cluster answers.
    """

    def __init__(
        self,
        model: Model,
        plan: EnginePlan,
        *,
        rows: int = 64,
    ):
        try:
            import ray
        except ImportError:
            raise Steer2EditError(
                "spreading over machines needs Ray", got="no such module", fix="pip install 'steer2edit[ray]'"
            ) from None
        self._ray = ray
        if plan.address and ":" in plan.address:
            _check_address(plan.address)
        self._ours = not ray.is_initialized()
        if self._ours:
            try:
                ray.init(
                    address=plan.address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False
                )
            except ConnectionError as error:
                raise _no_cluster(plan.address, error) from None
        self.tokenizer, self.chat = load_tokenizer(model), model.chat
        self.rows_on_stream = self.measures_prompts = plan.name == "transformers"
        self._slots = rows
        self._check_room(plan)
        actor: Any = ray.remote(Replica).options(
            num_cpus=plan.cpus, num_gpus=plan.gpus, max_restarts=-1, max_task_retries=3, scheduling_strategy="SPREAD"
        )
        sections = model.model_dump(mode="json"), plan.model_dump(mode="json")
        self._replicas = [actor.remote(*sections, rows) for _ in range(plan.replicas)]

    def _check_room(self, plan: EnginePlan) -> None:
        """Raises Steer2EditError if the cluster is too small; Ray itself would wait silently."""
        total = self._ray.cluster_resources()
        for name, each in (("CPU", plan.cpus), ("GPU", plan.gpus)):
            if each * plan.replicas > total.get(name, 0):
                raise Steer2EditError(
                    "the Ray cluster is too small",
                    got=f"{total.get(name, 0):g} {name}s, {each * plan.replicas:g} for {plan.replicas} replicas",
                    fix=f"Lower engine.replicas or engine.{name.lower()}s, or add nodes.",
                )
            if each * plan.replicas > (free := self._ray.available_resources().get(name, 0)):
                say(f"  waiting for the Ray cluster: {free:g} of its {total[name]:g} {name}s are free")

    @functools.cached_property
    def context(self) -> int | None:
        return self._get([self._replicas[0].context.remote()])[0]

    @property
    def slots(self) -> int:
        return self._slots

    @slots.setter
    def slots(self, rows: int) -> None:
        if rows != self._slots:
            self._slots = rows
            self._get([replica.set_rows.remote(rows) for replica in self._replicas])

    def generate(
        self,
        requests: Sequence[Request],
        table: Sequence[Intervention],
        max_new_tokens: int,
        progress: Progress | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Like TransformersEngine.generate. Neighbouring requests, which may share a prefix, go to one replica."""
        held = self._ray.put(list(table))
        parts = _parts(len(requests), len(self._replicas))
        results = self._get(
            [
                replica.generate.remote([requests[i] for i in part], held, max_new_tokens, sampling, stop)
                for replica, part in zip(self._replicas, parts, strict=False)
            ],
            [len(part) for part in parts],
            progress,
        )
        if results:
            self.slots = min(slots for _, slots in results)
        return [answer for answers, _ in results for answer in answers]

    def losses(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        table: Sequence[Intervention],
        progress: Progress | None = None,
    ) -> Losses:
        held = self._ray.put(list(table))
        parts = _parts(len(pairs), len(self._replicas))
        results = self._get(
            [
                replica.losses.remote([pairs[i] for i in part], held)
                for replica, part in zip(self._replicas, parts, strict=False)
            ],
            [len(part) * (1 + len(table)) for part in parts],
            progress,
        )
        if not results:
            return Losses(torch.zeros(0, len(table)), torch.zeros(0, len(table)), torch.zeros(0))
        return _joined(results)

    def prompt_losses(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        prompts: Sequence[tuple[int, ...]],
        progress: Progress | None = None,
    ) -> Losses:
        parts = _parts(len(pairs), len(self._replicas))
        results = self._get(
            [
                replica.prompt_losses.remote([pairs[i] for i in part], [prompts[i] for i in part])
                for replica, part in zip(self._replicas, parts, strict=False)
            ],
            [len(part) for part in parts],
            progress,
        )
        return _joined(results)

    def run_pass(self, plan: Plan, batch_tokens: int, progress: Progress | None = None) -> PassSums:
        """The probe's pass, divided; the parts' fp64 sums are added up."""
        held = self._ray.put(plan)
        # A part has every n-th response by length, so that the parts take equally long.
        order = sorted(range(len(plan.spans)), key=lambda i: -len(plan.spans[i].ids))
        parts = [part for n in range(len(self._replicas)) if (part := order[n :: len(self._replicas)])]
        results = self._get(
            [
                replica.run_pass.remote(held, part, batch_tokens)
                for replica, part in zip(self._replicas, parts, strict=False)
            ],
            [len(part) for part in parts],
            progress,
        )
        return functools.reduce(operator.add, results)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs `function(model, *arguments)` on the first replica."""
        return self._get([self._replicas[0].call.remote(function, *arguments)])[0]

    @property
    def engine(self) -> RayEngine:
        return self

    def where(self) -> dict[str, str]:
        """Nothing runs in this process."""
        return {}

    def close(self) -> None:
        for replica in self._replicas:
            self._ray.kill(replica)
        if self._ours:
            self._ray.shutdown()
        self._replicas = []

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _get(self, parts: Sequence[Any], sizes: Sequence[int] = (), progress: Progress | None = None) -> list[Any]:
        """The replicas' results, in order. A Steer2EditError of a replica is raised here unchanged."""
        waiting, done = list(parts), 0
        try:
            while waiting:
                ready, waiting = self._ray.wait(waiting)
                self._ray.get(ready)
                if progress and sizes:
                    done += sum(sizes[parts.index(part)] for part in ready)
                    progress(done, sum(sizes))
            return self._ray.get(list(parts))
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, Steer2EditError):
                raise cause from None
            raise
        except self._ray.exceptions.RayActorError as error:
            raise Steer2EditError(
                "a replica died, and died again when its work was retried",
                got=str(error).splitlines()[0],
                fix="Look at Ray's logs; too little memory is the usual cause. The same command resumes from here.",
            ) from None


def _joined(results: Sequence[Losses]) -> Losses:
    def joined(name: str) -> Any:
        return torch.cat([getattr(result, name) for result in results])

    losses = Losses(joined("kl"), joined("nll"), joined("base_nll"))
    if any(result.greedy is None or result.base_greedy is None for result in results):
        return losses
    return dataclasses.replace(losses, greedy=joined("greedy"), base_greedy=joined("base_greedy"))


def _check_address(address: str) -> None:
    """Raises Steer2EditError if nothing listens there; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str | None, error: Exception) -> Steer2EditError:
    return Steer2EditError(
        "no Ray cluster answers",
        got=f"{address}: {error}",
        fix="Start one with `ray start --head`, or correct the address.",
    )


def _parts(count: int, parts: int) -> list[range]:
    """Splits a count into ranges whose sizes differ by one at most; none is empty."""
    ends = [count * i // parts for i in range(parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(ends) if b > a]
