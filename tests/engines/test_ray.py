"""Replicas on a Ray cluster of two local nodes, against the engine in this process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import steer2edit as s2e
from runs import bundled, save_pico, tiny_recipe
from steer2edit.engines.base import Request, Sampling
from steer2edit.engines.plan import EnginePlan, Model, load_section
from steer2edit.engines.ray import RayEngine, _parts
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import ProbeError, Steer2EditError
from steer2edit.files.reading import read_json, read_jsonl
from steer2edit.method.intervention import NOTHING
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import run_all
from steer2edit.probing.probe import Probe
from steer2edit.progress import be_quiet
from steer2edit.recipe import parse_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    found.add_node(num_cpus=2)
    yield found
    found.shutdown()


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(name=save_pico(tmp_path_factory.mktemp("model")), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def local(section: Model) -> TransformersEngine:
    return TransformersEngine(*load_section(section), rows=8, chat=section.chat)


@pytest.fixture(scope="module")
def spread(section: Model, cluster: Any) -> Iterator[RayEngine]:
    with RayEngine(section, EnginePlan(distributed="ray", address=cluster.address, replicas=2), rows=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def table(local: TransformersEngine) -> list[Any]:
    traces = [
        s2e.Trace(p.text, answer, label)
        for p in bundled("probe", {"harmful": 4})
        for answer, label in (("I cannot help with that.", "positive"), ("Easily: do this.", "negative"))
    ]
    scores = s2e.score(local.model, s2e.collect(local.model, local.tokenizer, traces, chat=local.chat))
    return [NOTHING, *(scores.edit(rho_attn=rho, rho_mlp=rho, alpha=0.1).intervention(str(rho)) for rho in (0.1, 0.2))]


def _requests(engine: Any, count: int = 10) -> list[Request]:
    prompts = bundled("validation", {"harmful": count})
    return [Request(engine.tokens(p.messages(None)), i % 3) for i, p in enumerate(prompts)]


def test_replicas_answer_as_the_engine_here_does(local: Any, spread: Any, table: list[Any]) -> None:
    requests = _requests(local)
    assert _requests(spread) == requests
    seen: list[tuple[int, int]] = []
    expected = spread.generate(requests, table, 12, lambda done, total: seen.append((done, total)))
    assert expected == local.generate(requests, table, 12)
    assert seen == [(5, 10), (10, 10)]
    assert spread.generate([], table, 12) == []


def test_replicas_draw_as_the_engine_here_does(local: Any, spread: Any, table: list[Any]) -> None:
    requests = [Request(r.ids, r.row, seed) for seed, r in enumerate(_requests(local))]
    warm = Sampling(1.0, 0.9, 40)
    answers = spread.generate(requests, table, 12, sampling=warm)
    assert answers == local.generate(requests, table, 12, sampling=warm)
    assert answers != local.generate(requests, table, 12)


def test_replicas_lie_on_both_nodes(spread: Any) -> None:
    import ray

    nodes = [ray.get(r.call.remote(lambda model: ray.get_runtime_context().get_node_id())) for r in spread._replicas]
    assert len(set(nodes)) == 2


def test_replicas_find_the_losses_that_the_engine_here_finds(local: Any, spread: Any, table: list[Any]) -> None:
    pairs = [
        (r.ids, a.ids) for r, a in zip(_requests(local, 5), local.generate(_requests(local, 5), table, 6), strict=True)
    ]
    here, there = local.losses(pairs, table[1:]), spread.losses(pairs, table[1:])
    assert here.kl.abs().max() > 1e-4
    for name in ("kl", "nll", "base_nll"):
        torch.testing.assert_close(getattr(there, name), getattr(here, name), rtol=1e-5, atol=1e-6)
    assert spread.losses([], table[1:]).kl.shape == (0, 2)


def test_replicas_find_the_losses_under_other_prompts_that_the_engine_here_finds(local: Any, spread: Any) -> None:
    assert spread.measures_prompts
    assert spread.rows_on_stream
    requests = _requests(local, 5)
    pairs = [(r.ids, a.ids) for r, a in zip(requests, local.generate(requests, [NOTHING] * 3, 6), strict=True)]
    prompts = [requests[i - 1].ids for i in range(5)]
    here, there = local.prompt_losses(pairs, prompts), spread.prompt_losses(pairs, prompts)
    assert here.kl.abs().max() > 1e-4
    for name in ("kl", "nll", "base_nll"):
        assert getattr(there, name).shape == getattr(here, name).shape
        torch.testing.assert_close(getattr(there, name), getattr(here, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("after", [0.0, 0.4])
def test_what_a_killed_replica_was_making_is_made_again(
    after: float, local: Any, spread: Any, table: list[Any]
) -> None:
    requests = _requests(local) * 30
    expected = local.generate(requests, table, 40)
    pid = spread.call(lambda model: os.getpid())
    killer = threading.Timer(after, os.kill, (pid, signal.SIGKILL))
    killer.start()
    if not after:
        killer.join()
    assert spread.generate(requests, table, 40) == expected
    killer.join()
    assert spread.call(lambda model: os.getpid()) != pid


def test_an_error_of_ours_arrives_from_a_replica_as_it_was_raised(spread: Any) -> None:
    def raising(model: Any) -> None:
        from steer2edit.errors import ProbeError

        raise ProbeError("an activation is not finite", got="a trace", fix="Leave it out.")

    with pytest.raises(ProbeError, match=r"not finite \(got: a trace\)\. Leave it out\.") as error:
        spread.call(raising)
    assert (error.value.what, error.value.got, error.value.fix) == (
        "an activation is not finite",
        "a trace",
        "Leave it out.",
    )


def test_a_run_on_the_cluster_chooses_what_a_run_here_chooses(
    section: Model, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_quiet()
    changes = {"search__method": "tpe", "search__trials": 6, "search__at_once": 3}
    changes["search__baselines"] = ["system", "layer", "direction"]
    raw = tiny_recipe(section.name, **changes).model_dump(mode="json")
    raw["search"]["rho_attn"] = [0.1, 0.5]
    for name, engine in (("here", {}), ("there", {"distributed": "ray", "address": cluster.address})):
        run_all(Run(tmp_path / name, parse_recipe(raw | {"engine": engine})))
    here, there = (Probe.load(tmp_path / name / "probe.safetensors") for name in ("here", "there"))
    for side in ("inputs", "outputs", "residual"):
        assert getattr(here, side).keys() == getattr(there, side).keys() != set()
        for key, labels in getattr(here, side).items():
            for label, mean in labels.items():
                torch.testing.assert_close(getattr(there, side)[key][label], mean, rtol=0, atol=1e-5)
    assert here.counts == there.counts
    agree = [probe.provenance["halves_agree"] for probe in (here, there)]
    assert agree[0] == {block: pytest.approx(cosine, abs=1e-4) for block, cosine in agree[1].items()}
    ours, theirs = (read_json(tmp_path / name / "choice.json") for name in ("here", "there"))
    assert ours["edit"]["config"] == theirs["edit"]["config"]
    for kind in ("steering", "system", "layer", "direction"):
        assert ours[kind]["config"] == theirs[kind]["config"]
    trials = [read_jsonl(tmp_path / name / "search/trials.jsonl") for name in ("here", "there")]
    assert [t["id"] for t in trials[0]] == [t["id"] for t in trials[1]]
    for measure in ("refusal", "over_refusal", "over_refusal_borderline", "degenerate"):
        assert [t["values"][measure] for t in trials[0]] == [t["values"][measure] for t in trials[1]]


def test_more_replicas_than_the_cluster_holds_are_refused(section: Model, spread: Any) -> None:
    with pytest.raises(Steer2EditError, match=r"too small \(got: 4 CPUs, 5 for 5 replicas\)"):
        RayEngine(section, EnginePlan(distributed="ray", replicas=5))


def test_no_cluster_at_an_address_is_said(section: Model) -> None:
    started = time.monotonic()
    with pytest.raises(Steer2EditError, match=r"no Ray cluster answers .*127\.0\.0\.1:1"):
        RayEngine(section, EnginePlan(distributed="ray", address="127.0.0.1:1"))
    assert time.monotonic() - started < 60


def test_parts_are_neighbours_of_about_equal_size() -> None:
    for count in range(12):
        for parts in range(1, 6):
            found = _parts(count, parts)
            assert [i for part in found for i in part] == list(range(count))
            assert len(found) == min(count, parts)
            sizes = [len(part) for part in found]
            assert not sizes or max(sizes) - min(sizes) <= 1
