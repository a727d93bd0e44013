"""An edit as a PEFT LoRA adapter: ΔW = u aᵀ is exactly a LoRA of rank 1, and r combined edits are one of rank r."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import EditError
from ..files.tensors import save_tensors
from ..files.writing import replacing_folder
from ..method.change import Changes
from ..method.site import Site
from ..models.quiet import quiet_kernels

_NOTE = "steer2edit.json"


def save_adapter(edit: Changes, folder: str | Path, base: str | None = None) -> Path:
    """Writes `adapter_model.safetensors` and `adapter_config.json`, in fp32, with scaling 1 and the edit's rank.

    Sites of an edited block type that the edit leaves alone get a zero row, so that PEFT finds every tensor it expects.
    Experts that share one 3-D parameter become a LoRA of that parameter (PEFT's `target_parameters`).

    Args:
        base: the base model's name or path for `base_model_name_or_path`; the probe's model if None.

    Raises:
        FileError: `folder` holds something other than an adapter that this function wrote.
        EditError: the edit changes nothing, or PEFT cannot hold it.

    >>> adapter = s2e.save_adapter(edit, f"{folder}/adapter", base=base)
    >>> sorted(file.name for file in adapter.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors', 'steer2edit.json']
    """
    quiet_kernels()
    from peft import LoraConfig

    changes = edit.changes()
    if not changes:
        raise EditError("the edit changes nothing", got="λ = 0 everywhere", fix="Lower ρ or α.")
    if reason := obstacle(edit):
        raise EditError(
            "PEFT cannot hold this edit", got=reason, fix="Export a checkpoint instead (export_checkpoint)."
        )
    blocks = {change.site.block for change in changes.values()}
    everywhere = {key: s.site for part in edit.parts for key, s in part.sites.items()}
    sites = {key: site for key, site in everywhere.items() if site.block in blocks}
    rank = max(len(change.a) for change in changes.values())
    tensors: dict[str, Tensor] = {}
    for key, site in sites.items():
        name, experts = f"base_model.model.{site.module}", site.experts or 1
        a = tensors.setdefault(f"{name}.lora_A.weight", torch.zeros(experts * rank, site.inputs))
        b = tensors.setdefault(f"{name}.lora_B.weight", torch.zeros(site.d, rank * experts))
        if change := changes.get(key):
            # For a fused parameter PEFT keeps lora_A's rows expert by expert, and lora_B's columns rank by rank.
            at, own = site.expert or 0, len(change.a)
            a.view(experts, rank, -1)[at, :own] = change.a
            b.view(-1, rank, experts)[:, :own, at] = change.u
    if base is None:
        base = edit.parts[0].provenance.get("probe", {}).get("model")
    modules, parameters = _targets(edit, list(everywhere.values()), list(sites.values()))
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # scaling 1
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base,
        fan_in_fan_out=any(site.transposed and site.expert is None for site in sites.values()),
        target_modules=modules,
        target_parameters=parameters or None,
    )
    with replacing_folder(folder, ours=_NOTE) as temporary:
        save_tensors(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(str(temporary))
        parts = [{"id": p.id, "config": dict(p.config), "strength": p.strength} for p in edit.parts]
        note = {"edit": edit.id, "parts": parts}
        (temporary / _NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def obstacle(edit: Changes) -> str | None:
    """Why PEFT cannot hold the edit, or None."""
    alone = [change.site.place for change in edit.changes().values() if change.site.experts == 1]
    return f"a fused parameter of one expert ({alone[0]})" if alone else None


def _targets(edit: Changes, everywhere: Sequence[Site], sites: Sequence[Site]) -> tuple[list[str], list[str]]:
    """LoraConfig's target_modules and target_parameters."""
    # In a model with experts PEFT takes every module called down_proj for the experts' old name, so all MLP sites are
    # named as parameters.
    moe = any(site.experts is not None for site in sites)
    by_parameter = [site for site in sites if moe and site.block == "mlp"]
    by_module = [site for site in sites if site not in by_parameter]
    # Modules are named by their last names if their block type is edited in every layer and nothing else has that name.
    others = {site.module.rsplit(".", 1)[-1] for site in everywhere if site not in by_module}
    short = {site.module.rsplit(".", 1)[-1] for site in by_module}
    layers = {block: [s.layer for s in by_module if s.block == block] for block in {s.block for s in by_module}}
    whole = all(sorted(numbers) == list(range(edit.parts[0].layers)) for numbers in layers.values())
    towers = any("language_model" in site.module for site in by_module)  # a vision tower has projections of its own
    names = short if whole and not towers and not short & others else {site.module for site in by_module}
    return sorted(names), sorted({f"{site.module}.{site.parameter}" for site in by_parameter})
