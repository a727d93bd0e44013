"""Edits combined: one edit of rank r wherever it goes, and the sum of its parts by hand."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import steer2edit as s2e
from conftest import make_pico, make_tokenizer, make_traces
from families import make_family
from steer2edit.edits import Combination, combine, interference, load_any
from steer2edit.errors import EditError, FileError, ModelError
from steer2edit.method.change import SiteEdit
from steer2edit.models.sites import find_sites
from steer2edit.models.weights import read_weight

NAMES = ["llama", "gpt2", "mixtral", "gpt_oss", "qwen2_moe"]
IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def two_edits(model: Any, alphas: tuple[float, float] = (0.2, 0.1)) -> tuple[s2e.Edit, s2e.Edit]:
    """Of the traces, and of random vectors with the traces' means."""
    draw = torch.Generator().manual_seed(17)
    probe = s2e.collect(model, make_tokenizer(), *make_traces())
    vectors = {key: torch.randn(probe.sites[0].d, generator=draw) for key in {s.block_key: 0 for s in probe.sites}}
    one = s2e.score(model, probe, expert_tokens=2)
    other = s2e.score(model, probe, vectors=vectors, expert_tokens=2)
    return tuple(
        scores.edit(rho_attn=rho, rho_mlp=rho, alpha=alpha)
        for scores, rho, alpha in ((one, 0.3, alphas[0]), (other, 0.4, alphas[1]))
    )  # type: ignore[return-value]


def weights(model: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return {site.key: read_weight(model, site).clone() for site in find_sites(model)}


def parameters(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def delta(edit: s2e.Edit, key: str) -> Tensor:
    """s Σ_i λ_i u k̂_iᵀ, component by component, in fp64."""
    site = edit.sites[key]
    out = torch.zeros(site.site.d, site.site.inputs, dtype=torch.float64)
    for i in range(site.site.n):
        columns = slice(i * site.site.width, (i + 1) * site.site.width)
        out[:, columns] = edit.strength * site.lam[i].double() * torch.outer(site.u.double(), site.k[i].double())
    return out


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest) -> tuple[str, Any, s2e.Edit, s2e.Edit]:
    """A family's name, its model, two edits of it; not to be changed."""
    model = make_family(request.param)
    one, other = two_edits(model)
    return request.param, model, one.with_strength(0.8), other.with_strength(-0.5)


# One edit wherever it goes ------------------------------------------------------------------------------------------


def test_hook_baked_adapter_and_checkpoint_are_one(made: Any, tmp_path: Path) -> None:
    name, model, one, other = made
    edit = combine(one, other)
    base = logits(model)
    with edit.applied(model):
        hooked = logits(model)
    assert torch.equal(logits(model), base)
    assert float((hooked - base).abs().max()) > 0.1
    edit.save_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert bool(config["target_parameters"]) == (name in ("mixtral", "gpt_oss", "qwen2_moe"))
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(adapted), hooked, rtol=0, atol=2e-4)
    model.save_pretrained(tmp_path / "base")
    s2e.export_checkpoint(tmp_path / "base", edit, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(exported), hooked, rtol=0, atol=2e-4)
    baked = copy.deepcopy(model)
    edit.apply(baked)
    torch.testing.assert_close(logits(baked), hooked, rtol=0, atol=2e-4)
    for key, weight in weights(baked).items():
        assert torch.equal(weight, weights(exported)[key])


def test_an_adapter_says_of_which_edits_it_is_made(made: Any, tmp_path: Path) -> None:
    _, _, one, other = made
    combine(one, other).save_adapter(tmp_path / "adapter", base="the/base")
    wanted = json.loads((tmp_path / "adapter" / "steer2edit.json").read_text())
    assert [(part["id"], part["strength"]) for part in wanted["parts"]] == [(one.id, 0.8), (other.id, -0.5)]


def test_a_merged_adapter_has_the_baked_weights(made: Any, tmp_path: Path) -> None:
    name, model, one, other = made
    if name in ("mixtral", "gpt_oss", "qwen2_moe"):
        one, other = one.only(blocks=("attn",)), other.only(blocks=("attn",))  # of parameters PEFT merges elsewhere
    edit = combine(one, other)
    edit.save_adapter(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter")).merge_and_unload()
    baked = copy.deepcopy(model)
    edit.apply(baked)
    for key, weight in weights(merged).items():
        torch.testing.assert_close(weight, weights(baked)[key], rtol=0, atol=2e-6)


def test_the_weights_change_by_the_sum_of_the_parts(made: Any) -> None:
    _, model, one, other = made
    edited = copy.deepcopy(model)
    report = combine(one, other).apply(edited)
    old, new = weights(model), weights(edited)
    for key in old:
        wanted = sum(delta(edit, key) for edit in (one, other) if key in edit.sites)
        torch.testing.assert_close(new[key].double(), old[key].double() + wanted, rtol=0, atol=1e-5)
    assert report.sites == len(one.edited().keys() | other.edited().keys())
    assert report.rounding_loss < 1e-4


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (-1.0, 0.5), (0.25, -2.0), (0.0, 1.0)])
def test_strengths_of_the_parts_count(pico: Any, strengths: tuple[float, float]) -> None:
    model = pico()
    parts = [e.with_strength(s) for e, s in zip(two_edits(model), strengths, strict=True)]
    changes = combine(*parts).changes()
    for key, change in changes.items():
        wanted = sum(delta(part, key) for part in parts)
        torch.testing.assert_close(change.delta().double(), wanted, rtol=0, atol=1e-5)
    old = weights(model)
    with torch.no_grad():
        combine(*parts).apply(model)
    for key, weight in weights(model).items():
        torch.testing.assert_close(weight.double(), old[key] + sum(delta(p, key) for p in parts), rtol=0, atol=1e-5)


def test_an_edit_and_its_negative_change_nothing_but_roundings(pico: Any) -> None:
    model = pico()
    edit, _ = two_edits(model)
    old = weights(model)
    combine(edit, edit.with_strength(-1.0)).apply(model)
    for key, weight in weights(model).items():
        torch.testing.assert_close(weight, old[key], rtol=0, atol=1e-6)


def test_three_edits_make_an_adapter_of_rank_three(pico: Any, tmp_path: Path) -> None:
    model = pico()
    one, other = two_edits(model)
    third = one.only(layers=[1]).with_strength(-0.3)
    edit = combine(one, other.only(blocks=("mlp",)), third)
    edit.save_adapter(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 3
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = {k: int((tensors[f"base_model.model.{s.site.module}.lora_A.weight"] != 0).any(1).sum())
             for k, s in one.sites.items()}  # fmt: skip
    assert ranks == {"0.attn": 1, "0.mlp": 2, "1.attn": 2, "1.mlp": 3, "2.attn": 1, "2.mlp": 2}
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter"))
    with edit.applied(model):
        torch.testing.assert_close(logits(adapted), logits(model), rtol=0, atol=1e-4)


def test_the_order_of_the_parts_is_no_matter_to_the_model(pico: Any) -> None:
    model = pico()
    one, other = two_edits(model)
    with combine(one, other).applied(model):
        wanted = logits(model)
    with combine(other, one).applied(model):
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)
    with one.applied(model), other.applied(model):
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)


# A part of an edit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "blocks"), [(range(1, 3), ("attn", "mlp")), (None, ("mlp",)), ({0}, ("attn",)), (range(0), ("attn",))]
)
def test_only_is_the_edit_with_zeros_elsewhere(pico: Any, layers: Any, blocks: tuple[str, ...]) -> None:
    model = pico()
    edit = two_edits(model)[0].with_strength(0.7)
    part = edit.only(layers=layers, blocks=blocks)
    wanted = {}
    for key, site in edit.sites.items():
        stays = (layers is None or site.site.layer in layers) and site.site.block in blocks
        wanted[key] = delta(edit, key) if stays else torch.zeros(site.site.d, site.site.inputs, dtype=torch.float64)
        assert torch.equal(delta(part, key), wanted[key])
        assert torch.equal(part.sites[key].g, site.g)
    assert set(part.edited()) == {key for key, d in wanted.items() if d.any()}
    old = weights(model)
    part.apply(model)
    for key, weight in weights(model).items():
        torch.testing.assert_close(weight.double(), old[key] + wanted[key], rtol=0, atol=1e-6)


def test_the_parts_of_an_edit_combined_are_the_edit(pico: Any) -> None:
    model = pico()
    edit, _ = two_edits(model)
    again = combine(edit.only(layers=range(1)), edit.only(layers=range(1, 9), blocks=("mlp",)))
    whole = combine(again.parts[0], again.parts[1], edit.only(layers=range(1, 9), blocks=("attn",)))
    there, here = edit.changes(), whole.changes()
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key].delta(), change.delta()) for key, change in there.items())


# There and back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_revert_restores_the_exact_bytes(name: str, dtype: torch.dtype) -> None:
    model = make_family(name)
    edit = combine(*two_edits(model))
    before = parameters(model.to(dtype))
    for _ in range(2):
        edit.apply(model)
        assert any(not torch.equal(p, before[n]) for n, p in parameters(model).items())
        edit.revert(model)
        for n, p in parameters(model).items():
            assert torch.equal(p.reshape(-1).view(torch.uint8), before[n].reshape(-1).view(torch.uint8))


def test_a_combination_is_reverted_as_a_whole(pico: Any) -> None:
    model = pico()
    one, other = two_edits(model)
    edit = combine(one, other)
    edit.apply(model)
    for part in (one, other, combine(other, one)):
        with pytest.raises(EditError, match="not the last one applied"):
            part.revert(model)
    edit.revert(model)
    with pytest.raises(EditError, match="not the last one applied"):
        edit.revert(model)


@pytest.mark.parametrize("which", [0, 1])
def test_a_combination_whose_part_is_in_the_model_is_refused(pico: Any, which: int, tmp_path: Path) -> None:
    model = pico()
    parts = two_edits(model)
    parts[which].apply(model)
    # The first part's weights are looked at first, and are other weights where the second one is in them.
    says = "already in this model" if which == 0 else "already in this model|not the base"
    edit, before = combine(*parts), parameters(model)
    with pytest.raises((EditError, ModelError), match=says):
        edit.apply(model)
    assert all(torch.equal(p, before[n]) for n, p in parameters(model).items())
    model.save_pretrained(tmp_path / "edited")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype=torch.float32)
    with pytest.raises((EditError, ModelError), match=says):
        edit.apply(fresh)  # known by the weights alone
    with pytest.raises((EditError, ModelError), match=says):
        s2e.export_checkpoint(tmp_path / "edited", edit, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"edited"}


def test_a_combination_is_not_applied_twice(pico: Any, tmp_path: Path) -> None:
    model = pico()
    edit = combine(*two_edits(model))
    edit.apply(model)
    with pytest.raises(EditError, match="already in this model"):
        edit.apply(model)


def test_another_models_weights_are_refused(pico: Any, tmp_path: Path) -> None:
    edit, stranger = combine(*two_edits(pico())), pico(seed=1)
    before = parameters(stranger)
    with pytest.raises(ModelError, match="not the base"):
        edit.apply(stranger)
    assert all(torch.equal(p, before[n]) for n, p in parameters(stranger).items())


def test_edits_of_other_models_cannot_be_combined(pico: Any) -> None:
    one, _ = two_edits(pico())
    for stranger in (pico(seed=1), pico(intermediate_size=64)):
        other, _ = two_edits(stranger)
        with pytest.raises(EditError, match=r"edits of different models cannot be combined .*site \d\.(attn|mlp)"):
            combine(one, other)
    with pytest.raises(EditError, match="edits of different models"):
        combine(one, one.with_strength(2.0), two_edits(pico(seed=1))[0])


def test_none_and_the_same_one_twice_cannot_be_combined(pico: Any) -> None:
    one, other = two_edits(pico())
    with pytest.raises(EditError, match=r"cannot be combined .*none"):
        combine()
    with pytest.raises(EditError, match="the same edit twice"):
        combine(one, other, one)
    assert combine(one).changes().keys() == one.changes().keys()


def test_edits_of_models_of_other_depth_cannot_be_combined(pico: Any) -> None:
    shallow, deep = pico(num_hidden_layers=2), pico(num_hidden_layers=3)
    with pytest.raises(EditError, match="edits of different models"):
        combine(two_edits(shallow)[0], two_edits(deep)[0])


# On disk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_combination_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    model = make_family(name)
    one, other = two_edits(model)
    edit = combine(one.with_strength(-0.25), other.only(blocks=("mlp",)))
    file = tmp_path / "both.safetensors"
    edit.save(file)
    for loaded in (Combination.load(file), load_any(file)):
        assert isinstance(loaded, Combination)
        assert loaded.id == edit.id
        for mine, wanted in zip(loaded.parts, edit.parts, strict=True):
            assert (mine.config, mine.strength, mine.provenance) == (wanted.config, wanted.strength, wanted.provenance)
            assert list(mine.sites) == list(wanted.sites)
            for key, site in wanted.sites.items():
                assert mine.sites[key].site == site.site
                assert all(
                    torch.equal(getattr(mine.sites[key], f), getattr(site, f)) for f in ("u", "k", "g", "reach", "lam")
                )
                assert torch.equal(mine.fingerprint[key], wanted.fingerprint[key])
    edit.apply(model)
    Combination.load(file).revert(model)  # known as the same edit
    with pytest.raises(FileError, match="does not hold a"):
        s2e.Edit.load(file)
    one.save(tmp_path / "one.safetensors")
    with pytest.raises(FileError, match="does not hold a combination"):
        Combination.load(tmp_path / "one.safetensors")
    assert load_any(tmp_path / "one.safetensors").id == one.id


def test_more_than_ten_parts_come_back_in_their_order(pico: Any, tmp_path: Path) -> None:
    one, _ = two_edits(pico(num_hidden_layers=1))
    strengths = [1 + i / 8 for i in range(12)]
    edit = combine(*(copy.deepcopy(one).with_strength(strength) for strength in strengths))
    edit.save(tmp_path / "many.safetensors")
    assert [part.strength for part in Combination.load(tmp_path / "many.safetensors").parts] == strengths


def test_parts_of_one_edit_are_saved_although_they_share_tensors(pico: Any, tmp_path: Path) -> None:
    one, _ = two_edits(pico())
    edit = combine(one.only(layers=[0]), one.only(layers=[1]).with_strength(-2.0))
    edit.save(tmp_path / "both.safetensors")
    assert Combination.load(tmp_path / "both.safetensors").id == edit.id


def test_an_id_tells_what_a_combination_does(pico: Any) -> None:
    one, other = two_edits(pico())
    ids = {
        combine(*edits).id
        for edits in (
            (one,),
            (one, other),
            (one, other.with_strength(0.5)),
            (one, other.only(layers=[0])),
            (one.with_strength(-1.0), other),
        )
    }
    assert len(ids) == 5
    assert combine(one, other).id == combine(*two_edits(make_pico())).id


# Interference -------------------------------------------------------------------------------------------------------


def by_hand(one: s2e.Edit, other: s2e.Edit) -> dict[str, Any]:
    """Entry by entry, from whole matrices in fp64."""

    def cosine(a: Tensor, b: Tensor) -> float:
        return float((a * b).sum() / (a.norm() * b.norm()))

    rows = []
    for key in one.sites:
        if key not in other.sites or not (one.sites[key].lam.any() and other.sites[key].lam.any()):
            continue
        a, b = delta(one, key), delta(other, key)
        site = one.sites[key].site
        shared = opposed = 0
        for i in range(site.n):
            columns = slice(i * site.width, (i + 1) * site.width)
            mine, theirs = a[:, columns], b[:, columns]
            if mine.any() and theirs.any():
                shared += 1
                opposed += float((mine * theirs).sum()) < 0
        directions = cosine(one.sites[key].u.double(), other.sites[key].u.double())
        wanted = {"site": key, "cos u": directions, "cos row": cosine(a, b) / directions, "cos ΔW": cosine(a, b)}
        rows.append(wanted | {"shared": shared, "opposed": opposed})
    shared, opposed = (sum(row[name] for row in rows) for name in ("shared", "opposed"))
    return {"sites": rows, "shared": shared, "opposed": opposed, "opposed_share": opposed / shared if shared else 0.0}


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (-1.0, 1.0), (0.5, -2.0), (-0.1, -3.0)])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_interference_is_what_a_slow_loop_finds(name: str, strengths: tuple[float, float]) -> None:
    one, other = (e.with_strength(s) for e, s in zip(two_edits(make_family(name), (0.5, 0.3)), strengths, strict=True))
    found, wanted = interference(one, other), by_hand(one, other)
    assert 0 < wanted["opposed"] < wanted["shared"]
    for row, expected in zip(found["sites"], wanted["sites"], strict=True):
        assert row == pytest.approx(expected, abs=1e-4)
    for count in ("shared", "opposed", "opposed_share"):
        assert found[count] == wanted[count]
    json.dumps(found, allow_nan=False)


def test_an_edit_is_in_its_own_way_only_where_it_is_negated(pico: Any) -> None:
    edit, _ = two_edits(pico(), (0.5, 0.5))
    components = sum(int((s.lam != 0).sum()) for s in edit.sites.values())
    same, against = interference(edit, edit), interference(edit, edit.with_strength(-0.5))
    assert (same["shared"], same["opposed"]) == (components, 0)
    assert (against["shared"], against["opposed"], against["opposed_share"]) == (components, components, 1.0)
    for rows, sign in ((same["sites"], 1), (against["sites"], -1)):
        assert all(row["cos ΔW"] == pytest.approx(sign, abs=1e-5) for row in rows)
        assert all(row["cos u"] == pytest.approx(1, abs=1e-5) for row in rows)


def test_edits_of_unlike_sites_do_not_meet(pico: Any) -> None:
    one, other = two_edits(pico())
    wanted = {"sites": [], "shared": 0, "opposed": 0, "opposed_share": 0.0}
    assert interference(one.only(blocks=("attn",)), other.only(blocks=("mlp",))) == wanted


def test_interference_of_a_case_by_hand() -> None:
    site = next(iter(find_sites(make_pico())))
    site = replace(site, d=2, n=4, width=1)

    def edit(u: list[float], k: list[float], lam: list[float]) -> s2e.Edit:
        k_hat, lams = torch.tensor(k)[:, None], torch.tensor(lam)
        return s2e.Edit({site.key: SiteEdit(site, torch.tensor(u), k_hat, lams, lams.abs(), lams)}, {})

    one = edit([1.0, 0.0], [1.0, 1.0, -1.0, 1.0], [2.0, 1.0, 1.0, 0.0])
    other = edit([0.6, 0.8], [1.0, -1.0, -1.0, 1.0], [1.0, 1.0, -1.0, 5.0])
    found = interference(one, other)
    (row,) = found["sites"]
    # a = (2, 1, −1, 0), b = (1, −1, 1, 5): ⟨a, b⟩ = 2 − 1 − 1 = 0.
    assert row == {
        "site": site.key,
        "cos u": pytest.approx(0.6),
        "cos row": pytest.approx(0.0, abs=1e-7),
        "cos ΔW": pytest.approx(0.0, abs=1e-7),
        "shared": 3,
        "opposed": 2,
    }
    assert (found["shared"], found["opposed"], found["opposed_share"]) == (3, 2, pytest.approx(2 / 3))
    assert interference(one, other.with_strength(-1.0))["opposed"] == 1


def test_every_two_of_the_edits_are_compared(pico: Any, tokenizer: Any, traces: Any) -> None:
    rho = {"rho_attn": 0.3, "rho_mlp": 0.3, "alpha": 0.2}
    model, other = pico(), pico(seed=1)
    first = s2e.score(model, s2e.collect(model, tokenizer, *traces), vectors={0: torch.randn(32)}).edit(**rho)
    second = s2e.score(model, s2e.collect(model, tokenizer, *traces), vectors={1: torch.randn(32)}).edit(**rho)
    third = s2e.score(other, s2e.collect(other, tokenizer, *traces), vectors={1: torch.randn(32)}).edit(**rho)
    with pytest.raises(EditError, match="edits of different models"):
        s2e.combine(first, second, third)


def test_a_combination_is_scaled_and_cut_down_part_by_part(pico: Any, make_edit: Any) -> None:
    model = pico("llama")
    a = make_edit(model, 0.2, 0.5, 0.6)
    both = s2e.combine(a, a.with_strength(0.5))
    half = both.with_strength(0.5)
    assert [part.strength for part in half.parts] == [0.5, 0.25]
    for key, change in both.changes().items():
        torch.testing.assert_close(half.changes()[key].delta(), 0.5 * change.delta())
    first = both.only(layers=range(1), blocks=("attn",))
    assert list(first.changes()) == ["0.attn"]
    assert torch.equal(first.changes()["0.attn"].delta(), both.changes()["0.attn"].delta())
