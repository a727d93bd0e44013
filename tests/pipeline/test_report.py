"""The report stage and the verb `report` on whole runs of a pico model, and on runs that stopped half-way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pages import Parsed
from runs import command, tiny_recipe
from steer2edit.errors import EditError, FileError
from steer2edit.files.reading import read_json, read_jsonl
from steer2edit.pipeline.names import TRIED_ANSWERS
from steer2edit.pipeline.report import recipe_of, report
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import run_all
from steer2edit.recipe import Recipe


@pytest.fixture
def recipe(pico_folder: str) -> Recipe:
    return tiny_recipe(pico_folder)


@pytest.fixture
def whole(tiny_run: Path) -> Path:
    return tiny_run


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def _page(folder: Path) -> Parsed:
    return Parsed((folder / "report.html").read_text(encoding="utf-8"))


def test_a_run_leaves_its_page_with_the_numbers_of_its_results(whole: Path) -> None:
    page, results = _page(whole), read_json(whole / "evaluation/results.json")
    cells = page.cells()
    for kind, system in results["systems"].items():
        for measure in ("refusal", "over_refusal", "utility_loss"):
            assert float(cells[kind, measure]["data-mean"] or "") == system[measure]["mean"]
    assert "not finished" not in page.text
    assert "report.html" in read_json(whole / "manifest.json")["stages"]["report"]["files"]
    trials = [row["id"] for row in read_jsonl(whole / "search/trials.jsonl")]
    assert [row["id"] for row in page.data["trade_off"]["trials"]] == trials


@pytest.mark.parametrize(("file", "rows_are_of"), [("evaluation/answers.jsonl", "test"), (TRIED_ANSWERS, "validation")])
def test_the_labels_of_the_answers_make_the_means(whole: Path, file: str, rows_are_of: str) -> None:
    rows = read_jsonl(whole / file)
    assert len(rows) == 5
    if rows_are_of == "test":
        systems = read_json(whole / "evaluation/results.json")["systems"]
        means = {
            kind: {name: system[name]["mean"] for name in ("refusal", "degenerate")} for kind, system in systems.items()
        }
    else:
        trials = read_jsonl(whole / "search/trials.jsonl")
        means = {row["id"]: {name: row[name] for name in ("refusal", "degenerate")} for row in trials}
    for id, expected in means.items():
        for name, mean in expected.items():
            labels = [row["labels"][id][name] for row in rows if name in row["labels"][id]]
            assert sum(labels) / len(labels) == mean
    texts = [row[id] if rows_are_of == "test" else row["answers"][id] for row in rows for id in means]
    assert all(isinstance(text, str) for text in texts)


def test_the_answers_of_a_trial_are_those_of_the_journal(whole: Path) -> None:
    (journal,) = (whole / "search").glob("journal-*.jsonl")
    lines = [line for line in read_jsonl(journal) if line["what"] == "answers" and line["round"] == "0"]
    made = [outcome["text"] for line in lines for outcome in line["outcomes"]]
    trials = [row["id"] for row in read_jsonl(whole / "search/trials.jsonl")]
    rows = read_jsonl(whole / TRIED_ANSWERS)
    assert made == [row["answers"][id] for id in trials for row in rows]


@pytest.mark.usefixtures("undrawn")
def test_the_verb_takes_a_run_directory(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (copy / "report.html").unlink()
    assert command(monkeypatch, "report", copy, "--quiet") == 0
    assert capsys.readouterr().out == f"report: done, see {copy}/report.html\n"
    assert "not finished" not in _page(copy).text


def test_of_a_run_that_was_stopped_it_shows_what_is_there(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.rmtree(copy / "evaluation")
    (copy / "report.html").unlink()
    figures = {path: path.read_bytes() for path in (copy / "figures").iterdir()}
    assert command(monkeypatch, "report", copy) == 0
    assert "shows what is there; missing: evaluate" in capsys.readouterr().err
    page = _page(copy)
    assert "The stage evaluate left files that were changed or lost since." in page.text
    assert "What it bought and what it cost (stage evaluate)" in page.text
    assert page.data["trade_off"]["chosen"]["edit"]
    assert {path: path.read_bytes() for path in (copy / "figures").iterdir()} == figures


def test_with_a_recipe_the_missing_stage_is_an_error_and_the_page_is_there(
    copy: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (copy / "edit.safetensors").unlink()
    (copy / "report.html").unlink()
    assert command(monkeypatch, "report", copy / "recipe.yaml", "--out", copy) == 2
    assert "the stage edit has not been run with this recipe" in capsys.readouterr().err
    assert "The stage edit left files" in _page(copy).text
    assert not (copy / "nothing").exists()


def test_a_run_that_fails_leaves_its_page(copy: Path, recipe: Recipe) -> None:
    strict = tiny_recipe(recipe.model.name, search__limits={"utility_loss": 0.0})
    with pytest.raises(EditError, match="no edit stays within the limits"):
        run_all(Run(copy, strict))
    page = _page(copy)
    assert "The stage edit was run with another recipe." in page.text
    assert page.data["trade_off"]["chosen"] == {}  # the old choice is not this recipe's
    assert "validation" in page.data["answers"]
    assert "test" not in page.data["answers"]


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_before_has_a_page_without_labels(copy: Path, recipe: Recipe) -> None:
    (copy / TRIED_ANSWERS).unlink()
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in read_jsonl(copy / "evaluation/answers.jsonl")]
    from steer2edit.files.reading import sha256
    from steer2edit.files.writing import write_json, write_jsonl

    write_jsonl(copy / "evaluation/answers.jsonl", rows)
    manifest = read_json(copy / "manifest.json")
    del manifest["stages"]["search"]["files"][TRIED_ANSWERS]
    manifest["stages"]["evaluate"]["files"]["evaluation/answers.jsonl"] = sha256(copy / "evaluation/answers.jsonl")
    write_json(copy / "manifest.json", manifest)
    report(Run(copy, recipe), "tiny.yaml", unfinished=False)
    assert list(_page(copy).data["answers"]) == ["measures", "test", "titles"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(FileError, match=r"is no run directory .*no recipe\.yaml"):
        recipe_of(tmp_path)
    assert command(monkeypatch, "report", tmp_path) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_verb_compares_runs(copy: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out = copy.parent / "compared"
    assert command(monkeypatch, "report", whole, copy, "--compare", "--out", out) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{out}/compare.md"
    table = (out / "compare.md").read_text(encoding="utf-8")
    assert "| whole | edit | " in table
    assert "| run | edit | " in table
    assert command(monkeypatch, "report", whole, "--compare") == 2
