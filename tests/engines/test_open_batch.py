"""Rows of an open batch answer as `generate` does, whenever they join and whatever happens to the others."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from steer2edit.engines.base import GREEDY, Request, Sampling
from steer2edit.engines.open_batch import GROWTH, IDLE_INTERVENTIONS, OpenBatch, OpenRow
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import ModelError, Steer2EditError
from steer2edit.method.intervention import NOTHING, Intervention, steering

WARM = Sampling(0.9, 0.9, 40)


def an_engine(model: Any, tokenizer: Any, rows: int = 4) -> TransformersEngine:
    engine = TransformersEngine(model, tokenizer, rows=rows)
    engine.stops = set()
    return engine


def interventions(model: Any, make_edit: Any) -> list[Intervention]:
    edit = make_edit(model)
    vector = {"1.mlp": torch.randn(32, generator=torch.Generator().manual_seed(1))}
    return [NOTHING, edit.intervention("edit"), steering(vector, 0.7), edit.with_strength(-0.5).intervention("back")]


def alone(engine: TransformersEngine, row: OpenRow) -> tuple[int, ...]:
    """What generate answers to a row's request alone."""
    request = Request(row.request.ids, 0, row.seed_given)  # type: ignore[attr-defined]
    return engine.generate([request], [row.intervention], row.limit, sampling=row.draw.sampling)[0].ids


def a_row(engine: Any, ids: Any, intervention: Intervention, limit: int, sampling: Any = GREEDY, seed: int = 0) -> Any:
    row = OpenRow(engine, ids, intervention, limit=limit, sampling=sampling, seed=seed)
    row.seed_given = seed  # type: ignore[attr-defined]
    return row


@torch.inference_mode()
def until_idle(batch: OpenBatch) -> None:
    for _ in range(2000):
        if not batch.busy:
            return
        batch.step()
    raise AssertionError("the batch never ends")


@torch.inference_mode()
def test_rows_that_come_and_go_answer_as_alone(pico: Any, tokenizer: Any, make_edit: Any) -> None:
    model = pico()
    table = interventions(model, make_edit)
    engine = an_engine(model, tokenizer)
    batch, draw = OpenBatch(engine), random.Random(3)
    rows = []
    for i in range(24):
        ids = [draw.randrange(3, 300) for _ in range(draw.choice((1, 2, 9, 30)))]
        rows.append(a_row(engine, ids, table[i % 4], draw.randrange(1, 20), WARM if i % 3 == 0 else GREEDY, seed=i))
    for i, row in enumerate(rows):
        batch.add(row)
        for _ in range(draw.choice((0, 1, 4))):
            batch.step()
        assert len(batch.rows) <= engine.slots
        if i == 12:
            until_idle(batch)
    until_idle(batch)
    assert all(row.done and row.failure is None for row in rows)
    assert [tuple(row.ids) for row in rows] == [alone(engine, row) for row in rows]
    assert batch._slots is None


@torch.inference_mode()
def test_a_row_that_is_dropped_leaves_the_others_alone(pico: Any, tokenizer: Any, make_edit: Any) -> None:
    model = pico()
    table = interventions(model, make_edit)
    engine = an_engine(model, tokenizer, rows=3)
    batch = OpenBatch(engine)
    rows = [a_row(engine, [5, 9, 17 + i], table[i % 4], 15) for i in range(6)]
    for row in rows:
        batch.add(row)
    batch.step(), batch.step()
    batch.drop(rows[1])  # has a slot
    batch.drop(rows[4])  # waits for one
    batch.drop(rows[4])
    until_idle(batch)
    for i in (0, 2, 3, 5):
        assert tuple(rows[i].ids) == alone(engine, rows[i])
    assert len(rows[1].ids) == 2
    assert rows[4].ids == []


@torch.inference_mode()
def test_an_idle_model_has_no_hooks_and_no_cache(pico: Any, tokenizer: Any, make_edit: Any) -> None:
    model = pico()
    engine = an_engine(model, tokenizer)
    batch = OpenBatch(engine)
    ids = torch.tensor([[5, 9, 17]])
    before = model(ids).logits
    row = a_row(engine, [5, 9], interventions(model, make_edit)[1], 50)
    batch.add(row)
    batch.step()
    assert not torch.equal(model(ids).logits, before)
    batch.drop(row)
    assert torch.equal(model(ids).logits, before)
    assert batch._slots is None


@torch.inference_mode()
def test_long_answers_make_room_and_give_it_back(pico: Any, tokenizer: Any) -> None:
    engine = an_engine(pico(max_position_embeddings=1024), tokenizer)
    batch = OpenBatch(engine)
    long = a_row(engine, [7] * 10, NOTHING, 2 * GROWTH)
    short = [a_row(engine, [8, 9 + i], NOTHING, 2 * GROWTH + 20) for i in range(3)]
    batch.add(long)
    while len(long.ids) < GROWTH:
        batch.step()
    assert batch._slots is not None
    assert batch._slots.cache.capacity == 2 * GROWTH
    for row in short:
        batch.add(row)
    until_idle(batch)
    for row in (long, *short):
        assert tuple(row.ids) == alone(engine, row)


@torch.inference_mode()
def test_the_table_keeps_few_interventions_that_nobody_uses(pico: Any, tokenizer: Any, make_edit: Any) -> None:
    model = pico()
    engine, edit = an_engine(model, tokenizer), make_edit(model)
    batch = OpenBatch(engine)
    for i in range(3 * IDLE_INTERVENTIONS):
        batch.add(a_row(engine, [5, 9], edit.with_strength(1 + i / 10).intervention(str(i)), 2))
        until_idle(batch)
    assert len(batch._table) <= IDLE_INTERVENTIONS + 2


@torch.inference_mode()
@pytest.mark.parametrize("where", ["next_logits", "prefill"])
def test_when_memory_runs_out_rows_wait_again_and_keep_their_tokens(
    pico: Any, tokenizer: Any, make_edit: Any, monkeypatch: Any, where: str
) -> None:
    model = pico()
    table = interventions(model, make_edit)
    engine = an_engine(model, tokenizer, rows=8)
    batch = OpenBatch(engine)
    rows = [a_row(engine, [5, 9, 17 + i], table[i % 4], 12, WARM if i % 2 else GREEDY, seed=i) for i in range(8)]
    for row in rows[:5]:
        batch.add(row)
    for _ in range(4):
        batch.step()
    for row in rows[5:]:
        batch.add(row)
    whole, broken = getattr(engine, where), [True]

    def once(*arguments: Any) -> Any:
        if broken.pop() if broken else False:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(*arguments)

    monkeypatch.setattr(engine, where, once)
    assert batch.step() == []
    assert engine.slots == 4
    assert [len(row.ids) for row in rows] == [4] * 5 + [0] * 3
    until_idle(batch)
    assert [tuple(row.ids) for row in rows] == [alone(engine, row) for row in rows]


@torch.inference_mode()
def test_a_request_for_which_memory_never_suffices_fails(pico: Any, tokenizer: Any, monkeypatch: Any) -> None:
    engine = an_engine(pico(), tokenizer, rows=4)

    def never(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(engine, "next_logits", never)
    batch = OpenBatch(engine)
    rows = [a_row(engine, [5, 9 + i], NOTHING, 5) for i in range(3)]
    for row in rows:
        batch.add(row)
    until_idle(batch)
    assert all(isinstance(row.failure, Steer2EditError) and row.done for row in rows)
    assert engine.slots == 1


@torch.inference_mode()
def test_numbers_that_are_not_finite_end_one_row_and_not_the_next_in_its_slot(pico: Any, tokenizer: Any) -> None:
    model = pico()
    engine = an_engine(model, tokenizer, rows=2)
    batch = OpenBatch(engine)
    wild = steering({"0.mlp": torch.full((32,), torch.inf)}, 1.0)
    rows = [a_row(engine, [5, 9, 17], intervention, 12) for intervention in (wild, NOTHING, NOTHING)]
    for row in rows:
        batch.add(row)
    until_idle(batch)
    assert rows[0].failure is not None
    assert "not finite" in str(rows[0].failure)
    assert [row.failure for row in rows[1:]] == [None, None]
    assert tuple(rows[1].ids) == tuple(rows[2].ids) == alone(engine, rows[1])


def test_a_family_without_slots_is_refused(pico: Any, tokenizer: Any) -> None:
    engine = an_engine(pico(), tokenizer)
    engine.slotted = False
    with pytest.raises(ModelError, match="cannot share an open batch"):
        OpenBatch(engine)
