"""What edits are compared with: system prompts, steering after one layer, and the stream moved along a direction."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import steer2edit as s2e
from baseline_bench import ITEMS, QUESTIONS, SYSTEM, Prompting, _bench, _study, a_recipe
from conftest import make_pico, make_tokenizer, make_traces
from runs import a_bench, make_scores, tiny_recipe
from steer2edit.behaviours.base import Item
from steer2edit.edits import Scores
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import FileError
from steer2edit.method.intervention import NOTHING, Intervention
from steer2edit.method.rivals import RIVALS
from steer2edit.models.hooks import Interventions
from steer2edit.probing.probe import Probe
from steer2edit.searching.candidates import (
    BASE,
    BASELINES,
    DEPTHS,
    TITLES,
    Candidate,
    Trial,
    asked,
    directed,
    edited,
    intervention_of,
    steered_at,
    tried_layers,
)


class World(NamedTuple):
    """A model of six layers, and what was found out about it. Nobody changes it."""

    model: Any
    tokenizer: Any
    probe: Probe
    scores: dict[str, Scores]

    def engine(self) -> TransformersEngine:
        return TransformersEngine(self.model, self.tokenizer)

    def vector(self, layer: int) -> Tensor:
        means = self.probe.residual[layer]
        return means["positive"] - means["negative"]


@pytest.fixture(scope="module")
def world() -> World:
    model, tokenizer = make_pico(num_hidden_layers=6), make_tokenizer()
    probe = s2e.collect(model, tokenizer, *make_traces())
    return World(model, tokenizer, probe, {"full": s2e.score(model, probe)})


# What they are ------------------------------------------------------------------------------------------------------


def test_a_baseline_is_named_after_its_setting() -> None:
    assert asked(1, SYSTEM) == Candidate("system-1", "system", {"system": SYSTEM})
    assert steered_at(2, 0.5) == Candidate("layer-2-0.5", "layer", {"layer": 2, "gamma": 0.5})
    assert directed(2, 0.5) == Candidate("direction-2-0.5", "direction", {"layer": 2, "gamma": 0.5})
    assert [*TITLES] == ["base", *BASELINES, *RIVALS, "lora", "fine_tuning", "edit"]
    for candidate in (asked(0, SYSTEM), steered_at(2, 0.5), directed(2, 0.5)):
        trial = Trial(candidate, {"refusal": (1.0, 0.0)}, "0")
        assert Trial.from_json(json.loads(json.dumps(trial.to_json()))) == trial


def test_each_baseline_is_the_intervention_that_it_names(world: World) -> None:
    assert intervention_of(asked(0, SYSTEM), world.scores) is NOTHING
    layer = intervention_of(steered_at(2, 0.5), world.scores, world.probe)
    assert (layer.name, list(layer.terms)) == ("layer-2-0.5", ["2.residual"])
    term = layer.terms["2.residual"]
    assert term.a is term.u is None
    torch.testing.assert_close(term.b, 0.5 * world.vector(2))

    direction = intervention_of(directed(2, 0.5), world.scores, world.probe)
    assert (direction.name, list(direction.terms)) == ("direction-2-0.5", [f"{i}.residual" for i in range(6)])
    v = world.vector(2) / world.vector(2).norm()
    for i in range(6):
        term, mean = direction.terms[f"{i}.residual"], world.probe.residual[i]["positive"]
        torch.testing.assert_close(term.u @ term.a, -0.5 * torch.outer(v, v))
        torch.testing.assert_close(term.b, 0.5 * float(v @ mean) * v)


@pytest.mark.parametrize("layers", [1, 2, 3, 6, 30, 61])
def test_the_layers_that_are_tried_lie_in_the_middle_of_the_model(layers: int, world: World) -> None:
    means = world.probe.residual[0]
    probe = Probe(world.probe.sites, {}, {}, {}, {}, dict.fromkeys(range(layers), means))
    found = tried_layers(probe)
    assert found == sorted(set(found))
    assert 1 <= len(found) <= len(DEPTHS)
    assert set(found) == {round(depth * (layers - 1)) for depth in DEPTHS}
    assert tried_layers(Probe(world.probe.sites, {}, {}, {})) == []


def stream(model: Any, ids: Tensor, intervention: Intervention) -> list[Tensor]:
    """What the residual stream holds after every layer, behind the intervention."""
    seen: list[Tensor] = []
    with Interventions(model, [intervention]), torch.no_grad():
        handles = [layer.register_forward_hook(lambda m, x, out: seen.append(out[0])) for layer in model.model.layers]
        model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
    return seen


def test_a_direction_of_strength_1_sets_the_coordinate_to_the_positive_mean_after_every_layer(world: World) -> None:
    ids = torch.randint(3, 300, (1, 11), generator=torch.Generator().manual_seed(1))
    for layer in tried_layers(world.probe):
        v = world.vector(layer) / world.vector(layer).norm()
        whole = stream(world.model, ids, intervention_of(directed(layer, 1.0), world.scores, world.probe))
        assert len(whole) == 6
        for i, x in enumerate(whole):
            told = float(v @ world.probe.residual[i]["positive"])
            torch.testing.assert_close(x @ v, torch.full((11,), told), rtol=0, atol=2e-5)
        # Half the strength goes half the way; nothing moves across the direction.
        base = stream(world.model, ids, NOTHING)[0]
        half = stream(world.model, ids, intervention_of(directed(layer, 0.5), world.scores, world.probe))[0]
        told = float(v @ world.probe.residual[0]["positive"])
        torch.testing.assert_close(half @ v, (base @ v + told) / 2, rtol=0, atol=2e-5)
        for x in (half, whole[0]):
            across = (x - base) - torch.outer((x - base) @ v, v)
            assert float(across.abs().max()) < 2e-5
            assert float((x - base).abs().max()) > 0.01


# On the bench -------------------------------------------------------------------------------------------------------


@contextmanager
def by_hand(model: Any, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """The stream after every layer is changed by hooks of the test's own."""
    handles = [
        layer.register_forward_hook(lambda module, args, out, i=i: change(i, out))
        for i, layer in enumerate(model.model.layers)
    ]
    yield
    for handle in handles:
        handle.remove()


def changes(world: World, candidate: Candidate) -> Callable[[int, Tensor], Tensor]:
    """What a candidate is to do to the stream after each layer, by its definition."""
    layer, gamma = candidate.config["layer"], candidate.config["gamma"]
    v = world.vector(layer)
    if candidate.kind == "layer":
        return lambda i, x: x + gamma * v if i == layer else x
    v = v / v.norm()
    return lambda i, x: x + gamma * (float(v @ world.probe.residual[i]["positive"]) - x @ v)[..., None] * v


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_a_baseline_answers_and_costs_what_it_does_to_the_model(
    system: str | None, world: World, tmp_path: Path
) -> None:
    recipe = tiny_recipe(behaviour__system=system, evaluation__new_tokens=6)
    tried = [BASE, asked(0, SYSTEM), steered_at(2, 0.7), directed(3, 1.5), edited(0.1, None, 0.2)]
    bench = a_bench(world.engine(), world.scores, ITEMS, recipe, tmp_path / "j", QUESTIONS, world.probe)
    rows = {trial.candidate.id: trial for trial in bench.run(tried, "0")}
    texts = dict(zip(rows, bench.outcomes(tried, "0"), strict=True))

    engine = world.engine()
    instructed = SYSTEM if system is None else f"{system}\n\n{SYSTEM}"

    def answers(asking: str | None) -> list[str]:
        requests = [Request(engine.tokens(item.messages(asking))) for item in ITEMS]
        return [answer.text for answer in engine.generate(requests, [NOTHING], 6)]

    told = {"base": answers(system), "system-0": answers(instructed)}
    for candidate in tried[2:4]:
        with by_hand(world.model, changes(world, candidate)):
            told[candidate.id] = answers(system)
    for name, said in told.items():
        assert [outcome.text for (outcome,) in texts[name]] == said, name
        assert (said != told["base"]) == (name != "base")

    # KL and the rise of the NLL on the original model's own answers.
    assert len(bench.own) == 2
    for i, (item, answer) in enumerate(bench.own):

        def log_of(asking: str | None, item: Item = item, answer: tuple[int, ...] = answer) -> Tensor:
            prompt = engine.tokens(item.messages(asking))
            with torch.no_grad():
                logits = world.model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
            return logits.double().log_softmax(-1)[len(prompt) - 1 : -1]

        base, others = log_of(system), {"system-0": log_of(instructed)}
        for candidate in tried[2:4]:
            with by_hand(world.model, changes(world, candidate)):
                others[candidate.id] = log_of(system)
        at = range(len(answer))
        for name, other in others.items():
            kl = float((base.exp() * (base - other)).sum(-1).mean())
            rise = float((base - other)[at, answer].mean())
            assert rows[name].values["utility_loss"][i] == pytest.approx(kl, abs=2e-4)
            assert rows[name].values["nll_rise"][i] == pytest.approx(rise, abs=2e-4)
            assert kl > 0.001
    assert list(rows["base"].values["utility_loss"]) == [0.0, 0.0]


def test_a_system_prompt_stands_after_the_behaviours_own_and_before_every_prompt(tmp_path: Path) -> None:
    for system, before in ((None, ""), ("Be kind.", "Be kind.\n")):
        engine = Prompting()
        recipe = tiny_recipe(behaviour__system=system, evaluation__batch=100)
        bench = a_bench(engine, {"full": make_scores()}, ITEMS, recipe, tmp_path / f"{system}")
        own = len(engine.asked)
        assert [prompt for prompt, _ in engine.asked] == [before + item.text for item in ITEMS if item.kind == "benign"]
        base, row = bench.run([BASE, asked(0, SYSTEM)], "0")
        joined = SYSTEM if system is None else f"Be kind.\n\n{SYSTEM}"
        told = [(before + item.text, "base") for item in ITEMS]
        assert engine.asked[own:] == told + [(f"{joined}\n{item.text}", "base") for item in ITEMS]
        benign = [item.text for item in ITEMS if item.kind == "benign"]
        # The original model's answers, scored after the other prompt.
        assert engine.under == [(before + p, f"An answer to {before + p}", f"{joined}\n{p}") for p in benign]
        kl = [len(f"{joined}\n{p}") / 100 for p in benign]
        assert list(row.values["utility_loss"]) == pytest.approx(kl)
        assert list(row.values["nll_rise"]) == pytest.approx([x / 2 for x in kl], abs=1e-6)
        assert (base.mean("utility_loss"), base.mean("nll_rise")) == (0.0, 0.0)
        assert row.mean("accuracy") is None


def test_under_a_system_prompt_the_choices_are_compared_after_it(world: World, tmp_path: Path) -> None:
    bench = a_bench(world.engine(), world.scores, ITEMS, tiny_recipe(), tmp_path / "j", QUESTIONS, world.probe)
    seen: list[tuple[Item, Any]] = []
    tried = [BASE, asked(0, SYSTEM), steered_at(2, 0.7), directed(3, 1.0)]
    chosen, base = bench._choices(tried, "0", None)
    engine = world.engine()
    for q, question in enumerate(QUESTIONS):
        for asking, rows in ((None, chosen[0]), (SYSTEM, chosen[1])):
            prompt = engine.tokens(question.messages(asking))
            # A choice ends as a turn does, and all of its own tokens count.
            ids = [tuple(world.tokenizer(choice, add_special_tokens=False)["input_ids"]) for choice in question.choices]
            told = engine.losses([(prompt, choice) for choice in ids], []).base_nll.tolist()
            (outcome,) = rows[q]
            assert outcome.nll == pytest.approx(told, abs=1e-4)
            assert outcome.lengths == tuple(map(len, ids))
            seen.append((question, outcome))
        assert base[q][0].nll == pytest.approx(chosen[0][q][0].nll)
    assert seen[0][1].nll != pytest.approx(seen[1][1].nll, abs=0.01)
    for candidate, rows in zip(tried[2:], chosen[2:], strict=True):
        with by_hand(world.model, changes(world, candidate)):
            again = a_bench(world.engine(), world.scores, ITEMS, tiny_recipe(), tmp_path / candidate.id, QUESTIONS)
            told_rows, _ = again._choices([BASE], "0", None)
        for (outcome,), (told_outcome,) in zip(rows, told_rows[0], strict=True):
            assert outcome.nll == pytest.approx(told_outcome.nll, abs=2e-4)
            assert outcome.lengths == told_outcome.lengths
    (trial,) = bench.run([asked(0, SYSTEM)], "0")
    likeliest = [outcome.nll.index(min(outcome.nll)) for (outcome,) in chosen[1]]
    right = [float(number == question.target) for number, question in zip(likeliest, QUESTIONS, strict=True)]
    assert list(trial.values["accuracy"]) == right


TRIED = [BASE, asked(0, SYSTEM), asked(1, "Decline."), steered_at(2, 0.5), directed(1, 1.0), edited(0.1, None, 0.2)]


def test_a_journal_cut_after_any_line_gives_the_rows_of_an_unbroken_bench(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    rows = _bench(Prompting(), whole).run(TRIED, "0")
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    made = [(row["round"], row["what"]) for row in map(json.loads, lines) if row["what"] != "answers"]
    assert made == [
        ("0", "losses"),
        ("0 system-0", "losses"),
        ("0 system-1", "losses"),
        ("0 choices", "losses"),
        ("base choices", "nll"),
        ("base choices system-0", "nll"),
        ("base choices system-1", "nll"),
    ]
    for kept in range(len(lines) + 1):
        journal = tmp_path / f"cut-{kept}"
        journal.write_text("".join(lines[:kept]), encoding="utf-8")
        engine = Prompting()
        assert _bench(engine, journal).run(TRIED, "0") == rows
        assert journal.read_text(encoding="utf-8") == whole.read_text(encoding="utf-8")
        if kept == len(lines):
            assert (engine.asked, engine.scored, engine.under) == ([], [], [])
    # Without a model, and without scores and probe, the journal has it all.
    assert a_bench(None, {}, ITEMS, tiny_recipe(evaluation__batch=5), whole, QUESTIONS).run(TRIED, "0") == rows


def test_another_system_prompt_under_the_same_name_is_asked_anew(tmp_path: Path) -> None:
    engine = Prompting()
    first = _bench(engine, tmp_path / "j").run([BASE, asked(0, SYSTEM)], "0")
    count = len(engine.under)
    again = _bench(engine, tmp_path / "j").run([BASE, asked(0, "Decline, whatever is asked.")], "0")
    assert len(engine.under) == 2 * count
    assert again[1].values["utility_loss"] != first[1].values["utility_loss"]
    with pytest.raises(FileError, match="answers to something else"):
        a_bench(None, {}, ITEMS, tiny_recipe(evaluation__batch=5), tmp_path / "j", QUESTIONS).run(TRIED[:2], "0")


def test_the_base_is_compared_with_itself_wherever_it_stands(tmp_path: Path) -> None:
    rows = _bench(Prompting(), tmp_path / "j").run([*TRIED[1:], BASE], "0")
    assert rows[-1].candidate == BASE
    assert (rows[-1].mean("utility_loss"), rows[-1].mean("accuracy_loss")) == (0.0, 0.0)
    first = _bench(Prompting(), tmp_path / "k").run(TRIED, "0")
    by_id = {trial.candidate.id: trial.mean("accuracy_loss") for trial in first}
    assert {trial.candidate.id: trial.mean("accuracy_loss") for trial in rows} == by_id


# In a search --------------------------------------------------------------------------------------------------------


def test_every_method_gets_as_many_configurations_as_there_are_edits(world: World, tmp_path: Path) -> None:
    recipe = a_recipe()
    bench = a_bench(world.engine(), world.scores, ITEMS, recipe, tmp_path / "j", probe=world.probe)
    seen: list[tuple[int, int]] = []
    study = _study(recipe, bench, progress=lambda done, of: seen.append((done, of)))
    layers = tried_layers(world.probe)
    assert len(layers) == 2
    ids = [trial.candidate.id for trial in study.trials]
    assert (ids[0], len(ids), study.discarded) == ("base", len(set(ids)), [])
    counts = {kind: len(study.of_kind(kind)) for kind in (*BASELINES, "edit")}
    assert counts == {"system": 3, "steering": 4, "layer": 4, "direction": 4, "edit": 4}
    assert study.evaluations == {kind: count * len(ITEMS) for kind, count in counts.items()}
    assert [trial.candidate.config["system"] for trial in study.of_kind("system")] == recipe.behaviour.asking()
    for kind in ("layer", "direction"):
        at = [trial.candidate.config["layer"] for trial in study.of_kind(kind)]
        assert sorted(at) == sorted(layers * 2)
        # Their KL spans what the recipe says, as that of steering does.
        for layer in layers:
            costs = [t.mean("utility_loss") for t in study.of_kind(kind) if t.candidate.config["layer"] == layer]
            assert costs == pytest.approx([0.02, 1.0], rel=0.3)
    costs = [t.mean("utility_loss") for t in study.of_kind("steering")]
    assert costs == pytest.approx([0.02, 0.0737, 0.271, 1.0], rel=0.3)
    assert study.rounds == {"0": ids}
    assert study.scale is not None
    assert set(study.scale["others"]) == {f"{TITLES[k]} {layer}" for k in ("layer", "direction") for layer in layers}
    assert {id for points in study.scale["others"].values() for id, _ in points} == {
        id for id in ids if id.startswith(("layer", "direction"))
    }
    assert {of for _, of in seen} == {len(ids) * bench.steps}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_with_everything_to_be_found_there_are_as_many_of_each_as_edits_were_found(
    world: World, tmp_path: Path
) -> None:
    recipe = a_recipe(search__rho_attn="auto", search__rho_mlp="auto", search__points=2)
    bench = a_bench(world.engine(), world.scores, ITEMS, recipe, tmp_path / "j", probe=world.probe)
    study = _study(recipe, bench)
    counts = {kind: len(study.of_kind(kind)) for kind in ("edit", "steering", "layer", "direction")}
    assert study.scale is not None
    # The points of each block type alone and of both at once, of which two may be one configuration.
    points = sum(len(some) for some in study.scale["edits"].values())
    assert points >= 4
    assert counts == {"edit": counts["edit"], "steering": points, "layer": points, "direction": points}
    assert points - 1 <= counts["edit"] <= points
