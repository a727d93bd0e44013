"""A temperature draws from the model's distribution, by each request's own seed, in every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats

from steer2edit.engines.base import GREEDY, Request, Sampling
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import Steer2EditError
from steer2edit.method.intervention import NOTHING, Intervention, Term
from steer2edit.models.sites import find_sites
from steer2edit.probing.chat import Chat

WARM = Sampling(temperature=0.9, top_p=0.95, top_k=50)


def an_engine(model: Any, tokenizer: Any, *, slotted: bool = True, **options: Any) -> TransformersEngine:
    engine = TransformersEngine(model, tokenizer, **options)
    engine.stops, engine.slotted = set(), slotted
    return engine


def ids_of(engine: Any, requests: list[Request], sampling: Sampling, new: int = 10) -> list[tuple[int, ...]]:
    return [a.ids for a in engine.generate(requests, [NOTHING], new, sampling=sampling)]


@pytest.mark.parametrize("slotted", [True, False])
def test_temperature_0_and_top_k_1_are_greedy(pico: Any, tokenizer: Any, prompts: Any, slotted: bool) -> None:
    engine = an_engine(pico(), tokenizer, slotted=slotted, rows=3)
    requests = [Request(p, seed=i) for i, p in enumerate(prompts)]
    greedy = [a.ids for a in engine.generate(requests, [NOTHING], 10)]
    assert ids_of(engine, requests, GREEDY) == greedy
    assert ids_of(engine, requests, Sampling(0.0, 0.5, 7)) == greedy
    assert ids_of(engine, requests, Sampling(2.0, top_k=1)) == greedy
    assert ids_of(engine, requests, Sampling(1e-40)) == greedy
    assert ids_of(engine, requests, WARM) != greedy


def test_a_seed_gives_one_answer_however_the_requests_share_batches(pico: Any, tokenizer: Any, prompts: Any) -> None:
    model = pico()
    requests = [Request(p, seed=seed) for p in prompts for seed in (0, 1, 2)]
    alone = [ids_of(an_engine(model, tokenizer), [request], WARM)[0] for request in requests]
    assert len(set(alone)) == len(requests)
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(1)).tolist()
    for slotted in (True, False):
        for rows in (1, 4, 64):
            engine = an_engine(model, tokenizer, slotted=slotted, rows=rows)
            assert ids_of(engine, requests, WARM) == alone
            assert ids_of(engine, [requests[i] for i in order], WARM) == [alone[i] for i in order]
    shorter = ids_of(an_engine(model, tokenizer), requests, WARM, new=4)
    assert shorter == [ids[:4] for ids in alone]


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=str)
@pytest.mark.parametrize("slotted", [True, False])
def test_what_overflows_in_one_row_reaches_no_other(
    pico: Any, tokenizer: Any, slotted: bool, sampling: Sampling
) -> None:
    """Not those beside it, nor those that take its slot: a masked value that is not finite would still count."""
    model = pico()
    site = next(site for site in find_sites(model) if site.block == "mlp")
    huge = Intervention("huge", {site.key: Term(torch.full((site.d, 1), 1e38), torch.full((1, site.inputs), 1e38))})
    engine = an_engine(model, tokenizer, slotted=slotted, rows=2)
    # What takes the first slot is shorter than what runs beside it, which looks as far as the first one's numbers lie.
    lengths = (14, 13, 3, 9)
    requests = [Request(tuple(range(5, 5 + length)), row=int(i == 0), seed=i) for i, length in enumerate(lengths)]
    together = engine.generate(requests, [NOTHING, huge], 8, sampling=sampling)
    assert len(together[0].ids) == 8
    alone = [engine.generate([request], [NOTHING, huge], 8, sampling=sampling)[0] for request in requests[1:]]
    assert [answer.ids for answer in together[1:]] == [answer.ids for answer in alone]


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_p=0.8), Sampling(1.3, 0.9, 12)], ids=str)
def test_first_tokens_are_as_frequent_as_the_softmax_says(pico: Any, tokenizer: Any, sampling: Sampling) -> None:
    model, prompt = pico(), (5, 9, 17, 30)
    with torch.no_grad():
        scores = model(torch.tensor([prompt])).logits[0, -1].double() / sampling.temperature
    if sampling.top_k:
        scores[scores < scores.sort().values[-sampling.top_k]] = -torch.inf
    p, order = scores.softmax(-1).sort(descending=True)
    p[p.cumsum(-1) - p >= sampling.top_p] = 0
    expected = torch.zeros_like(p).scatter(0, order, p / p.sum())
    draws = ids_of(an_engine(model, tokenizer), [Request(prompt, seed=s) for s in range(2000)], sampling, new=1)
    counts = torch.bincount(torch.tensor(draws)[:, 0], minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0
    common = expected > 5 / 2000
    observed, wanted = ([*x[common].tolist(), float(x[~common].sum())] for x in (counts, 2000 * expected))
    if wanted[-1] == 0:
        observed.pop(), wanted.pop()
    assert len(wanted) > 5
    assert stats.chisquare(observed, wanted).pvalue > 0.01


@pytest.mark.parametrize("values", [(-0.1,), (float("nan"),), (float("inf"),), (1.0, 0.0), (1.0, 1.1), (1.0, 1.0, -1)])
def test_values_out_of_range_are_refused(values: Any) -> None:
    with pytest.raises(Steer2EditError, match="a sampling value is out of its range"):
        Sampling(*values)


@pytest.mark.parametrize("slotted", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_an_answer_ends_at_its_first_stop_string(
    pico: Any, tokenizer: Any, prompts: Any, slotted: bool, rows: int
) -> None:
    model = pico(vocab_size=298, seed=3)  # every token is one of the tokenizer's
    requests = [Request(p) for p in prompts]
    whole = an_engine(model, tokenizer, rows=rows).generate(requests, [NOTHING], 24)
    raw = [tokenizer.decode(a.ids) for a in whole]
    stop = (raw[0][5:8], raw[1][9:11])
    engine = an_engine(model, tokenizer, slotted=slotted, rows=rows, chat=Chat(stop=stop))
    answers = engine.generate(requests, [NOTHING], 24)
    for answer, text in zip(answers, raw, strict=True):
        cut = min((text.find(string) for string in stop if string in text), default=None)
        assert answer.ended == (cut is not None)
        expected = tokenizer.decode(tokenizer(text[:cut], add_special_tokens=False)["input_ids"])
        assert answer.text in (text[:cut], expected)
        assert text.startswith(tokenizer.decode(answer.ids))
        assert not any(string in tokenizer.decode(answer.ids) for string in stop)
    assert answers[0].ended
    assert answers[1].ended
    assert len(answers[0].ids) < 24


def test_a_slot_is_free_at_the_stop_string(pico: Any, tokenizer: Any) -> None:
    model, prompt = pico(), (5, 9, 17)
    engine = an_engine(model, tokenizer)
    ids = engine.generate([Request(prompt)], [NOTHING], 40)[0].ids
    third = tokenizer.decode(ids[2:4])
    engine = an_engine(model, tokenizer, chat=Chat(stop=(third,)))
    engine.generate([Request(prompt)], [NOTHING], 40)
    assert engine.forward_passes <= 6


def test_a_special_token_can_be_a_stop_string(tokenizer: Any) -> None:
    from steer2edit.engines.answers import StopStrings, answer_of

    ids = tokenizer("Sure, here.<|im_start|>user")["input_ids"]
    answer = answer_of(tokenizer, Request((5,)), ids, False, ("<|im_start|>",))
    assert (answer.text, answer.ended) == ("Sure, here.", True)
    strings = StopStrings(tokenizer, ("<|im_start|>",))
    assert strings.end(ids[: ids.index(1) + 1])
    assert not strings.end(ids[: ids.index(1)])
