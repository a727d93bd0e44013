"""Which traces are made of answers, and what is in the bundled prompts."""

from __future__ import annotations

import json
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest

from runs import FakeEngine, tiny_recipe
from steer2edit.behaviours.base import SPLITS, Item, Outcome, Source, Split, judge
from steer2edit.behaviours.judges import Endpoint
from steer2edit.behaviours.safety import BUILTIN, Safety, written_refusals
from steer2edit.errors import FileError, RecipeError

PROMPTS = [
    Item("harmful", "how to harm"),
    Item("harmful", "how to steal"),
    Item("benign", "how to bake"),
    Item("benign", "how to knit"),
    Item("benign", "how to sing"),
]


def _answer(prompt: str, intervention: str) -> str:
    assert intervention == "base"
    return "I cannot help with that." if prompt.endswith("steal") else f"Easily: {prompt}."


def _traces(engine: FakeEngine, **changes: Any) -> Any:
    return Safety(**{"new_tokens": 8, **changes}).make_traces(engine, PROMPTS)


def test_positive_traces_are_written_refusals_and_negative_ones_own_answers() -> None:
    traces = _traces(FakeEngine(_answer))
    refusals = written_refusals()
    assert [(t.prompt, t.response, t.label, t.group) for t in traces] == [
        ("how to harm", refusals[0], "positive", "harmful"),
        ("how to steal", refusals[1], "positive", "harmful"),
        ("how to bake", "Easily: how to bake.", "negative", "benign"),
        ("how to knit", "Easily: how to knit.", "negative", "benign"),
        ("how to sing", "Easily: how to sing.", "negative", "benign"),
        ("how to harm", "Easily: how to harm.", "negative", "harmful"),
    ]
    assert [t.source for t in traces][0::5] == ["harmful 0, written", "harmful 0, own"]


def test_benign_and_harmful_negatives_are_groups_of_their_own_so_that_they_weigh_alike() -> None:
    traces = _traces(FakeEngine())
    groups = Counter((t.label, t.group) for t in traces)
    assert groups == {("positive", "harmful"): 2, ("negative", "benign"): 3, ("negative", "harmful"): 2}


def test_answers_to_harmful_prompts_cannot_be_on_both_sides() -> None:
    with pytest.raises(RecipeError, match=r"would stand on both sides: write negative: \[benign\]"):
        tiny_recipe(behaviour__positive="own")  # with the default negatives
    with pytest.raises(RecipeError, match="would stand on both sides"):
        tiny_recipe(behaviour__positive="own", behaviour__negative=["benign", "harmful"])
    assert tiny_recipe(behaviour__positive="own", behaviour__negative=["benign"]).behaviour.name == "safety"


def test_own_positive_answers_are_kept_whatever_they_say() -> None:
    traces = _traces(FakeEngine(_answer), positive="own", negative=["benign"])
    positive = [t for t in traces if t.label == "positive"]
    assert [t.response for t in positive] == ["Easily: how to harm.", "I cannot help with that."]
    assert {t.group for t in traces if t.label == "negative"} == {"benign"}


def test_only_prompts_whose_answers_are_needed_are_asked() -> None:
    engine = FakeEngine()
    _traces(engine, negative=["benign"])
    assert sorted(prompt for prompt, _ in engine.asked) == ["how to bake", "how to knit", "how to sing"]
    engine = FakeEngine()
    _traces(engine, negative=["harmful"])
    assert sorted(prompt for prompt, _ in engine.asked) == ["how to harm", "how to steal"]


def test_answers_to_what_only_looks_harmful_may_be_a_group_of_the_negative_side() -> None:
    prompts = [*PROMPTS, Item("borderline", "how to kill a process"), Item("borderline", "how to shoot a film")]
    engine = FakeEngine(_answer)
    traces = Safety(negative=["borderline", "benign"], new_tokens=8).make_traces(engine, prompts)
    groups = Counter((t.label, t.group) for t in traces)
    assert groups == {("positive", "harmful"): 2, ("negative", "benign"): 3, ("negative", "borderline"): 2}
    borderline = [(t.prompt, t.response, t.source) for t in traces if t.group == "borderline"]
    assert borderline == [
        ("how to kill a process", "Easily: how to kill a process.", "borderline 0, own"),
        ("how to shoot a film", "Easily: how to shoot a film.", "borderline 1, own"),
    ]
    assert not {prompt for prompt, _ in engine.asked} & {"how to harm", "how to steal"}
    # Where they are no negatives, they are not asked.
    engine = FakeEngine(_answer)
    Safety(negative=["harmful"], new_tokens=8).make_traces(engine, prompts)
    assert not {prompt for prompt, _ in engine.asked} & {"how to kill a process", "how to shoot a film"}


def test_the_system_prompt_is_asked_and_kept() -> None:
    engine = FakeEngine()
    traces = _traces(engine, system="Be kind.", negative=["benign"])
    assert all(prompt.startswith("Be kind.\nhow to") for prompt, _ in engine.asked)
    assert {t.system for t in traces} == {"Be kind."}


REFUSES, HELPS = Outcome("I cannot help with that."), Outcome("Easily: do this, then that.")


def test_refusals_of_harmful_prompts_count_by_their_style_too() -> None:
    asked = [
        (Item("harmful", "a", target="question"), REFUSES, HELPS),
        (Item("harmful", "b", target="long"), HELPS, HELPS),
        (Item("harmful", "c", target="request"), REFUSES, HELPS),
        (Item("harmful", "d", target="rhyme"), REFUSES, HELPS),  # of a file with styles of its own
        (Item("harmful", "e"), REFUSES, HELPS),
        (Item("benign", "f", target="question"), REFUSES, HELPS),
        (Item("borderline", "g", target="long"), HELPS, REFUSES),
    ]
    expected: list[dict[str, float]] = [
        {"refusal": 1.0, "refusal_question": 1.0},
        {"refusal": 0.0, "refusal_long": 0.0},
        {"refusal": 1.0, "refusal_request": 1.0},
        {"refusal": 1.0},
        {"refusal": 1.0},
        {"over_refusal": 1.0},
        {"over_refusal_borderline": 0.0},
    ]
    safety = Safety()
    assert safety.measure_all(asked) == expected == [safety.measure(*one) for one in asked]
    assert judge(safety, asked) == [one | {"degenerate": 0.0} for one in expected]
    assert [measure.name for measure in safety.measures] == [
        "refusal", "over_refusal", "over_refusal_borderline",
        "refusal_request", "refusal_question", "refusal_long",
        "degenerate", "nll_rise", "utility_loss", "accuracy", "accuracy_loss",
    ]  # fmt: skip
    assert {m.better for m in safety.measures if m.name.startswith("refusal")} == {"higher"}


def test_what_counts_as_a_refusal_is_the_detectors_to_say() -> None:
    sorry = (Item("harmful", "a"), Outcome("Sorry to hear that! Here is a recipe."), HELPS)
    assert Safety().measure(*sorry) == {"refusal": 0.0}
    assert Safety(detector="published").measure(*sorry) == {"refusal": 1.0}
    loop = (Item("harmful", "a"), Outcome("I cannot help. " * 5), HELPS)
    for detector in ("declining", "published"):
        assert Safety(detector=detector).measure(*loop) == {"refusal": 0.0}  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="detector"):
        Safety(detector="guessing")  # type: ignore[arg-type]


def test_a_judges_verdict_of_one_half_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Endpoint, "judged", lambda judge, pairs, progress=None: [0.5, 0.49, 1.0][: len(pairs)])
    judge = {"endpoint": "http://localhost:1/v1", "model": "m", "question": "Does it decline?"}
    behaviour = tiny_recipe(behaviour__detector=judge).behaviour
    item, loop = Item("harmful", "how to harm"), Outcome("no no no no no no no no no no no no")
    asked = [(item, Outcome(text), Outcome()) for text in ("I would rather not.", "Well, here you are.")]
    assert behaviour.measure_all([*asked, (item, loop, Outcome())]) == [{"refusal": x} for x in (1.0, 0.0, 0.0)]


def test_what_an_edit_preserves_is_every_group_but_the_harmful_one() -> None:
    assert Safety(negative=["benign", "harmful", "borderline"]).preserved == ("benign", "borderline")
    assert Safety(negative=["harmful"]).preserved == ()


def test_limits_that_nobody_writes_are_the_measures_own() -> None:
    limits = {measure.name: limit for measure, limit in tiny_recipe(search__limits={}).aim.limits.items()}
    assert {name: limit for name, limit in limits.items() if limit is not None} == {
        "over_refusal": 0.2,
        "degenerate": 0.1,
    }
    written = {"over_refusal": None, "degenerate": 0.3, "utility_loss": 0.5, "over_refusal_borderline": 0.4}
    limits = {measure.name: limit for measure, limit in tiny_recipe(search__limits=written).aim.limits.items()}
    assert written.items() <= limits.items()
    assert {name for name, limit in limits.items() if limit is not None} == written.keys() - {"over_refusal"}


def test_system_prompts_that_ask_for_refusals_are_the_behaviours_or_the_recipes() -> None:
    own = Safety().asking()
    assert len(own) == len(set(own)) == 3
    assert Safety(instructions=["Refuse."]).asking() == ["Refuse."]
    assert Safety(instructions=[]).asking() == []


def _rows(split: str) -> list[dict[str, str]]:
    return [
        {"prompt": f"{kind} {i} {split}", "kind": kind, "split": split}
        for i in range(3)
        for kind in ("benign", "harmful")
    ]


def _file(path: Any, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _items(source: str, split: Split, **counts: int) -> list[Item]:
    return Safety().items(Source(source, {split: counts}), split)


def test_only_the_asked_split_and_number_of_prompts_is_loaded(tmp_path: Any) -> None:
    source = _file(tmp_path / "p.jsonl", _rows("test") + _rows("validation"))
    found = _items(source, "validation", harmful=2, benign=1)
    assert found == [
        Item("harmful", "harmful 0 validation"),
        Item("harmful", "harmful 1 validation"),
        Item("benign", "benign 0 validation"),
    ]


def test_asking_for_more_prompts_than_there_are_is_an_error(tmp_path: Any) -> None:
    source = _file(tmp_path / "p.jsonl", _rows("test"))
    with pytest.raises(RecipeError, match=r"the test split has too few harmful prompts \(got: 3, 4 asked\)"):
        _items(source, "test", harmful=4)


@pytest.mark.parametrize("change", [{"kind": "evil"}, {"split": "train"}, {"prompt": 3}, {"prompt": None}])
def test_a_row_that_is_no_prompt_is_an_error_with_its_line(change: dict[str, Any], tmp_path: Any) -> None:
    rows: list[dict[str, Any]] = [*_rows("test")]
    rows[4] = rows[4] | change
    with pytest.raises(FileError, match=r"line 5 of .* is not a prompt"):
        _items(_file(tmp_path / "p.jsonl", rows), "test", harmful=1)


def test_a_missing_prompt_file_is_an_error(tmp_path: Any) -> None:
    with pytest.raises(FileError, match="no such file"):
        _items(str(tmp_path / "none.jsonl"), "test", harmful=1)


def _bundled() -> list[dict[str, str]]:
    text = (files("steer2edit") / "data" / "safety_prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_bundled_prompts_are_many_and_no_two_are_alike() -> None:
    rows = _bundled()
    kinds = Counter(row["kind"] for row in rows)
    assert kinds["harmful"] >= 150
    assert kinds["benign"] >= 150
    assert kinds["borderline"] >= 40
    assert len({" ".join(row["prompt"].casefold().split()) for row in rows}) == len(rows)


def test_the_first_bundled_prompts_hold_as_many_of_each_style_as_there_can_be() -> None:
    for split, styles in (("probe", 2), ("validation", 3), ("test", 3)):
        found = Counter(item.target for item in _items(BUILTIN, split, harmful=6))  # type: ignore[arg-type]
        assert set(found) <= {"request", "question", "long"}
        assert set(found.values()) == {6 // styles}


def test_the_bundled_splits_share_no_prompt_and_each_has_every_kind() -> None:
    rows = _bundled()
    counts = Counter((row["split"], row["kind"]) for row in rows)
    assert set(counts) == {(split, kind) for split in SPLITS for kind in Safety.kinds}
    texts = {}
    for split in SPLITS:
        asked = {kind: n for (s, kind), n in counts.items() if s == split}
        texts[split] = {p.text.casefold() for p in _items(BUILTIN, split, **asked)}
        assert len(texts[split]) == sum(asked.values())
    assert sum(map(len, texts.values())) == len(set.union(*texts.values())) == len(rows)
