"""Probe and weights → Scores: for each site the closed form of edit.py, one weight at a time.

The vectors are the probe's difference of means, or any that are given. The weights come from a model in memory or
straight from a checkpoint's `safetensors` files.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .edit import Scores, SiteScores, output_direction, read, scores_from, unit
from .errors import FileError, ModelError, ProbeError
from .files import read_json
from .fingerprint import from_reading, signs
from .parallel import in_parallel
from .probe import Probe
from .sites import Site, find_sites, same_sites
from .weights import is_plain, read_weight

Vectors = Tensor | Mapping[int, Tensor] | Mapping[str, Tensor]


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Fewer tokens than this say little of what drives an expert.
EXPERT_TOKENS = 16


def score(
    model: nn.Module | str | Path,
    probe: Probe,
    *,
    vectors: Vectors | None = None,
    expert_tokens: int = EXPERT_TOKENS,
) -> Scores:
    """Scores every site: v̂, k̂, g, with no (ρ, α) in it.

    Args:
        model: the model that the probe was made on, or its checkpoint's folder, of which only the sites' weights are
            then read.
        vectors: steering vectors in place of the probe's difference of means: one [d] for all sites, one a layer
            {3: v}, one a block {"3.attn": v, "3.mlp": v}, or one a site. A site without one is left alone, and
            `provenance` says so.
        expert_tokens: an expert that fewer tokens reached is left alone, and `provenance` says so.

    Raises:
        ModelError: the probe was made on another model, or a weight was never loaded.
        ProbeError: a vector has the wrong shape or is not finite.
    """
    given = None if vectors is None else _by_site(vectors, probe.sites)
    too_few = {s.key: n for s in probe.sites if (n := probe.tokens(s)) is not None and n < expert_tokens}
    wanted = tuple(s for s in probe.sites if s.key not in too_few and (given is None or s.key in given))

    def one(of: tuple[Site, Tensor]) -> tuple[SiteScores, Tensor]:
        site, weight = of
        v = probe.vector(site) if given is None else given[site.key]
        mu = probe.mean_input(site)
        left, _ = signs(*weight.shape)
        with torch.no_grad():
            reading = read(weight, torch.cat([output_direction(v)[None], left]), unit(mu, site.n))
            if not reading.power < math.inf:
                raise ModelError(
                    f"the weight of {site.place} is not finite", got="NaN or infinity", fix="Load it again."
                )
            return scores_from(site, v, mu, reading), from_reading(reading, *weight.shape)

    # One at a time where a weight has to be fetched, dequantised, or is not the CPU's own.
    at_hand = not isinstance(model, nn.Module) or all(
        p.device.type == "cpu" and is_plain(p) for p in model.parameters()
    )
    scores, fingerprint = {}, {}
    results = in_parallel(one, _weights(model, probe.sites, wanted), None if at_hand else 1)
    for site, (scored, sketch) in zip(wanted, results, strict=True):
        scores[site.key], fingerprint[site.key] = scored, sketch
    without = [s.key for s in probe.sites if s.key not in scores and s.key not in too_few]
    provenance = {
        "layers": 1 + max(site.layer for site in probe.sites),
        "probe": {"counts": dict(probe.counts), **probe.provenance},
        "vectors": "difference of means" if given is None else "given",
        "sites_without_vector": without,
        "experts_left_alone": too_few,
        "expert_tokens": expert_tokens,
        "sites_with_zero_vector": [key for key, s in scores.items() if s.v_norm == 0],
    }
    return Scores(scores, fingerprint, provenance)


def _by_site(vectors: Vectors, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    names: set[Any] = set()
    for site in sites:
        v: Tensor | None
        if isinstance(vectors, Tensor):
            v = vectors
        else:
            named: Mapping[Any, Tensor] = vectors
            names |= {site.key, site.block_key, site.layer}
            v = named.get(site.key, named.get(site.block_key, named.get(site.layer)))
        if v is None:
            continue
        if v.shape != (site.d,) or not torch.isfinite(v).all():
            raise ProbeError(
                f"the vector for site {site.key} cannot be used",
                got=f"shape {tuple(v.shape)}, finite: {bool(torch.isfinite(v).all())}",
                fix=f"Give a finite vector of {site.d} numbers.",
            )
        found[site.key] = v.detach().float().cpu()
    strangers = [] if isinstance(vectors, Tensor) else sorted(map(str, set(vectors) - names))
    if strangers or not found:
        raise ProbeError(
            "vectors are given for sites that the model does not have" if strangers else "no vector is given",
            got=strangers or "an empty mapping",
            fix="Name layers by number (3) or sites by key ('3.attn', '3.mlp').",
        )
    return found


def _weights(
    model: nn.Module | str | Path, sites: tuple[Site, ...], wanted: tuple[Site, ...]
) -> Iterator[tuple[Site, Tensor]]:
    if isinstance(model, nn.Module):
        own = same_sites(find_sites(model), sites, "the probe")
        for site in wanted:
            yield site, read_weight(model, own[site.key])
        return
    read = site_reader(Path(model))
    for site in wanted:
        yield site, read(site)


@dataclass(frozen=True)
class Stored:
    """A tensor in a `safetensors` file: where its bytes are.

    Attributes:
        dtype: None if it is not a plain floating-point one; `dtype_name` is the file's own word.
    """

    name: str
    dtype: torch.dtype | None
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    end: int


def open_shards(folder: Path) -> dict[str, dict[str, Stored]]:
    """File → its tensors, for each of a checkpoint's files. Raises FileError if one is not whole, or the index lies."""
    names = shards(folder)
    found = {file: open_shard(folder / file) for file in sorted(set(names.values()))}
    twice = [name for name, count in Counter(name for held in found.values() for name in held).items() if count > 1]
    if twice:
        raise FileError(
            f"two files of {folder} hold the tensor {twice[0]}",
            got="it depends on the reader which one counts",
            fix="Download it again.",
        )
    for name, file in names.items():
        if name not in found[file]:
            raise FileError(
                f"{folder / file} has no tensor {name}", got="an index that says so", fix="Download it again."
            )
    return found


def open_shard(path: Path) -> dict[str, Stored]:
    """The tensors of one `safetensors` file, by name. Raises FileError if it is not whole."""
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


def stored_name(site: Site, names: Collection[str]) -> str:
    """What a checkpoint's files call the site's weight. Raises FileError if they have none of its names."""
    for name in (site.tensor, *site.aliases):
        if name in names:
            return name
    raise FileError(
        f"the checkpoint has no tensor {site.tensor}", got=f"{len(names)} others", fix="Is it the right model?"
    )


def upright(site: Site, part: Tensor, fused: bool) -> Tensor:
    """The site's weight [d, n·c] in the way it lies in a file: a view of the tensor, or of its expert's part."""
    return part.T if site.transposed and (fused or site.expert is None) else part


def site_reader(folder: Path) -> Callable[[Site], Tensor]:
    """A function that reads one site's weight [d, n·c] from a checkpoint's files.

    It raises ModelError for a weight of another shape, and FileError for one that is not there or not plain floating
    point.
    """
    held = {name: stored for tensors in open_shards(folder).values() for name, stored in tensors.items()}
    read = checkpoint_reader(folder)

    def read_site(site: Site) -> Tensor:
        name = stored_name(site, held)
        place = stored_place(site, held[name], "the probe")
        tensor = read(name, site.expert)
        return upright(site, tensor[0] if place.fused else tensor, place.fused)

    return read_site


@dataclass(frozen=True)
class Place:
    """Where a site's weight lies in a file.

    Attributes:
        start, end: its bytes. shape: as it lies there, [d, n·c], or [n·c, d] if `turned`.
        fused: it is one expert's part of a 3-D tensor.
    """

    start: int
    end: int
    shape: tuple[int, int]
    turned: bool
    fused: bool


def stored_place(site: Site, stored: Stored, wanted_by: str) -> Place:
    """Raises FileError if the tensor is not plain floating point, ModelError if it is another model's."""
    if stored.dtype is None:
        raise FileError(
            f"{stored.name} is not plain floating point",
            got=stored.dtype_name,
            fix="Use a checkpoint in F32, F16 or BF16; or give the loaded model to score(), which dequantises it, and "
            "serve the edit as an adapter.",
        )
    start, end, shape = stored.start, stored.end, stored.shape
    fused = len(shape) == 3 and site.expert is not None and shape[0] == site.experts
    if fused and site.expert is not None:
        size = (end - start) // shape[0]
        start, end, shape = start + site.expert * size, start + (site.expert + 1) * size, shape[1:]
    turned = site.transposed and (fused or site.expert is None)
    if (shape[::-1] if turned else shape) != (site.d, site.inputs):
        raise ModelError(
            f"{wanted_by} was made for another model: {stored.name} should be {site.d} × {site.inputs}",
            got=stored.shape,
            fix="Use the model that the probe was made on.",
        )
    return Place(start, end, (shape[0], shape[1]), turned, fused)


def shards(folder: Path) -> dict[str, str]:
    """Tensor name → file name of a `safetensors` checkpoint, sharded or in one file.

    Raises:
        FileError: no such checkpoint, or its index names a file outside the folder.
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
    """A function that reads one tensor of a checkpoint by its name, or of a 3-D one [experts, ·, ·] the part [1, ·, ·]
    of an expert."""
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
