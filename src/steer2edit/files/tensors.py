"""`safetensors` files with steer2edit's own header."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FileError
from .gallery import edit_file
from .seals import sealed_header, unsealed_header
from .writing import replacing

if TYPE_CHECKING:
    from torch import Tensor


# Tensors whose names end like this are int8, all others fp32: means of single responses, which are many.
BYTES = ".evidence"


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes a `safetensors` file whose metadata holds `header` as JSON under the key `steer2edit`, sealed."""
    text = json.dumps(header, ensure_ascii=False, allow_nan=False)
    stored = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_tensors(stored, temporary, {"steer2edit": sealed_header(text, stored)})


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a `safetensors` file. Raises OSError, as Python's own files do, where the disk does not take it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), str(path), metadata=dict(metadata))
    except SafetensorError as error:
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and the header that `write_tensors` wrote; the path may be `gallery:NAME`.

    Args:
        kind: the `kind` that the header must have, such as "probe", "scores" or "edit".

    Raises:
        FileError: the file is missing, cut short, of another kind, holds a number that is not finite, or a bit of it
            has changed.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    path = edit_file(path)
    if not path.is_file():
        raise FileError(f"no {kind} file", got=path, fix="Check the path.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        header = json.loads(metadata["steer2edit"])
    except KeyError:
        raise FileError(
            f"{path} was not written by steer2edit", got="a safetensors file without its header", fix=f"Give a {kind}."
        ) from None
    except (RecursionError, SafetensorError, ValueError, OSError) as error:
        raise FileError(
            f"{path} is not a whole safetensors file", got=error, fix="It may be cut short: write or copy it again."
        ) from None
    if not isinstance(header, dict) or header.get("kind") != kind:
        actual = header.get("kind") if isinstance(header, dict) else type(header).__name__
        raise FileError(f"{path} does not hold a {kind}", got=actual, fix=f"Give a file that holds a {kind}.")
    for name, tensor in tensors.items():
        dtype = torch.int8 if name.endswith(BYTES) else torch.float32
        if tensor.dtype is not dtype or not torch.isfinite(tensor).all():
            kind = f"{dtype}".removeprefix("torch.")
            raise FileError(f"tensor {name} of {path} is not finite {kind}", got=tensor.dtype, fix="Write it again.")
    try:
        unsealed_header(metadata["steer2edit"], tensors)
    except ValueError as error:
        raise FileError(f"{path} is damaged", got=error, fix="Write or copy it again.") from None
    header.pop("sha256", None)
    return tensors, header


def read_header(path: str | Path) -> dict[str, Any]:
    """Reads the header that `write_tensors` wrote, without the tensors."""
    from safetensors import SafetensorError, safe_open

    path = edit_file(path)
    if not path.is_file():
        raise FileError("no such file", got=path, fix="Check the path.")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})["steer2edit"])
    except (RecursionError, SafetensorError, ValueError, KeyError, OSError) as error:
        raise FileError(
            f"{path} was not written by steer2edit", got=repr(error), fix="Give a probe, scores or an edit."
        ) from None
    return header if isinstance(header, dict) else {}
