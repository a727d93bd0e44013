"""Probe, scores and weights → what a rival of the paper's edit does, as an edit of strength 1 (method/rivals.py)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..edits import Edit, Scores
from ..errors import EditError, ProbeError
from ..method.change import SiteEdit
from ..method.preserve import Evidence
from ..method.rivals import RIVALS, Rival, as_site_edit, llm_va_row, null_space_row, rosi_row
from ..method.theorems import output_direction
from .probe import Probe
from .score import read_weights


def rival_edit(
    model: nn.Module | str | Path, probe: Probe, scores: Scores, name: Rival, *, layer: int | None = None
) -> Edit:
    """A rival as an edit; its strength is to be found, for which `searching/calibrate.py` measures KL.

    Args:
        model: the model that the probe was made on, or its checkpoint's folder.
        scores: the full method's, with evidence for those `WITH_EVIDENCE`.
        layer: of ROSI, after which ŝ is read; None is the middle one. Its rows do not depend on it.

    Raises:
        EditError: there is no such rival, or no evidence. ProbeError: the probe did not measure the residual stream,
            of which ROSI reads ŝ. ModelError: the probe was made on another model.

    >>> edit = rival_edit(model, probe, scores, "rosi")
    >>> len(edit.edited())  # every weight that writes to the residual stream
    6
    """
    if name not in RIVALS:
        raise EditError("there is no such rival", got=name, fix=f"Known: {', '.join(RIVALS)}.")
    config = {"rho_attn": None, "rho_mlp": None, "alpha": 0.0, "rival": name}
    if name == "rosi":
        sites = _rosi(model, probe, scores, len(probe.residual) // 2 if layer is None else layer)
    else:
        sites = _with_evidence(model, probe, scores, name)
    return Edit(sites, config, scores.fingerprint, scores.provenance)


def safety_direction(probe: Probe, layer: int) -> Tensor:
    """ŝ [d]: the difference of means of the residual stream after a layer, at unit length.

    Raises:
        ProbeError: the probe did not measure the residual stream after that layer.
    """
    if layer not in probe.residual:
        raise ProbeError(
            "the probe did not measure the residual stream there", got=f"layer {layer}", fix="Collect it again."
        )
    means = probe.residual[layer]
    return output_direction(means["positive"] - means["negative"])


def _rosi(model: nn.Module | str | Path, probe: Probe, scores: Scores, layer: int) -> dict[str, SiteEdit]:
    direction = safety_direction(probe, layer)
    wanted = tuple(s.site for s in scores.sites.values())
    sites = {}
    for site, weight in read_weights(model, probe.sites, wanted):
        along = direction @ weight.detach().float().cpu()
        # A copy each: a file holds no tensors that share memory.
        sites[site.key] = as_site_edit(scores.sites[site.key], rosi_row(weight), direction.clone(), along)
    return sites


def _with_evidence(model: nn.Module | str | Path, probe: Probe, scores: Scores, name: Rival) -> dict[str, SiteEdit]:
    evidence = scores.evidence
    if evidence is None:
        raise EditError(
            f"the scores have no evidence for {name}",
            got="a probe without preserve",
            fix="Collect with preserve=(…), the groups of negative traces that the edit should leave alone.",
        )
    rows: dict[str, Tensor] = {}
    if name == "null_space":
        for key, s in scores.sites.items():
            if (h := evidence.of(key)) is not None:
                rows[key] = null_space_row(h, evidence.weights, evidence.positive, s.v_norm)
    else:
        last = _last_prompt_tokens(evidence)
        wanted = tuple(s.site for key, s in scores.sites.items() if key in evidence.inputs)
        for site, weight in read_weights(model, probe.sites, wanted):
            s, h = scores.sites[site.key], evidence.of(site.key)
            assert h is not None
            rows[site.key] = llm_va_row(weight, s.u, h[last], evidence.weights[last], evidence.positive[last])
    return {key: as_site_edit(s, rows.get(key)) for key, s in scores.sites.items()}


def _last_prompt_tokens(evidence: Evidence) -> Tensor:
    """Which rows of the evidence are of a prompt's last token [rows]."""
    return torch.tensor([row.part == 0 for row in evidence.rows])
