"""What a failure in a suite says and keeps, and the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from runs import command
from sides import SENTENCE
from steer2edit.errors import FileError
from steer2edit.paper.plan import plan_suite
from steer2edit.paper.work import PAGE, run_suite
from steer2edit.pipeline.run import Run
from suites import FAST, NAMES, rows_of
from tiny_six import save_like, save_tiny, write_sets

pytestmark = pytest.mark.usefixtures("quiet", "undrawn")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


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


def test_an_over_long_prompt_is_one_sentence_and_the_search_is_kept(model: str, tmp_path: Path) -> None:
    sets = write_sets(tmp_path / "sets")
    path = sets / "truthfulqa_test.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[0]["question"] = "bread " * 4000
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "suite"
    plan = plan_suite("truthfulness", out, model=model, profile="smoke", data=sets, changes=[*FAST, "data.utility=[]"])
    result = run_suite(plan, out)
    assert list(result.failures) == ["model-truthfulness", "model-truthfulness, trade-off"]
    assert {why.partition(" (got")[0] for why in result.failures.values()} == {
        "a prompt and its answer are longer than the model can read"
    }
    assert all(why in (out / PAGE).read_text(encoding="utf-8") for why in result.failures.values())
    assert Run(out / "runs/model-truthfulness", plan.runs[0].recipe).is_whole("edit")


def test_an_over_long_question_is_left_out_and_said(tmp_path: Path) -> None:
    sets = write_sets(tmp_path / "sets")
    with open(sets / "gsm8k_test.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"question": "bread " * 4000, "answer": "3"}) + "\n")
    rows = [json.loads(line) for line in (sets / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()]
    (sets / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]), encoding="utf-8")
    out, model = tmp_path / "suite", save_tiny(tmp_path / "model")
    plan = plan_suite(
        "truthfulness",
        out,
        model=model,
        profile="smoke",
        data=sets,
        changes=[*FAST, "data.utility=[gsm8k]", "search.baselines=[rosi]"],
    )
    assert run_suite(plan, out).failures == {}
    asked = {row["method"] for row in rows_of(out, "trade_off") if row["measure"] == "gsm8k" and row["mean"]}
    assert asked >= {"edit", "ROSI"}
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


# The command line ----------------------------------------------------------------------------------------------------


def test_the_verb_runs_a_suite_and_names_its_files(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("paper", "sensitivity", "--model", model, "--profile", "smoke", "--out", tmp_path / "out")
    pages = tmp_path / "docs"
    code = command(monkeypatch, *arguments, "--set", "evaluation.resamples=40", "--pages", pages)
    seen = capsys.readouterr()
    files = [Path(line) for line in seen.out.splitlines()]
    assert code == 0
    assert all(file.is_file() for file in files)
    assert {PAGE, "cost.json", "sensitivity-smoke.md"} <= {file.name for file in files}
    assert "tokens written" in seen.err
    assert "in all: about " in seen.err
    # What it took, by part, beside what was estimated; the page for the documentation has it, too.
    assert re.search(r"^It took .+; .+ were estimated before it, a factor of \d+\.\d\d\.$", seen.err, re.MULTILINE)
    cost = json.loads((tmp_path / "out/cost.json").read_text(encoding="utf-8"))
    known = {row["part"] for row in cost["parts"] if row["taken"] is not None and row["estimated"] is not None}
    assert known >= {"traces", "probe", "score", "search", "evaluate", "report", "sensitivity", "tables and figures"}
    assert cost["all"]["taken"] == pytest.approx(sum(row["taken"] or 0 for row in cost["parts"]), abs=0.01)
    page = (pages / "sensitivity-smoke.md").read_text(encoding="utf-8")
    assert "    steer2edit paper sensitivity --model model --profile smoke --set evaluation.resamples=40" in page
    assert "| sensitivity | " in page
    assert str(tmp_path) not in page
    assert all((pages / figure).is_file() for figure in re.findall(r"\]\(([^)]+\.png)\)", page))


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
