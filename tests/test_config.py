"""What a recipe may say, and what is said to someone whose recipe is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from runs import tiny_recipe
from steer2edit.config import Recipe, load_recipe, parse_recipe, shipped_recipes
from steer2edit.errors import FileError, RecipeError


def _raw(**changes: Any) -> dict[str, Any]:
    return yaml.safe_load(tiny_recipe(**changes).to_yaml())


def _with(key: str, value: Any) -> dict[str, Any]:
    raw: dict[str, Any] = _raw()
    place = raw
    *parents, last = key.split(".")
    for parent in parents:
        place = place[parent]
    place[last] = value
    return raw


def _write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_parses_and_starts_with_a_line_that_says_what_it_is_for(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.search.rho_attn
    assert shipped_recipes()[name].startswith("# ")


def test_the_demo_switches_mlp_edits_off_and_asks_for_as_many_prompts_as_there_are() -> None:
    recipe = load_recipe("demo")
    assert recipe.search.rho_mlp == [None]
    assert recipe.model.name == "embedded:smollm2-135m-instruct"
    assert recipe.data.probe == {"harmful": 80, "benign": 80}


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("serach", "search"),
        ("behavior", "behaviour"),
        ("search.rho_atn", "rho_attn"),
        ("search.limits.over_refusals", "over_refusal"),
        ("model.dtyp", "dtype"),
        ("evaluation.new_token", "new_tokens"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key: str, near: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(_with(key, 1))
    assert (
        str(caught.value) == f"the recipe has an unknown key {key} (got: {key.split('.')[-1]}). Did you mean '{near}'?"
    )


def test_an_unknown_key_like_no_other_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(
        RecipeError, match=r"unknown key probe\.zzz .* Known keys there: positions, part, max_tokens, batch_tok"
    ):
        parse_recipe(_with("probe.zzz", 1))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("search.rho_attn", [0.2, 0]),
        ("search.rho_attn", [0.2, -0.1]),
        ("search.rho_mlp", [0.2, float("nan")]),
        ("search.rho_mlp", [0.2, float("inf")]),
        ("search.rho_mlp", [0.2, "small"]),
        ("search.rho_attn", [0.2, True]),
        ("search.alpha", [0.2, 1]),
        ("search.alpha", [0.2, 1.5]),
        ("search.alpha", [0.2, -0.1]),
        ("search.alpha", [0.2, float("nan")]),
        ("search.alpha", [0.2, None]),
        ("search.alpha", [0.2, False]),
        ("search.steering", [0.2, 0]),
        ("search.steering", [0.2, float("nan")]),
        ("search.steering", [0.2, True]),
    ],
)
def test_a_number_that_its_list_cannot_hold_is_refused_with_its_place(key: str, value: list[Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(_with(key, value))
    assert caught.value.what == f"the recipe's {key}.1 cannot be used"
    assert caught.value.got == repr(value[1])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("search.rho_attn", []),
        ("search.alpha", []),
        ("search.limits.utility_loss", -0.1),
        ("search.limits.utility_loss", float("nan")),
        ("search.limits.utility_loss", float("inf")),
        ("search.limits.degenerate", True),
        ("seed", -1),
        ("evaluation.new_tokens", 0),
        ("evaluation.new_tokens", True),
        ("evaluation.rows", 1.5),
        ("behaviour.negative", []),
        ("behaviour.name", "kindness"),
        ("model.dtype", "float8"),
        ("model", "pico"),
        ("name", 3),
        ("name", "../elsewhere"),
        ("name", ""),
    ],
)
def test_a_value_that_its_key_cannot_take_is_refused_with_the_key(key: str, value: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(_with(key, value))
    assert caught.value.what == f"the recipe's {key} cannot be used"
    assert caught.value.got == repr(value)


@pytest.mark.parametrize("off", ["off", "null", "false", "'off'", "~"])
def test_off_null_and_false_all_switch_a_block_type_off(off: str, tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path, yaml.safe_dump(_raw())), [f"search.rho_mlp=[0.5, {off}]"])
    assert recipe.search.rho_mlp == [0.5, None]


def test_a_search_without_a_single_edit_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"recipe's search cannot be used .*Both block types are off"):
        parse_recipe(_with("search.rho_attn", [None]))  # rho_mlp is off in it already


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_without_harmful_prompts_is_refused(split: str) -> None:
    with pytest.raises(RecipeError, match=rf"recipe's data\.{split} cannot be used \(got: {{'benign': 2}}\)"):
        parse_recipe(_with(f"data.{split}", {"benign": 2}))


def test_overrides_reach_nested_keys_lists_and_keys_that_are_not_there_yet(tmp_path: Path) -> None:
    raw = _raw()
    del raw["evaluation"]
    path = _write(tmp_path, yaml.safe_dump(raw))
    overrides = [
        "search.steering=[0.1,0.2]",
        "evaluation.rows=7",
        "name=other",
        "model.revision=null",
        "seed=5",
        "seed=6",
    ]
    recipe = load_recipe(path, overrides)
    assert recipe.search.steering == [0.1, 0.2]
    assert recipe.evaluation.rows == 7
    assert recipe.name == "other"
    assert recipe.model.revision is None
    assert recipe.seed == 6


def test_an_override_may_hold_further_equals_signs(tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path, yaml.safe_dump(_raw())), ["behaviour.system=say a=b"])
    assert recipe.behaviour.system == "say a=b"


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("search.alpha", "an override is not key=value"),
        ("name.short=x", "an override goes through a key that holds a plain value"),
        ("search.rho_attn.0=0.5", "an override goes through a key that holds a plain value"),
        ("search.steering=[0.1", "the value of search.steering is not YAML"),
        ("search.steerin=[0.1]", "the recipe has an unknown key search.steerin"),
        ("=3", "the recipe has an unknown key "),
    ],
)
def test_a_wrong_override_is_refused(override: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(_write(tmp_path, yaml.safe_dump(_raw())), [override])
    assert caught.value.what == what


@pytest.mark.parametrize("text", ["name: [", "a: b: c", "\tname: x"])
def test_what_is_not_yaml_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not YAML") as caught:
        load_recipe(_write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "found"), [("", "NoneType"), ("- a\n- b", "list"), ("just text", "str")])
def test_what_is_no_mapping_is_refused(text: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a recipe") as caught:
        load_recipe(_write(tmp_path, text))
    assert caught.value.got == found


@pytest.mark.parametrize("key", ["name", "model", "data", "search", "model.name", "data.test", "search.alpha"])
def test_a_missing_key_is_named(key: str) -> None:
    raw: dict[str, Any] = _raw()
    place = raw
    *parents, last = key.split(".")
    for parent in parents:
        place = place[parent]
    del place[last]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw)
    assert str(caught.value) == f"the recipe has no {key} (got: nothing). Add the key {key}."


def test_a_recipe_that_is_nowhere_is_refused_with_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no such recipe .*demo"):
        load_recipe(tmp_path / "none.yaml")


def test_a_file_comes_before_a_shipped_recipe_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").write_text(yaml.safe_dump(_raw()), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("demo").name == "tiny"


@pytest.mark.parametrize("name", ["tiny", *sorted(shipped_recipes())])
def test_the_yaml_of_a_recipe_gives_the_same_recipe(name: str) -> None:
    recipe: Recipe = tiny_recipe() if name == "tiny" else load_recipe(name)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
