"""Edit files → what is served: scaled, taken in some layers, combined, and written as a checkpoint, a GGUF model, an
adapter, a GGUF adapter, or an edit file again. It is what `steer2edit apply` does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from ..edits import Combination, Edit, combine, load_any
from ..errors import EditError, FileError
from ..method.site import BLOCKS, layers_of, numbered_layers
from ..progress import megabytes, say, showing

KINDS = ("checkpoint", "gguf-model", "adapter", "gguf", "edit")


def gather(
    files: Sequence[str | Path],
    strengths: Sequence[float] = (),
    layers: range | str | None = None,
    blocks: Collection[str] = BLOCKS,
) -> Edit | Combination:
    """The edits of some files as one.

    Args:
        files: each holds an edit, or several combined.
        strengths: scale what the files hold: one for all of them, or one for each, in order; none is 1.
        layers, blocks: the edits of these alone. Layers may be a text: 8-20, 8, or shares of the depth like 33%-67%.

    Raises:
        FileError: a file is missing or holds no edit.
        EditError: the strengths are not as many, or one is 0 or not finite; a file changes nothing in those layers and
            blocks, or is of a model with fewer layers; or the edits cannot be combined.
    """
    if len(strengths) not in (0, 1, len(files)):
        raise EditError(
            "there are not as many strengths as edits",
            got=f"{len(strengths)} strengths, {len(files)} edits",
            fix="Give one --strength for all edits, or one for each, in order.",
        )
    if any(strength == 0 for strength in strengths):
        raise EditError("a strength of 0 changes nothing", got=list(strengths), fix="Leave that edit out.")
    scales = list(strengths) or [1.0]
    if len(scales) == 1:
        scales = scales * len(files)
    edits: list[Edit] = []
    for file, scale in zip(files, scales, strict=True):
        parts = load_any(file).parts
        depth = max(part.layers for part in parts)
        wanted = _numbered(layers, depth, file)
        if wanted is not None and depth and wanted[-1] >= depth:
            raise EditError(
                f"{file} is of a model with fewer layers",
                got=f"layers {wanted[0]}-{wanted[-1]}",
                fix=f"It has layers 0-{depth - 1}.",
            )
        taken = [part.only(wanted, blocks).with_strength(scale * part.strength) for part in parts]
        taken = [part for part in taken if part.edited()]
        if not taken:
            elsewhere = sum(len(part.edited()) for part in parts)
            raise EditError(
                f"{file} changes nothing in the layers and blocks that are asked for",
                got=f"{elsewhere} edited sites, all of them elsewhere" if elsewhere else "λ = 0 everywhere",
                fix="`steer2edit inspect` shows where it does." if elsewhere else "Lower ρ or α.",
            )
        edits += taken
    return edits[0] if len(edits) == 1 else combine(*edits)


def _numbered(layers: range | str | None, depth: int, file: str | Path) -> range | None:
    """The layers by their numbers, in a model of this depth; a depth of 0 is not known."""
    if not isinstance(layers, str):
        return layers
    if "%" in layers and not depth:
        raise EditError(
            f"{file} does not say how many layers its model has", got=layers, fix="Write the layers' numbers: 8-20."
        )
    return layers_of(numbered_layers(layers, depth))


def write(edit: Edit | Combination, kind: str, out: Path, base: str, accept_rounding: bool = False) -> None:
    """Writes one artefact, whole or not at all.

    Args:
        kind: one of KINDS.
        base: the base checkpoint's folder, its Hub id, or `embedded:…`. A folder is compared with the edit whatever is
            written; an adapter holds the name. A GGUF file is a base too.
        accept_rounding: write a base of few bits also if rounding loses the edit.

    Raises:
        FileError: `out` is there already, or the base is no `safetensors` checkpoint and a checkpoint is asked for, or
            no GGUF file and a GGUF model is.
        ModelError: it is another base, or its family has no such artefact. EditError: the edit is in it already, the
            format cannot hold the edit, or rounding loses it.
    """
    from ..artefacts.checkpoint import compare, export_checkpoint
    from ..models.embedded import HUB_NAMES
    from ..models.load import load_config, local_folder

    if out.exists():
        raise FileError("the output exists already", got=out, fix="Give another --to, or remove it.")
    is_gguf = base.endswith(".gguf")
    if is_gguf != (kind == "gguf-model") and kind in ("checkpoint", "gguf-model"):
        raise FileError(
            "a GGUF file becomes an edited GGUF file, and a checkpoint an edited checkpoint",
            got=f"{base} --as {kind}",
            fix=f"Use --as {'gguf-model' if is_gguf else 'checkpoint'}.",
        )
    if kind in ("checkpoint", "gguf-model"):
        with showing(f"{kind}, MB") as progress:
            export_checkpoint(
                Path(base) if is_gguf else local_folder(base),
                edit,
                out,
                accept_rounding=accept_rounding,
                progress=megabytes(progress),
            )
        return
    folder = Path(base) if Path(base).is_dir() or (is_gguf and Path(base).is_file()) else None
    if folder is not None:
        try:
            compare(edit, folder)
        except FileError as error:  # a base in an unknown format serves an adapter too
            say(f"  {base} was not compared with the base of the edit: {error}")
    if kind == "adapter":
        edit.save_adapter(out, HUB_NAMES.get(base, base))
    elif kind == "gguf":
        from ..artefacts.gguf import save_gguf_adapter

        known = folder is not None and (is_gguf or (folder / "config.json").is_file())
        save_gguf_adapter(edit, out, load_config(base).model_type if known else None)
    else:
        edit.save(out)
