"""The documentation's site: it builds strictly, has every public name and key, and asks no other machine."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from pydantic_core import to_jsonable_python

import steer2edit as s2e
from steer2edit.behaviours.known import BEHAVIOURS
from steer2edit.files.schema import Section
from steer2edit.recipe import Recipe
from test_docs import keys

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def module_of_docs(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> str:
    made = module_of_docs("recipe_reference")
    said = made.descriptions((DOCS / "recipe.md").read_text(encoding="utf-8"))
    page = made.reference_page(said)
    assert made.reference_page(said) == page
    return page


def rows(page: str) -> list[list[str]]:
    """The cells of the tables' rows; a bar in a cell is escaped."""
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def field_of(path: str) -> Any:
    *parents, name = path.split(".")
    section: Any = Recipe
    for parent in parents:
        section = section.model_fields[parent].annotation
    return section.model_fields[name]


def test_the_recipe_reference_has_every_key_with_its_default(reference: str) -> None:
    of_key = {row[0].strip("`"): row for row in rows(reference) if len(row) == 4}
    for path in keys(Recipe):
        if path.startswith("behaviour."):
            continue
        field = field_of(path)
        _, takes, default, text = of_key[path]
        assert takes not in ("", "anything"), path
        assert text, path
        if field.is_required():
            assert default == "–"
        else:
            plain = to_jsonable_python(field.get_default(call_default_factory=True))
            assert yaml.safe_load(default.replace("\\|", "|")) == plain, path


def test_the_recipe_reference_has_every_behaviours_keys_and_measures(reference: str) -> None:
    parts = reference.split("\n## ")
    for name, behaviour in BEHAVIOURS.items():
        (part,) = [part for part in parts if part.startswith(f"`behaviour`: {name}\n")]
        named = {row[0].strip("`") for row in rows(part)}
        assert {f"behaviour.{key}" for key in behaviour.model_fields} <= named
        assert all(row[3] for row in rows(part) if row[0].startswith("`behaviour.") and row[0] != "`behaviour.name`")
        assert "utility_loss" in named


def test_the_recipe_reference_says_what_values_are_taken(reference: str) -> None:
    of_key = {row[0].strip("`"): row for row in rows(reference) if len(row) == 4}
    assert of_key["search.tolerance"][1] == "number ≥ 0 ≤ 1"
    assert of_key["search.method"][1] == "`grid`, `tpe`"
    assert of_key["search.steering"][1] == "[Range](#range) or list of number > 0 or `auto`"
    assert of_key["search.alpha"][1] == "list of number ≥ 0 < 1"
    assert of_key["search.rho_mlp"][1] == "list of (number > 0 or null) or `auto`"
    assert of_key["search.points"][1] == "whole number ≥ 2 ≤ 50"
    assert of_key["seed"][1:3] == ["whole number ≥ 0", "0"]
    assert "\n### Range\n" in reference


def test_a_description_is_of_its_own_table() -> None:
    made = module_of_docs("recipe_reference")
    page = """
| key | default | what it says |
| `a.b`, `.c` | 1 | both \\| of them |
**`other`**: words
| `b` | 2 | another |
## Files
| `b` | 3 | a file |
"""
    assert made.descriptions(page) == {"a.b": "both \\| of them", "a.c": "both \\| of them", "other.b": "another"}


def test_every_section_of_a_recipe_says_what_it_is() -> None:
    kinds = [field.annotation for field in Recipe.model_fields.values()]
    sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
    assert all(kind.__doc__ for kind in sections)


# The built site -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it."""
    out = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return out


class Loaded(HTMLParser):
    """What a page loads by itself, and the ids that it has."""

    def __init__(self, page: str):
        super().__init__()
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.classes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids.add(given.get("id", ""))
        self.classes |= set(given.get("class", "").split())
        if "src" in given or "srcset" in given:
            self.loads.append(given.get("src") or given["srcset"])
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(given.get("href", ""))


def test_no_page_loads_anything_from_another_machine(site: Path) -> None:
    pages = [*site.rglob("*.html")]
    assert len(pages) >= len([*DOCS.glob("*.md")]) + 4
    for page in pages:
        loaded = Loaded(page.read_text(encoding="utf-8"))
        assert loaded.loads
        assert [address for address in loaded.loads if re.match(r"(https?:)?//", address)] == [], page.name
        assert "mermaid" not in loaded.classes  # the theme would fetch a library for it
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_the_api_page_has_each_public_name_with_its_example(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    found = Loaded(text).ids
    missing = {name for name in s2e.__all__ if not any(id.split(".")[-1] == name for id in found)}
    assert missing == set()
    assert text.count("gt;&gt;&gt;") > 2 * len(s2e.__all__)
    assert "<blockquote>" not in text  # what examples are as plain Markdown


def test_the_results_page_has_the_readmes_numbers(site: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = (site / "results.html").read_text(encoding="utf-8")
    for row in re.findall(r"^\| (tokens/s [^|]*) \| ([^|]*) \|", readme, re.MULTILINE):
        assert row[1] in text, row
    assert {"what-the-demo-measured", "what-it-costs", "supported-models"} <= Loaded(text).ids


def test_pages_that_are_made_are_there(site: Path) -> None:
    for name in ("recipe_reference", "contributing", "security", "changelog"):
        assert (site / f"{name}.html").is_file()
    assert (site / "start.ipynb").is_file()
    assert not [*site.glob("*.py")]
