"""The ablations against slow plain loops in fp64, on heads and on neurons, alone and through scoring and files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import steer2edit as s2e
from runs import make_scores
from steer2edit.edits import Scores
from steer2edit.errors import EditError
from steer2edit.method.scores import SiteScores, score_site
from steer2edit.method.site import Site
from steer2edit.method.variants import FULL, SCORED, VARIANTS, rescored
from steer2edit.probing.score import score
from steer2edit.searching.candidates import edit_of_variant

SHAPES = [(8, 5, 3), (6, 1, 6), (12, 4, 2), (4, 3, 6), (7, 9, 1)]  # d, n, c; heads wider than d too, and neurons


def _site(d: int, n: int, c: int, seed: int = 0) -> tuple[SiteScores, torch.Tensor, torch.Tensor]:
    """A random site's full scores, its μ and its W."""
    draw = torch.Generator().manual_seed(seed)
    block, module = ("mlp", "mlp.down_proj") if c == 1 else ("attn", "self_attn.o_proj")
    name = f"model.layers.0.{module}"
    site = Site(0, block, name, f"{name}.weight", d, n, c)  # type: ignore[arg-type]
    W, v, mu = (torch.randn(shape, generator=draw) for shape in ((d, n * c), (d,), (n * c,)))
    return score_site(site, W, v, 3 * mu), 3 * mu, W


def _blocks(s: SiteScores, mu: torch.Tensor, W: torch.Tensor) -> Any:
    """For each component W_i [d, c] and μ_i [c], fp64."""
    c = s.site.width
    w, m = W.double().numpy(), mu.double().numpy()
    return [(w[:, i * c : (i + 1) * c], m[i * c : (i + 1) * c]) for i in range(s.site.n)]


@pytest.mark.parametrize("shape", SHAPES)
def test_k_mean_is_the_mean_input_of_unit_length(shape: tuple[int, int, int]) -> None:
    s, mu, W = _site(*shape)
    found = rescored("k_mean", s, mu, W)
    for i, (_, m) in enumerate(_blocks(s, mu, W)):
        np.testing.assert_allclose(found.k[i], m / np.sqrt(sum(x * x for x in m)), atol=1e-6)
    assert torch.equal(found.g, s.g)
    assert torch.equal(found.u, s.u)


def test_a_component_that_nothing_reaches_has_no_mean_direction() -> None:
    s, mu, W = _site(8, 5, 3)
    mu[3:6] = 0
    found = rescored("k_mean", s, mu, W)
    assert found.k[1].tolist() == [0, 0, 0]
    assert torch.isfinite(found.k).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_k_svd_is_the_top_right_singular_vector_on_the_side_of_k(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    for seed in range(4):
        s, mu, W = _site(*shape, seed=seed)
        W = W.to(dtype)
        found = rescored("k_svd", s, mu, W)
        assert found.k.shape == (shape[1], shape[2])
        for i, (w, _) in enumerate(_blocks(s, mu, W.float())):
            top = np.linalg.svd(w)[2][0]
            k = s.k[i].double().numpy()
            top = -top if sum(a * b for a, b in zip(top, k, strict=True)) < 0 else top
            np.testing.assert_allclose(found.k[i], top, atol=2e-4)
        assert torch.equal(found.g, s.g)


def test_the_singular_vector_of_a_neuron_is_its_sign_and_so_the_full_methods() -> None:
    s, mu, W = _site(7, 9, 1)
    assert torch.equal(rescored("k_svd", s, mu, W).k, s.k)
    assert set(s.k.flatten().tolist()) == {-1.0, 1.0}


def test_a_component_that_does_not_write_along_v_has_no_singular_direction_either() -> None:
    s, mu, W = _site(8, 5, 3)
    s = replace(s, k=s.k.clone())
    s.k[2] = 0
    found = rescored("k_svd", s, mu, W)
    assert found.k[2].tolist() == [0, 0, 0]
    assert float(found.k[1].norm()) == pytest.approx(1)


@pytest.mark.parametrize("shape", SHAPES)
def test_g_dot_is_the_dot_product_that_is_not_normalised(shape: tuple[int, int, int]) -> None:
    s, mu, W = _site(*shape)
    found = rescored("g_dot", s, mu, W)
    u = s.u.double().numpy()
    for i, (w, m) in enumerate(_blocks(s, mu, W)):
        expected = sum(u[a] * w[a, b] * m[b] for a in range(w.shape[0]) for b in range(w.shape[1]))
        assert float(found.g[i]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert torch.equal(found.k, s.k)
    # The length of the mean input counts, as it does not for the full method.
    np.testing.assert_allclose(rescored("g_dot", s, 2 * mu, W).g, 2 * found.g, rtol=1e-5)


@pytest.mark.parametrize("variant", ["full", "l0", "l2"])
def test_the_other_variants_keep_the_full_methods_scores(variant: str) -> None:
    s, mu, W = _site(8, 5, 3)
    assert rescored(variant, s, mu, W) is s
    assert variant not in SCORED


# Penalties ----------------------------------------------------------------------------------------------------------

TABLE = {"full": make_scores()}


@pytest.mark.parametrize(("rho_attn", "rho_mlp", "alpha"), [(0.4, 0.6, 0.5), (0.2, None, 0.8), (None, 0.5, 0.3)])
def test_l0_keeps_the_components_that_elastic_net_keeps_at_a_hard_threshold(
    rho_attn: float | None, rho_mlp: float | None, alpha: float
) -> None:
    soft = TABLE["full"].edit(rho_attn=rho_attn, rho_mlp=rho_mlp, alpha=alpha)
    hard = edit_of_variant("l0", TABLE, rho_attn, rho_mlp, alpha)
    dropped = 0
    for key, rho in (("0.attn", rho_attn), ("0.mlp", rho_mlp)):
        g = TABLE["full"].sites[key].g.tolist()
        kept = [i for i, x in enumerate(soft.sites[key].lam.tolist()) if x]
        ranked = sorted(range(len(g)), key=lambda i: -abs(g[i]))
        assert sorted(ranked[: len(kept)]) == kept  # the K largest
        dropped += len(g) - len(kept)
        for i, lam in enumerate(hard.sites[key].lam.tolist()):
            assert lam == pytest.approx(g[i] / (rho * (1 - alpha)) if rho and i in kept else 0.0)
    assert dropped  # so that the threshold is seen
    assert any(bool((site.lam != 0).any()) for site in hard.sites.values())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_l2_is_dense_whatever_alpha_is(alpha: float) -> None:
    found = edit_of_variant("l2", TABLE, 0.4, 0.6, alpha)
    for key, rho in (("0.attn", 0.4), ("0.mlp", 0.6)):
        g = TABLE["full"].sites[key].g
        assert bool((g != 0).all())
        np.testing.assert_allclose(found.sites[key].lam, [x / rho for x in g.tolist()], rtol=1e-6)


def test_an_edit_says_which_variant_it_is_and_the_full_one_says_nothing(tmp_path: Path) -> None:
    config = {"rho_attn": 0.4, "rho_mlp": None, "alpha": 0.5}
    assert edit_of_variant("full", TABLE, *config.values()).config == config  # type: ignore[arg-type]
    hard = edit_of_variant("l0", TABLE, *config.values())  # type: ignore[arg-type]
    assert hard.config == {**config, "variant": "l0"}
    hard.save(tmp_path / "edit.safetensors")
    again = s2e.Edit.load(tmp_path / "edit.safetensors")
    assert (again.id, again.config) == (hard.id, hard.config)


def test_a_variant_that_scores_in_its_own_way_takes_its_own_scores() -> None:
    other = Scores({k: replace(s, g=-s.g) for k, s in TABLE["full"].sites.items()})
    table = {**TABLE, "g_dot": other}
    found = edit_of_variant("g_dot", table, 0.4, 0.4, 0.1)
    assert found.id == other.edit(rho_attn=0.4, rho_mlp=0.4, alpha=0.1).id
    assert found.config["variant"] == "g_dot"
    for variant in ("full", "l0", "l2"):
        assert edit_of_variant(variant, table, 0.4, 0.4, 0.1).id == edit_of_variant(variant, TABLE, 0.4, 0.4, 0.1).id


@pytest.mark.parametrize("variant", ["k_mean", "l1"])
def test_a_variant_without_scores_and_an_unknown_one_are_refused(variant: str) -> None:
    with pytest.raises(EditError, match=rf"no scores for that variant \(got: {variant}\)\. Known: full, k_mean"):
        edit_of_variant(variant, TABLE, 0.4, 0.4, 0.1)


# Through scoring and files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_scoring_a_model_and_its_files_gives_the_variant_of_every_site(
    variant: Any, pico: Any, tokenizer: Any, traces: Any, tmp_path: Path
) -> None:
    model = pico()
    probe = s2e.collect(model, tokenizer, *traces, preserve=[""])
    model.save_pretrained(str(tmp_path / "model"))
    full, found = score(model, probe), score(model, probe, variant=variant)
    assert found.provenance["variant"] == variant
    weights = dict(model.named_parameters())
    for key, s in found.sites.items():
        expected = rescored(variant, full.sites[key], probe.mean_input(s.site), weights[s.site.tensor].data)
        assert torch.equal(s.k, expected.k)
        assert torch.equal(s.g, expected.g)
    s, plain = found.sites["0.attn"], full.sites["0.attn"]
    assert torch.equal(s.k, plain.k) == (variant not in ("k_mean", "k_svd"))
    assert torch.equal(s.g, plain.g) == (variant != "g_dot")
    from_disk = score(tmp_path / "model", probe, variant=variant)
    found.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    for other in (from_disk, loaded):
        assert list(other.sites) == list(found.sites)
        for key, s in found.sites.items():
            for name in ("u", "k", "g", "reach"):
                assert torch.equal(getattr(other.sites[key], name), getattr(s, name)), (key, name)
        assert other.provenance["variant"] == variant


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rho", [0.02, 0.1, 0.3])
def test_a_variants_edit_is_known_to_be_in_a_model_or_not(
    variant: Any, rho: float, pico: Any, tokenizer: Any, traces: Any
) -> None:
    base, edited = pico(), pico()
    probe = s2e.collect(base, tokenizer, *traces, preserve=[""])
    table = {name: score(base, probe, variant=name) for name in {FULL, variant if variant in SCORED else FULL}}
    edit = edit_of_variant(variant, table, rho, rho, 0.3)
    with edit.applied(base):
        pass
    edit.apply(edited)
    again = pico()
    again.load_state_dict(edited.state_dict())  # as in another process, which only has the weights
    with pytest.raises(EditError, match="the edit is already in this model"), edit.applied(again):
        pass


def test_variants_of_a_model_edit_it_each_in_its_own_way(pico: Any, tokenizer: Any, traces: Any) -> None:
    model = pico()
    probe = s2e.collect(model, tokenizer, *traces, preserve=[""])
    table = {name: score(model, probe, variant=name) for name in (FULL, *SCORED)}  # type: ignore[arg-type]
    edits = {name: edit_of_variant(name, table, 0.1, 0.1, 0.3) for name in VARIANTS}
    assert len({edit.id for edit in edits.values()}) == len(VARIANTS) == 7
    ids = torch.tensor([[5, 9, 17, 30]])
    with torch.inference_mode():
        plain = model(ids).logits
        for name, edit in edits.items():
            with edit.applied(model):
                hooked = model(ids).logits
            edit.apply(model)
            baked = model(ids).logits
            edit.revert(model)
            torch.testing.assert_close(hooked, baked, atol=1e-3, rtol=1e-3, msg=name)
            assert not torch.allclose(hooked, plain)


@pytest.mark.parametrize("variant", ["l0", "l2"])
def test_a_variant_of_another_penalty_has_no_budget_to_change(variant: str) -> None:
    edit = edit_of_variant(variant, TABLE, 0.4, 0.4, 0.3)
    with pytest.raises(EditError, match=rf"no \(ρ, α\) to change \(got: the variant {variant}\)"):
        edit.with_budget(rho_attn=0.2, rho_mlp=None, alpha=0.0)
