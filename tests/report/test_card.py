"""The model card: a header that the Hub reads, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from runs import make_scores
from steer2edit.behaviours.safety import Safety
from steer2edit.models.embedded import EMBEDDED
from steer2edit.recipe import Recipe, load_recipe
from steer2edit.report.card import base_name, model_card
from steer2edit.report.page import markdown_table


def results() -> dict[str, Any]:
    def rate(mean: float) -> dict[str, Any]:
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 8}

    columns = ("refusal", "over_refusal", "over_refusal_borderline", "degenerate", "nll_rise", "utility_loss")
    by_style = ("refusal_request", "refusal_question", "refusal_long")
    accuracy = {"mean": None, "low": None, "high": None, "n": 0}  # none was measured
    configs = {"base": {}, "steering": {"gamma": 0.25}, "edit": {"rho_attn": 0.24, "rho_mlp": None, "alpha": 0.4}}
    measured = {"accuracy": accuracy, "accuracy_loss": accuracy} | {c: rate(0.5) for c in (*columns, *by_style)}
    return {
        "attribute": "refusal",
        "measures": [measure.to_json() for measure in Safety().measures],
        "systems": {kind: {"id": kind, "config": config} | measured for kind, config in configs.items()},
    }


CHOICE = {"rule": "highest refusal", "limits": {"over_refusal": 0.25, "degenerate": None}, "moved": True}


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("demo")


@pytest.mark.parametrize(
    ("kind", "relation", "library", "use"),
    [
        ("adapter", "adapter", "peft", "from_pretrained"),
        ("checkpoint", "finetune", "transformers", "from_pretrained"),
        ("gguf", "adapter", "gguf", "llama-cli -m MODEL.gguf --lora adapter.gguf"),
    ],
)
def test_a_card_says_what_it_is_made_from_how_and_what_was_measured(
    kind: str, relation: str, library: str, use: str, recipe: Recipe
) -> None:
    edit = make_scores().edit(rho_attn=0.24, rho_mlp=None, alpha=0.4).with_strength(0.5)
    card = ModelCard(model_card(recipe, edit, CHOICE, results(), kind))
    header = card.data.to_dict()
    assert header["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (header["base_model_relation"], header["library_name"]) == (relation, library)
    assert ("lora" in header["tags"]) == (kind in ("adapter", "gguf"))
    for said in (
        markdown_table(results()),
        "ρ_attn 0.24, ρ_mlp off",
        "α 0.4, strength 0.5",
        "highest refusal",
        "over-refusal (benign) ≤ 0.15, over-refusal (looks harmful) ≤ 0.2",
        edit.id,
        "0 of 4 MLP neurons",
        "limits",
        use,
    ):
        assert said in card.content


def test_the_card_of_the_steered_checkpoint_says_that_it_is_steered_and_how_strongly(recipe: Recipe) -> None:
    edit = make_scores().edit(rho_attn=0.24, rho_mlp=None, alpha=0.4)
    card = ModelCard(model_card(recipe, edit, CHOICE, results(), "steering"))
    header = card.data.to_dict()
    assert (header["base_model_relation"], header["library_name"]) == ("finetune", "transformers")
    assert header["tags"] == ["steer2edit", "activation-steering"]
    for said in ("steered for safety", "γ 0.25; chosen on", "as biases", markdown_table(results()), "from_pretrained"):
        assert said in card.content
    for of_the_edit in ("rank-1", "Edit `", "heads,"):
        assert of_the_edit not in card.content


def test_a_card_names_no_place_on_the_makers_machine(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    local = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(tmp_path / "my-model")})})
    edit = make_scores().edit(rho_attn=0.2, rho_mlp=0.2, alpha=0.0)
    text = model_card(local, edit, CHOICE, results(), "checkpoint")
    assert str(tmp_path) not in text
    assert ModelCard(text).data.to_dict()["base_model"] == "my-model"


def test_a_card_of_an_edit_that_moved_nothing_says_so(recipe: Recipe) -> None:
    edit = make_scores().edit(rho_attn=0.2, rho_mlp=0.2, alpha=0.0)
    still = CHOICE | {"moved": False, "attribute": Safety().attribute.to_json()}
    warning = "Nothing moved: on validation no edit has a better refusal (harmful) than the original model."
    assert warning in model_card(recipe, edit, still, results(), "adapter")
    assert "Nothing moved" not in model_card(recipe, edit, CHOICE, results(), "adapter")


def test_the_base_is_named_as_the_hub_names_it() -> None:
    assert base_name(EMBEDDED) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base_name("meta-llama/Llama-3.1-8B-Instruct") == "meta-llama/Llama-3.1-8B-Instruct"
    assert base_name("/somewhere/else/llama") == "llama"
    assert json.dumps(base_name("./llama")) == '"llama"'


def test_the_embedded_models_card_loads_what_was_measured(recipe: Recipe) -> None:
    text = model_card(recipe, make_scores().edit(rho_attn=0.2, rho_mlp=None, alpha=0.0), CHOICE, results(), "adapter")
    assert f'steer2edit.load_model("{EMBEDDED}")' in text
    assert "rounded to 4 bits (Q4_1)" in text
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": "owner/model"})})
    text = model_card(other, make_scores().edit(rho_attn=0.2, rho_mlp=None, alpha=0.0), CHOICE, results(), "adapter")
    assert 'from_pretrained("owner/model")' in text
    assert "Q4_1" not in text
