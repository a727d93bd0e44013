"""Rivals of the edit in a search: what each is inside the model, at equal KL, with equal budgets, and to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import steer2edit as s2e
from conftest import SENTENCES, make_pico, make_tokenizer
from runs import a_bench, bundled, make_scores, save_pico, tiny_recipe
from steer2edit.edits import Edit, Scores
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import EditError, ProbeError, RecipeError
from steer2edit.method.rivals import RIVALS, WITH_EVIDENCE, null_space_row, rosi_row
from steer2edit.pipeline.keys import rival_files, stage_keys
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import run_all
from steer2edit.probing.probe import Probe
from steer2edit.probing.rivals import rival_edit
from steer2edit.recipe import Recipe
from steer2edit.report.page import describe
from steer2edit.searching.bench import Bench
from steer2edit.searching.candidates import BASE, TITLES, intervention_of, rival, tried_layers
from steer2edit.searching.plan import Search
from steer2edit.searching.rounds import run_study

ITEMS = bundled("validation", {"harmful": 2, "benign": 2, "borderline": 1})


class World(NamedTuple):
    """A model of six layers, what was found out about it, and its rivals. Nobody changes it."""

    model: Any
    tokenizer: Any
    probe: Probe
    scores: dict[str, Scores]
    rivals: dict[str, Edit]

    def bench(self, recipe: Recipe, journal: Path) -> Bench:
        bench = a_bench(
            TransformersEngine(self.model, self.tokenizer), self.scores, ITEMS, recipe, journal, probe=self.probe
        )
        bench.rivals = self.rivals
        return bench


@pytest.fixture(scope="module")
def world() -> World:
    model, tokenizer = make_pico(num_hidden_layers=6), make_tokenizer()
    items = bundled("probe", {"harmful": 4, "benign": 4})
    traces = [
        s2e.Trace(item.prompt, SENTENCES[i % 5], "positive" if item.kind == "harmful" else "negative", group=item.kind)
        for i, item in enumerate(items)
    ]
    probe = s2e.collect(model, tokenizer, traces, preserve=["benign"])
    scores = s2e.score(model, probe)
    return World(
        model, tokenizer, probe, {"full": scores}, {kind: rival_edit(model, probe, scores, kind) for kind in RIVALS}
    )


def weight_of(model: Any, key: str) -> torch.Tensor:
    layer, block = key.split(".")
    of_layer = model.model.layers[int(layer)]
    return (of_layer.self_attn.o_proj if block == "attn" else of_layer.mlp.down_proj).weight.detach()


def test_a_rival_is_named_after_its_settings() -> None:
    assert rival("rosi", 12.5, layer=3).id == "rosi-3-12.5"
    assert rival("null_space", 0.5).config == {"gamma": 0.5}
    assert rival("llm_va", 0.5, layers="2-4").id == "llm_va-0.5-layers-2-4"


def test_rosi_is_the_direction_after_a_layer_times_the_mean_row_of_every_weight(world: World) -> None:
    found = intervention_of(rival("rosi", 2.0, layer=4), world.scores, world.probe, world.rivals)
    assert list(found.terms) == [site.key for site in world.probe.sites]
    means = world.probe.residual[4]
    direction = means["positive"] - means["negative"]
    direction = direction / direction.norm()
    for key, term in found.terms.items():
        assert term.b is None
        told = 2.0 * torch.outer(direction, rosi_row(weight_of(world.model, key)))
        torch.testing.assert_close(term.u @ term.a, told, rtol=1e-4, atol=1e-6)


def test_the_rivals_with_evidence_edit_the_heads_of_the_layers_that_they_are_given(world: World) -> None:
    evidence = world.probe.evidence
    assert evidence is not None
    for kind in WITH_EVIDENCE:
        found = intervention_of(rival(kind, 0.5, layers="2-4"), world.scores, world.probe, world.rivals)
        assert list(found.terms) == ["2.attn", "3.attn", "4.attn"]
        whole = intervention_of(rival(kind, 0.5), world.scores, world.probe, world.rivals)
        assert list(whole.terms) == [f"{i}.attn" for i in range(6)]
    site = world.scores["full"].sites["3.attn"]
    row = null_space_row(evidence.of("3.attn"), evidence.weights, evidence.positive, site.v_norm)
    term = intervention_of(rival("null_space", 0.5), world.scores, world.probe, world.rivals).terms["3.attn"]
    torch.testing.assert_close(term.u @ term.a, 0.5 * torch.outer(site.u, row), rtol=1e-4, atol=1e-6)


def test_llm_va_makes_refusal_follow_what_is_read_at_the_last_token_of_the_prompt(world: World) -> None:
    """At strength 1 the outputs' coordinate along v̂ tells harmful from benign prompts, with the spread that it had."""
    evidence, key = world.probe.evidence, "3.attn"
    assert evidence is not None
    last = torch.tensor([row.part == 0 for row in evidence.rows])
    h, u = evidence.of(key)[last], world.scores["full"].sites[key].u
    term = intervention_of(rival("llm_va", 1.0), world.scores, world.probe, world.rivals).terms[key]
    W = weight_of(world.model, key)
    before, after = h @ W.T @ u, h @ (W + term.u @ term.a).T @ u
    positive = evidence.positive[last]
    assert float(after[positive].mean() - after[~positive].mean()) > 0.5 * float(after.std())
    assert float(after.std(correction=0)) == pytest.approx(float(before.std(correction=0)), rel=1e-3)


@pytest.mark.parametrize("kind", RIVALS)
def test_a_rivals_file_and_its_baked_weights_are_the_rival(kind: str, world: World, tmp_path: Path) -> None:
    edit = world.rivals[kind].with_strength(0.5)
    edit.save(tmp_path / "rival.safetensors")
    again = Edit.load(tmp_path / "rival.safetensors")
    assert again.id == edit.id
    ids = torch.tensor([world.tokenizer("How do I bake?")["input_ids"]])
    with torch.no_grad():
        plain = world.model(ids).logits
        with again.applied(world.model):
            served = world.model(ids).logits
        again.apply(world.model)
        baked = world.model(ids).logits
        again.revert(world.model)
    torch.testing.assert_close(served, baked, rtol=1e-4, atol=1e-4)
    assert float((plain - baked).abs().max()) > 1e-4


def test_a_rival_says_what_it_lacks(world: World) -> None:
    scores = world.scores["full"]
    with pytest.raises(EditError, match="no such rival"):
        rival_edit(world.model, world.probe, scores, "rose")  # type: ignore[arg-type]
    with pytest.raises(EditError, match="no evidence for llm_va"):
        rival_edit(world.model, world.probe, make_scores(), "llm_va")
    with pytest.raises(ProbeError, match="residual stream"):
        rival_edit(world.model, world.probe, scores, "rosi", layer=6)


# In a search --------------------------------------------------------------------------------------------------------


def rivals_recipe(model: str = "nowhere", **changes: Any) -> Recipe:
    plain = {
        "search__rho_attn": [0.05, 0.1, 0.2, 0.3],
        "search__alpha": [0.0],
        "search__baselines": list(RIVALS),
        "search__span": [0.02, 0.3],
    }
    return tiny_recipe(model, **(plain | changes))


def test_rivals_are_off_unless_they_are_named() -> None:
    assert not {*RIVALS} & {*Search().baselines}
    assert (tiny_recipe().preserved, rival_files(tiny_recipe())) == ((), {})
    assert rivals_recipe().preserved == ("benign",)
    assert list(rival_files(rivals_recipe())) == list(RIVALS)
    assert rivals_recipe(search__baselines=["rosi"]).preserved == ()
    keys = [stage_keys(rivals_recipe(search__baselines=kinds)) for kinds in ([], ["rosi"])]
    assert keys[0]["probe"] == keys[1]["probe"]
    assert keys[0]["score"] != keys[1]["score"]


def test_a_recipe_must_say_what_a_rival_is_to_preserve() -> None:
    with pytest.raises(RecipeError, match=r"search.baselines cannot be used \(got: llm_va, and nothing to preserve\)"):
        rivals_recipe(search__baselines=["llm_va"], behaviour__negative=["harmful"])


def test_each_rival_gets_as_many_strengths_as_there_are_edits_at_the_same_kl(world: World, tmp_path: Path) -> None:
    recipe = rivals_recipe(search__layers=["1-3", "50%-100%"], search__rho_attn=[0.1, 0.2], search__steering=[0.2])
    study = run_study(world.bench(recipe, tmp_path / "j"), recipe.search, recipe.aim, recipe.seed)
    edits = len(study.of_kind("edit"))
    assert edits == 4
    assert study.discarded == []
    assert {kind: len(study.of_kind(kind)) for kind in RIVALS} == dict.fromkeys(RIVALS, edits)
    assert {kind: study.evaluations[kind] for kind in RIVALS} == dict.fromkeys(RIVALS, edits * len(ITEMS))
    assert study.scale is not None
    layers = tried_layers(world.probe)
    names = {f"ROSI {layer}" for layer in layers}
    names |= {f"{TITLES[kind]}, layers {ranges}" for kind in WITH_EVIDENCE for ranges in ("1-3", "3-5")}
    assert set(study.scale["others"]) == names
    for kind in RIVALS:
        by_place: dict[Any, list[float | None]] = {}
        for trial in study.of_kind(kind):
            config = trial.candidate.config
            by_place.setdefault(config.get("layer", config.get("layers")), []).append(trial.mean("utility_loss"))
        assert all(costs == pytest.approx([0.02, 0.3], rel=0.35) for costs in by_place.values()), by_place


def test_a_rival_that_was_not_made_is_left_out_and_named(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = rivals_recipe(search__steering=[0.2])
    bench = world.bench(recipe, tmp_path / "j")
    bench.rivals = {}
    study = run_study(bench, recipe.search, recipe.aim, recipe.seed)
    assert {trial.candidate.kind for trial in study.trials} == {"base", "steering", "edit"}
    assert "LLM-VA is not tried: it was not made from the probe" in capsys.readouterr().err


def test_a_rival_has_no_budget_of_ours_to_change(world: World) -> None:
    with pytest.raises(EditError, match=r"this edit has no \(ρ, α\) to change .got: the variant rosi"):
        world.rivals["rosi"].with_budget(rho_attn=None, rho_mlp=0.5, alpha=0.0)


def test_rivals_mix_with_edits_in_one_batch_as_they_answer_alone(world: World, tmp_path: Path) -> None:
    recipe = rivals_recipe()
    tried = [BASE, rival("rosi", 20.0, layer=3), rival("llm_va", 1.0, layers="1-4"), rival("null_space", 2.0)]
    mixed = world.bench(recipe, tmp_path / "mixed")
    together = {trial.candidate.id: trial.values for trial in mixed.run(tried, "0")}
    for candidate in tried[1:]:
        (_, alone) = world.bench(recipe, tmp_path / candidate.id).run([BASE, candidate], "0")
        for name, values in alone.values.items():
            assert together[candidate.id][name] == pytest.approx(values, abs=1e-4), (candidate.id, name)


def test_a_run_with_every_rival_ends_in_a_report_with_a_row_for_each(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model")
    recipe = rivals_recipe(folder, search__rho_attn=[0.1, 0.3], search__baselines=["layer", *RIVALS])
    run = Run(tmp_path / "run", recipe)
    run_all(run)
    choice = json.loads((tmp_path / "run/choice.json").read_text(encoding="utf-8"))
    results = json.loads((tmp_path / "run/evaluation/results.json").read_text(encoding="utf-8"))
    report = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert list(results["systems"]) == ["base", "steering", "layer", *RIVALS, "edit"]
    for kind in RIVALS:
        assert choice["tried"][kind] >= 2
        assert f"| {TITLES[kind]} ({describe(choice[kind]['config'])}) | " in report
        assert f"- refusal (harmful), edit - {kind}: " in report
        assert TITLES[kind] in page
        assert f"kind-{kind}" in page
        assert Edit.load(tmp_path / f"run/rival-{kind}.safetensors").edited()
    before = (tmp_path / "run/manifest.json").read_bytes()
    run_all(Run(tmp_path / "run", recipe))
    assert (tmp_path / "run/manifest.json").read_bytes() == before
