"""What the worker of the vLLM engine does where the model is, on models that stand in for vLLM's."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from steer2edit.engines import vllm_worker


class Toy(nn.Module):
    """As vLLM's: a map that answers with a tuple, a model that answers with hidden states of a run of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.o_proj = Tupled()
        self.head = nn.Linear(6, 11)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.embed(input_ids))[0]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)


class Tupled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


class Place(vllm_worker.Extension):
    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = Toy()

    def get_model(self) -> Toy:
        return self.model


def test_the_worker_draws_by_each_requests_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recording:
        def __init__(self) -> None:
            self.params: list[dict[str, Any]] = []

        def add_request(self, name: str, prompt: Any, params: Any, lora_request: Any) -> None:
            self.params.append(vars(params))

        def has_unfinished_requests(self) -> bool:
            return False

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=None))  # type: ignore[arg-type]
    worker = vllm_worker.Worker(print)
    worker.engine = engine = Recording()
    fixed = {"max_tokens": 5, "stop_token_ids": [2], "ignore_eos": True, "detokenize": False}
    requests = [[[1], None], [[2], None]]
    warm = {"temperature": 0.7, "top_p": 0.9, "top_k": 20}
    worker.generate(requests, 5, [2], None, warm, [8, 9])
    worker.generate(requests, 5, [2], None, {}, [])
    assert engine.params[:2] == [fixed | warm | {"seed": 8}, fixed | warm | {"seed": 9}]
    assert engine.params[2:] == [fixed | {"temperature": 0.0}] * 2


@pytest.mark.parametrize("parts", [(9,), (4, 5), (1, 1, 7), (8, 1)])
@pytest.mark.parametrize("padding", [0, 3])
def test_positions_are_scored_whatever_parts_they_come_in(parts: tuple[int, ...], padding: int) -> None:
    ids, first = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5]), 3
    answer = [*ids[first + 1 :].tolist(), 7]
    place: Any = Place()
    other = nn.Linear(6, 11)

    def score(base: bool) -> Any:
        place.s2e_watch(first, len(answer))
        at = 0
        for size in parts:  # what fills up a batch has old positions, among them ones that are yet to come
            positions = torch.cat([torch.arange(at, at + size), torch.arange(at + size, at + size + 2)[:padding]])
            if at + size < 9:
                positions = positions[:size]  # only the last part of a prompt is not full
            place.model(torch.cat([ids[at : at + size], ids[: len(positions) - size]]), positions=positions)
            at += size
        return place.s2e_score(0, answer, base)

    kl, nll, greedy = score(True)
    log_base = place.model.head(place.model(ids, positions=None)[first:]).detach().log_softmax(-1)
    assert kl == 0.0
    assert nll == pytest.approx(-float(log_base[range(6), answer].mean()), abs=1e-6)
    assert greedy == float(log_base.argmax(-1).tolist() == answer)
    place.model.head = other
    kl, nll, _ = score(False)
    log_row = other(place.model(ids, positions=None)[first:]).detach().log_softmax(-1)
    assert kl == pytest.approx(float((log_base.exp() * (log_base - log_row)).sum(-1).mean()), abs=1e-6)
    assert nll == pytest.approx(-float(log_row[range(6), answer].mean()), abs=1e-6)


def test_positions_that_were_not_run_are_noticed() -> None:
    place: Any = Place()
    place.s2e_watch(1, 3)
    place.model(torch.tensor([3, 1]), positions=torch.arange(2))
    with pytest.raises(RuntimeError, match="1 positions were seen, of 3"):
        place.s2e_score(0, [1, 2, 3], True)


def test_steering_is_added_counted_and_taken_off(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    place: Any = Place()
    ids = torch.tensor([3, 1])
    before = place.model(ids, positions=None)
    save_file({"o_proj": torch.arange(6.0), "elsewhere": torch.ones(6)}, str(tmp_path / "b"))
    assert place.s2e_steer(str(tmp_path / "b")) == ["o_proj"]
    for _ in range(3):
        torch.testing.assert_close(place.model(ids, positions=None), before + torch.arange(6.0))
    assert place.s2e_release() == 3
    assert place.model(ids, positions=None).equal(before)
    # Partial sums that are added up elsewhere gain it on the first rank alone.
    place.model.o_proj.base_layer = SimpleNamespace(tp_size=2, tp_rank=1, reduce_results=False)
    assert place.s2e_steer(str(tmp_path / "b")) == ["o_proj"]
    assert place.model(ids, positions=None).equal(before)
    assert place.s2e_release() is None
