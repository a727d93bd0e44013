"""Probe and weights → Scores: for each site the closed form of edit.py, one weight at a time.

The vectors are the probe's difference of means, or any that are given. The weights come from a model in memory or
straight from a checkpoint's `safetensors` files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .edit import Scores, score_site
from .errors import FileError, ModelError, ProbeError
from .files import read_json
from .fingerprint import sketch
from .probe import Probe
from .sites import Site, find_sites, same_sites, weight_of

Vectors = Tensor | Mapping[int, Tensor] | Mapping[str, Tensor]


def score(model: nn.Module | str | Path, probe: Probe, *, vectors: Vectors | None = None) -> Scores:
    """Scores every site: v̂, k̂, g, with no (ρ, α) in it.

    Args:
        model: the model that the probe was made on, or its checkpoint's folder, of which only the sites' weights are
            then read.
        vectors: steering vectors in place of the probe's difference of means: one [d] for all sites, one a layer
            {3: v}, or one a site {"3.attn": v, "3.mlp": v}. A site without one is left alone, and `provenance` says so.

    Raises:
        ModelError: the probe was made on another model, or a weight is quantised or not in memory.
        ProbeError: a vector has the wrong shape or is not finite.
    """
    given = None if vectors is None else _by_site(vectors, probe.sites)
    scores, fingerprint = {}, {}
    with torch.inference_mode():
        for site, mapped in _weights(model, probe.sites):
            weight = mapped.clone()  # sums depend in the last bit on how memory is aligned, and a mapped file's is not
            v = probe.vector(site) if given is None else given.get(site.key)
            if v is None:
                continue
            scores[site.key] = score_site(site, weight, v, probe.mean_input(site))
            fingerprint[site.key] = sketch(weight)
    without = [site.key for site in probe.sites if site.key not in scores]
    provenance = {
        "layers": 1 + max(site.layer for site in probe.sites),
        "probe": {"counts": dict(probe.counts), **probe.provenance},
        "vectors": "difference of means" if given is None else "given",
        "sites_without_vector": without,
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
            names |= {site.key, site.layer}
            v = named.get(site.key, named.get(site.layer))
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


def _weights(model: nn.Module | str | Path, sites: tuple[Site, ...]) -> Iterator[tuple[Site, Tensor]]:
    if isinstance(model, nn.Module):
        same_sites(find_sites(model), sites, "the probe")
        for site in sites:
            yield site, weight_of(model, site)
        return
    read = checkpoint_reader(Path(model))
    for site in sites:
        weight = read(site.tensor)
        if weight.shape != (site.d, site.inputs):
            raise ModelError(
                f"the probe was made on another model: {site.tensor} should be {site.d} × {site.inputs}",
                got=tuple(weight.shape),
                fix="Give the folder of the model that the probe was made on.",
            )
        yield site, weight


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
            if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
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


def checkpoint_reader(folder: Path) -> Callable[[str], Tensor]:
    """A function that reads one tensor of a checkpoint by its name."""
    from safetensors import SafetensorError, safe_open

    where = shards(folder)

    def read(name: str) -> Tensor:
        if name not in where:
            raise FileError(
                f"the checkpoint {folder} has no tensor {name}",
                got=f"{len(where)} others",
                fix="Is it the right model?",
            )
        try:
            with safe_open(str(folder / where[name]), framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise FileError(f"{folder / where[name]} cannot be read", got=error, fix="Copy it again.") from None

    return read
