"""What a release is made of: one version everywhere, files that their readers can read, and `python -m steer2edit`."""

from __future__ import annotations

import ast
import datetime
import doctest
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import steer2edit as s2e
import versions

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_version_is_the_same_everywhere() -> None:
    citation = read_yaml("CITATION.cff")
    assert PROJECT["version"] == s2e.__version__ == citation["version"]
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", CHANGELOG, re.MULTILINE)
    assert released[0] == (s2e.__version__, citation["date-released"])


def test_the_changelog_is_in_the_order_of_keep_a_changelog() -> None:
    versions = re.findall(r"^## \[(.+?)\]", CHANGELOG, re.MULTILINE)
    assert versions[0] == "Unreleased"
    numbers = [tuple(map(int, version.split("."))) for version in versions[1:]]
    assert numbers == sorted(numbers, reverse=True)
    headings = set(re.findall(r"^### (.+)$", CHANGELOG, re.MULTILINE))
    assert headings <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_has_what_its_format_asks_for() -> None:
    citation = read_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    datetime.date.fromisoformat(citation["date-released"])
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Sun", "Yan", "Wang", "Weng"]
    assert paper["url"] == PROJECT["urls"]["Paper"]
    assert citation["license"] == PROJECT["license"]


@pytest.mark.parametrize("name", ["bug.yml", "question.yml"])
def test_templates_of_issues_are_forms(name: str) -> None:
    form = read_yaml(f".github/ISSUE_TEMPLATE/{name}")
    assert {"name", "description", "body"} <= set(form)
    kinds = [part["type"] for part in form["body"]]
    assert set(kinds) <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    ids = [part["id"] for part in fields]
    assert len(set(ids)) == len(ids) > 0
    assert all(part["attributes"]["label"] for part in fields)
    assert any(part.get("validations", {}).get("required") for part in fields)


def test_what_other_extras_need_is_in_the_one_for_developers() -> None:
    extras = {name: {Requirement(text).name.lower() for text in some} for name, some in extras_of().items()}
    together = {package for name, some in extras.items() if name != "dev" for package in some}
    assert together <= extras["dev"]


# The distribution of a module, where they differ in more than case and dashes.
DISTRIBUTIONS = {"yaml": "pyyaml", "lm_eval": "lm-eval", "math_verify": "math-verify", "lazy_loader": "lazy-loader"}
# Comes with FastAPI, whose own types these are; vLLM runs in an environment of its own.
COMES_ALONG = {"starlette": "fastapi", "anyio": "fastapi", "markupsafe": "jinja2", "vllm": None}
# No module of ours imports it: its version decides how text is divided into tokens.
ONLY_A_BOUND = {"tokenizers"}


def imported_modules() -> set[str]:
    """The first part of every module of others that the package imports, wherever in a file."""
    modules = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules.add(node.module.partition(".")[0])
    return modules - set(sys.stdlib_module_names) - {"steer2edit"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    modules = {COMES_ALONG.get(name, name) for name in imported_modules()} - {None}
    imported = {DISTRIBUTIONS.get(name, name).lower() for name in modules if name}
    core = {Requirement(text).name.lower() for text in PROJECT["dependencies"]}
    extras = {
        Requirement(text).name.lower() for n, some in extras_of().items() if n not in ("dev", "docs") for text in some
    }
    assert imported - core - extras == set()
    assert core - imported == ONLY_A_BOUND
    assert extras - imported == set()


def test_each_pinned_version_is_one_that_the_project_allows() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line)
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for text in [*PROJECT["dependencies"], *extras_of()["dev"]]:
        requirement = Requirement(text)
        pin = pins.get(requirement.name.lower().replace("_", "-"))
        assert pin is None or requirement.specifier.contains(pin), text


def extras_of() -> dict[str, list[str]]:
    return PROJECT["optional-dependencies"]


def test_python_with_m_is_the_command() -> None:
    said = [
        subprocess.run([sys.executable, *how, "recipes"], capture_output=True, text=True, check=True).stdout
        for how in (["-m", "steer2edit"], ["-c", "from steer2edit.cli import main; main()"])
    ]
    assert said[0] == said[1]
    assert "demo" in said[0]
    wrong = subprocess.run([sys.executable, "-m", "steer2edit", "run", "nowhere.yaml"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("steer2edit: no such recipe")


def test_the_oldest_version_is_the_bound_of_a_requirement() -> None:
    assert doctest.testmod(versions).attempted > 0
    assert doctest.testmod(versions).failed == 0
    oldest = versions.requirements("oldest")
    assert {text.partition("==")[0] for text in oldest} >= {"transformers", "peft", "pydantic"}
    assert not any(text.startswith("torch==") for text in oldest)
