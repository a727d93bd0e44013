"""An evaluation in Python against numbers by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import steer2edit as s2e
from conftest import make_pico, make_tokenizer
from python_search import EVALUATION, PROMPTS, SAID, Counting, _greedy, _preferred, _search
from sides import chatml, three_parts
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import EditError, RecipeError, Steer2EditError
from steer2edit.searching.in_python import SearchResult, evaluate


@pytest.fixture(scope="module")
def model() -> Any:
    return make_pico(max_position_embeddings=512)


@pytest.fixture
def engine(model: Any) -> Counting:
    return Counting(model, make_tokenizer())


@pytest.fixture(scope="module")
def found(model: Any) -> SearchResult:
    return _search(model)


TRIPLES = [(f"Is it so, {i}?", f"{SAID[i % 5]} Yes.", SAID[(i + 3) % 5]) for i in range(8)]


def _evaluate(model: Any, edit: Any, prompts: Any = TRIPLES, score: Any = "preference", **options: Any) -> Any:
    tokenizer = None if isinstance(model, TransformersEngine) else make_tokenizer()
    return evaluate(model, tokenizer, edit, prompts, score, **({"evaluation": EVALUATION, "resamples": 200} | options))


def _wilson(values: Sequence[float]) -> tuple[float, float]:
    n, p, z = len(values), sum(values) / len(values), 1.959963984540054
    centre, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - reach) / (1 + z * z / n), (centre + reach) / (1 + z * z / n)


def _bootstrap(values: Sequence[float], resamples: int, seed: int) -> tuple[float, float]:
    draw = np.random.default_rng(seed)
    means = [np.mean([values[i] for i in row]) for row in draw.integers(0, len(values), size=(resamples, len(values)))]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _assert_interval(of: Mapping[str, Any], values: Sequence[float], bounds: tuple[float, float]) -> None:
    assert of["n"] == len(values)
    assert of["mean"] == pytest.approx(sum(values) / len(values), abs=2e-5)
    assert (of["low"], of["high"]) == pytest.approx(bounds, abs=2e-5)


def test_an_evaluation_is_that_of_losses_by_hand(found: SearchResult, model: Any) -> None:
    edit = found.scores.edit(rho_attn=0.02, rho_mlp=0.05, alpha=0.2)
    tokenizer = make_tokenizer()
    results = _evaluate(model, edit, seed=3)
    assert (results["attribute"], results["utility"]) == ("preference", "utility_loss")
    assert list(results["systems"]) == ["base", "edit"]
    base = _preferred(model, tokenizer, TRIPLES)
    with edit.applied(model):
        changed = _preferred(model, tokenizer, TRIPLES)
    assert base[0] != changed[0]
    for kind, (preference, margin) in (("base", base), ("edit", changed)):
        system = results["systems"][kind]
        _assert_interval(system["preference"], preference, _wilson(preference))
        _assert_interval(system["margin"], margin, _bootstrap(margin, 200, 3))
    assert results["systems"]["base"]["utility_loss"]["mean"] == 0.0
    assert results["systems"]["edit"]["utility_loss"]["n"] == 2
    assert "degenerate" not in results["systems"]["base"]  # nothing was answered freely


def test_the_utility_loss_is_that_of_kl(engine: Counting, found: SearchResult, model: Any) -> None:
    edit = found.scores.edit(rho_attn=0.02, rho_mlp=0.05, alpha=0.2)
    results = _evaluate(engine, edit)
    asked = [text.split("\n")[1].removesuffix("<|im_end|>") for text in dict.fromkeys(engine.answered)]
    assert len(asked) == 2
    measured = s2e.kl(model, make_tokenizer(), edit, asked, new_tokens=4)
    assert results["systems"]["edit"]["utility_loss"]["mean"] == pytest.approx(measured["mean"], rel=1e-4)


def test_the_utility_loss_is_measured_on_other_prompts_than_those_of_the_search(
    engine: Counting, found: SearchResult
) -> None:
    _search(engine)
    searched = {text for text in engine.answered if text not in set(map(chatml, PROMPTS))}
    engine.answered = []
    _evaluate(engine, found.scores.edit(rho_attn=0.02, rho_mlp=None, alpha=0.2))
    assert len(searched) == len(set(engine.answered)) == 2
    assert not searched & set(engine.answered)


def _lengths(model: Any, prompts: Sequence[str]) -> list[float]:
    return [float(len(_greedy(model, make_tokenizer(), chatml(prompt), 4))) for prompt in prompts]


def test_a_score_is_evaluated_on_answers(found: SearchResult, model: Any) -> None:
    prompts = [f"Tell me of {i}." for i in range(6)]
    edit = found.scores.edit(rho_attn=0.005, rho_mlp=None, alpha=0.2)
    results = _evaluate(model, edit, prompts, lambda prompt, response: len(response), title="letters")
    base = _lengths(model, prompts)
    with edit.applied(model):
        changed = _lengths(model, prompts)
    assert base != changed
    for kind, values in (("base", base), ("edit", changed)):
        system = results["systems"][kind]
        _assert_interval(system["shown"], values, _bootstrap(values, 200, 0))
        assert system["degenerate"]["n"] == 6
    assert results["attribute"] == "shown"
    phrases = _evaluate(model, edit, prompts, {"phrases": [_greedy(model, make_tokenizer(), chatml(prompts[0]), 4)]})
    rate = phrases["systems"]["base"]["shown"]
    assert rate["n"] == 6
    assert (rate["low"], rate["high"]) == pytest.approx(_clipped(_wilson_of(rate["mean"], 6)), abs=1e-9)


def _wilson_of(share: float, n: int) -> tuple[float, float]:
    count = round(share * n)
    return _wilson([1.0] * count + [0.0] * (n - count))


def _clipped(bounds: tuple[float, float]) -> tuple[float, float]:
    return max(0.0, bounds[0]), min(1.0, bounds[1])


def test_a_combination_is_evaluated_as_one(found: SearchResult, model: Any) -> None:
    one, other = (found.scores.edit(rho_attn=rho, rho_mlp=None, alpha=0.2) for rho in (0.02, 0.05))
    both = s2e.combine(one, other)
    results = _evaluate(model, both)
    with both.applied(model):
        preference, margin = _preferred(model, make_tokenizer(), TRIPLES)
    assert results["systems"]["edit"]["margin"]["mean"] == pytest.approx(sum(margin) / 8, abs=2e-5)
    assert results["systems"]["edit"]["preference"]["mean"] == sum(preference) / 8


@pytest.mark.parametrize(
    ("prompts", "score", "kind", "said"),
    [
        ([], "preference", EditError, "there are no prompts to evaluate on"),
        ("How?", {"length": "lower"}, EditError, "Give a list of prompts."),
        (["How?"], "preference", RecipeError, "Give triples (prompt, response that shows it, response that doesn't)"),
        ([("How?", "a")], "preference", RecipeError, "preference compares two responses"),
        ([("How?", "a", None)], "preference", RecipeError, "preference compares two responses"),
        ([("How?", "a", "")], "preference", RecipeError, "a choice has no text"),
        (["How?"], {"patern": "a"}, RecipeError, "Did you mean 'pattern'?"),
        (["How?"], lambda prompt, response: None, RecipeError, "the score of an answer is no number"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(
    prompts: Any, score: Any, kind: type[Steer2EditError], said: str, found: SearchResult, model: Any
) -> None:
    edit = found.scores.edit(rho_attn=0.02, rho_mlp=None, alpha=0.2)
    with pytest.raises(kind) as error:
        _evaluate(model, edit, prompts, score)
    three_parts(error.value)
    assert said in str(error.value)


def test_a_model_with_the_edit_in_it_is_not_evaluated(found: SearchResult) -> None:
    edit = found.scores.edit(rho_attn=0.02, rho_mlp=None, alpha=0.2)
    edited = make_pico(max_position_embeddings=512)
    edit.apply(edited)
    with pytest.raises(EditError, match="already"):
        _evaluate(edited, edit)


def test_an_evaluation_leaves_the_model_as_it_was(found: SearchResult, model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edit = found.scores.edit(rho_attn=0.02, rho_mlp=None, alpha=0.2)
    first = _evaluate(model, edit)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert _evaluate(model, edit) == first
