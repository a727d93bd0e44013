"""Where an edit fires, by hand, and that the ceiling is of responses that its classifier has not seen."""

from __future__ import annotations

import pytest
import torch

from steer2edit.edits import Edit
from steer2edit.method.change import SiteEdit
from steer2edit.method.firing import _auc, firing, push
from steer2edit.method.preserve import Evidence, EvidenceRow, in_bytes
from steer2edit.method.site import Site


def _edit(row: torch.Tensor, strength: float = 1.0) -> Edit:
    site = Site(0, "attn", "o", "o.weight", d=2, n=1, width=len(row))
    length = torch.linalg.vector_norm(row)
    ones = torch.ones(1)
    edit = SiteEdit(site, torch.tensor([1.0, 0.0]), row[None] / length, ones, ones, length[None])
    return Edit({"0.attn": edit}, {}, strength=strength)


def test_shares_and_aucs_by_hand() -> None:
    rows = [EvidenceRow("positive", "harm", i, 0) for i in range(2)] + [EvidenceRow("positive", "harm", 0, 2)]
    rows += [EvidenceRow("negative", "plain", 2 + i, 0) for i in range(2)]
    h = torch.tensor([[2.0, 1.0], [4.0, 1.0], [6.0, 1.0], [1.0, 1.0], [1.5, 1.0]])
    evidence = Evidence(rows, *({"0.attn": x} for x in in_bytes(h)))
    edit = _edit(torch.tensor([1.0, 0.0]), strength=0.5)
    assert push(edit, evidence).tolist() == pytest.approx([1.0, 2.0, 3.0, 0.5, 0.75], rel=0.01)
    positive, plain = firing(edit, evidence)
    assert (positive.label, positive.responses, plain.group, plain.responses) == ("positive", 2, "plain", 2)
    assert positive.means == (pytest.approx(0.75, rel=0.01), None, pytest.approx(1.5, rel=0.01))  # of a mean of 2
    assert plain.means == (pytest.approx(0.3125, rel=0.01), None, None)
    assert plain.auc == (1.0, None, None)
    assert positive.auc == (None, None, None)


def _evidence(signal: float, responses: int = 60, width: int = 40) -> Evidence:
    """As many positive as other responses, told apart along one axis by `signal`, in fewer rows than columns."""
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(responses, width, generator=draw)
    h[::2, 0] += signal
    rows = [EvidenceRow("negative" if i % 2 else "positive", "", i, 0) for i in range(responses)]
    return Evidence(rows, *({"0.attn": x} for x in in_bytes(h)))


def test_the_ceiling_of_noise_is_chance_and_that_of_a_signal_is_not() -> None:
    edit = _edit(torch.eye(40)[1])  # it fires on an axis that says nothing
    _, noise = firing(edit, _evidence(0.0))
    _, signal = firing(edit, _evidence(5.0))
    assert noise.ceiling[0] is not None
    assert signal.ceiling[0] is not None
    assert noise.ceiling[0] < 0.75  # on the responses it was made of it would be 1
    assert signal.ceiling[0] > 0.95
    assert signal.auc[0] == pytest.approx(0.5, abs=0.2)
    assert signal.row()["AUC (ceiling), last prompt token"].endswith(f"({signal.ceiling[0]:.2f})")  # type: ignore[attr-defined]


def test_ties_count_half() -> None:
    assert _auc(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0])) == 3.5 / 4
    assert _auc(torch.tensor([]), torch.tensor([0.5])) is None
