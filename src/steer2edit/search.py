"""The sweep: every edit and every steering strength on the validation split, in batches whose rows carry them all.

Scores do not depend on (ρ, α), so that a configuration costs a soft threshold and its rows in a batch. What a batch
gave is journalled, so that a killed sweep goes on from its last whole batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .behaviours.safety import KINDS, Prompt, declines, messages
from .config import Recipe
from .edit import Edit, Scores
from .engines import Engine, Progress, Request
from .errors import EditError
from .evaluate import degenerate, rate, within
from .files import append_jsonl, read_journal
from .intervention import NOTHING, Intervention, steering


@dataclass(frozen=True)
class Candidate:
    """One thing that is tried: the base model, a steering strength, or an edit's configuration."""

    id: str
    kind: str
    config: Mapping[str, float | None]


BASE = Candidate("base", "base", {})


def steering_vectors(scores: Scores) -> dict[str, torch.Tensor]:
    """v = ‖v‖ · v̂ of every block: the vectors that the edit was scored with also steer."""
    return {s.site.block_key: s.v_norm * s.u for s in scores.sites.values()}


def candidates(recipe: Recipe) -> list[Candidate]:
    """The base, the steering strengths, then the grid of edits, without those that switch both block types off."""
    s = recipe.search
    found = [BASE]
    found += [Candidate(f"steering-{gamma}", "steering", {"gamma": gamma}) for gamma in s.steering]
    for rho_attn, rho_mlp, alpha in itertools.product(s.rho_attn, s.rho_mlp, s.alpha):
        if rho_attn is None and rho_mlp is None:
            continue
        name = "-".join("off" if x is None else str(x) for x in (rho_attn, rho_mlp, alpha))
        found.append(Candidate(f"edit-{name}", "edit", {"rho_attn": rho_attn, "rho_mlp": rho_mlp, "alpha": alpha}))
    return list({c.id: c for c in found}.values())


def edit_of(candidate: Candidate | Mapping[str, Any], scores: Scores) -> Edit:
    config: Mapping[str, Any] = candidate.config if isinstance(candidate, Candidate) else candidate["config"]
    return scores.edit(rho_attn=config["rho_attn"], rho_mlp=config["rho_mlp"], alpha=config["alpha"])


def intervention_of(candidate: Candidate, scores: Scores) -> Intervention:
    if candidate.kind == "base":
        return NOTHING
    if candidate.kind == "steering":
        gamma = candidate.config["gamma"]
        assert gamma is not None
        return steering(steering_vectors(scores), gamma, candidate.id)
    return edit_of(candidate, scores).intervention(candidate.id)


def run_trials(
    engine: Engine,
    scores: Scores,
    tried: Sequence[Candidate],
    prompts: Sequence[Prompt],
    recipe: Recipe,
    journal: Path,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Every candidate on every prompt; one row a candidate, with the answers' flags in the order of the prompts.

    Args:
        tried: the base model first.
        journal: one line a batch; lines that are there already are not made again.
    """
    plan = recipe.evaluation
    table = [intervention_of(candidate, scores) for candidate in tried]
    ids = [engine.tokens(messages(p.text, recipe.behaviour.system)) for p in prompts]
    work = [(c, p) for c in range(len(tried)) for p in range(len(prompts))]
    batches = [work[i : i + plan.batch] for i in range(0, len(work), plan.batch)]
    benign = [i for i, p in enumerate(prompts) if p.kind == "benign"][: plan.utility_prompts]
    utility = len(benign)
    done = {(row["what"], row["batch"]): row for row in read_journal(journal)}
    steps = len(work) + utility * len(tried)  # what progress counts

    answers: dict[tuple[int, int], tuple[str, int]] = {}  # text, and where its answer starts
    for number, batch in enumerate(batches):
        row = done.get(("answers", number))
        if row is None:
            made = engine.generate(
                [Request(ids[p], c) for c, p in batch],
                table,
                plan.new_tokens,
                _shifted(progress, number * plan.batch, steps),
            )
            row = {"what": "answers", "batch": number, "texts": [a.text for a in made]}
            row["starts"] = [a.start for a in made]
            append_jsonl(journal, row)
        answers |= dict(zip(batch, zip(row["texts"], row["starts"], strict=True), strict=True))

    row = done.get(("own", 0))
    if row is None:
        made = engine.generate([Request(ids[p]) for p in benign], [NOTHING], plan.utility_tokens)
        row = {"what": "own", "batch": 0, "ids": [list(a.ids) for a in made]}
        append_jsonl(journal, row)
    own = [(ids[p], tuple(answer)) for p, answer in zip(benign, row["ids"], strict=True) if answer]

    kl, nll, base_nll = [], [], []
    for number, first in enumerate(range(0, len(own), 8)):
        row = done.get(("losses", number))
        if row is None:
            losses = engine.losses(
                own[first : first + 8],
                table[1:],
                _shifted(progress, len(work) + first * len(tried), steps),
            )
            row = {"what": "losses", "batch": number, "kl": losses.kl.tolist(), "nll": losses.nll.tolist()}
            row["base_nll"] = losses.base_nll.tolist()
            append_jsonl(journal, row)
        kl += row["kl"]
        nll += row["nll"]
        base_nll += row["base_nll"]
    if progress:
        progress(steps, steps)

    rows = []
    for c, candidate in enumerate(tried):
        said = [answers[c, p] for p in range(len(prompts))]
        losses_of = {
            "kl": [0.0 if c == 0 else answer[c - 1] for answer in kl],
            "nll_rise": [0.0 if c == 0 else answer[c - 1] - b for answer, b in zip(nll, base_nll, strict=True)],
        }
        rows.append(_trial(candidate, prompts, said, losses_of, len(benign) - len(own)))
    return rows


def _shifted(progress: Progress | None, start: int, steps: int) -> Progress | None:
    """The progress of a part that begins after `start` of `steps` steps."""
    return None if progress is None else lambda done, _: progress(min(start + done, steps), steps)


def _trial(
    candidate: Candidate,
    prompts: Sequence[Prompt],
    said: Sequence[tuple[str, int]],
    losses: Mapping[str, list[float]],
    empty: int,
) -> dict[str, Any]:
    judged = [text[start:] for text, start in said]  # what a model thinks is not what it answers
    bad = [degenerate(text) for text in judged]
    refused = [declines(text) and not b for text, b in zip(judged, bad, strict=True)]
    by_kind = {kind: [r for r, p in zip(refused, prompts, strict=True) if p.kind == kind] for kind in KINDS}
    return {
        "id": candidate.id,
        "kind": candidate.kind,
        "config": dict(candidate.config),
        "refusal": rate(by_kind["harmful"]),
        "over_refusal": rate(by_kind["benign"]),
        "over_refusal_borderline": rate(by_kind["borderline"]),
        "degenerate": rate(bad),
        "utility_loss": _mean(losses["kl"]),
        "nll_rise": _mean(losses["nll_rise"]),
        "counts": {kind: len(flags) for kind, flags in by_kind.items()}
        | {"utility": len(losses["kl"]), "empty": empty},
        "flags": {**by_kind, "degenerate": bad},
        "losses": dict(losses),
        "texts": [text for text, _ in said],
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def choose(trials: Sequence[Mapping[str, Any]], kind: str, recipe: Recipe) -> Mapping[str, Any] | None:
    """The highest refusal rate within the limits, of equals the smallest utility loss; None if none is within."""
    limits = recipe.search.limits.model_dump()
    allowed = [t for t in trials if t["kind"] == kind and within(t, limits)]
    return max(allowed, key=lambda t: (t["refusal"], -(t["utility_loss"] or 0.0)), default=None)


def require_choice(trials: Sequence[Mapping[str, Any]], recipe: Recipe) -> Mapping[str, Any]:
    """As `choose` for edits. Raises EditError if no edit is within the limits."""
    chosen = choose(trials, "edit", recipe)
    if chosen is None:
        gentlest = min((t for t in trials if t["kind"] == "edit"), key=lambda t: t["utility_loss"] or 0.0)
        raise EditError(
            "no edit stays within the limits on validation",
            got=f"the gentlest has over-refusal {gentlest['over_refusal']}, utility loss {gentlest['utility_loss']}",
            fix="Raise search.rho_attn, search.rho_mlp or search.alpha (smaller edits), or the limits.",
        )
    return chosen
