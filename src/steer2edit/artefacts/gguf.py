"""An edit as a LoRA adapter for llama.cpp (`--lora FILE`), under the names that llama.cpp gives to the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EditError, ModelError
from ..files.writing import replacing
from ..method.change import Changes

# llama.cpp's name for the architecture of each `model_type`. In all of them the output and down projections lie as in
# transformers, or were transposed when the model was converted.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
    "qwen2": "qwen2",
    "qwen2_5_vl": "qwen2vl",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "smollm3": "smollm3",
    "granite": "granite",
    "stablelm": "stablelm",
    "cohere": "command-r",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
}


def save_gguf_adapter(edit: Changes, path: str | Path, model_type: str | None = None) -> Path:
    """Writes a GGUF file of type adapter, in fp32, with scaling 1 and the edit's rank.

    Args:
        model_type: the base's; by default that of the probe's model.

    Raises:
        ModelError: llama.cpp's names for that family are unknown, or the gguf package is missing.
        EditError: the edit changes nothing, or edits experts.
    """
    gguf = package()
    changes = edit.changes()
    if not changes:
        raise EditError("the edit changes nothing", got="λ = 0 everywhere", fix="Lower ρ or α.")
    if error := obstacle(edit, model_type):
        raise error
    name = ARCHITECTURES[_model_type(edit, model_type)]
    architecture = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(architecture, 1 + max(change.site.layer for change in changes.values()))
    rank = max(len(change.a) for change in changes.values())
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(str(temporary), name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # over the rank: scaling 1
        writer.add_name(f"steer2edit {edit.id}")
        for change in changes.values():
            module = change.site.module.replace("model.language_model.", "model.")
            stored = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
            if stored is None:
                raise ModelError(
                    f"llama.cpp has no name for {module}", got=f"architecture {name}", fix="Export a checkpoint."
                )
            a = np.zeros((rank, change.site.inputs), dtype=np.float32)
            b = np.zeros((change.site.d, rank), dtype=np.float32)
            a[: len(change.a)], b[:, : len(change.a)] = change.a.numpy(), change.u.numpy()
            writer.add_tensor(f"{stored}.lora_a", a)
            writer.add_tensor(f"{stored}.lora_b", b)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Path(path)


def package() -> Any:
    """The gguf package. Raises ModelError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ModelError("GGUF files need the gguf package", got="no such module", fix="pip install gguf") from None
    return gguf


def obstacle(edit: Changes, model_type: str | None = None) -> EditError | ModelError | None:
    """Why an adapter for llama.cpp cannot hold the edit, or None."""
    if experts := [change.site.place for change in edit.changes().values() if change.site.output]:
        return EditError(
            "edits of a mixture of experts are not written for llama.cpp",
            got=experts[0],
            fix="Export a checkpoint, and convert that.",
        )
    if _model_type(edit, model_type) not in ARCHITECTURES:
        return ModelError(
            "an adapter for llama.cpp cannot be written for this family",
            got=f"model_type {_model_type(edit, model_type)!r}",
            fix=f"Known: {', '.join(ARCHITECTURES)}. Otherwise export a checkpoint, and convert that.",
        )
    return None


def _model_type(edit: Changes, given: str | None) -> str:
    probe: Any = edit.parts[0].provenance.get("probe", {})
    return given or str(probe.get("model_type"))
