"""Edits written into weights: what changes, what rounding loses, what is refused, and the way back to the byte."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import steer2edit as s2e
from conftest import make_tokenizer, make_traces
from runs import sketch
from steer2edit.errors import EditError, ModelError
from steer2edit.method.fingerprint import differing
from steer2edit.method.presence import Presence, read_for
from steer2edit.models.sites import find_sites
from steer2edit.models.weights import weight_of

MakeEdit = Callable[..., s2e.Edit]
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def weights_as_integers(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter's bits, so that −0 is not 0 and a NaN equals itself."""
    return {name: p.detach().view(INTEGERS[p.dtype]).clone() for name, p in model.named_parameters()}


def changed(here: dict[str, torch.Tensor], there: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, bits in here.items() if not torch.equal(bits, there[name])}


def site_weights(model: Any) -> dict[str, torch.Tensor]:
    return {site.key: weight_of(model, site).detach() for site in find_sites(model)}


def share_present(edit: s2e.Edit, model: Any) -> float:
    presence = Presence()
    for key, weight in site_weights(model).items():
        presence.add(edit.sites[key], read_for(edit.sites[key], weight))
    return presence.share


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def model(request: pytest.FixtureRequest, pico: Any) -> Any:
    return pico("qwen2", dtype=request.param)


# There and back -----------------------------------------------------------------------------------------------------


def test_apply_adds_delta_to_the_edited_sites_and_to_nothing_else(model: Any, make_edit: MakeEdit) -> None:
    edit = make_edit(model, 0.2, 0.5, 0.6).with_strength(0.5)
    before, old = weights_as_integers(model), {k: w.clone() for k, w in site_weights(model).items()}
    report = edit.apply(model)
    assert changed(weights_as_integers(model), before) == {s.site.tensor for s in edit.edited().values()}
    for key, site in edit.sites.items():
        expected = (old[key].float() + 0.5 * site.delta()).to(model.dtype)
        torch.testing.assert_close(site_weights(model)[key], expected, rtol=1e-6, atol=1e-6)
    columns = sum(int((s.lam != 0).sum()) * s.site.width for s in edit.sites.values())
    assert 0 < columns < 3 * (32 + 48)
    assert (report.edit_id, report.sites, report.columns) == (edit.id, len(edit.edited()), columns)


def test_revert_restores_the_exact_bytes(model: Any, make_edit: MakeEdit) -> None:
    edit = make_edit(model)
    before = weights_as_integers(model)
    for _ in range(2):
        edit.apply(model)
        assert len(changed(weights_as_integers(model), before)) == 6
        edit.revert(model)
        assert changed(weights_as_integers(model), before) == set()
    with edit.applied(model):  # its base again, in every respect
        pass


def test_an_edit_that_changes_nothing_or_has_no_strength_is_applied_and_reverted(
    pico: Any, make_edit: MakeEdit
) -> None:
    model = pico()
    before = weights_as_integers(model)
    for edit in (make_edit(model, None, None, 0.5), make_edit(model).with_strength(0.0)):
        report = edit.apply(model)
        assert report.rounding_loss == 0
        assert changed(weights_as_integers(model), before) == set()
        edit.revert(model)


def test_edits_are_reverted_in_the_reverse_of_their_order(pico: Any, make_edit: MakeEdit) -> None:
    model = pico()
    first = make_edit(model, 0.3, None, 0.3).with_strength(0.01)
    second = make_edit(model, None, 0.3, 0.3).with_strength(0.01)
    before = weights_as_integers(model)
    first.apply(model)
    between = weights_as_integers(model)
    second.apply(model)
    with pytest.raises(EditError, match="not the last one applied"):
        first.revert(model)
    second.revert(model)
    assert changed(weights_as_integers(model), between) == set()
    first.revert(model)
    assert changed(weights_as_integers(model), before) == set()


# Rounding -----------------------------------------------------------------------------------------------------------


def test_rounding_loses_next_to_nothing_in_fp32(pico: Any, make_edit: MakeEdit) -> None:
    model = pico()
    assert make_edit(model).apply(model).rounding_loss < 1e-6


@pytest.mark.parametrize("strength", [1.0, 0.01])
def test_the_rounding_loss_in_bf16_is_the_share_of_the_edit_that_is_lost(
    pico: Any, make_edit: MakeEdit, strength: float
) -> None:
    model = pico(dtype=torch.bfloat16)
    edit = make_edit(model, 0.3, 0.3, 0.3).with_strength(strength)
    old = {k: w.double() for k, w in site_weights(model).items()}
    report = edit.apply(model)
    error, expected = {}, {}
    for key, weight in site_weights(model).items():
        delta = strength * torch.outer(edit.sites[key].u.double(), edit.sites[key].row.double())
        error[key] = float(((weight.double() - old[key]) - delta).square().sum())
        expected[key] = float(delta.square().sum())
    direct = (sum(error.values()) / sum(expected.values())) ** 0.5
    shares = {key: (error[key] / expected[key]) ** 0.5 for key in error}
    assert report.rounding_loss == pytest.approx(direct, rel=1e-3)
    assert report.worst[0] == max(shares, key=lambda key: shares[key])
    assert report.worst[1] == pytest.approx(max(shares.values()), rel=1e-3)
    assert (direct > 0.05) == (strength == 0.01)  # a small change beside a large weight is what bf16 loses
    assert direct > 1e-4


def test_an_edit_is_added_in_fp32_and_rounded_once(pico: Any, make_edit: MakeEdit) -> None:
    model = pico(dtype=torch.bfloat16)
    edit = make_edit(model).with_strength(0.02)
    old = {k: w.clone() for k, w in site_weights(model).items()}
    edit.apply(model)
    twice_rounded = 0
    for key, weight in site_weights(model).items():
        exact = old[key].double() + 0.02 * edit.sites[key].delta().double()
        assert torch.equal(weight, exact.to(torch.bfloat16))
        twice = old[key] + (0.02 * edit.sites[key].delta()).to(torch.bfloat16)
        twice_rounded += int((twice != weight).sum())
    assert twice_rounded > 10


# Which model --------------------------------------------------------------------------------------------------------


def test_the_same_edit_is_not_applied_twice(pico: Any, make_edit: MakeEdit, tmp_path: Any) -> None:
    model = pico()
    edit = make_edit(model)
    edit.apply(model)
    baked = weights_as_integers(model)
    model.save_pretrained(tmp_path / "baked")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", dtype=torch.float32)
    assert not hasattr(reloaded, "_steer2edit_applied")
    stripped = copy.deepcopy(model)
    del stripped._steer2edit_applied
    for other in (model, copy.deepcopy(model), stripped, reloaded, reloaded.to(torch.bfloat16)):
        with pytest.raises(EditError, match="already in this model"):
            edit.apply(other)
    assert changed(weights_as_integers(model), baked) == set()
    edit.revert(model)
    edit.apply(model)


@pytest.mark.parametrize("strength", [1.0, 0.1, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_share_of_an_edit_that_a_model_holds_is_its_strength(
    pico: Any, make_edit: MakeEdit, strength: float, dtype: torch.dtype
) -> None:
    model = pico(dtype=dtype)
    edit = make_edit(model).with_strength(strength)
    assert share_present(edit, model) == pytest.approx(0, abs=1e-4)
    edit.apply(model)
    assert share_present(edit, model) == pytest.approx(strength, rel=0.02)


def test_another_model_is_refused_by_its_weights(pico: Any, make_edit: MakeEdit) -> None:
    edit = make_edit(pico())
    stranger = pico(seed=1)
    before = weights_as_integers(stranger)
    with pytest.raises(ModelError, match=r"not the base .*other weights at 6 of 6 sites, first 0\.attn"):
        edit.apply(stranger)
    almost = pico()
    with torch.no_grad():
        almost.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    with pytest.raises(ModelError, match=r"other weights at 1 of 6 sites, first 1\.mlp"):
        edit.apply(almost)
    with pytest.raises(ModelError, match=r"another model: site 0\.attn should be 32 × 4 × 8"):
        edit.apply(pico("qwen3", head_dim=16))
    assert changed(weights_as_integers(stranger), before) == set()
    assert not hasattr(stranger, "_steer2edit_applied")


def test_a_base_whose_weights_hold_a_nan_is_refused(pico: Any, make_edit: MakeEdit) -> None:
    model = pico()
    edit = make_edit(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"other weights at 1 of 6 sites, first 1\.mlp"):
        edit.apply(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_same_model_in_another_dtype_is_its_base(pico: Any, make_edit: MakeEdit, dtype: torch.dtype) -> None:
    model = pico()
    edit = make_edit(model)
    half = copy.deepcopy(model).to(dtype)
    before = weights_as_integers(half)
    for scaled in (edit, edit.with_strength(0.05)):
        scaled.apply(half)
        scaled.revert(half)
    assert changed(weights_as_integers(half), before) == set()
    make_edit(half).apply(model)


def test_sketches_know_rounding_from_another_weight() -> None:
    weight = torch.randn(40, 60)
    expected = {"a": sketch(weight)}
    assert expected["a"].shape == (5,)
    assert expected["a"][-1] == pytest.approx(float(weight.norm()))
    for same in (weight.to(torch.bfloat16), weight.double(), weight.T.contiguous().T):
        assert differing(expected, {"a": sketch(same)}) == []
    for other in (torch.randn(40, 60), -weight, weight.flip(0), weight.roll(1, 1), 1.05 * weight):
        assert differing(expected, {"a": sketch(other)}) == ["a"]
    assert differing(expected, {}) == ["a"]
    # The signs of a shape never change: files made today are understood later.
    assert sketch(torch.eye(3, 4)).tolist() == pytest.approx([1, -1, -1, 3, 3**0.5], abs=1e-5)


# What is refused ----------------------------------------------------------------------------------------------------


def test_revert_of_something_else_is_refused(pico: Any, make_edit: MakeEdit) -> None:
    model = pico()
    edit = make_edit(model)
    with pytest.raises(EditError, match=rf"edit {edit.id} is not the last .*applied here: none"):
        edit.revert(model)
    edit.apply(model)
    baked = weights_as_integers(model)
    for other in (edit.with_strength(0.5), replace(edit, sites=dict(list(edit.sites.items())[:3]))):
        with pytest.raises(EditError, match=rf"edit {other.id} is not the last one .*{edit.id}"):
            other.revert(model)
    with pytest.raises(EditError, match="applied here: none"):
        edit.revert(pico())
    assert changed(weights_as_integers(model), baked) == set()
    edit.revert(model)
    with pytest.raises(EditError, match="applied here: none"):
        edit.revert(model)


def test_weights_that_are_not_in_memory_are_refused(pico: Any, make_edit: MakeEdit) -> None:
    model = pico()
    edit = make_edit(model)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.o_proj is not in memory"):
        edit.apply(copy.deepcopy(model).to("meta"))
    before = weights_as_integers(model)
    offloaded = model.model.layers[2].mlp.down_proj
    kept, offloaded.weight = offloaded.weight, torch.nn.Parameter(offloaded.weight.to("meta"))
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.down_proj is not in memory"):
        edit.apply(model)
    with pytest.raises(ModelError, match="not in memory"), edit.applied(model):
        pass
    offloaded.weight = kept
    assert changed(weights_as_integers(model), before) == set()


def test_an_apply_that_fails_leaves_all_weights_untouched(pico: Any, make_edit: MakeEdit, monkeypatch: Any) -> None:
    import steer2edit.models.bake as bake

    model = pico()
    edit = make_edit(model)
    before, patched, calls = weights_as_integers(model), bake.patched, []

    def fails_late(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError
        return patched(*args)

    monkeypatch.setattr(bake, "patched", fails_late)
    with pytest.raises(MemoryError):
        edit.apply(model)
    assert changed(weights_as_integers(model), before) == set()
    monkeypatch.undo()
    edit.apply(model)
    edit.revert(model)
    assert changed(weights_as_integers(model), before) == set()


def test_an_edit_that_overflows_the_dtype_is_refused(pico: Any, make_edit: MakeEdit) -> None:
    model = pico(dtype=torch.float16)
    edit = make_edit(model).with_strength(1e6)
    before = weights_as_integers(model)
    with pytest.raises(EditError):
        edit.apply(model)
    assert changed(weights_as_integers(model), before) == set()


# Several edits ------------------------------------------------------------------------------------------------------


def _other(edit: s2e.Edit) -> s2e.Edit:
    """An edit of the same base that pushes the other way, and is another one."""
    return edit.with_strength(-3.0)


def test_a_second_edit_on_an_edited_model_is_told_to_be_combined(pico: Any, make_edit: MakeEdit) -> None:
    model = pico("qwen2", dtype=torch.float32)
    edit = make_edit(model, 0.2, 0.5, 0.6)
    edit.with_strength(4.0).apply(model)
    with pytest.raises(EditError, match=r"already carries another edit, .* combine\(a, b\)\.apply\(model\)"):
        _other(edit).apply(model)
    with pytest.raises(EditError, match="already carries another edit"), _other(edit).applied(model):
        pass


def test_a_model_that_carries_an_edit_is_not_scored(pico: Any, make_edit: MakeEdit) -> None:
    model = pico("qwen2", dtype=torch.float32)
    probe = s2e.collect(model, make_tokenizer(), *make_traces())
    edit = s2e.score(model, probe).edit(rho_attn=0.2, rho_mlp=0.5, alpha=0.6)
    edit.apply(model)
    with pytest.raises(EditError, match=r"carries an edit, .*Revert it first"):
        s2e.score(model, probe)
    edit.revert(model)
    assert s2e.score(model, probe).sites.keys() == edit.sites.keys()


def test_every_noun_is_one_line(pico: Any, make_edit: MakeEdit) -> None:
    model = pico("qwen2", dtype=torch.float32)
    probe = s2e.collect(model, make_tokenizer(), *make_traces())
    scores = s2e.score(model, probe)
    edit = scores.edit(rho_attn=0.2, rho_mlp=None, alpha=0.6)
    site, change = next(iter(edit.sites.values())), next(iter(edit.changes().values()))
    intervention = edit.intervention()
    nouns = [probe, scores, edit, s2e.combine(edit, edit.with_strength(0.5)), site, change, intervention]
    nouns += [next(iter(intervention.terms.values())), next(iter(scores.sites.values()))]
    for noun in nouns:
        assert len(repr(noun)) < 200
        assert type(noun).__name__ in repr(noun)
    assert "neurons, rho_attn=0.2, rho_mlp=None, alpha=0.6, strength=1)" in repr(edit)


def test_an_edit_that_touches_nothing_says_so(pico: Any, make_edit: MakeEdit, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="steer2edit")
    model = pico("qwen2", dtype=torch.float32)
    report = make_edit(model, None, None, 0.5).apply(model)
    assert (report.sites, report.columns) == (0, 0)
    assert "the edit changes no component" in caplog.text
