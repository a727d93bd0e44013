"""A behaviour with words of its own goes the whole way: search, fronts, rules and reports know measures alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from runs import FakeEngine, a_bench, make_scores
from shouting import BLUNT, CAPITALS, LENGTH, Shouting, shouting_recipe
from steer2edit.behaviours import known
from steer2edit.behaviours.base import DEGENERATE, QUESTION, Item, Measure, Outcome, judge
from steer2edit.errors import RecipeError
from steer2edit.pipeline.results import results_of
from steer2edit.recipe import Recipe
from steer2edit.report.figures import trade_off
from steer2edit.report.live import watching
from steer2edit.report.page import markdown, markdown_table
from steer2edit.searching.bench import Bench
from steer2edit.searching.candidates import BASE, Candidate, Trial, edited, of_kind
from steer2edit.searching.choice import moved, require_choice, summary
from steer2edit.searching.front import Aim, choose, hypervolume_interval, pareto
from steer2edit.searching.rounds import run_study
from steer2edit.searching.study import Study


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known.BEHAVIOURS, "shouting", Shouting)


def _strength(name: str) -> float:
    """How hard a candidate pushes: from 0 (the base) to 1."""
    if name == "base":
        return 0.0
    if name.startswith("steering"):
        return float(name.removeprefix("steering-"))
    match = re.match(r"edit-([\d.]+)-off-([\d.]+)", name)
    assert match
    return (1 - float(match[1])) * (1 - float(match[2]))


def _answer(prompt: str, name: str) -> str:
    """Louder for weak candidates; strong ones are blunt to calm prompts."""
    if "calm" in prompt:
        return "yes" if _strength(name) > 0.6 else "yes of course my friend"
    upper = round(10 * (1 - _strength(name)))
    return " ".join(["LOUD"] * upper + ["soft"] * (10 - upper)) + f" {prompt.split()[-1]} or so they say"


def _engine() -> FakeEngine:
    return FakeEngine(_answer, lambda text, name: (_strength(name) / 2, 2.0))


def _study(recipe: Recipe, folder: Path) -> Study:
    items = recipe.behaviour.items(recipe.source, "validation")
    bench = a_bench(_engine(), {"full": make_scores()}, items, recipe, folder / "journal.jsonl")
    return run_study(bench, recipe.search, recipe.aim, recipe.seed)


def test_its_trials_hold_its_measures_and_those_of_every_behaviour(tmp_path: Path) -> None:
    study = _study(shouting_recipe(), tmp_path)
    base = study.trials[0]
    names = ["capitals", "blunt", "length", "degenerate", "nll_rise", "utility_loss", "accuracy", "accuracy_loss"]
    assert list(base.values) == names
    assert [base.count(name) for name in names] == [4, 3, 3, 7, 2, 2, 0, 0]
    assert base.mean("length") == 5.0
    strong = next(t for t in study.trials if t.candidate.id == "steering-0.8")
    assert (strong.mean("blunt"), strong.mean("length")) == (1.0, 1.0)
    assert (strong.mean("capitals") or 0) < (base.mean("capitals") or 0)
    assert Trial.from_json(json.loads(json.dumps(strong.to_json()))) == strong


@pytest.mark.parametrize("method", ["grid", "tpe"])
def test_the_rule_takes_the_fewest_capitals_within_the_limits(method: str, tmp_path: Path) -> None:
    recipe = shouting_recipe(method=method, trials=16, at_once=4)
    study = _study(recipe, tmp_path)
    allowed = [t for t in study.of_kind("edit") if t.mean("blunt") == 0.0]  # its own limit of 0.4
    assert 0 < len(allowed) < len(study.of_kind("edit"))
    best = min(allowed, key=lambda t: (t.mean("capitals"), t.mean("utility_loss")))
    chosen = require_choice(study.trials, recipe.aim)
    assert chosen.candidate.id == best.candidate.id
    assert moved(chosen, study.trials[0], recipe.aim)
    assert not moved(study.trials[0], chosen, recipe.aim)


def test_a_limit_on_what_is_better_high_is_at_least(tmp_path: Path) -> None:
    study = _study(shouting_recipe(), tmp_path)
    free = shouting_recipe(limits={"blunt": None}).aim
    long = shouting_recipe(limits={"blunt": None, "length": 3.0}).aim
    assert require_choice(study.trials, free).mean("length") == 1.0
    assert require_choice(study.trials, long).mean("length") == 5.0
    strong = next(t for t in study.trials if t.candidate.id == "steering-0.8")
    assert "words 1.00, at least 3" in long.missed(strong)


def test_a_reversed_measure_a_swapped_one_and_a_dropped_limit_choose_others(tmp_path: Path) -> None:
    recipe = shouting_recipe()
    study, aim = _study(recipe, tmp_path), recipe.aim
    right = require_choice(study.trials, aim).candidate.id
    reversed_ = Measure("capitals", "capitals (%)", better="higher", worst=20.0, best=80.0, rate=False)
    for other in (
        Aim(reversed_, aim.limits),
        Aim(CAPITALS, {**aim.limits, BLUNT: None}),
        Aim(LENGTH, {}),
    ):
        assert require_choice(study.trials, other).candidate.id != right


def test_the_front_and_the_hypervolume_of_what_is_better_low(tmp_path: Path) -> None:
    study = _study(shouting_recipe(), tmp_path)
    trials, aim = study.trials, shouting_recipe().aim
    unbeaten = []
    for a in trials:
        cost, capitals = a.mean("utility_loss"), a.mean("capitals")
        better = [
            b
            for b in trials
            if (b.mean("utility_loss"), b.mean("capitals")) != (cost, capitals)
            and b.mean("utility_loss") <= cost  # type: ignore[operator]
            and b.mean("capitals") <= capitals  # type: ignore[operator]
        ]
        if not better:
            unbeaten.append(a.candidate.id)
    assert {t.candidate.id for t in pareto(trials, aim)} <= set(unbeaten)
    # By cells: the share of [0, 1] nats × [0, 1] of the scale from 80 % to 20 % that some trial reaches.
    points = [(t.mean("utility_loss"), (80 - (t.mean("capitals") or 0)) / 60) for t in trials]
    points = [(cost, min(1.0, max(0.0, scaled))) for cost, scaled in points]
    steps = [(i + 0.5) / 400 for i in range(400)]
    area = sum(max((y for x, y in points if x is not None and x <= step), default=0.0) for step in steps) / 400
    assert hypervolume_interval(trials, aim, 20, 0)["mean"] == pytest.approx(area, abs=0.01)


@pytest.mark.parametrize(("value", "scaled"), [(80.0, 0.0), (20.0, 1.0), (50.0, 0.5), (95.0, 0.0), (5.0, 1.0)])
def test_a_scale_runs_from_worst_to_best_and_is_clipped(value: float, scaled: float) -> None:
    assert CAPITALS.scaled(value) == scaled
    assert LENGTH.scaled(2.5) == 0.25


def test_cheapest_and_knee_weigh_the_scale_from_worst_to_best() -> None:
    def trial(id: str, capitals: float, cost: float) -> Trial:
        return Trial(Candidate(id, "edit", {}), {"capitals": (capitals,), "utility_loss": (cost,)}, "0")

    trials = [trial("best", 20.0, 0.9), trial("near", 23.0, 0.3), trial("far", 50.0, 0.1)]
    for tolerance, expected in ((0.049, "best"), (0.05, "near"), (0.5, "far")):  # 3 of 60 are 0.05
        chosen = choose(trials, Aim(CAPITALS, {}, "cheapest", tolerance))
        assert chosen is not None
        assert chosen.candidate.id == expected
    knee = choose(trials, Aim(CAPITALS, {}, "knee"))
    assert knee is not None
    assert knee.candidate.id == "near"


class Measuring(Shouting):
    """Measures many outcomes at once, and keeps which; of a pair of choices the number of the first one's tokens."""

    def measure_all(self, asked: Any, progress: Any = None) -> Any:
        batches.append([(item.kind, item.text, outcome, base) for item, outcome, base in asked])
        return [
            {"length": float(outcome.lengths[0])} if item.choices else {"capitals": float(len(outcome.text))}
            for item, outcome, _ in asked
        ]


batches: list[list[Any]] = []


def test_outcomes_are_judged_all_at_once_but_for_questions_with_a_known_answer() -> None:
    batches.clear()
    question = Item(QUESTION, "Red?", ("yes", "no"), 1)
    said, loops = Outcome("SOFT words"), Outcome("no " * 30)
    yes, no = Outcome(nll=(0.1, 2.0)), Outcome(nll=(3.0, 2.0))
    asked = [
        (Item("loud", "a"), said, loops),
        (question, no, yes),
        (Item("loud", "b"), loops, said),
        (Item("calm", "c", ("aa", "b")), Outcome(nll=(1.0, 2.0), lengths=(2, 1)), Outcome(nll=(2.0, 1.0))),
        (question, yes, yes),
    ]
    behaviour = Measuring()
    assert judge(behaviour, asked) == [
        {"capitals": 10.0, "degenerate": 0.0},
        {"accuracy": 1.0, "accuracy_loss": -1.0},
        {"capitals": 90.0, "degenerate": 1.0},
        {"length": 2.0},  # what was not said in its own words is not degenerate
        {"accuracy": 0.0, "accuracy_loss": 0.0},
    ]
    ((one, other, pair),) = batches
    assert one == ("loud", "a", said, loops)
    assert other == ("loud", "b", loops, said)
    assert pair[:2] == ("calm", "c")
    assert judge(behaviour, []) == []


def test_a_behaviour_may_let_the_model_choose_and_knows_how_long_the_choices_are(tmp_path: Path) -> None:
    batches.clear()
    recipe = shouting_recipe()
    items = [Item("loud", "test loud 0"), Item("calm", "Which?", ("soft", "HARD ROCK")), Item("calm", "test calm 0")]
    behaviour = Measuring()
    bench = Bench(_engine(), {"full": make_scores()}, items, behaviour, recipe.evaluation, tmp_path / "j")
    tried = [BASE, edited(0.1, None, 0.2), edited(0.5, None, 0.2)]
    trials = bench.run(tried, "0")
    (batch,) = batches  # all candidates' outcomes on all items
    assert [(kind, text) for kind, text, _, _ in batch] == [
        ("loud", "test loud 0"), ("calm", "test calm 0"), ("calm", "Which?")
    ] * 3  # fmt: skip
    for trial in trials:
        assert trial.values["length"] == (4.0,)  # tokens are characters
        assert trial.count("degenerate") == 2
    pairs = [outcome for kind, text, outcome, _ in batch if text == "Which?"]
    assert {outcome.lengths for outcome in pairs} == {(4, 9)}
    assert [outcome.nll for outcome in pairs] == [(2.0, 2.0)] * 3
    # Every outcome is judged beside the original model's on the same item.
    of_base = {text: outcome for _, text, outcome, _ in batch[:3]}
    assert all(base == of_base[text] for _, text, _, base in batch)
    # From the journal alone they come back as they were.
    batches.clear()
    replayed = Bench(None, {}, items, behaviour, recipe.evaluation, tmp_path / "j")
    assert replayed.run(tried, "0") == trials
    assert batches == [batch]


def test_reports_say_its_titles_and_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = shouting_recipe()
    study = _study(recipe, tmp_path)
    chosen = require_choice(study.trials, recipe.aim)
    choice = summary(study, recipe.aim, "grid", 50, 0)
    choice |= {"edit": {"id": chosen.candidate.id, "config": chosen.candidate.config} | chosen.means()}
    choice |= {"steering": None, "moved": True}
    assert choice["rule"] == "lowest capitals (%) within the limits; of equals the smallest KL per token"
    items = recipe.behaviour.items(recipe.source, "test")
    bench = a_bench(_engine(), {"full": make_scores()}, items, recipe, tmp_path / "test.jsonl")
    results = results_of(bench.run([BASE, chosen.candidate], "test"), recipe)
    assert results["attribute"] == "capitals"
    assert results["systems"]["base"]["capitals"]["method"] == "bootstrap"
    assert list(results["differences"]) == ["edit - base"]
    assert markdown_table(results).splitlines()[0] == "| on test | capitals (%) | degenerate |"
    results["agreement"] = {"not_measured": "quantised."}
    page = markdown(recipe, choice, results, make_scores().edit(rho_attn=0.1, rho_mlp=None, alpha=0.2))
    with watching(Shouting().measures, recipe.aim) as (_, on_round):
        on_round(study)
    files = trade_off(study.trials, choice, Shouting().measures, tmp_path / "trade_off")
    drawn = files[1].read_text(encoding="utf-8")
    said = page + capsys.readouterr().err + drawn
    assert "capitals (%)" in page
    assert "lowest capitals (%)" in said
    assert not re.search("refus|harmful", said)


def test_unknown_kinds_and_measures_are_refused_with_its_own_words() -> None:
    raw: dict[str, Any] = shouting_recipe().model_dump(mode="json")
    from steer2edit.recipe import parse_recipe

    with pytest.raises(RecipeError, match=r"unknown key search\.limits\.capital .*Did you mean 'capitals'"):
        parse_recipe({**raw, "search": {**raw["search"], "limits": {"capital": 0.2}}})
    with pytest.raises(
        RecipeError, match=r"unknown key data\.test\.harmful .*Kinds of this behaviour there: loud, calm"
    ):
        parse_recipe({**raw, "data": {**raw["data"], "test": {"harmful": 2}}})
    with pytest.raises(RecipeError, match=r"data\.test cannot be used .*capitals \(%\) is measured on loud prompts"):
        parse_recipe({**raw, "data": {**raw["data"], "test": {"calm": 2}}})
    assert parse_recipe(raw).aim.limits[DEGENERATE] == 0.1
    assert of_kind([], "edit") == []
