"""A checkpoint's `safetensors` files: which holds which tensor, and where its bytes are."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FileError
from .reading import read_json

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a `safetensors` file.

    Attributes:
        dtype: None if it is not F32, F16 or BF16; `dtype_name` is the file's own name for it.
        start, end: its bytes in the file.
    """

    name: str
    dtype: torch.dtype | None
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    end: int


def open_shards(folder: Path) -> dict[str, dict[str, Stored]]:
    """File → its tensors, for each of a checkpoint's files.

    Raises:
        FileError: a file is damaged, two files hold the same tensor, or the index names a tensor that its file lacks.
    """
    names = shards(folder)
    tensors = {file: open_shard(folder / file) for file in sorted(set(names.values()))}
    twice = [name for name, count in Counter(name for held in tensors.values() for name in held).items() if count > 1]
    if twice:
        raise FileError(
            f"two files of {folder} hold the tensor {twice[0]}",
            got="which one counts depends on the reader",
            fix="Download it again.",
        )
    for name, file in names.items():
        if name not in tensors[file]:
            raise FileError(
                f"{folder / file} has no tensor {name}", got="an index that lists it", fix="Download it again."
            )
    return tensors


def open_shard(path: Path) -> dict[str, Stored]:
    """The tensors of one `safetensors` file, by name. Raises FileError if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt"):  # it checks the header against the file
            pass
        with open(path, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{path} is not a whole safetensors file", got=error, fix="Copy it again.") from None
    return {
        name: Stored(
            name,
            _DTYPES.get(entry["dtype"]),
            entry["dtype"],
            tuple(entry["shape"]),
            *(8 + length + offset for offset in entry["data_offsets"]),
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def shards(folder: Path) -> dict[str, str]:
    """Tensor name → file name of a `safetensors` checkpoint, sharded or in one file.

    Raises:
        FileError: there is no such checkpoint, or its index names a file outside the folder.
    """
    from safetensors import SafetensorError, safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = dict(read_json(index)["weight_map"])
            files = set(names.values())
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{index} is not a shard index", got=repr(error), fix="Download it again.") from None
        for file in files:
            if not isinstance(file, str) or Path(file).name != file or len(file) > 255 or not (folder / file).is_file():
                raise FileError(
                    f"{index} names a shard that is not a file of that folder", got=file, fix="Download it again."
                )
        return names
    if not single.is_file():
        raise FileError(
            f"{folder} holds no safetensors checkpoint",
            got="neither model.safetensors nor model.safetensors.index.json",
            fix="Give a folder that save_pretrained wrote, or the model itself.",
        )
    try:
        with safe_open(str(single), framework="pt") as file:
            return dict.fromkeys(file.keys(), single.name)
    except (SafetensorError, OSError) as error:
        raise FileError(f"{single} is not a whole safetensors file", got=error, fix="Copy it again.") from None


def checkpoint_reader(folder: Path) -> Callable[..., Tensor]:
    """A function `read(name, expert=None)` that reads one tensor of a checkpoint.

    With an expert's number it reads only that expert's part [1, ·, ·] of a 3-D tensor [experts, ·, ·].
    """
    from safetensors import SafetensorError, safe_open

    where = shards(folder)

    def read(name: str, expert: int | None = None) -> Tensor:
        if name not in where:
            raise FileError(
                f"the checkpoint {folder} has no tensor {name}",
                got=f"{len(where)} others",
                fix="Is it the right model?",
            )
        try:
            with safe_open(str(folder / where[name]), framework="pt") as file:
                part = file.get_slice(name)
                if expert is None or len(part.get_shape()) != 3:
                    return file.get_tensor(name)
                return part[expert : expert + 1]
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise FileError(f"{folder / where[name]} cannot be read", got=error, fix="Copy it again.") from None

    return read
