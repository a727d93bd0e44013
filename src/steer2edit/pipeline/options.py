"""Options that several verbs of the command line have, and how they print."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only results and errors.")]
TrustCode = Annotated[
    bool,
    typer.Option("--trust-recipe-code", help="Run the code that the recipe names: of its score, and of its model."),
]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON on standard output.")]


def print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False))


def console() -> Any:
    """As wide as the terminal or COLUMNS say; where neither does, wide enough for a table."""
    from rich.console import Console

    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    return Console(width=None if known else 150)
