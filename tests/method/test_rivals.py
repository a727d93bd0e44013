"""The rivals' rows by hand, against their papers' formulas in fp64, and as what their papers say they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steer2edit.method.rivals import NULL_SHARE, RIDGE, as_site_edit, llm_va_row, null_space_row, rosi_row
from steer2edit.method.scores import score_site
from steer2edit.method.site import Site


def _case(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """h, weights whose sides weigh one half each, and which rows are positive."""
    draw = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, columns, generator=draw)
    weights = torch.rand(rows, generator=draw) + 0.1
    positive = torch.arange(rows) % 3 == 0
    for side in (positive, ~positive):
        weights[side] /= 2 * weights[side].sum()
    return h, weights, positive


def _numpy(*tensors: Tensor) -> list[Any]:
    return [t.double().numpy() if t.is_floating_point() else t.numpy() for t in tensors]


# ROSI ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rosi_adds_the_mean_of_the_weights_rows(dtype: torch.dtype) -> None:
    W = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, 0.5]], dtype=dtype)
    row = rosi_row(W)
    assert row.dtype == torch.float32
    assert row.tolist() == [2.0, -1.0, 0.5]


# LLM-VA -------------------------------------------------------------------------------------------------------------


def test_llm_va_by_hand() -> None:
    """Outputs (±1, 2) of harmful and (±1, −2) of harmless prompts: harm is read along (0, 1), with twice the spread of
    refusal along (1, 0). So the row is ½ (0, 1) − (1, 0)."""
    h = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [1.0, -2.0], [-1.0, -2.0]])
    positive = torch.tensor([True, True, False, False])
    row = llm_va_row(torch.eye(2), torch.tensor([1.0, 0.0]), h, torch.full((4,), 0.25), positive)
    torch.testing.assert_close(row, torch.tensor([-1.0, 0.5]))


def test_after_llm_va_the_coordinate_of_refusal_is_that_of_harm_and_no_smaller_change_does_it() -> None:
    h, weights, positive = _case(40, 6)
    draw = torch.Generator().manual_seed(5)
    W, refusal = torch.randn(5, 6, generator=draw), torch.randn(5, generator=draw)
    refusal = refusal / refusal.norm()
    row = llm_va_row(W, refusal, h, weights, positive)

    W64, r64, h64, w64, yes = _numpy(W, refusal, h, weights, positive)
    o = h64 @ W64.T
    w64 = w64 / w64.sum()
    ridge = RIDGE * float((w64[:, None] * o**2).sum()) / 5
    harm = np.linalg.solve((o.T * w64) @ o + ridge * np.eye(5), (np.where(yes, 1.0, -1.0) * w64) @ o)
    harm /= np.linalg.norm(harm)
    of_refusal, of_harm = (np.sqrt(np.cov(o @ x, aweights=w64, ddof=0)) for x in (r64, harm))
    after = W64 + np.outer(r64, row.double().numpy())
    np.testing.assert_allclose(r64 @ after, of_refusal / of_harm * harm @ W64, rtol=1e-4, atol=1e-5)
    # Across v̂_r nothing changes: what else would fulfil the equation is longer.
    across = np.eye(5) - np.outer(r64, r64)
    np.testing.assert_allclose(across @ after, across @ W64, atol=1e-5)


def test_llm_va_leaves_a_site_without_inputs_alone() -> None:
    h, weights, positive = _case(6, 3)
    refusal = torch.tensor([1.0, 0.0])
    assert not llm_va_row(torch.ones(2, 3), refusal, torch.zeros_like(h), weights, positive).any()
    # Or one whose outputs are all the same, so that nothing is to be read.
    assert not llm_va_row(torch.ones(2, 3), refusal, torch.ones_like(h), weights, positive).any()


# The null space -----------------------------------------------------------------------------------------------------


def test_the_null_space_by_hand() -> None:
    """Preserved inputs lie along the first axis, positive ones at (1, 1, 0): what is left of these is (0, 1, 0)."""
    h = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [-3.0, 0.0, 0.0]])
    positive = torch.tensor([True, True, False, False])
    row = null_space_row(h, torch.full((4,), 0.25), positive, target=2.0)
    # Two directions are left; P S₊ P has the eigenvalues 1 and 0, so that r = 0.1 · ½.
    torch.testing.assert_close(row, torch.tensor([0.0, 2.0 / 1.05, 0.0]))


@pytest.mark.parametrize(("rows", "columns"), [(40, 8), (9, 30)])
def test_the_null_space_is_what_its_paper_computes(rows: int, columns: int) -> None:
    h, weights, positive = _case(rows, columns)
    row = null_space_row(h, weights, positive, target=1.5)

    h64, w64, yes = _numpy(h, weights, positive)
    quiet = (h64[~yes].T * w64[~yes]) @ h64[~yes]
    energy, directions = np.linalg.eigh(quiet)  # rising
    left = max(round(NULL_SHARE * columns), int((energy < 1e-9).sum()))
    P = directions[:, :left] @ directions[:, :left].T
    share = w64[yes] / w64[yes].sum()
    loud = P @ ((h64[yes].T * share) @ h64[yes]) @ P
    r = RIDGE * np.trace(loud) / left
    # Δ̃ = R H₊ᵀ P (P H₊H₊ᵀ P + r P)⁺ with every row of the target the same, and Δ = Δ̃P.
    told = np.linalg.pinv(loud + r * P, rcond=1e-9) @ P @ (1.5 * share @ h64[yes])
    np.testing.assert_allclose(row, P @ told, rtol=2e-3, atol=2e-4)


def test_in_the_null_space_preserved_inputs_do_not_fire_where_they_leave_room() -> None:
    h, weights, positive = _case(9, 30)  # six preserved rows of 30 columns
    row = null_space_row(h, weights, positive, target=1.0, ridge=1e-3)
    assert float((h[~positive] @ row).abs().max()) < 1e-4
    assert float((h[positive] @ row).mean()) == pytest.approx(1.0, abs=0.05)
    assert not null_space_row(torch.zeros_like(h), weights, positive, target=1.0).any()


# As an edit ---------------------------------------------------------------------------------------------------------


def test_a_row_as_a_sites_edit_is_that_row() -> None:
    site = Site(0, "attn", "o_proj", "o_proj.weight", d=6, n=3, width=2)
    draw = torch.Generator().manual_seed(2)
    W, v, mu = (torch.randn(shape, generator=draw) for shape in ((6, 6), (6,), (6,)))
    scored = score_site(site, W, v, mu)
    row = torch.tensor([1.0, 2.0, 0.0, 0.0, -3.0, 4.0])
    edit = as_site_edit(scored, row)
    torch.testing.assert_close(edit.row, row)
    torch.testing.assert_close(edit.lam, torch.tensor([5.0**0.5, 0.0, 5.0]))
    along = scored.u @ W
    torch.testing.assert_close(edit.reach, torch.stack([along[2 * i : 2 * i + 2] @ edit.k[i] for i in range(3)]))
    assert not as_site_edit(scored, None).lam.any()
    other = torch.eye(6)[0]
    turned = as_site_edit(scored, row, other, other @ W)
    torch.testing.assert_close(turned.delta()[0], row)
    torch.testing.assert_close(turned.reach[2], W[0, 4:] @ torch.tensor([-0.6, 0.8]))
