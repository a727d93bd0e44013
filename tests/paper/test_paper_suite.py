"""Whole suites on tiny random models: what they leave, what a kill costs, and what a failure keeps."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runs import command
from sides import SENTENCE
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import FileError
from steer2edit.paper.facts import paper_models
from steer2edit.paper.parts import FOLDER
from steer2edit.paper.plan import SuitePlan, plan_suite
from steer2edit.paper.rows import PartResult
from steer2edit.paper.work import PAGE, SuiteResult, run_suite
from steer2edit.pipeline.run import Run
from steer2edit.progress import be_quiet
from tiny_six import save_like, save_tiny, write_sets

# Answers to attacks are a hundred tokens long at least: one prompt of each is enough here.
FAST = ["evaluation.resamples=60"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    be_quiet()
    yield
    be_quiet(False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def everything(model: str, out: Path) -> SuitePlan:
    return plan_suite("all", out, model=model, profile="smoke", changes=FAST)


@pytest.fixture(scope="module")
def whole(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite `all` that nothing disturbed. Nobody changes it."""
    be_quiet()
    out = tmp_path_factory.mktemp("suites") / "whole"
    result = run_suite(everything(model, out), out)
    assert result.failures == {}
    return out


NAMES = ("safety", "truthfulness", "efficiency")


def rows_of(out: Path, part: str) -> list[dict[str, str]]:
    with open(out / "tables" / f"{part}.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tables_of(out: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted((out / "tables").iterdir())}


def test_every_part_has_a_table_and_every_table_its_figures(whole: Path) -> None:
    parts = ("trade_off", "ablations", "overall", "sensitivity", "training", "side_effects")
    assert set(tables_of(whole)) == {f"{part}.{kind}" for part in parts for kind in ("csv", "md")}
    figures = {path.stem for path in (whole / "figures").glob("*.pdf")}
    assert figures == {path.stem for path in (whole / "figures").glob("*.png")}
    drawn = ("trade_off", "ablations", "sensitivity", "lambda")
    assert figures == {f"{part}-model-{name}" for part in drawn for name in NAMES}
    page = (whole / PAGE).read_text(encoding="utf-8")
    assert all(f"(figures/{name}.png)" in page for name in figures)
    assert "# Not measured" not in page


def test_every_row_has_its_n_and_its_interval(whole: Path) -> None:
    for part in ("trade_off", "ablations", "sensitivity"):
        rows = rows_of(whole, part)
        assert {row["behaviour"] for row in rows} == set(NAMES)
        for row in rows:
            assert int(row["n"]) > 0
            assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])
            assert row["published"] == ""


def test_the_trade_off_has_the_sweep_the_best_edits_and_the_original(whole: Path) -> None:
    for name in NAMES:
        lines = {
            (row["method"], row["condition"], row["configuration"])
            for row in rows_of(whole, "trade_off")
            if row["behaviour"] == name
        }
        kinds = [(method, how) for method, how, _ in lines]
        assert kinds.count(("original model", "original")) == 1
        assert kinds.count(("edit", "chosen")) == kinds.count(("steering", "chosen")) == 1
        assert kinds.count(("edit", "star")) == 1  # of two stars the other is the choice
        assert {c for _, how, c in lines if how == "swept"} == {"γ 0.1", "γ 0.4"}


def test_the_ablations_have_every_variant_with_the_same_numbers_and_at_equal_budgets(whole: Path) -> None:
    variants = ["edit", "k_mean", "k_svd", "g_dot", "l0", "l2"]
    for name in NAMES:
        rows = [row for row in rows_of(whole, "ablations") if row["behaviour"] == name]
        same = {row["method"]: row["configuration"] for row in rows if row["condition"] == "same numbers"}
        assert list(same) == variants
        # The same (ρ, α) for all: nothing but the variant differs.
        assert len({text.partition(", variant")[0] for text in same.values()}) == 1
        budgets = {row["method"]: int(row["configurations"]) for row in rows if row["condition"] == "equal budget"}
        assert set(budgets.values()) <= {1, 2}
        kls = {row["found_for_kl"] for row in rows if row["condition"] == "equal KL"}
        assert len(kls) <= 1
        part = PartResult.load(whole / "runs" / f"model-{name}" / FOLDER / "ablations.json")
        assert {front.method for front in part.fronts} == {
            *("full", "k_mean", "k_svd", "g_dot", "l0", "l2"), "attention alone", "MLP alone", "steering"
        }  # fmt: skip
        assert all(front.hypervolume or front.why for front in part.fronts)


def test_each_block_type_alone_has_no_budget_for_the_other(whole: Path) -> None:
    alone = {"attention alone": "ρ_mlp off", "MLP alone": "ρ_attn off"}
    rows = [row for row in rows_of(whole, "ablations") if row["method"] in alone]
    assert rows
    assert all(alone[row["method"]] in row["configuration"] for row in rows)


def test_the_sensitivity_sweeps_one_budget_at_the_chosen_alpha(whole: Path) -> None:
    rows = [row for row in rows_of(whole, "sensitivity") if row["condition"] == "swept"]
    swept = ("ρ_attn 0.1, ρ_mlp off", "ρ_attn 0.3, ρ_mlp off", "ρ_attn off, ρ_mlp 0.1", "ρ_attn off, ρ_mlp 0.3")
    assert {row["configuration"] for row in rows} == {f"{settings}, α 0.3" for settings in swept}
    assert {row["rank"] for row in rows} == {""}


def test_the_last_table_has_every_measure_of_every_behaviour_under_every_edit(whole: Path) -> None:
    rows = rows_of(whole, "side_effects")
    places = {(row["edit"], row["of"]) for row in rows}
    assert places == {(f"model-{edit}", f"model-{of}") for edit in NAMES for of in NAMES}
    attributes = {("model-safety", "refusal"), ("model-truthfulness", "truthful"), ("model-efficiency", "tokens")}
    assert {(row["of"], row["measure"]) for row in rows if row["own"] == "1"} == attributes
    for row in rows:
        difference = float(row["edited"]) - float(row["original"])
        assert float(row["difference"]) == pytest.approx(difference, abs=1e-4)
        assert float(row["low"]) - 1e-6 <= float(row["difference"]) <= float(row["high"]) + 1e-6


def test_an_edits_effect_on_its_own_items_is_that_of_its_run(whole: Path) -> None:
    """The side effects are measured by themselves, and give what the run's own test gave."""
    for row in rows_of(whole, "side_effects"):
        if row["edit"] == row["of"]:
            results = json.loads((whole / "runs" / row["of"] / "evaluation/results.json").read_text(encoding="utf-8"))
            measured = results["systems"]["edit"][row["measure"]]
            assert float(row["edited"]) == pytest.approx(measured["mean"], abs=1e-4)
            assert int(row["n"]) == measured["n"]


def test_a_suite_that_is_done_asks_nothing_again(whole: Path, model: str, tmp_path: Path, monkeypatch: Any) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "suite"))
    forget_time(out)
    for name in ("generate", "losses"):
        monkeypatch.setattr(TransformersEngine, name, refuse)
    run_suite(everything(model, out), out)
    assert tables_of(out) == tables_of(whole)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("the engine is asked again")


def forget_time(out: Path) -> None:
    """Removes what is made of the rest: tables, figures and the page."""
    for name in ("tables", "figures"):
        shutil.rmtree(out / name)
    (out / PAGE).unlink()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_suite_that_was_killed_goes_on_and_ends_with_the_same_tables(
    whole: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Killed six times, each time after another number of the engine's calls."""
    out = tmp_path / "suite"
    draw = random.Random(seed)
    kills = [draw.randint(1, 12) for _ in range(6)]
    calls = 0
    for name in ("generate", "losses"):
        original = getattr(TransformersEngine, name)

        def counted(self: Any, *arguments: Any, original: Any = original, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if kills and calls == kills[0]:
                raise KeyboardInterrupt
            return original(self, *arguments, **more)

        monkeypatch.setattr(TransformersEngine, name, counted)
    while kills:
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            run_suite(everything(model, out), out)
        kills.pop(0)
    run_suite(everything(model, out), out)
    assert tables_of(out) == tables_of(whole)


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
    wanted = {"safety": "attribute", "truthfulness": "product", "efficiency": "gsm8k"}[behaviour]
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


# Failures ------------------------------------------------------------------------------------------------------------


def test_a_run_that_fails_says_why_and_the_others_are_kept(model: str, tmp_path: Path) -> None:
    """Answers of one token are all alike, so that there is no contrast between short and long ones."""
    out = tmp_path / "suite"
    plan = plan_suite("all", out, model=model, profile="smoke", changes=[*FAST, "behaviour.new_tokens=1"])
    result = run_suite(plan, out)
    assert "no contrast between short and long answers" in result.failures["model-efficiency"]
    assert result.first_error is not None
    assert {row["behaviour"] for row in rows_of(out, "ablations")} == {"safety", "truthfulness"}
    assert {row["of"] for row in rows_of(out, "side_effects")} == {"model-safety", "model-truthfulness"}
    assert f"- model-efficiency: {result.failures['model-efficiency']}" in (out / PAGE).read_text(encoding="utf-8")


def test_an_over_long_question_is_left_out_and_said(tmp_path: Path) -> None:
    sets = write_sets(tmp_path / "sets")
    with open(sets / "gsm8k_test.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"question": "bread " * 4000, "answer": "3"}) + "\n")
    rows = [json.loads(line) for line in (sets / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()]
    (sets / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]), encoding="utf-8")
    out, model = tmp_path / "suite", save_tiny(tmp_path / "model")
    plan = plan_suite(
        "truthfulness", out, model=model, profile="smoke", data=sets, changes=[*FAST, "data.utility=[gsm8k]"]
    )
    assert run_suite(plan, out).failures == {}
    page = (out / PAGE).read_text(encoding="utf-8")
    assert "- gsm8k: 1 questions are longer than the model reads and are left out" in page


def test_a_gated_set_is_one_sentence_and_the_rest_is_kept(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer2edit.pipeline import tasks

    whole = tasks.load_set

    def gated(task: Any, *rest: Any) -> Any:
        if task.name == "commonsenseqa":
            raise FileError("the set of commonsenseqa is gated", got="no access", fix="Log in.")
        return whole(task, *rest)

    monkeypatch.setattr(tasks, "load_set", gated)
    sets, out = write_sets(tmp_path / "sets"), tmp_path / "suite"
    plan = plan_suite("truthfulness", out, model=model, profile="smoke", data=sets, changes=FAST)
    result = run_suite(plan, out)
    assert list(result.failures) == ["model-truthfulness"]
    measures = {row["measure"] for row in rows_of(out, "trade_off")}
    assert {"truthful", "gsm8k", "utility"} <= measures
    assert "commonsenseqa" not in measures
    page = (out / PAGE).read_text(encoding="utf-8")
    assert "- commonsenseqa is not measured: the set of commonsenseqa is gated (got: no access). Log in." in page


# The training baselines ----------------------------------------------------------------------------------------------


def test_training_is_a_part_of_its_own(model: str, tmp_path: Path) -> None:
    out = tmp_path / "suite"
    plan = plan_suite("training", out, model=model, profile="smoke", changes=FAST)
    assert plan.parts == ("training",)
    only = SuitePlan(plan.suite, plan.profile_name, plan.profile, plan.seeds, plan.runs[1:2])
    result: SuiteResult = run_suite(only, out)
    assert result.failures == {}
    rows = [row for row in rows_of(out, "training") if row["method"] == "lora"]
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


# The command line ----------------------------------------------------------------------------------------------------


def test_the_verb_runs_a_suite_and_names_its_files(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("paper", "sensitivity", "--model", model, "--profile", "smoke", "--out", tmp_path / "out")
    code = command(monkeypatch, *arguments, "--set", "evaluation.resamples=40")
    seen = capsys.readouterr()
    assert (code, [Path(line).name for line in seen.out.splitlines()][-1]) == (0, PAGE)
    assert all(Path(line).is_file() for line in seen.out.splitlines())
    assert "tokens written" in seen.err
    assert "in all: about " in seen.err


def test_a_plan_runs_nothing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ("paper", "all", "--model", model, "--profile", "smoke", "--out", out, "--plan", "--quiet")
    assert command(monkeypatch, *arguments) == 0
    assert "model-safety: " in capsys.readouterr().out
    assert not (out / "runs").exists()
    assert command(monkeypatch, *arguments, "--json") == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["behaviour"] for run in runs] == list(NAMES)
    assert all(run["seconds"] > 0 for run in runs)


def test_a_plan_of_one_of_the_six_has_both_accelerators_and_this_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_like(tmp_path, "qwen3-4b-thinking-2507")
    arguments = ("--model", model, "--as", "qwen3-4b-thinking-2507", "--profile", "smoke", "--out", tmp_path / "out")
    assert command(monkeypatch, "paper", "efficiency", *arguments, "--plan", "--quiet") == 0
    said = capsys.readouterr().out
    for machine in ("one 24 GB GPU", "one 80 GB GPU", "this CPU, fp32"):
        assert machine in said
    assert said.count("an estimate") == 3


def test_what_cannot_be_measured_ends_with_exit_code_2_and_keeps_the_page(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise FileError("the sweep cannot be measured", got="nothing", fix="Try again.")

    monkeypatch.setattr("steer2edit.paper.work.measure_part", fails)
    arguments = ("paper", "truthfulness", "--model", model, "--profile", "smoke", "--out", tmp_path / "out", "--quiet")
    code = command(monkeypatch, *arguments, "--set", "evaluation.resamples=40")
    seen = capsys.readouterr()
    assert code == 2
    assert SENTENCE.fullmatch(seen.err)
    assert (tmp_path / "out" / PAGE).is_file()


def test_side_effects_of_any_runs(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [whole / "runs" / f"model-{name}" for name in ("safety", "efficiency")]
    code = command(monkeypatch, "side-effects", *runs, "--out", tmp_path / "effects", "--quiet", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert code == 0
    assert {(row["edit"], row["of"]) for row in rows} == {
        (f"model-{a}", f"model-{b}") for a in ("safety", "efficiency") for b in ("safety", "efficiency")
    }
    assert {file.name for file in (tmp_path / "effects").iterdir()} >= {"side_effects.csv", "side_effects.md"}


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["model-safety"], "side effects are those on another behaviour (got: 1 run)"),
        (["model-safety", "model-safety"], "two runs have the same name (got: model-safety)"),
        (["model-safety", "nowhere"], "nowhere is no run directory (got: no recipe.yaml)"),
    ],
)
def test_runs_that_cannot_be_compared_are_one_sentence(
    whole: Path,
    folders: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [whole / "runs" / name for name in folders]
    assert command(monkeypatch, "side-effects", *runs, "--out", tmp_path, "--quiet") == 2
    error = capsys.readouterr().err
    assert said in error
    assert SENTENCE.fullmatch(error)


def test_runs_of_two_models_are_refused(whole: Path, tmp_path: Path) -> None:
    from steer2edit.paper.side_effects import measure_side_effects

    other = Path(shutil.copytree(whole / "runs/model-safety", tmp_path / "other"))
    run = Run(other, Run(other, everything("elsewhere", tmp_path).runs[0].recipe).recipe)
    with run.working():  # writes the other model's recipe
        pass
    with pytest.raises(FileError, match=r"not read before an edit is chosen|of several models"):
        measure_side_effects([whole / "runs/model-efficiency", other], tmp_path / "out")
