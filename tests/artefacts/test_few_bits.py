"""Checkpoints of few bits as bases: scored, edited, checked and compared; and an edit that rounding would lose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import steer2edit as s2e
from conftest import make_pico, make_tokenizer, make_traces
from families import make_family
from packings import SCHEMES, Scheme, pack_mxfp4, quantised, tensors_of
from runs import command
from steer2edit.artefacts.bases import how_stored
from steer2edit.artefacts.checkpoint import JOURNAL, MANIFEST
from steer2edit.artefacts.patching import Shard
from steer2edit.edits import Scores
from steer2edit.errors import EditError, FileError, ModelError
from steer2edit.models.sites import find_sites
from steer2edit.models.weights import weight_of

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def is_a_map(name: str) -> bool:
    return name.endswith("_proj.weight")


# Schemes whose scales have a largest value, which an edit of several times the weight's size leaves.
BOUNDED = ("nvfp4", "nvfp4 of modelopt", "nf4 twice")


class Case:
    """A pico model packed in a scheme; `model` holds the dequantised weights, in fp32."""

    def __init__(self, root: Path, scheme: Scheme, shards: int = 1):
        self.root, self.scheme = root, scheme
        self.model = make_pico("llama", **SHAPE)
        self.plain, self.base, self.out = root / "plain", root / "base", root / "out"
        self.model.save_pretrained(self.plain)
        make_tokenizer().save_pretrained(self.plain)
        self.weights = quantised(self.plain, self.base, scheme, is_a_map, shards)
        self.model.load_state_dict(self.weights, strict=False)
        self.probe = s2e.collect(self.model, make_tokenizer(), *make_traces())
        self.edit = s2e.score(self.model, self.probe).edit(rho_attn=0.05, rho_mlp=0.05, alpha=0.1)
        bounded = any(scheme is SCHEMES[name] for name in BOUNDED)
        self.strong = self.edit.with_strength(0.3 if bounded else 3.0)

    def read(self, name: str, folder: Path) -> Tensor:
        """One weight of a packed checkpoint, by the scheme's own reader."""
        return self.scheme.read(name, tensors_of(folder))


@pytest.fixture(scope="module", params=list(SCHEMES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Of each scheme in turn; not to be changed."""
    return Case(tmp_path_factory.mktemp("case"), SCHEMES[request.param])


@pytest.fixture
def fp8(tmp_path: Path) -> Case:
    return Case(tmp_path, SCHEMES["fp8 block"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def own_names(case: Case, site_tensor: str) -> set[str]:
    """The tensors that hold a weight."""
    stem = site_tensor.removesuffix("weight")
    return {name for name in tensors_of(case.base) if name.startswith(stem)}


# Scores -------------------------------------------------------------------------------------------------------------


def test_scores_from_the_folder_are_those_of_the_dequantised_model(case: Case) -> None:
    from_model, from_disk = s2e.score(case.model, case.probe), s2e.score(case.base, case.probe)
    assert from_disk.sites.keys() == from_model.sites.keys()
    for key, site in from_model.sites.items():
        other = from_disk.sites[key]
        torch.testing.assert_close(other.g, site.g, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.reach, site.reach, rtol=1e-4, atol=1e-5)


# The export ---------------------------------------------------------------------------------------------------------


def test_the_edited_weights_hold_the_edit_and_all_else_is_the_bases(case: Case, tmp_path: Path, capsys: Any) -> None:
    edit, out = case.strong.only(layers=[1]), tmp_path / "out"
    s2e.export_checkpoint(case.base, edit, out)
    old, new = tensors_of(case.base), tensors_of(out)
    manifest = json.loads((out / MANIFEST).read_text())
    of_edit: set[str] = set()
    rounding = manifest["rounding"]["tensors"]
    assert len(rounding) == 2
    along = wanted = 0.0
    for key, change in edit.changes().items():
        name = change.site.tensor
        of_edit |= own_names(case, name)
        delta = change.delta().double()
        moved = (case.read(name, out) - case.weights[name]).double()
        (row,) = (row for label, row in rounding.items() if label.startswith(name.removesuffix("weight")))
        kept = float((moved * delta).sum() / delta.square().sum())
        assert row["kept"] == pytest.approx(kept, rel=1e-3), key
        assert row["noise"] == pytest.approx(float((moved - kept * delta).norm() / delta.norm()), rel=1e-2, abs=1e-4)
        along, wanted = along + float((moved * delta).sum()), wanted + float(delta.square().sum())
    assert manifest["rounding"]["kept"] == pytest.approx(along / wanted, rel=1e-3)
    assert manifest["rounding"]["kept"] > 0.5
    assert old.keys() == new.keys()
    changed = {
        n for n in old if not torch.equal(old[n].reshape(-1).view(torch.uint8), new[n].reshape(-1).view(torch.uint8))
    }
    assert changed
    assert changed <= of_edit
    head = int.from_bytes((case.base / "model.safetensors").read_bytes()[:8], "little") + 8
    files = [(folder / "model.safetensors").read_bytes()[:head] for folder in (case.base, out)]
    assert files[0] == files[1]
    assert json.loads((out / "config.json").read_text())["quantization_config"] == case.scheme.settings
    said = capsys.readouterr().err
    assert f"keeps {manifest['rounding']['kept']:.0%} of the edit" in said
    assert set(manifest["tensors"]) <= of_edit


def test_verify_and_diff_know_what_was_rounded(case: Case, tmp_path: Path) -> None:
    edit, out = case.strong, tmp_path / "out"
    s2e.export_checkpoint(case.base, edit, out)
    audit = s2e.verify(case.base, edit, out)
    assert audit["as_expected"], {name: word for name, word in audit["tensors"].items() if word == "foreign"}
    assert set(audit["tensors"].values()) == {"equal", "edited as expected"}
    differences = s2e.diff(case.base, out)
    assert differences["others"] == []
    assert [row["site"] for row in differences["sites"]] == [site.key for site in find_sites(case.model)]
    other = s2e.verify(case.base, edit.with_strength(0.11), out)
    assert not other["as_expected"]
    assert "foreign" in other["tensors"].values()


def test_a_single_bit_in_any_tensor_is_foreign(fp8: Case) -> None:
    edit = fp8.edit.only(layers=[1]).with_strength(3.0)
    s2e.export_checkpoint(fp8.base, edit, fp8.out)
    whole = load_file(fp8.out / "model.safetensors")
    for name in (n for n in whole if "layers" in n and "_proj" in n):
        bits = whole[name].clone()
        bits.view(-1).view(torch.uint8)[3] ^= 1
        save_file(whole | {name: bits}, fp8.out / "model.safetensors", metadata={"format": "pt"})
        words = s2e.verify(fp8.base, edit, fp8.out)["tensors"]
        assert [n for n, word in words.items() if word == "foreign"] == [name]


def test_scales_in_another_file_give_the_same_weights(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "several").mkdir()
    for name in ("fp8 block", "gptq", "nf4 twice"):
        one = Case(tmp_path / "one", SCHEMES[name])
        several = Case(tmp_path / "several", SCHEMES[name], shards=5)
        for case in (one, several):
            s2e.export_checkpoint(case.base, one.strong, case.out)
        a, b = tensors_of(one.out), tensors_of(several.out)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8)) for n in a)
        assert s2e.verify(several.base, one.strong, several.out)["as_expected"]
        manifests = [json.loads((case.out / MANIFEST).read_text()) for case in (one, several)]
        assert manifests[0]["rounding"]["tensors"] == manifests[1]["rounding"]["tensors"]
        assert manifests[0]["tensors"] == manifests[1]["tensors"]
        for case in (one, several):
            for folder in (case.plain, case.base, case.out):
                shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["fp8 row", "awq"])
def test_a_stopped_export_goes_on_to_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    case = Case(tmp_path, SCHEMES[name], shards=4)
    edit = case.edit.with_strength(3.0)
    s2e.export_checkpoint(case.base, edit, tmp_path / "expected")
    finish, whole = Shard.finish, []

    def stop(shard: Shard, patched: Any) -> Any:
        if len(whole) == 2:
            raise KeyboardInterrupt
        whole.append(shard.name)
        return finish(shard, patched)

    monkeypatch.setattr(Shard, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        s2e.export_checkpoint(case.base, edit, case.out)
    assert not case.out.exists()
    partial = case.out.with_name(f".{case.out.name}.partial")
    assert len((partial / JOURNAL).read_text().splitlines()) == 3
    monkeypatch.undo()
    capsys.readouterr()
    s2e.export_checkpoint(case.base, edit, case.out)
    assert "2 shards are complete" in capsys.readouterr().err
    assert contents(case.out) == contents(tmp_path / "expected")
    assert not partial.exists()


def test_an_edit_of_another_strength_sign_undoes_nothing_by_itself_but_the_base_does(fp8: Case) -> None:
    """Rounding is no group: the way back is the base, and an edit that is in the weights is not written twice."""
    edit = fp8.edit.with_strength(3.0)
    s2e.export_checkpoint(fp8.base, edit, fp8.out)
    with pytest.raises(EditError, match="already in this model"):
        s2e.export_checkpoint(fp8.out, edit, fp8.root / "twice")
    assert not (fp8.root / "twice").exists()


def test_another_base_is_refused(fp8: Case) -> None:
    make_pico("llama", seed=1, **SHAPE).save_pretrained(fp8.root / "plain of another")
    quantised(fp8.root / "plain of another", fp8.root / "another", fp8.scheme, is_a_map)
    with pytest.raises(ModelError, match="not the base"):
        s2e.export_checkpoint(fp8.root / "another", fp8.edit.with_strength(3.0), fp8.out)
    assert not fp8.out.exists()


def test_an_edit_of_the_unrounded_model_is_written_into_the_rounded_one(case: Case, tmp_path: Path) -> None:
    """Scores of the plain model, as one has them if the few bits came later."""
    if case.scheme.settings.get("bits") == 2:
        return  # which moves a weight further than another model's tolerance
    plain = make_pico("llama", **SHAPE)
    edit = s2e.score(plain, case.probe).edit(rho_attn=0.05, rho_mlp=0.05, alpha=0.1)
    s2e.export_checkpoint(case.base, edit.with_strength(case.strong.strength), tmp_path / "out")
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["rounding"]["kept"] > 0.5


# What rounding loses ------------------------------------------------------------------------------------------------


def test_an_edit_that_rounding_loses_is_refused_and_an_adapter_proposed(
    case: Case, tmp_path: Path, capsys: Any
) -> None:
    edit, out = case.edit.with_strength(1e-5), tmp_path / "out"
    with pytest.raises(EditError) as caught:
        s2e.export_checkpoint(case.base, edit, out)
    assert "loses the edit" in caught.value.what
    assert "adapter" in caught.value.fix
    assert "accept_rounding" in caught.value.fix
    assert list(tmp_path.iterdir()) == []
    s2e.export_checkpoint(case.base, edit, out, accept_rounding=True)
    rounding = json.loads((out / MANIFEST).read_text())["rounding"]
    assert rounding["kept"] < 0.5 or rounding["noise"] > 4
    assert f"keeps {rounding['kept']:.0%} of the edit" in capsys.readouterr().err
    assert "foreign" not in s2e.verify(case.base, edit, out)["tensors"].values()


def test_a_loss_that_the_trial_misses_is_refused_in_the_end(fp8: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer2edit.artefacts.checkpoint.foresee", lambda *_: None)
    with pytest.raises(EditError, match="loses the edit"):
        s2e.export_checkpoint(fp8.base, fp8.edit.with_strength(1e-5), fp8.out)
    assert {path.name for path in fp8.root.iterdir()} == {"plain", "base"}


def test_the_command_line_says_what_is_left_and_takes_the_flag(fp8: Case, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(fp8.root)
    fp8.edit.with_strength(1e-5).save(fp8.root / "edit.safetensors")
    assert command(monkeypatch, "apply", "base", "edit.safetensors", "--to", "out") == 2
    assert "--accept-rounding" in capsys.readouterr().err
    assert not fp8.out.exists()
    assert command(monkeypatch, "apply", "base", "edit.safetensors", "--to", "out", "--accept-rounding") == 0
    assert "of the edit" in capsys.readouterr().err
    assert command(monkeypatch, "apply", "base", "edit.safetensors", "--to", "adapter", "--as", "adapter") == 0
    assert "was not compared" not in capsys.readouterr().err


# Experts ------------------------------------------------------------------------------------------------------------


def test_experts_in_one_mxfp4_tensor_are_edited_in_their_part_alone(tmp_path: Path) -> None:
    model = make_family("gpt_oss", hidden_size=64, intermediate_size=64)
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "base").mkdir()
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    weights = {}
    for name in [n for n in tensors if n.endswith("experts.down_proj")]:
        parts = [pack_mxfp4(expert.T.contiguous()) for expert in tensors.pop(name)]  # stored [d, n·c]
        tensors[f"{name}_blocks"] = torch.stack([blocks for blocks, _ in parts])
        tensors[f"{name}_scales"] = torch.stack([scales for _, scales in parts])
        weights[name] = by_transformers(tensors, name)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(tmp_path / "plain" / "config.json", tmp_path / "base")
    model.load_state_dict(weights, strict=False)
    probe = s2e.collect(model, make_tokenizer(), *make_traces())
    scores = s2e.score(tmp_path / "base", probe, expert_tokens=1)
    in_memory = s2e.score(model, probe, expert_tokens=1)
    for key, site in in_memory.sites.items():
        torch.testing.assert_close(scores.sites[key].g, site.g, rtol=1e-4, atol=1e-5)
    whole = scores.edit(rho_attn=None, rho_mlp=0.05, alpha=0.1)
    sites = {key: site for key, site in whole.sites.items() if key in ("1.mlp.2", "1.mlp.0")}
    edit = s2e.Edit(sites, whole.config, whole.fingerprint).with_strength(3.0)
    s2e.export_checkpoint(tmp_path / "base", edit, tmp_path / "out")
    new = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    changed = {n for n in tensors if not torch.equal(tensors[n], new[n])}
    assert f"{name}_blocks" in changed
    assert changed <= {f"{name}_blocks", f"{name}_scales"}
    after = by_transformers(new, name)
    experts = [i for i in range(len(after)) if not torch.equal(after[i], weights[name][i])]
    assert experts == [0, 2]
    rounding = json.loads((tmp_path / "out" / MANIFEST).read_text())["rounding"]["tensors"]
    for expert in experts:
        delta = edit.changes()[f"1.mlp.{expert}"].delta().double()
        moved = (after[expert] - weights[name][expert]).T.double()
        kept = float((moved * delta).sum() / delta.square().sum())
        assert rounding[f"{name}_blocks[{expert}]"]["kept"] == pytest.approx(kept, rel=1e-3)
    assert s2e.verify(tmp_path / "base", edit, tmp_path / "out")["as_expected"]
    assert [row["site"] for row in s2e.diff(tmp_path / "base", tmp_path / "out")["sites"]] == ["1.mlp.0", "1.mlp.2"]


def by_transformers(tensors: dict[str, Tensor], name: str) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32)


# Loaded by transformers ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stored_nf4")
@pytest.mark.parametrize("name", ["fp8 block", "nf4", "nf4 twice", "int8"])
def test_transformers_loads_the_export_and_its_logits_are_the_edits(name: str, tmp_path: Path) -> None:
    case = Case(tmp_path, SCHEMES[name])
    edit = case.strong
    s2e.export_checkpoint(case.base, edit, case.out)
    noise = json.loads((case.out / MANIFEST).read_text())["rounding"]["noise"]
    ids = torch.arange(3, 40)[None]

    def logits(folder: Path) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            return model(ids).logits.float()

    with torch.no_grad():
        plain = case.model(ids).logits
        with edit.applied(case.model):
            expected = case.model(ids).logits
    base = logits(case.base)
    after = logits(case.out)
    moved = float((expected - base).norm())
    assert float((after - expected).norm()) < (0.2 + 1.5 * noise) * moved
    # The weights that were read are those of the export, by the format's own reader.
    case.model.load_state_dict({n: case.read(n, case.out) for n in case.weights}, strict=False)
    with torch.no_grad():
        exact = case.model(ids).logits
    if name == "int8":  # bitsandbytes rounds the activations too: here the tensors are compared
        stored, loaded = tensors_of(case.out), AutoModelForCausalLM.from_pretrained(case.out, dtype=torch.float32)
        for weight in case.weights:
            codes = loaded.get_submodule(weight.removesuffix(".weight")).weight
            assert torch.equal(codes.data, stored[weight])
            assert torch.equal(codes.SCB.float(), stored[f"{weight.removesuffix('.weight')}.SCB"])
        return
    # Without a GPU transformers reads fp8 as bf16: what that does to the base's logits it may do to these.
    assert float((after - exact).norm()) < 2 * float((base - plain).norm()) + 1e-3 * float(exact.norm())


# What is said -------------------------------------------------------------------------------------------------------


def test_doctor_says_how_the_weights_are_stored(case: Case) -> None:
    (row,) = how_stored(str(case.base), find_sites(case.model))
    assert row["weights"] == 4
    assert row["an export"].startswith("rounds the edit")
    assert how_stored(str(case.plain), find_sites(case.model)) == [
        {"format": "F32", "weights": 4, "an export": "adds the edit"}
    ]
    assert how_stored("owner/name", find_sites(case.model)) == []


def test_an_unknown_format_is_refused_with_the_known_ones(fp8: Case) -> None:
    tensors = {n: t for n, t in load_file(fp8.base / "model.safetensors").items() if not n.endswith("_scale_inv")}
    save_file(tensors, fp8.base / "model.safetensors", metadata={"format": "pt"})
    for refused in (
        lambda: s2e.export_checkpoint(fp8.base, fp8.edit, fp8.out),
        lambda: s2e.score(fp8.base, fp8.probe),
    ):
        with pytest.raises(FileError, match=r"not plain floating point \(got: F8_E4M3\).*Known are .*adapter"):
            refused()
    (row,) = how_stored(str(fp8.base), find_sites(fp8.model))
    assert (row["format"], row["weights"]) == ("F8_E4M3", 4)
    assert "refused" in row["an export"]


def test_fused_fp8_experts_that_share_one_scale_are_refused(tmp_path: Path) -> None:
    model = make_family("qwen3_moe", hidden_size=32)
    sites = [site for site in find_sites(model) if site.expert is not None][:2]
    name = sites[0].aliases[-1]
    model.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    whole = {n: t for n, t in tensors.items() if "layers.0.mlp.experts" not in n or "down_proj" not in n}
    stack = torch.stack(
        [weight_of(model, site).detach() for site in find_sites(model) if site.layer == 0 and site.expert is not None]
    )
    whole[name] = (stack * 50).to(torch.float8_e4m3fn)
    whole[f"{name}_scale"] = torch.tensor([0.02])
    save_file(whole, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    probe = s2e.collect(model, make_tokenizer(), *make_traces())
    edit = Scores({s.key: s2e.score(model, probe, expert_tokens=0).sites[s.key] for s in sites}, {}).edit(
        rho_attn=None, rho_mlp=0.01, alpha=0.0
    )
    with pytest.raises(FileError, match="share a tensor that both would change"):
        s2e.export_checkpoint(tmp_path / "base", edit, tmp_path / "out")
