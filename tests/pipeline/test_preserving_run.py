"""A run whose edits preserve: evidence through every stage, and what the recipe refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import steer2edit as s2e
from runs import save_pico, tiny_recipe
from steer2edit.errors import RecipeError
from steer2edit.pipeline import keys
from steer2edit.pipeline.reporting import contents_of
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.share import reproduce
from steer2edit.pipeline.stages import run_all
from steer2edit.report.html.render import write_page
from steer2edit.report.inspection import describe


def test_a_run_with_edits_that_preserve_says_where_its_edit_fires(tmp_path: Path) -> None:
    recipe = tiny_recipe(save_pico(tmp_path / "model"), search__variants=["preserve", "full"])
    run = Run(tmp_path / "run", recipe)
    run_all(run)
    probe = s2e.Probe.load(tmp_path / "run/probe.safetensors")
    assert probe.evidence is not None
    # Benign answers are preserved, the model's own answers to harmful prompts are not.
    assert {(row.label, row.group) for row in probe.evidence.rows} == {("positive", "harmful"), ("negative", "benign")}
    trials = [json.loads(line) for line in (tmp_path / "run/search/trials.jsonl").read_text().splitlines()]
    variants = [row["config"].get("variant", "full") for row in trials if row["kind"] == "edit"]
    assert sorted(variants) == ["full", "full", "preserve", "preserve"]
    choice = json.loads((tmp_path / "run/choice.json").read_text())
    assert [row["group"] for row in choice["firing"]] == ["positive: harmful", "negative: benign"]
    assert "## Where it fires" in (tmp_path / "run/report.md").read_text()
    # The reach says nothing of the size of an edit whose k̂ is not what drives the component.
    scores = run.scores["full"]
    for epsilon, shown in ((None, True), (0.1, False)):
        scores.edit(rho_attn=0.1, rho_mlp=None, alpha=0.0, preserve=epsilon).save(tmp_path / "edit.safetensors")
        largest = describe(tmp_path / "edit.safetensors")["largest |λ|"]
        assert [("λ/reach" in row) for row in largest] == [shown] * len(largest)
        assert largest


def test_a_run_without_them_keeps_no_evidence(tmp_path: Path) -> None:
    recipe = tiny_recipe(save_pico(tmp_path / "model"))
    run = Run(tmp_path / "run", recipe)
    run_all(run)
    assert s2e.Probe.load(tmp_path / "run/probe.safetensors").evidence is None
    assert "firing" not in json.loads((tmp_path / "run/choice.json").read_text())


def test_a_recipe_must_say_what_to_preserve() -> None:
    with pytest.raises(RecipeError, match="nothing to preserve"):
        tiny_recipe(search__variants=["preserve"], behaviour__negative=["harmful"])
    named = tiny_recipe(search__variants=["preserve"], behaviour__negative=["harmful", "borderline"])
    assert named.preserved == ("borderline",)
    assert tiny_recipe().preserved == ()


def test_its_page_shows_where_it_fires_and_names_as_text(tmp_path: Path) -> None:
    recipe = tiny_recipe(save_pico(tmp_path / "model"), search__variants=["preserve"])
    run = Run(tmp_path / "run", recipe)
    run_all(run)
    contents = contents_of(run)
    assert contents.choice is not None
    contents.choice["firing"][1]["group"] = "negative: <script>alert(1)</script>"
    write_page(contents, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    section = page[page.index('id="firing"') :]
    assert "positive: harmful" in section
    assert "&lt;script&gt;alert(1)" in section
    assert "<script>alert(1)" not in page


def test_an_edit_is_made_again_as_hard_as_its_file_says(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", tiny_recipe(save_pico(tmp_path / "model"), search__variants=["preserve"]))
    run_all(run)
    assert reproduce(tmp_path / "run", tmp_path / "again")["same"]
    chosen = s2e.Edit.load(tmp_path / "run/edit.safetensors")
    budget = {name: chosen.config[name] for name in ("rho_attn", "rho_mlp", "alpha", "preserve")}
    other = run.scores["full"].edit(**budget, repel=0.0)
    assert other.id != chosen.id
    # As an earlier version wrote it, which knew no β.
    config = {name: value for name, value in other.config.items() if name != "repel"} | {"variant": "preserve"}
    replace(other, config=config).save(tmp_path / "run/edit.safetensors")
    result = reproduce(tmp_path / "run", tmp_path / "once more")
    assert set(result["tensors"].values()) == {"same"}


def test_what_preserves_is_made_again_when_the_package_repels_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    preserving, paper = tiny_recipe(search__variants=["preserve"]), tiny_recipe()
    before = keys.stage_keys(preserving), keys.stage_keys(paper)
    monkeypatch.setattr(keys, "REPEL", 0.7)
    after = keys.stage_keys(preserving), keys.stage_keys(paper)
    changed = {stage for stage, key in before[0].items() if after[0][stage] != key}
    assert changed == set(before[0]) - {"traces", "probe"}
    assert before[1] == after[1]
