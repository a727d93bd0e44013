"""Models whose weights are elsewhere: on another device's memory or on disk, and fetched when a module runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import steer2edit as s2e
from conftest import make_tokenizer, make_traces
from families import make_family
from runs import save_pico, tiny_recipe
from steer2edit.edits import Edit
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import ModelError
from steer2edit.method.site import Site
from steer2edit.models.inventory import examine
from steer2edit.models.load import load_model
from steer2edit.models.selfcheck import self_check
from steer2edit.models.sites import find_sites
from steer2edit.models.weights import read_weight
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import load_results, run_all, run_stage
from steer2edit.probing.probe import Probe
from steer2edit.progress import be_quiet

CPU = torch.device("cpu")
EXACT = {"rtol": 0.0, "atol": 1e-6}


class Whole:
    """A model that is all in memory, its checkpoint, and what was made of it. Not to be changed."""

    def __init__(self, family: str, folder: Path):
        self.model, self.folder = make_family(family), folder
        self.model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        self.probe = s2e.collect(self.model, make_tokenizer(), *make_traces())
        self.scores = s2e.score(self.model, self.probe, expert_tokens=1)
        self.edit = self.scores.edit(rho_attn=0.3, rho_mlp=0.3, alpha=0.2)


@pytest.fixture(scope="module", params=["llama", "mixtral", "qwen3_moe", "gpt_oss"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(request.param, tmp_path_factory.mktemp("whole") / "base")


def fresh(whole: Whole) -> Any:
    return AutoModelForCausalLM.from_pretrained(whole.folder, dtype=torch.float32).eval()


def partly_on_disk(whole: Whole, folder: Path) -> Any:
    """The second layer is on disk, all else in memory."""
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"), "cpu")
    where: Any = {"device_map": {**places, "model.layers.1": "disk"}, "offload_folder": folder}
    return AutoModelForCausalLM.from_pretrained(whole.folder, dtype=torch.float32, **where).eval()


def in_memory_elsewhere(whole: Whole, folder: Path) -> Any:
    return accelerate.cpu_offload(fresh(whole), execution_device=CPU)


def all_on_disk(whole: Whole, folder: Path) -> Any:
    return accelerate.disk_offload(fresh(whole), folder, execution_device=CPU)


WAYS = {way.__name__: way for way in (partly_on_disk, in_memory_elsewhere, all_on_disk)}


@pytest.fixture(params=list(WAYS))
def offloaded(request: pytest.FixtureRequest, whole: Whole, tmp_path: Path) -> Any:
    return WAYS[request.param](whole, tmp_path / "offload")


def on_meta(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


def held(site: Site) -> str:
    return f"{site.module}.{site.parameter}"


def batch() -> Tensor:
    return torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=batch(), use_cache=False).logits


def under(edit: Edit, model: Any) -> Tensor:
    with edit.applied(model):
        return logits(model)


def same_probe(one: Probe, other: Probe) -> None:
    assert one.sites == other.sites
    assert one.counts == other.counts
    for side, expected in ((one.inputs, other.inputs), (one.outputs, other.outputs)):
        assert side.keys() == expected.keys()
        for key, means in side.items():
            for label, mean in means.items():
                torch.testing.assert_close(mean, expected[key][label], **EXACT)


def test_the_weights_are_elsewhere_and_the_sites_the_same(whole: Whole, offloaded: Any) -> None:
    sites = find_sites(offloaded)
    assert sites == find_sites(whole.model)
    away = on_meta(offloaded)
    assert {held(site) for site in sites if site.layer == 1} <= away
    assert torch.equal(logits(offloaded), logits(whole.model))


def test_a_weight_is_fetched_when_it_is_read_and_goes_back(whole: Whole, offloaded: Any) -> None:
    away = on_meta(offloaded)
    for site in find_sites(offloaded):
        assert torch.equal(read_weight(offloaded, site), read_weight(whole.model, site))
    assert on_meta(offloaded) == away


def test_the_probe_and_the_scores_are_those_of_the_model_in_memory(
    whole: Whole, offloaded: Any, tokenizer: Any, traces: Any
) -> None:
    probe = s2e.collect(offloaded, tokenizer, *traces)
    same_probe(probe, whole.probe)
    scores = s2e.score(offloaded, probe, expert_tokens=1)
    assert scores.sites.keys() == whole.scores.sites.keys()
    for key, site in scores.sites.items():
        torch.testing.assert_close(site.g, whole.scores.sites[key].g, **EXACT)
    assert scores.edit(rho_attn=0.3, rho_mlp=0.3, alpha=0.2).id == whole.edit.id


def test_an_edit_as_an_intervention_gives_the_logits_of_the_edited_model_in_memory(
    whole: Whole, offloaded: Any
) -> None:
    plain = logits(whole.model)
    baked = copy.deepcopy(whole.model)
    whole.edit.apply(baked)
    got = under(whole.edit, offloaded)
    assert float((got - plain).abs().max()) > 0.5
    torch.testing.assert_close(got, under(whole.edit, whole.model), **EXACT)
    torch.testing.assert_close(got, logits(baked), rtol=0, atol=1e-4)
    assert torch.equal(logits(offloaded), plain)


def test_an_offloaded_model_of_other_weights_is_not_the_edits_base(whole: Whole, offloaded: Any) -> None:
    other = Edit(**{**vars(whole.edit), "fingerprint": {k: 2 * v for k, v in whole.edit.fingerprint.items()}})
    with pytest.raises(ModelError, match="not the base"):
        under(other, offloaded)


def test_apply_refuses_a_weight_that_is_not_in_memory_and_changes_nothing_at_all(whole: Whole, offloaded: Any) -> None:
    plain, away = logits(offloaded), on_meta(offloaded)
    here = {name: p.detach().clone() for name, p in offloaded.named_parameters() if not p.is_meta}
    first = next(s.site for s in whole.edit.edited().values() if held(s.site) in away)
    with pytest.raises(ModelError) as caught:
        whole.edit.apply(offloaded)
    assert caught.value.what == f"the weight of {first.place} is not in memory"
    assert "meta device" in caught.value.got
    assert "edit.applied(model)" in caught.value.fix
    assert "edit.save_adapter" in caught.value.fix
    assert on_meta(offloaded) == away
    assert all(torch.equal(dict(offloaded.named_parameters())[name], was) for name, was in here.items())
    assert torch.equal(logits(offloaded), plain)
    torch.testing.assert_close(under(whole.edit, offloaded), under(whole.edit, whole.model), **EXACT)


def test_an_edit_of_the_layers_in_memory_alone_is_baked_in_and_taken_out(whole: Whole, tmp_path: Path) -> None:
    offloaded = partly_on_disk(whole, tmp_path / "offload")
    vectors = {key: whole.probe.outputs[key]["positive"] for key in ("0.attn", "0.mlp")}
    edit = s2e.score(whole.model, whole.probe, vectors=vectors, expert_tokens=1).edit(
        rho_attn=0.3, rho_mlp=0.3, alpha=0.2
    )
    assert {s.site.layer for s in edit.edited().values()} == {0}
    wanted, plain = under(edit, whole.model), logits(whole.model)
    edit.apply(offloaded)
    torch.testing.assert_close(logits(offloaded), wanted, rtol=0, atol=1e-4)
    edit.revert(offloaded)
    assert torch.equal(logits(offloaded), plain)


def test_the_self_check_and_the_examination_see_the_model_in_memory(whole: Whole, offloaded: Any) -> None:
    expected, found = self_check(whole.model, thorough=True), self_check(offloaded, thorough=True)
    assert found.interventions == expected.interventions
    assert found.norms == expected.norms == {}
    for name in ("least_moved", "moved_by_nothing", "heads", "unaccounted"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-6), name
    assert examine(offloaded)["sites"] == examine(whole.model)["sites"]
    assert examine(offloaded)["memory"] == examine(whole.model)["memory"]


def test_the_engine_generates_what_it_does_in_memory(whole: Whole, offloaded: Any, tokenizer: Any) -> None:
    requests = [Request(ids, row) for row in (0, 1) for ids in ((5, 9, 17, 30), (5, 9, 44), (5, 80))]
    table = [s2e.NOTHING, whole.edit.intervention()]
    expected = TransformersEngine(whole.model, tokenizer).generate(requests, table, 6)
    assert TransformersEngine(offloaded, tokenizer).generate(requests, table, 6) == expected
    assert [a.ids for a in expected[:3]] != [a.ids for a in expected[3:]]


def test_the_engine_scores_what_it_does_in_memory(whole: Whole, offloaded: Any, tokenizer: Any) -> None:
    pairs = [((5, 9, 17), (30, 44, 8)), ((5, 9), (61,))]
    table = [whole.edit.intervention()]
    expected = TransformersEngine(whole.model, tokenizer).losses(pairs, table)
    found = TransformersEngine(offloaded, tokenizer).losses(pairs, table)
    torch.testing.assert_close(found.kl, expected.kl, rtol=0, atol=1e-5)
    assert float(expected.kl.min()) > 1e-3


# Loading ------------------------------------------------------------------------------------------------------------


def test_load_model_spreads_a_model_over_the_memory_that_it_may_use_and_the_disk(
    whole: Whole, tmp_path: Path, traces: Any
) -> None:
    sizes = [p.numel() * p.element_size() for p in whole.model.model.layers[0].parameters()]
    outside = whole.model.model.embed_tokens.weight.numel() * 4
    room = {"cpu": f"{(2 * outside + sum(sizes) * 3 // 2) // 1000}KB"}
    model, tokenizer = load_model(
        whole.folder,
        dtype="float32",
        device_map="auto",
        max_memory=room,
        offload_folder=str(tmp_path / "offload"),
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert on_meta(model)
    assert not model.training
    same_probe(s2e.collect(model, tokenizer, *traces), whole.probe)
    torch.testing.assert_close(under(whole.edit, model), under(whole.edit, whole.model), **EXACT)
    engines = [TransformersEngine(m, tokenizer) for m in (model, whole.model)]
    one, other = (e.generate([Request((5, 9, 17))], [whole.edit.intervention()], 4) for e in engines)
    assert one == other


def test_a_map_that_says_where_each_module_goes_is_followed(whole: Whole, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    model, _ = load_model(whole.folder, dtype="float32", device_map=places, offload_folder=str(tmp_path / "off"))
    names = {name for name, _ in whole.model.named_parameters() if name.startswith("model.layers.0.")}
    assert on_meta(model) == names
    assert torch.equal(logits(model), logits(whole.model))


def test_a_map_with_a_place_that_is_none_is_refused_by_the_models_name(whole: Whole) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(whole.folder, device_map="everywhere")


# Recipes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet() -> Any:
    be_quiet()
    yield
    be_quiet(False)


def spread_recipe(folder: Path, offload: Path) -> Any:
    return tiny_recipe(
        save_pico(folder),
        model__device_map="auto",
        model__max_memory={"cpu": "150KB"},
        model__offload_folder=str(offload),
        search__rho_mlp=[None, 0.3],
    )


STAGES = ("traces", "probe", "score", "search", "edit", "export")


def test_a_recipe_runs_on_a_model_that_is_partly_on_disk_and_finds_the_same(tmp_path: Path, quiet: Any) -> None:
    spread = spread_recipe(tmp_path / "model", tmp_path / "offload")
    in_memory = tiny_recipe(str(tmp_path / "model"), search__rho_mlp=[None, 0.3])
    opened = Run(tmp_path / "spread", spread)
    assert {"cpu", "disk"} == set(opened.engine.model.hf_device_map.values())
    expected = Run(tmp_path / "whole", in_memory)
    for stage in STAGES:
        run_stage(opened, stage, "tiny")
        run_stage(expected, stage, "tiny")
    for name in ("traces.jsonl", "search/trials.jsonl", "choice.json"):
        assert opened.path(name).read_text() == expected.path(name).read_text(), name
    one, other = (Edit.load(run.path("edit.safetensors")) for run in (opened, expected))
    assert one.id == other.id
    same_probe(*(Probe.load(run.path("probe.safetensors")) for run in (opened, expected)))


def test_a_whole_recipe_runs_on_a_model_that_is_partly_on_disk(tmp_path: Path, quiet: Any) -> None:
    run = Run(tmp_path / "run", spread_recipe(tmp_path / "model", tmp_path / "offload"))
    run_all(run)
    assert all(run.is_whole(stage) for stage in (*STAGES, "evaluate", "report"))
    # What cannot be baked in cannot be compared, and the results say so.
    agreement = load_results(run.folder)["agreement"]
    assert set(agreement) == {"not_measured"}
    assert "is not in memory" in agreement["not_measured"]
