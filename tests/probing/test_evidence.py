"""The evidence of a probe: against a plain loop of one text at a time, through files, replicas and edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import oracle
import steer2edit as s2e
from steer2edit.errors import EditError, FileError, TraceError
from steer2edit.files.tensors import read_tensors, write_tensors
from steer2edit.method.preserve import FIRST, REPEL
from steer2edit.probing.chat import CHAT
from steer2edit.probing.collect import collect, probe_of, run_pass
from steer2edit.probing.plan import plan_pass


def _collected(model: Any, tokenizer: Any, traces: Any, **options: Any) -> s2e.Probe:
    groups = {trace.group for trace in traces[1]}
    return collect(model, tokenizer, *traces, preserve=sorted(groups), **options)


@pytest.mark.parametrize("positions", ["predicting", "response"])
@pytest.mark.parametrize("batch_tokens", [1, 400])
def test_each_row_is_the_mean_of_its_part(
    pico: Any, tokenizer: Any, traces: Any, positions: Any, batch_tokens: int
) -> None:
    model = pico()
    evidence = _collected(model, tokenizer, traces, positions=positions, batch_tokens=batch_tokens).evidence
    assert evidence is not None
    runs = oracle.runs_of(tokenizer, [*traces[0], *traces[1]], predicting=positions == "predicting")
    if positions == "response":  # the first part is the prompt's last position all the same
        runs = [(label, group, ids, first - 1, last) for label, group, ids, first, last in runs]
    kept = oracle.capture(model, runs)
    for layer in (0, 1, 2):
        responses = [response.inputs for response in kept[layer, "attn"]]
        rows = []
        for of_response in responses:
            parts = (of_response[:1], of_response[1:FIRST], of_response[FIRST:])
            rows += [part.mean(axis=0) for part in parts if len(part)]
        expected = torch.from_numpy(np.array(rows))
        here = evidence.of(f"{layer}.attn")
        assert here is not None
        assert (evidence.inputs[f"{layer}.attn"].dtype, here.shape) == (torch.int8, expected.shape)
        step = expected.abs().amax(dim=1, keepdim=True) / 127
        assert ((here - expected).abs() <= 0.51 * step).all()
    assert set(evidence.inputs) == {"0.attn", "1.attn", "2.attn"}  # heads alone: neurons are too many


def test_other_groups_are_not_kept_and_the_means_stay(pico: Any, tokenizer: Any, traces: Any) -> None:
    model = pico()
    positive, negative = traces
    without = collect(model, tokenizer, positive, negative)
    assert without.evidence is None
    group = negative[0].group
    probe = collect(model, tokenizer, positive, negative, preserve=[group])
    assert probe.evidence is not None
    assert {row.group for row in probe.evidence.rows if row.label == "negative"} == {group}
    for key, labels in without.outputs.items():
        for label, mean in labels.items():
            assert torch.equal(mean, probe.outputs[key][label])


def test_a_group_that_is_not_there_is_refused(pico: Any, tokenizer: Any, traces: Any) -> None:
    with pytest.raises(TraceError, match="no such group"):
        collect(pico(), tokenizer, *traces, preserve=["elsewhere"])


def test_passes_over_parts_of_the_traces_add_up(pico: Any, tokenizer: Any, traces: Any) -> None:
    model = pico()
    groups = sorted({trace.group for trace in traces[1]})
    plan = plan_pass(
        tokenizer,
        [*traces[0], *traces[1]],
        chat=CHAT,
        part="both",
        positions="predicting",
        max_tokens=4096,
        preserve=groups,
    )
    whole = probe_of(plan, run_pass(model, plan, None, 400), {})
    odd, even = (run_pass(model, plan, range(start, len(plan.spans), 2), 400) for start in (1, 0))
    halves = probe_of(plan, odd + even, {})
    assert whole.evidence is not None
    assert halves.evidence is not None
    assert whole.evidence.rows == halves.evidence.rows
    for key, h in whole.evidence.inputs.items():
        assert (h.int() - halves.evidence.inputs[key].int()).abs().max() <= 1


def test_probe_scores_and_edit_keep_it_through_files(pico: Any, tokenizer: Any, traces: Any, tmp_path: Path) -> None:
    model = pico()
    probe = _collected(model, tokenizer, traces)
    probe.save(tmp_path / "probe.safetensors")
    again = s2e.Probe.load(tmp_path / "probe.safetensors")
    assert again.evidence is not None
    assert probe.evidence is not None
    assert again.evidence.rows == probe.evidence.rows
    assert all(torch.equal(h, probe.evidence.inputs[key]) for key, h in again.evidence.inputs.items())

    scores = s2e.score(model, again)
    scores.save(tmp_path / "scores.safetensors")
    loaded = type(scores).load(tmp_path / "scores.safetensors")
    budget: Any = {"rho_attn": 0.2, "rho_mlp": None, "alpha": 0.2, "preserve": 0.3}
    edit = loaded.edit(**budget)
    assert edit.id == scores.edit(**budget).id != scores.edit(**budget | {"preserve": None}).id
    assert (edit.config["preserve"], edit.config["repel"]) == (0.3, REPEL)
    other = loaded.edit(**budget, repel=0.0)
    assert other.config == {**edit.config, "repel": 0.0}
    assert other.id == scores.edit(**budget, repel=0.0).id != edit.id
    edit.save(tmp_path / "edit.safetensors")
    assert s2e.Edit.load(tmp_path / "edit.safetensors").id == edit.id


def test_what_vectors_share_with_preserved_outputs_is_scored_and_kept(
    pico: Any, tokenizer: Any, traces: Any, tmp_path: Path
) -> None:
    model = pico()
    probe = _collected(model, tokenizer, traces)
    assert probe.evidence is not None
    model.save_pretrained(tmp_path / "model")
    scores = s2e.score(model, probe)
    scores.save(tmp_path / "scores.safetensors")
    from_disk, loaded = s2e.score(tmp_path / "model", probe), s2e.Scores.load(tmp_path / "scores.safetensors")
    rows = probe.evidence.rows
    groups = dict.fromkeys(row.group for row in rows if row.label == "negative")
    for key, s in scores.sites.items():
        if s.site.block == "mlp":
            assert s.shared is None
            continue
        W = model.get_submodule(s.site.module).weight.detach().double().numpy()
        h = probe.evidence.of(key)
        outputs = []
        for part in range(3):
            of_group = [
                [i for i, r in enumerate(rows) if (r.label, r.group, r.part) == ("negative", g, part)] for g in groups
            ]
            outputs.append(W @ np.mean([h[members].double().numpy().mean(axis=0) for members in of_group], axis=0))
        F = np.stack(outputs, axis=1)
        expected = F @ np.linalg.pinv(F) @ s.u.double().numpy()
        for here in (s.shared, from_disk.sites[key].shared, loaded.sites[key].shared):
            assert here is not None
            np.testing.assert_allclose(here.part, expected, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(here.along.flatten(), expected @ W, rtol=1e-3, atol=1e-4)


def test_damaged_shared_parts_are_refused(pico: Any, tokenizer: Any, traces: Any, tmp_path: Path) -> None:
    model, path = pico(), tmp_path / "scores.safetensors"
    s2e.score(model, _collected(model, tokenizer, traces)).save(path)
    tensors, header = read_tensors(path, "scores")
    halves = [
        {name: tensor for name, tensor in tensors.items() if name != half}
        for half in ("1.attn.shared", "1.attn.shared_along")
    ]
    for damaged in (*halves, tensors | {"1.attn.shared": torch.zeros(3)}):
        write_tensors(path, damaged, header)
        with pytest.raises(FileError, match="not a whole scores"):
            s2e.Scores.load(path)


def test_damaged_evidence_is_refused(pico: Any, tokenizer: Any, traces: Any, tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    _collected(pico(), tokenizer, traces).save(path)
    tensors, header = read_tensors(path, "probe")
    for damage in ({"evidence": header["evidence"][1:]}, {"evidence": [["positive"]]}, {"evidence": 7}):
        write_tensors(path, tensors, header | damage)
        with pytest.raises(FileError, match="not a whole probe"):
            s2e.Probe.load(path)


def test_layers_and_components_that_are_off_stay_off(pico: Any, tokenizer: Any, traces: Any) -> None:
    model = pico()
    scores = s2e.score(model, _collected(model, tokenizer, traces))
    budget: Any = {"rho_attn": 0.4, "rho_mlp": 0.4, "alpha": 0.5}
    papers, quiet = (scores.edit(**budget, layers="1-2", preserve=epsilon) for epsilon in (None, 0.3))
    for key, site in quiet.sites.items():
        assert torch.equal(site.lam != 0, papers.sites[key].lam != 0)
        if site.site.block == "mlp":
            assert torch.equal(site.lam, papers.sites[key].lam)
    assert not (quiet.sites["0.attn"].lam != 0).any()


def test_hooks_weights_and_adapter_agree(pico: Any, tokenizer: Any, traces: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    model = pico()
    scores = s2e.score(model, _collected(model, tokenizer, traces))
    edit = scores.edit(rho_attn=0.2, rho_mlp=None, alpha=0.2, preserve=0.3)
    ids = torch.tensor([tokenizer("What is the capital?")["input_ids"]])
    with torch.no_grad():
        base = model(ids).logits
        with edit.applied(model):
            hooked = model(ids).logits
        edit.apply(model)
        baked = model(ids).logits
        edit.revert(model)
        edit.save_adapter(tmp_path / "adapter")
        adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")(ids).logits
    assert float((hooked - base).abs().max()) > 1e-3
    torch.testing.assert_close(hooked, baked, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hooked, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_holds_the_edit_once_and_is_verified(
    pico: Any, tokenizer: Any, traces: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = pico().to(dtype)
    model.save_pretrained(tmp_path / "base")
    scores = s2e.score(model, _collected(model, tokenizer, traces))
    edit = scores.edit(rho_attn=0.1, rho_mlp=None, alpha=0.2, preserve=0.1)
    s2e.export_checkpoint(tmp_path / "base", edit, tmp_path / "edited")
    assert s2e.verify(tmp_path / "base", edit, tmp_path / "edited")["as_expected"]
    # As another process finds it: no mark in memory, the weights alone say it.
    edited = type(model).from_pretrained(tmp_path / "edited", dtype=dtype)
    with pytest.raises(EditError, match="already in this model"):
        edit.apply(edited)
    with pytest.raises(EditError, match="already"):
        s2e.export_checkpoint(tmp_path / "edited", edit, tmp_path / "twice")
    found = {row["site"]: row for row in s2e.diff(tmp_path / "base", tmp_path / "edited")["sites"]}
    assert set(found) == set(edit.edited())
    for key, row in found.items():
        assert (row["rank"], row["components"]) == (1, int((edit.sites[key].lam != 0).sum()))


def test_vectors_from_elsewhere_share_what_they_share(pico: Any, tokenizer: Any, traces: Any, tmp_path: Path) -> None:
    model = pico()
    probe = _collected(model, tokenizer, traces)
    d = probe.sites[0].d
    given = {"1.attn": torch.randn(d, generator=torch.Generator().manual_seed(2)), "2.attn": torch.zeros(d)}
    scores = s2e.score(model, probe, vectors=given)
    scores.save(tmp_path / "scores.safetensors")
    edit = s2e.Scores.load(tmp_path / "scores.safetensors").edit(rho_attn=0.2, rho_mlp=None, alpha=0.0, preserve=0.1)
    assert list(edit.edited()) == ["1.attn"]
    shared = scores.sites["1.attn"].shared
    assert shared is not None
    s = scores.sites["1.attn"]
    expected = s.u - shared.part / 1.1
    torch.testing.assert_close(edit.sites["1.attn"].u, expected / expected.norm(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(edit.sites["1.attn"].u, s.u, atol=0.01)
