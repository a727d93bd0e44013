"""Every family from sites to exports: against rows written by hand, the oracle's loops, and transformers itself."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import oracle
import steer2edit as s2e
from conftest import VOCABULARY, make_tokenizer, make_traces
from families import FAMILIES, MIXTURES, WINDOW, D, Row, make_family, make_model
from steer2edit.artefacts.bases import open_base
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import EditError, ModelError
from steer2edit.method.intervention import Term
from steer2edit.models.architectures import Architecture, Heads, describe_as
from steer2edit.models.sites import find_sites

BUDGET = {"rho_attn": 0.3, "rho_mlp": 0.3, "alpha": 0.2}
CLOSE = {"rtol": 0.0, "atol": 1e-4}


# They share a beginning that is longer than a sliding window, and are of unlike lengths.
_draw = torch.Generator().manual_seed(3)
BEGINNING = torch.randint(3, VOCABULARY - 20, (WINDOW + 3,), generator=_draw).tolist()
PROMPTS: list[tuple[int, ...]] = [
    (*BEGINNING, *torch.randint(3, VOCABULARY - 20, (n,), generator=_draw).tolist()) for n in (1, 9, 4, 2)
]


@dataclass(frozen=True)
class Case:
    """One family's model, what was made of it, and its weights edited. All are shared: a test that changes one copies
    it.
    """

    rows: list[Row]
    model: Any
    probe: s2e.Probe
    scores: s2e.Scores
    edit: s2e.Edit
    baked: Any
    folder: Path  # the base, as save_pretrained writes it

    @property
    def steering(self) -> s2e.Intervention:
        return s2e.steering({site.block_key: self.probe.vector(site) for site in self.probe.sites}, 2.0)

    @property
    def table(self) -> list[s2e.Intervention]:
        return [s2e.NOTHING, self.edit.intervention(), self.steering]


def applied(edit: s2e.Edit, model: Any) -> Any:
    """A copy of a model with the edit in its weights."""
    edited = copy.deepcopy(model)
    edit.apply(edited)
    return edited


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @cache
    def make(name: str) -> Case:
        model = make_family(name)
        probe = s2e.collect(model, make_tokenizer(), *make_traces())
        scores = s2e.score(model, probe, expert_tokens=1)
        edit = scores.edit(**BUDGET)
        folder = tmp_path_factory.mktemp("family") / "base"
        model.save_pretrained(folder)
        return Case(FAMILIES[name].rows, model, probe, scores, edit, applied(edit, model), folder)

    return make


@pytest.fixture(params=list(FAMILIES))
def case(request: pytest.FixtureRequest, make_case: Any) -> Case:
    return make_case(request.param)


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest, make_case: Any) -> Case:
    return make_case(request.param)


def ids_of(rows: int = 3, time: int = 15) -> Tensor:
    return torch.randint(3, VOCABULARY - 20, (rows, time), generator=torch.Generator().manual_seed(5))


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def greedy(model: Any, prompt: tuple[int, ...], new: int, stop: int) -> tuple[int, ...]:
    """transformers' own greedy answer to one prompt, without its end."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=stop, pad_token_id=0
    )
    answer = out[0, len(prompt) :].tolist()
    return tuple(answer[: answer.index(stop)] if stop in answer else answer)


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model: Any, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(
        torch.equal(t.view(torch.uint8), before[n].view(torch.uint8)) for n, t in after.items()
    )


def same_files(exported: Path, saved: Path) -> None:
    """Every file that transformers writes, byte for byte, and nothing beside them but our own note on the edit."""
    names = {path.name for path in saved.iterdir()}
    assert {path.name for path in exported.iterdir()} - {"manifest.json"} == names
    for name in names:
        assert (exported / name).read_bytes() == (saved / name).read_bytes(), name


# Sites and scores ---------------------------------------------------------------------------------------------------


def test_the_sites_are_those_written_by_hand(case: Case) -> None:
    found = [
        (s.key, s.module, s.parameter, s.d, s.n, s.width, s.expert, s.transposed, s.block_module)
        for s in find_sites(case.model)
    ]
    assert found == [row[:9] for row in case.rows]
    empty = copy.deepcopy(case.model).to("meta")
    assert find_sites(empty) == find_sites(case.model)


def test_the_files_hold_every_site_under_the_name_written_by_hand(case: Case) -> None:
    base = open_base(case.folder)
    with safe_open(case.folder / "model.safetensors", "pt") as file:
        for site, row in zip(find_sites(case.model), case.rows, strict=True):
            assert base.name(site) == row.file
            assert tuple(file.get_slice(row.file).get_shape()) == row.stored


@pytest.mark.parametrize("positions", ["predicting", "response"])
def test_the_edit_of_every_site_equals_the_oracles(case: Case, positions: Any, tokenizer: Any, traces: Any) -> None:
    runs = oracle.runs_of(tokenizer, [*traces[0], *traces[1]], predicting=positions == "predicting")
    seen = oracle.capture_rows(case.model, runs, case.rows)
    probe, edit = case.probe, case.edit
    if positions == "response":
        probe = s2e.collect(case.model, tokenizer, *traces, positions="response")
        edit = s2e.score(case.model, probe, expert_tokens=1).edit(**BUDGET)
    for row in case.rows:
        for label in ("positive", "negative"):
            told_input = torch.from_numpy(oracle.mean_inputs(seen, row)[label])
            torch.testing.assert_close(probe.inputs[row.key][label].double(), told_input, rtol=1e-5, atol=1e-5)
            told_output = torch.from_numpy(oracle.mean_outputs(seen, row)[label])
            block = ".".join(row.key.split(".")[:2])
            torch.testing.assert_close(probe.outputs[block][label].double(), told_output, rtol=1e-5, atol=1e-5)
            if row.expert is not None:
                assert probe.counts["experts"][row.key][label] == oracle.reached(seen.routed[row.key], label)
        wanted = oracle.read_row(case.model, seen, row, BUDGET["rho_mlp"], BUDGET["alpha"])
        delta = edit.sites[row.key].delta().double()
        torch.testing.assert_close(delta, torch.from_numpy(wanted.delta), rtol=0, atol=1e-4 * abs(wanted.delta).max())
        assert abs(wanted.delta).max() > 0.01


def layers_of(case: Case) -> str:
    """The path of the layers, from the rows that are written by hand."""
    found = re.match(r"(.*?)\.0\.", case.rows[0].module)
    assert found
    return found[1]


def test_the_means_of_the_stream_are_those_of_what_transformers_calls_hidden_states(
    case: Case, tokenizer: Any, traces: Any
) -> None:
    runs = oracle.runs_of(tokenizer, [*traces[0], *traces[1]])
    streams = oracle.capture_streams(case.model, runs, layers_of(case))
    assert list(case.probe.residual) == list(streams) == [0, 1]
    for layer, responses in streams.items():
        for label in ("positive", "negative"):
            wanted = torch.from_numpy(oracle.label_mean(responses, label, "outputs"))
            torch.testing.assert_close(case.probe.residual[layer][label].double(), wanted, rtol=1e-5, atol=1e-5)
    _, _, ids, first, last = runs[0]
    with torch.no_grad():
        hidden = case.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    # The last of them is behind the final norm.
    torch.testing.assert_close(hidden[1][0, first:last].double(), torch.from_numpy(streams[0][0].outputs), **CLOSE)


def test_a_term_on_the_stream_is_what_every_later_layer_reads(case: Case) -> None:
    ids, draw = ids_of(3), torch.Generator().manual_seed(23)
    u, a, b = (torch.randn(shape, generator=draw) for shape in ((D, 1), (1, D), (D,)))
    layer = case.model.get_submodule(f"{layers_of(case)}.0")

    def added(module: nn.Module, args: Any, out: Any) -> Any:
        x = out if isinstance(out, Tensor) else out[0]
        x = x + 0.2 * (x @ a.T) @ u.T + b
        return x if isinstance(out, Tensor) else (x, *out[1:])

    handle = layer.register_forward_hook(added)
    wanted = logits(case.model, ids)
    handle.remove()
    base = logits(case.model, ids)
    table = [s2e.NOTHING, s2e.Intervention("stream", {"0.residual": Term(0.2 * u, a, b)})]
    with s2e.Interventions(case.model, table) as running:
        running.rows([1, 0, 1])
        mixed = logits(case.model, ids)
    for row, expected in enumerate((wanted, base, wanted)):
        torch.testing.assert_close(mixed[row], expected[row], **CLOSE)
    assert float((wanted - base).abs().max()) > 0.1


def test_a_folder_is_scored_as_the_model_is(case: Case) -> None:
    wanted, read = case.scores, s2e.score(case.folder, case.probe, expert_tokens=1)
    assert list(read.sites) == list(wanted.sites) == [row.key for row in case.rows]
    for key, site in wanted.sites.items():
        other = read.sites[key]
        for name in ("u", "k", "g", "reach"):
            assert torch.equal(getattr(other, name), getattr(site, name)), (key, name)
        assert torch.equal(read.fingerprint[key], wanted.fingerprint[key])


def test_probe_scores_and_edit_come_back_from_their_files(case: Case, tmp_path: Path) -> None:
    case.probe.save(tmp_path / "probe")
    case.scores.save(tmp_path / "scores")
    case.edit.save(tmp_path / "edit")
    probe, scores, edit = (
        kind.load(tmp_path / name) for kind, name in ((s2e.Probe, "probe"), (s2e.Scores, "scores"), (s2e.Edit, "edit"))
    )
    assert probe.sites == case.probe.sites
    assert probe.counts == case.probe.counts
    assert [s.site for s in edit.sites.values()] == list(case.probe.sites)
    assert edit.id == case.edit.id == scores.edit(**BUDGET).id
    assert s2e.score(case.model, probe, expert_tokens=1).edit(**BUDGET).id == edit.id


# Hook, weights, adapter, files --------------------------------------------------------------------------------------


def test_the_hooked_model_answers_as_the_baked_one(case: Case) -> None:
    ids = ids_of()
    base, baked = logits(case.model, ids), logits(case.baked, ids)
    with case.edit.applied(case.model) as running:
        hooked = logits(case.model, ids)
        calls = running.calls
    torch.testing.assert_close(hooked, baked, **CLOSE)
    assert float((baked - base).abs().max()) > 0.1
    assert calls == running.sites
    assert torch.equal(logits(case.model, ids), base)


@pytest.mark.parametrize("blocks", ["attn", "mlp", "both"])
def test_the_adapter_answers_as_the_baked_model(case: Case, blocks: str, tmp_path: Path) -> None:
    off = {"attn": {"rho_mlp": None}, "mlp": {"rho_attn": None}, "both": {}}[blocks]
    edit = case.scores.edit(**BUDGET | off)
    edit.save_adapter(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(copy.deepcopy(case.model), tmp_path / "adapter")
    ids = ids_of()
    baked = logits(applied(edit, case.model), ids)
    torch.testing.assert_close(logits(adapted, ids), baked, **CLOSE)
    assert float((baked - logits(case.model, ids)).abs().max()) > 0.05
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert config["fan_in_fan_out"] == case.rows[0].transposed  # as GPT-2's projections lie
    placed = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert len(placed) == len(load_file(tmp_path / "adapter/adapter_model.safetensors"))  # and none elsewhere


def test_reverting_restores_every_byte(case: Case) -> None:
    model = copy.deepcopy(case.model)
    before = state(model)
    case.edit.apply(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{row.module}.{row.parameter}" for row in case.rows}
    case.edit.revert(model)
    assert same_state(model, before)


def test_another_base_and_one_that_has_the_edit_are_refused(case: Case) -> None:
    config = copy.deepcopy(case.baked.config)
    other = type(case.baked)(config).eval()
    other.load_state_dict(case.baked.state_dict())  # what another process loads
    for edited in (case.baked, other):
        before = state(edited)
        with pytest.raises(EditError, match="already in this model"):
            case.edit.apply(edited)
        assert same_state(edited, before)
    last = case.rows[-1]
    changed = [row.key for row in case.rows if row.module == last.module]
    with torch.no_grad():
        other.load_state_dict(case.model.state_dict())
        getattr(other.get_submodule(last.module), last.parameter).mul_(1.1)
    wanted = rf"not the base .*other weights at {len(changed)} of {len(case.rows)} sites, first {changed[0]}\)"
    with pytest.raises(ModelError, match=wanted):
        case.edit.apply(other)


def test_the_exported_folder_is_what_save_pretrained_writes_of_the_baked_model(case: Case, tmp_path: Path) -> None:
    s2e.export_checkpoint(case.folder, case.edit, tmp_path / "exported")
    case.baked.save_pretrained(tmp_path / "saved")
    same_files(tmp_path / "exported", tmp_path / "saved")
    assert (tmp_path / "exported/model.safetensors").read_bytes() != (case.folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gpt2", "gemma3", "qwen3_5_text"])
def test_bf16_is_rounded_once_in_memory_and_in_the_files(
    name: str, tokenizer: Any, traces: Any, tmp_path: Path
) -> None:
    model = make_family(name).to(torch.bfloat16)
    probe = s2e.collect(model, tokenizer, *traces)
    scores = s2e.score(model, probe, expert_tokens=1)
    model.save_pretrained(tmp_path / "base")
    read = s2e.score(tmp_path / "base", probe, expert_tokens=1)
    assert all(torch.equal(read.sites[key].g, site.g) for key, site in scores.sites.items())
    edit = scores.edit(**BUDGET)
    before = state(model)
    s2e.export_checkpoint(tmp_path / "base", edit, tmp_path / "exported")
    edit.apply(model)
    model.save_pretrained(tmp_path / "saved")
    exported, saved = (tmp_path / folder / "model.safetensors" for folder in ("exported", "saved"))
    assert exported.read_bytes() == saved.read_bytes()
    for row in FAMILIES[name].rows:
        weight, base = model.state_dict()[f"{row.module}.{row.parameter}"], before[f"{row.module}.{row.parameter}"]
        delta = edit.sites[row.key].delta()
        delta = delta.T if row.transposed else delta
        if row.expert is not None:
            weight, base = weight[row.expert], base[row.expert]
        assert torch.equal(weight, (base.float() + delta).bfloat16())
    edit.revert(model)
    assert same_state(model, before)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_files_that_hold_the_experts_fused_are_scored_and_exported(name: str, make_case: Any, tmp_path: Path) -> None:
    case = make_case(name)
    fused = tmp_path / "fused"
    case.model.config.save_pretrained(fused)
    save_file({k: v.clone() for k, v in case.model.state_dict().items()}, fused / "model.safetensors", {"format": "pt"})
    read = s2e.score(fused, case.probe, expert_tokens=1)
    for key, site in case.scores.sites.items():
        assert torch.equal(read.sites[key].g, site.g)
        assert torch.equal(read.sites[key].k, site.k)
    s2e.export_checkpoint(fused, case.edit, tmp_path / "exported")
    exported, wanted = load_file(tmp_path / "exported/model.safetensors"), case.baked.state_dict()
    assert set(exported) == set(wanted)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in exported.items())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_shards_are_exported_each_as_save_pretrained_writes_it(name: str, make_case: Any, tmp_path: Path) -> None:
    case = make_case(name)
    for model, folder in ((case.model, "base"), (case.baked, "saved")):
        model.save_pretrained(tmp_path / folder, max_shard_size="25KB")
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 3
    read = s2e.score(tmp_path / "base", case.probe, expert_tokens=1)
    assert all(torch.equal(read.sites[key].g, site.g) for key, site in case.scores.sites.items())
    s2e.export_checkpoint(tmp_path / "base", case.edit, tmp_path / "exported")
    same_files(tmp_path / "exported", tmp_path / "saved")


# Rows of a batch, and the engine ------------------------------------------------------------------------------------


def test_a_batch_of_mixed_interventions_equals_each_row_alone(case: Case) -> None:
    ids, rows = ids_of(5), [1, 0, 2, 2, 1]
    with s2e.Interventions(case.model, case.table) as running:
        running.rows(rows)
        mixed = logits(case.model, ids)
        for i, row in enumerate(rows):
            running.rows([row])
            torch.testing.assert_close(mixed[i : i + 1], logits(case.model, ids[i : i + 1]), **CLOSE)
    base, baked = logits(case.model, ids), logits(case.baked, ids)
    for i, row in enumerate(rows):
        torch.testing.assert_close(mixed[i], (base, baked, mixed)[row][i], **CLOSE)
        assert float((mixed[i] - base[i]).abs().max()) > 0.1 or row == 0


def test_mixed_rows_generate_what_transformers_generates_of_each_model(case: Case, tokenizer: Any) -> None:
    engine = TransformersEngine(case.model, tokenizer, rows=5)
    requests = [Request(prompt, (i + row) % 3) for row in range(3) for i, prompt in enumerate(PROMPTS)]
    answers = engine.generate(requests, case.table, 6)
    wanted = []
    for request in requests:
        model = case.baked if request.row == 1 else case.model
        with s2e.intervening(case.model, case.steering if request.row == 2 else s2e.NOTHING):
            wanted.append(greedy(model, request.ids, 6, tokenizer.eos_token_id))
    assert [answer.ids for answer in answers] == wanted
    of_prompt = [{wanted[i] for i, request in enumerate(requests) if request.ids == prompt} for prompt in PROMPTS]
    assert max(map(len, of_prompt)) == 3  # else nothing moved


def test_losses_of_mixed_rows_equal_a_direct_computation(case: Case, tokenizer: Any) -> None:
    pairs = [(PROMPTS[1], (7, 21, 3)), (PROMPTS[0], (40, 11, 90, 62, 8, 8, 31, 100))]
    losses = TransformersEngine(case.model, tokenizer).losses(pairs, case.table)
    for i, (prompt, answer) in enumerate(pairs):
        ids = torch.tensor([[*prompt, *answer]])
        with s2e.intervening(case.model, case.steering):
            steered = logits(case.model, ids)
        wanted = {0: logits(case.model, ids), 1: logits(case.baked, ids), 2: steered}
        log = {row: found[0, len(prompt) - 1 : -1].log_softmax(-1) for row, found in wanted.items()}
        for row in range(3):
            kl = (log[0].exp() * (log[0] - log[row])).sum(-1).mean()
            nll = -sum(log[row][t, token] for t, token in enumerate(answer)) / len(answer)
            assert float(losses.kl[i, row]) == pytest.approx(float(kl), abs=1e-4)
            assert float(losses.nll[i, row]) == pytest.approx(float(nll), abs=1e-4)
            assert float(kl) > 0.0005 or row == 0
        assert float(losses.base_nll[i]) == pytest.approx(float(losses.nll[i, 0]), abs=1e-6)


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_offloaded_experts_are_probed_scored_and_edited_alike(
    name: str, make_case: Any, tokenizer: Any, traces: Any
) -> None:
    case = make_case(name)
    model = cpu_offload(make_family(name), execution_device=torch.device("cpu"))  # which nobody has checked yet
    assert all(parameter.is_meta for parameter in model.parameters())
    probe = s2e.collect(model, tokenizer, *traces)
    assert probe.counts == case.probe.counts
    edit = s2e.score(model, probe, expert_tokens=1).edit(**BUDGET)
    ids = ids_of()
    with edit.applied(model):
        torch.testing.assert_close(logits(model, ids), logits(case.baked, ids), **CLOSE)
    with pytest.raises(ModelError, match="not in memory"):
        edit.apply(model)


# What is refused ----------------------------------------------------------------------------------------------------


def rename(model: Any, path: str, name: str) -> None:
    """A module of the second layer under another name."""
    holder, _, old = path.rpartition(".")
    owner = model.model.layers[1].get_submodule(holder)
    module = getattr(owner, old)
    delattr(owner, old)
    setattr(owner, name, module)


def _extra(model: Any) -> None:
    model.model.layers[1].mlp.extra = nn.Linear(24, 24)


def _lying_config(model: Any) -> None:
    model.config.num_local_experts = 3


def _cut_experts(model: Any) -> None:
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj[:3].clone())


def _separate_experts(model: Any) -> None:
    dense = make_family("llama").model.layers[0].mlp
    model.model.layers[1].mlp.experts = nn.ModuleList(copy.deepcopy(dense) for _ in range(4))


def _home_made_experts(model: Any) -> None:
    mine = nn.Module()
    mine.down_proj = nn.Parameter(model.model.layers[1].mlp.experts.down_proj.detach().clone())
    model.model.layers[1].mlp.experts = mine


def _second_attention(model: Any) -> None:
    model.model.layers[1].linear_attn = copy.deepcopy(model.model.layers[0].linear_attn)


def _second_mlp(model: Any) -> None:
    model.model.layers[1].mlp.down_proj = nn.Linear(40, 24, bias=False)


def _conv1d(model: Any) -> None:
    attention = model.transformer.h[1].attn
    attention.c_proj = nn.Linear(24, 24)


def _llama4(model: Any) -> None:
    model.config.model_type = "llama4"


def _lora(*targets: str) -> Callable[[Any], None]:
    def inject(model: Any) -> None:
        get_peft_model(model, LoraConfig(r=2, target_modules=list(targets)))

    return inject


def _renamed(path: str, name: str) -> Callable[[Any], None]:
    return lambda model: rename(model, path, name)


BROKEN: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "attention's output renamed": (
        "llama", _renamed("self_attn.o_proj", "out"), r"no linear map model\.layers\.1\.self_attn\.o_proj"),
    "down projection renamed": ("llama", _renamed("mlp.down_proj", "down"), r"no .* model\.layers\.1\.mlp\.down_proj"),
    "experts renamed": ("qwen3_moe", _renamed("mlp.experts", "bank"), r"no .* model\.layers\.1\.mlp\.experts"),
    "shared expert renamed": (
        "qwen2_moe", _renamed("mlp.shared_expert", "always"), r"model\.layers\.1\.mlp\.shared_expert\.down_proj"),
    "an inner map renamed": (
        "llama", _renamed("self_attn.q_proj", "query"), r"model\.layers\.1\.self_attn\.query may write"),
    "an extra map": ("llama", _extra, r"model\.layers\.1\.mlp\.extra may write .*\(24, 24\)"),
    "an extra map beside experts": ("gpt_oss", _extra, r"model\.layers\.1\.mlp\.extra may write"),
    "more experts than the config says": (
        "mixtral", _lying_config,
        r"model\.layers\.0\.mlp\.experts\.down_proj .* as many experts .*4 experts, num_local_experts = 3"),
    "fewer experts than the config says": (
        "qwen3_moe", _cut_experts, r"model\.layers\.1\.mlp\.experts\.down_proj .*3 experts, num_experts = 4"),
    "experts as a list of modules": (
        "mixtral", _separate_experts, r"the experts model\.layers\.1\.mlp\.experts cannot be reached .*ModuleList"),
    "experts that transformers does not run": (
        "mixtral", _home_made_experts, r"model\.layers\.1\.mlp\.experts cannot be reached .*experts functions"),
    "two attention projections": (
        "qwen3_next", _second_attention,
        r"more than one of model\.layers\.1\.self_attn\.o_proj or model\.layers\.1\.linear_attn\.out_proj"),
    "a down projection beside experts": ("mixtral", _second_mlp, r"model\.layers\.1\.mlp\.down_proj may write"),
    "a dense layer's down projection beside experts": (
        "qwen2_moe", _second_mlp,
        r"more than one of model\.layers\.1\.mlp\.down_proj or model\.layers\.1\.mlp\.experts"),
    "a weight that lies the other way": (
        "gpt2", _conv1d, r"transformer\.h\.1\.attn\.c_proj is not laid out .*got: Linear"),
    "an adapter on a site": ("llama", _lora("o_proj"), r"model\.layers\.0\.self_attn\.o_proj\.\S+ may write .*adapter"),
    "an adapter on an inner map": ("llama", _lora("q_proj"), r"model\.layers\.0\.self_attn\.q_proj\.\S+ may write"),
    "an adapter beside experts": (
        "qwen2_moe", _lora("up_proj"), r"model\.layers\.0\.mlp\.up_proj\.\S+ may write .*adapter"),
    "Llama 4": ("llama", _llama4, r"'llama4' is not supported .*experts"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_model_that_would_be_misread_is_refused_by_the_modules_name_and_left_alone(
    what: str, make_case: Any, tokenizer: Any, traces: Any
) -> None:
    name, damage, wanted = BROKEN[what]
    case = make_case(name)
    model = make_family(name)
    damage(model)
    before = state(model)
    with pytest.raises(ModelError, match=wanted):
        find_sites(model)
    with pytest.raises(ModelError, match=wanted):
        s2e.collect(model, tokenizer, *traces)
    with pytest.raises(ModelError, match=wanted):
        case.edit.apply(model)
    with pytest.raises(ModelError, match=wanted), case.edit.applied(model):
        pass
    assert same_state(model, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_wrapped_by_peft_is_refused(make_case: Any) -> None:
    wrapped = get_peft_model(make_family("llama"), LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    before = state(wrapped)
    with pytest.raises(ModelError, match=r"no model\.layers .*got: PeftModelForCausalLM.*adapter"):
        make_case("llama").edit.apply(wrapped)
    assert same_state(wrapped, before)


def test_llama_4_is_refused_by_name() -> None:
    sizes = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 40}
    model = make_model("llama4_text", **sizes)
    with pytest.raises(ModelError, match=r"'llama4_text' is not supported .*every token"):
        find_sites(model)


# Families that are not in the table ---------------------------------------------------------------------------------

GPT = {"n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": 256}
FOUR = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
ONE_GROUP = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_routed_experts": 4, **FOUR}
MLA = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10}

# model type → config; the attention's and the MLP's module in layer 0, heads' width, components of the MLP; sites in
# all.
BY_STRUCTURE: dict[str, tuple[dict[str, Any], str, str, int, int, int]] = {
    "gpt_bigcode": (GPT | {"n_inner": 40}, "transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj", 6, 40, 4),
    "falcon": (
        {}, "transformer.h.0.self_attention.dense", "transformer.h.0.mlp.dense_4h_to_h", 6, 96, 4),
    "bloom": (
        {"n_layer": 2, "n_head": 4},
        "transformer.h.0.self_attention.dense", "transformer.h.0.mlp.dense_4h_to_h", 6, 96, 4),
    "mpt": (
        {"d_model": 24, "n_heads": 4, "n_layers": 2},
        "transformer.blocks.0.attn.out_proj", "transformer.blocks.0.ffn.down_proj", 6, 96, 4),
    "phi": ({"partial_rotary_factor": 1.0}, "model.layers.0.self_attn.dense", "model.layers.0.mlp.fc2", 6, 40, 4),
    "gptj": (GPT | {"rotary_dim": 2}, "transformer.h.0.attn.out_proj", "transformer.h.0.mlp.fc_out", 6, 96, 4),
    "codegen": (GPT | {"rotary_dim": 2}, "transformer.h.0.attn.out_proj", "transformer.h.0.mlp.fc_out", 6, 96, 4),
    "starcoder2": ({}, "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.c_proj", 6, 40, 4),
    "biogpt": ({}, "biogpt.layers.0.self_attn.out_proj", "biogpt.layers.0.fc2", 6, 40, 4),
    "olmo": ({}, "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", 6, 40, 4),
    "arcee": ({}, "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", 6, 40, 4),
    "cohere2": ({"sliding_window": 8}, "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", 6, 40, 4),
    "helium": ({"head_dim": 6}, "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", 6, 40, 4),
    "ernie4_5": ({"head_dim": 8}, "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", 8, 40, 4),
    "lfm2": (
        {"block_auto_adjust_ff_dim": False},
        "model.layers.0.self_attn.out_proj", "model.layers.0.feed_forward.w2", 6, 40, 4),
    "phimoe": (
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.experts", 6, 40, 10),
    "glm4_moe": (
        {"head_dim": 8, "n_shared_experts": 1, **ONE_GROUP},
        "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", 8, 40, 8),
    "deepseek_v2": (
        {"num_key_value_heads": 4, "n_shared_experts": 2, **MLA, **ONE_GROUP},
        "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", 10, 40, 8),
}  # fmt: skip


def hooked_baked_and_generated_agree(model: Any) -> None:
    tokenizer = make_tokenizer()
    probe = s2e.collect(model, tokenizer, *make_traces())
    edit = s2e.score(model, probe, expert_tokens=1).edit(**BUDGET)
    ids = ids_of()
    base, baked = logits(model, ids), applied(edit, model)
    with edit.applied(model):
        hooked = logits(model, ids)
    torch.testing.assert_close(hooked, logits(baked, ids), **CLOSE)
    assert float((hooked - base).abs().max()) > 0.1
    requests = [Request(prompt, row) for prompt in PROMPTS[:3] for row in (0, 1)]
    answers = TransformersEngine(model, tokenizer).generate(requests, [s2e.NOTHING, edit.intervention()], 5)
    stop = tokenizer.eos_token_id
    assert [a.ids for a in answers] == [greedy((model, baked)[r.row], r.ids, 5, stop) for r in requests]


@pytest.mark.parametrize("model_type", list(BY_STRUCTURE))
def test_a_family_with_a_common_shape_works_without_a_record(model_type: str) -> None:
    config, attention, down, width, neurons, count = BY_STRUCTURE[model_type]
    model = make_model(model_type, **config)
    sites = find_sites(model)
    assert len(sites) == count
    assert (sites[0].module, sites[0].n, sites[0].width) == (attention, 4, width)
    assert (sites[1].module, sites[1].n, sites[1].width) == (down, neurons, 1)
    hooked_baked_and_generated_agree(model)


POST_NORM = {
    "glm4": ({"head_dim": 8}, "post_self_attn_layernorm", "post_mlp_layernorm"),
    "olmo3": ({"sliding_window": 8}, "post_attention_layernorm", "post_feedforward_layernorm"),
}


@pytest.mark.parametrize("model_type", list(POST_NORM))
def test_a_norm_after_the_block_must_be_described_where_there_is_no_record(
    model_type: str, tokenizer: Any, traces: Any
) -> None:
    config, attn_norm, mlp_norm = POST_NORM[model_type]
    model = make_model(model_type, **config)
    before = state(model)
    with pytest.raises(ModelError, match=rf"adds something other .*{model_type} \(by its structure\).*norm"):
        s2e.collect(model, tokenizer, *traces)
    assert same_state(model, before)
    describe_as(model, Architecture(attn_norm=attn_norm, mlp_norm=mlp_norm))
    hooked_baked_and_generated_agree(model)


STRANGE: dict[str, tuple[dict[str, Any], str]] = {
    "bart": (
        {"d_model": 24, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 40},
        r"model\.decoder\.layers\.0\.encoder_attn\.out_proj may write"),
    "minimax": (
        {"num_local_experts": 4, "num_experts_per_tok": 2}, r"model\.layers\.\d\.self_attn\.output_gate may write"),
    "ernie4_5_moe": (
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 12, "moe_num_shared_experts": 1},
        r"model\.layers\.1\.mlp\.gate\.moe_statics\.e_score_correction_bias may write"),
    "granitemoe": (
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        "'granitemoe', whose layers have none .*add_a_family.*llama"),
    "gpt_neo": (
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}, "'gpt_neo', whose layers"),
    "mamba": ({}, "'mamba', whose layers have none of the common shapes"),
}  # fmt: skip


@pytest.mark.parametrize("model_type", list(STRANGE))
def test_a_family_of_another_shape_is_refused_by_what_is_not_understood(model_type: str) -> None:
    config, wanted = STRANGE[model_type]
    model = make_model(model_type, **config)
    with pytest.raises(ModelError, match=wanted):
        find_sites(model)


def test_a_layer_of_another_kind_than_the_first_is_refused() -> None:
    model = make_model("lfm2", layer_types=["full_attention", "conv"])
    with pytest.raises(ModelError, match=r"no linear map model\.layers\.1\.self_attn\.out_proj"):
        find_sites(model)


def test_a_family_can_be_described() -> None:
    sizes = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}
    model = make_model("gpt_neo", **sizes)
    described = Architecture(layers="transformer.h", attn=(Heads("attn.attention.out_proj"),), mlp="mlp.c_proj")
    describe_as(model, described)
    assert [(s.module, s.n, s.width, s.tensor) for s in find_sites(model)] == [
        (f"transformer.h.{layer}.{path}", n, width, f"transformer.h.{layer}.{path}.weight")
        for layer in (0, 1)
        for path, n, width in (("attn.attention.out_proj", 4, 6), ("mlp.c_proj", 40, 1))
    ]
    hooked_baked_and_generated_agree(model)


def test_a_description_goes_before_the_table_and_is_held_to_the_same() -> None:
    model = make_family("llama")
    describe_as(model, Architecture(attn=(Heads(count="num_key_value_heads"),)))
    first = find_sites(model)[0]
    assert (first.key, first.n, first.width) == ("0.attn", 2, 12)
    describe_as(model, Architecture(mlp="mlp.up_proj"))
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj .*weight 40 × 24"):
        find_sites(model)
