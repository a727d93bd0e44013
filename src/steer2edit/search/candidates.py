"""Candidates: what is tried, and the intervention that each stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..edits import Edit, Scores, edit_of_variant
from ..method.intervention import NOTHING, Intervention, steering
from ..method.variants import FULL


def layers_of(text: str) -> range:
    """`8-20` → layers 8 to 20, both of them."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


@dataclass(frozen=True)
class Candidate:
    """One thing that is tried: the base model, a steering strength, or an edit's configuration."""

    id: str
    kind: str
    config: Mapping[str, Any]


BASE = Candidate("base", "base", {})


def steered(gamma: float) -> Candidate:
    return Candidate(f"steering-{gamma}", "steering", {"gamma": gamma})


def edited(
    rho_attn: float | None, rho_mlp: float | None, alpha: float, layers: str | None = None, variant: str = FULL
) -> Candidate:
    """An edit's configuration; `layers` and `variant` are named where they are not the method's own."""
    config: dict[str, Any] = {"rho_attn": rho_attn, "rho_mlp": rho_mlp, "alpha": alpha}
    name = "-".join("off" if x is None else str(x) for x in config.values())
    if layers is not None:
        config["layers"], name = layers, f"{name}-layers-{layers}"
    if variant != FULL:
        config["variant"], name = variant, f"{name}-{variant}"
    return Candidate(f"edit-{name}", "edit", config)


def steering_vectors(scores: Scores) -> dict[str, torch.Tensor]:
    """v = ‖v‖ · v̂ of every block: the vectors that the edit was scored with also steer."""
    return {s.site.block_key: s.v_norm * s.u for s in scores.sites.values()}


def edit_of(config: Mapping[str, Any], scores: Mapping[str, Scores]) -> Edit:
    """The edit of a configuration.

    Args:
        scores: the full method's under "full", and those of the variants that score in other ways.
    """
    edit = edit_of_variant(config.get("variant", FULL), scores, config["rho_attn"], config["rho_mlp"], config["alpha"])
    layers = config.get("layers")
    return edit if layers is None else edit.only(layers=layers_of(layers))


def intervention_of(candidate: Candidate, scores: Mapping[str, Scores]) -> Intervention:
    if candidate.kind == "base":
        return NOTHING
    if candidate.kind == "steering":
        return steering(steering_vectors(scores[FULL]), candidate.config["gamma"], candidate.id)
    return edit_of(candidate.config, scores).intervention(candidate.id)
