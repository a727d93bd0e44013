"""What a run exports: each into a folder of its own, recorded, or the sentence that says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import steer2edit as s2e
from runs import save_pico, tiny_recipe
from steer2edit.artefacts.bias import export_steering
from steer2edit.artefacts.gguf import save_gguf_adapter
from steer2edit.errors import ModelError, RecipeError
from steer2edit.files.reading import read_json, sha256
from steer2edit.files.writing import write_json
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import STAGES, run_all, run_stage
from steer2edit.progress import be_quiet
from steer2edit.recipe import Recipe
from steer2edit.searching.candidates import steering_vectors

EVERYTHING = ["adapter", "checkpoint", "gguf", "steering"]


pytestmark = pytest.mark.usefixtures("quiet", "undrawn")


def up_to_export(folder: Path, recipe: Recipe) -> Run:
    run = Run(folder, recipe)
    for stage in list(STAGES)[: list(STAGES).index("export") + 1]:
        run_stage(run, stage, "tiny.yaml")
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def without_card(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name != "README.md"}


def test_everything_is_written_as_python_writes_it_and_recorded(tmp_path: Path) -> None:
    base = save_pico(tmp_path / "model")
    (tmp_path / "model/README.md").write_text("the base's card")
    recipe = tiny_recipe(base, exports=EVERYTHING)
    folder = tmp_path / "run"
    run_all(Run(folder, recipe))
    edit, scores = s2e.Edit.load(folder / "edit.safetensors"), s2e.Scores.load(folder / "scores.safetensors")
    gamma = read_json(folder / "choice.json")["steering"]["config"]["gamma"]
    expected = tmp_path / "expected"
    edit.save_adapter(expected / "adapter", base=base)
    s2e.export_checkpoint(base, edit, expected / "checkpoint")
    save_gguf_adapter(edit, expected / "gguf/adapter.gguf")
    export_steering(base, steering_vectors(scores), gamma, expected / "steering")
    assert read_json(folder / "exports.json") == {kind: {"folder": kind} for kind in EVERYTHING}
    files = Run(folder, recipe).manifest()["stages"]["export"]["files"]
    assert files.pop("exports.json") == sha256(folder / "exports.json")
    assert {name.partition("/")[0] for name in files} == set(EVERYTHING)
    for kind in EVERYTHING:
        assert without_card(folder / kind) == without_card(expected / kind), kind
        assert {f"{kind}/{name}" for name in without_card(folder / kind)} == {n for n in files if n.startswith(kind)}
        card = (folder / kind / "README.md").read_text(encoding="utf-8")
        assert "made without training" in card
        assert ("Edit `" in card) == (kind != "steering")
        assert ModelCard(card).data.to_dict()["base_model"] == "model"
    assert all(sha256(folder / name) == digest for name, digest in files.items())
    assert Run(folder, recipe).is_whole("export")
    assert Run(folder, recipe).is_whole("report")
    # The steered checkpoint answers as the model does under the strength that was chosen.
    model, ids = AutoModelForCausalLM.from_pretrained(base).eval(), torch.arange(3, 30)[None]
    with torch.no_grad(), s2e.intervening(model, s2e.steering(steering_vectors(scores), gamma)):
        hooked = model(ids).logits
    with torch.no_grad():
        served = AutoModelForCausalLM.from_pretrained(folder / "steering").eval()(ids).logits
    torch.testing.assert_close(served, hooked, rtol=0, atol=1e-4)


def test_what_is_no_longer_asked_for_is_removed(tmp_path: Path) -> None:
    base = save_pico(tmp_path / "model")
    run = up_to_export(tmp_path / "run", tiny_recipe(base, exports=["gguf", "steering"]))
    assert (run.path("gguf/adapter.gguf").is_file(), run.path("steering/config.json").is_file()) == (True, True)
    run = up_to_export(tmp_path / "run", tiny_recipe(base, exports=["adapter"]))
    assert not run.path("gguf").exists()
    assert not run.path("steering").exists()
    assert read_json(run.path("exports.json")) == {"adapter": {"folder": "adapter"}}


def test_an_architecture_without_a_place_for_biases_is_told_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(save_pico(tmp_path / "model", "qwen2"), exports=["adapter", "steering"])
    be_quiet(False)
    run_all(Run(tmp_path / "run", recipe))
    exports = read_json(tmp_path / "run/exports.json")
    assert exports["adapter"] == {"folder": "adapter"}
    reason = exports["steering"]["not_written"]
    assert reason.startswith("no steering: steering cannot be written as biases into a qwen2 (got: its configuration")
    assert f"  {reason}\n" in capsys.readouterr().err
    assert not (tmp_path / "run/steering").exists()
    assert Run(tmp_path / "run", recipe).is_whole("report")


@pytest.mark.parametrize("strengths", [[], [0.1]])
def test_without_a_chosen_strength_no_steering_is_written_and_that_is_told(
    strengths: list[float], tmp_path: Path
) -> None:
    recipe = tiny_recipe(save_pico(tmp_path / "model"), exports=["steering"], search__steering=strengths)
    run = up_to_export(tmp_path / "run", recipe)
    if strengths:  # as when none is within the limits
        assert run.path("steering").is_dir()
        write_json(run.path("choice.json"), read_json(run.path("choice.json")) | {"steering": None})
        STAGES["export"].work(run)
    reason = read_json(run.path("exports.json"))["steering"]["not_written"]
    assert reason.startswith("no steering: no steering strength was chosen")
    assert not run.path("steering").exists()


def test_what_llama_cpp_cannot_hold_is_told_and_a_missing_package_stops_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = up_to_export(tmp_path / "run", tiny_recipe(save_pico(tmp_path / "model"), exports=["gguf"]))
    monkeypatch.setattr("steer2edit.artefacts.gguf.ARCHITECTURES", {"gpt2": "gpt2"})
    assert STAGES["export"].work(run) == ["exports.json"]
    reason = read_json(run.path("exports.json"))["gguf"]["not_written"]
    assert reason == (
        "no gguf: an adapter for llama.cpp cannot be written for this family (got: model_type 'llama'). Known: gpt2. "
        "Otherwise export a checkpoint, and convert that."
    )
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModelError, match="pip install gguf"):
        STAGES["export"].work(run)
    assert not run.path("gguf").exists()


def test_a_gguf_base_has_no_checkpoint_to_write_into_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = up_to_export(tmp_path / "run", tiny_recipe(save_pico(tmp_path / "model"), exports=EVERYTHING))
    written = contents(run.path("gguf"))
    raw = run.recipe.model_dump(mode="json")
    run.recipe = Recipe.model_validate(raw | {"model": raw["model"] | {"name": "models/small.gguf"}})
    monkeypatch.setattr("steer2edit.models.load.local_folder", lambda *_: pytest.fail("no folder is asked for"))
    STAGES["export"].work(run)
    expected = read_json(run.path("exports.json"))
    sentence = "a GGUF file is no safetensors checkpoint (got: models/small.gguf). Export an adapter instead."
    assert expected == {
        "adapter": {"folder": "adapter"},
        "checkpoint": {"not_written": f"no checkpoint: {sentence}"},
        "gguf": {"folder": "gguf"},
        "steering": {"not_written": f"no steering: {sentence}"},
    }
    assert {path.name for path in run.folder.iterdir()} & {*EVERYTHING} == {"adapter", "gguf"}
    assert contents(run.path("gguf")) == written


def test_where_peft_cannot_hold_the_edit_the_checkpoint_takes_its_place_beside_what_else_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = up_to_export(tmp_path / "run", tiny_recipe(save_pico(tmp_path / "model"), exports=["adapter", "gguf"]))
    monkeypatch.setattr("steer2edit.artefacts.adapter.obstacle", lambda edit: "one expert")
    files = STAGES["export"].work(run)
    expected = json.loads(run.path("exports.json").read_text(encoding="utf-8"))
    assert expected == {
        "adapter": {
            "not_written": "PEFT cannot hold this edit (one expert): a checkpoint is written in the adapter's place"
        },
        "checkpoint": {"folder": "checkpoint"},
        "gguf": {"folder": "gguf"},
    }
    assert "checkpoint/model.safetensors" in files
    assert "gguf/adapter.gguf" in files


def test_an_export_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(RecipeError, match=r"exports\.1 cannot be used .*'onnx'.*'gguf' or 'steering'"):
        tiny_recipe(exports=["gguf", "onnx"])
