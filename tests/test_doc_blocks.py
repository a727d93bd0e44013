"""The blocks of code in the documentation: Python runs, commands parse, YAML is a recipe's, links lead somewhere.

Python runs on a tiny model in place of the one that a page names; `test_real.py` runs the README's on the real one.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import steer2edit as s2e
from conftest import make_traces
from runs import save_pico
from served import a_server, a_worker
from sides import ChatServer
from steer2edit import cli
from steer2edit.behaviours import judge_formats
from steer2edit.errors import RecipeError
from steer2edit.models import embedded, load
from steer2edit.recipe import load_recipe, parse_recipe, shipped_recipes

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
STAGES = ("run", "traces", "probe", "score", "search", "edit", "export", "evaluate")
COMMAND = re.compile(r"^\s*(?:HF_HUB_OFFLINE=1 )?(?:\.venv/bin/)?(steer2edit .*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block, or a line that stands in one or is indented."""

    page: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def fenced(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            found.append(Block(page, text.count("\n", 0, match.start()) + 2, match[1]))
    return found


def code_lines() -> Iterator[Block]:
    """Lines of shell: indented by four, or in a block that is fenced as bash."""
    shell = {block.page: set() for block in fenced("bash")}
    for block in fenced("bash"):
        shell[block.page] |= set(range(block.line, block.line + block.text.count("\n")))
    for page in PAGES:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
            if line.startswith("    ") or number in shell.get(page, ()):
                yield Block(page, number, line)


PYTHON_PAGES = sorted({block.page for block in fenced("python")})
COMMANDS = [Block(b.page, b.line, m[1]) for b in code_lines() if (m := COMMAND.match(b.text))]


# Python -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pages take for granted: a checkpoint, edits of it, an adapter, an edited checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    base = save_pico(folder / "base")
    model, tokenizer = s2e.load_model(base, dtype="float32", device="cpu")
    positive, negative = make_traces()
    scores = s2e.score(model, s2e.collect(model, tokenizer, positive, negative))
    for name, rho in {"edit": 0.3, "refusal": 0.3, "verbosity": 0.2}.items():
        scores.edit(rho_attn=rho, rho_mlp=rho, alpha=0.3).save(folder / f"{name}.safetensors")
    edit = s2e.Edit.load(folder / "edit.safetensors")
    edit.save_adapter(folder / "adapter")
    s2e.export_checkpoint(base, edit, folder / "edited")
    s2e.write_traces(folder / "runs/safety-demo/traces.jsonl", [*positive, *negative])
    return folder


# What each page finds in its folder beside base/, and what of its code stands for something that is not here.
NEEDS = {
    "README.md": ["runs"],
    "artefacts.md": ["adapter"],
    "audit.md": ["edit.safetensors", "edited"],
    "many_edits.md": ["refusal.safetensors", "verbosity.safetensors"],
    "trade_off.md": ["edit.safetensors"],
}
# A random model's answers are no language: without limits an edit is chosen all the same.
SMALL = """
    title="pirate",
    counts={"probe": 4, "validation": 4, "test": 4},
    evaluation={"new_tokens": 4, "utility_prompts": 2, "utility_tokens": 4},
    options={
        "rho_attn": [0.2], "rho_mlp": [None], "baselines": [], "limits": {"degenerate": None, "utility_loss": None}
    }
"""
REPLACED = {"your_own_behaviour.md": {'title="pirate"': SMALL}}


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The folder that a page's code runs in; the embedded model is a tiny one there."""
    monkeypatch.setenv("STEER2EDIT_CACHE", str(tmp_path / "cache"))
    here = tmp_path / "here"
    shutil.copytree(made / "base", here / "base")
    for module in (embedded, load, judge_formats):
        monkeypatch.setattr(module, "embedded_checkpoint", lambda: here / "base")
    monkeypatch.chdir(here)
    return here


def run_page(page: Path, replaced: Mapping[str, str]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in fenced("python"):
        if block.page == page:
            code = block.text
            for old, new in replaced.items():
                assert old in code, f"{page.name} has no {old!r} any more"
                code = code.replace(old, new)
            exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), names)
    return names


@pytest.mark.parametrize(
    "page", [p for p in PYTHON_PAGES if p.name not in ("serve.md", "judges.md", "paper.md")], ids=lambda page: page.name
)
def test_the_python_of_a_page_runs(page: Path, place: Path, made: Path) -> None:
    for name in NEEDS.get(page.name, []):
        copy = shutil.copytree if (made / name).is_dir() else shutil.copy
        copy(made / name, place / name)
    before = {file.name for file in place.iterdir()}
    names = run_page(page, REPLACED.get(page.name, {}))
    code = "".join(block.text for block in fenced("python") if block.page == page)
    written = set(re.findall(r"save\w*\(\"([\w./-]+?)/?\"\)", code))
    assert written <= {file.name for file in place.iterdir()} - before
    assert names


def test_the_python_of_the_server_page_gets_an_answer_in_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "serve.md"
    with a_worker() as (worker, catalogue), a_server(worker, catalogue) as client:
        replaced = {"http://127.0.0.1:8000/v1": str(client.base_url).rstrip("/"), "pirate@0.5": "small@0.5"}
        run_page(page, replaced | {"stream=True": "stream=True, max_tokens=8, temperature=0"})
        whole = client.chat.completions.create(
            model="small@0.5",
            messages=[{"role": "user", "content": "How do I bake bread?"}],
            max_tokens=8,
            temperature=0,
        )
    assert capsys.readouterr().out == whole.choices[0].message.content


def test_the_python_of_the_judges_page_prints_what_it_says(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = ChatServer(lambda body: "Yes.")
    try:
        run_page(ROOT / "docs" / "judges.md", {"http://localhost:8000/v1": server.url})
    finally:
        server.close()
    assert capsys.readouterr().out == "[1.0]\n"
    assert "I cannot help with that." in str(server.bodies)


# The command line ---------------------------------------------------------------------------------------------------


@lru_cache
def group_of_verbs() -> Any:
    return typer.main.get_command(cli.app)


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """The verb of a command and its parameters, without running it."""
    words = shlex.split(line, comments=True)[1:]
    group = group_of_verbs()
    context = group.make_context("steer2edit", list(words))
    name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    return name, command.make_context(name, rest, parent=context).params


def test_there_are_commands_of_every_verb_in_the_documentation() -> None:
    verbs = set(group_of_verbs().commands)
    assert verbs <= {parsed(block.text)[0] for block in COMMANDS}


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_a_command_has_verbs_options_and_keys_that_exist(block: Block) -> None:
    verb, parameters = parsed(block.text)
    if verb not in STAGES or not parameters.get("overrides"):
        return
    name = parameters["recipe"]
    shipped = shipped_recipes()
    errors = []
    for recipe in [name] if name in shipped else shipped:
        try:
            load_recipe(recipe, parameters["overrides"])
            return
        except RecipeError as error:
            errors.append(error)
    raise errors[0]


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_what_a_shell_would_expand_is_quoted(block: Block) -> None:
    unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", block.text).partition(" #")[0]
    assert not set("[]{}*?") & set(unquoted)  # zsh takes brackets for a pattern, bash expands braces


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("steer2edit serch mine.yaml", "serch"),
        ("steer2edit run mine.yaml --modell m", "--modell"),
        ("steer2edit apply base/ edit.safetensors", "Missing parameter: to"),
        ("steer2edit verify base/ edit.safetensors", "Missing parameter: edited"),
    ],
)
def test_a_command_that_does_not_exist_would_be_found(line: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        parsed(line)


def test_verbs_in_the_text_exist() -> None:
    verbs = set(group_of_verbs().commands)
    for page in PAGES:
        for name in re.findall(r"`steer2edit ([a-z][a-z-]*)(?![\w/])", page.read_text(encoding="utf-8")):
            assert name in verbs, f"{page.name}: {name}"


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    lines = [re.match(r"\s*make ([a-z-]+)", block.text) for block in code_lines()]
    named = {match[1] for match in lines if match}
    for page in PAGES:
        named |= set(re.findall(r"`make\s+([a-z-]+)`", page.read_text(encoding="utf-8")))
    assert named
    assert named <= targets


# YAML ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", fenced("yaml"), ids=str)
def test_yaml_is_a_recipe_or_a_section_of_one(block: Block) -> None:
    given = yaml.safe_load(block.text)
    assert isinstance(given, dict)
    if "name" not in given:
        whole = yaml.safe_load(shipped_recipes()["demo"])
        given = {**whole, **{key: {**whole.get(key, {}), **section} for key, section in given.items()}}
    parse_recipe(given)


# Links --------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that code hosts give to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#{1,6} (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


def test_every_figure_of_the_readme_about_speed_links_to_a_script() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("## What it costs")[1].split("\n## ")[0]
    _, _, *rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert rows
    for row in rows:
        script = re.search(r"\[`benchmarks/\w+\.py`\]\((benchmarks/\w+\.py)\) \|$", row)
        assert script, row
        assert (ROOT / script[1]).is_file()
