"""The command line: a user's mistake is one line on stderr and exit code 2, help is quick, results can be read."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file

from runs import is_one_sentence, said_by, save_pico, tiny_recipe
from steer2edit.cli import SPIN_COUNT
from steer2edit.edits import Edit
from steer2edit.files.reading import read_json, read_jsonl
from steer2edit.files.writing import write_json, write_jsonl
from steer2edit.pipeline.stages import STAGES
from steer2edit.recipe import Recipe, load_recipe, shipped_recipes
from steer2edit.report.page import print_run


@pytest.fixture
def whole(tiny_run: Path) -> Path:
    """The folder of a whole run; not to be changed."""
    return tiny_run


@pytest.fixture
def file(recipe: Recipe, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    return path


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """say(*arguments) runs `steer2edit` in an empty folder of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    return functools.partial(said_by, monkeypatch, capfd)


def _nothing_half_written(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert ".tmp" not in path.name
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["search.rho_atn=[0.2]"], ["unknown key search.rho_atn", "Did you mean 'rho_attn'?"]),
        (["search.rho_attn=[0]"], ["search.rho_attn.0", "greater than 0"]),
        (["search.rho_mlp=[-1]"], ["search.rho_mlp.0", "got: -1"]),
        (["search.alpha=[1]"], ["search.alpha.0", "less than 1"]),
        (["search.alpha=[.nan]"], ["search.alpha.0", "got: nan"]),
        (["search.alpha"], ["not key=value"]),
        (["data.test={harmful: 10000}", "data.probe={harmful: 9999}"], ["the probe split has too few harmful prompts"]),
        (["data.prompts=nowhere.jsonl"], ["no such file", "nowhere.jsonl"]),
    ],
)
def test_a_wrong_recipe_is_one_line(
    overrides: list[str], parts: list[str], say: Any, file: Path, tmp_path: Path
) -> None:
    is_one_sentence(say("run", file, *overrides, "--quiet", "--out", tmp_path / "out"), *parts)
    _nothing_half_written(tmp_path)


def test_a_recipe_that_is_nowhere_is_one_line(say: Any) -> None:
    is_one_sentence(say("run", "nowhere.yaml"), "no such recipe", "nowhere.yaml", "demo")


def test_a_recipe_that_is_not_yaml_is_one_line(say: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: [a\nmodel: b", encoding="utf-8")
    is_one_sentence(say("run", tmp_path / "recipe.yaml"), "is not YAML")
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00\x01")
    is_one_sentence(say("run", tmp_path / "recipe.yaml"), "cannot be read as text")


def test_a_model_that_is_nowhere_is_one_line(say: Any, file: Path, tmp_path: Path) -> None:
    said = say("run", file, "--model", tmp_path / "no-model", "--quiet", "--out", tmp_path / "out")
    is_one_sentence(said, "no-model). Check the path")
    said = say("run", file, "--model", "nobody/no-such-model", "--quiet", "--out", tmp_path / "out")
    is_one_sentence(said, "the model nobody/no-such-model cannot be loaded")
    said = say("run", file, "--model", "none.gguf", "--quiet", "--out", tmp_path / "out")
    is_one_sentence(said, "no such GGUF file")
    _nothing_half_written(tmp_path)


@pytest.mark.parametrize("name", ["12", "true", "a: b #c", "[pico]", "@pico", "ü'"])
def test_a_model_may_have_any_name(name: str, say: Any, file: Path, tmp_path: Path) -> None:
    said = say("run", file, "--model", tmp_path / name, "--quiet", "--out", tmp_path / "out")
    is_one_sentence(said, f"no such folder (got: {tmp_path / name})")
    is_one_sentence(say("run", file, "--model", name, "--quiet", "--out", tmp_path / "out"), f"the model {name} cannot")


def test_a_device_that_is_none_is_one_line(say: Any, file: Path, tmp_path: Path) -> None:
    devices = ["toaster"] if torch.cuda.is_available() else ["toaster", "cuda"]
    for device in devices:
        said = say("run", file, f"model.device={device}", "--quiet", "--out", tmp_path / "out")
        is_one_sentence(said, f"the device {device} cannot be used here")


def test_a_model_without_chat_template_is_one_line_that_says_what_to_do(say: Any, file: Path, tmp_path: Path) -> None:
    save_pico(tmp_path / "model", template=False)
    said = say("run", file, "--model", tmp_path / "model", "--quiet", "--out", tmp_path / "out")
    is_one_sentence(said, "no chat template", "model.plain: true")
    _nothing_half_written(tmp_path)


def test_a_model_without_chat_template_runs_as_plain_text(say: Any, file: Path, tmp_path: Path) -> None:
    save_pico(tmp_path / "model", template=False)
    said = say("traces", file, "model.plain=true", "--model", tmp_path / "model", "--quiet", "--out", tmp_path / "out")
    assert (said.code, said.err) == (0, "")
    assert (tmp_path / "out/traces.jsonl").is_file()


def test_a_model_of_an_unknown_family_is_one_line_with_the_known_ones(say: Any, file: Path, tmp_path: Path) -> None:
    save_pico(tmp_path / "model", "mamba", attn_implementation="eager")
    said = say("run", file, "--model", tmp_path / "model", "--quiet", "--out", tmp_path / "out")
    is_one_sentence(said, "architecture is not supported", "'mamba'", "llama")
    _nothing_half_written(tmp_path)


def test_an_out_path_that_cannot_be_a_folder_is_one_line(say: Any, file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    is_one_sentence(say("run", file, "--quiet", "--out", tmp_path / "mine"), "the run directory is a file")
    is_one_sentence(say("run", file, "--quiet", "--out", tmp_path / "mine" / "below"), str(tmp_path / "mine"))
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "mine"
    if Path("/proc").is_dir():
        is_one_sentence(say("run", file, "--quiet", "--out", "/proc/x"), "nothing can be written to /proc/x")


@pytest.mark.parametrize("stage", list(STAGES)[1:])
def test_a_stage_before_its_turn_is_one_line_that_names_the_one_to_run(
    stage: str, say: Any, file: Path, tmp_path: Path
) -> None:
    is_one_sentence(say(stage, file, "--out", tmp_path / "out"), "the stage traces", f"`steer2edit traces {file}`")
    assert not (tmp_path / "out").exists()


def test_stages_one_by_one_say_that_they_are_done(say: Any, file: Path, recipe: Recipe, tmp_path: Path) -> None:
    for stage in ("traces", "probe", "score"):
        said = say(stage, file, "--quiet", "--out", tmp_path / "out")
        assert (said.code, said.out, said.err) == (0, f"{stage}: done, see {tmp_path / 'out'}/\n", "")


def test_a_whole_run_prints_its_results_and_a_second_one_makes_nothing_anew(
    say: Any, file: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    said = say("run", file, "--out", tmp_path / "out")
    assert said.code == 0
    assert said.err.splitlines() == [f"{i}/{len(STAGES)} {stage}: done before" for i, stage in enumerate(STAGES, 1)]
    assert "refusal (harmful)" in " ".join(said.out.split())
    assert "(ρ_attn" in " ".join(said.out.split())
    assert f"{tmp_path / 'out'}/" in said.out.replace("\n", "")
    said = say("run", file, "--quiet", "--json", "--out", tmp_path / "out")
    assert json.loads(said.out) == json.loads((whole / "evaluation/results.json").read_text(encoding="utf-8"))
    assert said.err == ""


@pytest.mark.usefixtures("undrawn")
def test_a_run_whose_edit_touches_no_component_says_so_and_ends(say: Any, recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    far = tiny_recipe(recipe.model.name, search__rho_attn=[50.0], search__alpha=[0.9])  # no |g| is above 45
    (tmp_path / "far.yaml").write_text(far.to_yaml(), encoding="utf-8")
    said = say("run", tmp_path / "far.yaml", "--out", out)
    assert "the chosen edit touches no component: every |g| is below the threshold ρα" in said.err
    assert "nothing moved: no edit within the limits has a better refusal" in said.err
    # An adapter of nothing is not written; everything else is there.
    assert said.code == 2
    assert said.err.splitlines()[-1].startswith("steer2edit: the edit changes nothing")
    assert json.loads((out / "evaluation/results.json").read_text(encoding="utf-8"))["systems"]["edit"]
    assert "Nothing moved: on validation" in (out / "report.md").read_text(encoding="utf-8")
    assert json.loads(say("inspect", out / "edit.safetensors", "--json").out)["summary"]["attn"]["edited"] == 0


def test_the_run_directory_is_named_after_the_recipe(say: Any, file: Path) -> None:
    say("traces", file, "name=other", "--quiet")
    assert Path("runs/other/traces.jsonl").is_file()


KINDS = {
    "probe": "probe.safetensors",
    "scores": "scores.safetensors",
    "edit": "edit.safetensors",
    "run": ".",
}


def _strict(text: str) -> Any:
    """JSON as others read it, without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_shows_each_kind_of_file_and_its_json_can_be_read(kind: str, say: Any, whole: Path) -> None:
    said = say("inspect", whole / KINDS[kind], "--json", "--top", "1000")
    assert (said.code, said.err) == (0, "")
    found = _strict(said.out)
    assert found["kind"] == kind
    printed = say("inspect", whole / KINDS[kind], "--top", "3")
    assert (printed.code, printed.err) == (0, "")
    assert f"kind: {kind}" in printed.out


def test_brackets_in_names_are_printed_as_they_are(say: Any, file: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a [bold] run [/closed]"
    shutil.copytree(whole, folder)
    said = say("run", file, "name=tiny [x]", "--quiet", "--out", folder)
    assert (said.code, said.err) == (0, "")
    assert str(folder) in said.out.replace("\n", "")
    said = say("inspect", folder)
    assert (said.code, said.err) == (0, "")
    assert "name: tiny [x]" in said.out


def test_tables_are_as_wide_as_columns_say_where_there_is_no_terminal(
    say: Any, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert 80 < max(map(len, say("inspect", whole).out.splitlines())) <= 150
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, say("inspect", whole).out.splitlines())) <= 80


HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp.exe\u2066\r\b[bold]<script>alert(1)</script>"
ACTS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def test_text_of_strangers_acts_on_nothing_in_the_terminal(say: Any, whole: Path, tmp_path: Path) -> None:
    """In names, titles, prompts, answers and provenance, and in errors about them."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    results = read_json(folder / "evaluation/results.json")
    results["measures"][0]["title"] = HOSTILE
    results["systems"]["edit"]["config"] = {HOSTILE: HOSTILE}
    write_json(folder / "evaluation/results.json", results)
    manifest = read_json(folder / "manifest.json")
    manifest["recipe"]["name"] = manifest["recipe"]["model"]["name"] = HOSTILE
    write_json(folder / "manifest.json", manifest)
    choice = read_json(folder / "choice.json") | {"firing": [{HOSTILE: 1.0, "[/x]": 2.0}]}
    write_json(folder / "choice.json", choice)
    edit = Edit.load(folder / "edit.safetensors")
    dataclasses.replace(edit, provenance={"model": HOSTILE * 1000}).save(tmp_path / "stranger.safetensors")
    rows = read_jsonl(folder / "evaluation/answers.jsonl")
    written = [row | {"prompt": HOSTILE, "kind": HOSTILE, "edit": HOSTILE + "x" * 100_000} for row in rows]
    write_jsonl(folder / "evaluation/answers.jsonl", written)
    for said in (say("inspect", folder), say("inspect", tmp_path / "stranger.safetensors")):
        assert (said.code, ACTS.findall(said.out)) == (0, [])
        assert "[bold]<script>" in said.out.replace("\n", "")
    out = io.StringIO()
    print_run(Console(file=out, width=100), results, folder / "evaluation/answers.jsonl")
    assert ACTS.findall(out.getvalue()) == []
    assert len(out.getvalue()) < 20_000
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({HOSTILE: 1}), encoding="utf-8")
    for said in (say("run", tmp_path / "bad.yaml"), say("inspect", f"no{HOSTILE}such"), say("doctor", f"./{HOSTILE}")):
        assert said.code == 2
        assert ACTS.findall(said.err) == []


def test_inspect_lists_the_largest_first(say: Any, whole: Path) -> None:
    edit = _strict(say("inspect", whole / "edit.safetensors", "--json", "--top", "4").out)
    largest = [abs(row["λ"]) for row in edit["largest |λ|"]]
    assert len(largest) == 4
    assert largest == sorted(largest, reverse=True)
    assert largest[0] == pytest.approx(edit["summary"]["attn"]["largest"])
    scores = _strict(say("inspect", whole / "scores.safetensors", "--json", "--top", "1000").out)
    sizes = [abs(row["g"]) for row in scores["largest |g|"]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 3 * (4 + 48)  # every head and neuron of the model
    probe = _strict(say("inspect", whole / "probe.safetensors", "--json").out)
    assert [site["site"] for site in probe["sites"]] == [f"{i}.{block}" for i in range(3) for block in ("attn", "mlp")]
    assert probe["counts"]["positive"]["responses"] == 3
    run = _strict(say("inspect", whole, "--json").out)
    assert [stage["stage"] for stage in run["stages"]] == list(STAGES)
    assert run["choice"]["edit"]["id"] == run["results"]["systems"]["edit"]["id"]


def test_inspect_draws_an_edit(say: Any, whole: Path, tmp_path: Path) -> None:
    said = say("inspect", whole, "--picture", tmp_path / "lambda.png")
    assert said.code == 0
    assert said.err.splitlines() == [str(tmp_path / f"lambda.{suffix}") for suffix in ("png", "svg", "pdf")]
    assert (tmp_path / "lambda.png").read_bytes() == (whole / "figures/lambda.png").read_bytes()
    is_one_sentence(say("inspect", whole / "probe.safetensors", "--picture", tmp_path / "p"), "does not hold a edit")


def test_inspect_of_a_file_that_is_cut_missing_or_of_others_is_one_line(say: Any, whole: Path, tmp_path: Path) -> None:
    for name in list(KINDS.values())[:3]:
        content = (whole / name).read_bytes()
        for size in (0, 7, 100, len(content) // 2, len(content) - 1):
            (tmp_path / name).write_bytes(content[:size])
            is_one_sentence(say("inspect", tmp_path / name), name)
    save_file({"w": torch.zeros(2)}, str(tmp_path / "foreign.safetensors"))
    is_one_sentence(say("inspect", tmp_path / "foreign.safetensors"), "was not written by steer2edit")
    save_file({"w": torch.zeros(2)}, str(tmp_path / "other.safetensors"), metadata={"steer2edit": '{"kind": "soup"}'})
    is_one_sentence(say("inspect", tmp_path / "other.safetensors"), "got: soup")
    save_file({"w": torch.zeros(2)}, str(tmp_path / "empty.safetensors"), metadata={"steer2edit": '{"kind": "edit"}'})
    is_one_sentence(say("inspect", tmp_path / "empty.safetensors"), "is not a whole edit file")
    (tmp_path / "text.safetensors").write_text("hello", encoding="utf-8")
    is_one_sentence(say("inspect", tmp_path / "text.safetensors"), "text.safetensors")
    is_one_sentence(say("inspect", tmp_path / "none.safetensors"), "no such file")


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"stages": {"traces": 3}, "recipe": {}}'])
def test_inspect_of_a_folder_that_is_no_run_is_one_line(content: str | None, say: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run/manifest.json").write_text(content, encoding="utf-8")
    is_one_sentence(say("inspect", tmp_path / "run"), "manifest.json")


def test_recipes_are_listed_with_what_they_are_for(say: Any) -> None:
    said = say("recipes")
    assert said.code == 0
    for name in shipped_recipes():
        line = next(line for line in said.out.splitlines() if line.startswith(f"{name} "))
        assert len(line.removeprefix(name).strip()) > 20
    assert json.loads(say("recipes", "--json").out) == sorted(shipped_recipes())


def test_a_recipe_is_copied_but_never_over_a_file(say: Any, tmp_path: Path) -> None:
    said = say("recipes", "--copy", "demo")
    assert (said.code, said.out) == (0, "demo.yaml\n")
    assert load_recipe("demo.yaml") == load_recipe("demo")
    Path("demo.yaml").write_text("mine", encoding="utf-8")
    is_one_sentence(say("recipes", "--copy", "demo"), "the file exists already", "demo.yaml")
    is_one_sentence(say("recipes", "--copy", "demo", "--to", tmp_path), "the file exists already")
    assert Path("demo.yaml").read_text(encoding="utf-8") == "mine"
    is_one_sentence(say("recipes", "--copy", "soup"), "no such shipped recipe", "got: soup", "demo")


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["fly"], ["run", "demo", "--wings"], ["inspect"], ["inspect", "x", "--top", "many"], ["--wings"]],
)
def test_a_command_that_is_none_leaves_with_2_and_no_traceback(arguments: list[str], say: Any) -> None:
    said = say(*arguments)
    assert said.code == 2
    assert said.out == ""
    assert "Usage: steer2edit" in said.err
    assert "Traceback" not in said.err
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serch", "x"], "Did you mean 'search'"),
        (["evalute", "demo"], "Did you mean 'evaluate'"),
        (["fly"], "A model is a folder, a .gguf file, OWNER/NAME on the Hub or embedded:NAME"),
        (["gpt2", "--yes"], "stands behind `steer2edit guided`"),
    ],
)
def test_a_verbs_near_miss_gets_the_verb_and_any_other_word_how_a_model_is_named(
    arguments: list[str], said: str, say: Any
) -> None:
    expected = say(*arguments)
    assert (expected.code, expected.out) == (2, "")
    assert said in " ".join(expected.err.split())


def test_a_folder_is_a_model_but_a_verb_comes_first(say: Any) -> None:
    Path("serch").mkdir()
    Path("doctor").mkdir()
    is_one_sentence(say("serch", "--recipe", "demo", "--yes"), "the model serch cannot be loaded")
    is_one_sentence(say("doctor"), "no model is given")
    is_one_sentence(say("./nowhere/x", "--recipe", "demo", "--yes"), "no such folder")


def test_a_recipe_alone_lets_no_code_of_a_model_run(say: Any) -> None:
    recipe = load_recipe("demo", ["model.name=someone/theirs", "model.trust_remote_code=true"])
    Path("theirs.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    is_one_sentence(say("doctor", "theirs.yaml"), "runs code of its own (got: someone/theirs)", "--trust-remote-code")
    is_one_sentence(say("run", "theirs.yaml"), "the recipe runs the code of its model", "--trust-recipe-code")


def test_the_version_is_that_of_the_package(say: Any) -> None:
    from importlib.metadata import version

    said = say("--version")
    assert (said.code, said.out, said.err) == (0, f"steer2edit {version('steer2edit')}\n", "")


@pytest.mark.parametrize(("line", "completed"), [("steer2edit rec", "recipes"), ("steer2edit run --mo", "--model")])
def test_a_shell_completes_verbs_and_options_and_loads_nothing_heavy(line: str, completed: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "_STEER2EDIT_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - 1),
    }
    script = (
        "import sys\nsys.argv = ['steer2edit']\nfrom steer2edit.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert completed in done.stdout.split()
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["inspect", "--help"],
        ["search", "--help"],
        ["apply", "--help"],
        ["guided", "--help"],
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    script = (
        "import sys\n"
        f"sys.argv = ['steer2edit', *{arguments!r}]\n"
        "from steer2edit.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'peft', 'yaml', 'scipy', 'rich.table'}\n"
        "print(code, sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr == "0 []\n"
    assert done.stdout.lstrip().startswith("Usage: steer2edit")


@pytest.mark.parametrize(
    ("chosen", "becomes"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_threads_spin_briefly_unless_the_user_has_set_how_they_wait(
    chosen: dict[str, str], becomes: dict[str, str]
) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    code = (
        "import os, sys; from steer2edit import cli\n"
        "try: cli.main()\n"
        f"except SystemExit: print([os.environ.get(name) for name in {names}], file=sys.stderr)"
    )
    environment = {key: value for key, value in os.environ.items() if key not in names} | chosen
    done = subprocess.run([sys.executable, "-c", code, "--help"], env=environment, capture_output=True, text=True)
    assert done.stderr.strip() == str([becomes.get(name) for name in names])


def test_the_installed_command_answers_and_fails_as_it_should(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("steer2edit")
    done = subprocess.run([program, "run", "nowhere.yaml"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("steer2edit: no such recipe (got: nowhere.yaml).")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_command_says_how_it_goes_on(monkeypatch: pytest.MonkeyPatch, say: Any, file: Path) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("steer2edit.pipeline.stages.run_all", interrupted)
    said = say("run", file)
    assert (said.code, said.out) == (130, "")
    assert said.err.strip() == "steer2edit: stopped; the same command goes on from here."
