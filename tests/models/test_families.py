"""Every family from sites to exports: against rows written by hand, the oracle's loops, and transformers itself."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import oracle
import steer2edit as s2e
from families import FAMILIES, MIXTURES, D, make_family
from family_cases import BUDGET, CLOSE, PROMPTS, Case, applied, greedy, ids_of, logits, made_case, same_state, state
from steer2edit.artefacts.bases import open_base
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import EditError, ModelError
from steer2edit.method.intervention import Term
from steer2edit.models.sites import find_sites


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return partial(made_case, tmp_path_factory)


@pytest.fixture(params=list(FAMILIES))
def case(request: pytest.FixtureRequest, make_case: Any) -> Case:
    return make_case(request.param)


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest, make_case: Any) -> Case:
    return make_case(request.param)


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
