"""What the documentation says about the code: families, the recipe's keys, rooms, and the examples in docstrings."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter

import steer2edit as s2e
from conftest import make_traces
from families import FAMILIES
from runs import save_pico
from steer2edit.files.schema import Section
from steer2edit.models.architectures import ARCHITECTURES, Architecture
from steer2edit.models.inventory import families
from steer2edit.recipe import Recipe

ROOT = Path(__file__).parent.parent
WITH_EXAMPLES = [p for p in sorted((ROOT / "src").rglob("*.py")) if ">>> " in p.read_text(encoding="utf-8")]
PAGE = (ROOT / "docs" / "add_a_family.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found[1]


def test_the_readme_has_the_table_of_families_as_the_records_have_it() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert families() in readme, "run `steer2edit doctor --families` and put its output into the README"


def test_every_record_that_says_so_is_tested() -> None:
    tested = {name for record in ARCHITECTURES if record.tested for name in record.model_types}
    assert tested <= {model_type_of(name) for name in FAMILIES}
    assert all(record.tested for record in ARCHITECTURES)


def model_type_of(name: str) -> str:
    return FAMILIES[name].model_type


@pytest.fixture
def page() -> dict[str, Any]:
    """The names that the page's code leaves behind."""
    names: dict[str, Any] = {}
    exec(block("python"), names)
    return names


def test_the_code_on_adding_a_family_runs_and_finds_the_sites(page: dict[str, Any]) -> None:
    expected = [("0.attn", "self_attn.o_proj", 4, 8), ("0.mlp", "mlp.c_proj", 64, 1)]
    expected += [(key.replace("0", "1"), *rest) for key, *rest in expected]
    sites = s2e.find_sites(page["model"])
    assert [(s.key, s.module.split(".", 3)[3], s.n, s.width) for s in sites] == expected


def test_the_recipe_on_that_page_says_the_same(page: dict[str, Any]) -> None:
    section = yaml.safe_load(block("yaml"))["model"]
    described = TypeAdapter(Architecture).validate_python(section["architecture"])
    assert dataclasses.replace(described, model_types=("starcoder2",)) == page["starcoder2"]


def test_that_page_lists_every_field_of_a_record() -> None:
    listed = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE))))
    said_elsewhere = {"family", "model_types", "tested"}
    assert listed | said_elsewhere == {field.name for field in dataclasses.fields(Architecture)}
    experts = {field.name for field in dataclasses.fields(s2e.Experts)}
    assert experts <= set(re.findall(r"`(\w+)`", PAGE))


def keys(section: type[Section], before: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found += keys(kind, f"{before}{name}.")
        else:
            found.append(before + name)
    return found


def test_every_key_of_a_recipe_is_documented() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[a-z_.]+`.*?) \|", page, re.MULTILINE)
    documented: set[str] = set()
    for row in rows:
        names = re.findall(r"`([\w.]+)`", row)
        parent = names[0].rpartition(".")[0]
        documented |= {parent + name if name.startswith(".") else name for name in names}
    assert set(keys(Recipe)) <= documented


def defaults(section: type[Section], before: str = "") -> dict[str, Any]:
    """Key → its default, as JSON has it; keys that a recipe must have are left out."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found |= defaults(kind, f"{before}{name}.")
        elif not field.is_required():
            found[before + name] = TypeAdapter(Any).dump_python(
                field.get_default(call_default_factory=True), mode="json"
            )
    return found


def test_the_defaults_of_that_page_are_the_schemas() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    of_schema, compared = defaults(Recipe), 0
    for keys_cell, default in re.findall(r"^\| (`[a-z_.]+`.*?) \| (.*?) \|", page, re.MULTILINE):
        names = re.findall(r"`([\w.]+)`", keys_cell)
        parent = names[0].rpartition(".")[0]
        full = [parent + name if name.startswith(".") else name for name in names]
        if "behaviour" in default or " or " in default or not set(full) <= set(of_schema):
            continue  # said in words
        documented = yaml.safe_load(f"[{default}]") if len(full) > 1 else [yaml.safe_load(default)]
        documented = [str(x) if isinstance(x, date) else x for x in documented]
        if len(documented) == 1:  # all of these keys have it
            documented *= len(full)
        assert documented == [of_schema[name] for name in full], keys_cell
        compared += len(full)
    assert compared > 60


def test_the_page_on_the_architecture_names_ten_files_and_rooms_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    path = re.findall(r"^\d+\. `(src/[\w/]+\.py)`", page, re.MULTILINE)
    assert len(path) == len(set(path)) == 10
    named = {*path, *re.findall(r"`((?:src|docs)/[\w/]+\.\w+)`", page)}
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
    package = ROOT / "src" / "steer2edit"
    rooms = re.findall(r"^\| `([\w.]+)/?` \|", page, re.MULTILINE)
    assert {p.name for p in package.iterdir() if p.is_dir()} - {"data", "recipes", "__pycache__"} <= set(rooms)
    assert all((package / room).exists() for room in rooms)


def test_at_the_top_of_the_package_stands_what_the_page_names() -> None:
    package = ROOT / "src" / "steer2edit"
    files = {path.name for path in package.iterdir() if path.is_file()}
    assert files == {
        *("__init__.py", "__init__.pyi", "__main__.py", "py.typed", "errors.py", "progress.py", "parallel.py"),
        *("edits.py", "recipe.py", "cli.py"),
    }


def test_no_file_has_more_than_500_lines() -> None:
    files = [p for room in ("src", "tests", "benchmarks", "docs") for p in (ROOT / room).rglob("*.py")]
    assert [p.name for p in files if len(p.read_text(encoding="utf-8").splitlines()) > 500] == []


def test_one_behaviours_words_stand_in_its_own_room_alone() -> None:
    words = re.compile("refusal|harmful|borderline", re.IGNORECASE)
    package = ROOT / "src" / "steer2edit"
    rooms = [package / name for name in ("behaviours", "data", "recipes")]
    suffixes = (".py", ".pyi", ".j2", ".js", ".css")
    rooms.append(package / "report" / "html" / "assets" / "plotly")  # not ours
    files = [p for p in package.rglob("*") if p.suffix in suffixes and not any(r in p.parents for r in rooms)]
    assert len(files) > 200
    assert [p.name for p in files if words.search(p.read_text(encoding="utf-8"))] == []


@pytest.fixture(scope="module")
def examples_names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What examples in docstrings may use beside the names of their own module; docs/api.md says so, too."""
    base = save_pico(tmp_path_factory.mktemp("examples") / "base")
    model, tokenizer = s2e.load_model(base, dtype="float32", device="cpu")
    positive, negative = make_traces()
    probe = s2e.collect(model, tokenizer, positive, negative)
    scores = s2e.score(model, probe)
    edit = scores.edit(rho_attn=0.3, rho_mlp=0.3, alpha=0.3)
    names = {"model": model, "tokenizer": tokenizer, "base": base, "positive": positive, "negative": negative}
    return {**names, "probe": probe, "scores": scores, "edit": edit, "s2e": s2e, "torch": torch}


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_in_the_docstrings_give_what_they_say(
    path: Path, examples_names: dict[str, Any], tmp_path: Path
) -> None:
    name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
    given = {**examples_names, "folder": str(tmp_path)}
    failed, tried = doctest.testmod(importlib.import_module(name), extraglobs=given)
    assert tried
    assert failed == 0


@pytest.mark.parametrize("name", s2e.__all__)
def test_every_public_name_has_an_example(name: str) -> None:
    assert ">>> " in (getattr(s2e, name).__doc__ or "")


def test_the_api_page_has_every_public_name_once() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: steer2edit\.(\w+)$", page, re.MULTILINE)) == sorted(s2e.__all__)
