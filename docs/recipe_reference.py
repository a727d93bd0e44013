"""The recipe reference: every section and key of a recipe, from the schema that reads it.

What a key takes and its default come from the schema. What it says comes from `recipe.md` or, for keys that are not on
that page, from the section's docstring.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import griffe
import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from steer2edit import __version__
from steer2edit.behaviours.base import Behaviour
from steer2edit.behaviours.known import BEHAVIOURS
from steer2edit.behaviours.measures import SCORES, Score
from steer2edit.files.schema import Section
from steer2edit.recipe import Recipe

HEAD = "| key | takes | default | what it says |\n| --- | --- | --- | --- |"
# What a behaviour cannot be made without.
_NEEDED: Mapping[str, Mapping[str, Any]] = {"custom": {"more": {"system": "a"}, "less": {"system": "b"}}}


def descriptions(page: str) -> dict[str, str]:
    """Key → what `recipe.md` says of it. A behaviour's own keys begin with its name: `safety.positive`."""
    said: dict[str, str] = {}
    before: str | None = ""
    for line in page.splitlines():
        if named := re.match(r"\*\*`(\w+)`\*\*", line):
            before = named[1] + "."
        elif line.startswith("## "):
            before = None
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        names = re.findall(r"`([\w.]+)`", cells[0]) if len(cells) == 3 else []
        if not names or before is None:
            continue
        parent = names[0].rpartition(".")[0]
        for name in names:
            said[before + (parent + name if name.startswith(".") else name)] = cells[2]
    return said


def reference_page(said: Mapping[str, str]) -> str:
    """The page as Markdown. The same schema gives the same bytes."""
    return "\n".join(_Page(said).lines()) + "\n"


class _Page:
    """The page while it is written: which parts its tables name and still need a table of their own."""

    def __init__(self, said: Mapping[str, str]):
        self.said = said
        self.definitions: dict[str, Mapping[str, Any]] = {}
        self.written: set[str] = set()

    def lines(self) -> Iterator[str]:
        yield "# Recipe reference"
        yield f"\nMade from the schema of version {__version__}. [The recipe, key by key](recipe.md) has the"
        yield "same keys in an order to read, and the run directory. *–* stands for a key without a default."
        sections = {name: kind for name, field in Recipe.model_fields.items() if (kind := _section(field.annotation))}
        self.written = {kind.__name__ for kind in sections.values()} | {Behaviour.__name__, Score.__name__}
        yield "\n## The recipe\n"
        plain = {name: self.said.get(name, "") for name in Recipe.model_fields if name not in (*sections, "behaviour")}
        yield from self.table(Recipe.model_json_schema(), "", plain)
        for name, kind in sections.items():
            yield f"\n## `{name}`\n\n{_summary(kind.__doc__ or '')}\n"
            yield from self.table(kind.model_json_schema(), f"{name}.", self.texts(kind, f"{name}."))
        for name, behaviour in BEHAVIOURS.items():
            yield from self.behaviour(name, behaviour)
        yield "\n## Score\n"
        yield "What the behaviour `custom` takes as `score`, beside `preference`. The first key says which it is."
        for key, score in SCORES.items():
            if key != "function":  # of Python alone
                yield f"\n### score: {key}\n\n{_summary(score.__doc__ or '')}\n"
                yield from self.table(score.model_json_schema(), "", self.texts(score))
        yield "\n## Parts\n"
        yield "Tables above name these."
        while waiting := [name for name in self.definitions if name not in self.written]:
            self.written.add(waiting[0])
            schema = self.definitions[waiting[0]]
            if "properties" not in schema:
                continue
            text = schema.get("description", "")
            yield f"\n### {waiting[0]}\n\n{_summary(text)}\n"
            said = _of_docstring(text)
            yield from self.table(schema, "", {name: said.get(name, "") for name in schema["properties"]})

    def behaviour(self, name: str, kind: type[Behaviour]) -> Iterator[str]:
        yield f"\n## `behaviour`: {name}\n"
        yield from self.table(kind.model_json_schema(), "behaviour.", self.texts(kind, f"{name}.", "behaviour."))
        made = kind.model_validate({"name": name, **_NEEDED.get(name, {})})
        yield "\n| measure | column | better | default limit |\n| --- | --- | --- | --- |"
        for measure in made.measures:
            limit = made.limits.get(measure.name, measure.limit)
            shown = "–" if limit is None else f"{limit:g}"
            yield f"| `{measure.name}` | {measure.title} | {measure.better} | {shown} |"
        for section, values in {"search": made.search, "evaluation": made.evaluation}.items():
            if values:
                defaults = ", ".join(f"`{key}: {_default(value)}`" for key, value in values.items())
                yield f"\nIts defaults for `{section}`: {defaults}."

    def texts(self, kind: type[BaseModel], *before: str) -> dict[str, str]:
        """What each key says: by `recipe.md` under one of these beginnings, or else by the docstring."""
        texts = {}
        for name in kind.model_fields:
            of_page = [self.said[start + name] for start in before if start + name in self.said]
            texts[name] = (of_page or [_attributes(kind).get(name, "")])[0]
        return texts

    def table(self, schema: Mapping[str, Any], before: str, texts: Mapping[str, str]) -> Iterator[str]:
        """A row for each key that has a text.

        Args: before: what stands before each key, like `search.`.
        """
        self.definitions |= schema.get("$defs", {})
        yield HEAD
        for name, text in texts.items():
            of_key = schema["properties"][name]
            default = _default(of_key["default"]) if "default" in of_key else "–"
            cells = (f"`{before}{name}`", _takes(of_key, self.definitions), default, text)
            yield f"| {' | '.join(map(_cell, cells))} |"


def _section(annotation: Any) -> type[Section] | None:
    known = isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation if known and not issubclass(annotation, Behaviour) else None


def _takes(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What a JSON schema accepts, in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        target = definitions.get(name, {})
        return f"[{name}](#{name.lower()})" if "properties" in target else _takes(target, definitions)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_takes(one, definitions) for one in schema["anyOf"]))
    if "allOf" in schema:
        return " and ".join(_takes(one, definitions) for one in schema["allOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array":
        if "prefixItems" in schema:
            return "[" + ", ".join(_takes(one, definitions) for one in schema["prefixItems"]) + "]"
        items = _takes(schema.get("items", {}), definitions)
        return f"list of ({items})" if " or " in items else f"list of {items}"
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"name → {_takes(values if isinstance(values, Mapping) else {}, definitions)}"
    if kind in ("number", "integer"):
        return ("number" if kind == "number" else "whole number") + _bounds(schema)
    return {"string": "text", "boolean": "true or false", "null": "null"}.get(str(kind), "anything")


def _bounds(schema: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return "".join(f" {sign} {schema[key]:g}" for key, sign in signs.items() if key in schema)


def _default(value: Any) -> str:
    """A default as a recipe would have it."""
    text = yaml.safe_dump(
        to_jsonable_python(value), default_flow_style=True, allow_unicode=True, width=1000, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def _summary(text: str) -> str:
    """A docstring without its sections and examples."""
    lines = []
    for line in inspect.cleandoc(text).splitlines():
        if re.match(r"(Attributes|Args|Raises|Returns):$", line) or line.startswith(">>> "):
            break
        lines.append(line)
    return "\n".join(lines).strip()


def _attributes(kind: type[BaseModel]) -> dict[str, str]:
    """Key → what the docstrings of a section, and of those that it extends, say of it."""
    said: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if issubclass(one, Section | Score):
            said |= _of_docstring(one.__doc__ or "")
    return said


def _of_docstring(text: str) -> dict[str, str]:
    said = {}
    options = {"warnings": False}
    for section in griffe.Docstring(inspect.cleandoc(text), parser="google", parser_options=options).parsed:
        if section.kind is griffe.DocstringSectionKind.attributes:
            for attribute in section.value:
                said |= {name.strip(): attribute.description for name in attribute.name.split(",")}
    return said
