"""Models that bitsandbytes keeps in 4 or 8 bits, on the CPU: read as numbers, edited beside their weights, never in
them.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import bitsandbytes
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import steer2edit as s2e
from conftest import make_pico, make_tokenizer, make_traces
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import EditError, FileError, ModelError
from steer2edit.method.scores import score_site
from steer2edit.models.inventory import examine
from steer2edit.models.load import load_model
from steer2edit.models.selfcheck import self_check
from steer2edit.models.sites import find_sites
from steer2edit.models.weights import quantised, read_weight
from steer2edit.searching.in_python import _mark

pytestmark = pytest.mark.usefixtures("stored_nf4")

BUDGET = {"rho_attn": 0.3, "rho_mlp": 0.3, "alpha": 0.2}
SCHEMES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4, quantised twice": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "int8": {"load_in_8bit": True},
    # Without the outliers' own path, which takes a whole batch's column if one row is large there.
    "int8, row by row": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
# bitsandbytes' int8 product rounds its result to fp16, that is by 2⁻¹¹ of it; nf4 here computes in fp32.
ROUNDING = {name: 2.0**-11 if name.startswith("int8") else 1e-6 for name in SCHEMES}
BY_ROW = [name for name in SCHEMES if name != "int8"]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """bitsandbytes warns at every int8 product that fp32 becomes fp16."""
    with caplog.at_level(logging.ERROR, logger="bitsandbytes"):
        yield


@pytest.fixture(scope="module")
def base() -> Any:
    """Not to be changed."""
    return make_pico(hidden_size=64, intermediate_size=128, attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module")
def folder(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantised") / "base"
    base.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def load(folder: Path, scheme: str, dtype: torch.dtype = torch.float32) -> Any:
    config = BitsAndBytesConfig(**SCHEMES[scheme])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype).eval()


@pytest.fixture(params=list(SCHEMES))
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(folder: Path, scheme: str) -> Any:
    return load(folder, scheme)


def told_by_bitsandbytes(module: Any) -> Tensor:
    """The weight as bitsandbytes itself dequantises it."""
    weight = module.weight
    if hasattr(weight, "quant_state"):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    scales = module.state.SCB if weight.SCB is None else weight.SCB
    return weight.data.float() * scales[:, None] / 127


def bytes_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bytes(model: Any, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(
        torch.equal(t.contiguous().view(-1).view(torch.uint8), before[n].contiguous().view(-1).view(torch.uint8))
        for n, t in after.items()
    )


def batch(rows: int = 2, time: int = 11) -> Tensor:
    return torch.randint(3, 300, (rows, time), generator=torch.Generator().manual_seed(5))


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


# Sites and weights --------------------------------------------------------------------------------------------------


def test_the_sites_are_those_of_the_unquantised_model(base: Any, model: Any, scheme: str) -> None:
    sites = find_sites(model)
    assert sites == find_sites(base)
    assert [(s.key, s.d, s.n, s.width) for s in sites[:2]] == [("0.attn", 64, 4, 16), ("0.mlp", 64, 128, 1)]
    assert all(quantised(model, site) and not quantised(base, site) for site in sites)
    if not scheme.startswith("int8"):  # packed two by two: the stored shape says nothing
        assert tuple(model.model.layers[0].mlp.down_proj.weight.shape) == (64 * 128 // 2, 1)


def test_a_weight_is_read_as_bitsandbytes_dequantises_it_whether_or_not_the_projection_has_a_bias(
    model: Any, scheme: str
) -> None:
    for site in find_sites(model):
        module = model.get_submodule(site.module)
        assert float(module.bias.detach().abs().max()) > 0.3
        wanted = told_by_bitsandbytes(module)
        largest = float(wanted.abs().max() + module.bias.detach().abs().max())  # a bias is in what is rounded
        for bias in (module.bias, None):
            module.bias = bias
            read = read_weight(model, site)
            assert (read.shape, read.dtype) == ((site.d, site.inputs), torch.float32)
            torch.testing.assert_close(read, wanted, rtol=0, atol=2 * ROUNDING[scheme] * largest)


def test_a_4_bit_weight_in_a_bf16_model_is_read_to_bf16s_rounding(folder: Path) -> None:
    model = load(folder, "nf4", dtype=torch.bfloat16)
    for site in find_sites(model):
        module = model.get_submodule(site.module)
        wanted = told_by_bitsandbytes(module)
        largest = float(wanted.abs().max() + module.bias.detach().abs().max())
        torch.testing.assert_close(read_weight(model, site).float(), wanted, rtol=0, atol=2.0**-7 * largest)


@pytest.mark.skipif(
    not bitsandbytes.functional.has_avx512bf16(), reason="where AVX-512 has no bf16, weights stay as they are stored"
)
@pytest.mark.parametrize("scheme", ["nf4", "nf4, quantised twice"])
def test_a_weight_that_bitsandbytes_repacked_for_the_cpu_is_read_and_edited(
    model: Any, folder: Path, scheme: str, make_edit: Callable[..., s2e.Edit]
) -> None:
    stored, edit, ids = load(folder, scheme), make_edit(model), batch()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    logits(model, ids)
    for site in find_sites(model):
        module = model.get_submodule(site.module)
        assert module.weight.quant_state.packing_format_for_cpu
        wanted = read_weight(stored, site)
        largest = float(wanted.abs().max() + module.bias.detach().abs().max())
        torch.testing.assert_close(read_weight(model, site), wanted, rtol=0, atol=2.0**-7 * largest)
    before = logits(model, ids)
    assert _mark(model) == _mark(model)
    assert torch.equal(logits(model, ids), before)
    with edit.applied(model), edit.applied(stored):
        repacked, wanted = logits(model, ids), logits(stored, ids)
    moved = float((wanted - logits(stored, ids)).norm())
    assert float((repacked - wanted).norm()) < 0.05 * moved


def test_a_weight_is_read_in_parts_when_it_is_wide(model: Any, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    site = find_sites(model)[1]
    whole = read_weight(model, site)
    monkeypatch.setattr("steer2edit.models.weights._AT_ONCE", 50)
    torch.testing.assert_close(read_weight(model, site), whole, rtol=0, atol=2 * ROUNDING[scheme])


def test_a_quantised_model_that_accelerate_dispatched_is_read_and_edited_as_before(
    model: Any, make_edit: Callable[..., s2e.Edit]
) -> None:
    weights = {site.key: read_weight(model, site) for site in find_sites(model)}
    edit = make_edit(model)
    with edit.applied(model):
        wanted = logits(model, batch())
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert hasattr(model.model.layers[0].mlp.down_proj, "_hf_hook")
    assert all(torch.equal(read_weight(model, site), weights[site.key]) for site in find_sites(model))
    with edit.applied(model):
        assert torch.equal(logits(model, batch()), wanted)


def test_a_mixtures_experts_stay_plain_beside_quantised_attention(tmp_path: Path, tokenizer: Any, traces: Any) -> None:
    base = make_pico("mixtral", hidden_size=64, intermediate_size=64, num_local_experts=4, num_hidden_layers=2)
    base.save_pretrained(tmp_path)
    model = load(tmp_path, "nf4")
    sites = find_sites(model)
    assert sites == find_sites(base)
    assert [quantised(model, site) for site in sites] == [site.block == "attn" for site in sites]
    edit = s2e.score(model, s2e.collect(model, tokenizer, *traces), expert_tokens=1).edit(**BUDGET)
    assert any(site.site.expert is not None for site in edit.edited().values())
    ids, before = batch(), bytes_of(model)
    plain = logits(model, ids)
    with edit.applied(model):
        assert float((logits(model, ids) - plain).abs().max()) > 0.1
    with pytest.raises(ModelError, match=r"self_attn\.o_proj is not floating point"):
        edit.apply(model)
    assert same_bytes(model, before)


# Probe, scores, edits -----------------------------------------------------------------------------------------------


def test_scores_equal_the_closed_form_on_the_dequantised_weight(
    model: Any, scheme: str, tokenizer: Any, traces: Any
) -> None:
    probe = s2e.collect(model, tokenizer, *traces)
    scores = s2e.score(model, probe)
    for site in probe.sites:
        weight = told_by_bitsandbytes(model.get_submodule(site.module))
        wanted = score_site(site, weight, probe.vector(site), probe.mean_input(site))
        got = scores.sites[site.key]
        torch.testing.assert_close(got.g, wanted.g, rtol=0, atol=10 * ROUNDING[scheme])
        torch.testing.assert_close(got.k, wanted.k, rtol=0, atol=10 * ROUNDING[scheme])
        assert float(wanted.g.abs().max()) > 0.05


@pytest.mark.parametrize("scheme", BY_ROW)
def test_the_probe_holds_what_hooks_see_at_the_quantised_projection(model: Any, tokenizer: Any) -> None:
    traces = [s2e.Trace("Hello", "I am sorry.", "positive"), s2e.Trace("Hello", "Yes, of course.", "negative")]
    probe = s2e.collect(model, tokenizer, traces)
    out: list[Tensor] = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, o: out.append(o[0]))
    means = []
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    for trace in traces:
        logits(model, torch.tensor(tokenizer(prompt + trace.response)["input_ids"])[None])
        means.append(out[-1][len(tokenizer(prompt)["input_ids"]) - 1 : -1].mean(dim=0))
    handle.remove()
    site = next(site for site in probe.sites if site.key == "1.mlp")
    v = means[0] - means[1]
    torch.testing.assert_close(probe.vector(site), v, rtol=0, atol=1e-4)
    assert float(v.norm()) > 1


def test_an_edit_runs_as_an_intervention_and_as_a_peft_adapter_and_no_weight_changes(
    model: Any, scheme: str, make_edit: Callable[..., s2e.Edit], tmp_path: Path
) -> None:
    ids = batch()
    plain = logits(model, ids)
    before = bytes_of(model)
    edit = make_edit(model)
    with edit.applied(model):
        hooked = logits(model, ids)
    edit.save_adapter(tmp_path / "adapter")
    assert same_bytes(model, before)
    assert torch.equal(logits(model, ids), plain)
    moved = float((hooked - plain).abs().max())
    assert moved > 0.5
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter"))
    # A last bit of difference may tip a later layer's input over to the next int8 step.
    torch.testing.assert_close(
        logits(adapted, ids), hooked, rtol=0, atol=0.02 * moved if scheme.startswith("int8") else 1e-4
    )


def test_the_self_check_passes_and_is_thorough_on_demand(model: Any) -> None:
    health = self_check(model, thorough=True)
    assert health.interventions == 6
    assert health.least_moved > 0.1
    assert health.moved_by_nothing == 0
    assert health.heads < 0.05
    assert any("quantised (bitsandbytes)" in remark for remark in examine(model)["remarks"])


def test_an_edit_of_the_full_precision_base_runs_on_its_quantised_version_and_on_no_other_models(
    base: Any, model: Any, scheme: str, make_edit: Callable[..., s2e.Edit], tmp_path: Path
) -> None:
    edit, ids = make_edit(base), batch()
    with edit.applied(base):
        wanted = logits(base, ids) - logits(base, ids).mean()
    with edit.applied(model):
        got = logits(model, ids)
    plain = logits(model, ids)
    assert float((got - plain).abs().max()) > 0.5
    assert torch.cosine_similarity((got - got.mean()).flatten(), wanted.flatten(), dim=0) > 0.9
    make_pico(hidden_size=64, intermediate_size=128, attention_bias=True, mlp_bias=True, seed=1).save_pretrained(
        tmp_path
    )
    other = load(tmp_path, scheme)
    unedited = logits(other, ids)
    with pytest.raises(ModelError, match="not the base that the edit was made for"), edit.applied(other):
        pass
    assert torch.equal(logits(other, ids), unedited)


def test_an_edit_that_was_baked_in_before_the_quantisation_is_not_run_twice(
    base: Any, scheme: str, make_edit: Callable[..., s2e.Edit], tmp_path: Path
) -> None:
    edit, baked = make_edit(base), copy.deepcopy(base)
    edit.apply(baked)
    baked.save_pretrained(tmp_path)
    with pytest.raises(EditError, match="already in this model"), edit.applied(load(tmp_path, scheme)):
        pass


@pytest.mark.parametrize("scheme", BY_ROW)
def test_the_engine_generates_under_an_edit_what_transformers_does(
    model: Any, tokenizer: Any, make_edit: Callable[..., s2e.Edit], prompts: list[tuple[int, ...]]
) -> None:
    edit = make_edit(model)
    engine = TransformersEngine(model, tokenizer, rows=1)
    table = [s2e.NOTHING, edit.intervention()]
    made = engine.generate([Request(ids, row) for row in (0, 1) for ids in prompts[:2]], table, 6)
    stop = tokenizer.eos_token_id

    def by_transformers(ids: tuple[int, ...]) -> tuple[int, ...]:
        given = torch.tensor([ids])
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": stop, "pad_token_id": 0}
        out = model.generate(given, attention_mask=torch.ones_like(given), **options)[0, len(ids) :].tolist()
        return tuple(out[: out.index(stop)] if stop in out else out)

    plain = [by_transformers(ids) for ids in prompts[:2]]
    with edit.applied(model):
        edited = [by_transformers(ids) for ids in prompts[:2]]
    assert [answer.ids for answer in made] == plain + edited
    assert plain != edited


# What is refused ----------------------------------------------------------------------------------------------------


def test_apply_refuses_with_the_module_its_dtype_and_both_other_ways_and_changes_nothing(
    model: Any, scheme: str, make_edit: Callable[..., s2e.Edit]
) -> None:
    edit, ids = make_edit(model), batch()
    plain, before = logits(model, ids), bytes_of(model)
    first = next(iter(edit.edited().values())).site.module
    with pytest.raises(ModelError) as caught:
        edit.apply(model)
    kept = "torch.int8 in a Int8Params" if scheme.startswith("int8") else "torch.uint8 in a Params4bit"
    assert caught.value.what == f"the weight of {first} is not floating point"
    assert caught.value.got == kept
    assert "edit.applied(model)" in caught.value.fix
    assert "edit.save_adapter" in caught.value.fix
    assert same_bytes(model, before)
    assert torch.equal(logits(model, ids), plain)


def test_apply_is_all_or_nothing_where_only_a_later_layer_is_quantised(
    base: Any, model: Any, make_edit: Callable[..., s2e.Edit]
) -> None:
    mixed = copy.deepcopy(base)
    mixed.model.layers[2].mlp.down_proj = model.model.layers[2].mlp.down_proj
    edit = make_edit(mixed)
    logits(mixed, batch())
    before = bytes_of(mixed)
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.down_proj is not floating point"):
        edit.apply(mixed)
    assert same_bytes(mixed, before)


def test_scores_and_an_export_come_from_a_folder_of_quantised_tensors(
    base: Any, model: Any, scheme: str, tokenizer: Any, traces: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "quantised")
    probe = s2e.collect(base, tokenizer, *traces)
    scores = s2e.score(tmp_path / "quantised", probe)
    for key, site in s2e.score(model, probe).sites.items():
        torch.testing.assert_close(scores.sites[key].g, site.g, rtol=0.01, atol=0.002)
    edit = scores.edit(rho_attn=0.05, rho_mlp=0.05, alpha=0.1)
    edit = edit.with_strength(0.3 if "twice" in scheme else 3.0)  # scales in 8 bits have a largest value
    s2e.export_checkpoint(tmp_path / "quantised", edit, tmp_path / "out")
    edited = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    plain = logits(model, batch())
    with edit.applied(model):
        expected = logits(model, batch())
    assert float((logits(edited, batch()) - expected).norm()) < 0.6 * float((expected - plain).norm())


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2")],
)
def test_neither_an_export_nor_scores_come_from_a_folder_with_one_tensor_of_few_bits(
    dtype: torch.dtype, stored: str, base: Any, folder: Path, tokenizer: Any, traces: Any, tmp_path: Path
) -> None:
    copied = shutil.copytree(folder, tmp_path / "few bits")
    tensors = load_file(copied / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    save_file(tensors | {name: (tensors[name] * 20).to(dtype)}, copied / "model.safetensors", metadata={"format": "pt"})
    _refused(base, tmp_path, copied, stored, tokenizer, traces, name)


def _refused(
    base: Any,
    tmp_path: Path,
    folder: Path,
    got: str,
    tokenizer: Any,
    traces: Any,
    name: str = "model.layers.0.self_attn.o_proj.weight",
) -> None:
    probe = s2e.collect(base, tokenizer, *traces)
    edit = s2e.score(base, probe).edit(**BUDGET)
    there = sorted(tmp_path.iterdir())
    with pytest.raises(FileError) as caught:
        s2e.export_checkpoint(folder, edit, tmp_path / "out")
    assert caught.value.what == f"{name} is not plain floating point"
    assert caught.value.got == got
    assert sorted(tmp_path.iterdir()) == there
    with pytest.raises(FileError, match=f"{name} is not plain floating point"):
        s2e.score(folder, probe)


def test_a_quantised_folder_loads_with_its_tokenizer_and_stays_as_it_was_put(
    model: Any, scheme: str, tmp_path: Path, tokenizer: Any
) -> None:
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, dtype="float32", device="cpu")
    assert all(quantised(loaded, site) for site in find_sites(loaded))
    assert torch.equal(logits(loaded, batch()), logits(model, batch()))
    edit = s2e.score(loaded, s2e.collect(loaded, tokenizer, *make_traces())).edit(**BUDGET)
    with edit.applied(loaded):
        assert torch.isfinite(logits(loaded, batch())).all()
