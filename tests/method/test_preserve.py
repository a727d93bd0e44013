"""The quiet row and the quiet direction against least squares in fp64, their limits, and the weights by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from steer2edit.edits import Scores
from steer2edit.errors import EditError
from steer2edit.method.change import SiteEdit
from steer2edit.method.preserve import (
    PARTS,
    SMALLEST_EPSILON,
    Evidence,
    EvidenceRow,
    Shared,
    in_bytes,
    preserved_outputs,
    quiet_direction,
    quiet_row,
    quieted,
    shared_part,
)
from steer2edit.method.scores import score_site
from steer2edit.method.site import Site


def _case(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """a₀, h, weights whose sides weigh one half each, and which rows are positive."""
    draw = torch.Generator().manual_seed(seed)
    h, a0 = torch.randn(rows, columns, generator=draw), torch.randn(columns, generator=draw)
    weights = torch.rand(rows, generator=draw) + 0.1
    positive = torch.arange(rows) % 3 == 0
    for side in (positive, ~positive):
        weights[side] /= 2 * weights[side].sum()
    return a0, h, weights, positive


def _wanted(positive: torch.Tensor, repel: float) -> torch.Tensor:
    """1 on the positive rows, −`repel` on every other one of the rest."""
    return torch.where(positive, 1.0, -repel * (torch.arange(len(positive)) % 2))


def _least_squares(a0: Any, h: Any, weights: Any, positive: Any, wanted: Any, epsilon: float) -> np.ndarray:
    """The same minimum, as one tall least-squares problem: rows √w·h → √w·target, and √(ε s̄)·I → √(ε s̄)·a₀."""
    a0, h, weights, wanted = (x.double().numpy() for x in (a0, h, weights, wanted))
    positive = positive.numpy()
    share = weights[positive] / weights[positive].sum()
    target = sum(w * float(x @ a0) for w, x in zip(share, h[positive], strict=True))
    scale = sum(w * float(x @ x) for w, x in zip(weights, h, strict=True)) / h.shape[1]
    root, pull = np.sqrt(weights), np.sqrt(epsilon * scale)
    A = np.concatenate([root[:, None] * h, pull * np.eye(h.shape[1])])
    b = np.concatenate([root * target * wanted, pull * a0])
    return np.linalg.lstsq(A, b, rcond=None)[0]


@pytest.mark.parametrize("repel", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("epsilon", [0.01, 0.3, 10.0])
@pytest.mark.parametrize(("rows", "columns"), [(40, 12), (12, 40), (20, 20)])
def test_the_quiet_row_is_the_minimum(rows: int, columns: int, epsilon: float, repel: float) -> None:
    a0, h, weights, positive = _case(rows, columns)
    case = a0, h, weights, positive, _wanted(positive, repel), epsilon
    np.testing.assert_allclose(quiet_row(*case), _least_squares(*case), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(40, 12), (12, 40)])
def test_a_large_epsilon_gives_the_papers_row(rows: int, columns: int) -> None:
    a0, *rest = _case(rows, columns)
    torch.testing.assert_close(quiet_row(a0, *rest, _wanted(rest[-1], 0.5), 1e6), a0, rtol=1e-4, atol=1e-4)


def test_it_is_linear_in_the_papers_row() -> None:
    a0, *rest = _case(30, 12)
    other, rest = torch.randn(12), [*rest, _wanted(rest[-1], 0.5), 0.3]
    sum_of_both = quiet_row(a0, *rest) * 2 + quiet_row(other, *rest)
    torch.testing.assert_close(quiet_row(2 * a0 + other, *rest), sum_of_both, rtol=1e-4, atol=1e-4)


def test_it_fires_less_where_nothing_is_to_change_and_as_much_where_it_should() -> None:
    """Two groups that differ along one axis, which the paper's row does not know."""
    draw = torch.Generator().manual_seed(1)
    h = torch.randn(200, 8, generator=draw) * 0.3
    positive = torch.arange(200) < 100
    h[:, 0] += 2.0  # what excites the paper's row on both sides
    h[positive, 1] += 1.5
    a0 = torch.zeros(8)
    a0[0] = 1.0
    weights = torch.full((200,), 1 / 200)
    a = quiet_row(a0, h, weights, positive, positive.float(), 0.05)
    fired, quiet = (h[positive] @ a).mean(), (h[~positive] @ a).mean()
    assert float(fired) == pytest.approx(float((h[positive] @ a0).mean()), rel=0.2)
    assert float(quiet) < 0.25 * float(fired)
    assert float((h[~positive] @ a0).mean()) > 0.9 * float((h[positive] @ a0).mean())
    # With β above 0 the other group is pushed the other way, and the first as hard as before.
    away = quiet_row(a0, h, weights, positive, torch.where(positive, 1.0, -0.5), 0.05)
    assert float((h[positive] @ away).mean()) == pytest.approx(float(fired), rel=0.2)
    assert float((h[~positive] @ away).mean()) < -0.25 * float(fired)


def test_inputs_of_zero_leave_the_papers_row() -> None:
    a0, h, weights, positive = _case(10, 4)
    assert torch.equal(quiet_row(a0, 0 * h, weights, positive, positive.float(), 0.3), a0)


def _direction_case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """v̂ [9] and the mean outputs of three parts [9, 3], which are alike, as those of a model are."""
    draw = torch.Generator().manual_seed(seed)
    v = torch.randn(9, generator=draw)
    outputs = torch.randn(9, 1, generator=draw) + 0.3 * torch.randn(9, 3, generator=draw)
    return v / v.norm(), outputs.double()  # the spans below are compared in fp64


WEIGHT = torch.randn(9, 6, generator=torch.Generator().manual_seed(7))


def _quiet(v: torch.Tensor, outputs: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """u and W_iᵀu, for two components of WEIGHT."""
    part = shared_part(v, outputs)
    return quiet_direction(v, (v @ WEIGHT).view(2, 3), Shared(part, (part @ WEIGHT).view(2, 3)), epsilon)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 3.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_quiet_direction_is_the_minimum(epsilon: float, seed: int) -> None:
    v, outputs = _direction_case(seed)
    projector = (outputs @ torch.linalg.pinv(outputs)).numpy()
    A = np.concatenate([np.eye(9), projector / np.sqrt(epsilon)])
    w = np.linalg.lstsq(A, np.concatenate([v.double().numpy(), np.zeros(9)]), rcond=None)[0]
    u, along = _quiet(v, outputs, epsilon)
    np.testing.assert_allclose(u, w / np.linalg.norm(w), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(along.flatten(), u @ WEIGHT, rtol=1e-4, atol=1e-5)


def test_a_large_epsilon_gives_the_papers_direction_and_a_small_one_writes_nothing_that_is_shared() -> None:
    v, outputs = _direction_case()
    torch.testing.assert_close(_quiet(v, outputs, 1e7)[0], v)
    u, _ = _quiet(v, outputs, 1e-7)
    assert float((outputs.T @ u.double()).abs().max()) < 1e-5
    # Of all unit vectors in the complement of the outputs it is the nearest to v̂.
    others = torch.randn(9, 500, generator=torch.Generator().manual_seed(5)).double()
    others -= outputs @ (torch.linalg.pinv(outputs) @ others)
    assert float(u @ v) >= float((v.double() @ (others / others.norm(dim=0))).max())


def test_outputs_that_repeat_or_are_zero_span_what_the_others_span() -> None:
    v, outputs = _direction_case()
    expected = shared_part(v, outputs)
    again = torch.cat([outputs, 1e6 * outputs[:, :1], torch.zeros(9, 1)], dim=1)
    torch.testing.assert_close(shared_part(v, again), expected)
    assert shared_part(v, torch.zeros(9, 2)).tolist() == [0.0] * 9


@pytest.mark.parametrize("epsilon", [SMALLEST_EPSILON, 0.1])
def test_a_vector_that_is_all_shared_stays(epsilon: float) -> None:
    """Nothing is left to take its place: what is, is rounding."""
    _, outputs = _direction_case()
    v = (outputs @ torch.tensor([1.0, -2.0, 0.5]).double()).float()
    v /= v.norm()
    u, along = _quiet(v, outputs, epsilon)
    assert u is v
    torch.testing.assert_close(along.flatten(), v @ WEIGHT)


def test_means_that_are_alike_but_for_rounding_span_one_direction() -> None:
    draw = torch.Generator().manual_seed(4)
    W, h = torch.randn(64, 48, generator=draw), torch.randn(48, generator=draw)
    rows = _rows(("positive", "harm", 0), *[("negative", "plain", part) for part in (0, 1, 2)])
    evidence = Evidence(rows, {}, {})
    for dtype in (torch.float32, torch.bfloat16):
        outputs = preserved_outputs(W.to(dtype), torch.stack([h, h, 3 * h, 7 * h]), evidence)
        v = torch.randn(64, generator=draw)
        f = outputs[:, 0].double() / outputs[:, 0].double().norm()
        torch.testing.assert_close(shared_part(v, outputs), (f * (f @ v.double())).float(), rtol=1e-4, atol=1e-5)


def _rows(*of: tuple[str, str, int]) -> list[EvidenceRow]:
    return [EvidenceRow(label, group, i, part) for i, (label, group, part) in enumerate(of)]


def test_the_weights_of_the_rows_by_hand() -> None:
    evidence = Evidence(
        _rows(
            ("positive", "harm", 0),
            ("positive", "harm", 0),
            ("positive", "harm", 1),
            ("negative", "plain", 0),
            ("negative", "plain", 2),
            ("negative", "like", 0),
            ("negative", "like", 0),
        ),
        {},
        {},
    )
    # The positive half: two parts of 1/4, of which the first has two rows. The other half: three parts of 1/6.
    expected = [1 / 8, 1 / 8, 1 / 4, 1 / 6, 1 / 6, 1 / 12, 1 / 12]
    np.testing.assert_allclose(evidence.weights, expected, rtol=1e-6)
    # What stands before the answer to a preserved prompt is pushed the other way.
    assert evidence.wanted(0.5).tolist() == [1, 1, 1, -0.5, 0, -0.5, -0.5]
    assert evidence.wanted(0.0).tolist() == [1, 1, 1, 0, 0, 0, 0]


# Of a site of which v̂ shares nothing with preserved outputs: u stays v̂.
NOTHING_SHARED = Shared(torch.zeros(6), torch.zeros(4, 3))


def _site_edit(n: int = 4, c: int = 3) -> tuple[SiteEdit, Evidence]:
    site = Site(0, "attn", "self_attn.o_proj", "self_attn.o_proj.weight", d=6, n=n, width=c)
    draw = torch.Generator().manual_seed(3)
    s = score_site(site, torch.randn(6, n * c, generator=draw), *(torch.randn(k, generator=draw) for k in (6, n * c)))
    lam = torch.tensor([0.5, 0.0, -0.7, 0.2])
    rows = _rows(*[("positive" if i % 2 else "negative", "", i % 3) for i in range(24)])
    h = torch.randn(24, n * c, generator=draw)
    return SiteEdit(site, s.u, s.k, s.g, s.reach, lam), Evidence(rows, *({"0.attn": x} for x in in_bytes(h)))


@pytest.mark.parametrize("repel", [0.0, 0.7])
def test_components_that_are_not_edited_stay_so_and_signs_stay(repel: float) -> None:
    edit, evidence = _site_edit()
    quiet = quieted(edit, evidence, 0.3, repel, NOTHING_SHARED)
    assert torch.equal(torch.sign(quiet.lam), torch.sign(edit.lam))
    assert quiet.row.view(4, 3)[1].tolist() == [0, 0, 0]
    lengths = torch.linalg.vector_norm(quiet.k, dim=1)
    torch.testing.assert_close(lengths, torch.ones(4), rtol=1e-5, atol=1e-5)
    columns = [0, 1, 2, 6, 7, 8, 9, 10, 11]
    h = evidence.of("0.attn")[:, columns]
    sides = evidence.weights, evidence.positive, evidence.wanted(repel)
    expected = _least_squares(edit.row[columns], h, *sides, 0.3)
    np.testing.assert_allclose(quiet.row[columns], expected, rtol=1e-3, atol=1e-4)
    assert quiet.g is edit.g
    torch.testing.assert_close(quiet.u, edit.u)


def test_the_reach_is_that_of_the_new_direction() -> None:
    edit, evidence = _site_edit()
    quiet = quieted(edit, evidence, 0.3, 0.5, NOTHING_SHARED)
    # v̂ᵀW_i k_i = reach_i · k̂_i·k_i, since W_iᵀv̂ = reach_i k̂_i.
    along = edit.reach[:, None] * edit.k
    torch.testing.assert_close(quiet.reach, (along * quiet.k).sum(dim=1))


def _preserved_outputs(W: torch.Tensor, h: torch.Tensor, evidence: Evidence) -> np.ndarray:
    """A loop over parts and rows, in fp64; here each side has one group, whose rows weigh alike."""
    means = []
    for part in range(3):
        mine = [i for i, row in enumerate(evidence.rows) if row.label == "negative" and row.part == part]
        means.append(sum(W.double().numpy() @ h[i].double().numpy() for i in mine) / len(mine))
    return np.stack(means, axis=1)


def test_the_shared_part_is_that_of_the_mean_outputs() -> None:
    edit, evidence = _site_edit()
    W = torch.randn(6, 12, generator=torch.Generator().manual_seed(8))
    h = evidence.of("0.attn")
    assert h is not None
    expected = _preserved_outputs(W, h, evidence)
    np.testing.assert_allclose(preserved_outputs(W, h, evidence), expected, rtol=1e-4, atol=1e-5)
    basis = np.linalg.qr(expected)[0]
    shared = shared_part(edit.u, preserved_outputs(W, h, evidence))
    np.testing.assert_allclose(shared, basis @ (basis.T @ edit.u.double().numpy()), rtol=1e-3, atol=1e-4)


def test_groups_of_preserved_prompts_weigh_alike_in_the_mean_outputs() -> None:
    rows = _rows(("positive", "harm", 0), *[("negative", group, 0) for group in ("plain", "like", "like", "like")])
    h = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    outputs = preserved_outputs(torch.eye(2), h, Evidence(rows, {}, {}))
    assert outputs.flatten().tolist() == pytest.approx([0.5, 1.0])  # one part: nothing was longer than a token


def test_the_quiet_direction_keeps_the_quiet_row_and_its_reach_is_the_weights() -> None:
    site = Site(0, "attn", "self_attn.o_proj", "self_attn.o_proj.weight", d=6, n=4, width=3)
    _, evidence = _site_edit()
    draw = torch.Generator().manual_seed(9)
    W, v, mu = (torch.randn(*shape, generator=draw) for shape in ((6, 12), (6,), (12,)))
    s = score_site(site, W, v, mu)
    h = evidence.of("0.attn")
    assert h is not None
    part = shared_part(s.u, preserved_outputs(W, h, evidence))
    shared = Shared(part, (part @ W).view(4, 3))
    edit = SiteEdit(site, s.u, s.k, s.g, s.reach, torch.tensor([0.5, 0.0, -0.7, 0.2]))
    quiet = quieted(edit, evidence, 0.3, 0.5, shared)
    torch.testing.assert_close(quiet.row, quieted(edit, evidence, 0.3, 0.5, NOTHING_SHARED).row)
    torch.testing.assert_close(quiet.u, quiet_direction(s.u, s.reach[:, None] * s.k, shared, 0.3)[0])
    # What `Presence` reads in the base's weights: uᵀW_i k_i.
    expected = torch.stack([quiet.u @ W[:, 3 * i : 3 * i + 3] @ quiet.k[i] for i in range(4)])
    torch.testing.assert_close(quiet.reach, expected, rtol=1e-4, atol=1e-5)


def test_a_site_without_evidence_and_one_that_is_not_edited_stay_the_papers() -> None:
    edit, evidence = _site_edit()
    assert quieted(edit, Evidence(evidence.rows, {}, {}), 0.3, 0.5, None) is edit
    off = SiteEdit(edit.site, edit.u, edit.k, edit.g, edit.reach, torch.zeros(4))
    assert quieted(off, evidence, 0.3, 0.5, NOTHING_SHARED) is off


def test_an_edit_cannot_preserve_without_evidence_or_with_an_epsilon_out_of_range() -> None:
    edit, evidence = _site_edit()
    site = score_site(edit.site, torch.ones(6, 12), torch.ones(6), torch.ones(12))
    with pytest.raises(EditError, match="no evidence"):
        Scores({"0.attn": site}).edit(rho_attn=0.2, rho_mlp=None, alpha=0.0, preserve=0.3)
    scores = Scores({"0.attn": site}, evidence=evidence)
    for epsilon in (0.0, -1.0, 1e-5, float("inf"), float("nan")):
        with pytest.raises(EditError, match=r"at least 0\.0001"):
            scores.edit(rho_attn=0.2, rho_mlp=None, alpha=0.0, preserve=epsilon)
    for repel in (-0.1, float("inf"), float("nan")):
        with pytest.raises(EditError, match="repel must be at least 0"):
            scores.edit(rho_attn=0.2, rho_mlp=None, alpha=0.0, preserve=0.3, repel=repel)
    with pytest.raises(EditError, match="Score the probe again"):
        scores.edit(rho_attn=0.2, rho_mlp=None, alpha=0.0, preserve=0.3)
    shared = Shared(0.2 * site.u, torch.zeros(4, 3))
    scores = Scores({"0.attn": replace(site, shared=shared)}, evidence=evidence)
    with pytest.raises(EditError, match="no \\(ρ, α\\) to change"):
        scores.edit(rho_attn=0.2, rho_mlp=None, alpha=0.0, preserve=0.3).with_budget(
            rho_attn=0.1, rho_mlp=None, alpha=0.0
        )


@pytest.mark.parametrize(
    "rows",
    [
        [["positive", "", 0, 0]],  # one label alone
        [["positive", "", 0, 0], ["negative", "", 1, len(PARTS)]],
        [["positive", "", 0, 0], ["negative", "", 1]],
        [["positive", "", 0, 0], ["negative", 3, 1, 0]],
        "rows",
    ],
)
def test_rows_of_a_file_that_are_none_are_refused(rows: Any) -> None:
    site = Site(0, "attn", "o", "o.weight", d=2, n=1, width=2)
    with pytest.raises((ValueError, TypeError)):
        Evidence.read({"0.attn.evidence": torch.zeros(2, 2).char()}, rows, [site])


def test_evidence_of_another_shape_is_refused() -> None:
    site = Site(0, "attn", "o", "o.weight", d=2, n=1, width=2)
    rows = [["positive", "", 0, 0], ["negative", "", 1, 0]]
    for shape, scales in (((2, 3), 2), ((3, 2), 2), ((2, 2), 3)):
        tensors = {"0.attn.evidence": torch.zeros(shape).char(), "0.attn.evidence_scale": torch.zeros(scales)}
        with pytest.raises(ValueError, match="shape"):
            Evidence.read(tensors, rows, [site])


def test_bytes_keep_rows_to_a_step_and_zeros_exactly() -> None:
    h = torch.tensor([[1.0, -2.54, 0.01], [0.0, 0.0, 0.0], [1e-6, 0.0, -1e-6]])
    steps, scale = in_bytes(h)
    assert steps.dtype is torch.int8
    assert ((steps * scale[:, None] - h).abs() <= scale[:, None] / 2 + 1e-12).all()
    assert steps[0].tolist() == [50, -127, 0]
    assert steps[1].tolist() == [0, 0, 0]
