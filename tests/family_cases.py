"""A model of every family with what is made of it, and what transformers itself gives."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import steer2edit as s2e
from conftest import VOCABULARY, make_tokenizer, make_traces
from families import FAMILIES, WINDOW, Row, make_family

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


_CASES: dict[str, Case] = {}


def made_case(folders: pytest.TempPathFactory, name: str) -> Case:
    """One family's case, made once for all tests."""
    if name not in _CASES:
        model = make_family(name)
        probe = s2e.collect(model, make_tokenizer(), *make_traces())
        scores = s2e.score(model, probe, expert_tokens=1)
        edit = scores.edit(**BUDGET)
        folder = folders.mktemp("family") / "base"
        model.save_pretrained(folder)
        _CASES[name] = Case(FAMILIES[name].rows, model, probe, scores, edit, applied(edit, model), folder)
    return _CASES[name]


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
