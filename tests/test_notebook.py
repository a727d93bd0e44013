"""The notebook runs as it stands, on the real model; so does the page that starts with the same steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import steer2edit as s2e
from runs import NEEDS_THE_MODEL
from test_doc_blocks import run_page

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "start.ipynb"


def outputs(cell: Any) -> str:
    """What a cell printed or showed."""
    shown = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell["outputs"]]
    return "".join("".join(text) for text in shown)


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert [cell for cell in notebook["cells"] if cell.get("outputs") or cell.get("execution_count")] == []


class TestOnTheRealModel:
    pytestmark = NEEDS_THE_MODEL

    def test_the_notebook_runs_and_its_edit_changes_answers(self, tmp_path: Path) -> None:
        import nbformat
        from nbclient import NotebookClient

        notebook = nbformat.read(NOTEBOOK, as_version=4)
        nbformat.validate(notebook)
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
        by_code = {cell["source"]: outputs(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"}
        (answers,) = [shown for code, shown in by_code.items() if "def answer" in code]
        lines = [line.strip() for line in answers.splitlines()]
        original = [line.removeprefix("original:") for line in lines if line.startswith("original:")]
        edited = [line.removeprefix("edited:") for line in lines if line.startswith("edited:")]
        assert len(original) == len(edited) == 2
        assert all(a.strip() != b.strip() for a, b in zip(original, edited, strict=True))
        edit = s2e.Edit.load(tmp_path / "pirate.safetensors")
        assert {int(key.split(".")[0]) for key in edit.edited()} <= set(range(15, 30))
        assert (tmp_path / "pirate-adapter/adapter_model.safetensors").is_file()

    def test_the_page_that_starts_runs_as_it_stands(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        names = run_page(ROOT / "docs" / "start.md", {})
        assert names["edit"].edited()
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].startswith("Edit(id=")
        assert len(printed) >= 2
        assert s2e.Edit.load(tmp_path / "pirate.safetensors").id == names["edit"].id
