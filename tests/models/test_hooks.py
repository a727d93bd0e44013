"""out += u(aᵀx) + b: hooks, baked weights and PEFT adapters say the same, and each row of a batch has its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import steer2edit as s2e
from steer2edit.engines import transformers as engine_module
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import ModelError, Steer2EditError
from steer2edit.method.intervention import NOTHING, Intervention, Term, steering
from steer2edit.models.hooks import Interventions, intervening
from steer2edit.models.sites import find_sites


def batch(rows: int = 3, time: int = 12) -> Tensor:
    return torch.randint(3, 300, (rows, time), generator=torch.Generator().manual_seed(5))


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def vectors(model: Any, size: float = 1.0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(11)
    return {site.key: size * torch.randn(site.d, generator=draw) for site in find_sites(model)}


@contextmanager
def steered_by_hand(model: Any, by: Mapping[str, Tensor], gamma: float) -> Iterator[None]:
    """out += γv with hooks of the test's own."""
    handles = []
    for number, layer in enumerate(model.model.layers):
        for block, module in (("attn", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
            if (v := by.get(f"{number}.{block}")) is not None:
                handles.append(module.register_forward_hook(lambda m, x, out, v=v: out + gamma * v))
    yield
    for handle in handles:
        handle.remove()


def baked(model: Any, edit: s2e.Edit) -> Any:
    other = copy.deepcopy(model)
    edit.apply(other)
    return other


def hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


# One intervention ---------------------------------------------------------------------------------------------------


def test_hooks_baked_weights_and_a_peft_adapter_give_the_same_logits(
    fp32_variant: Any, make_edit: Callable[..., s2e.Edit], tmp_path: Any
) -> None:
    model, ids = fp32_variant, batch()
    edit = make_edit(model).with_strength(0.7)
    base = logits(model, ids)
    with edit.applied(model):
        hooked = logits(model, ids)
    weights = baked(model, edit)
    edit.save_adapter(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter"))
    assert float((hooked - base).abs().max()) > 0.5
    torch.testing.assert_close(hooked, logits(weights, ids), rtol=0, atol=1e-4)
    torch.testing.assert_close(hooked, logits(adapted, ids), rtol=0, atol=1e-4)
    assert torch.equal(logits(model, ids), base)


def test_an_edit_in_bf16_moves_the_logits_as_in_fp32(pico: Any, make_edit: Callable[..., s2e.Edit]) -> None:
    ids, half = batch(), pico(dtype=torch.bfloat16)
    exact = copy.deepcopy(half).float()
    edit = make_edit(exact)
    expected = logits(exact, ids)
    with edit.applied(exact):
        moved = logits(exact, ids) - expected
    with edit.applied(half):
        here = logits(half, ids).float() - expected
    assert float((here - moved).norm()) < 0.1 * float(moved.norm())


@pytest.mark.parametrize("gamma", [0.7, -0.3])
def test_steering_adds_gamma_v_at_every_site(fp32_variant: Any, gamma: float) -> None:
    model, ids, by = fp32_variant, batch(), vectors(fp32_variant)
    with steered_by_hand(model, by, gamma):
        expected = logits(model, ids)
    intervention = steering(by, gamma)
    assert intervention.name == f"steering γ={gamma}"
    with intervening(model, intervention) as running:
        here = logits(model, ids)
    assert running.calls == running.sites == 6
    torch.testing.assert_close(here, expected, rtol=0, atol=1e-5)
    assert float((expected - logits(model, ids)).abs().max()) > 0.5


def test_steering_one_site_leaves_the_others_unhooked(pico: Any) -> None:
    model, ids = pico(), batch()
    by = {"1.mlp": vectors(model)["1.mlp"]}
    with steered_by_hand(model, by, 2.0):
        expected = logits(model, ids)
    with intervening(model, steering(by, 2.0)) as running:
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)
        assert running.calls == hooks(model) == 1


def test_nothing_changes_nothing(pico: Any) -> None:
    model, ids = pico(), batch()
    base = logits(model, ids)
    with intervening(model, NOTHING) as running:
        assert hooks(model) == 0
        assert torch.equal(logits(model, ids), base)
    assert (running.calls, running.sites) == (0, 0)
    # Beside others it is a row of zeros, which changes no bit either.
    with Interventions(model, [NOTHING, steering(vectors(model), 1.0)]) as running:
        running.rows([0, 1, 0])
        mixed = logits(model, ids)
    assert torch.equal(mixed[[0, 2]], base[[0, 2]])
    assert not torch.equal(mixed[1], base[1])


# A different one in every row ---------------------------------------------------------------------------------------


def table_for(model: Any, make_edit: Callable[..., s2e.Edit]) -> list[Intervention]:
    """Nothing, two edits, steering, an edit of rank two, and one with all three parts at two sites."""
    draw = torch.Generator().manual_seed(3)
    site = find_sites(model)[2]
    u, a = 0.3 * torch.randn(site.d, 2, generator=draw), torch.randn(2, site.inputs, generator=draw)
    by = vectors(model)
    return [
        NOTHING,
        make_edit(model, 0.2, None, 0.2).intervention("attention only"),
        make_edit(model, None, 0.4, 0.2).with_strength(-1).intervention("against, MLP only"),
        steering(by, 0.5),
        Intervention("rank two", {site.key: Term(u, a)}),
        Intervention("all parts", {site.key: Term(u[:, :1], a[:1], by[site.key]), "0.mlp": Term(b=by["0.mlp"])}),
    ]


def test_a_rank_two_term_adds_both_of_its_ranks(pico: Any, make_edit: Callable[..., s2e.Edit]) -> None:
    model, ids = pico(), batch()
    term = table_for(model, make_edit)[4].terms["1.attn"]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].self_attn.o_proj.weight += term.u @ term.a
    with intervening(model, Intervention("two", {"1.attn": term})):
        torch.testing.assert_close(logits(model, ids), logits(other, ids), rtol=0, atol=1e-4)


def test_a_mixed_batch_equals_its_rows_run_alone(fp32_variant: Any, make_edit: Callable[..., s2e.Edit]) -> None:
    model = fp32_variant
    table = table_for(model, make_edit)
    ids, rows = batch(8), [3, 0, 1, 5, 2, 4, 0, 1]
    with Interventions(model, table) as running:
        running.rows(rows)
        mixed = logits(model, ids)
        running.rows([3])  # one index serves a batch of any size
        everyone = logits(model, ids)
    for i, row in enumerate(rows):
        with intervening(model, table[row]):
            torch.testing.assert_close(mixed[i], logits(model, ids[i : i + 1])[0], rtol=0, atol=1e-4)
        with intervening(model, table[3]):
            torch.testing.assert_close(everyone[i], logits(model, ids[i : i + 1])[0], rtol=0, atol=1e-4)
    moved = [float((mixed[i] - logits(model, ids[i : i + 1])[0]).abs().max()) for i in range(len(rows))]
    assert all((m > 0.05) == (row != 0) for m, row in zip(moved, rows, strict=True)), moved


def test_generate_gives_each_request_its_own_intervention(
    pico: Any, tokenizer: Any, prompts: list[tuple[int, ...]], make_edit: Callable[..., s2e.Edit]
) -> None:
    model = pico("qwen3", head_dim=16)
    edit, by = make_edit(model, 0.2, 0.4, 0.2), vectors(model)
    table = [NOTHING, edit.intervention(), steering(by, 0.5)]
    requests = [Request(ids, row) for row in range(3) for ids in prompts]
    answers = TransformersEngine(model, tokenizer, rows=4).generate(requests, table, 8)

    def greedy(model: Any, ids: tuple[int, ...]) -> tuple[int, ...]:
        out = list(ids)
        while len(out) < len(ids) + 8:
            out.append(int(logits(model, torch.tensor([out]))[0, -1].argmax()))
        return tuple(out[len(ids) :])

    expected = [greedy(model, ids) for ids in prompts]
    edited = baked(model, edit)
    expected += [greedy(edited, ids) for ids in prompts]
    with steered_by_hand(model, by, 0.5):
        expected += [greedy(model, ids) for ids in prompts]
    assert len(set(expected)) == len(expected)
    assert [answer.ids for answer in answers] == expected


@pytest.mark.parametrize("logits_at_once", [64_000_000, 1])
@pytest.mark.parametrize("shared", [0, 5])
def test_losses_equal_a_direct_computation_from_full_logits(
    pico: Any,
    tokenizer: Any,
    prompts: list[tuple[int, ...]],
    make_edit: Callable[..., s2e.Edit],
    monkeypatch: Any,
    logits_at_once: int,
    shared: int,
) -> None:
    monkeypatch.setattr(engine_module, "LOGITS", logits_at_once)  # 1: the table goes through in twos
    model = pico()
    edit, by = make_edit(model, 0.2, 0.4, 0.2), vectors(model)
    table = [edit.intervention(), NOTHING, steering(by, 0.3), steering(by, -0.2)]
    answers = [(7,), (8, 9, 10, 11, 12, 13, 14), (250, 3), (20, 30, 40, 50)]
    pairs = [(p[5 - shared :], a) for p, a in zip(prompts, answers, strict=False)]
    assert len({p[:5] for p, _ in pairs}) == (1 if shared else 4)
    seen: list[tuple[int, int]] = []
    losses = TransformersEngine(model, tokenizer).losses(pairs, table, lambda done, of: seen.append((done, of)))

    def direct(model: Any, pair: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
        prompt, answer = pair
        full = logits(model, torch.tensor([[*prompt, *answer]]))[0].double().log_softmax(-1)
        return full[len(prompt) - 1 : -1]

    edited = baked(model, edit)
    for i, pair in enumerate(pairs):
        base = direct(model, pair)
        expected = [direct(edited, pair), base]
        for gamma in (0.3, -0.2):
            with steered_by_hand(model, by, gamma):
                expected.append(direct(model, pair))
        own = -base[range(len(pair[1])), pair[1]].mean()
        assert float(losses.base_nll[i]) == pytest.approx(float(own), abs=1e-4)
        for j, other in enumerate(expected):
            kl = (base.exp() * (base - other)).sum(-1).mean()
            nll = -other[range(len(pair[1])), pair[1]].mean()
            assert float(losses.kl[i, j]) == pytest.approx(float(kl), abs=1e-4)
            assert float(losses.nll[i, j]) == pytest.approx(float(nll), abs=1e-4)
            assert (float(kl) > 0.01) == (j != 1)
    assert losses.kl.shape == losses.nll.shape == (4, 4)
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)


def test_every_site_is_called_in_every_forward_pass(
    pico: Any, tokenizer: Any, prompts: list[tuple[int, ...]], monkeypatch: Any
) -> None:
    made: list[Interventions] = []

    class Watched(Interventions):
        def __init__(self, *args: Any):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(engine_module, "Interventions", Watched)
    model = pico()
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    engine = TransformersEngine(model, tokenizer, rows=2)
    engine.generate([Request(p, i % 2) for i, p in enumerate(prompts)], [steering(vectors(model), 0.1), NOTHING], 6)
    (running,) = made
    assert engine.forward_passes == len(passes) > 6
    assert running.calls == 6 * engine.forward_passes  # prefill and decode alike
    before = engine.forward_passes
    engine.losses([(p, (5, 6)) for p in prompts], [steering(vectors(model), 0.1)])
    assert made[1].calls == 6 * (engine.forward_passes - before) > 0
    assert engine.forward_passes == len(passes)


# The residual stream ------------------------------------------------------------------------------------------------


def slow(model: Any, ids: Tensor, terms: Mapping[str, Term]) -> Tensor:
    """A model's logits, layer by layer; after each layer x += u(a·x) + b of one token after the other."""
    rows = []
    with torch.no_grad():
        positions = torch.arange(ids.shape[1])[None]
        for row in ids:
            x = model.model.embed_tokens(row[None])
            rotary = model.model.rotary_emb(x, positions)
            for number, layer in enumerate(model.model.layers):
                x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
                term = terms.get(f"{number}.residual")
                for time in range(x.shape[1]) if term is not None else ():
                    token = x[0, time].float()
                    added = torch.zeros_like(token)
                    for rank in range(0 if term.a is None else len(term.a)):
                        along = sum(float(a) * float(held) for a, held in zip(term.a[rank], token, strict=True))
                        added += along * term.u[:, rank]
                    x[0, time] = (token + added + (0 if term.b is None else term.b)).to(x.dtype)
            rows.append(model.lm_head(model.model.norm(x))[0])
    return torch.stack(rows)


def on_the_stream(d: int) -> list[Intervention]:
    """Constants, terms of what the stream holds, both at several layers and of a higher rank, and nothing."""
    draw = torch.Generator().manual_seed(17)

    def some(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(shape, generator=draw)

    v = some(d) / d**0.5
    erased = {f"{layer}.residual": Term(-v[:, None], v[None], 0.5 * v) for layer in range(3)}
    return [
        Intervention("constant", {"1.residual": Term(b=some(d))}),
        Intervention("constants", {f"{layer}.residual": Term(b=some(d, size=0.5)) for layer in range(3)}),
        Intervention("rank one", {"0.residual": Term(some(d, 1, size=0.3), some(1, d, size=0.3))}),
        NOTHING,
        Intervention("erased everywhere", erased),
        Intervention("rank two", {"2.residual": Term(some(d, 2, size=0.3), some(2, d, size=0.3), some(d))}),
    ]


def test_terms_on_the_stream_act_after_their_layer_as_a_slow_loop_says(variant: Any) -> None:
    model, ids = variant, batch(2, 7)
    half = model.dtype == torch.bfloat16
    base = logits(model, ids).float()
    torch.testing.assert_close(slow(model, ids, {}).float(), base, rtol=0, atol=1e-5)
    for intervention in on_the_stream(model.config.hidden_size):
        expected = slow(model, ids, intervention.terms).float()
        with intervening(model, intervention) as running:
            here = logits(model, ids).float()
        assert running.calls == running.sites == len(intervention.terms)
        moved = float((expected - base).norm())
        assert (moved > 1.0) == (intervention is not NOTHING), intervention
        assert float((here - expected).norm()) <= (0.05 * moved if half else 1e-5 * float(expected.norm())), (
            intervention
        )
    assert hooks(model) == 0


def test_rows_of_one_batch_have_terms_of_their_own_on_the_stream(
    variant: Any, make_edit: Callable[..., s2e.Edit]
) -> None:
    model = variant
    half = model.dtype == torch.bfloat16
    edit, both = make_edit(model).intervention(), on_the_stream(model.config.hidden_size)
    # Beside edits of weights, and one that acts on the stream and at a site too.
    joined = Intervention("at a site too", {**both[4].terms, "1.mlp": edit.terms["1.mlp"]})
    table = [*both, edit, joined]
    ids, rows = batch(9, 8), [4, 0, 3, 5, 2, 1, 6, 7, 4]
    base = logits(model, ids).float()
    with Interventions(model, table) as running:
        running.rows(rows)
        mixed = logits(model, ids).float()
    for i, row in enumerate(rows):
        with intervening(model, table[row]):
            alone = logits(model, ids[i : i + 1])[0].float()
        moved = float((alone - base[i]).norm())
        assert float((mixed[i] - alone).norm()) <= (0.05 * moved + 0.5 if half else 1e-4), table[row].name
        if row < len(both):
            expected = slow(model, ids[i : i + 1], table[row].terms)[0].float()
            assert float((mixed[i] - expected).norm()) <= (0.05 * moved + 0.5 if half else 1e-4), table[row].name
        assert (moved > 1.0) == (row != 3), table[row].name


def test_answers_and_losses_under_terms_on_the_stream_are_those_of_a_slow_loop(
    fp32_variant: Any, tokenizer: Any, prompts: list[tuple[int, ...]]
) -> None:
    model = fp32_variant
    table = on_the_stream(model.config.hidden_size)
    engine = TransformersEngine(model, tokenizer, rows=4)
    engine.stops = set()
    some = prompts[:3]
    answers = engine.generate([Request(ids, row) for row in range(len(table)) for ids in some], table, 5)

    def greedy(terms: Mapping[str, Term], ids: tuple[int, ...]) -> tuple[int, ...]:
        out = list(ids)
        while len(out) < len(ids) + 5:
            out.append(int(slow(model, torch.tensor([out]), terms)[0, -1].argmax()))
        return tuple(out[len(ids) :])

    expected = [greedy(intervention.terms, ids) for intervention in table for ids in some]
    assert [answer.ids for answer in answers] == expected
    pairs = [(ids, (7, 250, 30)) for ids in some]
    losses = engine.losses(pairs, table)
    for i, (prompt, answer) in enumerate(pairs):
        whole = torch.tensor([[*prompt, *answer]])
        base, *others = (
            slow(model, whole, terms)[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            for terms in ({}, *(intervention.terms for intervention in table))
        )
        for j, other in enumerate(others):
            kl = (base.exp() * (base - other)).sum(-1).mean()
            assert float(losses.kl[i, j]) == pytest.approx(float(kl), abs=1e-4, rel=1e-4)
            nll = -other[range(len(answer)), answer].mean()
            assert float(losses.nll[i, j]) == pytest.approx(float(nll), abs=1e-4, rel=1e-4)


def test_terms_of_another_stream_are_refused(pico: Any) -> None:
    model = pico()
    with pytest.raises(ModelError, match=r"names sites that the model does not have \(got: 3\.residual\)"):
        Interventions(model, [Intervention("deeper", {"3.residual": Term(b=torch.ones(32))})])
    for term in (Term(b=torch.ones(31)), Term(torch.ones(32, 1), torch.ones(1, 48)), Term(torch.ones(8, 1), None)):
        with pytest.raises(ModelError, match=r"does not fit .*0\.residual"):
            Interventions(model, [Intervention("wider", {"0.residual": term})])
    assert hooks(model) == 0


# What is refused, and what is left behind ---------------------------------------------------------------------------


def test_a_batch_of_other_rows_than_announced_is_refused(pico: Any) -> None:
    model = pico()
    with Interventions(model, [NOTHING, steering(vectors(model), 1.0)]) as running:
        running.rows([0, 1])
        logits(model, batch(2))
        with pytest.raises(Steer2EditError, match="got: 3 rows, 2 announced"):
            logits(model, batch(3))


def test_an_intervention_for_another_model_is_refused(pico: Any, make_edit: Callable[..., s2e.Edit]) -> None:
    model = pico()
    with pytest.raises(ModelError, match=r"names sites that the model does not have \(got: 3\.attn, 3\.mlp\)"):
        Interventions(model, [steering(vectors(pico(num_hidden_layers=4)), 1.0)])
    with pytest.raises(ModelError, match=r"does not fit site 0\.attn"):
        Interventions(model, [steering(vectors(pico(hidden_size=64)), 1.0)])
    wider = make_edit(pico(intermediate_size=64), None, 0.2, 0.2)
    with pytest.raises(ModelError, match=r"does not fit site 0\.mlp.*32 × 48"):
        Interventions(model, [wider.intervention()])
    assert hooks(model) == 0


def test_an_edit_is_only_applied_to_its_own_base(pico: Any, make_edit: Callable[..., s2e.Edit]) -> None:
    model, stranger = pico(), pico(seed=1)
    edit = make_edit(model)
    with pytest.raises(ModelError, match="not the base"), edit.applied(stranger):
        pass
    with pytest.raises(ModelError, match="another model"), edit.applied(pico(intermediate_size=64)):
        pass
    with pytest.raises(Steer2EditError, match="already in this model"), edit.applied(baked(model, edit)):
        pass
    assert hooks(stranger) == 0


def test_the_hooks_go_with_the_context_also_after_an_exception(pico: Any, make_edit: Callable[..., s2e.Edit]) -> None:
    model, ids = pico(), batch()
    edit, base = make_edit(model), logits(model, ids)
    with edit.applied(model) as running:
        assert hooks(model) == running.sites == 6
    assert hooks(model) == 0
    with pytest.raises(ZeroDivisionError), edit.applied(model):
        _ = 1 / 0
    assert hooks(model) == 0
    assert torch.equal(logits(model, ids), base)


def test_the_hooks_go_when_generating_fails(pico: Any, tokenizer: Any, prompts: Any, monkeypatch: Any) -> None:
    model = pico()
    engine = TransformersEngine(model, tokenizer)
    monkeypatch.setattr(engine, "next_logits", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate([Request(p) for p in prompts], [steering(vectors(model), 1.0)], 4)
    assert hooks(model) == 0


def test_an_edit_on_one_block_type_leaves_the_other_unhooked(pico: Any, make_edit: Callable[..., s2e.Edit]) -> None:
    model = pico()
    edit = make_edit(model, 0.2, None, 0.2)
    assert set(edit.intervention().terms) == {"0.attn", "1.attn", "2.attn"}
    with edit.applied(model) as running:
        logits(model, batch())
    assert running.calls == running.sites == 3


def test_a_pass_in_inference_mode_leaves_one_with_gradients_possible(pico: Any, make_edit: Any) -> None:
    model = pico()
    edit = make_edit(model)
    ids = torch.tensor([[5, 9, 17, 30]])
    with edit.applied(model):
        with torch.inference_mode():
            expected = model(ids).logits.clone()
        logits = model(ids).logits
        logits.sum().backward()
    assert torch.equal(logits.detach(), expected)
    assert all(p.grad is not None for p in model.model.layers.parameters())
