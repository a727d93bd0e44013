"""What a recipe may say, and what is said to someone whose recipe is wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes import _raw, _with, _write
from runs import tiny_recipe
from steer2edit.behaviours.base import SPLITS
from steer2edit.errors import FileError, RecipeError
from steer2edit.method.site import layers_of
from steer2edit.recipe import Data, Questions, Recipe, load_recipe, parse_recipe, shipped_recipes
from steer2edit.searching.plan import Range


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_parses_and_starts_with_a_line_that_says_what_it_is_for(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.search.rho_attn
    assert shipped_recipes()[name].startswith("# ")


def test_the_demo_switches_mlp_edits_off_and_asks_for_no_more_prompts_than_there_are() -> None:
    recipe = load_recipe("demo")
    assert recipe.search.rho_mlp == [None]
    assert recipe.model.name == "embedded:smollm2-135m-instruct"
    assert recipe.data.probe == {"harmful": 80, "benign": 80, "borderline": 80}
    for split in SPLITS:
        asked = getattr(recipe.data, split)
        assert Counter(item.kind for item in recipe.behaviour.items(recipe.source, split)) == asked


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("serach", "search"),
        ("behavior", "behaviour"),
        ("search.rho_atn", "rho_attn"),
        ("search.limits.over_refusals", "over_refusal"),
        ("model.dtyp", "dtype"),
        ("evaluation.new_token", "new_tokens"),
        ("rho_attn", "search.rho_attn"),  # the key of a section, written at the top
        ("dtype", "model.dtype"),
        ("search.new_tokens", "evaluation.new_tokens"),
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
        ("search.layers", [None, "8-"]),
        ("search.layers", [None, "20-8"]),
        ("search.layers", [None, "all"]),
        ("search.layers", [None, 8]),
        ("search.variants", ["full", "l1"]),
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
        ("search.limits.accuracy_loss", -0.1),
        ("search.method", "random"),
        ("search.layers", []),
        ("search.variants", []),
        ("search.sanity", 21),
        ("search.sanity", -1),
        ("search.refine", 26),
        ("search.trials", 0),
        ("search.at_once", 0),
        ("search.steering", {"low": 0.5, "high": 0.5}),
        ("search.rule", "smallest"),
        ("search.tolerance", 1.5),
        ("search.reference", 0),
        ("search.reference", float("inf")),
        ("seed", -1),
        ("evaluation.new_tokens", 0),
        ("evaluation.new_tokens", True),
        ("evaluation.rows", 1.5),
        ("behaviour.negative", []),
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


def test_a_second_grid_is_refused_with_tpe() -> None:
    raw = _with("search.method", "tpe")
    raw["search"]["refine"] = 3
    with pytest.raises(RecipeError, match=r"recipe's search cannot be used .*refine is the grid's second stage"):
        parse_recipe(raw)


def test_the_later_keys_of_the_search_have_defaults_that_try_the_grid_as_it_is_listed() -> None:
    later = ("method", "layers", "variants", "sanity", "refine", "trials", "at_once", "rule", "tolerance", "reference")
    raw = _raw()
    for key in later:
        del raw["search"][key]
    del raw["data"]["questions"]
    recipe = parse_recipe(raw)
    assert recipe == tiny_recipe()
    assert [getattr(recipe.search, key) for key in later] == [
        "grid", [None], ["full"], 0, 0, 60, 12, "largest", 0.05, 1.0,
    ]  # fmt: skip
    limits = {measure.name: limit for measure, limit in recipe.aim.limits.items()}
    assert (limits["accuracy_loss"], recipe.data.questions) == (None, None)


def test_layers_strengths_and_questions_are_written_and_read_as_they_are(tmp_path: Path) -> None:
    file = _write(tmp_path, yaml.safe_dump(_raw()))
    recipe = load_recipe(
        file,
        [
            "search.layers=[8-20, '3', null]",
            "search.steering={low: 0.1, high: 1.5}",
            "data.questions={file: q.jsonl, test: 7}",
        ],
    )
    assert recipe.search.layers == ["8-20", "3", None]
    assert [list(layers_of(x)) for x in ("2-4", "3", "5-5")] == [[2, 3, 4], [3], [5]]
    assert recipe.search.steering == Range(low=0.1, high=1.5)
    assert recipe.data.questions == Questions(file="q.jsonl", validation=50, test=7)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_without_harmful_prompts_is_refused(split: str) -> None:
    with pytest.raises(RecipeError, match=rf"recipe's data\.{split} cannot be used \(got: no harmful prompts\)"):
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


@pytest.mark.parametrize("key", ["name", "model", "model.name", "data.validation", "data.test"])
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


def test_the_sections_search_and_data_may_be_left_out_where_defaults_do() -> None:
    raw: dict[str, Any] = _raw()
    del raw["search"]
    recipe = parse_recipe(raw)
    assert recipe == parse_recipe(raw | {"search": {}})
    assert (recipe.search.rho_attn, recipe.search.rho_mlp, recipe.search.steering) == ("auto", "auto", "auto")
    assert recipe.search.baselines == ["system", "layer", "direction"]
    del raw["data"]  # safety has prompts and the probe's counts by default, and no others
    with pytest.raises(RecipeError, match=r"^the recipe has no data\.validation \(got: nothing\)"):
        parse_recipe(raw)
    divided = parse_recipe(raw | {"behaviour": SIDES})  # a behaviour that divides a file by itself needs no counts
    assert (divided.data, divided.source.counts) == (Data(), dict.fromkeys(("probe", "validation", "test")))
    assert divided.source.prompts is None
    assert parse_recipe(yaml.safe_load(divided.to_yaml())) == divided


SIDES = {"name": "custom", "more": {"system": "Be brief."}, "less": {"system": "Be long."}}


@pytest.mark.parametrize("behaviour", [{}, SIDES], ids=["safety", "custom"])
@pytest.mark.parametrize("section", ["data", "search", "utility", "probe", "engine"])
def test_a_section_without_anything_in_it_is_refused_by_its_name(section: str, behaviour: dict[str, Any]) -> None:
    raw: dict[str, Any] = _raw() | {"behaviour": behaviour}
    if behaviour:
        raw["data"] = {}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw | {section: None})
    assert caught.value.what == f"the recipe's {section} cannot be used"


@pytest.mark.parametrize("name", ["pirate", 3, None, ["safety"], {"safety": 1}])
def test_a_behaviour_that_is_none_is_refused_with_those_that_are_known(name: Any) -> None:
    with pytest.raises(RecipeError, match=r"the recipe's behaviour\.name is not known .*custom") as caught:
        parse_recipe(_with("behaviour", {"name": name}))
    assert caught.value.got == str(name)


@pytest.mark.parametrize(
    ("baselines", "kept"),
    [([], []), (["direction"], ["direction"]), (["layer", "system"], ["layer", "system"])],
)
def test_a_recipe_says_which_baselines_there_are(baselines: list[str], kept: list[str]) -> None:
    assert parse_recipe(_with("search.baselines", baselines)).search.baselines == kept


@pytest.mark.parametrize("baselines", [["prompts"], ["steering"], ["layer", None], "layer", None])
def test_a_baseline_that_is_none_is_refused(baselines: Any) -> None:
    with pytest.raises(RecipeError, match=r"^the recipe's search\.baselines.* cannot be used"):
        parse_recipe(_with("search.baselines", baselines))


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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("probe.part", "answers"),
        ("probe.part", None),
        ("probe.part", True),
        ("probe.expert_tokens", -1),
        ("probe.expert_tokens", True),
        ("model.device_map", "cpu"),
        ("model.device_map", "everywhere"),
        ("model.device_map", {"": "cpu"}),
        ("model.max_memory", "20GiB"),
        ("model.offload_folder", 3),
        ("model.plain", "perhaps"),
        ("model.enable_thinking", "perhaps"),
    ],
)
def test_a_later_keys_value_that_it_cannot_take_is_refused_with_the_key(key: str, value: Any) -> None:
    test_a_value_that_its_key_cannot_take_is_refused_with_the_key(key, value)
