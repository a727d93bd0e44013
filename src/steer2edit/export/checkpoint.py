"""An edited checkpoint, written from the base's files: the edited tensors are patched, every other byte is copied."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import torch
from torch import Tensor

from ..bake import check_weights, patched
from ..edit import Edit
from ..errors import EditError, FileError
from ..files import replacing_folder
from ..scoring import checkpoint_reader, shards
from ..sites import Site

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
    read = checkpoint_reader(base)

    def weight_of(site: Site) -> Tensor:
        weight = read(site.tensor)
        if weight.dtype not in _DTYPES.values():
            raise FileError(
                f"{site.tensor} is not plain floating point",
                got=weight.dtype,
                fix="Export from a checkpoint in F32, F16 or BF16, or serve the edit as an adapter.",
            )
        return weight

    check_weights(edit, weight_of)
    with replacing_folder(out, ours="config.json") as temporary:
        shutil.copytree(base, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git", ".cache"))
        for key, site in edited.items():
            chosen = torch.nonzero(site.row).flatten()

            def change(weight: Tensor, key: str = key, chosen: Tensor = chosen) -> None:
                weight[:, chosen] = patched(weight[:, chosen], edited[key], chosen, edit.strength)

            _rewrite(temporary / where[site.site.tensor], site.site.tensor, change)
    return out


def _rewrite(path: Path, name: str, change) -> None:
    """Changes one tensor of a `safetensors` file in place, at its own offset; not another byte moves."""
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(length))[name]
        dtype = _DTYPES[entry["dtype"]]
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        file.seek(start)
        weight = torch.frombuffer(bytearray(file.read(end - start)), dtype=dtype).view(entry["shape"])
        change(weight)
        file.seek(start)
        file.write(weight.view(torch.uint8).numpy().tobytes())
