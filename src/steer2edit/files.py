"""Files: written whole or not at all, read with suspicion.

Every file of the project is JSON, JSON Lines, YAML, an image or `safetensors`. A write goes to a temporary name in the
same folder, is synced, and is renamed over the old one, so a reader never meets half a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FileError

if TYPE_CHECKING:
    from torch import Tensor

_TEMPORARY = re.compile(r"\..+\.\w{8}\.tmp(\.\w+)?")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path; on a clean exit what was written there is synced and renamed to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".tmp{path.suffix}", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | Path, ours: str) -> Iterator[Path]:
    """As `replacing`, for a folder: its files are synced, then the whole folder takes the place of the old one.

    Args:
        ours: a file by which an old folder is known to be one that we wrote.

    Raises:
        FileError: there is a folder that holds other things.
    """
    path = Path(path)
    if path.exists() and not (path / ours).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise FileError(f"{path} holds other things", got=f"no {ours} in it", fix="Give a new or an empty folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    old = temporary.with_name(temporary.name.removesuffix(".tmp") + ".tmp.old")
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())
                sync(file)
        if path.exists():
            path.replace(old)
        temporary.replace(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def append_jsonl(path: str | Path, row: Mapping[str, Any]) -> None:
    """Adds one line and syncs it. A kill in the middle leaves a cut last line, which `read_journal` passes over."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError("no such file", got=path, fix="Check the path.") from None
    except (UnicodeDecodeError, OSError) as error:
        raise FileError(f"{path} cannot be read as text", got=error, fix="Give a UTF-8 text file.") from None


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (RecursionError, ValueError) as error:
        raise FileError(f"{path} is not whole JSON", got=error, fix="Write the file anew.") from None


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, as `numbered_jsonl` reads them, without their numbers."""
    return [row for _, row in numbered_jsonl(path)]


def numbered_jsonl(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """Line number and object of each line of a JSON Lines file, blank lines passed over.

    Raises:
        FileError: with the line's number, where a line is not a JSON object.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise FileError(
                f"line {number} of {path} is not JSON", got=error, fix="Write one JSON object a line; is the file cut?"
            ) from None
        if not isinstance(row, dict):
            raise FileError(
                f"line {number} of {path} is not an object", got=type(row).__name__, fix="Write one JSON object a line."
            )
        rows.append((number, row))
    return rows


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a last line that a kill cut short is dropped, and cut off the file."""
    path = Path(path)
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
    except ValueError as error:
        raise FileError(f"{path} is damaged", got=error, fix="Delete it; its batches are then made again.") from None


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """A `safetensors` file whose metadata holds `header` as JSON under the key `steer2edit`."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(
            {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()},
            str(temporary),
            metadata={"steer2edit": json.dumps(header, ensure_ascii=False, allow_nan=False)},
        )


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote.

    Args:
        kind: what the header's `kind` must say, "probe", "scores" or "edit".

    Raises:
        FileError: if the file is missing, cut short, of another kind, or holds a number that is not finite.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    path = Path(path)
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
        found = header.get("kind") if isinstance(header, dict) else type(header).__name__
        raise FileError(f"{path} does not hold a {kind}", got=found, fix=f"Give a file that holds a {kind}.")
    for name, tensor in tensors.items():
        if tensor.dtype is not torch.float32 or not torch.isfinite(tensor).all():
            raise FileError(f"tensor {name} of {path} is not finite fp32", got=tensor.dtype, fix="Make the file anew.")
    return tensors, header


def read_header(path: str | Path) -> dict[str, Any]:
    """The header that `write_tensors` wrote, without the tensors."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileError("no such file", got=path, fix="Check the path.")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})["steer2edit"])
    except (RecursionError, SafetensorError, ValueError, KeyError, OSError) as error:
        raise FileError(
            f"{path} was not written by steer2edit", got=repr(error), fix="Give a probe, scores or an edit."
        ) from None
    return header if isinstance(header, dict) else {}


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clear_temporaries(folder: str | Path) -> None:
    """Removes what `replacing` and `replacing_folder` left in a folder when their process was killed."""
    for path in list(Path(folder).glob(".*.tmp*")):
        if _TEMPORARY.fullmatch(path.name):
            remove(path)


def remove(path: str | Path) -> None:
    """Removes a file or a folder, if there is one."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
