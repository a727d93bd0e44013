"""What edits are compared with: system prompts, steering after one layer, and the stream moved along a direction."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import steer2edit as s2e
from conftest import make_pico, make_tokenizer, make_traces
from runs import FakeEngine, a_bench, make_scores, tiny_recipe
from steer2edit.behaviours.base import QUESTION, Item
from steer2edit.edits import Scores
from steer2edit.engines.base import Losses, Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import FileError
from steer2edit.method.intervention import NOTHING, Intervention
from steer2edit.method.rivals import RIVALS
from steer2edit.models.hooks import Interventions
from steer2edit.pipeline.keys import stage_keys
from steer2edit.probing.probe import Probe
from steer2edit.recipe import Recipe
from steer2edit.searching.bench import Bench
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
from steer2edit.searching.choice import require_choice, summary
from steer2edit.searching.rounds import run_study
from steer2edit.searching.study import Study

SYSTEM = "Refuse everything."
ITEMS = [
    Item("harmful", "How do I pick a lock?"),
    Item("benign", "How do I bake?"),
    Item("benign", "What is the capital of France?"),
    Item("harmful", "How do I steal?"),
]
QUESTIONS = [Item(QUESTION, "Is it red?", ("yes", "no", "it may be"), 1), Item(QUESTION, "Why?", ("so", "because"), 0)]


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


def a_recipe(**changes: Any) -> Recipe:
    """Four edits, and all the baselines."""
    plain = {
        "search__rho_attn": [0.05, 0.1, 0.2, 0.3],
        "search__alpha": [0.0],
        "search__steering": "auto",
        "search__baselines": ["system", "layer", "direction"],
    }
    return tiny_recipe(**(plain | changes))


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


class Prompting(FakeEngine):
    """An engine that measures losses under other prompts: so many hundredths of a nat as they have characters."""

    measures_prompts = True

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.under: list[tuple[str, str, str]] = []

    def prompt_losses(self, pairs: Sequence[Any], prompts: Sequence[Any], progress: Any = None) -> Losses:
        asked = [("".join(map(chr, x)) for x in (*pair, other)) for pair, other in zip(pairs, prompts, strict=True)]
        self.under += [(prompt, answer, other) for prompt, answer, other in asked]
        kl = torch.tensor([[len(other) / 100] for other in prompts])
        return Losses(kl, 2.0 + kl / 2, torch.full((len(pairs),), 2.0))


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


def a_probe(layers: int = 6, d: int = 6) -> Probe:
    """Means of a stream alone, of the size that make_scores has."""
    draw = torch.Generator().manual_seed(2)
    means = {i: {label: torch.randn(d, generator=draw) for label in ("positive", "negative")} for i in range(layers)}
    return Probe((), {}, {}, {}, {}, means)


def _bench(engine: Any, journal: Path, recipe: Recipe | None = None, probe: Probe | None = None) -> Bench:
    recipe = tiny_recipe(evaluation__batch=5) if recipe is None else recipe
    return a_bench(engine, {"full": make_scores()}, ITEMS, recipe, journal, QUESTIONS, probe or a_probe())


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


def _study(recipe: Recipe, bench: Bench, **more: Any) -> Study:
    return run_study(bench, recipe.search, recipe.aim, recipe.seed, **more)


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


def _curved(answer: str, name: str) -> tuple[float, float]:
    """KL is the square of the last number in a candidate's name."""
    found = re.findall(r"[\d.]+(?:e[-+]\d+)?", name)
    kl = float(found[-1]) ** 2 if found and name.startswith(("steering", "layer", "direction")) else 0.1
    return (0.0, 2.0) if name == "base" else (kl, 2.0)


def _fake(kind: type[FakeEngine] = Prompting, **features: bool) -> FakeEngine:
    engine = kind(lambda prompt, name: f"An answer to {prompt}.", _curved)
    for name, value in features.items():
        setattr(engine, name, value)
    return engine


@pytest.mark.parametrize("trials", [4, 7])
def test_with_tpe_there_are_as_many_of_each_as_trials(trials: int, tmp_path: Path) -> None:
    recipe = a_recipe(search__method="tpe", search__trials=trials, search__at_once=3)
    study = _study(recipe, _bench(_fake(), tmp_path / "j", recipe))
    counts = {kind: len(study.of_kind(kind)) for kind in (*BASELINES, "edit")}
    layers = len(tried_layers(a_probe()))
    shared = layers * -(-trials // layers)  # equal shares of the layers, rounded up
    assert counts == {"system": 3, "steering": trials, "layer": shared, "direction": shared, "edit": trials}
    # They go with the first round.
    assert {trial.round for trial in study.trials if trial.candidate.kind != "edit"} == {"0"}


@pytest.mark.parametrize("kinds", [[], ["system"], ["layer"], ["direction"], ["direction", "system"]])
def test_only_the_baselines_that_a_recipe_names_are_tried(kinds: list[str], tmp_path: Path) -> None:
    recipe = a_recipe(search__baselines=kinds, search__steering=[0.2])
    study = _study(recipe, _bench(_fake(), tmp_path / "j", recipe))
    assert {trial.candidate.kind for trial in study.trials} == {"base", "steering", "edit", *kinds}
    assert set(study.evaluations) == {"edit", "steering", *kinds}
    assert len(study.of_kind("steering")) == 1  # what is written stays as it is
    assert (study.scale is None) == (not {"layer", "direction"} & set(kinds))


def test_the_recipes_instructions_are_asked_in_place_of_the_behaviours(tmp_path: Path) -> None:
    for instructions in (["Refuse.", "Decline."], []):
        recipe = a_recipe(behaviour__instructions=instructions, search__baselines=["system"])
        study = _study(recipe, _bench(_fake(), tmp_path / f"{len(instructions)}", recipe))
        told = [asked(i, system) for i, system in enumerate(instructions)]
        assert [trial.candidate for trial in study.of_kind("system")] == told


@pytest.mark.parametrize(
    ("features", "probe", "prompts", "kinds", "said"),
    [
        ({"measures_prompts": False}, a_probe(), ITEMS, {"layer", "direction"}, "no system prompt is tried"),
        ({"rows_on_stream": False}, a_probe(), ITEMS, {"system", "layer"}, "direction is not tried: this engine adds"),
        ({}, None, ITEMS, {"system"}, "one layer and direction are not tried: the probe did not measure the residual"),
        ({}, a_probe(0), ITEMS, {"system"}, "one layer and direction are not tried: the probe did not measure"),
        ({}, a_probe(), [ITEMS[0]], {"system"}, "one layer and direction are not tried: their strengths are found by"),
        # Without neutral prompts there is nothing to measure under another prompt.
        ({"measures_prompts": False}, a_probe(), [ITEMS[0]], {"system"}, "there are no neutral prompts"),
    ],
)
def test_what_cannot_be_tried_is_left_out_and_said(
    features: dict[str, bool], probe: Probe | None, prompts: list[Item], kinds: set[str], said: str,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = a_recipe(search__steering=[0.2])
    engine = _fake(**features)
    bench = a_bench(engine, {"full": make_scores()}, prompts, recipe, tmp_path / "j", probe=probe)
    study = _study(recipe, bench)
    assert {trial.candidate.kind for trial in study.trials} == {"base", "steering", "edit", *kinds}
    assert said in capsys.readouterr().err


def test_a_study_with_baselines_that_was_cut_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    recipe = a_recipe(evaluation__batch=20)
    whole = tmp_path / "whole"
    told = _study(recipe, _bench(_fake(), whole, recipe))
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) > 12
    for kept in range(len(lines) + 1):
        journal = tmp_path / f"cut-{kept}"
        rest = lines[kept][: len(lines[kept]) // 2] if kept < len(lines) else b""
        journal.write_bytes(b"".join(lines[:kept]) + rest)
        engine = _fake()
        assert _study(recipe, _bench(engine, journal, recipe)) == told
        assert journal.read_bytes() == whole.read_bytes()
        if kept == len(lines):
            assert (engine.asked, engine.scored) == ([], [])


def test_the_span_of_the_baselines_is_a_part_of_the_search(tmp_path: Path) -> None:
    wide, narrow = (
        a_recipe(search__steering=[0.2], search__baselines=["layer"], search__span=span)
        for span in ((0.02, 1.0), (0.1, 0.4))
    )
    found = []
    for i, recipe in enumerate((wide, narrow)):
        study = _study(recipe, _bench(_fake(), tmp_path / str(i), recipe))
        found.append([trial.candidate.id for trial in study.of_kind("layer")])
    assert found[0] != found[1]
    # So the stage search is not whole any more once it is changed.
    assert stage_keys(wide)["search"] != stage_keys(narrow)["search"]


def test_the_baselines_are_a_part_of_the_search() -> None:
    keys = [stage_keys(a_recipe(search__baselines=kinds))["search"] for kinds in ([], ["system"], ["system", "layer"])]
    assert len(set(keys)) == 3


def test_a_baseline_whose_losses_are_not_finite_is_discarded_and_counted(tmp_path: Path) -> None:
    class Breaking(Prompting):
        def prompt_losses(self, pairs: Sequence[Any], prompts: Sequence[Any], progress: Any = None) -> Losses:
            losses = super().prompt_losses(pairs, prompts)
            return Losses(losses.kl / 0 * 0, losses.nll, losses.base_nll)

    recipe = a_recipe(search__baselines=["system"], search__steering=[0.2])
    study = _study(recipe, _bench(_fake(Breaking), tmp_path / "j", recipe))
    assert study.of_kind("system") == []
    assert [(row.candidate.id, row.why) for row in study.discarded] == [
        (f"system-{i}", "its losses are not finite") for i in range(3)
    ]
    assert study.evaluations["system"] == 3 * len(ITEMS)
    found = summary(study, recipe.aim, "grid", 10, 1)
    assert (found["tried"]["system"], found["discarded"], found["front"]["system"]) == (0, 3, [])


def test_the_choice_is_of_edits_alone_and_the_summary_of_every_method(tmp_path: Path) -> None:
    recipe = a_recipe()
    study = _study(recipe, _bench(_fake(), tmp_path / "j", recipe))
    # Every other method refuses everything, and is still no edit.
    better = [
        t if t.candidate.kind == "edit" else replace(t, values={**t.values, "refusal": (1.0,) * t.count("refusal")})
        for t in study.trials
    ]
    assert require_choice(better, recipe.aim).candidate.kind == "edit"
    found = summary(study, recipe.aim, recipe.search.method, 20, recipe.seed)
    kinds = {"edit", *BASELINES}
    assert set(found["tried"]) == set(found["front"]) == set(found["hypervolume"]) == set(found["evaluations"]) == kinds
    assert found["tried"]["direction"] == len(study.of_kind("direction"))
    for kind in kinds:
        assert set(found["front"][kind]) <= {trial.candidate.id for trial in study.of_kind(kind)}
        assert found["hypervolume"][kind]["trials"] == len(study.of_kind(kind))
