"""Candidates and trials: what is tried, the intervention that it stands for, and what it showed and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from ..edits import Edit, Scores
from ..errors import EditError, FileError
from ..method.intervention import NOTHING, Intervention, Term, residual_key, steering
from ..method.preserve import EPSILON, REPEL
from ..method.rivals import RIVALS
from ..method.site import layers_of
from ..method.theorems import output_direction
from ..method.variants import FULL, PRESERVE, SCORED, VARIANTS
from ..probing.probe import Probe
from ..probing.rivals import safety_direction
from ..probing.traces import Label

Values = tuple[float | None, ...]


# What is compared, in the order of tables: kind → what people read.
TITLES = {
    "base": "original",
    "system": "system prompt",
    "steering": "steering",
    "layer": "one layer",
    "direction": "direction",
    "rosi": "ROSI",
    "llm_va": "LLM-VA",
    "null_space": "null space",
    "lora": "rank-1 LoRA",
    "fine_tuning": "full fine-tuning",
    "edit": "edit",
}
# What a search compares edits with; RIVALS only if `search.baselines` names them.
BASELINES = ("system", "steering", "layer", "direction")
# Where in the model the baselines of one layer are tried, as shares of its depth.
DEPTHS = (0.35, 0.5, 0.65)


@dataclass(frozen=True)
class Candidate:
    """One thing that is tried.

    Attributes:
        id: its name in files.
        kind: of TITLES. "system": a system prompt. "steering": out += γv at every block (paper, section 3). "layer":
            x += γv on the residual stream after one layer. "direction": the residual stream's coordinate along one
            layer's v̂ moves towards the positive traces' mean, after every layer. "rosi", "llm_va", "null_space": the
            closed forms of `method.rivals`, with a strength. "lora", "fine_tuning": a checkpoint of training, which
            only an engine that holds it can run. "edit": an edit's configuration.
        config: its settings.
    """

    id: str
    kind: str
    config: Mapping[str, Any]


BASE = Candidate("base", "base", {})


@dataclass(frozen=True)
class Trial:
    """What a candidate showed and cost.

    Attributes:
        values: measure's name → a number for each item that counts for it, None where it is not finite.
        round: when it was tried.
    """

    candidate: Candidate
    values: Mapping[str, Values]
    round: str

    def mean(self, measure: str) -> float | None:
        """The mean over items; None where no item counts for the measure, or one has a number that is not finite."""
        values = self.values.get(measure, ())
        finite = [value for value in values if value is not None]
        return sum(finite) / len(finite) if finite and len(finite) == len(values) else None

    def count(self, measure: str) -> int:
        return len(self.values.get(measure, ()))

    def means(self) -> dict[str, float | None]:
        return {name: self.mean(name) for name in self.values}

    def to_json(self) -> dict[str, Any]:
        """The trial as a row on disk; the means are for people and scripts."""
        c = self.candidate
        row: dict[str, Any] = {"id": c.id, "kind": c.kind, "config": dict(c.config), "round": self.round}
        return row | self.means() | {"values": {name: list(values) for name, values in self.values.items()}}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Trial:
        """Raises FileError if the row is not a trial's."""
        try:
            known = {name: row[name] for name in ("id", "kind", "config", "values", "round")}
            checked = _ROW.validate_python(known)
        except (KeyError, ValidationError) as error:
            got = str(error).splitlines()[0]
            raise FileError("a row is not a trial", got=got, fix="Run the stage search again.") from None
        return cls(Candidate(checked.id, checked.kind, checked.config), checked.values, checked.round)


@dataclass(frozen=True)
class _Row:
    id: str
    kind: str
    config: dict[str, Any]
    values: dict[str, Values]
    round: str


_ROW = TypeAdapter(_Row)


def of_kind(trials: Sequence[Trial], kind: str) -> list[Trial]:
    """The trials of edits, of steering strengths or of the base model."""
    return [trial for trial in trials if trial.candidate.kind == kind]


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


def asked(number: int, system: str) -> Candidate:
    """The original model under a system prompt that asks for the behaviour."""
    return Candidate(f"system-{number}", "system", {"system": system})


def steered_at(layer: int, gamma: float) -> Candidate:
    return Candidate(f"layer-{layer}-{gamma}", "layer", {"layer": layer, "gamma": gamma})


def directed(layer: int, gamma: float) -> Candidate:
    return Candidate(f"direction-{layer}-{gamma}", "direction", {"layer": layer, "gamma": gamma})


def rival(kind: str, gamma: float, *, layer: int | None = None, layers: str | None = None) -> Candidate:
    """A rival of the edit at a strength.

    Args:
        layer: of ROSI, after which its direction is read. layers: of the others, those that are edited; None is all.

    >>> rival("llm_va", 0.5, layers="8-20")
    Candidate(id='llm_va-0.5-layers-8-20', kind='llm_va', config={'gamma': 0.5, 'layers': '8-20'})
    """
    if layer is not None:
        return Candidate(f"{kind}-{layer}-{gamma}", kind, {"layer": layer, "gamma": gamma})
    if layers is None:
        return Candidate(f"{kind}-{gamma}", kind, {"gamma": gamma})
    return Candidate(f"{kind}-{gamma}-layers-{layers}", kind, {"gamma": gamma, "layers": layers})


def tried_layers(probe: Probe) -> list[int]:
    """The layers at which the baselines of one layer are tried; none if the probe did not measure the stream."""
    last = len(probe.residual) - 1
    return sorted({round(depth * last) for depth in DEPTHS}) if probe.residual else []


def steering_vectors(scores: Scores) -> dict[str, torch.Tensor]:
    """v = ‖v‖ · v̂ of every block: the vectors that the edit was scored with also steer."""
    return {s.site.block_key: s.v_norm * s.u for s in scores.sites.values()}


def edit_of(
    config: Mapping[str, Any], scores: Mapping[str, Scores], preserving: Mapping[str, float] | None = None
) -> Edit:
    """The edit of a configuration.

    Args:
        scores: the full method's under "full", and those of the variants that score in other ways.
        preserving: ε and β of the variant `preserve`, as `Edit.preserving` has them; by default the package's.
    """
    variant, layers = config.get("variant", FULL), config.get("layers")
    budget = config["rho_attn"], config["rho_mlp"], config["alpha"]
    return edit_of_variant(variant, scores, *budget, layers, preserving)


def edit_of_variant(
    variant: str,
    scores: Mapping[str, Scores],
    rho_attn: float | None,
    rho_mlp: float | None,
    alpha: float,
    layers: str | None = None,
    preserving: Mapping[str, float] | None = None,
) -> Edit:
    """The edit of one configuration under a variant.

    Args:
        scores: the full method's under "full", those of `SCORED` variants under their names.
        layers: those that are edited, as in a recipe; None is all.
        preserving: ε and β of the variant `preserve`; by default the package's.

    Raises:
        EditError: the variant is unknown, or its scores are missing.
    """
    source = variant if variant in SCORED else FULL
    if variant not in VARIANTS or source not in scores:
        raise EditError("there are no scores for that variant", got=variant, fix=f"Known: {', '.join(VARIANTS)}.")
    edit = scores[source].edit(
        rho_attn=rho_attn,
        rho_mlp=rho_mlp,
        alpha=0.0 if variant == "l2" else alpha,
        layers=layers,
        **(preserving or {PRESERVE: EPSILON, "repel": REPEL} if variant == PRESERVE else {}),
    )
    if variant == "l0":
        edit = _hard(edit, rho_attn, rho_mlp, alpha)
    return edit if variant == FULL else replace(edit, config={**edit.config, "variant": variant})


def _hard(edit: Edit, rho_attn: float | None, rho_mlp: float | None, alpha: float) -> Edit:
    """ℓ0: of the components that Elastic-Net keeps, the K largest by |g|, λ_i = g_i / (ρ(1 − α)).

    That is the maximiser of gᵀλ − ρ(1 − α)/2 · ‖λ‖₂² with at most K components: a hard threshold, not a soft one.
    """
    rho = {"attn": rho_attn, "mlp": rho_mlp}
    sites = {}
    for key, s in edit.sites.items():
        budget = rho[s.site.block]
        lam = s.lam if budget is None else torch.where(s.lam != 0, s.g / (budget * (1 - alpha)), 0.0)
        sites[key] = replace(s, lam=lam)
    return replace(edit, sites=sites)


def intervention_of(
    candidate: Candidate,
    scores: Mapping[str, Scores],
    probe: Probe | None = None,
    rivals: Mapping[str, Edit] | None = None,
) -> Intervention:
    """What a candidate does inside the model; nothing for the original model and for a system prompt.

    Args:
        probe: with the means of the residual stream, for baselines on it.
        rivals: kind → what it does at strength 1, for rivals of the edit.
    """
    if candidate.kind in ("base", "system"):
        return NOTHING
    if candidate.kind == "edit":
        return edit_of(candidate.config, scores).intervention(candidate.id)
    gamma = candidate.config["gamma"]
    if candidate.kind == "steering":
        return steering(steering_vectors(scores[FULL]), gamma, candidate.id)
    assert probe is not None
    if candidate.kind in RIVALS:
        return _of_rival((rivals or {})[candidate.kind], candidate, probe)
    means = probe.residual
    layer = candidate.config["layer"]
    v = means[layer]["positive"] - means[layer]["negative"]
    if candidate.kind == "layer":
        return Intervention(candidate.id, {residual_key(layer): Term(b=gamma * v)})
    return Intervention(candidate.id, _towards_positive(means, output_direction(v), gamma))


def _of_rival(edit: Edit, candidate: Candidate, probe: Probe) -> Intervention:
    """A rival at its strength: in some layers, or with the direction that is read after one layer."""
    config = candidate.config
    if (layers := config.get("layers")) is not None:
        edit = edit.only(layers_of(layers))
    if (layer := config.get("layer")) is not None:
        direction = safety_direction(probe, layer)
        edit = replace(edit, sites={key: replace(s, u=direction) for key, s in edit.sites.items()})
    return edit.with_strength(config["gamma"]).intervention(candidate.id)


def _towards_positive(
    means: Mapping[int, Mapping[Label, torch.Tensor]], v: torch.Tensor, gamma: float
) -> dict[str, Term]:
    """After every layer ℓ: x += γ v̂(v̂·μ_pos − v̂·x), so that at γ = 1 the coordinate along v̂ is the positive mean's.

    Directional ablation with the affine shift of Marshall, Scherlis & Belrose (arXiv 2411.09003), which sets the
    coordinate to the positive side's mean in place of 0.

    Args:
        means: layer → label → mean of the stream. v: v̂ [d].
    """
    u, a = gamma * v[:, None], -v[None]
    return {residual_key(i): Term(u, a, gamma * (v @ mean["positive"]) * v) for i, mean in means.items()}
