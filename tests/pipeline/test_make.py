"""`steer2edit make`: the recipe that it writes, that this recipe is the run, and which mistakes it names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from runs import command
from sides import SENTENCE, three_parts, write_rows
from steer2edit.edits import Edit
from steer2edit.errors import RecipeError
from steer2edit.files.reading import read_json, read_jsonl
from steer2edit.pipeline.make import made_recipe
from steer2edit.probing.traces import read_traces
from steer2edit.recipe import load_recipe

SAID = ["Sure, mix the flour.", "I cannot help with that.", "The capital is Paris.", "No.", "Please ask me!"]
PROMPTS = [f"What is the reason {i}?" for i in range(14)]
LOUD, SOFT = "Answer as loudly as you can.", "Answer softly and kindly."
SMALL = [
    "seed=3",
    "model.dtype=float32",
    "model.device=cpu",
    "data.probe=6",
    "data.validation=4",
    "data.test=4",
    "search.rho_attn=[0.02,0.1]",
    "search.rho_mlp=[off]",
    "search.variants=[full]",
    "search.steering=[0.1]",
    "search.baselines=[system]",
    "search.limits={degenerate: null, utility_loss: null}",
    "evaluation.new_tokens=4",
    "evaluation.utility_prompts=2",
    "evaluation.utility_tokens=4",
    "evaluation.resamples=50",
]


pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def model(pico_folder: str) -> str:
    return pico_folder


GO_ON = "behaviour.weak_contrast=go on"


def _files(folder: Path) -> tuple[str, str]:
    more = [{"prompt": prompt, "response": f"{SAID[i % 5]} It is {i}."} for i, prompt in enumerate(PROMPTS)]
    less = [{"prompt": prompt, "response": SAID[(i + 2) % 5]} for i, prompt in enumerate(PROMPTS)]
    return write_rows(folder / "more.jsonl", more), write_rows(folder / "less.jsonl", less)


def _prompts(folder: Path) -> str:
    return write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])


def _make(monkeypatch: pytest.MonkeyPatch, model: str, more: str, less: str, out: Path, *options: Any) -> int:
    small = [part for override in SMALL for part in ("--set", override)]
    return command(monkeypatch, "make", model, "--more", more, "--less", less, "--out", out, *small, *options)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Runs -----------------------------------------------------------------------------------------------------------------


def _sides(kind: str, folder: Path) -> tuple[tuple[str, str], list[Any]]:
    if kind == "files":
        return _files(folder), ["--title", "loud"]
    # Random weights follow no instruction.
    return (LOUD, SOFT), ["--prompts", _prompts(folder), "--set", GO_ON]


@pytest.mark.parametrize("kind", ["files", "instructions"])
def test_the_recipe_that_it_writes_is_the_run(
    kind: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (more, less), options = _sides(kind, tmp_path)
    out = tmp_path / "mine"
    assert _make(monkeypatch, model, more, less, out, *options, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert results == read_json(out / "evaluation/results.json")
    assert (results["attribute"], list(results["systems"])) == ("preference", ["base", "system", "steering", "edit"])
    assert results["systems"]["base"]["preference"]["n"] in (4, 3, 2, 1)
    assert Edit.load(out / "edit.safetensors").edited()
    assert (out / "adapter" / "adapter_model.safetensors").is_file()

    # The recipe holds the two sides and every choice.
    recipe = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))
    key = "file" if kind == "files" else "system"
    assert (recipe["name"], recipe["seed"], recipe["model"]["name"]) == ("mine", 3, model)
    assert (recipe["behaviour"]["more"][key], recipe["behaviour"]["less"][key]) == (more, less)
    assert recipe["behaviour"]["title"] == ("loud" if kind == "files" else "Answer as loudly as you can")
    assert (recipe["behaviour"]["name"], recipe["behaviour"]["score"]) == ("custom", "preference")
    assert (recipe["data"]["probe"], recipe["data"]["test"]) == ({"prompt": 6}, {"prompt": 4})
    assert recipe["data"]["prompts"] == (None if kind == "files" else str(tmp_path / "prompts.jsonl"))
    assert recipe["search"]["rho_attn"] == [0.02, 0.1]
    assert recipe["search"]["rho_mlp"] == [None]
    assert recipe["utility"]["prompts"] == "builtin:neutral_prompts"
    assert recipe["evaluation"]["resamples"] == 50

    # The recipe runs again and changes nothing, and so does the command.
    before = _bytes(out)
    times = {name: (out / name).stat().st_mtime_ns for name in before if name not in ("recipe.yaml", ".lock")}
    assert command(monkeypatch, "run", out / "recipe.yaml", "--out", out) == 0
    seen = capsys.readouterr()
    assert seen.err.count("done before") == 8
    assert f"Report, figures, edit and adapter: {out}/" in seen.out
    assert _make(monkeypatch, model, more, less, out, *options) == 0
    assert capsys.readouterr().err.count("done before") == 8
    assert _bytes(out) == before
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times

    # In another directory it gives the same.
    again = tmp_path / "again"
    shutil.copy(out / "recipe.yaml", tmp_path / "copied.yaml")
    assert command(monkeypatch, "run", tmp_path / "copied.yaml", "--out", again, "--quiet") == 0
    other = _bytes(again)
    varying = {"manifest.json", ".lock", "report.html"}  # the page shows the manifest's times
    assert set(other) == set(before)
    assert {name for name in before if other[name] != before[name]} <= varying


def test_files_give_the_traces_and_the_choices(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more, less = _files(tmp_path)
    out = tmp_path / "mine"
    assert _make(monkeypatch, model, more, less, out, "--quiet") == 0
    said = {
        side: {row["prompt"]: row["response"] for row in read_jsonl(path)}
        for side, path in zip("ml", (more, less), strict=True)
    }
    traces = read_traces(out / "traces.jsonl")
    assert [t.label for t in traces] == ["positive", "negative"] * 6
    for trace in traces:
        assert isinstance(trace.prompt, str)
        assert trace.response == said["m" if trace.label == "positive" else "l"][trace.prompt]
    probe = {str(trace.prompt) for trace in traces}
    recipe = load_recipe(out / "recipe.yaml")
    splits = {split: recipe.behaviour.items(recipe.source, split) for split in ("validation", "test")}
    texts = {split: {item.text for item in items} for split, items in splits.items()}
    assert [len(texts[split]) for split in ("validation", "test")] == [4, 4]
    assert not probe & (texts["validation"] | texts["test"])
    assert not texts["validation"] & texts["test"]
    assert capsys.readouterr().err == ""
    # A system prompt's answers stand beside the prompt, and not in its place.
    answers = read_jsonl(out / "evaluation/answers.jsonl")
    assert {row["prompt"] for row in answers} == texts["test"]
    assert len(answers[0]) == 7  # prompt, kind, what each of four systems answered, and what the answers counted for


def test_what_the_model_wrote_for_comparison_is_kept_and_can_be_judged_without_a_model(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    options = ["--prompts", _prompts(tmp_path), "--set", GO_ON, "--quiet"]
    assert _make(monkeypatch, model, LOUD, SOFT, out, *options) == 0
    for place in ("search", "evaluation"):
        (file,) = (out / place).glob("items-*.jsonl")
        pairs = [row for row in read_jsonl(file) if row["kind"] == "pair"]
        assert pairs
        assert all(len(row["choices"]) == 2 and row["choices"][0] != row["choices"][1] for row in pairs)
    capsys.readouterr()
    monkeypatch.setattr("steer2edit.models.load.load_model", _no_model)
    assert command(monkeypatch, "judge", out, "--json", "--quiet") == 0
    judged = json.loads(capsys.readouterr().out)
    assert judged["changed"] == {}
    assert judged["choice"]["old"] == judged["choice"]["new"]
    wanted = {k: v for k, v in read_json(out / "evaluation/results.json").items() if k != "agreement"}
    assert judged["after"] == wanted


def _no_model(*_: Any, **__: Any) -> None:
    raise AssertionError("a model was loaded")


def test_a_score_is_the_attribute_of_the_run(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    more, less = _files(tmp_path)
    score = "{length: lower, longest: 4}"
    assert _make(monkeypatch, model, more, less, out, "--score", score, "--title", "brief", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert results["attribute"] == "tokens"
    answers = read_jsonl(out / "evaluation/answers.jsonl")
    assert results["systems"]["base"]["tokens"]["n"] == len(answers) == 4
    assert 0 < results["systems"]["base"]["tokens"]["mean"] <= 4
    behaviour = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))["behaviour"]
    assert behaviour["score"] == {"length": "lower", "longest": 4.0}


@pytest.mark.parametrize(("score", "tokens"), [("{length: lower}", 128), ("{phrases: [ahoy]}", 48)])
def test_answers_whose_tokens_are_counted_are_cut_later(score: str, tokens: int) -> None:
    recipe = made_recipe("m", "Be brief.", "Be long.", name="brief", score=score)
    assert recipe.behaviour.new_tokens == tokens
    assert (recipe.evaluation.new_tokens == 128) == (tokens == 128)


CODE = """
from pathlib import Path
with open(Path(__file__).with_suffix(".ran"), "a") as file:
    file.write("x")

def letters(prompt, response):
    return float(len(response))
"""


def test_code_is_run_only_with_the_users_word(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more, less = _files(tmp_path)
    (tmp_path / "mine.py").write_text(CODE, encoding="utf-8")
    ran = tmp_path / "mine.ran"
    score = f"{{python: '{tmp_path}/mine.py:letters', worst: 0, best: 40}}"
    out = tmp_path / "out"
    said = []
    assert _make(monkeypatch, model, more, less, out, "--score", score) == 2
    said.append(capsys.readouterr().err)
    assert not out.exists()
    assert _make(monkeypatch, model, more, less, out, "--score", score, "--trust-recipe-code", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    answers = read_jsonl(out / "evaluation/answers.jsonl")
    expected = sum(len(row["base"]) for row in answers) / len(answers)
    assert results["systems"]["base"]["shown"]["mean"] == pytest.approx(expected)
    assert ran.read_text() == "x"
    ran.unlink()
    # The recipe that was written is no more trusted than any other, whatever is done with it.
    for arguments in (
        ["run", out / "recipe.yaml", "--out", out],
        ["traces", out / "recipe.yaml", "--out", out],
        ["evaluate", out / "recipe.yaml", "--out", out],
        ["judge", out],
    ):
        assert command(monkeypatch, *arguments) == 2
        said.append(capsys.readouterr().err)
    assert all(SENTENCE.fullmatch(text) and "--trust-recipe-code" in text for text in said)
    assert not ran.exists()
    assert command(monkeypatch, "run", out / "recipe.yaml", "--out", out, "--trust-recipe-code", "--quiet") == 0
    capsys.readouterr()
    assert command(monkeypatch, "judge", out, "--trust-recipe-code", "--quiet", "--json") == 0
    assert json.loads(capsys.readouterr().out)["changed"] == {}


# Mistakes -------------------------------------------------------------------------------------------------------------


def _mistake(name: str, folder: Path) -> tuple[str, str, list[Any], str]:
    """The two sides, further options, and a part of what is said."""
    more, less = _files(folder)
    if name == "same instructions":
        return LOUD, LOUD, [], "more and less are the same"
    if name == "same files":
        return more, more, [], "more and less are the same"
    if name == "one of each":
        return more, SOFT, [], "Give both sides in the same way"
    if name == "unknown score":
        return more, less, ["--score", "{patern: a}"], "Did you mean 'pattern'?"
    if name == "score in words":
        return more, less, ["--score", "prefer"], "Did you mean 'preference'?"
    if name == "list of scores":
        return more, less, ["--score", "[pattern]"], "behaviour.score"
    if name == "no yaml":
        return more, less, ["--score", "{pattern: "], "--score is not YAML (got: {pattern: )"
    if name == "no file":
        return str(folder / "nowhere.jsonl"), less, [], "no such file"
    if name == "no prompts":
        return LOUD, SOFT, ["--prompts", folder / "nowhere.jsonl"], "no such file"
    if name == "no set":
        return "builtin:pirates", "builtin:pirates", [], "no such set comes with the package (got: builtin:pirates)"
    if name == "too few":
        return more, less, ["--set", "data.test=40"], "has too few lines (got: 14"
    if name == "unknown key":
        return more, less, ["--set", "search.rho=[1]"], "unknown key search.rho"
    if name == "no value":
        return more, less, ["--set", "seed"], "an override is not key=value (got: seed)"
    if name == "empty side":
        return " ", SOFT, [], "behaviour.more.system"
    if name == "no contrast":
        return LOUD, SOFT, ["--score", "{phrases: [ahoy there]}"], "behaviour.weak_contrast: go on"
    assert name == "empty response"
    rows = [{"prompt": "A", "response": " "}]
    return more, write_rows(folder / "empty.jsonl", rows), [], "line 1 of empty.jsonl has an empty response"


@pytest.mark.parametrize(
    "name",
    [
        "same instructions", "same files", "one of each", "unknown score", "score in words", "list of scores",
        "no yaml", "no file", "no prompts", "no set", "too few", "unknown key", "no value", "empty side",
        "no contrast", "empty response",
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_exit_code_2(
    name: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more, less, options, said = _mistake(name, tmp_path)
    assert _make(monkeypatch, model, more, less, tmp_path / "out", *options, "--quiet") == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert SENTENCE.fullmatch(seen.err)
    assert seen.err.count("\n") == 1
    assert said in seen.err


def test_a_weak_contrast_can_be_searched_all_the_same(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompts", _prompts(tmp_path), "--score", "{phrases: [ahoy there]}"]
    out = tmp_path / "out"
    assert _make(monkeypatch, model, LOUD, SOFT, out, *options, "--set", "behaviour.weak_contrast=go on") == 0
    seen = capsys.readouterr()
    assert "0.00 under `more`, 0.00 under `less`, of 6 answers each" in seen.err
    assert "nothing moved" in seen.err
    assert read_json(out / "choice.json")["moved"] is False


def test_make_needs_both_sides_and_a_place(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for missing in ("--more", "--less", "--out"):
        options = {"--more": LOUD, "--less": SOFT, "--out": "nowhere"}
        del options[missing]
        code = command(monkeypatch, "make", "model", *[part for pair in options.items() for part in pair])
        assert code == 2
        assert f"Missing option '{missing}'" in capsys.readouterr().err


# The recipe by itself -------------------------------------------------------------------------------------------------


def test_a_side_is_a_file_or_an_instruction_by_its_name() -> None:
    recipe = made_recipe("m", "builtin:pirate", "plain.jsonl", name="a")
    sides = recipe.behaviour.more, recipe.behaviour.less
    assert [(side.file, side.system) for side in sides] == [("builtin:pirate", None), ("plain.jsonl", None)]
    recipe = made_recipe("m", "Be loud.", "Be soft.", name="a")
    sides = recipe.behaviour.more, recipe.behaviour.less
    assert [(side.file, side.system) for side in sides] == [(None, "Be loud."), (None, "Be soft.")]


@pytest.mark.parametrize(
    ("more", "title", "shown"),
    [
        ("Be loud.", None, "Be loud"),
        ("pairs/loud.jsonl", None, "loud"),
        ("Be loud.", "noise", "noise"),
    ],
)
def test_a_title_is_what_more_says(more: str, title: str | None, shown: str) -> None:
    less = "soft.jsonl" if more.endswith(".jsonl") else "Be soft."
    recipe = made_recipe("m", more, less, name="a", title=title)
    assert recipe.behaviour.title == shown


def test_a_long_instruction_makes_a_short_title() -> None:
    recipe = made_recipe("m", "Be loud and " * 40, "Be soft.", name="a")
    title = recipe.behaviour.title
    assert title.startswith("Be loud and Be loud")
    assert title.endswith("…")
    assert len(title) < 100


@pytest.mark.parametrize(
    ("name", "recipes"), [("mine", "mine"), ("a/b", "a-b"), (".hidden", "-hidden"), ("..", "-"), ("", "made")]
)
def test_a_run_is_named_after_its_directory(name: str, recipes: str) -> None:
    assert made_recipe("m", "Be loud.", "Be soft.", name=name).name == recipes


def test_a_score_is_yaml() -> None:
    recipe = made_recipe("m", "Be loud.", "Be soft.", name="a", score="{pattern: '(?i)ahoy'}")
    assert recipe.behaviour.model_dump(mode="json")["score"] == {"pattern": "(?i)ahoy"}
    assert made_recipe("m", "A.", "B.", name="a", score="preference").behaviour.score == "preference"
    with pytest.raises(RecipeError) as error:
        made_recipe("m", "Be loud.", "Be soft.", name="a", score="{a: b: c}")
    assert three_parts(error.value)[:2] == ("--score is not YAML", "{a: b: c}")


def test_answers_under_two_instructions_that_differ_by_chance_end_before_the_search(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    assert _make(monkeypatch, model, LOUD, SOFT, out, "--prompts", _prompts(tmp_path)) == 2
    said = capsys.readouterr().err
    assert "the model does not follow the two instructions: its answers under them differ by chance" in said
    assert "let a larger model write them" in said
    assert not (out / "search").exists()
