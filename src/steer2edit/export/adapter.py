"""An edit as a PEFT LoRA adapter: ΔW = u aᵀ is a LoRA of rank 1, exactly."""

from __future__ import annotations

import json
from pathlib import Path

from ..edit import Edit
from ..errors import EditError
from ..files import replacing_folder

_NOTE = "steer2edit.json"


def save_adapter(edit: Edit, folder: str | Path, base: str | None = None) -> Path:
    """Writes `adapter_model.safetensors` and `adapter_config.json`, fp32, rank 1, scaling 1.

    Sites of an edited block type that the edit leaves alone get a zero row, so that PEFT finds every tensor it expects.

    Args:
        base: the base model's name or path for `base_model_name_or_path`; the probe's model if None.

    Raises:
        FileError: `folder` holds something that is no adapter of ours.
        EditError: every λ is 0, so that there is nothing to write.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    edited = edit.edited()
    if not edited:
        raise EditError("the edit changes nothing", got="λ = 0 everywhere", fix="Lower ρ or α.")
    blocks = {site.site.block for site in edited.values()}
    sites = {key: site for key, site in edit.sites.items() if site.site.block in blocks}
    tensors = {}
    for site in sites.values():
        name = f"base_model.model.{site.site.module}"
        tensors[f"{name}.lora_A.weight"] = (edit.strength * site.row)[None, :].contiguous()  # [1, n·c]
        tensors[f"{name}.lora_B.weight"] = site.u[:, None].contiguous()  # [d, 1]
    if base is None:
        base = edit.provenance.get("probe", {}).get("model")
    # By its last name where a block type is edited in every layer, else each module by its full name.
    layers = {block: [s.site.layer for s in sites.values() if s.site.block == block] for block in blocks}
    whole = all(sorted(found) == list(range(edit.layers)) for found in layers.values())
    names = {s.site.module.rsplit(".", 1)[1] if whole else s.site.module for s in sites.values()}
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base,
        target_modules=sorted(names),
    )
    with replacing_folder(folder, ours=_NOTE) as temporary:
        save_file(tensors, str(temporary / "adapter_model.safetensors"), metadata={"format": "pt"})
        config.save_pretrained(str(temporary))
        note = {"edit": edit.id, "config": dict(edit.config), "strength": edit.strength}
        (temporary / _NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return Path(folder)
