"""A behaviour of one's own in a recipe and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from own_behaviour import LOUD, SOFT, _files, _prompts, custom, of_files
from runs import is_one_sentence, said_by, save_pico
from sides import small_recipe, three_parts, write_rows
from steer2edit.errors import RecipeError
from steer2edit.recipe import parse_recipe, refuse_code


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_pico(tmp_path_factory.mktemp("pico") / "model")


def test_a_recipe_with_any_score_comes_back_from_yaml() -> None:
    for score in (
        "preference",
        {"pattern": "(?i)ahoy"},
        {"phrases": ["ahoy", "matey"]},
        {"length": "lower", "longest": 40},
        {"classifier": "a/b", "label": "pirate", "format": "minos"},
        {"judge": {"local": "some/model", "question": "Is it a pirate?"}},
        {"judge": {"endpoint": "http://localhost:8000/v1", "model": "m", "question": "Is it a pirate?"}},
        {"python": "mine.py:pirate", "better": "lower", "worst": 5, "best": 0},
    ):
        behaviour = {"name": "custom", "more": {"system": LOUD}, "less": {"system": SOFT}, "score": score}
        recipe = small_recipe("nowhere", behaviour)
        again = parse_recipe(yaml.safe_load(recipe.to_yaml()))
        assert again == recipe
        assert type(again.behaviour.score) is type(recipe.behaviour.score)
        assert again.to_yaml() == recipe.to_yaml()


def test_a_recipe_of_custom_needs_no_counts_and_takes_numbers() -> None:
    sides = {"name": "custom", "more": {"system": LOUD}, "less": {"system": SOFT}}
    recipe = small_recipe("nowhere", sides, data={"probe": 12, "test": {"prompt": 5}})
    assert (recipe.data.probe, recipe.data.validation, recipe.data.test) == ({"prompt": 12}, None, {"prompt": 5})
    assert recipe.source.counts == {"probe": {"prompt": 12}, "validation": None, "test": {"prompt": 5}}
    assert recipe.utility.prompts == "builtin:neutral_prompts"
    bare = parse_recipe({"name": "a", "model": {"name": "m"}, "behaviour": sides})
    assert (bare.evaluation.utility_prompts, bare.evaluation.utility_tokens) == (8, 32)
    with pytest.raises(RecipeError, match=r"unknown key data\.test\.prompts .*Did you mean 'prompt'"):
        small_recipe("nowhere", sides, data={"test": {"prompts": 5}})


def test_what_a_run_depends_on_are_its_files(tmp_path: Path) -> None:
    behaviour = of_files("a.jsonl", "builtin:pirate", score={"python": "mine.py:f"}, traces="t.jsonl")
    assert behaviour.files == ("t.jsonl", "a.jsonl", "mine.py")
    assert behaviour.runs_code
    assert not custom(score={"pattern": "a"}).runs_code


def test_code_is_run_only_if_somebody_trusts_it() -> None:
    sides = {"name": "custom", "more": {"system": LOUD}, "less": {"system": SOFT}}
    recipe = small_recipe("nowhere", {**sides, "score": {"python": "mine.py:f"}})
    with pytest.raises(RecipeError) as error:
        refuse_code(recipe, False)
    assert three_parts(error.value) == (
        "the recipe's score runs a Python file",
        "mine.py",
        "Read that file; if you trust it, give --trust-recipe-code.",
    )
    refuse_code(recipe, True)
    refuse_code(small_recipe("nowhere", sides), False)
    plain = small_recipe("theirs", sides)
    of_model = plain.model_copy(update={"model": plain.model.model_copy(update={"trust_remote_code": True})})
    with pytest.raises(RecipeError, match=r"the code of its model .got: model.trust_remote_code: true, of theirs"):
        refuse_code(of_model, False)
    refuse_code(of_model, True)


def _wrong(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A mistake's behaviour, its data, and a part of what is said."""
    sides: dict[str, Any] = {"more": {"system": LOUD}, "less": {"system": SOFT}}
    more, less = _files(folder, 12)
    files: dict[str, Any] = {"more": {"file": more}, "less": {"file": less}}
    if name == "unknown score":
        return sides | {"score": {"patern": "a"}}, {}, "Did you mean 'pattern'?"
    if name == "same instructions":
        return sides | {"less": {"system": LOUD}}, {}, "more and less are the same"
    if name == "same files":
        return files | {"less": {"file": more}}, {}, "more and less are the same"
    if name == "too few prompts":
        return sides, {"prompts": _prompts(folder, 2)}, "prompts.jsonl has too few lines"
    if name == "too few pairs":
        return files, {"probe": 20}, "has too few lines (got: 12; asked are 20 for probe"
    if name == "empty response":
        empty = write_rows(folder / "empty.jsonl", [{"prompt": "Prompt 1", "response": ""}])
        return files | {"less": {"file": empty}}, {}, "line 1 of empty.jsonl has an empty response"
    if name == "no shared prompt":
        other = write_rows(folder / "other.jsonl", [{"prompt": "Else", "response": "soft"}])
        return files | {"less": {"file": other}}, {}, "preference compares two responses to the same prompt"
    if name == "some splits":
        some = write_rows(folder / "some.jsonl", [{"prompt": "A", "split": "test"}, {"prompt": "B"}])
        return sides, {"prompts": some}, "only some rows of some.jsonl name their split (got: 1 of 2)"
    if name == "leak":
        rows = [{"prompt": "A", "split": "test"}, {"prompt": "a!", "split": "probe"}]
        return sides, {"prompts": write_rows(folder / "leak.jsonl", rows)}, "stands in two splits"
    if name == "missing prompts":
        return sides, {"prompts": str(folder / "nowhere.jsonl")}, "no such file"
    if name == "missing side":
        return files | {"less": {"file": str(folder / "nowhere.jsonl")}}, {}, "no such file"
    if name == "no contrast":
        return sides | {"score": {"phrases": ["ahoy there"]}, "new_tokens": 2}, {"probe": 2}, "weak_contrast: go on"
    assert name == "code"
    (folder / "mine.py").write_text("raise SystemExit('it ran')\n", encoding="utf-8")
    return sides | {"score": {"python": f"{folder}/mine.py:f"}}, {}, "give --trust-recipe-code"


@pytest.mark.parametrize(
    "name",
    [
        "unknown score", "same instructions", "same files", "too few prompts", "too few pairs", "empty response",
        "no shared prompt", "some splits", "leak", "missing prompts", "missing side", "no contrast", "code",
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_exit_code_2(
    name: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    behaviour, data, said = _wrong(name, tmp_path)
    raw = {"name": "wrong", "model": {"name": model, "device": "cpu"}, "behaviour": {"name": "custom", **behaviour}}
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(raw | {"data": data}), encoding="utf-8")
    is_one_sentence(said_by(monkeypatch, capfd, "run", wrong, "--out", tmp_path / "run", "--quiet"), said)
