"""The mathematics: against the oracle, each theorem against random competitors, what follows from them, and files."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from scipy.optimize import minimize
from torch import Tensor

import oracle
import steer2edit as s2e
from steer2edit.edits import Scores
from steer2edit.errors import EditError, FileError
from steer2edit.files.tensors import read_tensors, write_tensors
from steer2edit.method.change import SiteEdit
from steer2edit.method.scores import read, score_site
from steer2edit.method.site import Site
from steer2edit.method.theorems import input_direction, magnitudes, output_direction

seeds = st.integers(0, 2**32 - 1)


def make_site(d: int, n: int, width: int) -> Site:
    return Site(0, "attn" if width > 1 else "mlp", "m", "m.weight", d, n, width)


def draw(seed: int, n: int = 5, width: int = 3, d: int = 8) -> tuple[Site, Tensor, Tensor, Tensor]:
    """A random site, its weight [d, n·c], v [d] and μ [n·c]."""
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(d, n * width, generator=random)
    return make_site(d, n, width), W, torch.randn(d, generator=random), torch.randn(n * width, generator=random)


def edit_site(seed: int, rho: float | None = 0.2, alpha: float = 0.3, **shape: int) -> tuple[SiteEdit, Tensor, Tensor]:
    """The library's edit of a random site, with its weight and v."""
    site, W, v, mu = draw(seed, **shape)
    s = score_site(site, W, v, mu)
    return SiteEdit(site, s.u, s.k, s.g, s.reach, magnitudes(s.g, rho, alpha)), W, v


# Against the oracle -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho_attn", "rho_mlp", "alpha"), [(0.3, 0.2, 0.4), (None, 0.5, 0.0), (0.3, None, 0.6)], ids=str
)
def test_collect_score_edit_equals_the_paper_read_slowly(
    variant: Any, tokenizer: Any, traces: Any, rho_attn: float | None, rho_mlp: float | None, alpha: float
) -> None:
    # One text at a time, as the oracle runs them: bf16 activations depend on the batch.
    scores = s2e.score(variant, s2e.collect(variant, tokenizer, *traces, batch_tokens=1))
    edit = scores.edit(rho_attn=rho_attn, rho_mlp=rho_mlp, alpha=alpha)
    runs = oracle.runs_of(tokenizer, [*traces[0], *traces[1]])
    expected = oracle.read(variant, runs, {"attn": rho_attn, "mlp": rho_mlp}, alpha)
    assert len(edit.sites) == len(expected) == 2 * variant.config.num_hidden_layers
    for (layer, block), paper in expected.items():
        ours = edit.sites[f"{layer}.{block}"]
        for name in ("u", "k", "g", "lam"):
            here, there = getattr(ours, name), torch.from_numpy(getattr(paper, name))
            assert here.dtype == torch.float32
            torch.testing.assert_close(here.double(), there, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(ours.delta().double(), torch.from_numpy(paper.delta), rtol=1e-6, atol=1e-6)
        assert math.isclose(scores.sites[f"{layer}.{block}"].v_norm, np.linalg.norm(paper.v), rel_tol=1e-5)
    blocks = {site.site.block for site in edit.edited().values()}
    assert blocks == {block for block, rho in (("attn", rho_attn), ("mlp", rho_mlp)) if rho is not None}


# Theorem 3.1 --------------------------------------------------------------------------------------------------------


@given(seeds)
def test_theorem_1_the_output_changes_along_v_alone(seed: int) -> None:
    edit, _, v = edit_site(seed)
    random = torch.Generator().manual_seed(seed)
    h = torch.randn(15, 20, generator=random)
    z = torch.randn(20, 8, generator=random)
    z = z - torch.outer(z @ v / (v @ v), v)  # ⊥ v
    moved = edit.delta() @ h  # [d, 20]
    assert float((z @ moved).abs().max()) < 1e-5 * float(moved.norm() * z.norm())
    assert float((v @ moved).abs().min()) > 0

    other = torch.randn(8, generator=random)
    other = other - (other @ v) / (v @ v) * v
    other = other / other.norm()
    tilted = torch.outer(edit.u + 0.1 * other, edit.row) @ h  # u with a component that is not v's
    assert float((other @ tilted).abs().max()) > 0.05 * float((edit.row @ h).abs().max())


# Theorem 3.2 --------------------------------------------------------------------------------------------------------


def correlation(k: np.ndarray, q: np.ndarray, covariance: np.ndarray) -> float:
    """Pearson(kᵀh, qᵀh) where h has that covariance."""
    return float(k @ covariance @ q / math.sqrt((k @ covariance @ k) * (q @ covariance @ q)))


@given(seeds)
def test_theorem_2_no_input_direction_correlates_more_with_the_alignment_score(seed: int) -> None:
    site, W, v, _ = draw(seed)
    k_hat, reach = input_direction((output_direction(v) @ W).view(site.n, 3))
    random = np.random.default_rng(seed)
    for i in range(site.n):
        mixing = random.normal(size=(3, 3)) * [[3.0], [1.0], [0.3]]
        covariance = mixing @ mixing.T + 0.01 * np.eye(3)
        q = W.double().view(8, site.n, 3)[:, i].T.numpy() @ v.double().numpy()  # s_i(h) = qᵀh
        assert math.isclose(float(reach[i]), np.linalg.norm(q) / float(v.norm()), rel_tol=1e-5)
        best = abs(correlation(k_hat[i].double().numpy(), q, covariance))
        assert best > 1 - 1e-9
        # Random rivals, near and far, and the one that would be best if the covariance were forgotten.
        rivals = [*random.normal(size=(30, 3)), *(q + 0.05 * random.normal(size=(10, 3))), covariance @ q]
        for k in rivals:
            assert abs(correlation(k, q, covariance)) <= best + 1e-9
        assert min(abs(correlation(k, q, covariance)) for k in rivals) < 1 - 1e-6


# Theorem 3.3 --------------------------------------------------------------------------------------------------------


def numerically(g: np.ndarray, rho: float, alpha: float) -> np.ndarray:
    """argmax_λ gᵀλ − ρ(α‖λ‖₁ + (1−α)/2 ‖λ‖₂²) by an optimiser, smooth once λ = p − q with p, q ≥ 0."""
    n, l1, l2 = len(g), rho * alpha, rho * (1 - alpha)

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        lam = x[:n] - x[n:]
        slope = l2 * lam - g
        return float(l1 * x.sum() + l2 / 2 * lam @ lam - g @ lam), np.concatenate([slope + l1, l1 - slope])

    options = {"ftol": 1e-16, "gtol": 1e-10, "maxiter": 10_000, "maxfun": 100_000}
    found = minimize(loss, np.zeros(2 * n), jac=True, method="L-BFGS-B", bounds=[(0, None)] * (2 * n), options=options)
    return found.x[:n] - found.x[n:]


cosines = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=8)


@given(cosines, st.floats(0.05, 2), st.one_of(st.floats(0, 0.95), st.just(0.999)))
def test_theorem_3_the_closed_form_equals_a_numerical_optimiser(g: list[float], rho: float, alpha: float) -> None:
    lam = magnitudes(torch.tensor(g), rho, alpha).double().numpy()
    expected = numerically(np.array(g), rho, alpha)
    assert np.abs(lam - expected).max() < 1e-4 * max(1.0, np.abs(expected).max())


@given(cosines, st.floats(0.05, 2), st.floats(0, 0.999))
def test_theorem_3_the_closed_form_is_stationary(g: list[float], rho: float, alpha: float) -> None:
    # 0 ∈ −g + ρ(1−α)λ + ρα ∂|λ|, the one condition of a strictly concave problem.
    for g_i, lam in zip(g, magnitudes(torch.tensor(g), rho, alpha).tolist(), strict=True):
        residual = g_i - rho * (1 - alpha) * lam
        if lam == 0:
            assert abs(residual) <= rho * alpha + 1e-6
        else:
            assert math.isclose(residual, math.copysign(rho * alpha, lam), abs_tol=1e-6)


def test_theorem_3_at_its_edges() -> None:
    g = torch.tensor([0.0, 0.25, -0.25, 0.5, -0.75])
    torch.testing.assert_close(magnitudes(g, 0.5, 0.5), torch.tensor([0.0, 0.0, 0.0, 1.0, -2.0]), rtol=0, atol=0)
    torch.testing.assert_close(magnitudes(g, 0.5, 0.0), g / 0.5, rtol=0, atol=0)  # ridge: dense
    assert magnitudes(g, None, 0.5).tolist() == [0.0] * 5
    near_one = magnitudes(g, 0.5, 0.999)
    expected = [0.0, 0.0, 0.0, 0.0005 / 0.0005, -0.2505 / 0.0005]
    torch.testing.assert_close(near_one, torch.tensor(expected), rtol=1e-3, atol=0)
    for value in (0.3, 0.1, 0.7):  # |g| = ρα exactly, where ρα is no fp32 number
        assert magnitudes(torch.tensor([value, -value]), value, 1 - 2**-24).abs().max() <= 1.0 / value
        assert magnitudes(torch.tensor([value * 0.5, -value * 0.5]), value, 0.5).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("rho", [0, 0.0, -0.1, math.nan, math.inf, "off"])
def test_a_budget_that_is_not_above_0_is_refused(rho: Any) -> None:
    with pytest.raises(EditError, match=r"ρ must be above 0.*got: " + str(rho)):
        magnitudes(torch.ones(2), rho, 0.5)


@pytest.mark.parametrize("alpha", [-0.01, 1, 1.0, 1.5, math.nan, math.inf, None])
@pytest.mark.parametrize("rho", [0.5, None])
def test_a_mixing_weight_outside_0_to_1_is_refused(alpha: Any, rho: float | None) -> None:
    with pytest.raises(EditError, match=r"α must be in \[0, 1\).*got: " + str(alpha)):
        magnitudes(torch.ones(2), rho, alpha)


@pytest.mark.parametrize("budget", [(-1, 0.5, 0.5), (0.5, math.nan, 0.5), (0.5, 0.5, 1.0), (None, None, -0.1)])
def test_bad_budgets_are_refused_by_scores(budget: tuple[Any, Any, Any]) -> None:
    with pytest.raises(EditError):
        some_scores().edit(rho_attn=budget[0], rho_mlp=budget[1], alpha=budget[2])


# Consequences -------------------------------------------------------------------------------------------------------


@given(seeds)
def test_for_a_neuron_g_is_the_sign_of_its_mean_times_the_cosine(seed: int) -> None:
    site, W, v, mu = draw(seed, n=6, width=1)
    s = score_site(site, W, v, mu)
    for i in range(site.n):
        cosine = float(v.double() @ W[:, i].double() / (v.double().norm() * W[:, i].double().norm()))
        assert math.isclose(float(s.g[i]), math.copysign(1, float(mu[i])) * cosine, abs_tol=1e-6)
        assert float(s.k[i, 0]) == math.copysign(1, cosine)
        # k is a sign of its own: the edit of a reinforced neuron points the way the neuron writes, whatever μ's sign.
        assert (float(s.g[i]) > 0) == (float(mu[i]) * float(s.k[i, 0]) > 0)


@given(seeds)
def test_a_sites_whole_edit_has_rank_one_and_is_the_sum_of_its_components(seed: int) -> None:
    edit, _, _ = edit_site(seed, alpha=0.0)
    delta = edit.delta()
    assert torch.linalg.matrix_rank(delta.double(), rtol=1e-6) == 1
    whole = torch.zeros(8, 15, dtype=torch.float64)
    for i in range(5):
        whole[:, 3 * i : 3 * i + 3] += edit.lam[i].double() * torch.outer(edit.u, edit.k[i]).double()
    torch.testing.assert_close(delta.double(), whole, rtol=1e-6, atol=1e-7)


def test_scores_do_not_depend_on_the_budget() -> None:
    scores = some_scores()
    one = scores.edit(rho_attn=0.1, rho_mlp=0.9, alpha=0.0)
    other = scores.edit(rho_attn=0.8, rho_mlp=None, alpha=0.7)
    for key, s in scores.sites.items():
        for edit in (one, other):
            for name in ("u", "k", "g", "reach"):
                assert torch.equal(getattr(edit.sites[key], name), getattr(s, name))
    assert not torch.equal(one.sites["0.attn"].lam, other.sites["0.attn"].lam)
    assert one.config == {"rho_attn": 0.1, "rho_mlp": 0.9, "alpha": 0.0}


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 0.3, 7.0, 1e6, 1e15])
@pytest.mark.parametrize("width", [1, 3])
def test_the_length_of_v_and_of_mu_changes_nothing(scale: float, width: int) -> None:
    site, W, v, mu = draw(3, width=width)
    base = score_site(site, W, v, mu)
    for scaled in (score_site(site, W, scale * v, mu), score_site(site, W, v, scale * mu)):
        for name in ("u", "k", "g", "reach"):
            torch.testing.assert_close(getattr(scaled, name), getattr(base, name), rtol=1e-5, atol=1e-6)


def test_a_zero_mean_or_weight_has_no_importance_and_no_nan() -> None:
    site, W, v, mu = draw(4)
    mu[3:6] = 0  # component 1 is silent
    W[:, 6:9] = 0  # component 2 writes nothing
    s = score_site(site, W, v, mu)
    expected = score_site(*draw(4))
    assert s.g[1] == s.g[2] == s.reach[2] == 0
    assert s.k[2].tolist() == [0, 0, 0]
    assert torch.equal(s.g[[0, 3, 4]], expected.g[[0, 3, 4]])
    assert torch.equal(s.k[1], expected.k[1])


def test_a_zero_vector_gives_no_edit_and_no_nan() -> None:
    site, W, v, mu = draw(5)
    s = score_site(site, W, torch.zeros_like(v), mu)
    assert s.v_norm == 0
    for value in (s.u, s.k, s.g, s.reach):
        assert torch.equal(value, torch.zeros_like(value))
    assert magnitudes(s.g, 0.1, 0.0).tolist() == [0.0] * site.n
    assert output_direction(torch.zeros(4)).tolist() == [0.0] * 4


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_read_in_blocks_as_at_once(width: int, dtype: torch.dtype) -> None:
    n, d = 700 // width, 4096  # several blocks of a CPU
    W, L, mu = torch.randn(d, n * width).to(dtype), torch.randn(3, d), torch.randn(n, width)
    reading = read(W, L, mu)
    w = W.double().view(d, n, width)
    torch.testing.assert_close(reading.along.double(), L.double() @ W.double(), rtol=1e-5, atol=1e-3)
    expected = torch.stack([torch.linalg.vector_norm(w[:, i] @ mu[i].double()) for i in range(n)])
    torch.testing.assert_close(reading.size.double(), expected, rtol=1e-5, atol=1e-6)
    assert math.isclose(reading.power, float(w.square().sum()), rel_tol=1e-5)
    turned = read(W.T.contiguous().T, L, mu)  # the same weight, lying the other way in memory
    assert torch.equal(turned.along, reading.along)
    assert torch.equal(turned.size, reading.size)


def test_a_strength_scales_the_edit_and_leaves_lambda_alone() -> None:
    edit = some_scores().edit(rho_attn=0.2, rho_mlp=0.2, alpha=0.2)
    half = edit.with_strength(-0.5)
    assert half.sites is edit.sites
    for key, term in half.intervention().terms.items():
        torch.testing.assert_close(term.a, -0.5 * edit.intervention().terms[key].a, rtol=0, atol=0)
    assert half.id != edit.id == edit.with_strength(1).id
    for bad in (math.nan, math.inf):
        with pytest.raises(EditError, match="strength"):
            edit.with_strength(bad)


def test_the_summary_counts_what_is_reinforced_and_suppressed() -> None:
    scores = some_scores()
    edit = scores.edit(rho_attn=0.5, rho_mlp=None, alpha=0.5)
    g = torch.cat([s.g for s in scores.sites.values() if s.site.block == "attn"])
    expected = {
        "components": 10,
        "edited": int((g.abs() > 0.25).sum()),
        "reinforced": int((g > 0.25).sum()),
        "suppressed": int((g < -0.25).sum()),
        "largest": pytest.approx((float(g.abs().max()) - 0.25) / 0.25, rel=1e-6),
    }
    assert 0 < expected["reinforced"] < expected["edited"]
    nothing = {"components": 12, "edited": 0, "reinforced": 0, "suppressed": 0, "largest": 0.0}
    assert edit.summary() == {"attn": expected, "mlp": nothing}


# Files --------------------------------------------------------------------------------------------------------------


def some_scores() -> Scores:
    sites = {}
    for layer in (0, 1):
        for block, n, width in (("attn", 5, 3), ("mlp", 6, 1)):
            site, W, v, mu = draw(10 * layer + n, n=n, width=width)
            site = replace(site, layer=layer)
            assert site.block == block
            sites[site.key] = score_site(site, W, v, mu)
    fingerprint = {key: torch.randn(5) for key in sites}
    return Scores(sites, fingerprint, {"probe": {"model": "pico", "counts": {"positive": 3}}, "vectors": "given"})


def same_fields(here: Any, there: Any) -> None:
    assert list(here.sites) == list(there.sites)
    for key, row in here.sites.items():
        for name, value in vars(row).items():
            other = getattr(there.sites[key], name)
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other
    assert here.fingerprint.keys() == there.fingerprint.keys()
    assert all(torch.equal(value, there.fingerprint[key]) for key, value in here.fingerprint.items())
    assert here.provenance == there.provenance


def test_scores_come_back_from_a_file_as_they_went(tmp_path: Path) -> None:
    scores = some_scores()
    scores.save(tmp_path / "scores.safetensors")
    same_fields(Scores.load(tmp_path / "scores.safetensors"), scores)


def test_an_edit_comes_back_from_a_file_as_it_went(tmp_path: Path) -> None:
    edit = some_scores().edit(rho_attn=0.1, rho_mlp=None, alpha=1 / 3).with_strength(0.7)
    edit.save(tmp_path / "edit.safetensors")
    back = s2e.Edit.load(tmp_path / "edit.safetensors")
    same_fields(back, edit)
    assert back.config == {"rho_attn": 0.1, "rho_mlp": None, "alpha": 1 / 3}
    assert back.strength == 0.7
    assert back.id == edit.id
    assert list(tmp_path.iterdir()) == [tmp_path / "edit.safetensors"]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    scores = some_scores()
    scores.save(tmp_path / "scores.safetensors")
    scores.edit(rho_attn=0.1, rho_mlp=0.1, alpha=0.1).save(tmp_path / "edit.safetensors")
    return {
        "scores": (tmp_path / "scores.safetensors", Scores.load),
        "edit": (tmp_path / "edit.safetensors", s2e.Edit.load),
    }


@pytest.mark.parametrize("kind", ["scores", "edit"])
def test_a_file_cut_at_any_length_is_refused(files: Any, kind: str) -> None:
    path, load = files[kind]
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match="not a whole safetensors file"):
            load(path)
    path.write_bytes(whole)
    load(path)


@pytest.mark.parametrize("kind", ["scores", "edit"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused(files: Any, kind: str, value: float) -> None:
    path, load = files[kind]
    tensors, header = read_tensors(path, kind)
    for name in ("0.attn.k", "1.mlp.g", "0.mlp.sketch"):
        broken = tensors[name].clone()
        broken.view(-1)[-1] = value
        write_tensors(path, tensors | {name: broken}, header)
        with pytest.raises(FileError, match=f"tensor {name} .*not finite"):
            load(path)


def rewrite_header(path: Path, **values: Any) -> None:
    """Changes the header of a file without the library, which would refuse to write a NaN."""
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    outer = json.loads(data[8:end])
    header = json.loads(outer["__metadata__"]["steer2edit"])
    header.pop("sha256", None)  # or the file would be refused before its values are looked at
    outer["__metadata__"]["steer2edit"] = json.dumps(header | values)
    head = json.dumps(outer).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data[end:])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_header_number_that_is_not_finite_is_refused(files: Any, value: float) -> None:
    path, load = files["edit"]
    rewrite_header(path, strength=0.5)
    assert load(path).strength == 0.5
    rewrite_header(path, strength=value)
    with pytest.raises(FileError):
        load(path)

    path, load = files["scores"]
    rewrite_header(path, v_norm=dict.fromkeys(load(path).sites, value))
    with pytest.raises(FileError):
        load(path)


@pytest.mark.parametrize("kind", ["scores", "edit"])
def test_tensors_that_are_not_those_of_the_sites_are_refused(files: Any, kind: str) -> None:
    path, load = files[kind]
    tensors, header = read_tensors(path, kind)
    short = {**tensors, "0.attn.g": tensors["0.attn.g"][:-1]}
    missing = {name: t for name, t in tensors.items() if name != "1.mlp.u"}
    stranger = {**header, "sites": [{**header["sites"][0], "block": "moe"}, *header["sites"][1:]]}
    more = {**header, "sites": [{**header["sites"][0], "rank": 1}, *header["sites"][1:]]}
    no_provenance = {name: value for name, value in header.items() if name != "provenance"}
    for content in ((short, header), (missing, header), (tensors, stranger), (tensors, more), (tensors, no_provenance)):
        write_tensors(path, *content)
        with pytest.raises(FileError, match=f"not a whole {kind} file"):
            load(path)


def test_a_file_of_another_kind_is_refused(files: Any, tmp_path: Path, pico: Any, tokenizer: Any, traces: Any) -> None:
    probe = tmp_path / "probe.safetensors"
    s2e.collect(pico(), tokenizer, *traces).save(probe)
    with pytest.raises(FileError, match=r"does not hold a edit|does not hold an edit"):
        s2e.Edit.load(probe)
    with pytest.raises(FileError, match=r"does not hold a scores"):
        Scores.load(files["edit"][0])
    with pytest.raises(FileError, match=r"does not hold a probe"):
        s2e.Probe.load(files["edit"][0])
    with pytest.raises(FileError, match=r"no edit file"):
        s2e.Edit.load(tmp_path / "none.safetensors")
    (tmp_path / "foreign.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(FileError, match=r"not written by steer2edit"):
        s2e.Edit.load(tmp_path / "foreign.safetensors")


def test_numbers_of_numpy_are_numbers() -> None:
    edit = some_scores().edit(rho_attn=np.float32(0.25), rho_mlp=np.int64(1), alpha=np.float64(0.5))
    assert edit.config == {"rho_attn": 0.25, "rho_mlp": 1.0, "alpha": 0.5}
    assert all(type(value) is float for value in edit.config.values())


# Layers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "edited"), [("1-2", {1, 2}), ("3", {3}), ("50%-100%", {2, 3}), (range(2), {0, 1}), ({3}, {3})]
)
def test_an_edit_of_some_layers_is_the_whole_one_restricted_to_them(
    pico: Any, tokenizer: Any, traces: Any, layers: Any, edited: set[int]
) -> None:
    model = pico(num_hidden_layers=4)
    scores = s2e.score(model, s2e.collect(model, tokenizer, *traces))
    budget = {"rho_attn": 0.1, "rho_mlp": 0.1, "alpha": 0.2}
    edit = scores.edit(**budget, layers=layers)
    assert {site.site.layer for site in edit.edited().values()} == edited
    assert edit.id == scores.edit(**budget).only(layers=edited).id
    assert scores.edit(**budget, layers=None).id == scores.edit(**budget).id


def test_a_share_of_the_depth_is_the_models_whatever_layers_have_scores(pico: Any, tokenizer: Any, traces: Any) -> None:
    model = pico(num_hidden_layers=4)
    scores = s2e.score(model, s2e.collect(model, tokenizer, *traces))
    lower = replace(scores, sites={key: s for key, s in scores.sites.items() if s.site.layer < 3})
    edit = lower.edit(rho_attn=0.1, rho_mlp=0.1, alpha=0.2, layers="50%-100%")
    assert {site.site.layer for site in edit.edited().values()} == {2}


@pytest.mark.parametrize("layers", ["half", "3-1", "60%-50%", ""])
def test_layers_that_cannot_be_read_are_refused(pico: Any, tokenizer: Any, traces: Any, layers: str) -> None:
    model = pico()
    scores = s2e.score(model, s2e.collect(model, tokenizer, *traces))
    with pytest.raises(EditError, match="these are no layers"):
        scores.edit(rho_attn=0.1, rho_mlp=None, alpha=0.2, layers=layers)
