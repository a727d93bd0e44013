"""The verbs of the command line that work on edit files and checkpoints; heavy imports inside the functions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..progress import be_quiet, say
from .options import Json, Quiet, console, print_json


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command(name="apply")(apply_edits)
    app.command()(verify)
    app.command()(diff)


def apply_edits(
    base: Annotated[str, typer.Argument(help="The base: a checkpoint's folder, a Hub id, or a GGUF file.")],
    edits: Annotated[list[Path], typer.Argument(metavar="EDIT", help="Edit files; several are combined into one.")],
    to: Annotated[
        Path, typer.Option("--to", help="Where to: a new folder, or a new file for gguf-model, gguf and edit.")
    ],
    kind: Annotated[
        str,
        typer.Option(
            "--as", metavar="KIND", help="checkpoint, gguf-model, adapter (PEFT), gguf (llama.cpp's LoRA) or edit."
        ),
    ] = "checkpoint",
    strength: Annotated[
        list[float] | None, typer.Option(help="Scale the edit; again for each of several, in order, or one for all.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Only these layers: 8-20, the last one too, or shares of the depth, 33%-67%.")
    ] = None,
    blocks: Annotated[str | None, typer.Option(help="Only this block type: attn or mlp.")] = None,
    accept_rounding: Annotated[
        bool, typer.Option("--accept-rounding", help="Write a base of few bits even if rounding loses the edit.")
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write edit files as a checkpoint, an adapter, a GGUF adapter or one edit file; no recipe is needed."""
    from ..errors import EditError
    from ..method.site import BLOCKS, are_layers

    be_quiet(quiet)
    if layers is not None and not are_layers(layers):
        raise EditError(
            "--layers names no layers",
            got=layers,
            fix="Write them as first-last, like 8-20, as one number, or as shares of the depth, like 33%-67%.",
        )
    if blocks is not None and blocks not in BLOCKS:
        raise EditError("no such block type", got=blocks, fix=f"Use one of {', '.join(BLOCKS)}, or leave --blocks out.")
    from ..edits import meetings
    from .apply import KINDS, gather, write

    if kind not in KINDS:
        raise EditError("an edit cannot be written as that", got=f"--as {kind}", fix=f"Use one of {', '.join(KINDS)}.")
    edit = gather(edits, strength or (), layers, BLOCKS if blocks is None else (blocks,))
    met = meetings(edit)
    for pair in met:
        one, other = pair["edits"]
        share = f"{pair['opposed']} of them opposite ways ({pair['opposed_share']:.0%})"
        say(f"  {one} and {other} both change {pair['shared']} components, {share}")
    write(edit, kind, to, base, accept_rounding)
    changes = edit.changes()
    summary = {
        "kind": "apply",
        "as": kind,
        "path": str(to),
        "edit": edit.id,
        "parts": [{"id": part.id, "strength": part.strength, "config": dict(part.config)} for part in edit.parts],
        "sites": list(changes),
        "rank": max(len(change.a) for change in changes.values()),
        "interference": met,
    }
    strengths = ", ".join(f"{part.strength:g}" for part in edit.parts)
    say(f"  {kind}: {len(changes)} sites, rank {summary['rank']}, strength {strengths}, edit {edit.id}")
    if json:
        print_json(summary)
    else:
        print(to)


def verify(
    base: Annotated[str, typer.Argument(help="The base: a checkpoint's folder, a Hub id, embedded:…, or a GGUF file.")],
    edit: Annotated[Path, typer.Argument(help="The edit file.")],
    edited: Annotated[Path, typer.Argument(help="The edited checkpoint's folder, or the GGUF file.")],
    json: Json = False,
) -> None:
    """Check, bit by bit, that a checkpoint is the base with the edit in it and nothing else; exit code 1 if not."""
    from ..artefacts.audit import verify as check
    from ..edits import load_any
    from ..models.load import local_folder
    from ..report.visible import visible

    folder = Path(base) if base.endswith(".gguf") else local_folder(base)
    audit = check(folder, load_any(edit), edited)
    if json:
        print_json(audit)
    else:
        for word, count in audit["counts"].items():
            print(f"{count} tensors {word}")
        for name, word in (audit["tensors"] | audit["files"]).items():
            if word not in ("equal", "edited as expected"):
                print(f"{word}: {visible(name)}")
        print("as expected" if audit["as_expected"] else "NOT as expected")
    sys.exit(0 if audit["as_expected"] else 1)


def diff(
    base: Annotated[Path, typer.Argument(help="The base checkpoint's folder, or a GGUF file.")],
    edited: Annotated[Path, typer.Argument(help="The other checkpoint's folder, or GGUF file.")],
    top: Annotated[int, typer.Option(help="How many of a site's largest components to list.", min=0)] = 5,
    json: Json = False,
) -> None:
    """Say what differs between two checkpoints, and whether it is a rank-1 edit of heads and neurons."""
    from ..artefacts.audit import diff as compare

    differences = compare(base, edited, top)
    if json:
        print_json(differences)
        return

    from ..report.inspection import show

    for row in differences["sites"]:
        row["largest"] = ", ".join(f"{i}: {lam:+.2f}" for i, lam in row["largest"])
    show(console(), differences)
