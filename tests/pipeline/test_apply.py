"""`steer2edit apply`: edit files become a checkpoint, an adapter, a GGUF adapter or one edit file, as in Python."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import steer2edit as s2e
from conftest import make_pico, make_tokenizer, make_traces
from runs import is_one_sentence, said_by
from steer2edit.artefacts.gguf import save_gguf_adapter
from steer2edit.edits import load_any
from steer2edit.errors import EditError
from steer2edit.models.embedded import EMBEDDED
from steer2edit.pipeline.apply import gather


class Made(NamedTuple):
    """A base and two edits of it, as files and in memory; nothing of it is to be changed."""

    base: Path
    one: Path
    other: Path
    edits: tuple[s2e.Edit, s2e.Edit]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("made")
    model = make_pico("llama")
    model.save_pretrained(root / "base", max_shard_size="20KB")
    make_tokenizer().save_pretrained(root / "base")
    edits = []
    for positions, alpha in (("predicting", 0.2), ("response", 0.4)):
        probe = s2e.collect(model, make_tokenizer(), *make_traces(), positions=positions)  # type: ignore[arg-type]
        edits.append(s2e.score(model, probe).edit(rho_attn=0.3, rho_mlp=0.3, alpha=alpha))
        edits[-1].save(root / f"{positions}.safetensors")
    return Made(root / "base", root / "predicting.safetensors", root / "response.safetensors", (edits[0], edits[1]))


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)

    return functools.partial(said_by, monkeypatch, capfd)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def restricted(made: Made) -> s2e.Edit:
    return made.edits[0].only(range(1, 3), ("mlp",)).with_strength(0.5)


RESTRICT = ("--strength", "0.5", "--layers", "1-2", "--blocks", "mlp")


# What is written -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_pythons_bit_for_bit(made: Made, say: Any, tmp_path: Path) -> None:
    said = say("apply", made.base, made.one, "--to", "out")
    assert (said.code, said.out) == (0, "out\n")
    assert said.err == f"  checkpoint: 6 sites, rank 1, strength 1, edit {made.edits[0].id}\n"
    s2e.export_checkpoint(made.base, made.edits[0], tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_strength_layers_and_blocks_are_with_strength_and_only(made: Made, say: Any, tmp_path: Path) -> None:
    said = say("apply", made.base, made.one, "--to", "out", *RESTRICT)
    assert said.code == 0
    assert said.err == f"  checkpoint: 2 sites, rank 1, strength 0.5, edit {restricted(made).id}\n"
    s2e.export_checkpoint(made.base, restricted(made), tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    old, new = ({k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
                for folder in (made.base, tmp_path / "out"))  # fmt: skip
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)}


def test_several_edits_are_combined_with_a_strength_for_each(made: Made, say: Any, tmp_path: Path) -> None:
    options = ("--strength", "1", "--strength", "-0.25", "--layers", "2")
    said = say("apply", made.base, made.one, made.other, "--to", "out", *options)
    assert said.code == 0
    one, other = (edit.only([2]).with_strength(s) for edit, s in zip(made.edits, (1, -0.25), strict=True))
    both = s2e.combine(one, other)
    found = s2e.interference(one, other)
    assert found["shared"] > 0
    assert said.err.splitlines() == [
        f"  {one.id} and {other.id} both change {found['shared']} components, {found['opposed']} of them opposite ways "
        f"({found['opposed_share']:.0%})",
        f"  checkpoint: 2 sites, rank 2, strength 1, -0.25, edit {both.id}",
    ]
    s2e.export_checkpoint(made.base, both, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_interference_is_told_even_where_the_edits_are_then_refused(made: Made, say: Any, tmp_path: Path) -> None:
    s2e.export_checkpoint(made.base, made.edits[1], tmp_path / "edited")
    said = say("apply", tmp_path / "edited", made.one, made.other, "--to", "out")
    assert said.code == 2
    lines = said.err.splitlines()
    assert "both change" in lines[0]
    assert len(lines) == 2
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_pythons_and_names_the_base(made: Made, say: Any, tmp_path: Path) -> None:
    said = say("apply", "meta-llama/Llama-3.1-8B", made.one, "--as", "adapter", "--to", "adapter", *RESTRICT)
    assert (said.code, said.out) == (0, "adapter\n")
    restricted(made).save_adapter(tmp_path / "expected", "meta-llama/Llama-3.1-8B")
    assert contents(tmp_path / "adapter") == contents(tmp_path / "expected")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == ("meta-llama/Llama-3.1-8B", 1)


def test_an_adapter_of_two_edits_answers_as_the_checkpoint_of_them(made: Made, say: Any, tmp_path: Path) -> None:
    for kind in ("adapter", "checkpoint"):
        expected = say("apply", made.base, made.one, made.other, "--strength", "0.5", "--as", kind, "--to", kind)
        assert expected.code == 0
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        edited = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").eval()(ids).logits
        base = AutoModelForCausalLM.from_pretrained(made.base).eval()
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(ids).logits
    assert float((edited - before).abs().max()) > 1e-2
    torch.testing.assert_close(adapted, edited, rtol=0, atol=1e-4)


@pytest.mark.parametrize("base", ["a folder", "a name"])
def test_a_gguf_adapter_is_pythons(base: str, made: Made, say: Any, tmp_path: Path) -> None:
    where = made.base if base == "a folder" else "meta-llama/Llama-3.1-8B"
    said = say("apply", where, made.one, "--as", "gguf", "--to", "a.gguf", *RESTRICT)
    assert (said.code, said.out) == (0, "a.gguf\n")
    save_gguf_adapter(restricted(made), tmp_path / "expected.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()


@pytest.mark.parametrize("several", [False, True], ids=["one", "two"])
def test_the_edit_that_is_saved_verifies_what_was_written(several: bool, made: Made, say: Any, tmp_path: Path) -> None:
    files = (made.one, made.other) if several else (made.one,)
    for kind, out in (("checkpoint", "out"), ("edit", "used.safetensors")):
        assert say("apply", made.base, *files, "--as", kind, "--to", out, *RESTRICT).code == 0
    said = say("verify", made.base, "used.safetensors", "out")
    assert (said.code, said.out.splitlines()[-2:]) == (0, ["2 tensors edited as expected", "as expected"])
    assert say("verify", made.base, made.one, "out").code == 1
    saved = load_any(tmp_path / "used.safetensors")
    assert [part.strength for part in saved.parts] == [0.5] * len(files)
    assert say("apply", made.base, "used.safetensors", "--to", "again").code == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_the_embedded_model_is_a_base_for_verify_as_for_apply(
    made: Made, say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer2edit.models.load.embedded_checkpoint", lambda: made.base)
    assert say("apply", EMBEDDED, made.one, "--to", "out").code == 0
    said = say("verify", EMBEDDED, made.one, "out")
    assert (said.code, said.out.splitlines()[-1]) == (0, "as expected")
    said = say("verify", EMBEDDED, made.other, "out")
    assert (said.code, said.out.splitlines()[-1]) == (1, "NOT as expected")


def test_a_strength_scales_what_the_file_holds(made: Made, say: Any, tmp_path: Path) -> None:
    options = ("--strength", "2", "--strength", "-0.5", "--as", "edit")
    assert say("apply", made.base, made.one, made.other, *options, "--to", "both.safetensors").code == 0
    assert say("apply", made.base, "both.safetensors", "--strength", "0.5", "--as", "edit", "--to", "half").code == 0
    parts = load_any(tmp_path / "half").parts
    assert [part.strength for part in parts] == [1.0, -0.25]
    assert [part.id for part in parts] == [made.edits[0].id, made.edits[1].with_strength(-0.25).id]


def test_json_says_what_was_written(made: Made, say: Any) -> None:
    said = say("apply", made.base, made.one, made.other, "--to", "out", "--blocks", "attn", "--json", "--quiet")
    assert (said.code, said.err) == (0, "")
    found = json.loads(said.out)
    parts = [edit.only(blocks=("attn",)) for edit in made.edits]
    met = s2e.interference(*parts)
    assert found == {
        "kind": "apply",
        "as": "checkpoint",
        "path": "out",
        "edit": s2e.combine(*parts).id,
        "parts": [{"id": part.id, "strength": 1.0, "config": dict(part.config)} for part in parts],
        "sites": ["0.attn", "1.attn", "2.attn"],
        "rank": 2,
        "interference": [
            {"edits": [part.id for part in parts]} | {k: met[k] for k in ("shared", "opposed", "opposed_share")}
        ],
    }


def test_inspect_shows_each_edit_of_a_combination_and_how_they_meet(made: Made, say: Any) -> None:
    options = ("--strength", "1", "--strength", "-0.5", "--as", "edit", "--to", "both.safetensors")
    assert say("apply", made.base, made.one, made.other, *options).code == 0
    said = say("inspect", "both.safetensors", "--json")
    assert (said.code, said.err) == (0, "")
    one, other = made.edits[0], made.edits[1].with_strength(-0.5)
    met = s2e.interference(one, other)
    heads = [
        int((torch.cat([s.lam for s in e.sites.values() if s.site.block == "attn"]) != 0).sum()) for e in made.edits
    ]
    found = json.loads(said.out)
    assert (found["kind"], found["id"]) == ("combination", s2e.combine(one, other).id)
    assert [(row["edit"], row["strength"]) for row in found["edits"]] == [(one.id, 1.0), (other.id, -0.5)]
    assert [row["attn"] for row in found["edits"]] == [f"{count} of 12" for count in heads]
    assert found["interference"] == [
        {"edits": [one.id, other.id]} | {k: met[k] for k in ("shared", "opposed", "opposed_share")}
    ]
    printed = say("inspect", "both.safetensors")
    assert (printed.code, printed.err) == (0, "")
    assert f"id: {found['id']}" in printed.out


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--as", "onnx"], ["cannot be written as that", "--as onnx", "gguf"]),
        (["--layers", "1-"], ["--layers names no layers", "got: 1-"]),
        (["--layers", "2-1"], ["--layers names no layers", "got: 2-1", "8-20"]),
        (["--layers", "attn"], ["--layers names no layers", "got: attn"]),
        (["--layers", "-1"], ["--layers names no layers", "got: -1"]),
        (["--layers", "67%-33%"], ["--layers names no layers", "got: 67%-33%", "33%-67%"]),
        (["--layers", "0%-101%"], ["--layers names no layers", "got: 0%-101%"]),
        (["--layers", "1-3"], ["fewer layers", "got: layers 1-3", "layers 0-2"]),
        (["--blocks", "heads"], ["no such block type", "got: heads", "attn, mlp"]),
        (["--strength", "1", "--strength", "2"], ["not as many strengths", "got: 2 strengths, 1 edits", "--strength"]),
        (["--strength", "0"], ["a strength of 0"]),
        (["--strength", "nan"], ["the strength must be finite", "got: nan"]),
        (["--strength", "1e300"], ["is not finite", "Lower the strength"]),
    ],
)
def test_a_wrong_option_is_one_line_and_nothing_is_written(
    arguments: list[str], parts: list[str], made: Made, say: Any, tmp_path: Path
) -> None:
    is_one_sentence(say("apply", made.base, made.one, "--to", "out", *arguments), *parts)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("kind", ["checkpoint", "adapter", "gguf", "edit"])
def test_another_base_is_refused_whatever_is_written(kind: str, made: Made, say: Any, tmp_path: Path) -> None:
    make_pico("llama", seed=1).save_pretrained(tmp_path / "stranger")
    before = contents(tmp_path)
    is_one_sentence(say("apply", tmp_path / "stranger", made.one, "--as", kind, "--to", "out"), "not the base")
    s2e.export_checkpoint(made.base, made.edits[0], tmp_path / "edited")
    is_one_sentence(say("apply", tmp_path / "edited", made.one, "--as", kind, "--to", "out"), "already in this model")
    assert {k: v for k, v in contents(tmp_path).items() if not k.startswith("edited/")} == before


@pytest.mark.parametrize("kind", ["checkpoint", "adapter", "gguf", "edit"])
def test_what_is_there_is_never_written_over(kind: str, made: Made, say: Any, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    is_one_sentence(say("apply", made.base, made.one, "--as", kind, "--to", "out"), "exists already", "--to")
    assert contents(tmp_path) == {"out": b"mine"}
    before = made.one.read_bytes()
    is_one_sentence(say("apply", made.base, made.one, "--as", "edit", "--to", made.one), "exists already")
    assert made.one.read_bytes() == before


def test_files_that_are_no_edits_are_refused(made: Made, say: Any, tmp_path: Path) -> None:
    is_one_sentence(say("apply", made.base, "nowhere", "--to", "out"), "no such file", "nowhere")
    is_one_sentence(say("apply", made.base, made.base / "config.json", "--to", "out"), "not written by steer2edit")
    is_one_sentence(say("apply", made.base, made.one, made.one, "--to", "out"), "the same edit twice")
    is_one_sentence(say("apply", "nowhere/at all/", made.one, "--to", "out"), "cannot be fetched")
    assert contents(tmp_path) == {}


def test_an_edit_that_changes_nothing_there_is_named(made: Made, say: Any, tmp_path: Path) -> None:
    made.edits[0].only(blocks=("mlp",)).save(tmp_path / "mlp.safetensors")
    said = say("apply", made.base, made.one, "mlp.safetensors", "--blocks", "attn", "--to", "out")
    is_one_sentence(said, "mlp.safetensors changes nothing", "got: 3 edited sites, all of them elsewhere")
    made.edits[0].only(layers=[]).save(tmp_path / "zero.safetensors")
    is_one_sentence(say("apply", made.base, "zero.safetensors", "--to", "out"), "λ = 0 everywhere", "Lower ρ")
    assert {*contents(tmp_path)} == {"mlp.safetensors", "zero.safetensors"}


@pytest.mark.parametrize(
    ("shares", "numbers"), [("0%-33%", [0]), ("33%-100%", [1, 2]), ("34%-67%", [1]), ("0%-100%", [0, 1, 2])]
)
def test_layers_may_be_shares_of_the_depth(
    shares: str, numbers: list[int], made: Made, say: Any, tmp_path: Path
) -> None:
    assert say("apply", made.base, made.one, "--layers", shares, "--as", "edit", "--to", tmp_path / "e").code == 0
    assert s2e.Edit.load(tmp_path / "e").id == s2e.Edit.load(made.one).only(numbers).id
    assert gather([made.one], layers=shares).id == s2e.Edit.load(made.one).only(numbers).id


def test_shares_of_an_unknown_depth_are_refused(made: Made, tmp_path: Path) -> None:
    edit = made.edits[0]
    s2e.Edit(edit.sites, edit.config, edit.fingerprint).save(tmp_path / "e.safetensors")
    with pytest.raises(EditError, match="does not say how many layers"):
        gather([tmp_path / "e.safetensors"], layers="33%-67%")


def test_an_edit_of_a_model_of_unknown_depth_takes_any_layers(made: Made, tmp_path: Path) -> None:
    edit = made.edits[0]
    s2e.Edit(edit.sites, edit.config, edit.fingerprint).save(tmp_path / "e.safetensors")
    assert gather([tmp_path / "e.safetensors"], layers=range(2, 90)).id == edit.only([2]).id
    with pytest.raises(EditError, match="fewer layers"):
        gather([made.one], layers=range(2, 90))


def test_a_base_in_an_unknown_format_serves_an_adapter_but_takes_no_checkpoint(
    made: Made, say: Any, tmp_path: Path
) -> None:
    make_pico("llama").save_pretrained(tmp_path / "fp8")
    file = tmp_path / "fp8/model.safetensors"
    tensors = load_file(file)
    few = {name: t.to(torch.float8_e4m3fn) for name, t in tensors.items() if "layernorm" not in name}
    save_file(tensors | few, file, metadata={"format": "pt"})
    said = say("apply", "fp8", made.one, "--as", "adapter", "--to", "adapter")
    assert said.code == 0
    assert "fp8 was not compared with the base of the edit" in said.err
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "fp8"
    is_one_sentence(say("apply", "fp8", made.one, "--to", "out"), "got: F8_E4M3", "dequantise", "adapter")
    assert {path.name for path in tmp_path.iterdir()} == {"fp8", "adapter"}


# The page about it ---------------------------------------------------------------------------------------------------


def test_the_commands_of_the_pages_on_artefacts_and_many_edits_run_as_they_stand_there(
    say: Any, tmp_path: Path
) -> None:
    docs = Path(__file__).parents[2] / "docs"
    pages = "".join((docs / f"{name}.md").read_text(encoding="utf-8") for name in ("artefacts", "many_edits"))
    commands = re.findall(r"^    steer2edit ((?:apply|inspect|verify|diff) [^#\n]*)", pages, re.MULTILINE)
    assert len(commands) == 9 + 4
    model = make_pico("llama", num_hidden_layers=21)
    model.save_pretrained(tmp_path / "base")
    scores = s2e.score(model, s2e.collect(model, make_tokenizer(), *make_traces()))
    for name, rho in (("edit", 0.2), ("refusal", 0.3), ("verbosity", 0.4)):
        scores.edit(rho_attn=rho, rho_mlp=rho, alpha=0.2).save(tmp_path / f"{name}.safetensors")
    for line in commands:
        said = say(*line.split())
        assert said.code == 0, (line, said.err)
    made = {"edited", "adapter", "adapter.gguf", "softer", "softer.safetensors", "both"}
    assert made <= {path.name for path in tmp_path.iterdir()}
