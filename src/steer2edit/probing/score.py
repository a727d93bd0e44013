"""Probe and weights → Scores: the closed form of the paper for each site, one weight at a time.

The vectors are the probe's difference of means, or given ones. The weights come from a model in memory or straight from
a checkpoint's `safetensors` files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artefacts.places import site_reader
from ..edits import Scores
from ..errors import ModelError, ProbeError
from ..method.fingerprint import from_reading, signs
from ..method.preserve import Evidence, Shared, preserved_outputs, shared_part
from ..method.scores import SiteScores, read, scores_from, unit
from ..method.site import Site, same_sites
from ..method.theorems import output_direction
from ..method.variants import FULL, SCORED, Variant, rescored
from ..models.bake import refuse_edited
from ..models.embedded import checkpoint_folder
from ..models.sites import find_sites
from ..models.weights import is_plain, read_weight
from ..parallel import in_parallel
from .probe import Probe

Vectors = Tensor | Mapping[int, Tensor] | Mapping[str, Tensor]

# Fewer tokens than this say little about what drives an expert.
EXPERT_TOKENS = 16


def score(
    model: nn.Module | str | Path,
    probe: Probe,
    *,
    vectors: Vectors | None = None,
    expert_tokens: int = EXPERT_TOKENS,
    variant: Variant = FULL,
) -> Scores:
    """Scores every site: v̂, k̂ and g, which do not depend on (ρ, α).

    Args:
        model: the model that the probe was made on, or its checkpoint's folder; then only the sites' weights are read.
        vectors: steering vectors in place of the probe's difference of means: one [d] for all sites, one per layer
            {3: v}, one per block {"3.attn": v, "3.mlp": v}, or one per site. Sites without a vector are left out;
            `provenance` names them.
        expert_tokens: experts that fewer tokens reached are left out; `provenance` names them.
        variant: the ablation; k_mean, k_svd and g_dot have scores of their own.

    Raises:
        ModelError: the probe was made on another model, or a weight was never loaded.
        EditError: an edit is baked into the model.
        ProbeError: a vector has the wrong shape or is not finite.

    >>> scores = s2e.score(model, probe)
    >>> scores
    Scores(6 sites, 156 components)
    >>> scores.sites["0.attn"].g.shape  # one number for each head
    torch.Size([4])
    >>> s2e.score(base, probe)  # the same from the checkpoint's files, without a model
    Scores(6 sites, 156 components)
    """
    if isinstance(model, nn.Module):
        refuse_edited(model, "the model carries an edit, so that its weights cannot be scored as the base's")
    given = None if vectors is None else _by_site(vectors, probe.sites)
    too_few = {s.key: n for s in probe.sites if (n := probe.tokens(s)) is not None and n < expert_tokens}
    wanted = tuple(s for s in probe.sites if s.key not in too_few and (given is None or s.key in given))

    evidence = probe.evidence if variant not in SCORED else None

    def one(of: tuple[Site, Tensor]) -> tuple[SiteScores, Tensor]:
        site, weight = of
        v = probe.vector(site) if given is None else given[site.key]
        mu = probe.mean_input(site)
        left, _ = signs(*weight.shape)
        with torch.no_grad():
            reading = read(weight, torch.cat([output_direction(v)[None], left]), unit(mu, site.n))
            if not reading.power < math.inf:
                raise ModelError(
                    f"the weight of {site.place} is not finite", got="NaN or infinity", fix="Load it again."
                )
            scored = rescored(variant, scores_from(site, v, mu, reading), mu, weight)
            if evidence is not None and (h := evidence.of(site.key)) is not None:
                scored = replace(scored, shared=_shared(site, scored.u, weight, h, evidence))
            return scored, from_reading(reading, *weight.shape)

    # One at a time if a weight must be fetched or dequantised, or is not in the CPU's memory.
    at_hand = not isinstance(model, nn.Module) or all(
        p.device.type == "cpu" and is_plain(p) for p in model.parameters()
    )
    scores, fingerprint = {}, {}
    results = in_parallel(one, read_weights(model, probe.sites, wanted), None if at_hand else 1)
    for site, (scored, sketch) in zip(wanted, results, strict=True):
        scores[site.key], fingerprint[site.key] = scored, sketch
    without = [s.key for s in probe.sites if s.key not in scores and s.key not in too_few]
    provenance = {
        "layers": 1 + max(site.layer for site in probe.sites),
        "probe": {"counts": dict(probe.counts), **probe.provenance},
        "vectors": "difference of means" if given is None else "given",
        "sites_without_vector": without,
        "experts_left_alone": too_few,
        "expert_tokens": expert_tokens,
        "variant": variant,
        "sites_with_zero_vector": [key for key, s in scores.items() if s.v_norm == 0],
    }
    return Scores(scores, fingerprint, provenance, evidence)


def _shared(site: Site, v: Tensor, weight: Tensor, h: Tensor, evidence: Evidence) -> Shared:
    """What v̂ [d] shares with a site's outputs on preserved prompts."""
    part = shared_part(v, preserved_outputs(weight, h, evidence))
    along = read(weight, part[None], torch.ones(site.inputs, 1)).along[0]
    return Shared(part, along.cpu().view(site.n, site.width))


def _by_site(vectors: Vectors, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    by_key: dict[str, Tensor] = {}
    names: set[Any] = set()
    for site in sites:
        v: Tensor | None
        if isinstance(vectors, Tensor):
            v = vectors
        else:
            named: Mapping[Any, Tensor] = vectors
            names |= {site.key, site.block_key, site.layer}
            v = named.get(site.key, named.get(site.block_key, named.get(site.layer)))
        if v is None:
            continue
        if v.shape != (site.d,) or not torch.isfinite(v).all():
            raise ProbeError(
                f"the vector for site {site.key} cannot be used",
                got=f"shape {tuple(v.shape)}, finite: {bool(torch.isfinite(v).all())}",
                fix=f"Give a finite vector of {site.d} numbers.",
            )
        by_key[site.key] = v.detach().float().cpu()
    strangers = [] if isinstance(vectors, Tensor) else sorted(map(str, set(vectors) - names))
    if strangers or not by_key:
        raise ProbeError(
            "vectors are given for sites that the model does not have" if strangers else "no vector is given",
            got=strangers or "an empty mapping",
            fix="Name layers by number (3) or sites by key ('3.attn', '3.mlp').",
        )
    return by_key


def read_weights(
    model: nn.Module | str | Path, sites: tuple[Site, ...], wanted: tuple[Site, ...]
) -> Iterator[tuple[Site, Tensor]]:
    """Each wanted site with its weight [d, n·c], one at a time, from a model or its checkpoint's files.

    Raises:
        ModelError: the model has other sites than those of the probe, `sites`.
    """
    if isinstance(model, nn.Module):
        own = same_sites(find_sites(model), sites, "the probe")
        for site in wanted:
            yield site, read_weight(model, own[site.key])
        return
    read = site_reader(checkpoint_folder(model))
    for site in wanted:
        yield site, read(site)
