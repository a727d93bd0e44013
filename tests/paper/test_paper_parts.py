"""Single parts of a suite on tiny random models: training, styles, the six architectures, the paper's own grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from steer2edit.errors import FileError
from steer2edit.paper.facts import paper_models
from steer2edit.paper.plan import SuitePlan, plan_suite
from steer2edit.paper.work import PAGE, SuiteResult, run_suite
from suites import FAST, rows_of
from tiny_six import save_like, save_tiny, write_sets

pytestmark = pytest.mark.usefixtures("quiet", "undrawn")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(paper_models()))
def test_the_six_architectures_run_end_to_end(name: str, tmp_path: Path) -> None:
    sets = write_sets(tmp_path / "sets")
    out = tmp_path / "suite"
    plan = plan_suite("all", out, model=save_like(tmp_path, name), like=name, profile="smoke", data=sets, changes=FAST)
    result = run_suite(plan, out)
    behaviour = paper_models()[name].behaviour
    if behaviour == "efficiency" and result.failures:  # a random model may have no short answers with a text
        (why,) = result.failures.values()
        assert why.startswith(("there is no contrast", "there is no positive trace with a response"))
        return
    assert result.failures == {}
    assert [run.name for run in plan.runs] == [f"{name}-{behaviour}"]
    published = [row for row in rows_of(out, "ablations") if row["published"]]
    assert {row["method"] for row in published} == {"edit", "k_mean", "k_svd", "g_dot", "l0", "l2"}
    assert {row["condition"] for row in published} == {"same numbers"}
    # The profile asks fewer utility sets than the paper's means are over.
    wanted = {"safety": "attribute", "truthfulness": "truthful", "efficiency": "gsm8k"}[behaviour]
    assert wanted in {row["measure"] for row in published}


def test_the_papers_profile_runs_on_its_own_grid(tmp_path: Path) -> None:
    """Numbers, sanity checks and samples as the profile has them, with fewer prompts."""
    name = "gemma-2-2b-it"
    sets = write_sets(tmp_path / "sets")
    changes = [
        *("data.probe=6", "data.validation=3", "data.test=3", "data.utility_items=1", "evaluation.resamples=40"),
        *("evaluation.task_tokens=4", "evaluation.new_tokens=4", "evaluation.utility_prompts=2", "search.sanity=1"),
        *("search.rho_attn=[0.3, 0.35]", "search.alpha=[0.9]", "search.steering=[0.1, 0.2]", "search.limits={}"),
        *("search.limits.degenerate=1.0", "search.limits.utility_loss=null", "model.device=cpu"),
        *("model.dtype=float32", "evaluation.task_sampling=greedy", "evaluation.task_samples=1"),
    ]  # fmt: skip
    plan = plan_suite(
        "truthfulness",
        tmp_path / "out",
        model=save_like(tmp_path, name),
        like=name,
        profile="paper",
        data=sets,
        changes=changes,
    )
    result = run_suite(plan, tmp_path / "out")
    assert result.failures == {}
    chosen = [row for row in rows_of(tmp_path / "out", "trade_off") if row["condition"] == "chosen"]
    assert {row["published"] for row in chosen if row["method"] == "edit" and row["measure"] == "truthful"} == {
        "0.5697"
    }


# The training baselines ----------------------------------------------------------------------------------------------


def test_training_is_a_part_of_its_own(model: str, tmp_path: Path) -> None:
    out = tmp_path / "suite"
    plan = plan_suite("training", out, model=model, profile="smoke", changes=FAST)
    assert plan.parts == ("training",)
    only = SuitePlan(plan.suite, plan.profile_name, plan.profile, plan.seeds, plan.runs[1:2])
    result: SuiteResult = run_suite(only, out)
    assert result.failures == {}
    rows = [row for row in rows_of(out, "training") if row["method"] == "rank-1 LoRA"]
    assert {row["configurations"] for row in rows} == {"1"}
    assert {row["configuration"] for row in rows} == {"learning rate 0.001, steps 2"}
    (tried,) = [row for row in result.parts["model-truthfulness", "training"].rows if row.method == "lora"]
    assert all(
        len(values) == len(result.parts["model-truthfulness", "training"].base.values[name])
        for name, values in tried.values.items()
    )
    again = run_suite(only, out)  # nothing is trained or asked again
    assert again.parts == result.parts


def test_all_leaves_training_out_where_its_packages_are_missing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer2edit.training.course._PACKAGES", ("a_package_that_is_not_there",))
    plan = plan_suite("all", tmp_path, model=model, profile="smoke", changes=FAST)
    assert "training" not in plan.parts
    with pytest.raises(FileError, match="needs the package a_package_that_is_not_there"):
        plan_suite("training", tmp_path, model=model, profile="smoke", changes=FAST)


# The styles ---------------------------------------------------------------------------------------------------------


def test_styles_are_compared_with_every_baseline(model: str, tmp_path: Path) -> None:
    out = tmp_path / "suite"
    plan = plan_suite("styles", out, model=model, profile="smoke", changes=FAST)
    assert [run.behaviour for run in plan.runs] == ["lists", "pirate"]
    result = run_suite(replace(plan, runs=plan.runs[1:]), out)
    assert result.failures == {}
    rows = rows_of(out, "training")
    chosen = {row["method"] for row in rows if row["condition"] == "chosen"}
    every = {"edit", "steering", "system prompt", "one layer", "direction", "rank-1 LoRA"}
    assert chosen <= every
    assert {row["method"] for row in rows_of(out, "trade_off")} == {"original model", *chosen} - {"rank-1 LoRA"}
    budgets = {front.method for front in result.parts["model-pirate", "training"].fronts}
    # A ladder of one layer may have no strength at these KLs in a random model.
    assert (
        {"full", "steering", "system", "lora"}
        <= budgets
        <= {"full", "steering", "system", "layer", "direction", "lora"}
    )
    page = (out / PAGE).read_text(encoding="utf-8")
    assert page.startswith("# Styles, which are not the paper's, profile smoke\n")
    assert "arXiv" not in page
