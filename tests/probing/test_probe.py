"""Means over traces: against a plain loop of one text at a time that keeps every activation."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import oracle
from steer2edit.errors import FileError, ProbeError, TraceError
from steer2edit.files.tensors import read_tensors, write_tensors
from steer2edit.models.sites import find_sites
from steer2edit.models.weights import weight_of
from steer2edit.probing.chat import CHAT
from steer2edit.probing.collect import _Sum, batches_by_length, collect, probe_of, run_pass
from steer2edit.probing.plan import plan_pass
from steer2edit.probing.probe import Probe
from steer2edit.probing.traces import Trace


def same_means(here: Probe, there: Probe, tolerance: float = 1e-5) -> None:
    assert here.sites == there.sites
    sides: Any = ((here.inputs, there.inputs), (here.outputs, there.outputs), (here.residual, there.residual))
    for mine, theirs in sides:
        assert mine.keys() == theirs.keys()
        for key, labels in mine.items():
            for label, mean in labels.items():
                other = theirs[key][label]
                assert float((mean - other).norm()) <= tolerance * float(other.norm()), (key, label)


def means(probe: Probe, label: str) -> dict[str, torch.Tensor]:
    """All means of one label, by name."""
    sides = (("input", probe.inputs), ("output", probe.outputs), ("residual", probe.residual))
    return {f"{key}.{side}": labels[label] for side, table in sides for key, labels in table.items()}  # type: ignore[index]


# What is measured ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["predicting", "response"])
def test_the_means_equal_a_plain_loop(variant: Any, tokenizer: Any, traces: Any, positions: Any) -> None:
    probe = collect(variant, tokenizer, *traces, positions=positions, batch_tokens=1)
    runs = oracle.runs_of(tokenizer, [*traces[0], *traces[1]], predicting=positions == "predicting")
    for (layer, block), responses in oracle.capture(variant, runs).items():
        for label in ("positive", "negative"):
            for side, table in (("inputs", probe.inputs), ("outputs", probe.outputs)):
                mean = table[f"{layer}.{block}"][label]
                assert mean.dtype == torch.float32
                expected = torch.from_numpy(oracle.label_mean(responses, label, side))
                torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6)
    assert probe.counts["positive"]["tokens"] == sum(last - first for l, _, _, first, last in runs if l == "positive")


@pytest.mark.parametrize("positions", ["predicting", "response"])
def test_the_means_of_the_residual_stream_equal_a_plain_loop(
    variant: Any, tokenizer: Any, traces: Any, positions: Any
) -> None:
    probe = collect(variant, tokenizer, *traces, positions=positions, batch_tokens=1)
    runs = oracle.runs_of(tokenizer, [*traces[0], *traces[1]], predicting=positions == "predicting")
    streams = oracle.capture_streams(variant, runs)
    assert list(probe.residual) == list(streams) == [0, 1, 2]
    for layer, responses in streams.items():
        for label in ("positive", "negative"):
            mean = probe.residual[layer][label]
            assert (mean.dtype, tuple(mean.shape)) == (torch.float32, (variant.config.hidden_size,))
            expected = torch.from_numpy(oracle.label_mean(responses, label, "outputs"))
            torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6)


def test_what_a_layers_blocks_write_is_what_the_stream_gains_there(pico: Any, tokenizer: Any, traces: Any) -> None:
    probe = collect(pico(), tokenizer, *traces)
    for layer in (1, 2):
        for label in ("positive", "negative"):
            gained = probe.residual[layer][label] - probe.residual[layer - 1][label]  # type: ignore[index]
            written = sum(probe.outputs[f"{layer}.{block}"][label] for block in ("attn", "mlp"))  # type: ignore[index]
            torch.testing.assert_close(gained, written, rtol=0, atol=1e-5)


def test_neither_the_batch_nor_the_order_nor_the_padding_side_changes_the_means(
    fp32_variant: Any, tokenizer: Any, traces: Any
) -> None:
    expected = collect(fp32_variant, tokenizer, *traces, batch_tokens=1)
    for batch_tokens in (64, 4096):
        same_means(collect(fp32_variant, tokenizer, *traces, batch_tokens=batch_tokens), expected)
    mixed = [*traces[0], *traces[1]]
    random.Random(1).shuffle(mixed)
    assert mixed != [*traces[0], *traces[1]]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        probe = collect(fp32_variant, tokenizer, mixed, batch_tokens=96)
        same_means(probe, expected)
        assert probe.counts == expected.counts


def test_a_long_activation_is_summed_in_chunks(pico: Any, tokenizer: Any, traces: Any, monkeypatch: Any) -> None:
    model = pico()
    expected = collect(model, tokenizer, *traces)
    monkeypatch.setattr("steer2edit.probing.collect.CHUNK", 7)
    same_means(collect(model, tokenizer, *traces), expected, 1e-6)


def test_each_response_weighs_alike_whatever_its_length(pico: Any, tokenizer: Any, traces: Any) -> None:
    model, negative = pico(), traces[1]
    short, long = replace(traces[0][2], group=""), replace(traces[0][1], group="")
    assert len(long.response) > 10 * len(short.response)
    both = means(collect(model, tokenizer, [short, long], negative), "positive")
    one = means(collect(model, tokenizer, [short], negative), "positive")
    other = means(collect(model, tokenizer, [long], negative), "positive")
    for name, mean in both.items():
        torch.testing.assert_close(mean, (one[name] + other[name]) / 2, rtol=1e-5, atol=1e-6)


def test_a_labels_mean_is_the_mean_over_its_groups(pico: Any, tokenizer: Any, traces: Any) -> None:
    model, (positive, negative) = pico(), traces
    assert [t.group for t in positive] == ["harmful", "plain", "harmful"]
    probe = collect(model, tokenizer, positive, negative)
    harmful = means(collect(model, tokenizer, [positive[0], positive[2]], negative), "positive")
    plain = means(collect(model, tokenizer, [positive[1]], negative), "positive")
    for name, mean in means(probe, "positive").items():
        torch.testing.assert_close(mean, (harmful[name] + plain[name]) / 2, rtol=1e-5, atol=1e-6)
    assert probe.counts["positive"]["groups"] == {"harmful": 2, "plain": 1}


def test_a_group_whose_responses_are_all_empty_has_no_weight(pico: Any, tokenizer: Any, traces: Any) -> None:
    model, (positive, negative) = pico(), traces
    expected = collect(model, tokenizer, positive, negative)
    silent = Trace("Hello?", "", "positive", group="silent")
    probe = collect(model, tokenizer, [*positive, silent], negative)
    same_means(probe, expected, 1e-6)
    assert probe.counts["positive"] == expected.counts["positive"]


def test_v_is_the_weight_times_the_difference_of_mean_inputs(variant: Any, tokenizer: Any, traces: Any) -> None:
    probe = collect(variant, tokenizer, *traces)
    loose = 0.02 if variant.dtype == torch.bfloat16 else 1e-5
    for site in find_sites(variant):
        inputs = probe.inputs[site.key]
        expected = weight_of(variant, site).detach().float() @ (inputs["positive"] - inputs["negative"])
        assert float((probe.vector(site) - expected).norm()) < loose * float(expected.norm())
        assert torch.equal(probe.mean_input(site), (inputs["positive"] + inputs["negative"]) / 2)


def test_an_output_bias_is_in_the_means_and_cancels_in_v(pico: Any, tokenizer: Any, traces: Any) -> None:
    model = pico("llama", attention_bias=True, mlp_bias=True)
    probe = collect(model, tokenizer, *traces)
    for site in probe.sites:
        weight, bias = weight_of(model, site), model.get_submodule(site.module).bias
        inputs, outputs = probe.inputs[site.key], probe.outputs[site.key]
        torch.testing.assert_close(outputs["positive"], weight @ inputs["positive"] + bias, rtol=1e-4, atol=1e-5)
        expected = weight @ (inputs["positive"] - inputs["negative"])
        torch.testing.assert_close(probe.vector(site), expected.detach(), rtol=1e-4, atol=1e-5)


# Whether two halves agree -------------------------------------------------------------------------------------------


def halves(probe: Probe) -> dict[str, float | None]:
    return probe.provenance["halves_agree"]


def the_same(traces: list[Trace], label: str, group: str = "") -> list[Trace]:
    return [replace(t, label=label, group=group) for t in traces]  # type: ignore[arg-type]


def test_the_halves_agree_as_the_vectors_of_every_other_response_do(pico: Any, tokenizer: Any, traces: Any) -> None:
    model = pico()
    both = [*traces[0], *traces[1]]
    # Three responses of one group, two of another, and one of a third, which is in no half; two negative ones.
    positive = [replace(both[i % 5], group="a" if i < 3 else "b", label="positive") for i in (0, 1, 2, 3, 4)]
    positive.insert(2, replace(both[0], group="alone"))
    negative = [replace(t, label="negative", group="") for t in (traces[1][0], traces[0][1])]
    expected = halves(collect(model, tokenizer, positive, negative))
    a, b = ([t for t in positive if t.group == group] for group in "ab")
    first, second = (
        collect(model, tokenizer, [*a[half::2], *b[half::2]], negative[half::2], batch_tokens=1) for half in (0, 1)
    )
    for block in ("attn", "mlp"):
        cosines = [
            float(torch.nn.functional.cosine_similarity(first.vector(site), second.vector(site), dim=0))
            for site in first.sites
            if site.block == block
        ]
        assert len(cosines) == 3
        assert expected[block] == pytest.approx(sorted(cosines)[1], abs=1e-5)
        assert -0.99 < sorted(cosines)[1] < 0.99
    # However the responses share batches.
    for batch_tokens in (1, 64):
        again = halves(collect(model, tokenizer, positive, negative, batch_tokens=batch_tokens))
        assert again == {block: pytest.approx(cosine, abs=1e-5) for block, cosine in expected.items()}


def test_equal_halves_agree_wholly_and_swapped_ones_are_opposed(pico: Any, tokenizer: Any, traces: Any) -> None:
    model = pico()
    shows, does_not = the_same(traces[0][:1], "positive"), the_same(traces[1][:1], "negative")
    twice = halves(collect(model, tokenizer, shows * 2, does_not * 2))
    assert twice == {"attn": pytest.approx(1.0, abs=1e-5), "mlp": pytest.approx(1.0, abs=1e-5)}
    swapped = halves(
        collect(
            model,
            tokenizer,
            [*shows, *the_same(does_not, "positive")],
            [*does_not, *the_same(shows, "negative")],
        )
    )
    assert swapped == {"attn": pytest.approx(-1.0, abs=1e-5), "mlp": pytest.approx(-1.0, abs=1e-5)}


def test_a_side_with_a_single_response_has_no_halves(pico: Any, tokenizer: Any, traces: Any) -> None:
    model, (positive, negative) = pico(), traces
    for some in ((positive, negative[:1]), (positive[:1], negative)):
        assert halves(collect(model, tokenizer, *some)) == {"attn": None, "mlp": None}
    # Nor has one whose groups have a single response each.
    apart = [replace(t, group=str(i)) for i, t in enumerate(positive)]
    assert halves(collect(model, tokenizer, apart, negative)) == {"attn": None, "mlp": None}
    assert halves(collect(model, tokenizer, positive, negative))["attn"] is not None


def test_parts_of_a_pass_add_up_to_the_whole_pass(pico: Any, tokenizer: Any, traces: Any) -> None:
    model = pico()
    plan = plan_pass(
        tokenizer, [*traces[0], *traces[1]], chat=CHAT, part="both", positions="predicting", max_tokens=4096
    )
    whole = run_pass(model, plan, None, 1024)
    assert {len(total) for total in whole.totals.values()} == {2 * len(plan.groups)} == {6}
    assert plan.rows == [2, 4, 3, 0, 1]  # groups negative, positive harmful, positive plain; two rows each
    parts = run_pass(model, plan, [3, 0], 1024) + run_pass(model, plan, [1, 2, 4], 1024)
    one, other = (probe_of(plan, sums, {}) for sums in (whole, parts))
    same_means(other, one, 1e-6)
    assert halves(other) == {block: pytest.approx(cosine, abs=1e-6) for block, cosine in halves(one).items()}


# What counts --------------------------------------------------------------------------------------------------------


def test_empty_responses_are_skipped_and_counted(pico: Any, tokenizer: Any, traces: Any) -> None:
    model, (positive, negative) = pico(), traces
    expected = collect(model, tokenizer, positive, negative)
    empty = [replace(positive[0], response=text) for text in ("", "  \n", "<|im_end|>")]
    probe = collect(model, tokenizer, [*empty, *positive], [*negative, replace(negative[0], response="")])
    same_means(probe, expected, 0)
    assert probe.counts["skipped_empty"] == {"positive": 3, "negative": 1}
    assert probe.counts["positive"] == expected.counts["positive"]
    assert probe.counts["positive"]["responses"] == 3


def test_traces_of_one_side_alone_are_refused(pico: Any, tokenizer: Any, traces: Any) -> None:
    positive, negative = traces
    with pytest.raises(TraceError, match=r"no negative trace .*got: 0 negative traces"):
        collect(pico(), tokenizer, positive)
    with pytest.raises(TraceError, match=r"no positive trace .*got: 0 positive traces"):
        collect(pico(), tokenizer, negative, negative)  # a trace's own label counts, not where it stands
    with pytest.raises(TraceError, match="no positive trace"):
        collect(pico(), tokenizer, [], [])


def test_a_side_without_a_single_response_is_refused(pico: Any, tokenizer: Any, traces: Any) -> None:
    positive, negative = traces
    empty = [replace(t, response=" ") for t in negative]
    with pytest.raises(TraceError, match=r"no negative trace .*2 negative traces, 2 of them without a response"):
        collect(pico(), tokenizer, positive, empty)


def test_max_tokens_cuts_and_counts(pico: Any, tokenizer: Any, traces: Any) -> None:
    model, (positive, negative) = pico(), traces
    runs = oracle.runs_of(tokenizer, positive)
    limit = len(runs[1][2]) + 1 - 4  # takes four tokens of the longest response
    assert sorted(len(ids) + 1 > limit for _, _, ids, _, _ in runs) == [False, False, True]
    probe = collect(model, tokenizer, positive, negative, max_tokens=limit)
    whole = collect(model, tokenizer, positive, negative)
    assert probe.counts["cut_at_max_tokens"] == {"positive": 1, "negative": 0}
    assert whole.counts["cut_at_max_tokens"] == {"positive": 0, "negative": 0}
    assert probe.counts["positive"]["tokens"] == whole.counts["positive"]["tokens"] - 4
    cut = [(*run[:2], run[2][:-4], run[3], run[4] - 4) if i == 1 else run for i, run in enumerate(runs)]
    for (layer, block), responses in oracle.capture(model, cut).items():
        expected = torch.from_numpy(oracle.label_mean(responses, "positive", "inputs")).float()
        torch.testing.assert_close(probe.inputs[f"{layer}.{block}"]["positive"], expected, rtol=1e-5, atol=1e-5)


def test_a_response_that_lies_behind_max_tokens_is_skipped(pico: Any, tokenizer: Any, traces: Any) -> None:
    positive, negative = traces
    long_prompt = replace(positive[0], prompt="word " * 40)
    probe = collect(pico(), tokenizer, [long_prompt, *positive], negative, max_tokens=120)
    assert probe.counts["skipped_empty"] == {"positive": 1}
    assert probe.counts["cut_at_max_tokens"]["positive"] == 1


def test_the_pass_reports_its_progress_and_leaves_the_head_alone(pico: Any, tokenizer: Any, traces: Any) -> None:
    model, seen = pico(), []
    heads = []
    model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    collect(model, tokenizer, *traces, batch_tokens=1, check=False, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert heads == []


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_batches_hold_every_trace_once_and_at_most_batch_tokens(lengths: list[int], batch_tokens: int) -> None:
    batches = batches_by_length(lengths, batch_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens


# What must never enter a mean ---------------------------------------------------------------------------------------


def only_in(tokenizer: Any, trace: Trace, others: list[Trace]) -> int:
    """A token of this trace's response that no other text has."""
    texts = [oracle.runs_of(tokenizer, [t])[0][2] for t in others]
    ids = oracle.runs_of(tokenizer, [trace])[0][2]
    return next(i for i in ids if all(i not in text for text in texts))


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_an_infinite_activation_is_refused_by_its_site_and_trace(
    pico: Any, tokenizer: Any, traces: Any, batch_tokens: int
) -> None:
    model, (positive, negative) = pico(), traces
    poisoned = negative[1]
    token = only_in(tokenizer, poisoned, [*positive, negative[0]])
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = math.inf
    with pytest.raises(ProbeError, match=r"site 0\.attn is not finite .*How do I bake bread.*Sure, mix flour"):
        collect(model, tokenizer, positive, negative, batch_tokens=batch_tokens)
    collect(model, tokenizer, positive, [negative[0]], batch_tokens=batch_tokens)  # without it all is well
    assert not any(module._forward_hooks for module in model.modules())


def test_the_site_that_is_named_is_the_first_one_not_finite(pico: Any, tokenizer: Any, traces: Any) -> None:
    model = pico()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = math.inf
    with pytest.raises(ProbeError, match=r"site 1\.mlp is not finite"):
        collect(model, tokenizer, *traces)


def test_a_trace_with_a_source_is_named_by_it(pico: Any, tokenizer: Any, traces: Any) -> None:
    model, (positive, negative) = pico(), traces
    assert positive[2].source == "row 3"
    token = only_in(tokenizer, positive[2], [*positive[:2], *negative])
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = math.nan
    with pytest.raises(ProbeError, match=r"got: the trace 'row 3', response 'No\.'"):
        collect(model, tokenizer, positive, negative)


@pytest.mark.parametrize("value", [1e4, math.inf])
def test_what_stands_in_the_padding_does_not_matter(pico: Any, tokenizer: Any, traces: Any, value: float) -> None:
    model = pico()
    expected = collect(model, tokenizer, *traces, batch_tokens=1)
    everything = [oracle.runs_of(tokenizer, [t])[0][2] for t in (*traces[0], *traces[1])]
    assert all(0 not in ids for ids in everything)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = value
    same_means(collect(model, tokenizer, *traces, batch_tokens=4096), expected)


def test_compensated_fp32_sums_agree_with_fp64() -> None:
    draw = torch.Generator().manual_seed(0)
    terms = torch.randn(4000, 2, 3, generator=draw)
    terms[0], terms[-1] = 1e7, -1e7  # what a plain fp32 sum would lose
    exact, compensated, plain = _Sum(2, 3, torch.device("cpu")), _Sum(2, 3, torch.device("cpu")), torch.zeros(2, 3)
    compensated.total, compensated.lost = torch.zeros(2, 3), torch.zeros(2, 3)  # as on a device without fp64
    for term in terms:
        exact.add(term)
        compensated.add(term)
        plain += term
    expected = terms.double().sum(dim=0)
    torch.testing.assert_close(exact.value(), expected, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(compensated.value(), expected, rtol=0, atol=1e-3)
    assert float((plain.double() - expected).abs().min()) > 0.1


def test_a_device_without_fp64_gets_compensated_sums(monkeypatch: Any) -> None:
    zeros = torch.zeros

    def here(*shape: int, dtype: Any = None, device: Any = None) -> torch.Tensor:
        return zeros(*shape, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", here)
    total = _Sum(1, 2, torch.device("mps"))
    assert total.total.dtype == torch.float32
    assert total.lost is not None
    assert _Sum(1, 2, torch.device("cpu")).total.dtype == torch.float64


# Files --------------------------------------------------------------------------------------------------------------


def test_a_probe_comes_back_from_a_file_as_it_went(pico: Any, tokenizer: Any, traces: Any, tmp_path: Path) -> None:
    model = pico()
    model.config._commit_hash = "0123456789abcdef"  # as the Hub's models have it when they are loaded
    probe = collect(model, tokenizer, *traces, max_tokens=60, positions="response")
    probe.save(tmp_path / "probe.safetensors")
    back = Probe.load(tmp_path / "probe.safetensors")
    assert (back.sites, back.counts, back.provenance) == (probe.sites, probe.counts, probe.provenance)
    for label in ("positive", "negative"):
        here, there = means(back, label), means(probe, label)
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)
    assert list(back.residual) == [0, 1, 2]
    expected = {"model_type": "llama", "dtype": "float32", "positions": "response", "part": "both", "max_tokens": 60}
    assert expected.items() <= back.provenance.items()
    assert back.provenance["commit"] == "0123456789abcdef"


def test_a_broken_probe_file_is_refused(pico: Any, tokenizer: Any, traces: Any, tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    collect(pico(), tokenizer, *traces).save(path)
    whole = path.read_bytes()
    tensors, header = read_tensors(path, "probe")
    for length in (0, 8, 200, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match="not a whole safetensors file"):
            Probe.load(path)
    name = "1.mlp.input.negative"
    for broken in ({name: tensors[name][1:]}, {name: tensors[name][None]}):
        write_tensors(path, tensors | broken, header)
        with pytest.raises(FileError, match="not a whole probe"):
            Probe.load(path)
    write_tensors(path, {key: value for key, value in tensors.items() if key != name}, header)
    with pytest.raises(FileError, match="not a whole probe"):
        Probe.load(path)
    write_tensors(path, tensors | {name: torch.full_like(tensors[name], math.nan)}, header)
    with pytest.raises(FileError, match=f"tensor {name} .*not finite"):
        Probe.load(path)


def test_a_probe_of_before_has_no_means_of_the_stream(pico: Any, tokenizer: Any, traces: Any, tmp_path: Path) -> None:
    probe = collect(pico(), tokenizer, *traces)
    replace(probe, residual={}).save(tmp_path / "old.safetensors")
    back = Probe.load(tmp_path / "old.safetensors")
    assert back.residual == {}
    assert means(back, "positive").keys() == {n for n in means(probe, "positive") if not n.endswith("residual")}


@pytest.mark.parametrize("name", ["1.residual.positive", "1.residual.negative", "2.residual.positive"])
def test_means_of_the_stream_that_are_not_whole_are_refused(
    name: str, pico: Any, tokenizer: Any, traces: Any, tmp_path: Path
) -> None:
    path = tmp_path / "probe.safetensors"
    collect(pico(), tokenizer, *traces).save(path)
    tensors, header = read_tensors(path, "probe")
    without = {key: value for key, value in tensors.items() if key != name}
    for broken in (without, tensors | {name: tensors[name][1:]}):
        write_tensors(path, broken, header)
        with pytest.raises(FileError, match="not a whole probe"):
            Probe.load(path)
