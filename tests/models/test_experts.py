"""Inside a mixture of experts: our experts function against transformers' own, what taps see, who is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
import steer2edit as s2e
from families import FAMILIES, MIXTURES, Row, make_family
from steer2edit.errors import ModelError
from steer2edit.method.intervention import Intervention, Term
from steer2edit.models import experts as experts_module
from steer2edit.models.experts import experts_forward, tapped
from steer2edit.report.inspection import describe

LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")


def pairs(tokens: int = 13, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """What a router gives: hidden states [tokens, d], for each token k experts of 4, and their weights."""
    draw = torch.Generator().manual_seed(3)
    chosen = torch.stack([torch.randperm(4, generator=draw)[:k] for _ in range(tokens)])
    return torch.randn(tokens, 24, generator=draw), chosen, torch.rand(tokens, k, generator=draw) + 0.1


def last_experts(model: Any) -> Any:
    return model.model.layers[1].mlp.experts


def mlp_output(model: Any, layer: int, ids: Tensor) -> Tensor:
    """The output of a layer's whole MLP, [rows, time, d]."""
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        kept.append((out if isinstance(out, Tensor) else out[0]).reshape(*ids.shape, -1))

    handle = model.model.layers[layer].mlp.register_forward_hook(keep)
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    return kept[0]


def nothing(expert: int, tokens: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return out


# The experts function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", MIXTURES)
def test_without_a_tap_experts_answer_as_under_transformers_own_functions(name: str, theirs: str) -> None:
    model = make_family(name)
    module = last_experts(model)
    hidden, chosen, weights = pairs()
    chosen[chosen == 3] = chosen[chosen == 3] - 3 if name == "olmoe" else 3  # one family with an expert that gets none
    module.config._experts_implementation = theirs
    with torch.no_grad():
        expected = module(hidden, chosen, weights)
        mine = experts_forward(module, hidden, chosen, weights)
    assert float(expected.norm()) > 1
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    ids = torch.arange(5, 17).view(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        with tapped(model, {module: nothing for module, _ in model.named_modules() if module.endswith(".experts")}):
            mine = model(ids).logits
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_a_token_that_is_sent_nowhere_gets_nothing() -> None:
    module = last_experts(make_family("mixtral"))
    hidden, chosen, weights = pairs()
    chosen[4] = 4  # how transformers marks a choice of another device
    chosen[6, 1] = 4
    module.config._experts_implementation = "eager"
    with torch.no_grad():
        mine = experts_forward(module, hidden, chosen, weights)
        torch.testing.assert_close(mine, module(hidden, chosen, weights), rtol=1e-5, atol=1e-5)
    assert mine[4].tolist() == [0.0] * 24


def test_the_dtype_stays_that_of_the_hidden_states() -> None:
    module = last_experts(make_family("gpt_oss")).to(torch.bfloat16)
    hidden, chosen, weights = pairs()
    with torch.no_grad():
        assert experts_forward(module, hidden.bfloat16(), chosen, weights).dtype == torch.bfloat16


@pytest.mark.parametrize("name", MIXTURES)
def test_a_tap_sees_each_experts_tokens_inputs_and_outputs(name: str) -> None:
    model = make_family(name)
    module, transposed = last_experts(model), name == "gpt_oss"
    hidden, chosen, weights = pairs()
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def tap(expert: int, tokens: Tensor, x: Tensor, out: Tensor) -> Tensor:
        assert expert not in seen
        seen[expert] = (tokens, x, out)
        return out

    with torch.no_grad(), tapped(model, {LAYERS[1]: tap}):
        module(hidden, chosen, weights)
    assert sorted(seen) == [0, 1, 2, 3]
    for expert, (tokens, x, out) in seen.items():
        assert tokens.tolist() == [t for t in range(len(chosen)) if expert in chosen[t]]
        for t, x_t, out_t in zip(tokens.tolist(), x, out, strict=True):
            expected = oracle.expert_input(module, expert, oracle.array(hidden[t]), transposed)
            torch.testing.assert_close(x_t.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
            weight = oracle.array(module.down_proj[expert])
            expected = (weight.T if transposed else weight) @ expected
            expected = expected + oracle.array(module.down_proj_bias[expert]) if transposed else expected
            torch.testing.assert_close(out_t.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


# The context --------------------------------------------------------------------------------------------------------


def test_after_the_context_the_model_is_as_it_was_also_after_an_exception() -> None:
    model = make_family("qwen3_moe")
    modules = [model.get_submodule(name) for name in LAYERS]
    config, expected = model.config, dict(vars(model.config))
    before = [set(vars(module)) for module in modules]

    def failing(expert: int, tokens: Tensor, x: Tensor, out: Tensor) -> Tensor:
        raise ZeroDivisionError

    def check() -> None:
        assert [module.config for module in modules] == [config, config]
        assert all(module.config is config for module in modules)
        assert dict(vars(config)) == expected
        assert [set(vars(module)) for module in modules] == before

    with tapped(model, dict.fromkeys(LAYERS, nothing)):
        assert all(module.config is not config for module in modules)
    check()
    with pytest.raises(RuntimeError, match="in the body"), tapped(model, dict.fromkeys(LAYERS, nothing)):
        raise RuntimeError("in the body")
    check()
    with pytest.raises(ZeroDivisionError), tapped(model, {LAYERS[0]: failing}):
        model(torch.arange(5, 11)[None])
    check()
    with pytest.raises(AttributeError), tapped(model, {LAYERS[0]: nothing, "model.layers.0.mlp.bank": nothing}):
        pass
    check()


def test_nested_contexts_both_apply_the_inner_one_last() -> None:
    model = make_family("gpt_oss")
    module = last_experts(model)
    hidden, chosen, weights = pairs()

    def doubling(expert: int, tokens: Tensor, x: Tensor, out: Tensor) -> Tensor:
        return 2 * out

    def adding(expert: int, tokens: Tensor, x: Tensor, out: Tensor) -> Tensor:
        return out + 1

    with torch.no_grad():
        base = module(hidden, chosen, weights)
        total = weights.sum(1, keepdim=True)
        with tapped(model, {LAYERS[1]: doubling}):
            with tapped(model, {LAYERS[1]: adding}):
                torch.testing.assert_close(module(hidden, chosen, weights), 2 * base + total)
            torch.testing.assert_close(module(hidden, chosen, weights), 2 * base)
        with tapped(model, {LAYERS[1]: adding}), tapped(model, {LAYERS[1]: doubling}):
            torch.testing.assert_close(module(hidden, chosen, weights), 2 * (base + total))
        torch.testing.assert_close(module(hidden, chosen, weights), base)


def test_layers_without_a_tap_keep_their_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_family("mixtral")
    ran: list[Any] = []

    def recording(self: Any, *args: Tensor) -> Tensor:
        ran.append(self)
        return experts_forward(self, *args)

    monkeypatch.setattr(experts_module, "experts_forward", recording)
    with tapped(model, {LAYERS[1]: nothing}):
        model(torch.arange(5, 11)[None])
        assert ran == [last_experts(model)]
        assert model.config._experts_implementation != experts_module.NAME
    model(torch.arange(5, 11)[None])
    assert len(ran) == 1


def test_an_edit_inside_a_probe_is_probed(tokenizer: Any, traces: Any) -> None:
    model = make_family("qwen3_moe")
    edit = s2e.score(model, s2e.collect(model, tokenizer, *traces), expert_tokens=1).edit(
        rho_attn=None, rho_mlp=0.3, alpha=0.2
    )
    with edit.applied(model):
        expected = s2e.collect(model, tokenizer, *traces)
    baked = copy.deepcopy(model)
    edit.apply(baked)
    found = s2e.collect(baked, tokenizer, *traces)
    for key in ("0.mlp", "1.mlp"):
        torch.testing.assert_close(expected.outputs[key]["positive"], found.outputs[key]["positive"], rtol=0, atol=1e-5)


# Experts in the probe and in the scores -----------------------------------------------------------------------------


def rows_of_experts(name: str) -> list[Row]:
    return [row for row in FAMILIES[name].rows if row.expert is not None]


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "gpt_oss"])
def test_an_expert_that_few_tokens_reached_is_named_counted_and_left_alone(
    name: str, tokenizer: Any, traces: Any
) -> None:
    model, rows = make_family(name), rows_of_experts(name)
    runs = oracle.runs_of(tokenizer, [*traces[0], *traces[1]])
    seen = oracle.capture_rows(model, runs, rows)
    counted = {row.key: sum(oracle.reached(seen.routed[row.key], l) for l in ("positive", "negative")) for row in rows}
    for layer in {row.module for row in rows}:  # two experts a token
        tokens = sum(last - first for _, _, _, first, last in runs)
        assert sum(counted[row.key] for row in rows if row.module == layer) == 2 * tokens
    bound = sorted(counted.values())[1]  # at least one expert has fewer, and one exactly so many
    few = {key: n for key, n in counted.items() if n < bound}
    assert few
    probe = s2e.collect(model, tokenizer, *traces)
    assert {site.key: probe.tokens(site) for site in probe.sites if site.expert is not None} == counted
    assert probe.tokens(probe.sites[0]) is None
    scores = s2e.score(model, probe, expert_tokens=bound)
    assert scores.provenance["experts_left_alone"] == few
    assert scores.provenance["expert_tokens"] == bound
    assert scores.provenance["sites_without_vector"] == []
    assert set(scores.sites) == {site.key for site in probe.sites} - set(few)
    before = {row.key: getattr(model.get_submodule(row.module), row.parameter)[row.expert].clone() for row in rows}
    edit = scores.edit(rho_attn=0.1, rho_mlp=0.1, alpha=0.0)
    edit.apply(model)
    for row in rows:
        same = torch.equal(getattr(model.get_submodule(row.module), row.parameter)[row.expert], before[row.key])
        assert same == (row.key in few)


def test_an_expert_that_no_token_reached_has_means_of_zero_and_a_score_of_zero(tokenizer: Any, traces: Any) -> None:
    model = make_family("gpt_oss")
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[2] = -1e4
    probe = s2e.collect(model, tokenizer, *traces)
    assert probe.counts["experts"]["1.mlp.2"] == {"positive": 0, "negative": 0}
    for label in ("positive", "negative"):
        assert torch.equal(probe.inputs["1.mlp.2"][label], torch.zeros(40))
    scores = s2e.score(model, probe, expert_tokens=1)
    assert scores.provenance["experts_left_alone"]["1.mlp.2"] == 0
    assert "1.mlp.2" not in scores.sites
    assert torch.equal(s2e.score(model, probe, expert_tokens=0).sites["1.mlp.2"].g, torch.zeros(40))


def test_an_expert_that_one_label_alone_reached_has_that_labels_mean(tokenizer: Any, traces: Any) -> None:
    model = make_family("mixtral")
    probe = s2e.collect(model, tokenizer, *traces)
    (site,) = (site for site in probe.sites if site.key == "0.mlp.1")
    means = probe.inputs[site.key]
    torch.testing.assert_close(probe.mean_input(site), (means["positive"] + means["negative"]) / 2)
    probe.counts["experts"][site.key]["negative"] = 0
    assert torch.equal(probe.mean_input(site), means["positive"])


def test_a_vector_for_a_block_is_every_experts_and_one_for_an_expert_its_own(tokenizer: Any, traces: Any) -> None:
    model = make_family("qwen2_moe")
    probe = s2e.collect(model, tokenizer, *traces)
    v, own = torch.randn(24), torch.randn(24)
    scores = s2e.score(model, probe, vectors={"1.mlp": v, "1.mlp.2": own}, expert_tokens=1)
    expected = {f"1.mlp.{part}": own if part == 2 else v for part in (0, 1, 2, 3, "shared")}
    assert list(scores.sites) == list(expected)
    for key, vector in expected.items():
        torch.testing.assert_close(scores.sites[key].u, vector / vector.norm())
    assert scores.provenance["sites_without_vector"] == ["0.attn", "0.mlp", "1.attn"]


# Interventions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_steering_a_mixtures_block_moves_its_output_by_gamma_v(name: str) -> None:
    model = make_family(name)
    v, gamma = torch.randn(24), -1.5
    ids = torch.arange(5, 17).view(2, 6)
    base = mlp_output(model, 1, ids)
    with s2e.intervening(model, s2e.steering({"1.mlp": v}, gamma)) as running:
        moved = mlp_output(model, 1, ids)
        assert (running.sites, running.calls) == (1, 1)
    torch.testing.assert_close(moved - base, (gamma * v).expand_as(base), rtol=1e-5, atol=1e-5)


def _terms(scale: float) -> dict[str, Term]:
    draw = torch.Generator().manual_seed(int(10 * scale))
    return {
        f"1.mlp.{e}": Term(scale * torch.randn(24, 1, generator=draw), torch.randn(1, 12, generator=draw))
        for e in (1, 2)
    }


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "qwen2_moe"])
def test_an_expert_gains_u_of_a_times_its_own_input_on_the_tokens_sent_to_it_alone(name: str) -> None:
    model = make_family(name)
    ids = torch.randint(3, 300, (3, 7))
    table = [s2e.NOTHING, Intervention("one", _terms(1.0)), Intervention("other", _terms(0.5))]
    sent: list[Any] = []
    handle = last_experts(model).register_forward_pre_hook(
        lambda module, args, kwargs: sent.append([*args, *kwargs.values()]), with_kwargs=True
    )
    base = mlp_output(model, 1, ids)
    handle.remove()
    hidden, chosen, weights = sent[0]
    rows = [2, 0, 1]
    expected = torch.zeros(21, 24, dtype=torch.float64)
    for token in range(21):
        terms = table[rows[token // 7]].terms
        for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            if term := terms.get(f"1.mlp.{expert}"):
                assert term.u is not None
                assert term.a is not None
                x = oracle.expert_input(last_experts(model), expert, oracle.array(hidden[token]), transposed=False)
                expected[token] += weight * term.u[:, 0].double() * oracle.dot(term.a[0].tolist(), x)
    assert int((expected.norm(dim=1) > 0).sum()) > 4
    with s2e.Interventions(model, table) as running:
        running.rows(rows)
        moved = mlp_output(model, 1, ids)
        assert (running.sites, running.calls) == (1, 1)
    torch.testing.assert_close((moved - base).view(21, 24).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "term", "expected"),
    [
        ("1.mlp", Term(torch.zeros(24, 1), torch.zeros(1, 12)), r"does not fit block 1\.mlp"),
        ("1.mlp.0", Term(torch.zeros(24, 1), torch.zeros(1, 40)), r"does not fit site 1\.mlp\.0 .*24 × 12"),
        ("1.mlp.4", Term(b=torch.zeros(24)), r"sites that the model does not have .*1\.mlp\.4"),
        ("1.mlp.shared", Term(b=torch.zeros(24)), r"sites that the model does not have .*1\.mlp\.shared"),
    ],
)
def test_what_does_not_fit_an_expert_or_its_block_is_refused(key: str, term: Term, expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        s2e.Interventions(make_family("qwen3_moe"), [Intervention("strange", {key: term})])


def test_one_announced_row_serves_a_batch_of_any_size() -> None:
    model = make_family("gpt_oss")
    term = Term(torch.randn(24, 2), torch.randn(2, 40), torch.randn(24))
    ids = torch.randint(3, 300, (3, 7))
    with s2e.Interventions(model, [s2e.NOTHING, Intervention("one", {"0.mlp.0": term, "1.mlp.1": term})]) as running:
        running.rows([1])
        once = mlp_output(model, 1, ids)
        running.rows([1, 1, 1])
        torch.testing.assert_close(mlp_output(model, 1, ids), once, rtol=1e-5, atol=1e-5)


def test_steering_and_an_edit_of_the_experts_add_up(make_mixture: Callable[[], Any]) -> None:
    model = make_mixture()
    ids, v = torch.randint(3, 300, (2, 7)), torch.randn(24)
    terms = {"1.mlp.1": Term(torch.randn(24, 1), torch.randn(1, 12))}
    with s2e.intervening(model, Intervention("edit", terms)):
        edited = mlp_output(model, 1, ids)
    with s2e.intervening(model, Intervention("both", {**terms, "1.mlp": Term(b=v)})):
        both = mlp_output(model, 1, ids)
    torch.testing.assert_close(both - edited, v.expand_as(both), rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["qwen2_moe", "qwen3_next"])
def make_mixture(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return lambda: make_family(request.param)


def test_a_probe_of_experts_can_be_inspected(tokenizer: Any, traces: Any, tmp_path: Path) -> None:
    s2e.collect(make_family("mixtral"), tokenizer, *traces).save(tmp_path / "probe.safetensors")
    rows = describe(tmp_path / "probe.safetensors")["sites"]
    assert [row["site"] for row in rows[:3]] == ["0.attn", "0.mlp.0", "0.mlp.1"]
    assert rows[1]["|v|"] == rows[2]["|v|"] > 0  # the vector is the block's
