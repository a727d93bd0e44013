"""Vectors and means of other tools: for `score(model, probe, vectors=…)`, or as a whole probe.

Files are checked: only tensors may be pickled, numbers must be finite, and shapes must be the model's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import FileError, ModelError
from ..method.site import Site
from ..models.sites import find_sites
from ..progress import say
from .probe import Probe
from .traces import LABELS

_LACKS = (
    "  these are vectors alone: collect the means of the components' inputs with steer2edit.collect(model, tokenizer, "
    "traces), and pass both to score(model, probe, vectors=…)"
)


def import_vectors(source: str | Path | Any) -> dict[int | str, Tensor]:
    """Reads steering vectors by layer or by block, for the `vectors` of `score`.

    Args:
        source: a repeng control vector (.gguf), `safetensors`, .npz or .pt file whose names hold a layer's number
            ("3", "layer_3", "direction.3") or a block's key ("3.attn"), a `steering_vectors.SteeringVector`, or a
            mapping of such names.

    Raises:
        FileError: the file cannot be read, or holds no vectors.
    """
    is_file = isinstance(source, str | Path)
    named: Any = _read(Path(source)) if is_file else getattr(source, "layer_activations", source)
    if not isinstance(named, Mapping):
        raise FileError("no vectors can be read from this", got=type(source).__name__, fix="Give a file or a mapping.")
    vectors: dict[int | str, Tensor] = {}
    for name, value in named.items():
        key = _key(name)
        vector = torch.as_tensor(value)
        if key is None or vector.numel() != max((0, *vector.shape)) or not vector.is_floating_point():
            raise FileError(
                f"{name!r} is not a vector of a layer or a block",
                got=f"shape {tuple(vector.shape)}, {vector.dtype}",
                fix="Name each by its layer (3, layer_3, direction.3) or block (3.attn, 3.mlp).",
            )
        vector = vector.detach().float().flatten().cpu()
        if not torch.isfinite(vector).all():
            raise FileError(f"the vector {name!r} is not finite", got="NaN or infinity", fix="Create it again.")
        vectors[key] = vector
    if not vectors:
        raise FileError("there are no vectors in it", got="nothing", fix="Give a file that holds some.")
    say(_LACKS)
    return vectors


def _key(name: Any) -> int | str | None:
    if isinstance(name, int) and not isinstance(name, bool):
        return name
    text = str(name)
    if re.fullmatch(r"\d+\.(attn|mlp)", text):
        return text
    match = re.fullmatch(r"(?:(?:layers?|direction|model\.layers)[._])?(\d+)", text)
    return int(match[1]) if match else None


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileError("no such file", got=path, fix="Check the path.")
    readers = {
        ".gguf": _read_gguf,
        ".safetensors": _read_safetensors,
        ".npz": _read_npz,
        ".pt": _read_pt,
        ".pth": _read_pt,
    }
    reader = readers.get(path.suffix)
    if reader is None:
        raise FileError(f"{path} is of an unknown kind", got=path.suffix, fix=f"Known: {', '.join(readers)}.")
    try:
        return reader(path)
    except FileError:
        raise
    except Exception as error:  # whatever a reader of a stranger's file stumbles over
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileError(f"{path} cannot be read", got=first, fix="Is it whole, and of that kind?") from None


def _read_gguf(path: Path) -> Mapping[str, Any]:
    try:
        import gguf
    except ImportError:
        raise FileError("GGUF files need the gguf package", got="no such module", fix="pip install gguf") from None
    reader = gguf.GGUFReader(str(path))
    field = reader.get_field("general.architecture")
    kind = "" if field is None else bytes(field.parts[-1]).decode("utf-8", "replace")
    if kind != "controlvector":
        raise FileError(
            f"{path} is not a control vector", got=f"architecture {kind!r}", fix="Give a repeng control vector."
        )
    return {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors.torch import load_file

    return load_file(str(path))


def _read_npz(path: Path) -> Mapping[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _read_pt(path: Path) -> Mapping[str, Any]:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping):
        raise FileError(f"{path} holds no mapping of vectors", got=type(loaded).__name__, fix="Save a dict of tensors.")
    return loaded


def import_directions(path: str | Path, model: nn.Module) -> Probe:
    """Reads a whole probe from the `directions/*.pt` of the published Steer2Edit code.

    The file holds, under `pre` (inputs) and `post` (outputs), `pos_mean` and `neg_mean`, each a mapping of names like
    `model.layers[3].self_attn.o_proj` to means.

    Args:
        model: the model that the means were made on; it may be on the `meta` device.

    Raises:
        FileError: the file is not of that kind. ModelError: a mean is missing, or of another model's size.
    """
    loaded = _read(Path(path))
    sites = find_sites(model)
    if any(site.expert is not None for site in sites):
        raise ModelError("directions of a mixture of experts cannot be read", got="experts", fix="Collect a probe.")
    pre = {label: _table(path, loaded, "pre", f"{label[:3]}_mean") for label in LABELS}
    post = {label: _table(path, loaded, "post", f"{label[:3]}_mean") for label in LABELS}
    inputs = {s.key: {label: _mean(path, pre[label], s, s.inputs) for label in LABELS} for s in sites}
    outputs = {s.key: {label: _mean(path, post[label], s, s.d) for label in LABELS} for s in sites}
    config: Any = model.config
    provenance = {"imported": Path(path).name, "model": config._name_or_path, "model_type": config.model_type}
    return Probe(sites, inputs, outputs, {}, provenance)


def _table(path: str | Path, loaded: Mapping[str, Any], part: str, name: str) -> Mapping[str, Any]:
    try:
        table = loaded[part][name]
    except (KeyError, TypeError):
        table = None
    if not isinstance(table, Mapping):
        raise FileError(
            f"{path} is not a directions file of the published code",
            got=f"no {part}/{name} in it",
            fix="Give one, or plain vectors to import_vectors.",
        )
    return table


def _mean(path: str | Path, table: Mapping[str, Any], site: Site, size: int) -> Tensor:
    name = re.sub(r"\.(\d+)\.", r"[\1].", site.module, count=1)
    value = table.get(name, table.get(site.module))
    if not isinstance(value, Tensor) or value.numel() != size or not torch.isfinite(value.float()).all():
        raise ModelError(
            f"{path} has no mean of {size} finite numbers for {name}",
            got="nothing" if value is None else f"shape {tuple(getattr(value, 'shape', ()))}",
            fix="Give the model that it was made on.",
        )
    return value.detach().float().flatten().clone()
