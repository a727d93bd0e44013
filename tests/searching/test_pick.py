"""A person's pick: what is offered, how it is named, and what the run and its reports make of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from runs import tiny_recipe, whole_run
from steer2edit.behaviours.base import Measure
from steer2edit.errors import EditError, RecipeError
from steer2edit.files.reading import read_json
from steer2edit.pipeline.judge import judge
from steer2edit.pipeline.keys import ORDER, stage_keys
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import run_all
from steer2edit.recipe import load_recipe, overridden
from steer2edit.report.page import picked_by_a_person
from steer2edit.searching.candidates import Candidate, Trial, edited, steered
from steer2edit.searching.choice import chosen_edit, offered, picked

pytestmark = pytest.mark.usefixtures("quiet", "undrawn")

AIM = tiny_recipe().aim
LIMITED = tiny_recipe(search__limits={"over_refusal": 0.2, "degenerate": None}).aim


def _trial(candidate: Candidate, refusal: float, cost: float | None, over_refusal: float = 0.0) -> Trial:
    means = {"refusal": refusal, "over_refusal": over_refusal, "degenerate": 0.0, "utility_loss": cost}
    return Trial(candidate, {name: (mean,) for name, mean in means.items()}, "0")


STRONG, MIDDLE, WEAK, BEATEN = (edited(rho, None, 0.2) for rho in (0.1, 0.2, 0.3, 0.4))
TRIALS = [
    _trial(steered(0.4), 0.9, 0.01),
    _trial(STRONG, 0.75, 0.6, 0.5),
    _trial(WEAK, 0.25, 0.1),
    _trial(MIDDLE, 0.5, 0.3),
    _trial(BEATEN, 0.2, 0.4),
]


def _ids(trials: list[Trial]) -> list[str]:
    return [trial.candidate.id for trial in trials]


def test_the_front_of_the_edits_is_offered_by_rising_cost_whatever_the_limits() -> None:
    assert _ids(offered(TRIALS, AIM)) == [WEAK.id, MIDDLE.id, STRONG.id]
    assert _ids(offered(TRIALS, LIMITED)) == [WEAK.id, MIDDLE.id, STRONG.id]


def test_what_the_rule_takes_is_offered_too_where_it_is_not_on_the_front() -> None:
    # The rule ranks by another measure than the front has.
    margin = Measure("margin", "margin", better="higher", rate=False)
    aim = replace(AIM, ranked=margin)
    trials = [Trial(t.candidate, {**t.values, "margin": (float(t.candidate == BEATEN),)}, "0") for t in TRIALS]
    chosen = chosen_edit(trials, aim, None)
    assert chosen is not None
    assert chosen.candidate == BEATEN
    assert _ids(offered(trials, aim)) == [WEAK.id, MIDDLE.id, BEATEN.id, STRONG.id]
    assert picked(trials, aim, 3).candidate == BEATEN


def test_without_a_cost_every_edit_is_offered() -> None:
    free = [_trial(candidate, 0.5, None) for candidate in (STRONG, WEAK)]
    assert _ids(offered(free, AIM)) == [STRONG.id, WEAK.id]


@pytest.mark.parametrize(("pick", "expected"), [(1, WEAK), ("3", STRONG), (BEATEN.id, BEATEN), (MIDDLE.id, MIDDLE)])
def test_a_pick_is_a_number_of_the_front_or_any_edits_id(pick: int | str, expected: Candidate) -> None:
    assert picked(TRIALS, LIMITED, pick).candidate == expected
    chosen = chosen_edit(TRIALS, LIMITED, pick)
    assert chosen is not None
    assert chosen.candidate == expected


@pytest.mark.parametrize("pick", [0, 4, "99", "edit-9-off-0.2", "steering-0.4", "-1", "²"])
def test_a_pick_that_names_nothing_is_one_sentence_with_what_there_is(pick: int | str) -> None:
    with pytest.raises(EditError, match=r"search\.pick names no edit") as error:
        picked(TRIALS, AIM, pick)
    assert error.value.got == str(pick)
    assert "a number from 1 to 3" in error.value.fix
    assert MIDDLE.id in error.value.fix


def test_without_a_pick_the_rule_chooses_within_the_limits() -> None:
    chosen = chosen_edit(TRIALS, LIMITED, None)
    assert chosen is not None
    assert chosen.candidate == MIDDLE
    assert chosen_edit([TRIALS[1]], LIMITED, None) is None


@pytest.mark.parametrize("pick", ["0", "-3", "true", "1.5", "[1]", '""'])
def test_a_recipe_refuses_a_pick_that_is_neither_a_number_nor_a_name(pick: str) -> None:
    with pytest.raises(RecipeError, match=r"search\.pick"):
        overridden(tiny_recipe(), [f"search.pick={pick}"])


def test_a_pick_makes_what_comes_after_the_search_anew_and_nothing_before() -> None:
    plain, with_pick = (stage_keys(tiny_recipe(search__pick=pick)) for pick in (None, 2))
    same = {name for name in plain if plain[name] == with_pick[name]}
    assert set(ORDER[:4]) <= same
    assert {"edit", "export", "evaluate", "report"}.isdisjoint(same)
    steered_by_limits = (stage_keys(tiny_recipe(search__pick=pick, search__refine=2)) for pick in (None, 2))
    assert len({keys["search"] for keys in steered_by_limits}) == 1


# In a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(pico_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose search is whole; not to be changed."""
    recipe = tiny_recipe(pico_folder, exports=["adapter"])
    folder = whole_run(tmp_path_factory.mktemp("runs") / "searched", recipe, until="search")
    assert not (folder / "choice.json").exists()
    return folder


def _picked_run(searched: Path, folder: Path, *overrides: str) -> Run:
    shutil.copytree(searched, folder)
    run = Run(folder, overridden(load_recipe(folder), overrides))
    run_all(run)
    return run


def test_the_recipe_of_a_picked_run_is_its_record_and_its_reports_say_that_a_person_picked(
    searched: Path, tmp_path: Path
) -> None:
    by_rule = _picked_run(searched, tmp_path / "rule")
    taken = read_json(by_rule.path("choice.json"))
    assert "picked" not in taken
    other = next(name for name in ("edit-0.1-off-0.2", "edit-0.3-off-0.2") if name != taken["edit"]["id"])
    run = _picked_run(searched, tmp_path / "picked", f"search.pick={other}")
    choice = read_json(run.path("choice.json"))
    assert choice["edit"]["id"] == other
    assert choice["picked"]["by_rule"]["id"] == taken["edit"]["id"]
    assert choice["picked"]["missed"] == []
    # The baselines stay the rule's.
    assert choice["steering"] == taken["steering"]
    assert read_json(run.path("evaluation/results.json"))["systems"]["edit"]["id"] == other
    said = "A person picked the edit on validation. The rule takes another one: "
    for file in ("report.md", "adapter/README.md", "report.html"):
        text = run.path(file).read_text(encoding="utf-8")
        assert said in text, file
        assert "A person picked" not in by_rule.path(file).read_text(encoding="utf-8")
    # The same recipe gives the same edit elsewhere, and judging it again does not give the rule its choice back.
    again = Run(tmp_path / "again", load_recipe(run.folder))
    run_all(again)
    assert again.path("edit.safetensors").read_bytes() == run.path("edit.safetensors").read_bytes()
    assert judge(run.folder)["choice"] == {"old": other, "new": other}


def test_a_pick_may_miss_the_limits_which_is_said(searched: Path, tmp_path: Path) -> None:
    limits = "search.limits={utility_loss: 1e-9, over_refusal: null, degenerate: null}"
    with pytest.raises(EditError, match="no edit stays within the limits"):
        _picked_run(searched, tmp_path / "rule", limits)
    run = _picked_run(searched, tmp_path / "picked", limits, "search.pick=1")
    choice = read_json(run.path("choice.json"))
    assert choice["picked"]["by_rule"] is None
    assert choice["picked"]["missed"][0].startswith("KL per token ")
    sentence = picked_by_a_person(choice)
    assert sentence.startswith("A person picked the edit on validation. By the rule there is none")
    assert "The picked one misses limits: KL per token" in sentence


def test_a_pick_of_what_the_rule_takes_says_so(searched: Path, tmp_path: Path) -> None:
    taken = read_json(_picked_run(searched, tmp_path / "rule").path("choice.json"))["edit"]["id"]
    run = _picked_run(searched, tmp_path / "picked", f"search.pick={taken}")
    assert picked_by_a_person(read_json(run.path("choice.json"))) == (
        "A person picked the edit on validation. The rule takes the same one."
    )


def test_a_pick_that_names_no_edit_stops_the_run_before_the_test_is_read(searched: Path, tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"search\.pick names no edit"):
        _picked_run(searched, tmp_path / "picked", "search.pick=edit-7-off-0.2")
    assert not (tmp_path / "picked/choice.json").exists()
    assert list(tmp_path.glob("picked/evaluation/journal-*")) == []
