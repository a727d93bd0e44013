"""The LoRA adapter for llama.cpp, read back with the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import steer2edit as s2e
from families import make_family
from steer2edit.artefacts.gguf import ARCHITECTURES, save_gguf_adapter
from steer2edit.errors import EditError, ModelError

# What llama.cpp calls the two maps of layer 1.
NAMES = {"attn": "blk.1.attn_output.weight", "mlp": "blk.1.ffn_down.weight"}


def edit_of(model: Any, tokenizer: Any, traces: Any, **options: Any) -> s2e.Edit:
    scores = s2e.score(model, s2e.collect(model, tokenizer, *traces, **options), expert_tokens=1)
    return scores.edit(rho_attn=0.3, rho_mlp=0.3, alpha=0.2)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_each_tensor_is_the_edits_under_llama_cpps_name(
    model_type: str, tokenizer: Any, traces: Any, tmp_path: Path
) -> None:
    edit = edit_of(make_family(model_type), tokenizer, traces).with_strength(0.5)
    save_gguf_adapter(edit, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(str(tmp_path / "a.gguf"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == ARCHITECTURES[model_type]
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", 1.0)
    tensors = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in reader.tensors}
    assert len(tensors) == 2 * len(edit.edited())
    for block, name in NAMES.items():
        site = edit.sites[f"1.{block}"]
        assert torch.equal(tensors[f"{name}.lora_a"], 0.5 * site.row[None])
        assert torch.equal(tensors[f"{name}.lora_b"], site.u[:, None])


def test_a_combination_is_a_lora_of_its_rank(tokenizer: Any, traces: Any, tmp_path: Path) -> None:
    model = make_family("llama")
    one = edit_of(model, tokenizer, traces)
    both = s2e.combine(one, edit_of(model, tokenizer, traces, positions="response").only(layers=[1]))
    save_gguf_adapter(both, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(str(tmp_path / "a.gguf"))
    assert reader.fields["adapter.lora.alpha"].contents() == 2.0
    tensors = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in reader.tensors}
    for name, change in both.changes().items():
        stored = f"blk.{change.site.layer}.{'attn_output' if change.site.block == 'attn' else 'ffn_down'}.weight"
        delta = tensors[f"{stored}.lora_b"] @ tensors[f"{stored}.lora_a"]
        torch.testing.assert_close(delta, change.delta(), rtol=1e-6, atol=1e-7, msg=name)


def test_what_cannot_be_written_is_refused_and_leaves_no_file(tokenizer: Any, traces: Any, tmp_path: Path) -> None:
    mixture = edit_of(make_family("mixtral"), tokenizer, traces)
    with pytest.raises(EditError, match=r"mixture of experts .*mlp\.experts"):
        save_gguf_adapter(mixture, tmp_path / "a.gguf")
    edit = edit_of(make_family("llama"), tokenizer, traces)
    with pytest.raises(ModelError, match=r"for this family .*'mamba'"):
        save_gguf_adapter(edit, tmp_path / "a.gguf", "mamba")
    with pytest.raises(EditError, match="changes nothing"):
        save_gguf_adapter(edit.only(layers=[]), tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []
