"""Every shipped recipe, with `auto` and next to no prompts, on a tiny random model of every family.

It ends with an edit that was chosen, or with one sentence that says why there is none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import make_tokenizer
from families import FAMILIES, make_family
from steer2edit.errors import Steer2EditError
from steer2edit.files.reading import read_json
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import run_all
from steer2edit.recipe import load_recipe, shipped_recipes

# A recipe's smallest numbers: how many prompts of each kind a split takes, so that a run is a matter of seconds.
SMALL: dict[str, dict[str, str]] = {
    "demo": {
        "data.probe": "{harmful: 4, benign: 4, borderline: 4}",
        "data.validation": "{harmful: 3, benign: 2, borderline: 2}",
        "data.test": "{harmful: 3, benign: 2, borderline: 2}",
    },
    **{
        name: {"data.probe": "8", "data.validation": "4", "data.test": "3"}
        for name in ("pirate", "sentiment", "lists", "truthfulness", "brevity")
    },
}
COMMON = {
    "search.points": "2",
    "search.alpha": "[0.4]",
    "evaluation.new_tokens": "4",
    "evaluation.utility_prompts": "3",
    "evaluation.utility_tokens": "6",
    "evaluation.resamples": "20",
    "exports": "[]",
}


def small(name: str, model: str) -> Any:
    changes = COMMON | SMALL[name] | {"model.name": f'"{model}"'}
    if name != "truthfulness" and name not in ("pirate", "sentiment", "lists"):
        changes["behaviour.new_tokens"] = "12"
    if name == "brevity":
        changes["behaviour.share"] = "0.4"
    return load_recipe(name, [f"{key}={value}" for key, value in changes.items()])


def test_every_shipped_recipe_is_tried_here() -> None:
    assert set(SMALL) == set(shipped_recipes())


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp(request.param)
    longer = {"max_position_embeddings": 1024}
    config = FAMILIES[request.param].config
    overrides: dict[str, Any] = {"text_config": config["text_config"] | longer} if "text_config" in config else longer
    make_family(request.param, **overrides).save_pretrained(str(place))
    make_tokenizer().save_pretrained(str(place))
    return str(place)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_it_ends_with_a_chosen_edit_or_one_sentence(
    folder: str, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = Run(tmp_path / "run", small(name, folder))
    try:
        run_all(run)
    except Steer2EditError as error:
        sentence = str(error)
        assert (request.node.callspec.params["folder"], name) not in EDITED, sentence
        assert sentence.startswith(SENTENCES), sentence
        assert "\n" not in sentence
        return
    choice, results = (read_json(run.path(file)) for file in ("choice.json", "evaluation/results.json"))
    limits = choice["limits"]
    assert choice["edit"] is not None
    assert all(choice["edit"][name] <= limit for name, limit in limits.items() if limit is not None)
    assert isinstance(choice["moved"], bool)
    assert results["systems"]["edit"]["utility_loss"]["n"] > 0
    assert {"base", "edit"} <= set(results["systems"])


# Of these the random weights of this seed leave an edit, so that not every case may end with a sentence.
EDITED = {("llama", "pirate"), ("llama", "sentiment")}
# What a run on random weights may end with: no strength has a useful KL, or no edit stays within the limits.
SENTENCES = (
    "nothing moved: no strength of any edit has a useful effect",
    "no edit stays within the limits on validation",
    "no edit is left to choose from",
    "there is no contrast between short and long answers",
)
