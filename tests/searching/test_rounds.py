"""The study: which rounds it proposes, what it discards, and the choice from what it tried."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ruled_study import AIM, PROMPTS, _read, _trial, a_recipe, an_engine, answer, losses, rounds, run
from runs import FakeEngine, make_scores
from runs import a_bench as bench_of
from steer2edit.behaviours.base import UTILITY_LOSS
from steer2edit.errors import EditError, RecipeError
from steer2edit.method.site import numbered_layers
from steer2edit.searching.calibrate import Scale
from steer2edit.searching.candidates import Candidate, Trial, edited, steered
from steer2edit.searching.choice import require_choice, summary
from steer2edit.searching.front import hypervolume_interval
from steer2edit.searching.grid import coarse_grid, grid, planned_edits
from steer2edit.searching.rounds import _Rounds, resolved, sanity_prompts
from steer2edit.searching.study import Discarded, Study

# The grid -----------------------------------------------------------------------------------------------------------


def test_the_base_comes_first_then_steering_then_the_grid_of_edits(tmp_path: Path) -> None:
    recipe = a_recipe(steering=[0.5, 0.1], rho_attn=[0.2, None], rho_mlp=[None, 0.4], alpha=[0.1, 0.3])
    study = run(recipe, tmp_path / "j")
    assert rounds(study) == {
        "0": [
            "base",
            "steering-0.5",
            "steering-0.1",
            "edit-0.2-off-0.1",
            "edit-0.2-off-0.3",
            "edit-0.2-0.4-0.1",
            "edit-0.2-0.4-0.3",
            "edit-off-0.4-0.1",
            "edit-off-0.4-0.3",
        ]
    }
    assert (study.discarded, study.refined) == ([], None)
    assert study.evaluations == {"edit": 6 * 16, "steering": 2 * 16}
    by_id = {t.candidate.id: t for t in study.trials}
    assert by_id["edit-0.2-off-0.1"].mean("refusal") == 0.9  # 1.2 · 0.8 − 0.05 = 0.91
    assert by_id["edit-0.2-off-0.1"].mean("utility_loss") == pytest.approx(0.4 * 0.64 + 0.09)
    assert by_id["edit-0.2-0.4-0.1"].candidate.config == {"rho_attn": 0.2, "rho_mlp": 0.4, "alpha": 0.1}


def test_layers_and_variants_are_axes_of_the_grid(tmp_path: Path) -> None:
    recipe = a_recipe(rho_attn=[0.3], alpha=[0.2], layers=[None, "0-1"], variants=["full", "l0"], steering=[])
    study = run(recipe, tmp_path / "j")
    assert rounds(study, "edit")["0"] == [
        "edit-0.3-off-0.2",
        "edit-0.3-off-0.2-l0",
        "edit-0.3-off-0.2-layers-0-1",
        "edit-0.3-off-0.2-layers-0-1-l0",
    ]
    assert study.trials[-1].candidate.config == {
        "rho_attn": 0.3,
        "rho_mlp": None,
        "alpha": 0.2,
        "layers": "0-1",
        "variant": "l0",
    }


@pytest.mark.parametrize(
    ("shares", "depth", "layers"),
    [
        ("33%-83%", 30, "10-24"),
        ("50%-100%", 30, "15-29"),
        ("0%-100%", 7, "0-6"),
        ("50%-100%", 1, "0-0"),
        ("0%-10%", 4, "0-0"),
        ("99%-100%", 61, "60-60"),
        ("8-20", 61, "8-20"),
    ],
)
def test_shares_of_the_depth_are_layers_of_a_model(shares: str, depth: int, layers: str) -> None:
    assert numbered_layers(shares, depth) == layers


def test_a_search_with_shares_of_the_depth_tries_the_layers_of_this_model_each_once(tmp_path: Path) -> None:
    recipe = a_recipe(rho_attn=[0.3], alpha=[0.2], layers=[None, "0%-50%", "0-0", "50%-100%"], steering=[])
    study = run(recipe, tmp_path / "j")  # the model has one layer
    assert rounds(study, "edit")["0"] == ["edit-0.3-off-0.2", "edit-0.3-off-0.2-layers-0-0"]


@pytest.mark.parametrize("layers", ["50%-40%", "50%", "0%-101%", "half", "20-8", "50%-80"])
def test_layers_that_cannot_be_read_are_one_sentence(layers: str) -> None:
    with pytest.raises(RecipeError, match="like 8-20, or as shares of the depth, like 50%-100%"):
        a_recipe(layers=[layers])


def test_a_configuration_that_is_listed_twice_is_tried_once(tmp_path: Path) -> None:
    study = run(a_recipe(rho_attn=[0.2, 0.2, 0.20], alpha=[0.1], steering=[0.1, 0.1]), tmp_path / "j")
    assert [t.candidate.id for t in study.trials] == ["base", "steering-0.1", "edit-0.2-off-0.1"]


def test_configurations_that_differ_in_late_digits_are_all_tried(tmp_path: Path) -> None:
    study = run(a_recipe(rho_attn=[0.2, 0.2000001], alpha=[0.1], steering=[0.1, 0.10000001]), tmp_path / "j")
    assert [t.candidate.config.get("gamma") for t in study.trials if t.candidate.kind == "steering"] == [
        0.1,
        0.10000001,
    ]
    assert [t.candidate.config.get("rho_attn") for t in study.trials if t.candidate.kind == "edit"] == [0.2, 0.2000001]


# The second grid ----------------------------------------------------------------------------------------------------


def test_the_second_grid_reaches_halfway_to_the_neighbours_of_what_the_rule_takes(tmp_path: Path) -> None:
    # Refusals: ρ 0.1 → 1.0 at either α (1.08 − 0.1, 1.08 − 0.3 = 0.78 → 0.8), and its KL is above the limit.
    recipe = a_recipe(refine=3, limits={"over_refusal": None, "degenerate": None, "utility_loss": 0.3})
    study = run(recipe, tmp_path / "j")
    assert study.refined == {
        "around": "edit-0.3-off-0.2",
        "rho_attn": [0.2, 0.3, 0.4],
        "rho_mlp": [None],
        "alpha": [0.2, 0.3, 0.4],  # 0.2 is the smallest: there is nothing below to reach for
        "layers": [None],
        "variant": ["full"],
    }
    tried = rounds(study, "edit")
    assert tried["0"] == [f"edit-{rho}-off-{alpha}" for rho in (0.1, 0.3, 0.5) for alpha in (0.2, 0.6)]
    second = [f"edit-{rho}-off-{alpha}" for rho in (0.2, 0.3, 0.4) for alpha in (0.2, 0.3, 0.4)]
    assert tried["1"] == [id for id in second if id != "edit-0.3-off-0.2"]
    assert study.evaluations["edit"] == (6 + 8) * 16


def test_the_last_value_of_a_list_has_no_neighbour_above(tmp_path: Path) -> None:
    recipe = a_recipe(refine=5, limits={"utility_loss": 0.15, "over_refusal": None, "degenerate": None})
    study = run(recipe, tmp_path / "j")  # within: ρ 0.5 at α 0.6 (0.14), not at α 0.2 (0.18)
    assert study.refined is not None
    assert (study.refined["around"], study.refined["rho_attn"]) == (
        "edit-0.5-off-0.6",
        [0.4, 0.425, 0.45, 0.475, 0.5],
    )
    assert study.refined["alpha"] == [0.4, 0.45, 0.5, 0.55, 0.6]


def test_what_is_off_stays_off_and_a_single_number_and_what_is_no_number_stay_as_they_are(tmp_path: Path) -> None:
    recipe = a_recipe(
        refine=3,
        rho_attn=[0.5, None, 0.1],
        rho_mlp=[None, 0.4, 0.6],
        alpha=[0.2],
        layers=["0-1", None],
        variants=["l2", "full"],
    )
    study = run(recipe, tmp_path / "j")
    assert study.refined == {  # the highest refusal at the smallest cost: fewer layers cost half
        "around": "edit-0.1-off-0.2-layers-0-1-l2",
        "rho_attn": [0.1, 0.2, 0.3],
        "rho_mlp": [None],
        "alpha": [0.2],
        "layers": ["0-1"],
        "variant": ["l2"],
    }
    assert rounds(study)["1"] == ["edit-0.2-off-0.2-layers-0-1-l2", "edit-0.3-off-0.2-layers-0-1-l2"]


def test_where_nothing_is_within_the_limits_the_second_grid_lies_around_the_smallest_cost(tmp_path: Path) -> None:
    recipe = a_recipe(refine=2, limits={"utility_loss": 0.001, "over_refusal": None, "degenerate": None})
    study = run(recipe, tmp_path / "j")
    assert study.refined is not None
    assert study.refined["around"] == "edit-0.5-off-0.6"


def test_the_rule_says_what_the_second_grid_lies_around(tmp_path: Path) -> None:
    largest = run(a_recipe(refine=2), tmp_path / "a")
    cheapest = run(a_recipe(refine=2, rule="cheapest", tolerance=0.5), tmp_path / "b")
    assert largest.refined is not None
    assert cheapest.refined is not None
    assert (largest.refined["around"], cheapest.refined["around"]) == ("edit-0.1-off-0.2", "edit-0.5-off-0.2")


def test_small_numbers_are_refined_too(tmp_path: Path) -> None:
    study = run(a_recipe(refine=3, rho_attn=[0.00002, 0.00004], alpha=[0.2], steering=[]), tmp_path / "j", FakeEngine())
    assert study.refined is not None
    assert study.refined["rho_attn"] == pytest.approx([0.00002, 0.000025, 0.00003])


# Sanity -------------------------------------------------------------------------------------------------------------


def _insane(prompt: str, name: str) -> str:
    """ρ = 0.1 loops on every simple prompt, ρ = 0.3 on the first alone."""
    simple = sanity_prompts()
    if prompt in simple and (name.startswith("edit-0.1") or (name.startswith("edit-0.3") and prompt == simple[0])):
        return "so " * 9
    return answer(prompt, name) if prompt not in simple else f"Well, {prompt}"


@pytest.mark.parametrize(("limit", "left"), [(0.25, ("0.3", "0.5")), (0.24, ("0.5",)), (None, ("0.5",))])
def test_an_edit_that_fails_at_simple_prompts_is_discarded_before_it_is_tried(
    limit: float | None, left: tuple[str, ...], tmp_path: Path
) -> None:
    engine = FakeEngine(_insane, losses)
    recipe = a_recipe(sanity=4, limits={"degenerate": limit, "over_refusal": None})
    study = run(recipe, tmp_path / "j", engine)
    assert rounds(study, "edit")["0"] == [f"edit-{rho}-off-{alpha}" for rho in left for alpha in (0.2, 0.6)]
    gone = [f"edit-{rho}-off-{alpha}" for rho in ("0.1", "0.3") if rho not in left for alpha in (0.2, 0.6)]
    assert [row.candidate.id for row in study.discarded] == gone
    assert study.discarded[0].to_json() == {
        "id": "edit-0.1-off-0.2",
        "kind": "edit",
        "config": {"rho_attn": 0.1, "rho_mlp": None, "alpha": 0.2},
        "why": "100% of its answers to simple prompts are degenerate",
    }
    assert [row.why[:4] for row in study.discarded[2:]] == ["25% "] * (len(gone) - 2)
    # Each edit has answered the first four simple prompts; those that are left, the validation prompts as well.
    assert study.evaluations == {"edit": 6 * 4 + 2 * len(left) * 16, "steering": 2 * 16}
    simple = [prompt for prompt, _ in engine.asked if prompt in sanity_prompts()]
    assert simple == sanity_prompts()[:4] * 6
    assert {name for prompt, name in engine.asked if prompt.startswith("harm")}.isdisjoint(gone)


def test_there_are_twenty_simple_prompts_and_none_is_used_unless_asked_for(tmp_path: Path) -> None:
    assert len(set(sanity_prompts())) == 20
    engine = an_engine()
    run(a_recipe(), tmp_path / "j", engine)
    assert {prompt for prompt, _ in engine.asked} == {p.text for p in PROMPTS}


def test_where_every_edit_is_discarded_there_is_no_second_grid_and_no_choice(tmp_path: Path) -> None:
    recipe = a_recipe(sanity=2, refine=3, rho_attn=[0.1, 0.15])
    study = run(recipe, tmp_path / "j", FakeEngine(_insane, losses))
    assert [t.candidate.id for t in study.trials] == ["base", "steering-0.2", "steering-0.8"]
    assert (len(study.discarded), study.refined) == (4, None)
    with pytest.raises(EditError, match=r"no edit is left to choose from \(got: all discarded\)"):
        require_choice(study.trials, recipe.aim)


@pytest.mark.parametrize("method", ["grid", "tpe"])
def test_what_has_losses_that_are_not_finite_is_discarded_and_counted(method: str, tmp_path: Path) -> None:
    def broken(text: str, name: str) -> tuple[float, float]:
        bad = name == "steering-0.8" or (name.startswith("edit") and _read(name)[0] > 0.8)
        return (float("nan"), float("nan")) if bad else losses(text, name)

    recipe = a_recipe(method=method, trials=12, at_once=4)
    study = run(recipe, tmp_path / "j", FakeEngine(answer, broken))
    assert {row.why for row in study.discarded} == {"its losses are not finite"}
    gone = {row.candidate.id for row in study.discarded}
    assert "steering-0.8" in gone
    assert gone.isdisjoint(t.candidate.id for t in study.trials)
    edits = [t for t in study.trials if t.candidate.kind == "edit"] + [
        r for r in study.discarded if r.candidate.kind == "edit"
    ]
    assert len(edits) == (6 if method == "grid" else 12)
    assert study.evaluations == {"edit": len(edits) * 16, "steering": 2 * 16}


# Steering -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sanity", "many"), [(0, 6), (4, 8), (5, 8), (6, 9)])
def test_a_range_of_strengths_makes_steerings_evaluations_the_edits(sanity: int, many: int, tmp_path: Path) -> None:
    # 6 edits · (16 + 4 simple prompts) = 120 = 7.5 · 16
    recipe = a_recipe(steering={"low": 0.1, "high": 1.5}, sanity=sanity)
    study = run(recipe, tmp_path / "j")
    strengths = [t.candidate.config["gamma"] for t in study.trials if t.candidate.kind == "steering"]
    assert len(strengths) == many
    assert strengths == pytest.approx([0.1 + 1.4 * i / (many - 1) for i in range(many)], abs=1e-6)
    assert (strengths[0], strengths[-1]) == (0.1, 1.5)
    assert 0 <= study.evaluations["steering"] - study.evaluations["edit"] < 16
    assert list(rounds(study, "steering")) == ["steering"]
    assert rounds(study, "base") == {"0": ["base"]}


def test_a_range_counts_the_second_grid_too_and_has_two_strengths_at_least(tmp_path: Path) -> None:
    study = run(a_recipe(steering={"low": 0.1, "high": 1.5}, refine=2), tmp_path / "a")
    assert (
        sum(t.candidate.kind == "steering" for t in study.trials)
        == sum(t.candidate.kind == "edit" for t in study.trials)
        > 6
    )
    one = run(a_recipe(steering={"low": 0.1, "high": 1.5}, rho_attn=[0.1], alpha=[0.2]), tmp_path / "b")
    assert [t.candidate.id for t in one.trials] == ["base", "edit-0.1-off-0.2", "steering-0.1", "steering-1.5"]


# The choice ---------------------------------------------------------------------------------------------------------


LIMITED = a_recipe(limits={"over_refusal": 0.2, "utility_loss": 0.5, "degenerate": 0.1})


def test_the_edit_that_is_required_is_what_the_rule_takes_of_the_edits_within_the_limits() -> None:
    trials = [
        _trial("base", "base", refusal=1.0),
        _trial("s", "steering", refusal=0.9),
        _trial("a", refusal=0.6),
        _trial("over", refusal=0.9, over_refusal=0.3),
        _trial("b", refusal=0.55, utility_loss=0.1),
    ]
    assert require_choice(trials, LIMITED.aim) is trials[2]
    cheap = a_recipe(limits={"over_refusal": 0.2}, rule="cheapest", tolerance=0.1)
    assert require_choice(trials, cheap.aim) is trials[4]


def test_where_nothing_is_within_the_limits_the_gentlest_edit_is_named() -> None:
    trials = [_trial("a", over_refusal=0.9, utility_loss=0.2), _trial("b", over_refusal=0.8, utility_loss=0.1)]
    with pytest.raises(EditError, match=r"the gentlest has over-refusal \(benign\) 0\.80, at most 0\.2"):
        require_choice(trials, LIMITED.aim)


def _measured(id: str, kind: str, refused: int, kl: float, **numbers: Any) -> Trial:
    shown = tuple(float(i < refused) for i in range(10))
    return _trial(id, kind, values={"refusal": shown, "utility_loss": (kl - 0.05, kl + 0.05)}, **numbers)


def test_the_summary_holds_both_methods_budgets_fronts_and_hypervolumes() -> None:
    trials = [
        _measured("base", "base", 0, 0.0),
        _measured("s1", "steering", 5, 0.8),
        _measured("e1", "edit", 4, 0.2),
        _measured("e2", "edit", 3, 0.3),  # beaten
        _measured("e3", "edit", 8, 0.7),  # above the limit of the utility loss, for which the reference stands
        _measured("e4", "edit", 10, 0.1, over_refusal=0.9),  # not within the limits
    ]
    study = Study(
        trials, [Discarded(Candidate("e5", "edit", {}), "why")], {"around": "e1"}, {"edit": 80, "steering": 16}
    )
    recipe = a_recipe(method="tpe", reference=2.0, rule="knee", limits={"over_refusal": 0.2, "utility_loss": 0.5})
    found = summary(study, recipe.aim, recipe.search.method, recipe.evaluation.resamples, recipe.seed)
    assert found["method"] == "tpe"
    assert found["rule"].startswith("the knee of the Pareto front")
    assert found["limits"]["utility_loss"] == 0.5
    assert found["tried"] == {"edit": 4, "steering": 1}
    assert (found["discarded"], found["refined"]) == (1, {"around": "e1"})
    assert found["evaluations"] == {"edit": 80, "steering": 16}
    assert found["front"] == {"edit": ["e1", "e3"], "steering": ["s1"]}
    assert found["hypervolume"]["edit"]["mean"] == pytest.approx((0.5 * 0.4 + 1.3 * 0.8) / 2)
    assert found["hypervolume"]["steering"]["mean"] == pytest.approx(1.2 * 0.5 / 2)
    assert found["hypervolume"]["edit"] == hypervolume_interval(trials[2:5], recipe.aim, 50, recipe.seed)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_summary_of_a_study_without_steering_says_so(tmp_path: Path) -> None:
    recipe = a_recipe(steering=[])
    found = summary(run(recipe, tmp_path / "j"), recipe.aim, "grid", 50, recipe.seed)
    assert found["front"]["steering"] == []
    assert found["hypervolume"]["steering"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "reference": 1.0, "trials": 0}
    assert found["tried"] == {"edit": 6, "steering": 0}


def test_a_grid_is_one_round_without_refine() -> None:
    s = a_recipe().search
    assert [len(proposed) for proposed in grid(s, coarse_grid(s), AIM, Study())] == [6]


def _two_ranges(*costs: float) -> tuple[Any, list[Candidate], Study]:
    """Three strengths for each of two layer ranges, and a study of the middle ones at these costs."""
    coarse = [edited(rho, None, 0.4, layers) for layers in ("0-4", "5-9") for rho in (0.3, 0.2, 0.1)]
    search = a_recipe().search.model_copy(update={"narrow": True})
    middle = [edited(0.2, None, 0.4, layers) for layers in ("0-4", "5-9")]
    trials = [_trial(c.id, config=c.config, utility_loss=cost) for c, cost in zip(middle, costs, strict=False)]
    return search, coarse, Study(trials=trials)


def test_a_narrow_grid_tries_the_middle_of_each_series_and_then_the_better_series() -> None:
    search, coarse, study = _two_ranges(0.2, 0.1)  # as many refusals: the rule takes the cheaper
    first, second = grid(search, coarse, AIM, study)
    assert [(c.config["layers"], c.config["rho_attn"]) for c in first] == [("0-4", 0.2), ("5-9", 0.2)]
    assert [(c.config["layers"], c.config["rho_attn"]) for c in second] == [("5-9", 0.3), ("5-9", 0.1)]
    assert planned_edits(search, coarse) == 4


def test_a_narrow_grid_of_which_no_middle_is_within_the_limits_goes_on_where_it_costs_least() -> None:
    search, coarse, study = _two_ranges(8.0, 9.0)
    study.trials[1].values["refusal"] = (1.0,)  # it refuses more, and the rule would take it
    aim = replace(AIM, limits={UTILITY_LOSS: 0.5})
    *_, second = grid(search, coarse, aim, study)
    assert {c.config["layers"] for c in second} == {"0-4"}


def test_a_narrow_grid_of_which_every_middle_was_discarded_has_nothing_to_go_on_with() -> None:
    search, coarse, study = _two_ranges()
    assert [len(proposed) for proposed in grid(search, coarse, AIM, study)] == [2, 0]


def test_a_narrow_grid_of_one_series_is_the_whole_grid() -> None:
    search, coarse, study = _two_ranges()
    assert list(grid(search, coarse[:3], AIM, study)) == [coarse[:3]]
    assert planned_edits(search, coarse[:3]) == 3


def test_baselines_are_narrowed_as_edits_are_and_get_as_many_strengths(tmp_path: Path) -> None:
    recipe = a_recipe(steering=[], baselines=[])
    search = recipe.search.model_copy(update={"narrow": True})
    coarse = [edited(rho, None, alpha) for alpha in (0.2, 0.6) for rho in (0.5, 0.3, 0.1)]
    baselines = [[steered(gamma) for gamma in of_layer] for of_layer in ((0.2, 0.4, 0.6), (0.3, 0.5, 0.7))]
    bench = bench_of(an_engine(), {"full": make_scores()}, PROMPTS, recipe, tmp_path / "j")
    study = _Rounds(bench, search, coarse, baselines, recipe.aim, 0, Study(), None, None).run()
    assert study.rounds["0"] == ["base", "steering-0.4", "steering-0.5", "edit-0.3-off-0.2", "edit-0.3-off-0.6"]
    assert study.rounds["1"] == ["steering-0.3", "steering-0.7", "edit-0.5-off-0.2", "edit-0.1-off-0.2"]
    assert study.evaluations["edit"] == study.evaluations["steering"]
    # Edits of one series are one round; the baselines go on alone.
    alone = _Rounds(bench, search, coarse[:3], baselines, recipe.aim, 0, Study(), None, None).run()
    assert alone.rounds["baselines"] == ["steering-0.3", "steering-0.7"]


def test_a_search_by_tpe_is_not_narrowed() -> None:
    assert not a_recipe(rho_attn="auto", method="tpe", narrow=True).search.narrow


def test_l2_takes_no_alpha_and_is_tried_once_for_all_of_them(tmp_path: Path) -> None:
    study = run(a_recipe(rho_attn=[0.1], alpha=[0.2, 0.6], variants=["full", "l2"]), tmp_path / "j")
    assert rounds(study, "edit")["0"] == ["edit-0.1-off-0.2", "edit-0.1-off-0.2-l2", "edit-0.1-off-0.6"]


@pytest.mark.parametrize(
    ("changes", "planned"),
    [
        ({"rho_attn": [0.2], "alpha": [0.2]}, 1),  # nothing can be refined
        ({"rho_attn": [0.2, 0.4], "alpha": [0.2]}, 2 + 3),
        ({"rho_attn": [0.2, 0.4], "alpha": [0.2, 0.6]}, 4 + 9),
        ({"rho_attn": [0.2, 0.4], "alpha": [0.2, 0.6], "refine": 0}, 4),
        ({"rho_attn": [0.2, 0.4], "refine": 0, "method": "tpe", "trials": 7}, 7),
    ],
)
def test_a_second_grid_is_planned_only_where_something_can_be_refined(changes: dict[str, Any], planned: int) -> None:
    search = a_recipe(**{"refine": 3, "rho_mlp": [None], **changes}).search
    assert planned_edits(search, coarse_grid(search)) == planned


def test_the_second_grid_has_its_neighbours_among_configurations_of_the_same_kind() -> None:
    best, *others = coarse = [
        edited(0.1, None, 0.2),
        edited(0.5, None, 0.2),
        edited(0.2, 0.4, 0.2),
        edited(0.3, None, 0.2, "0-1"),
        edited(0.4, None, 0.2, None, "l0"),
    ]
    trials = [_trial(best.id, config=best.config, refusal=0.9)]
    study = Study(trials + [_trial(other.id, config=other.config, refusal=0.1) for other in others])
    list(grid(a_recipe(refine=3).search, coarse, AIM, study))
    assert study.refined is not None
    assert study.refined["rho_attn"] == [0.1, 0.2, 0.3]  # halfway to 0.5


def test_a_block_type_that_calibrated_edits_leave_off_can_still_be_off() -> None:
    points = {"attn": [(edited(0.5, None, 0.0), 0.1)], "mlp": [(edited(None, 0.7, 0.0), 0.1)]}
    found, _ = resolved(a_recipe(rho_attn="auto", rho_mlp="auto").search, Scale(points, [], {}, {}))
    assert (found.rho_attn, found.rho_mlp) == ([None, 0.5], [None, 0.7])
