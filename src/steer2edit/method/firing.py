"""Where an edit fires: its push along u on a probe's evidence, by group and part, and how well it tells them apart.

This explains an edit that is not selective. If its firing tells positive from other prompts no better than chance while
a linear probe on the same inputs could, the direction is at fault; if neither can, the model does not tell them apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .change import Part
from .preserve import PARTS, Evidence, ridge_solution

# The linear probe is cross-validated in folds of responses; its ridge is a share of the mean eigenvalue.
FOLDS = 5
RIDGE = 0.1


@dataclass(frozen=True)
class Firing:
    """How an edit fires on one group.

    Attributes:
        means: for each of PARTS the mean push, as a share of the mean push on all positive rows; None without rows.
        auc: for each part how often a positive response gets a larger push than one of this group; None for positive
            groups.
        ceiling: the same for a cross-validated linear probe on the inputs of all edited sites.
    """

    label: str
    group: str
    responses: int
    means: tuple[float | None, ...]
    auc: tuple[float | None, ...]
    ceiling: tuple[float | None, ...]

    def row(self) -> dict[str, object]:
        """As a row of a table."""
        shown: dict[str, object] = {"group": f"{self.label}: {self.group}" if self.group else self.label}
        shown["responses"] = self.responses
        for name, mean in zip(PARTS, self.means, strict=True):
            shown[f"push, {name}"] = "–" if mean is None else f"{mean:.2f}"
        for name, auc, ceiling in zip(PARTS, self.auc, self.ceiling, strict=True):
            if name != PARTS[-1]:
                shown[f"AUC (ceiling), {name}"] = "–" if auc is None else f"{auc:.2f} ({ceiling:.2f})"
        return shown


def push(edit: Part, evidence: Evidence) -> Tensor:
    """Σ aᵀh over the edited sites of which there is evidence, for each row of it [rows]."""
    total = torch.zeros(len(evidence.rows))
    for key, site in edit.edited().items():
        if (h := evidence.of(key)) is not None:
            total += edit.strength * (h @ site.row)
    return total


def firing(edit: Part, evidence: Evidence) -> list[Firing]:
    """How an edit fires on every group of the evidence, the positive ones first."""
    pushed, probed = push(edit, evidence), _probed(edit, evidence)
    scale = float(pushed[evidence.positive].mean())
    groups = dict.fromkeys((row.label, row.group) for row in evidence.rows)
    parts = range(len(PARTS))
    table = []
    for label, group in sorted(groups, key=lambda of: (of[0] != "positive", of[1])):
        mine = [torch.tensor([(r.label, r.group, r.part) == (label, group, p) for r in evidence.rows]) for p in parts]
        others = [torch.tensor([r.label == "positive" and r.part == p for r in evidence.rows]) for p in parts]
        means = tuple(float(pushed[m].mean()) / scale if scale and m.any() else None for m in mine)
        aucs: list[tuple[float | None, ...]] = [
            tuple(None if label == "positive" else _auc(of[o], of[m]) for m, o in zip(mine, others, strict=True))
            for of in (pushed, probed)
        ]
        responses = len({row.response for row in evidence.rows if (row.label, row.group) == (label, group)})
        table.append(Firing(label, group, responses, means, *aucs))
    return table


def _probed(edit: Part, evidence: Evidence) -> Tensor:
    """What ridge classifiers on the inputs of the edited sites say of each row, from folds without its response."""
    fold = torch.tensor([row.response % FOLDS for row in evidence.rows])
    total = torch.zeros(len(evidence.rows))
    for key in edit.edited():
        h = evidence.of(key)
        if h is None:
            continue
        for k in range(FOLDS):
            weights = (evidence.weights * (fold != k))[:, None]
            ridge = RIDGE * float((weights * h.square()).sum()) / h.shape[1]
            towards_positive = (weights * h * evidence.positive[:, None]).sum(dim=0)
            total[fold == k] += h[fold == k] @ ridge_solution(h, weights, ridge, towards_positive)
    return total


def _auc(positive: Tensor, other: Tensor) -> float | None:
    """The share of pairs in which the positive one is larger, ties half."""
    if not len(positive) or not len(other):
        return None
    difference = positive[:, None] - other[None, :]
    return float((difference > 0).float().mean() + 0.5 * (difference == 0).float().mean())
