"""The self-check: runs a model on a few tokens and compares what its sites do with what its record says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, ProbeError
from ..method.intervention import Intervention, Term
from ..method.site import Site
from .architectures import Architecture, architecture_of
from .experts import tapped
from .hooks import Interventions
from .sites import find_sites, module_of
from .weights import device_of, quantised, read_bias, read_weight

# Tokens of the text that a model is checked on, and interventions that are tried in one batch.
TOKENS, ROWS = 3, 32

_CHECKED = "_steer2edit_checked"


@dataclass(frozen=True)
class Health:
    """What the self-check measured. All sizes are relative: 1 means "as large as".

    Attributes:
        interventions: how many were tried: one for each site, and one for all the experts of a layer that tokens
            reached.
        least_moved: the smallest change of the logits under one of them, in standard deviations of the logits.
        moved_by_nothing: the largest change under an intervention of zeros at every site.
        heads: the largest difference between a component's share of its site's output and its columns times its input.
        unaccounted: the largest difference between what a layer adds to the stream and what its sites write; not 0 if
            a norm stands between.
        norms: what a post-norm does to a small edit's size: block type → median over the layers of size after / before.
    """

    interventions: int
    least_moved: float
    moved_by_nothing: float
    heads: float
    unaccounted: float
    norms: Mapping[str, float]


class _Seen:
    """What one forward pass computes at the last token: inputs and outputs of sites and blocks, and layers' sums."""

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
    """Runs a model on a few tokens and compares it with its sites. A model that passed is not checked again.

    An intervention of zeros at every site must leave the logits alone, one at each site must move them, and a change of
    one component's input must change its site's output by that component's own columns.

    Args:
        thorough: check every head of every site. Otherwise one head per site is checked, and of quantised and offloaded
            sites only those of the first layer.

    Raises:
        ModelError: a check fails; names the site. ProbeError: an activation is not finite.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    >>> self_check(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()).interventions
    4
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
                "an intervention of zeros changes the model's output",
                got=f"the logits moved by {nothing:.3g} of their spread",
                fix="The model does not run its experts or projections as transformers does: load it as transformers "
                "defines it.",
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
            "a layer adds something other than its sites' outputs to the residual stream",
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
    """For each site, one that moves its output at the last token by the output's own size; one for all experts."""
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
    """For each component tried: how far a change of its input is from acting through its own columns alone."""
    device = device_of(model)
    for site in sites:
        module: Any = module_of(model, site)
        costly = quantised(model, site) or hasattr(module, "_hf_hook")
        if site.key not in seen.x or (costly and site.layer and not thorough):
            continue
        weight = read_weight(model, site).float().cpu()
        x = seen.x[site.key]
        if site.expert is not None:  # it cannot be run alone: its output in the pass is compared
            expected = weight @ x + read_bias(model, site)
            error = float((seen.out[site.key] - expected).norm() / (expected.norm() + 1e-30))
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
            expected = weight[:, columns] @ (both[1] - both[0]).float()[columns]
            size = max(float(expected.norm()), tolerance * float(out[0].norm()), 1e-30)
            error = float((got - expected).norm()) / size
            if error > tolerance:
                raise ModelError(
                    f"component {i} of {site.module} does not act through its own columns",
                    got=f"a difference of {error:.2g} of its effect",
                    fix="The weight is transposed, or not split as the architecture says.",
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
    """The factor by which the norm after a block changes the size of a small edit of the block's output."""
    medians: dict[str, float] = {}
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
            medians[block] = sorted(ratios)[len(ratios) // 2]
    return medians
