"""The suites' data files: the paper's grids, its best configurations, and its tables."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from steer2edit.errors import RecipeError
from steer2edit.method.variants import PAPERS
from steer2edit.models.load import empty_model
from steer2edit.paper.facts import (
    BEHAVIOURS,
    PROFILES,
    STYLES,
    known_model,
    layouts,
    machines,
    paper_models,
    profile_named,
    published,
)
from steer2edit.paper.machine import parameters

MODELS = list(paper_models())


def test_the_grids_are_the_papers() -> None:
    grids = {name: model.grid for name, model in paper_models().items()}
    assert grids["llama-2-7b-chat"].rho_attn == [0.16, 0.18, 0.2, 0.22, 0.24]
    assert grids["llama-2-7b-chat"].alpha == [0.7, 0.75, 0.8, 0.85, 0.9]
    assert grids["mistral-7b-instruct-v0.2"].rho_mlp == [0.4, 0.45, 0.5, 0.55, 0.6]
    assert grids["gemma-2-2b-it"].rho_mlp == [None]
    assert grids["llama-3-8b-instruct"].alpha == [0.3, 0.4, 0.5, 0.6, 0.7]
    assert grids["qwen3-4b-thinking-2507"].rho_attn == [None]
    assert grids["openmath-nemotron-7b"].rho_attn == [0.2, 0.25, 0.3]


@pytest.mark.parametrize("name", MODELS)
def test_the_best_configuration_lies_on_its_grid(name: str) -> None:
    model = paper_models()[name]
    assert all(getattr(model.best, key) in getattr(model.grid, key) for key in ("rho_attn", "rho_mlp", "alpha"))


@pytest.mark.parametrize("name", MODELS)
def test_the_shapes_have_the_parameters_of_the_models(name: str) -> None:
    """Against the model that transformers builds of such a configuration, without its norms and biases."""
    shape = paper_models()[name].shape
    config = AutoConfig.for_model(
        shape.model_type, vocab_size=shape.vocabulary, hidden_size=shape.d, intermediate_size=shape.neurons,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, tie_word_embeddings=shape.tied,
    )  # fmt: skip
    matrices = [p for p in empty_model(config).parameters() if p.dim() == 2]
    assert parameters(shape) == sum(p.numel() for p in matrices)
    billions = {
        "llama-2-7b-chat": 6.74, "mistral-7b-instruct-v0.2": 7.24, "gemma-2-2b-it": 2.61,
        "llama-3-8b-instruct": 8.03, "qwen3-4b-thinking-2507": 4.02, "openmath-nemotron-7b": 7.62,
    }  # fmt: skip
    assert parameters(shape) / 1e9 == pytest.approx(billions[name], abs=0.01)


def test_every_model_has_every_variant_and_table_3_is_the_mean_of_tables_4_to_6() -> None:
    tables = published()
    assert set(tables.models) == set(paper_models())
    for behaviour, utility in zip(BEHAVIOURS[:2], ("utility_safety", "utility_truthfulness"), strict=True):
        of_behaviour = [tables.models[name] for name, model in paper_models().items() if model.behaviour == behaviour]
        for variant in PAPERS:
            for column, measure in ((behaviour, "attribute"), (utility, "utility")):
                mean = sum(model[variant][measure] for model in of_behaviour) / 2
                assert tables.overall[variant][column] == pytest.approx(mean, abs=0.006)
    lengths = [tables.models[name] for name, model in paper_models().items() if model.behaviour == "efficiency"]
    for variant in PAPERS:
        score = sum(min(1, m["full"]["attribute"] / m[variant]["attribute"]) for m in lengths) / 2
        assert tables.overall[variant]["efficiency"] == pytest.approx(score, abs=0.006)


def test_the_mean_of_the_attacks_and_of_the_sets_is_what_the_paper_ranks() -> None:
    for name, model in paper_models().items():
        for row in published().models[name].values():
            if model.behaviour == "safety":
                assert row["attribute"] == pytest.approx((row["gcg_refusal"] + row["advllm_refusal"]) / 2, abs=1e-3)
            sets = [row[key] for key in ("commonsenseqa", "codemmlu", "gsm8k", "math500", "gpqa") if key in row]
            assert row["utility"] == pytest.approx(sum(sets) / len(sets), abs=2e-3)


def test_a_number_that_the_paper_does_not_have_is_none() -> None:
    assert published().number("llama-2-7b-chat", "full", "gsm8k") == 0.1893
    assert published().number("llama-2-7b-chat", "full", "piqa") is None
    assert published().number(None, "full", "gsm8k") is None
    assert published().number("gemma-2-2b-it", "steering", "gsm8k") is None


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_has_every_behaviour(name: str) -> None:
    assert tuple(profile_named(name).behaviours) == BEHAVIOURS
    assert set(profile_named(name).utility) == set(BEHAVIOURS) == set(layouts()) - set(STYLES)
    assert tuple(profile_named(name).styles) == (() if name == "paper" else STYLES)


def test_an_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no such profile \(got: papr\)\. Did you mean 'paper'\?"):
        profile_named("papr")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_known_by_all_of_its_names(name: str) -> None:
    model = paper_models()[name]
    assert {known_model(text) for text in (name, model.hub, model.title, model.hub.upper())} == {name}


def test_the_machines_say_that_they_are_assumed() -> None:
    assert 0 < machines().compute_share < 1
    assert 0 < machines().bandwidth_share < 1
    assert [machine.memory for machine in machines().machines] == [24e9, 80e9]
