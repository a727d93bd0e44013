"""The decode loop gives what model.generate gives, prompt by prompt, however the prompts share a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import Steer2EditError
from steer2edit.method.intervention import NOTHING, steering
from steer2edit.probing.chat import Chat

Prompts = list[tuple[int, ...]]


def greedy(model: Any, prompts: Prompts, new: int, stops: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """What model.generate answers to each prompt alone, up to a stop."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=list(stops) or None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        ends = [i for i, token in enumerate(out) if token in stops]
        answers.append(tuple(out[: ends[0]] if ends else out))
    return answers


def run(engine: TransformersEngine, prompts: Prompts, new: int = 12) -> list[tuple[int, ...]]:
    return [a.ids for a in engine.generate([Request(p) for p in prompts], [NOTHING], new)]


def without_stops(engine: TransformersEngine) -> TransformersEngine:
    engine.stops = set()
    return engine


@pytest.mark.parametrize("rows", [1, 2, 3, 64])
@pytest.mark.parametrize("shared", [0, 4, 5])
def test_greedy_answers_equal_generates(pico: Any, tokenizer: Any, prompts: Prompts, rows: int, shared: int) -> None:
    model = pico("qwen2")
    prompts = [p[5 - shared :] for p in prompts]
    assert len({p[:shared] for p in prompts}) == 1
    assert len({len(p) for p in prompts}) == 5
    expected = greedy(model, prompts, 12)
    assert len(set(expected)) == 5
    assert run(without_stops(TransformersEngine(model, tokenizer, rows=rows)), prompts) == expected


def test_every_family_and_shape_equals_generate(fp32_variant: Any, tokenizer: Any, prompts: Prompts) -> None:
    expected = greedy(fp32_variant, prompts, 10)
    assert run(without_stops(TransformersEngine(fp32_variant, tokenizer, rows=3)), prompts, 10) == expected


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("mistral", {"sliding_window": 8}),
        ("mistral", {"sliding_window": 8, "attn_implementation": "eager"}),
        ("llama", {"attn_implementation": "eager"}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
        # Only the layers above max_window_layers slide.
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize(("rows", "shared"), [(1, 0), (3, 5)])
def test_windows_and_eager_attention_equal_generate(
    pico: Any, tokenizer: Any, prompts: Prompts, model_type: str, overrides: dict[str, Any], rows: int, shared: int
) -> None:
    model = pico(model_type, **overrides)
    prompts = [p[5 - shared :] for p in prompts]
    expected = greedy(model, prompts, 9)
    if "sliding_window" in overrides:  # the window matters to the longest prompt's answer
        wide = pico(model_type, **(overrides | {"sliding_window": 64}))
        assert (greedy(wide, prompts[4:], 9) != expected[4:]) == overrides.get("use_sliding_window", True)
    assert run(without_stops(TransformersEngine(model, tokenizer, rows=rows)), prompts, 9) == expected


@pytest.mark.parametrize("rows", [1, 2, 64])
def test_an_eos_ends_a_turn_and_is_no_part_of_the_answer(
    pico: Any, tokenizer: Any, prompts: Prompts, rows: int
) -> None:
    model = pico()
    free = greedy(model, prompts, 12)
    stops = (free[0][3], free[3][0])  # in the middle of the first answer, and the whole of the fourth
    expected = greedy(model, prompts, 12, stops)
    assert expected[3] == ()
    assert 0 < len(expected[0]) < 12
    assert any(len(answer) == 12 for answer in expected)
    model.generation_config.eos_token_id = list(stops)
    answers = TransformersEngine(model, tokenizer, rows=rows).generate([Request(p) for p in prompts], [NOTHING], 12)
    assert [a.ids for a in answers] == expected
    assert [a.ended for a in answers] == [len(answer) < 12 for answer in expected]
    assert [a.text for a in answers] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]


def test_the_stops_are_those_of_the_model_and_of_the_tokenizer(pico: Any, tokenizer: Any) -> None:
    model = pico()
    assert TransformersEngine(model, tokenizer).stops == {tokenizer.eos_token_id}
    model.generation_config.eos_token_id, model.config.eos_token_id = [7, 8], 9
    assert TransformersEngine(model, tokenizer).stops == {7, 8, 9, tokenizer.eos_token_id}


def test_waiting_requests_take_the_slots_that_come_free(pico: Any, tokenizer: Any, monkeypatch: Any) -> None:
    model = pico()
    prompts = [(5 + i, 100 + i) for i in range(12)]
    free = greedy(model, prompts, 12)
    stop = free[0][2]
    expected = greedy(model, prompts, 12, (stop,))
    assert len({len(answer) for answer in expected}) > 1
    model.generation_config.eos_token_id = [stop]
    engine = TransformersEngine(model, tokenizer, rows=3)
    engine.stops = {stop}
    admitted: list[list[int]] = []
    sizes: list[int] = []
    admit, step = engine.prefill, engine.next_logits
    monkeypatch.setattr(engine, "prefill", lambda r, into, *rest: (admitted.append(list(into)), admit(r, into, *rest)))
    monkeypatch.setattr(engine, "next_logits", lambda token, *rest: (sizes.append(len(token)), step(token, *rest))[1])
    assert run(engine, prompts) == expected
    assert admitted[0] == [0, 1, 2]
    assert sum(map(len, admitted)) == 12
    assert any(len(into) < 3 for into in admitted[1:])  # a single freed slot is filled while the others go on
    assert max(sizes) == 3
    # A token of each answer takes a step in one of three slots: no slot stands empty while a request waits.
    steps = sum(min(len(answer) + 1, 12) for answer in expected)
    assert len(sizes) <= steps / 3 + 12


@pytest.mark.parametrize("at_once", [1, 40])
def test_prompts_are_prefilled_in_parts_as_all_at_once(
    pico: Any, tokenizer: Any, prompts: Prompts, monkeypatch: Any, at_once: int
) -> None:
    model = pico()
    expected = greedy(model, prompts, 6)
    monkeypatch.setattr("steer2edit.engines.decoding.PREFILL", at_once)  # tokens: one prompt, or two
    engine = without_stops(TransformersEngine(model, tokenizer))
    sizes: list[int] = []
    admit = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda r, *rest: (sizes.append(len(r)), admit(r, *rest)))
    assert run(engine, prompts, 6) == expected
    assert sizes == ([1] * 5 if at_once == 1 else [3, 2])


def test_finished_rows_leave_the_batch(pico: Any, tokenizer: Any, prompts: Prompts, monkeypatch: Any) -> None:
    model = pico()
    free = greedy(model, prompts, 12)
    stops = (free[0][3], free[3][0])
    expected = greedy(model, prompts, 12, stops)
    engine = TransformersEngine(model, tokenizer)
    engine.stops = set(stops)
    sizes: list[int] = []
    step = engine.next_logits
    monkeypatch.setattr(engine, "next_logits", lambda token, *rest: (sizes.append(len(token)), step(token, *rest))[1])
    assert run(engine, prompts) == expected
    assert sizes[0] == 5
    assert sizes[-1] <= 3
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("rows", [1, 2, 64])
def test_prompts_of_one_token_and_equal_prompts(pico: Any, tokenizer: Any, rows: int) -> None:
    model = pico()
    for prompts in ([(9,)], [(9,), (11,), (9, 4)], [(9, 4, 7)] * 3, [(9, 4, 7), (9, 4)]):
        engine = without_stops(TransformersEngine(model, tokenizer, rows=rows))
        assert run(engine, prompts, 6) == greedy(model, prompts, 6)
    assert TransformersEngine(model, tokenizer).generate([], [NOTHING], 6) == []


def test_progress_ends_with_all_requests(pico: Any, tokenizer: Any, prompts: Prompts) -> None:
    seen: list[tuple[int, int]] = []
    engine = without_stops(TransformersEngine(pico(), tokenizer, rows=2))
    engine.generate([Request(p) for p in prompts], [NOTHING], 3, lambda done, of: seen.append((done, of)))
    assert seen[-1] == (5, 5)
    assert seen == sorted(seen)


def test_what_is_longer_than_the_model_can_read_is_refused(pico: Any, tokenizer: Any, prompts: Prompts) -> None:
    model = pico(max_position_embeddings=24)
    assert max(map(len, prompts)) == 18
    engine = without_stops(TransformersEngine(model, tokenizer))
    assert run(engine, prompts, 6) == greedy(model, prompts, 6)
    with pytest.raises(Steer2EditError, match="got: 25 tokens, at most 24"):
        run(engine, prompts, 7)
    answer = tuple(range(3, 10))  # its last token is not read
    assert engine.losses([(prompts[4], answer)], [NOTHING]).kl.tolist() == [[0.0]]
    with pytest.raises(Steer2EditError, match="got: 25 tokens, at most 24"):
        engine.losses([(prompts[4], (*answer, 9))], [NOTHING])


@pytest.mark.parametrize("new", [0, -1])
def test_no_new_tokens_are_refused(pico: Any, tokenizer: Any, prompts: Prompts, new: int) -> None:
    with pytest.raises(Steer2EditError):
        run(TransformersEngine(pico(), tokenizer), prompts, new)


def test_losses_of_a_sliding_window_model_equal_a_direct_computation(
    pico: Any, tokenizer: Any, prompts: Prompts
) -> None:
    model = pico("mistral", sliding_window=8)
    pairs = [(p, (20, 30, 40, 50, 60, 70)) for p in prompts]
    losses = TransformersEngine(model, tokenizer).losses(pairs, [NOTHING])
    for i, (prompt, answer) in enumerate(pairs):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
        expected = -logits.double().log_softmax(-1)[range(len(prompt) - 1, len(prompt) + 5), answer].mean()
        assert float(losses.base_nll[i]) == pytest.approx(float(expected), abs=1e-4)


def test_no_answers_have_no_losses(pico: Any, tokenizer: Any) -> None:
    losses = TransformersEngine(pico(), tokenizer).losses([], [NOTHING, NOTHING])
    assert (losses.kl.shape, losses.nll.shape, losses.base_nll.shape) == ((0, 2), (0, 2), (0,))


def test_a_chat_prompt_is_the_rendered_template(pico: Any, tokenizer: Any, merging_tokenizer: Any) -> None:
    engine = TransformersEngine(pico(), tokenizer)
    expected = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(engine.tokens([{"role": "user", "content": "Hello"}])) == expected
    plain = TransformersEngine(pico(), merging_tokenizer, chat=Chat(plain=True))
    assert merging_tokenizer.decode(plain.tokens([{"role": "user", "content": "Hello"}])) == "Hello"


def _short_of_memory(model: Any, monkeypatch: pytest.MonkeyPatch, most: int, message: str) -> list[int]:
    """Makes the model's attention fail on more rows than `most`, as a device does whose memory is full; what it saw."""
    seen: list[int] = []
    forward = model.model.layers[1].forward

    def failing(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(hidden))
        if len(hidden) > most:
            raise torch.OutOfMemoryError(message)
        return forward(hidden, *args, **kwargs)

    monkeypatch.setattr(model.model.layers[1], "forward", failing)
    return seen


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 2 GiB.", "MPS backend out of memory (…)"])
def test_where_memory_runs_out_the_rows_are_halved_for_good_and_the_answers_stay(
    message: str, pico: Any, tokenizer: Any, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico("llama")
    expected = greedy(model, prompts, 6)
    engine = without_stops(TransformersEngine(model, tokenizer, rows=64))
    seen = _short_of_memory(model, monkeypatch, 1, message)
    assert run(engine, prompts, 6) == expected
    assert engine.slots == 1  # 5 requests in 64 slots: then 2 at once, then 1
    assert max(seen) > 1
    seen.clear()
    assert run(engine, prompts, 6) == expected
    assert max(seen) == 1


def test_what_does_not_fit_in_one_row_and_what_is_no_lack_of_memory_is_raised(
    pico: Any, tokenizer: Any, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico("llama")
    engine = without_stops(TransformersEngine(model, tokenizer, rows=4))
    with monkeypatch.context() as short:
        _short_of_memory(model, short, 0, "CUDA out of memory.")
        with pytest.raises(torch.OutOfMemoryError):
            run(engine, prompts, 6)
    assert engine.slots == 1
    engine.slots = 4
    _short_of_memory(model, monkeypatch, 1, "something else")
    with pytest.raises(torch.OutOfMemoryError, match="something else"):
        run(engine, prompts, 6)
    assert engine.slots == 4


def test_losses_take_fewer_interventions_at_once_where_memory_runs_out(
    pico: Any, tokenizer: Any, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico("llama")
    engine = TransformersEngine(model, tokenizer)
    vectors = {"0.attn": torch.ones(model.config.hidden_size)}
    table = [steering(vectors, gamma) for gamma in (0.1, 0.2, 0.3, 0.4)]
    pairs = [(p, (5, 6, 7)) for p in prompts]
    expected = engine.losses(pairs, table)
    seen = _short_of_memory(model, monkeypatch, 3, "CUDA out of memory.")  # the base and two more
    made = engine.losses(pairs, table)
    assert max(seen) == 5
    torch.testing.assert_close(made.kl, expected.kl, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(made.nll, expected.nll, atol=1e-6, rtol=1e-4)
