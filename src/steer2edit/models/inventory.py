"""What would be edited in a model, what would not and why, and the memory that each stage needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from ..method.site import Site
from .architectures import ARCHITECTURES, Architecture, architecture_of
from .selfcheck import Health
from .sites import find_sites
from .weights import is_plain


def examine(model: nn.Module, health: Health | None = None) -> dict[str, Any]:
    """What is edited and what is not, and the memory that each stage needs. The model may be on the `meta` device.

    Raises:
        ModelError: the model is not supported; says why.
    """
    sites = find_sites(model)
    architecture = architecture_of(model)
    config: Any = model.config
    report: dict[str, Any] = {
        "kind": "doctor",
        "model": getattr(config, "_name_or_path", "") or type(model).__name__,
        "model_type": config.model_type,
        "family": architecture.family,
        "tested": architecture.tested,
        "sites": _classes(sites, architecture),
        "not edited": _others(model, sites, architecture),
        "remarks": _remarks(model, sites, architecture),
        "memory": memory(model, sites),
    }
    if health is not None:
        report["self-check"] = asdict(health)
    return report


def _classes(sites: Sequence[Site], architecture: Architecture) -> list[dict[str, Any]]:
    classes: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        kind: str = site.block
        if site.expert is not None:
            kind = "experts"
        elif site.shared:
            kind = "shared expert"
        path = site.module.removeprefix(f"{architecture.layers}.{site.layer}.")
        path = path if site.expert is None else f"{path}.{site.parameter}[i]"
        classes.setdefault((kind, path, site.d, site.n, site.width), []).append(site)
    return [
        {
            "sites": kind,
            "where": path,
            "count": len(members),
            "layers": len({site.layer for site in members}),
            "components": f"{n} {'heads' if members[0].block == 'attn' else 'neurons'} × {width}",
            "stream": d,
        }
        for (kind, path, d, n, width), members in classes.items()
    ]


def _others(model: nn.Module, sites: Sequence[Site], architecture: Architecture) -> list[dict[str, Any]]:
    """Every weight that is not a site, by its name without numbers, and the reason."""
    held = {f"{site.module}.{site.parameter}" for site in sites}
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for name, parameter in model.named_parameters():
        if name in held or name.rpartition(".")[0] in {site.module for site in sites if site.expert is None}:
            continue
        if name.startswith(architecture.layers + "."):
            why = "a vector, not a map" if parameter.dim() < 2 else "reads the stream, or works inside a block"
            short = name.removeprefix(architecture.layers + ".").partition(".")[2].rpartition(".")[0]
        else:
            why = "outside the decoder's layers"
            short = ".".join(name.split(".")[:2]) if "language_model" not in name else name.rpartition(".")[0]
        counts[short, why] += 1
        sizes[short, why] += parameter.numel()
    return [
        {"weights": short, "count": count, "parameters": sizes[short, why], "why": why}
        for (short, why), count in counts.items()
    ]


def _remarks(model: nn.Module, sites: Sequence[Site], architecture: Architecture) -> list[str]:
    config: Any = model.config
    remarks = []
    if not architecture.tested:
        remarks.append("This family is untested: run the self-check (--weights) to compare the model with this.")
    for block, norm in (("attn", architecture.attn_norm), ("mlp", architecture.mlp_norm)):
        if norm:
            remarks.append(
                f"A norm ({norm}) stands between the {block} block and the stream: vector, edit and steering act "
                "at the projection's output, before the norm."
            )
    if architecture.factor:
        factor = getattr(config.get_text_config(), architecture.factor, 1.0)
        remarks.append(
            f"A block's output is multiplied by {architecture.factor} = {factor:g} before it is added to the stream."
        )
    if any(site.expert is not None for site in sites):
        remarks.append(
            "All experts of a block share its steering vector; an expert that too few tokens reach "
            "(probe.expert_tokens) is not edited."
        )
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
        remarks.append(
            f"The weights are quantised ({getattr(method, 'value', method)}): scoring dequantises one site at a time; "
            "edits run as interventions or adapters, and the checkpoint's files take them in their own format; apply "
            "is refused."
        )
    return remarks


def memory(model: nn.Module, sites: Sequence[Site], *, groups: int = 4, configurations: int = 16) -> dict[str, int]:
    """The bytes of the model, then those that each stage needs in addition; from the shapes alone.

    Args:
        groups: how many groups of traces, over both labels. configurations: how many share a batch of the search.
    """
    config: Any = model.config
    text = config.get_text_config()
    each = max((p.element_size() for p in model.parameters() if is_plain(p)), default=2)
    inputs = sum(s.inputs for s in sites)
    streams = sum({s.block_key: s.d for s in sites}.values())
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys_and_values = 2 * heads * width * text.num_hidden_layers * each  # of one token
    packed = getattr(config, "quantization_config", None) is not None
    on_meta = any(p.is_meta for p in model.parameters())
    sizes = {
        "the model, before it is quantised" if packed and on_meta else "the model": sum(
            p.numel() * p.element_size() for p in model.parameters()
        ),
        f"probe, sums of {groups} groups": 8 * groups * (inputs + streams),
        "score, the largest weight": 3 * 4 * max(s.d * s.inputs for s in sites),
        f"search, {configurations} configurations": configurations * each * (inputs + sum(s.d for s in sites)),
        "search, keys and values of 128 rows of 256 tokens": 128 * 256 * keys_and_values,
        "an edit, on disk or in memory": 4 * (2 * inputs + 3 * sum(s.n for s in sites) + streams),
    }
    apply = {"apply, the columns it keeps, at most": each * sum(s.d * s.inputs for s in sites)}
    return sizes if packed else sizes | apply


def families() -> str:
    """The table of families as Markdown, from the records."""
    header = ("family", "`model_type`", "attention writes through", "MLP, or experts, write through", "remarks")
    rows = [header, ("---",) * len(header)]
    for a in ARCHITECTURES:
        heads = " or ".join(f"`{h.path}`" for h in a.attn)
        experts = a.experts
        places = [f"`{a.mlp}`"] if a.mlp else []
        if experts:
            places.append(f"`{experts.path}.{experts.parameter}[i]`")
            places += [f"`{experts.shared}`"] if experts.shared else []
        remarks = []
        if a.attn_norm or a.mlp_norm:
            remarks.append("norm after the block")
        if a.factor:
            remarks.append(f"factor `{a.factor}`")
        if a.transposed or (experts and experts.transposed):
            remarks.append("transposed weights" if a.transposed else "transposed experts")
        if not a.tested:
            remarks.append("not tested")
        types = ", ".join(f"`{t}`" for t in a.model_types)
        rows.append((a.family, types, heads, ", ".join(places), "; ".join(remarks)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
