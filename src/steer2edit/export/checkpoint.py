"""An edited checkpoint, written from the base's files: the edited tensors are patched, every other byte is copied."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..bake import check_weights, patched
from ..edit import Edit, SiteEdit
from ..errors import EditError, FileError
from ..files import replacing_folder
from ..scoring import shards, site_reader, stored_name, upright

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def export_checkpoint(base: str | Path, edit: Edit, out: str | Path) -> Path:
    """Writes `out`, a copy of the checkpoint folder `base` with the edit in it; no model is built.

    The result is bit for bit what `apply` and `save_pretrained` would give in the files' own dtype. The folder appears
    whole or not at all.

    Raises:
        FileError: `base` is not a `safetensors` checkpoint, `out` exists already, or a tensor's dtype is not F32, F16
            or BF16.
        ModelError: `base` is another model. EditError: the edit is in it already, or changes nothing.
    """
    base, out = Path(base), Path(out)
    if out.exists():
        raise FileError("the output folder exists already", got=out, fix="Give a new folder, or remove that one.")
    edited = edit.edited()
    if not edited:
        raise EditError("the edit changes nothing", got="λ = 0 everywhere", fix="Lower ρ or α.")
    if out.resolve().is_relative_to(base.resolve()):
        raise FileError("the output folder lies inside the base", got=out, fix="Give a folder elsewhere.")
    where = shards(base)
    check_weights(edit, site_reader(base))
    with replacing_folder(out, ours="config.json") as temporary:
        shutil.copytree(base, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git", ".cache"))
        for site in edited.values():
            chosen = torch.nonzero(site.row).flatten()

            def change(part: Tensor, fused: bool, site: SiteEdit = site, chosen: Tensor = chosen) -> None:
                weight = upright(site.site, part, fused)
                weight[:, chosen] = patched(weight[:, chosen], site, chosen, edit.strength)

            name = stored_name(site.site, where)
            _rewrite(temporary / where[name], name, site.site.expert, change)
    return out


def _rewrite(path: Path, name: str, expert: int | None, change: Callable[[Tensor, bool], None]) -> None:
    """Changes one tensor of a `safetensors` file, or one expert's part of it, in place at its own offset; not another
    byte moves."""
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(length))[name]
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        fused = len(shape) == 3
        if fused and expert is not None:
            size = (end - start) // shape[0]
            start, end, shape = start + expert * size, start + (expert + 1) * size, shape[1:]
        file.seek(start)
        part = torch.frombuffer(bytearray(file.read(end - start)), dtype=dtype).view(shape)
        change(part, fused)
        file.seek(start)
        file.write(part.view(torch.uint8).numpy().tobytes())
