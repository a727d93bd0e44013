"""The probe: the mean input of every site and the mean output of every block, for each label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileError
from ..files.tensors import read_tensors, write_tensors
from ..method.intervention import residual_key
from ..method.preserve import Evidence
from ..method.site import Site
from .traces import LABELS, Label

FORMAT = 1


@dataclass(frozen=True, repr=False)
class Probe:
    """The means of one pass over the traces.

    Attributes:
        sites: the sites, in order.
        inputs: site key → label → mean input [n·c], fp32; 0 for an expert that no token of the label reached.
        outputs: block key → label → mean output [d], fp32. A block with one site has that site's key.
        counts: responses, tokens and groups of each label; how many responses were skipped and how many cut short;
            under "experts", for each expert's site, how many tokens of each label reached it.
        provenance: model, dtype, span and versions.
        residual: layer → label → mean of the residual stream after it [d], fp32; empty if it was not measured.
        evidence: inputs of heads in single responses, for edits that preserve; None if none was kept.

    >>> site = Site(0, "mlp", "down_proj", "down_proj.weight", d=2, n=3, width=1)
    >>> outputs = {"positive": torch.tensor([1.0, 2.0]), "negative": torch.tensor([0.0, 2.0])}
    >>> probe = Probe((site,), {"0.mlp": {label: torch.ones(3) for label in LABELS}}, {"0.mlp": outputs}, counts={})
    >>> probe.vector(site)
    tensor([1., 0.])
    """

    sites: tuple[Site, ...]
    inputs: Mapping[str, Mapping[Label, Tensor]]
    outputs: Mapping[str, Mapping[Label, Tensor]]
    counts: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    residual: Mapping[int, Mapping[Label, Tensor]] = field(default_factory=dict)
    evidence: Evidence | None = None

    def vector(self, site: Site) -> Tensor:
        """The steering vector of the site's layer and block, v = δ̄_pos − δ̄_neg [d] (paper, equation 1)."""
        means = self.outputs[site.block_key]
        return means["positive"] - means["negative"]

    def mean_input(self, site: Site) -> Tensor:
        """μ = ½(μ_pos + μ_neg) [n·c]: each label weighs one half. For an expert that one label alone reached, its μ."""
        means = self.inputs[site.key]
        tokens = self.counts.get("experts", {}).get(site.key)
        reached = [means[label] for label in LABELS if tokens is None or tokens[label]]
        return torch.stack(reached).mean(dim=0) if reached else torch.zeros(site.inputs)

    def tokens(self, site: Site) -> int | None:
        """How many tokens reached an expert; None for a site that every token passes."""
        tokens = self.counts.get("experts", {}).get(site.key)
        return None if tokens is None else sum(tokens.values())

    def save(self, path: str | Path) -> None:
        tensors = {
            f"{key}.{side}.{label}": tensor
            for side, means in (("input", self.inputs), ("output", self.outputs))
            for key, labels in means.items()
            for label, tensor in labels.items()
        }
        for layer, labels in self.residual.items():
            tensors |= {f"{residual_key(layer)}.{label}": tensor for label, tensor in labels.items()}
        header = {
            "kind": "probe",
            "format": FORMAT,
            "sites": [site.to_json() for site in self.sites],
            "counts": dict(self.counts),
            "provenance": dict(self.provenance),
        }
        if self.evidence is not None:
            tensors |= self.evidence.tensors()
            header["evidence"] = self.evidence.rows_to_json()
        write_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """Reads what `save` wrote. Raises FileError if the file is damaged or its tensors do not fit its sites."""
        tensors, header = read_tensors(path, "probe")
        try:
            sites = tuple(Site.from_json(row) for row in header["sites"])
            counts, provenance = header["counts"], header["provenance"]
            experts = counts.get("experts", {}) if isinstance(counts, dict) else None
            if not sites or not isinstance(experts, dict) or not isinstance(provenance, dict):
                raise ValueError("sites, counts or provenance of another kind")
            inputs = {site.key: {label: tensors[f"{site.key}.input.{label}"] for label in LABELS} for site in sites}
            blocks = dict.fromkeys(site.block_key for site in sites)
            outputs = {key: {label: tensors[f"{key}.output.{label}"] for label in LABELS} for key in blocks}
            for site in sites:
                for label in LABELS:
                    shapes = inputs[site.key][label].shape, outputs[site.block_key][label].shape
                    if shapes != ((site.inputs,), (site.d,)):
                        raise ValueError(f"shapes of {site.key}")
            for key, tokens in experts.items():
                if (
                    not isinstance(tokens, dict)
                    or set(tokens) != set(LABELS)
                    or any(type(n) is not int or n < 0 for n in tokens.values())
                ):
                    raise ValueError(f"counts of {key}")
            residual = _residual(tensors, sites)
            evidence = Evidence.read(tensors, header.get("evidence"), sites)
            return cls(sites, inputs, outputs, counts, provenance, residual, evidence)
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{path} is not a whole probe", got=error, fix="Collect it again.") from None

    def __repr__(self) -> str:
        return f"Probe({len(self.sites)} sites, {_responses(self.counts)})"


def _residual(tensors: Mapping[str, Tensor], sites: tuple[Site, ...]) -> dict[int, Mapping[Label, Tensor]]:
    """The means of the residual stream; probes of older versions have none. Raises ValueError for another shape."""
    if not any(residual_key(site.layer) in name for site in sites for name in tensors):
        return {}
    residual: dict[int, Mapping[Label, Tensor]] = {}
    for layer in range(1 + max(site.layer for site in sites)):
        residual[layer] = {label: tensors[f"{residual_key(layer)}.{label}"] for label in LABELS}
        if any(mean.shape != (sites[0].d,) for mean in residual[layer].values()):
            raise ValueError(f"shapes of {residual_key(layer)}")
    return residual


def _responses(counts: Mapping[str, Any]) -> str:
    known = [f"{counts[label]['responses']} {label}" for label in LABELS if label in counts]
    return ", ".join([*known, "responses"]) if known else "no counts"
