"""What TPE proposes: within which ends, how often, and how much better than by chance."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from ruled_study import (
    AIM,
    HARMFUL,
    PROMPTS,
    REFUSAL,
    SPACE,
    _read,
    _trial,
    a_bench,
    a_recipe,
    answer,
    cost_of,
    losses,
    rounds,
    run,
    written,
)
from runs import FakeEngine
from steer2edit.errors import RecipeError
from steer2edit.searching.candidates import edited
from steer2edit.searching.front import hypervolume
from steer2edit.searching.rounds import run_study, sanity_prompts
from steer2edit.searching.study import Study
from steer2edit.searching.tpe import tpe


def test_tpe_draws_within_the_ends_of_the_lists_and_from_everything_in_them(tmp_path: Path) -> None:
    study = run(a_recipe(**SPACE, trials=48, at_once=12), tmp_path / "j")
    edits = [t.candidate.config for t in study.trials if t.candidate.kind == "edit"]
    assert len(edits) == 48
    ends = {"rho_attn": (0.1, 0.9), "rho_mlp": (0.2, 0.8), "alpha": (0.05, 0.7)}
    for name, (low, high) in ends.items():
        numbers = [config[name] for config in edits if config[name] is not None]
        assert all(low <= x <= high and float(f"{x:.4g}") == x for x in numbers)
        assert len(set(numbers)) > 10  # not the lists' numbers alone
    for name in ("rho_attn", "rho_mlp"):
        assert {config[name] is None for config in edits} == {True, False}
    assert not [config for config in edits if config["rho_attn"] is config["rho_mlp"] is None]
    assert {config.get("layers") for config in edits} == {None, "0-1"}
    assert {config.get("variant", "full") for config in edits} == {"full", "l0", "g_dot"}


@pytest.mark.parametrize("seed", range(3))
def test_tpe_never_proposes_the_same_twice_nor_both_off(seed: int) -> None:
    # Few numbers with four digits, and a switch of each block: most draws are known, or both off.
    s = a_recipe(
        method="tpe", rho_attn=[0.1, 0.1005, None], rho_mlp=[0.2, None], alpha=[0.3], trials=12, at_once=5
    ).search
    study, seen = Study(), []
    for proposed in itertools.islice(tpe(s, AIM, seed, study), 8):
        seen += [c.id for c in proposed]
        study.trials += [_trial(c.id, config=dict(c.config)) for c in proposed]
    assert len(seen) == len(set(seen))
    assert not any(id.startswith("edit-off-off") for id in seen)
    assert len(seen) > 5  # there are 13


def test_a_tpe_round_has_at_once_candidates_and_the_last_one_what_is_left(tmp_path: Path) -> None:
    study = run(a_recipe(**SPACE, trials=11, at_once=4), tmp_path / "j")
    assert [len(ids) for ids in rounds(study, "edit").values()] == [4, 4, 3]
    assert list(rounds(study)) == ["0", "1", "2"]
    assert rounds(study)["0"][:3] == ["base", "steering-0.2", "steering-0.8"]
    assert study.evaluations["edit"] == 11 * 16


def test_tpe_proposes_what_was_discarded_no_more_and_counts_it_as_a_trial(tmp_path: Path) -> None:
    def insane(prompt: str, name: str) -> str:
        bad = prompt in sanity_prompts() and name.startswith("edit") and _read(name)[0] > 0.5
        return "so " * 9 if bad else (answer(prompt, name) if prompt not in sanity_prompts() else f"Well, {prompt}")

    study = run(a_recipe(**SPACE, trials=20, at_once=5, sanity=2), tmp_path / "j", FakeEngine(insane, losses))
    edits = [t.candidate.id for t in study.trials if t.candidate.kind == "edit"]
    assert len(edits) + len(study.discarded) == 20
    assert len(set(edits) | {row.candidate.id for row in study.discarded}) == 20
    assert study.discarded
    assert study.evaluations["edit"] == 20 * 2 + len(edits) * 16


def test_tpe_ends_when_there_is_nothing_left_to_try() -> None:
    s = a_recipe(method="tpe", rho_attn=[0.2], alpha=[0.1], trials=5, at_once=3).search
    study, made = Study(), []
    for proposed in itertools.islice(tpe(s, AIM, 0, study), 4):
        study.trials += [_trial(c.id, config=dict(c.config)) for c in proposed]
        made.append([c.id for c in proposed])
    assert made == [["edit-0.2-off-0.1"]]


def test_a_list_of_off_alone_is_off_in_every_draw() -> None:
    s = a_recipe(method="tpe", rho_mlp=[None], trials=6, at_once=6).search
    (first,) = itertools.islice(tpe(s, AIM, 0, Study()), 1)
    assert len(first) == 6
    assert {c.config["rho_mlp"] for c in first} == {None}


def test_other_seeds_propose_other_edits(tmp_path: Path) -> None:
    tables = set()
    for seed in range(3):
        recipe = a_recipe(**SPACE, trials=8, at_once=4).model_copy(update={"seed": seed})
        tables.add(written(run(recipe, tmp_path / f"j{seed}")))
    assert len(tables) == 3


def test_tpe_without_benign_prompts_is_refused(tmp_path: Path) -> None:
    recipe = a_recipe(method="tpe")
    bench = a_bench(recipe, tmp_path / "j", prompts=PROMPTS[:HARMFUL])
    with pytest.raises(RecipeError, match=r"TPE weighs refusal \(harmful\) against KL per token.*data\.validation"):
        run_study(bench, recipe.search, recipe.aim, recipe.seed)


def test_tpe_keeps_away_from_what_breaks_a_limit(tmp_path: Path) -> None:
    def rude(prompt: str, name: str) -> str:  # MLP edits refuse what is benign
        if prompt.startswith("bake") and name.startswith("edit") and _read(name)[1] > 0:
            return REFUSAL
        return answer(prompt, name)

    shares = []
    for limits in ({"over_refusal": 0.2, "degenerate": None}, {"over_refusal": None, "degenerate": None}):
        recipe = a_recipe(**SPACE, trials=60, at_once=10, limits=limits)
        study = run(recipe, tmp_path / str(limits["over_refusal"]), FakeEngine(rude, lambda text, name: (0.5, 2.0)))
        late = [t for t in study.trials if t.candidate.kind == "edit" and int(t.round) >= 3]
        shares.append(sum(t.candidate.config["rho_mlp"] is None for t in late) / len(late))
    assert shares[0] > 0.5
    assert shares[0] > shares[1]


@pytest.mark.parametrize("seed", range(5))
def test_later_tpe_rounds_refuse_more_for_less_than_the_first_which_is_drawn_blindly(seed: int, tmp_path: Path) -> None:
    recipe = a_recipe(**SPACE, trials=48, at_once=8).model_copy(update={"seed": seed})
    edits = [t for t in run(recipe, tmp_path / "j").trials if t.candidate.kind == "edit"]
    gains = [t.mean("refusal") - t.mean("utility_loss") for t in edits]
    assert np.mean(gains[24:]) > np.mean(gains[:8]) + 0.1


def test_tpe_covers_at_least_as_much_as_random_search(tmp_path: Path) -> None:
    trials, space = 48, {**SPACE, "layers": [None], "variants": ["full"]}
    by_tpe, by_chance = [], []
    for seed in range(5):
        recipe = a_recipe(**space, trials=trials, at_once=8).model_copy(update={"seed": seed})
        study = run(recipe, tmp_path / f"j{seed}")
        edits = [t for t in study.trials if t.candidate.kind == "edit"]
        assert len(edits) == trials
        by_tpe.append(hypervolume([(t.mean("utility_loss"), t.mean("refusal")) for t in edits], 1.0))
        draw, points = np.random.default_rng(seed), []
        while len(points) < trials:
            on = draw.random(2) < 0.5
            if on.any():
                rho = [
                    float(draw.uniform(*ends)) if x else None
                    for x, ends in zip(on, ((0.1, 0.9), (0.2, 0.8)), strict=True)
                ]
                name = edited(*(None if x is None else round(x, 4) for x in rho), round(draw.uniform(0.05, 0.7), 4)).id
                refused = sum(answer(f"harm {i}", name) == REFUSAL for i in range(HARMFUL))
                points.append((cost_of(name), refused / HARMFUL))
        by_chance.append(hypervolume(points, 1.0))
    assert sum(by_tpe) >= sum(by_chance)
