"""A base as files: a folder of `safetensors`, or a GGUF file; which tensors it holds, and where a site's weight is."""

from __future__ import annotations

import contextlib
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from ..errors import FileError, ModelError
from ..files.reading import read_json
from ..files.shards import Stored, open_shards
from ..method.site import Site
from ..models.gguf_config import without_vocabulary
from .formats.base import Held, Packed, Part
from .formats.ggml import KINDS, Ggml
from .formats.known import find_packed
from .gguf import package


@dataclass(frozen=True)
class Base:
    """A base's tensors.

    Attributes:
        folder: holds its files. shards: file → its tensors. settings: the config's `quantization_config`, or nothing.
        architecture: llama.cpp's name of the architecture if it is a GGUF file, else empty.
    """

    folder: Path
    shards: Mapping[str, Mapping[str, Stored]]
    settings: Mapping[str, Any]
    architecture: str = ""

    @cached_property
    def held(self) -> Held:
        """Tensor name → its file, and its place there."""
        return {name: (file, stored) for file, tensors in self.shards.items() for name, stored in tensors.items()}

    def names(self, site: Site) -> Sequence[str]:
        """The names that the site's weight may have."""
        if not self.architecture:
            return site.tensor, *site.aliases
        return (_gguf_name(self.architecture, site),)

    def name(self, site: Site) -> str:
        """The name of the tensor that holds the site's weight as plain numbers. Raises FileError if there is none."""
        for name in self.names(site):
            if name in self.held:
                return name
        raise FileError(
            f"the checkpoint has no tensor {self.names(site)[0]}",
            got=f"{len(self.held)} others",
            fix="Is it the right model?",
        )

    def packed(self, site: Site) -> Packed | None:
        """The site's weight of few bits; None if it is stored as plain numbers, in no known format, or not at all."""
        if self.architecture:
            return self._gguf_packed(site)
        return find_packed(site, self.held, self.settings, self.names(site))

    def _gguf_packed(self, site: Site) -> Packed | None:
        name = _gguf_name(self.architecture, site)
        file, stored = self.held.get(name, ("", None))
        if stored is None or stored.dtype_name not in KINDS or len(stored.shape) < 2:
            return None
        kind = KINDS[stored.dtype_name]
        *experts, rows, columns = stored.shape
        row_bytes = columns // kind.numbers * kind.size
        start, label = stored.start, name
        if experts and site.expert is not None and experts == [site.experts]:
            start, label = start + site.expert * rows * row_bytes, f"{name}[{site.expert}]"
        elif experts:
            raise FileError(f"{name} has more dimensions than a map", got=stored.shape, fix="Is it the right model?")
        part = Part("codes", name, label, file, start, start + rows * row_bytes, (rows, row_bytes), torch.uint8)
        return Packed(Ggml(stored.dtype_name), (part,))


def open_base(path: Path) -> Base:
    """The tensors of a checkpoint's folder or of a GGUF file.

    Raises:
        FileError: it is neither, or damaged. ModelError: the gguf package is missing.
    """
    if path.suffix == ".gguf":
        tensors, architecture = _open_gguf(path)
        return Base(path.parent, {path.name: tensors}, {}, architecture)
    return Base(path, open_shards(path), _settings(path / "config.json"))


def _settings(config: Path) -> Mapping[str, Any]:
    """The config's `quantization_config`; nothing if there is none, or no config that can be read."""
    if not config.is_file():
        return {}
    try:
        whole = read_json(config)
    except FileError:  # a damaged one is for the loader and for `verify` to report
        return {}
    whole = whole if isinstance(whole, dict) else {}
    text = whole.get("text_config")
    for holder in (whole, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(holder.get(key), dict):
                return holder[key]
    return {}


def how_stored(model: str, sites: Sequence[Site]) -> list[dict[str, Any]]:
    """How the weights of sites lie in a local model's files: a row for each format; nothing if it has no files here.

    Args:
        model: a folder, a GGUF file, or a name on the Hub, of which nothing is said.
    """
    path = Path(model)
    in_shards = (path / "model.safetensors").is_file() or (path / "model.safetensors.index.json").is_file()
    if not in_shards and not (path.suffix == ".gguf" and path.is_file()):
        return []
    try:
        base = open_base(path)
    except (FileError, ModelError) as error:
        return [{"format": f"cannot be read: {error.what}", "weights": len(sites), "an export": "is refused"}]
    counts = Counter(_stored_as(base, site) for site in sites)
    return [{"format": title, "weights": count, "an export": does} for (title, does), count in counts.items()]


def _stored_as(base: Base, site: Site) -> tuple[str, str]:
    """The format of a site's weight, and what an export does with it."""
    try:
        packed = base.packed(site)
    except (FileError, ModelError) as error:
        return f"{error.what}: {error.got}", "is refused: serve the edit as an adapter"
    if packed is not None:
        return packed.format.title, "rounds the edit to this format, and says what is left of it"
    name = next((name for name in base.names(site) if name in base.held), None)
    if name is None:
        return "missing", "is refused: the files have no such tensor"
    stored = base.held[name][1]
    if stored.dtype is None:
        return stored.dtype_name, "is refused: this format is not known. Serve the edit as an adapter"
    return stored.dtype_name, "adds the edit"


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, OverflowError, struct.error) as error:
        raise FileError(
            f"{path} is not a whole GGUF file", got=str(error) or type(error).__name__, fix="Copy it again."
        ) from None


def _open_gguf(path: Path) -> tuple[dict[str, Stored], str]:
    """The tensors of a GGUF file by name, shapes with the rows first, and its architecture."""
    gguf = package()
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if not path.is_file():
        raise FileError("no such GGUF file", got=path, fix="Check the path.")
    with _reading(path), without_vocabulary():
        reader = gguf.GGUFReader(str(path))
        if reader.byte_order != "I":
            raise FileError(f"{path} is a GGUF file of another byte order", got="big-endian", fix="Convert it again.")
        architecture = str(reader.fields["general.architecture"].contents())
        tensors = {}
        for tensor in reader.tensors:
            kind = tensor.tensor_type.name
            shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
            start = int(tensor.data_offset)
            end = start + int(tensor.n_bytes)
            if end > path.stat().st_size:
                raise ValueError(f"tensor {tensor.name} ends after the file")
            tensors[tensor.name] = Stored(tensor.name, dtypes.get(kind), kind, shape, start, end)
    return tensors, architecture


@lru_cache(maxsize=8)
def _names_of(architecture: str, layers: int) -> Any:
    gguf = package()
    for known, name in gguf.MODEL_ARCH_NAMES.items():
        if name == architecture:
            return gguf.get_tensor_name_map(known, layers)
    raise ModelError(
        "the gguf package does not know this architecture", got=architecture, fix="Update it: pip install -U gguf."
    )


def _gguf_name(architecture: str, site: Site) -> str:
    """llama.cpp's name of the site's weight."""
    module = site.module.replace("model.language_model.", "model.")
    path = module if site.expert is None else f"{module}.{site.parameter}"
    names = _names_of(architecture, 128 * (1 + site.layer // 128))
    stored: str | None = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
    if stored is None:
        raise ModelError(f"llama.cpp has no name for {path}", got=f"architecture {architecture}", fix="Use a folder.")
    return stored
