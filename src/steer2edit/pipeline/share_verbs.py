"""The verbs of the command line that hand an edit to others and make it again; heavy imports inside the functions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..progress import be_quiet
from ..report.visible import visible
from .options import Json, TrustCode, console, print_json


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command()(push)
    app.command()(reproduce)
    app.command()(gallery)


def push(
    source: Annotated[Path, typer.Argument(metavar="RUN|FOLDER", help="A finished run, or an exported folder.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="The Hub's repository, as owner/name.")],
    export: Annotated[str | None, typer.Option(help="Which of a run's exports: adapter, checkpoint, gguf.")] = None,
    dry_run: Annotated[
        Path | None, typer.Option("--dry-run", metavar="OUT", help="Only write the folder that would be pushed.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the result and errors.")] = False,
) -> None:
    """Push an adapter, edit or checkpoint with its card, its recipe and its manifest to the Hub."""
    from .share import push as upload
    from .share import write_share

    be_quiet(quiet)
    if dry_run is not None:
        print(write_share(source, dry_run, export))
    else:
        print(upload(source, repository, export, private))


def reproduce(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|REPO",
            help="A run, gallery:NAME, or what `push` wrote: a folder, or a repository on the Hub.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Where to make it again; a run that was stopped goes on there.")
    ] = Path("runs/reproduced"),
    trust_recipe_code: TrustCode = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json: Json = False,
) -> None:
    """Make an edit again from its recipe, and say tensor by tensor whether it is the same; exit code 1 if not."""
    from .share import reproduce as again

    be_quiet(quiet)
    result = again(source, out, trust_recipe_code)
    if json:
        print_json(result)
    else:
        for name, word in {**result["tensors"], **result.get("adapter", {})}.items():
            print(f"{visible(name)}: {word if isinstance(word, str) else f'differs by {word:.1e}'}")
        if result["same"]:
            print("the same")
        else:
            print("not the same, but close: at most 1e-4 off" if result["close"] else "NOT the same")
    sys.exit(0 if result["same"] else 1)


def gallery(json: Json = False) -> None:
    """List the edits that come with the package, and what they measured; `gallery:NAME` is the path of one."""
    from ..report.gallery import gallery_rows, gallery_table

    rows = gallery_rows()
    if json:
        print_json(rows)
        return
    console().print(gallery_table(rows))
    print("Try one with `steer2edit chat gallery:NAME`; `apply` writes it as a checkpoint or an adapter.")
