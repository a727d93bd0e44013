"""Activation steering as biases in a checkpoint, so that the baseline too can be served without hooks.

out += γv at a block is a bias of its output projection, if the architecture's configuration allows one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FileError, ModelError
from ..files.reading import read_json
from ..files.shards import checkpoint_reader, open_shard, shards
from ..files.tensors import save_tensors
from ..files.writing import replacing_folder
from ..models.load import empty_model, load_config
from ..models.sites import find_sites
from ..progress import say
from .checkpoint import OTHER_WEIGHTS, checkpoint_files

# Configurations switch their biases on by these keys.
_SWITCHES = ("attention_bias", "mlp_bias", "use_bias", "bias")

_NEW = "model-steering.safetensors"

_INDEX, _SINGLE, _BASE = "model.safetensors.index.json", "model.safetensors", "model-base.safetensors"


def export_steering(base: str | Path, vectors: Mapping[str, Tensor], gamma: float, out: str | Path) -> Path:
    """Writes `out`, a copy of the checkpoint folder `base` with γv as the bias of each block's output projection.

    If a projection already has a bias, γv is added to it. Otherwise the configuration's switch is turned on, and every
    other bias that comes with it is 0.

    Args:
        vectors: block key ("3.attn", "3.mlp") → v [d], not normalised.

    Raises:
        ModelError: a block has no place for a bias; says why. FileError: `base` is not a checkpoint, or `out` exists.
    """
    base, out = Path(base), Path(out)
    if out.exists():
        raise FileError("the output folder exists already", got=out, fix="Give a new folder, or remove that one.")
    if out.resolve().is_relative_to(base.resolve()):
        raise FileError("the output folder lies inside the base", got=out, fix="Give a folder elsewhere.")
    config = load_config(base)
    model = empty_model(config)
    places = _places(model, vectors)
    switched = _switched(config, set(places.values()) - _parameters(model).keys())
    parameters = _parameters(model) | _parameters(empty_model(switched))
    if missing := [name for name in places.values() if name not in parameters]:
        raise ModelError(
            f"steering cannot be written as biases into a {config.model_type}",
            got=f"its configuration allows no bias at {missing[0].removesuffix('.bias')}",
            fix="Serve it with hooks, or serve the edit, which needs none.",
        )
    where = shards(base)
    biases = {name: gamma * vectors[key].float() for key, name in places.items()}
    stored_names = {name: _stored(name, where) for name in {*biases, *(parameters.keys() - _parameters(model).keys())}}
    old = {stored_names[name]: v for name, v in biases.items() if stored_names[name] in where}
    dtype = checkpoint_reader(base)(next(iter(where))).dtype
    for name, bias in biases.items():
        if not torch.isfinite(bias.to(dtype)).all():
            raise ModelError(f"γv is not finite in {dtype} at {name}", got=f"γ = {gamma:g}", fix="Lower γ.")
    new = {
        stored: biases.get(name, torch.zeros(parameters[name].shape)).to(dtype)
        for name, stored in stored_names.items()
        if stored not in where
    }
    with replacing_folder(out, ours="config.json") as temporary:
        for name in checkpoint_files(base):
            if name in where.values() or Path(name).suffix not in OTHER_WEIGHTS:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(base / name, temporary / name)
            else:
                say(f"  not copied, since it holds the base's weights in another form: {name}")
        for file in {where[name] for name in old}:
            _add(temporary / file, {n: v for n, v in old.items() if where[n] == file})
        if new:
            _add_shard(temporary, where, new)
            written = read_json(base / "config.json")
            written |= {
                name: True for name in _SWITCHES if getattr(switched, name, None) != getattr(config, name, None)
            }
            (temporary / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return out


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def _add_shard(folder: Path, where: Mapping[str, str], new: Mapping[str, Tensor]) -> None:
    """Adds a file to a checkpoint, and an index if the checkpoint was a single file."""
    save_tensors(new, folder / _NEW, {"format": "pt"})
    index: dict[str, Any] = {"metadata": {}}
    files = dict(where)
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX)
    else:
        (folder / _SINGLE).rename(folder / _BASE)
        files = dict.fromkeys(where, _BASE)
    index["weight_map"] = files | dict.fromkeys(new, _NEW)
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _places(model: nn.Module, vectors: Mapping[str, Tensor]) -> dict[str, str]:
    """Block key → the name of the bias that steers it."""
    blocks = {site.block_key: site for site in find_sites(model)}
    if strangers := sorted(set(vectors) - set(blocks)):
        raise ModelError(
            "vectors are given for blocks that the model does not have",
            got=strangers[:4],
            fix="Use keys like '3.attn'.",
        )
    for key in vectors:
        site = blocks[key]
        if site.block_module != site.module:
            raise ModelError(
                "steering cannot be written as biases into a mixture of experts",
                got=f"block {key} has no projection that every token passes unweighted",
                fix="Steer the attention blocks alone, or serve it with hooks.",
            )
        if vectors[key].shape != (site.d,) or not torch.isfinite(vectors[key]).all():
            raise ModelError(
                f"the vector of {key} cannot be used", got=tuple(vectors[key].shape), fix=f"Give {site.d}."
            )
    return {key: f"{blocks[key].module}.bias" for key in vectors}


def _switched(config: Any, wanted: set[str]) -> Any:
    """The configuration with those switches on that bring some of the wanted parameters."""
    changed = deepcopy(config)
    for switch in _SWITCHES if wanted else ():
        if getattr(config, switch, None) is False:
            tried = deepcopy(config)
            setattr(tried, switch, True)
            if wanted & _parameters(empty_model(tried)).keys():
                setattr(changed, switch, True)
    return changed


def _stored(name: str, where: Mapping[str, str]) -> str:
    """The name of a bias in the files: like the weight beside it, with or without the causal model's prefix."""
    for short in (name, name.split(".", 1)[-1]):
        if short.removesuffix("bias") + "weight" in where:
            return short
    raise ModelError(
        "steering cannot be written as biases into this checkpoint",
        got=f"its files hold no weight beside {name}",
        fix="Serve it with hooks, or serve the edit, which needs none.",
    )


def _add(path: Path, vectors: Mapping[str, Tensor]) -> None:
    """Adds vectors to existing biases in place: in fp32, rounded once."""
    held = open_shard(path)
    with open(path, "r+b") as file:
        for name, v in vectors.items():
            stored = held[name]
            assert stored.dtype is not None
            raw = bytearray(os.pread(file.fileno(), stored.end - stored.start, stored.start))
            bias = torch.frombuffer(raw, dtype=stored.dtype)
            bias.copy_((bias.float() + v).to(stored.dtype))
            if not torch.isfinite(bias).all():
                raise ModelError(f"the steered {name} is not finite in {stored.dtype}", got="γv", fix="Lower γ.")
            os.pwrite(file.fileno(), raw, stored.start)
