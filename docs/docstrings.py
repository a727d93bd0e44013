"""Docstrings as the API page reads them: lines that begin with >>> become a section of examples."""

from __future__ import annotations

from typing import Any

import griffe


class DoctestsAsExamples(griffe.Extension):
    """The code has its examples without a heading; the Google style knows examples under one alone."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_examples(obj.docstring.value)


def with_examples(docstring: str) -> str:
    """Puts `Examples:` before each run of examples, and indents it.

    >>> print(with_examples("Adds.\\n\\n>>> 1 + 1\\n2"))
    Adds.
    <BLANKLINE>
    Examples:
        >>> 1 + 1
        2
    """
    lines: list[str] = []
    inside = False
    for line in docstring.splitlines():
        if line.startswith(">>> ") and not inside:
            lines.append("Examples:")
            inside = True
        elif not line.strip():
            inside = False
        lines.append(f"    {line}" if inside else line)
    return "\n".join(lines)
