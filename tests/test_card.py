"""The model card: a header that the Hub reads, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from runs import make_scores
from steer2edit.config import Recipe, load_recipe
from steer2edit.models import EMBEDDED
from steer2edit.report.card import base_name, model_card
from steer2edit.report.page import markdown_table


def results() -> dict[str, Any]:
    def rate(mean: float) -> dict[str, Any]:
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 8}

    columns = ("refusal", "over_refusal", "over_refusal_borderline", "degenerate", "nll_rise", "utility_loss")
    systems = {"base": "base", "steering": "steering-0.25", "edit": "edit-0.24-off-0.4"}
    return {"systems": {k: {"id": i} | {c: rate(0.5) for c in columns} for k, i in systems.items()}}


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("demo")


@pytest.mark.parametrize(
    ("kind", "relation", "library"), [("adapter", "adapter", "peft"), ("checkpoint", "finetune", "transformers")]
)
def test_a_card_says_what_it_is_made_from_how_and_what_was_measured(
    kind: str, relation: str, library: str, recipe: Recipe
) -> None:
    edit = make_scores().edit(rho_attn=0.24, rho_mlp=None, alpha=0.4).with_strength(0.5)
    card = ModelCard(model_card(recipe, edit, results(), kind))
    header = card.data.to_dict()
    assert header["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (header["base_model_relation"], header["library_name"]) == (relation, library)
    assert ("lora" in header["tags"]) == (kind == "adapter")
    for said in (
        markdown_table(results()),
        "ρ_attn 0.24, ρ_mlp off",
        "α 0.4, strength 0.5",
        "over refusal ≤ 0.25",
        edit.id,
        "0 of 4 MLP neurons",
        "limits",
        "from_pretrained",
    ):
        assert said in card.content


def test_a_card_names_no_place_on_the_makers_machine(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    local = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(tmp_path / "my-model")})})
    edit = make_scores().edit(rho_attn=0.2, rho_mlp=0.2, alpha=0.0)
    text = model_card(local, edit, results(), "checkpoint")
    assert str(tmp_path) not in text
    assert ModelCard(text).data.to_dict()["base_model"] == "my-model"


def test_the_base_is_named_as_the_hub_names_it() -> None:
    assert base_name(EMBEDDED) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base_name("meta-llama/Llama-3.1-8B-Instruct") == "meta-llama/Llama-3.1-8B-Instruct"
    assert base_name("/somewhere/else/llama") == "llama"
    assert json.dumps(base_name("./llama")) == '"llama"'
