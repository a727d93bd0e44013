"""Losses: how many rows a batch of them has, choices after the same prompt, and losses under other prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steer2edit.engines.base import Engine, Losses, Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import Steer2EditError
from steer2edit.method.intervention import NOTHING, Intervention, Term, steering


@pytest.mark.parametrize("interventions", [0, 1, 2, 3, 4, 7])
def test_no_batch_has_more_rows_than_the_limit(pico: Any, tokenizer: Any, prompts: Any, interventions: int) -> None:
    model = pico()
    table = [steering({"0.attn": torch.ones(32)}, 0.1 * (i + 1)) for i in range(interventions)]
    pairs = [(p, (5, 6, 7)) for p in prompts]
    whole = TransformersEngine(model, tokenizer).losses(pairs, table)
    engine = TransformersEngine(model, tokenizer)
    engine.logits = 3 * model.config.vocab_size * 3  # three rows of three tokens
    sizes: list[int] = []
    model.register_forward_hook(lambda _, args, kwargs, out: sizes.append(len(out.logits)), with_kwargs=True)
    seen: list[tuple[int, int]] = []
    losses = engine.losses(pairs, table, lambda *steps: seen.append(steps))
    assert max(sizes) <= 3
    for name in ("kl", "nll", "base_nll"):
        torch.testing.assert_close(getattr(losses, name), getattr(whole, name), atol=1e-6, rtol=1e-4)
    assert seen[-1] == (5 * (1 + interventions),) * 2
    assert seen == sorted(seen)


# Choices after the same prompt --------------------------------------------------------------------------------------


def a_table(d: int = 32) -> list[Intervention]:
    """Steering of a block, and a term of what the stream holds."""
    draw = torch.Generator().manual_seed(9)
    u, a = 0.3 * torch.randn(d, 1, generator=draw), torch.randn(1, d, generator=draw) / d**0.5
    return [steering({"1.attn": torch.ones(d)}, 0.5), Intervention("stream", {"0.residual": Term(u, a)})]


CHOICES = [(7, 21, 3, 90), (40,), (8, 8, 31, 100, 12, 60), (7, 21)]
SHAPES = [
    ("llama", {}),
    ("mistral", {"sliding_window": 8}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("llama", {"attn_implementation": "eager"}),
]


@pytest.mark.parametrize("logits_at_once", [64_000_000, 1], ids=["all rows at once", "two rows at once"])
@pytest.mark.parametrize("slotted", [True, False])
@pytest.mark.parametrize(("model_type", "overrides"), SHAPES, ids=str)
def test_choices_after_one_prompt_have_the_losses_that_each_has_alone(
    pico: Any, tokenizer: Any, prompts: Any, model_type: str, overrides: Any, slotted: bool, logits_at_once: int
) -> None:
    model, table = pico(model_type, **overrides), a_table()
    engine = TransformersEngine(model, tokenizer)
    engine.slotted, engine.logits = slotted, logits_at_once
    # The choices of a long prompt, of a short one, of one token, and of the long one again.
    asked = [prompts[4], prompts[0], (5,), prompts[4]]
    pairs = [(prompt, choice) for prompt in asked for choice in CHOICES]
    losses = engine.losses(pairs, table)
    alone = [TransformersEngine(model, tokenizer).losses([pair], table) for pair in pairs]
    for name in ("kl", "nll", "base_nll"):
        wanted = torch.cat([getattr(one, name) for one in alone])
        torch.testing.assert_close(getattr(losses, name), wanted, atol=2e-5, rtol=1e-4)
    assert float(losses.kl.mean(dim=0).min()) > 0.01
    assert len({round(x, 4) for x in losses.base_nll[:4].tolist()}) == 4


@pytest.mark.parametrize("logits_at_once", [64_000_000, 1], ids=["all rows at once", "two rows at once"])
@pytest.mark.parametrize("slotted", [True, False])
@pytest.mark.parametrize(("model_type", "overrides"), SHAPES, ids=str)
def test_the_nll_alone_is_that_of_losses_and_the_base_is_not_run_for_it(
    pico: Any, tokenizer: Any, prompts: Any, model_type: str, overrides: Any, slotted: bool, logits_at_once: int
) -> None:
    model, table = pico(model_type, **overrides), [*a_table(), steering({"0.attn": torch.ones(32)}, 0.3)]
    engine = TransformersEngine(model, tokenizer)
    engine.slotted, engine.logits = slotted, logits_at_once
    pairs = [(prompt, choice) for prompt in (prompts[4], prompts[0], (5,)) for choice in CHOICES]
    wanted = engine.losses(pairs, table).nll
    rows: list[int] = []
    seen: list[tuple[int, int]] = []
    engine.model.register_forward_hook(lambda _, args, kwargs, out: rows.append(len(out.logits)), with_kwargs=True)
    torch.testing.assert_close(
        engine.nll(pairs, table, lambda *steps: seen.append(steps)), wanted, atol=2e-5, rtol=1e-4
    )
    assert sum(rows) == len(pairs) * len(table)
    assert seen[-1] == (len(pairs) * len(table),) * 2
    assert engine.nll(pairs, []).shape == (len(pairs), 0)
    assert engine.nll([], table).shape == (0, len(table))


def test_an_engine_without_a_way_of_its_own_takes_the_nll_from_its_losses() -> None:
    class Plain(Engine):
        def generate(self, *_: Any) -> Any: ...

        def losses(self, pairs: Any, table: Any, progress: Any = None) -> Losses:
            return Losses(torch.zeros(1, 1), torch.tensor([[1.5]]), torch.zeros(1))

    assert Plain().nll([((5,), (6,))], [NOTHING]).tolist() == [[1.5]]


def test_a_prompt_that_comes_again_is_not_run_again(pico: Any, tokenizer: Any, prompts: Any, monkeypatch: Any) -> None:
    engine = TransformersEngine(pico(), tokenizer)
    ran: list[tuple[int, int, int]] = []
    run = engine._run

    def counted(ids: Tensor, cache: Any, start: int, head: int = 0) -> Tensor:
        ran.append((ids.shape[1], start, head))
        return run(ids, cache, start, head)

    monkeypatch.setattr(engine, "_run", counted)
    long, other = prompts[4], prompts[1]  # of 18 tokens and 14, of which they share 5
    engine.losses([(long, c) for c in CHOICES[:3]] + [(other, c) for c in CHOICES[:2]], a_table())
    assert ran == [
        (5, 0, 0),  # what all prompts share
        (13 + 3, 5, 4),
        (1, 17, 1),  # the last token of the prompt, which predicts the choice's first, and all but the choice's last
        (6, 17, 6),
        (9 + 3, 5, 4),
        (1, 13, 1),
    ]


# Under the model alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits_at_once", [64_000_000, 1], ids=["in one batch", "one by one"])
@pytest.mark.parametrize("slotted", [True, False])
@pytest.mark.parametrize("share_a_prefix", [True, False])
def test_the_base_models_losses_are_those_of_plain_passes(
    fp32_variant: Any, tokenizer: Any, prompts: Any, slotted: bool, share_a_prefix: bool, logits_at_once: int
) -> None:
    model = fp32_variant
    engine = TransformersEngine(model, tokenizer)
    engine.slotted, engine.logits = slotted and engine.slotted, logits_at_once
    # Prompts of 1 to 18 tokens and answers of 1 to 6, none in the order of their lengths.
    asked = prompts if share_a_prefix else [*prompts, (5,)]
    pairs = [(prompt, CHOICES[i % len(CHOICES)]) for i, prompt in enumerate(asked)]
    losses = engine.losses(pairs, [])
    assert (losses.kl.shape, losses.nll.shape) == ((len(pairs), 0), (len(pairs), 0))
    for nll, (prompt, answer) in zip(losses.base_nll.tolist(), pairs, strict=True):
        expected = -float(plain(model, prompt, answer)[range(len(answer)), answer].mean())
        assert nll == pytest.approx(expected, abs=1e-4)


def test_answers_of_the_model_alone_share_a_batch(pico: Any, tokenizer: Any, prompts: Any) -> None:
    engine = TransformersEngine(pico(), tokenizer)
    engine.losses([(prompt, (5, 6)) for prompt in prompts], [])
    assert engine.forward_passes == 2  # the prefix that all prompts share, and all the rest
    assert TransformersEngine(pico(), tokenizer).losses([], []).base_nll.shape == (0,)


# Under another prompt -----------------------------------------------------------------------------------------------


def plain(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    """Log-probabilities [answer, vocabulary] of one forward pass, fp64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
    return logits.double().log_softmax(-1)[len(prompt) - 1 : -1]


@pytest.mark.parametrize("slotted", [True, False])
def test_losses_under_other_prompts_are_those_of_two_plain_passes(
    fp32_variant: Any, tokenizer: Any, prompts: Any, slotted: bool
) -> None:
    model = fp32_variant
    engine = TransformersEngine(model, tokenizer)
    engine.slotted = slotted
    assert engine.measures_prompts
    pairs = [(prompt, answer) for prompt, answer in zip(prompts, CHOICES, strict=False)]
    others = [prompts[3], (9, *prompts[1]), prompts[2], (5,)]  # shorter, longer, the same, one token
    seen: list[tuple[int, int]] = []
    losses = engine.prompt_losses(pairs, others, lambda *steps: seen.append(steps))
    assert (losses.kl.shape, losses.nll.shape, losses.base_nll.shape) == ((4, 1), (4, 1), (4,))
    for i, ((prompt, answer), other) in enumerate(zip(pairs, others, strict=True)):
        own, under = plain(model, prompt, answer), plain(model, other, answer)
        at = range(len(answer))
        assert float(losses.kl[i, 0]) == pytest.approx(float((own.exp() * (own - under)).sum(-1).mean()), abs=1e-4)
        assert float(losses.nll[i, 0]) == pytest.approx(-float(under[at, answer].mean()), abs=1e-4)
        assert float(losses.base_nll[i]) == pytest.approx(-float(own[at, answer].mean()), abs=1e-4)
        assert (float(losses.kl[i, 0]) > 0.01) == (other != prompt)
    assert float(losses.kl[2, 0]) == 0.0
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    # What an answer's own prompt gives is what `losses` says of the base model.
    torch.testing.assert_close(losses.base_nll, engine.losses(pairs, []).base_nll, atol=1e-5, rtol=1e-5)


def test_no_answers_have_no_losses_under_other_prompts(pico: Any, tokenizer: Any) -> None:
    losses = TransformersEngine(pico(), tokenizer).prompt_losses([], [])
    assert (losses.kl.shape, losses.nll.shape, losses.base_nll.shape) == ((0, 1), (0, 1), (0,))


def test_another_prompt_that_is_longer_than_the_model_can_read_is_refused(pico: Any, tokenizer: Any) -> None:
    engine = TransformersEngine(pico(max_position_embeddings=16), tokenizer)
    fits = engine.prompt_losses([((5, 6), (7, 8))], [(9,) * 14])
    assert fits.kl.shape == (1, 1)
    with pytest.raises(Steer2EditError, match=r"longer than the model can read \(got: 17 tokens, at most 16\)"):
        engine.prompt_losses([((5, 6), (7, 8))], [(9,) * 15])


def test_an_engine_says_whether_it_measures_prompts() -> None:
    class Plain(Engine):
        def generate(self, *_: Any) -> Any: ...

        def losses(self, *_: Any) -> Losses: ...  # type: ignore[empty-body]

    engine = Plain()
    assert (engine.measures_prompts, engine.rows_on_stream) == (False, True)
    with pytest.raises(NotImplementedError, match="Plain does not measure losses under other prompts"):
        engine.prompt_losses([], [])


def test_an_answer_is_greedy_under_the_intervention_that_gave_it_alone(pico: Any, tokenizer: Any, prompts: Any) -> None:
    engine, table = TransformersEngine(pico(), tokenizer), a_table()
    engine.stops = set()
    rows = range(1 + len(table))
    answers = [a.ids for a in engine.generate([Request(prompts[4], row) for row in rows], [NOTHING, *table], 6)]
    assert len(set(answers)) == len(answers)
    losses = engine.losses([(prompts[4], answer) for answer in answers], table)
    greedy = torch.cat([losses.base_greedy[:, None], losses.greedy], dim=1)  # [answers, interventions]
    assert torch.equal(greedy, torch.eye(len(answers), dtype=torch.bool))
