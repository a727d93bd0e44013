"""The engine of trained checkpoints and the weights that it puts in: against models that have them, and the base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import make_pico, make_tokenizer
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import FileError, ModelError
from steer2edit.method.intervention import NOTHING, Intervention, Term
from steer2edit.training.engine import TrainedEngine
from steer2edit.training.weights import carrying, write_weights

IDS = torch.tensor([[5, 9, 17, 30, 44, 7]])


def bits(model: Any) -> dict[str, bytes]:
    return {name: p.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, p in model.named_parameters()}


def moved(seed: int = 1) -> Any:
    """The pico model as if trained: every weight is another."""
    model = make_pico()
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return model


def with_lora(base: Any, rank: int = 1, alpha: int = 3) -> Any:
    """A PEFT model whose A and B are both drawn."""
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear"))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.3)
    return model.eval()


# Weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "rank"), [("llama", 1), ("gpt2", 1), ("qwen2", 2)])
def test_a_lora_is_carried_as_peft_runs_and_as_it_merges_it(family: str, rank: int, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"tie_word_embeddings": True} if family == "qwen2" else {}
    adapted = with_lora(make_pico(family, **overrides), rank)
    write_weights(tmp_path / "1.safetensors", adapted, {"method": "lora"})
    base = make_pico(family, **overrides)
    with torch.no_grad():
        before, wanted = base(IDS).logits, adapted(IDS).logits
        with carrying(base, tmp_path / "1.safetensors"):
            got = base(IDS).logits
            merged = dict(adapted.merge_and_unload().named_parameters())
            for name, weight in base.named_parameters():
                torch.testing.assert_close(weight, merged[name], atol=1e-6, rtol=0)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)
    assert (wanted - before).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_restored_to_the_bit_even_after_an_error(dtype: torch.dtype, tmp_path: Path) -> None:
    write_weights(tmp_path / "whole.safetensors", moved(), {})
    write_weights(tmp_path / "lora.safetensors", with_lora(make_pico()), {})
    base = make_pico(dtype=dtype)
    with torch.no_grad():
        base.model.norm.weight[:3] = -0.0
    own = bits(base)

    def carried(name: str) -> None:
        with carrying(base, tmp_path / f"{name}.safetensors"):
            assert bits(base) != own
            raise KeyError

    for name in ("whole", "lora"):
        with pytest.raises(KeyError):
            carried(name)
        assert bits(base) == own


def test_whole_weights_are_carried_as_they_are_and_rounded_once_to_the_models_dtype(tmp_path: Path) -> None:
    write_weights(tmp_path / "1.safetensors", moved(), {})
    for dtype in (torch.float32, torch.bfloat16):
        base = make_pico(dtype=dtype)
        with carrying(base, tmp_path / "1.safetensors"):
            for (_, weight), (_, wanted) in zip(base.named_parameters(), moved().named_parameters(), strict=True):
                assert torch.equal(weight, wanted.to(dtype))


def test_a_lora_that_does_nothing_leaves_every_bit(tmp_path: Path) -> None:
    adapted = get_peft_model(make_pico(), LoraConfig(r=1, lora_alpha=1, target_modules="all-linear"))  # B is 0
    write_weights(tmp_path / "0.safetensors", adapted, {})
    base = make_pico()
    with torch.no_grad():
        base.model.layers[0].mlp.down_proj.weight[0] = -0.0  # which an addition of 0 would turn into 0.0
    own = bits(base)
    with carrying(base, tmp_path / "0.safetensors"):
        assert bits(base) == own


def test_weights_of_another_model_or_no_file_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_weights(tmp_path / "1.safetensors", make_pico(intermediate_size=64), {})
    write_weights(tmp_path / "2.safetensors", make_pico(num_hidden_layers=4), {})
    base = make_pico()
    own = bits(base)
    for name in ("1", "2"):
        with (
            pytest.raises(ModelError, match="trained from another model"),
            carrying(base, tmp_path / f"{name}.safetensors"),
        ):
            pytest.fail("it was carried")
        assert bits(base) == own
    with pytest.raises(FileError, match="no trained weights file"), carrying(base, tmp_path / "3.safetensors"):
        pytest.fail("it was carried")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "1.safetensors").read_bytes()[:500])
    with pytest.raises(FileError, match="not a whole safetensors file"), carrying(base, tmp_path / "half.safetensors"):
        pytest.fail("it was carried")


def test_weights_that_are_not_in_memory_are_refused(tmp_path: Path) -> None:
    write_weights(tmp_path / "1.safetensors", make_pico(), {})
    with pytest.raises(ModelError, match="not in memory"), carrying(make_pico().to("meta"), tmp_path / "1.safetensors"):
        pytest.fail("it was carried")


# The engine ---------------------------------------------------------------------------------------------------------

PROMPTS = [(5, 9, 17), (5, 9, 30, 44), (5, 7)]
PAIRS = [((5, 9, 17), (30, 44, 7, 8)), ((5, 9), (12, 80, 33)), ((5, 9), (6,))]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[TrainedEngine]:
    write_weights(tmp_path / "a.safetensors", moved(1), {})
    write_weights(tmp_path / "b.safetensors", with_lora(make_pico()), {})
    model = make_pico()
    own = bits(model)
    inner = TransformersEngine(model, make_tokenizer(), rows=4)
    yield TrainedEngine(inner, {"a": tmp_path / "a.safetensors", "b": tmp_path / "b.safetensors"})
    assert bits(model) == own


@pytest.fixture
def models() -> dict[str, Any]:
    return {"a": moved(1), "b": with_lora(make_pico()).merge_and_unload(), "base": make_pico()}


def pushed() -> Intervention:
    torch.manual_seed(4)
    return Intervention("pushed", {"1.attn": Term(b=3 * torch.randn(32))})


def test_each_request_is_answered_by_the_model_that_its_row_names(
    engine: TrainedEngine, models: dict[str, Any]
) -> None:
    table = [NOTHING, Intervention("b"), pushed(), Intervention("a")]
    requests = [Request(ids, row) for ids in PROMPTS for row in (3, 0, 2, 1)]
    seen: list[tuple[int, int]] = []
    made = engine.generate(requests, table, 5, lambda done, of: seen.append((done, of)))
    assert seen[-1] == (12, 12)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    for request, answer in zip(requests, made, strict=True):
        name = table[request.row].name
        model, intervention = (models["base"], pushed()) if name == "pushed" else (models[name], NOTHING)
        alone = TransformersEngine(model, make_tokenizer(), rows=1)
        assert answer == alone.generate([Request(request.ids)], [intervention], 5)[0], name
    assert len({made[i].ids for i in range(4)}) == 4  # four unlike answers to one prompt


def test_losses_are_against_the_base_model(engine: TrainedEngine, models: dict[str, Any]) -> None:
    table = [Intervention("a"), pushed(), Intervention("b"), NOTHING]
    losses = engine.losses(PAIRS, table)
    for i, (prompt, answer) in enumerate(PAIRS):
        ids = torch.tensor([[*prompt, *answer]])
        at = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        with torch.no_grad():
            base = models["base"](ids).logits[0].double().log_softmax(-1)
            for column, name in ((0, "a"), (2, "b")):
                log = models[name](ids).logits[0].double().log_softmax(-1)
                kl = sum(float((base[t].exp() * (base[t] - log[t])).sum()) for t in at) / len(answer)
                nll = -sum(float(log[t, token]) for t, token in zip(at, answer, strict=True)) / len(answer)
                assert float(losses.kl[i, column]) == pytest.approx(kl, rel=1e-4)
                assert float(losses.nll[i, column]) == pytest.approx(nll, rel=1e-4)
                assert kl > 1e-3
        base_nll = -sum(float(base[t, token]) for t, token in zip(at, answer, strict=True)) / len(answer)
        assert float(losses.base_nll[i]) == pytest.approx(base_nll, rel=1e-4)
    own = engine.engine.losses(PAIRS, [pushed(), NOTHING])
    assert torch.equal(losses.kl[:, [1, 3]], own.kl)
    assert torch.equal(losses.nll[:, [1, 3]], own.nll)


def test_the_nll_alone_is_that_of_losses_and_the_base_is_not_run_for_it(engine: TrainedEngine) -> None:
    table = [Intervention("a"), pushed(), Intervention("b"), NOTHING]
    wanted = engine.losses(PAIRS, table).nll
    rows: list[int] = []
    engine.engine.model.register_forward_hook(
        lambda _, args, kwargs, out: rows.append(len(out.logits)), with_kwargs=True
    )
    seen: list[tuple[int, int]] = []
    nll = engine.nll(PAIRS, table, lambda *steps: seen.append(steps))
    torch.testing.assert_close(nll, wanted, atol=1e-5, rtol=1e-5)
    assert sum(rows) == len(PAIRS) * len(table)
    assert seen == sorted(seen)
    assert seen[-1] == (6, 6)
    assert float((nll[:, 0] - nll[:, 2]).abs().min()) > 1e-3


def test_a_checkpoint_that_is_the_base_costs_exactly_nothing_and_answers_the_same(tmp_path: Path) -> None:
    write_weights(tmp_path / "0.safetensors", make_pico(), {})
    inner = TransformersEngine(make_pico(), make_tokenizer(), rows=4)
    engine = TrainedEngine(inner, {"zero": tmp_path / "0.safetensors"})
    losses = engine.losses(PAIRS, [Intervention("zero")])
    assert not losses.kl.any()
    assert torch.equal(losses.nll[:, 0], losses.base_nll)
    requests = [Request(ids) for ids in PROMPTS]
    zero = engine.generate(requests, [Intervention("zero")], 6)
    assert zero == inner.generate(requests, [NOTHING], 6)


def test_what_is_no_checkpoint_is_the_inner_engines_own(engine: TrainedEngine) -> None:
    requests = [Request(ids, i % 2) for i, ids in enumerate(PROMPTS)]
    table = [NOTHING, pushed()]
    assert engine.generate(requests, table, 4) == engine.engine.generate(requests, table, 4)
    assert torch.equal(engine.losses(PAIRS, table).kl, engine.engine.losses(PAIRS, table).kl)
    other = engine.prompt_losses(PAIRS, [(5, 8)] * 3)
    assert torch.equal(other.kl, engine.engine.prompt_losses(PAIRS, [(5, 8)] * 3).kl)
    assert engine.context == 256
    engine.slots = 2
    assert engine.engine.slots == engine.slots == 2


def test_probabilities_of_an_answer_are_the_models_own() -> None:
    inner = TransformersEngine(make_pico(), make_tokenizer(), rows=4)
    log = inner.log_probabilities((5, 9), (12, 80, 33))
    with torch.no_grad():
        wanted = make_pico()(torch.tensor([[5, 9, 12, 80, 33]])).logits[0, 1:4].log_softmax(-1)
    torch.testing.assert_close(log, wanted)
