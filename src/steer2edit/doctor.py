"""Whether a model really is what its record says: `self_check` runs it on a few tokens and compares, `examine` tells
what would be edited, what would not, and what each stage needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import ARCHITECTURES, Architecture, architecture_of
from .errors import ModelError, ProbeError
from .experts import tapped
from .intervention import Intervention, Interventions, Term
from .sites import Site, find_sites, module_of
from .weights import device_of, is_plain, quantised, read_bias, read_weight

# Tokens of the text that a model is checked on, and interventions that are tried in one batch.
TOKENS, ROWS = 3, 32
_CHECKED = "_steer2edit_checked"


@dataclass(frozen=True)
class Health:
    """What the self-check measured; all of it is relative, so that 1 is "as large as".

    Attributes:
        interventions: how many were tried, one for each site, and one for all the experts that a layer's tokens
            reached.
        least_moved: the smallest change of the logits under one of them, in standard deviations of the logits.
        moved_by_nothing: the largest change under an intervention of zeros at every site.
        heads: how far a component's share in its site's output is from its own columns times its own input.
        unaccounted: how far what a layer adds is from what its sites write; not 0 where a norm stands between.
        norms: what a post-norm does to a small edit's size: block type → median over the layers of size after / before.
    """

    interventions: int
    least_moved: float
    moved_by_nothing: float
    heads: float
    unaccounted: float
    norms: Mapping[str, float]


class _Seen:
    """What one forward pass shows at the last token: each site's input and output, each layer's and block's."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], layers: str):
        self.x: dict[str, Tensor] = {}  # site key → [n·c]
        self.out: dict[str, Tensor] = {}  # site or block key → [d]
        self.added: dict[int, Tensor] = {}  # layer → what it adds to the stream [d]
        self.opened = ExitStack()
        experts: dict[str, dict[int, str]] = {}
        for site in sites:
            if site.expert is None:
                self._hook(module_of(model, site), self._keep(site.key))
            else:
                experts.setdefault(site.module, {})[site.expert] = site.key
        for site in {s.block_key: s for s in sites if s.block_module != s.module}.values():
            self._hook(model.get_submodule(site.block_module), self._keep(site.block_key))
        for number, layer in enumerate(model.get_submodule(layers).children()):
            handle = layer.register_forward_hook(self._layer(number), with_kwargs=True)
            self.opened.callback(handle.remove)
        self.opened.enter_context(tapped(model, {name: self._tap(keys) for name, keys in experts.items()}))

    def _hook(self, module: nn.Module, hook: Callable[..., None]) -> None:
        self.opened.callback(module.register_forward_hook(hook).remove)

    def _keep(self, key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
            self.x[key] = _last(args[0])
            self.out[key] = _last(out if isinstance(out, Tensor) else out[0])

        return hook

    def _tap(self, keys: Mapping[int, str]) -> Callable[..., Tensor]:
        def tap(expert: int, tokens: Tensor, x: Tensor, out: Tensor) -> Tensor:
            self.x[keys[expert]], self.out[keys[expert]] = _last(x), _last(out)
            return out

        return tap

    def _layer(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = out if isinstance(out, Tensor) else out[0]
            self.added[number] = (after[0, -1].float() - before.to(after.device)[0, -1].float()).cpu()

        return hook

    def __enter__(self) -> _Seen:
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.close()


def _last(x: Tensor) -> Tensor:
    """The last token's row, a copy of its own: some models add to their activations in place."""
    return x.detach().reshape(-1, x.shape[-1])[-1].to("cpu", torch.float32, copy=True)


def self_check(model: nn.Module, *, thorough: bool = False) -> Health:
    """Runs a model on a few tokens and compares it with what its sites say. A model that passed is not checked again.

    An intervention of zeros at every site must leave the logits alone, one at each site must move them, and a change of
    one component's input must change its site's output by that component's own columns.

    Args:
        thorough: every head of every site, also of quantised and offloaded ones (otherwise one head a site, and of
            those the first layer's).

    Raises:
        ModelError: something does not hold; names the site. ProbeError: an activation is not finite.
    """
    sites = find_sites(model)
    architecture = architecture_of(model)
    known: tuple[Architecture, bool, Health] | None = getattr(model, _CHECKED, None)
    if known and known[0] == architecture and known[1] >= thorough:
        return known[2]
    config: Any = model.config
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.get_text_config().vocab_size, (1, TOKENS), generator=draw).to(device_of(model))
    exact = getattr(model, "dtype", None) in (torch.float32, torch.float64) and not any(
        quantised(model, s) for s in sites
    )
    nothing_moves, is_equal = (1e-3, 1e-2) if exact else (0.1, 0.25)  # in bf16 a difference of two outputs is coarse
    with torch.inference_mode():
        base = _logits(model, ids)[0]
        with _Seen(model, sites, architecture.layers) as seen:
            _logits(model, ids)
        if not torch.isfinite(base).all():
            broken = [key for key, out in seen.out.items() if not torch.isfinite(out).all()]
            raise ProbeError(
                f"an activation at site {broken[0]} is not finite" if broken else "the model's logits are not finite",
                got=f"NaN or infinity on {TOKENS} tokens of the self-check",
                fix="Load the model in bf16 or fp32 (fp16 overflows).",
            )
        spread = float(base.std()) or 1.0

        zero = {s.key: Term(torch.zeros(s.d, 1), torch.zeros(1, s.inputs)) for s in sites}
        with Interventions(model, [Intervention("zero", zero)]):
            nothing = float((_logits(model, ids)[0] - base).abs().max()) / spread
        if nothing > nothing_moves:
            raise ModelError(
                "an intervention of zeros changes what the model says",
                got=f"the logits moved by {nothing:.3g} of their spread",
                fix="The model does not run its experts or projections the way transformers does: load it as defined "
                "there.",
            )
        tried = dict(_one_by_one(sites, seen, draw))
        moved = _moved(model, ids, base, spread, list(tried.values()))
        for key, by in zip(tried, moved, strict=True):
            if not by > nothing_moves / 10:
                raise ModelError(
                    f"an intervention at {key} does not reach the logits",
                    got=f"they moved by {by:.3g} of their spread",
                    fix="That map does not write into the residual stream: the model is not what its architecture "
                    "says.",
                )
        heads = max(_heads(model, sites, seen, is_equal, thorough), default=0.0)
    factor = getattr(config.get_text_config(), architecture.factor, 1.0) if architecture.factor else 1.0
    unaccounted = max(_unaccounted(sites, seen, factor), default=0.0)
    normed = architecture.attn_norm or architecture.mlp_norm
    if not architecture.tested and not normed and unaccounted > is_equal:
        raise ModelError(
            "a layer adds something else to the residual stream than its sites write",
            got=f"{architecture.family}: a difference of {unaccounted:.2g} of what it adds",
            fix="A norm or a factor stands between, or a map was not found: describe the model in the recipe "
            "(model.architecture, see docs/add_a_family.md).",
        )
    with torch.inference_mode():
        norms = _norms(model, architecture, sites, seen, draw)
    health = Health(len(tried), min(moved), nothing, heads, unaccounted, norms)
    setattr(model, _CHECKED, (architecture, thorough, health))
    return health


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits[:, -1].float().cpu()


def _one_by_one(sites: Sequence[Site], seen: _Seen, draw: torch.Generator) -> Iterator[tuple[str, Intervention]]:
    """For each site one that moves its output, at the last token, by as much as it is; for a layer's experts one."""
    groups: dict[str, dict[str, Term]] = {}
    for site in sites:
        if site.key not in seen.x:
            continue  # an expert that no token reached
        x, out = seen.x[site.key], seen.out[site.key]
        direction = torch.randn(site.d, generator=draw)
        u = direction / direction.norm() * (out.norm() if out.norm() > 0 else 1.0)
        power = x.square().sum()
        term = Term(u[:, None], (x / power)[None]) if power > 0 else Term(b=u)
        groups.setdefault(site.key if site.expert is None else f"{site.block_key} (experts)", {})[site.key] = term
    for name, terms in groups.items():
        yield name, Intervention(name, terms)


def _moved(model: nn.Module, ids: Tensor, base: Tensor, spread: float, table: Sequence[Intervention]) -> list[float]:
    moved: list[float] = []
    for start in range(0, len(table), ROWS):
        some = table[start : start + ROWS]
        with Interventions(model, some) as running:
            running.rows(range(len(some)))
            logits = _logits(model, ids.expand(len(some), -1))
        moved += ((logits - base).abs().amax(dim=1) / spread).tolist()
    return moved


def _heads(model: nn.Module, sites: Sequence[Site], seen: _Seen, tolerance: float, thorough: bool) -> Iterator[float]:
    """How far a change of one component's input is from acting through its own columns alone, for each one tried."""
    device = device_of(model)
    for site in sites:
        module: Any = module_of(model, site)
        costly = quantised(model, site) or hasattr(module, "_hf_hook")
        if site.key not in seen.x or (costly and site.layer and not thorough):
            continue
        weight = read_weight(model, site).float().cpu()
        x = seen.x[site.key]
        if site.expert is not None:  # it cannot be run alone: what it gave is compared
            told = weight @ x + read_bias(model, site)
            error = float((seen.out[site.key] - told).norm() / (told.norm() + 1e-30))
            if error > tolerance:
                raise ModelError(
                    f"the output of {site.place} is not its weight times its input",
                    got=f"a difference of {error:.2g}",
                    fix="The weight is transposed, or not laid out as the architecture says.",
                )
            yield error
            continue
        some = range(site.n) if thorough and site.block == "attn" else [site.layer % site.n]
        for i in some:
            columns = slice(i * site.width, (i + 1) * site.width)
            other = x.clone()
            other[columns] = x[columns].roll(1) if site.width > 1 else -x[columns]
            both = torch.stack([x, other]).to(device, getattr(model, "dtype", x.dtype))
            out = module(both).float().cpu()
            both = both.cpu()
            got = out[1] - out[0]
            told = weight[:, columns] @ (both[1] - both[0]).float()[columns]
            size = max(float(told.norm()), tolerance * float(out[0].norm()), 1e-30)
            error = float((got - told).norm()) / size
            if error > tolerance:
                raise ModelError(
                    f"component {i} of {site.module} does not act through its own columns",
                    got=f"a difference of {error:.2g} of its effect",
                    fix="The weight is transposed, or not split as the architecture says: the model is not what it "
                    "seems.",
                )
            yield error


def _unaccounted(sites: Sequence[Site], seen: _Seen, factor: float) -> Iterator[float]:
    blocks: dict[int, set[str]] = {}
    for site in sites:
        blocks.setdefault(site.layer, set()).add(site.block_key)
    for layer, keys in blocks.items():
        written = factor * torch.stack([seen.out[key] for key in sorted(keys)]).sum(dim=0)
        yield float((seen.added[layer] - written).norm() / (seen.added[layer].norm() + 1e-30))


def _norms(
    model: nn.Module, architecture: Architecture, sites: Sequence[Site], seen: _Seen, draw: torch.Generator
) -> dict[str, float]:
    """What the norm after a block makes of a small edit of its output, as a factor on the edit's size."""
    found: dict[str, float] = {}
    for block, path in (("attn", architecture.attn_norm), ("mlp", architecture.mlp_norm)):
        ratios = []
        for site in {s.block_key: s for s in sites if s.block == block}.values() if path else ():
            norm: Any = model.get_submodule(f"{architecture.layers}.{site.layer}.{path}")
            out = seen.out[site.block_key]
            edit = torch.randn(site.d, generator=draw)
            edit *= 0.01 * out.norm() / edit.norm()
            both = torch.stack([out, out + edit]).to(device_of(model), getattr(model, "dtype", torch.float32))
            after = norm(both).float().cpu()
            before = both.float().cpu()
            ratios.append(float((after[1] - after[0]).norm() / (before[1] - before[0]).norm()))
        if ratios:
            found[block] = sorted(ratios)[len(ratios) // 2]
    return found


def examine(model: nn.Module, health: Health | None = None) -> dict[str, Any]:
    """What is edited and what is not, and the memory that each stage needs. A model on the `meta` device will do.

    Raises:
        ModelError: the model is not supported; says why.
    """
    sites = find_sites(model)
    architecture = architecture_of(model)
    config: Any = model.config
    found: dict[str, Any] = {
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
        found["self-check"] = asdict(health)
    return found


def _classes(sites: Sequence[Site], architecture: Architecture) -> list[dict[str, Any]]:
    classes: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        kind = "experts" if site.expert is not None else "shared expert" if site.shared else site.block
        path = site.module.removeprefix(f"{architecture.layers}.{site.layer}.")
        path = path if site.expert is None else f"{path}.{site.parameter}[i]"
        classes.setdefault((kind, path, site.d, site.n, site.width), []).append(site)
    return [
        {
            "sites": kind,
            "where": path,
            "count": len(here),
            "layers": len({site.layer for site in here}),
            "components": f"{n} {'heads' if here[0].block == 'attn' else 'neurons'} × {width}",
            "stream": d,
        }
        for (kind, path, d, n, width), here in classes.items()
    ]


def _others(model: nn.Module, sites: Sequence[Site], architecture: Architecture) -> list[dict[str, Any]]:
    """Every weight that is no site, by its name without numbers, and why it is none."""
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
    said = []
    if not architecture.tested:
        said.append(
            "This family is not among the tested ones: let the self-check (--weights) compare the model with this."
        )
    for block, norm in (("attn", architecture.attn_norm), ("mlp", architecture.mlp_norm)):
        if norm:
            said.append(
                f"A norm ({norm}) stands between the {block} block and the stream: vector, edit and steering act "
                "at the projection's output, before it."
            )
    if architecture.factor:
        factor = getattr(config.get_text_config(), architecture.factor, 1.0)
        said.append(
            f"What a block writes is multiplied by {architecture.factor} = {factor:g} on its way to the stream."
        )
    if any(site.expert is not None for site in sites):
        said.append(
            "Experts share a steering vector, their block's; an expert that too few tokens reach (probe.expert_tokens) "
            "is left alone."
        )
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
        said.append(
            f"The weights are quantised ({getattr(method, 'value', method)}): scoring dequantises one site at a time; "
            "edits run as interventions or adapters; apply and checkpoint exports are refused."
        )
    return said


def memory(model: nn.Module, sites: Sequence[Site], *, groups: int = 4, configurations: int = 16) -> dict[str, int]:
    """Bytes that each stage needs, all but the first beside the model's own; from the shapes alone.

    Args:
        groups: groups of traces, of both labels. configurations: of a sweep, that share a batch.
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
    found = {
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
    return found if packed else found | apply


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


def show(console: Any, found: Mapping[str, Any]) -> None:
    """`examine`'s findings as text and tables."""
    from rich.markup import escape
    from rich.table import Table

    tested = "tested" if found["tested"] else "not among the tested families"
    console.print(f"[bold]{escape(found['model'])}[/bold]: {escape(found['family'])}, {tested}", highlight=False)
    tables = {
        "What is edited": found["sites"],
        "What is not": found["not edited"],
        "Memory": [{"for": stage, "needs": _size(size)} for stage, size in found["memory"].items()],
    }
    for title, rows in tables.items():
        table = Table(title=title, title_justify="left")
        for column in rows[0]:
            table.add_column(
                column, justify="right" if column in ("count", "layers", "parameters", "needs") else "left"
            )
        for row in rows:
            table.add_row(*(f"{x:,}" if isinstance(x, int) else escape(str(x)) for x in row.values()))
        console.print(table)
    for remark in found["remarks"]:
        console.print(f"- {escape(remark)}", highlight=False)
    if health := found.get("self-check"):
        for line in _told(health):
            console.print(f"- {escape(line)}", highlight=False)
    else:
        console.print(
            "- The self-check was not run: `--weights` loads the weights and runs the model on a few tokens.",
            highlight=False,
        )


def _told(health: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Self-check passed: {health['interventions']} interventions, one at each site (a layer's experts together), "
        f"move the logits by {health['least_moved']:.2g} or more of their spread; zeros move them by "
        f"{health['moved_by_nothing']:.1g}."
    )
    yield f"A component acts through its own columns alone: largest difference {health['heads']:.1g} of its effect."
    yield f"What a layer adds differs from what its sites write by at most {health['unaccounted']:.1g} of it."
    for block, ratio in health["norms"].items():
        yield f"The norm after the {block} block makes an edit {ratio:.2g} times its size (median over the layers)."


def _size(size: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000  # type: ignore[assignment]
    return f"{size:.3g} {unit}"
