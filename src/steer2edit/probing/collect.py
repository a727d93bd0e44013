"""One pass over the traces, which makes a Probe.

A response's mean is taken over its span, a group's over its responses, a label's over its groups, so that a long
response weighs no more than a short one. An expert sees only the tokens routed to it: they are pooled over responses,
and groups weigh alike. PassSums are held in fp64 (compensated fp32 where a device has no fp64).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ModelError, ProbeError
from ..method.intervention import residual_key
from ..method.preserve import Evidence, in_bytes
from ..method.site import BLOCKS, Site
from ..models.architectures import architecture_of
from ..models.experts import Tap, tapped
from ..models.selfcheck import self_check
from ..models.sites import find_sites, module_of
from ..models.weights import device_of
from .chat import CHAT, Chat
from .plan import Plan, part_of, plan_pass
from .probe import Probe
from .spans import Span
from .traces import LABELS, Label, Part, Positions, Trace

# Positions that one step sums at once, so that the probe's memory, beside the model's own activations, does not grow
# with the length of a sequence.
CHUNK = 1024


class _Sum:
    """A running sum [g, k] that keeps small terms: fp64, or compensated fp32 (Neumaier) where fp64 is missing."""

    def __init__(self, groups: int, width: int, device: torch.device):
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.total = torch.zeros(groups, width, dtype=exact, device=device)
        self.lost = torch.zeros_like(self.total) if exact is torch.float32 else None

    def add(self, term: Tensor) -> None:
        if self.lost is None:
            self.total += term
            return
        total = self.total + term
        larger = self.total.abs() >= term.abs()
        self.lost += torch.where(larger, (self.total - total) + term, (term - total) + self.total)
        self.total = total

    def value(self) -> Tensor:
        return (self.total if self.lost is None else self.total + self.lost).cpu().double()


class _Collector:
    """Hooks that add up, for each group of responses, every site's input and every block's output over the spans."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], groups: int, kept: int = 0):
        self.sites, self.groups, self.kept = sites, groups, kept
        self.weights = torch.empty(0)  # [groups, batch · time]: 1 / span length inside a span, 0 elsewhere
        self.parts = torch.empty(0)  # [parts, batch · time]: the same for the parts of responses that are kept
        self.part_rows: list[int] = []  # [parts]: their rows in the evidence
        self.evidence: dict[str, Tensor] = {}  # a site of heads → [kept rows, n·c] int8
        self.scales: dict[str, Tensor] = {}  # … → [kept rows]
        self.heads = {site.key for site in sites if site.width > 1}
        self.sums: dict[tuple[str, str], _Sum] = {}
        self.reached: dict[str, Tensor] = {}  # expert's site → [groups], tokens that reached it
        self.opened = contextlib.ExitStack()
        experts: dict[str, dict[int, str]] = {}
        for site in sites:
            if site.expert is None:
                self._listen(module_of(model, site), site.key, input=True, output=site.block_module == site.module)
            else:
                experts.setdefault(site.module, {})[site.expert] = site.key
        blocks = {site.block_key: site.block_module for site in sites if site.block_module != site.module}
        for key, module in blocks.items():
            self._listen(model.get_submodule(module), key, input=False, output=True)
        layers = architecture_of(model).layers
        self.streams = {i: residual_key(i) for i in range(len(model.get_submodule(layers)))}  # type: ignore[arg-type]
        for i, key in self.streams.items():
            self._listen(model.get_submodule(f"{layers}.{i}"), key, input=False, output=True)
        self.opened.enter_context(tapped(model, {module: self._tap(keys) for module, keys in experts.items()}))

    def _listen(self, module: nn.Module, key: str, *, input: bool, output: bool) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
            if input:
                self._add(key, "input", args[0])
            if output:
                self._add(key, "output", out if isinstance(out, Tensor) else out[0])

        self.opened.callback(module.register_forward_hook(hook).remove)

    def _tap(self, keys: Mapping[int, str]) -> Tap:
        def tap(expert: int, tokens: Tensor, x: Tensor, out: Tensor) -> Tensor:
            counted = (self.weights.to(x.device) > 0)[:, tokens]  # [groups, m]
            in_span = counted.any(dim=0)  # a token outside all spans may hold anything
            self._total(keys[expert], "input", x).add(counted[:, in_span].float() @ x[in_span].float())
            self.reached[keys[expert]] = self.reached.get(keys[expert], 0) + counted.sum(dim=1).cpu()
            return out

        return tap

    def _total(self, key: str, side: str, x: Tensor) -> _Sum:
        if (key, side) not in self.sums:
            self.sums[key, side] = _Sum(self.groups, x.shape[-1], x.device)
        return self.sums[key, side]

    def _add(self, key: str, side: str, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1])
        if self.part_rows and side == "input" and key in self.heads:
            self._keep(key, flat)
        weights = self.weights.to(flat.device)
        total = self._total(key, side, flat)
        for start in range(0, len(flat), CHUNK):
            total.add(weights[:, start : start + CHUNK] @ flat[start : start + CHUNK].float())

    def _keep(self, key: str, flat: Tensor) -> None:
        if key not in self.evidence:
            self.evidence[key] = torch.zeros(self.kept, flat.shape[-1], dtype=torch.int8)
            self.scales[key] = torch.zeros(self.kept)
        means = self.parts.to(flat.device) @ flat.float()
        self.evidence[key][self.part_rows], self.scales[key][self.part_rows] = in_bytes(means.cpu())

    def first_not_finite(self) -> str | None:
        """The first site or block, in the model's order, whose sums hold a NaN or an infinity."""
        finite = {k: torch.isfinite(s.total).all() for k, s in self.sums.items()}
        if all(finite.values()):
            return None
        places = [place for s in self.sites for place in ((s.key, "input"), (s.block_key, "output"))]
        places += [(key, "output") for key in self.streams.values()]
        return next(key for key, side in places if not finite.get((key, side), True))

    def __enter__(self) -> _Collector:
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.close()


def collect(
    model: nn.Module,
    tokenizer: Any,
    positive: Iterable[Trace],
    negative: Iterable[Trace] = (),
    *,
    plain: bool = False,
    chat: Chat = CHAT,
    part: Part = "both",
    positions: Positions = "predicting",
    max_tokens: int = 4096,
    batch_tokens: int = 1024,
    check: bool = True,
    preserve: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Probe:
    """Runs the traces through the model once, forward only and without the language-model head.

    Args:
        positive, negative: the traces. Their own labels decide, so one mixed list will do.
        preserve: the groups of negative traces on whose prompts the model should stay as it is. Then the probe also
            keeps evidence, from which `Scores.edit(preserve=…)` makes an edit that fires and writes little there.
        plain: no chat template, for base models: a trace's text is prompt + response. Short for Chat(plain=True).
        chat: how messages become text.
        part: which part of a thinking model's responses is used: the thinking, the answer, or both. A response without
            that part is counted as empty.
        positions: "predicting", the positions whose outputs predict the response's tokens, or "response", its own.
        max_tokens: longer texts are cut on the right, and counted.
        batch_tokens: at most this many tokens, padding included, go through the model at once.
        check: run doctor's self-check first, if this model has not passed it yet.
        progress: called with (responses done, responses in total).

    Raises:
        TraceError: a label has no trace, or none with a response.
        ProbeError: an activation is not finite; names the site and the trace.
        ModelError: the model is not supported or fails the self-check, or has no chat template while `plain` is off.

    >>> probe = s2e.collect(model, tokenizer, positive, negative)
    >>> probe
    Probe(6 sites, 3 positive, 2 negative, responses)
    >>> probe.vector(probe.sites[0]).shape  # the steering vector of the first attention block
    torch.Size([32])
    """
    chat = replace(chat, plain=plain or chat.plain)
    plan = plan_pass(
        tokenizer,
        [*positive, *negative],
        chat=chat,
        part=part,
        positions=positions,
        max_tokens=max_tokens,
        preserve=preserve,
    )
    sums = run_pass(model, plan, None, batch_tokens, progress, check)
    return probe_of(plan, sums, {"batch_tokens": batch_tokens})


@dataclass(frozen=True)
class PassSums:
    """The sums of a pass over some of a plan's responses. The sums of several passes can be added.

    Attributes:
        sites: the model's, in order.
        totals: (site or block key, "input" or "output") → [2 · groups, k] fp64, a plan's rows.
        reached: an expert's site key → [2 · groups], tokens that reached it.
        provenance: of the model that ran.
        evidence: site key → [rows of the plan's evidence, n·c] int8; 0 in the rows of other responses. scales: site key
            → [rows].
    """

    sites: tuple[Site, ...]
    totals: Mapping[tuple[str, str], Tensor]
    reached: Mapping[str, Tensor]
    provenance: Mapping[str, Any]
    evidence: Mapping[str, Tensor] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: PassSums) -> PassSums:
        return PassSums(
            self.sites,
            _added(self.totals, other.totals),
            _added(self.reached, other.reached),
            self.provenance,
            _added(self.evidence, other.evidence),
            _added(self.scales, other.scales),
        )


K = TypeVar("K")


def _added(one: Mapping[K, Tensor], other: Mapping[K, Tensor]) -> dict[K, Tensor]:
    return {key: sum(of[key] for of in (one, other) if key in of) for key in {**one, **other}}  # type: ignore[misc]


def run_pass(
    model: nn.Module,
    plan: Plan,
    which: Sequence[int] | None,
    batch_tokens: int,
    progress: Callable[[int, int], None] | None = None,
    check: bool = True,
) -> PassSums:
    """Runs a plan's responses, or some of them, through the model.

    Args:
        check: run doctor's self-check first, if this model has not passed it yet.

    Raises:
        ProbeError: an activation is not finite. ModelError: the model has no weights.
    """
    if all(p.is_meta for p in model.parameters()) and not any(hasattr(m, "_hf_hook") for m in model.modules()):
        raise ModelError("the model has no weights", got="the meta device", fix="Load it with steer2edit.load_model.")
    if check:
        self_check(model)
    which = range(len(plan.spans)) if which is None else which
    sites = find_sites(model)
    device = device_of(model)
    kept, positions = plan.kept, plan.provenance["positions"]
    with _Collector(model, sites, 2 * len(plan.groups), len(plan.evidence)) as collector, torch.inference_mode():
        done = 0
        for batch in batches_by_length([len(plan.spans[i].ids) for i in which], batch_tokens):
            chosen = [which[i] for i in batch]
            parts = [
                (b, part_of(plan.spans[i], part, positions), row)
                for b, i in enumerate(chosen)
                for row, part in kept.get(i, ())
            ]
            collector.part_rows = [row for _, _, row in parts]
            collector.parts = _weights_of(parts, len(chosen), max(len(plan.spans[i].ids) for i in chosen))
            _forward(model, [plan.spans[i] for i in chosen], [plan.rows[i] for i in chosen], collector, device)
            if collector.first_not_finite():
                collector.__exit__()  # its hooks would count the texts that now run one by one
                _blame(model, sites, [(plan.spans[i], plan.owners[i]) for i in chosen], device)
            done += len(batch)
            if progress:
                progress(done, len(which))
    config: Any = model.config
    provenance = {
        "model": getattr(config, "_name_or_path", ""),
        "model_type": config.model_type,
        "commit": getattr(config, "_commit_hash", None),
        "dtype": str(getattr(model, "dtype", None)).removeprefix("torch."),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
    totals = {place: total.value() for place, total in collector.sums.items()}
    return PassSums(sites, totals, dict(collector.reached), provenance, collector.evidence, collector.scales)


def _weights_of(parts: Sequence[tuple[int, range, int]], batch: int, width: int) -> Tensor:
    """1 / its length over each part of a response of the batch, 0 elsewhere [parts, batch · width]."""
    weights = torch.zeros(len(parts), batch, width)
    for i, (b, span, _) in enumerate(parts):
        weights[i, b, span.start : span.stop] = 1 / len(span)
    return weights.flatten(1)


def probe_of(plan: Plan, sums: PassSums, provenance: Mapping[str, Any]) -> Probe:
    """The probe that the sums over all of a plan's responses make."""
    halves = {place: total.view(len(plan.groups), 2, -1) for place, total in sums.totals.items()}
    reached = {key: tokens.view(len(plan.groups), 2).sum(dim=1) for key, tokens in sums.reached.items()}
    whole = replace(sums, totals={place: half.sum(dim=1) for place, half in halves.items()}, reached=reached)
    means = _Means(plan.groups, plan.counts, whole)
    inputs = {site.key: means.of(site.key, "input", site.inputs) for site in sums.sites}
    blocks = {site.block_key: site.d for site in sums.sites}
    outputs = {key: means.of(key, "output", d) for key, d in blocks.items()}
    layers = 1 + max(site.layer for site in sums.sites)
    streams = [i for i in range(layers) if (residual_key(i), "output") in sums.totals]
    residual = {i: means.of(residual_key(i), "output", sums.sites[0].d) for i in streams}
    experts = {site.key: means.reached(site.key) for site in sums.sites if site.expert is not None}
    counts = {**plan.counts, "experts": experts}
    agreement = _agreement(plan, halves, list(blocks))
    provenance = {**sums.provenance, **plan.provenance, **provenance, "halves_agree": agreement}
    evidence = Evidence(plan.evidence, sums.evidence, sums.scales) if plan.evidence else None
    return Probe(sums.sites, inputs, outputs, counts, provenance, residual, evidence)


def _agreement(plan: Plan, halves: Mapping[tuple[str, str], Tensor], blocks: Sequence[str]) -> dict[str, float | None]:
    """Block type → median over layers of the cosine between the steering vectors of two halves of the traces.

    About 0 if the two sides do not differ by more than chance; None if a side has a single response.
    """
    count = torch.zeros(len(plan.groups), 2, dtype=torch.float64)
    for row in plan.rows:
        count.view(-1)[row] += 1
    cosines: dict[str, list[float]] = {block: [] for block in BLOCKS}
    usable = {label: [i for i, (of, _) in enumerate(plan.groups) if of == label and count[i].all()] for label in LABELS}
    if not all(usable.values()):
        return dict.fromkeys(BLOCKS)
    for key in blocks:
        means = halves[key, "output"] / count[..., None].clamp(min=1)  # [groups, 2, d]
        v = means[usable["positive"]].mean(dim=0) - means[usable["negative"]].mean(dim=0)  # [2, d]
        cosine = float(torch.nn.functional.cosine_similarity(v[0], v[1], dim=0))
        cosines[key.split(".")[1]].append(cosine)
    return {block: statistics.median(some) if some else None for block, some in cosines.items()}


def _of_groups(groups: Sequence[tuple[Label, str]], counts: Mapping[str, Any], what: str) -> Tensor:
    """One of the counts, for each group. [groups]"""
    return torch.tensor([counts[label][what].get(group, 0) for label, group in groups], dtype=torch.float64)


class _Means:
    """PassSums of each group → means of each label."""

    def __init__(self, groups: Sequence[tuple[Label, str]], counts: Mapping[str, Any], sums: PassSums):
        self.labels, self.sums = [label for label, _ in groups], sums
        self.responses = _of_groups(groups, counts, "groups")  # [groups]
        self.spans = _of_groups(groups, counts, "group_tokens")  # [groups]

    def _mine(self, label: Label) -> Tensor:
        return torch.tensor([other == label for other in self.labels]) & (self.responses > 0)

    def reached(self, key: str) -> dict[str, int]:
        """Tokens of each label that reached an expert."""
        tokens = self.sums.reached.get(key, torch.zeros(len(self.labels), dtype=torch.long))
        return {label: int(tokens[self._mine(label)].sum()) for label in LABELS}

    def of(self, key: str, side: str, width: int) -> dict[Label, Tensor]:
        summed = self.sums.totals.get((key, side))
        total = torch.zeros(len(self.labels), width, dtype=torch.float64) if summed is None else summed  # [groups, k]
        tokens = self.sums.reached.get(key)
        means: dict[Label, Tensor] = {}
        for label in LABELS:
            mine = self._mine(label)
            if summed is None or tokens is not None:
                # An expert's mean is pooled. Each token weighs 1 / all tokens of its group, so that groups weigh alike
                # although the router sends more tokens of one than of another.
                weight = 1 / self.spans[mine, None]
                seen = (weight[:, 0] * (0 if tokens is None else tokens[mine])).sum()
                means[label] = ((weight * total[mine]).sum(dim=0) / (seen if seen else 1)).float()
            else:
                means[label] = (total[mine] / self.responses[mine, None]).mean(dim=0).float()
        return means


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices, longest first, in batches of at most `batch_tokens` tokens with padding, or of a single longer one."""
    batches: list[list[int]] = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * width > batch_tokens:
            batches.append([])
            width = lengths[i]
        batches[-1].append(i)
    return batches


def _forward(
    model: nn.Module, spans: Sequence[Span], rows: Sequence[int], collector: _Collector, device: torch.device
) -> None:
    # Padding stands on the right, where a causal model cannot see it from a response, so no mask is needed, which
    # keeps attention on its fast path.
    width = max(len(span.ids) for span in spans)
    ids = torch.zeros(len(spans), width, dtype=torch.long)
    weights = torch.zeros(collector.groups, len(spans), width)
    for i, (span, row) in enumerate(zip(spans, rows, strict=True)):
        ids[i, : len(span.ids)] = torch.tensor(span.ids)
        ids[i, len(span.ids) :] = span.ids[-1]  # a token of the trace, since 0 · inf in the padding would be a NaN
        weights[row, i, span.first : span.last] = 1 / (span.last - span.first)
    collector.weights = weights.flatten(1).to(device)
    body: Any = getattr(model, "base_model", model)
    body(input_ids=ids.to(device), use_cache=False)


def _blame(model: nn.Module, sites: Sequence[Site], batch: Iterable[tuple[Span, Trace]], device: torch.device) -> None:
    for span, trace in batch:
        with _Collector(model, sites, 1) as alone:
            _forward(model, [span], [0], alone, device)
        if site := alone.first_not_finite():
            raise ProbeError(
                f"an activation at site {site} is not finite",
                got=f"the trace {trace.source or trace.prompt!r:.80}, response {trace.response[:40]!r}",
                fix="Run the model in bf16 or fp32 (fp16 overflows), or leave that trace out.",
            )
    raise ProbeError(
        "an activation is not finite",
        got="a batch whose traces are finite alone",
        fix="Lower batch_tokens; run in fp32.",
    )
