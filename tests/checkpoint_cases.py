"""A base with an edit of all of its sites, for the tests of a checkpoint's export."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

import steer2edit as s2e
from conftest import make_pico, make_tokenizer
from runs import sketch
from steer2edit.edits import Scores
from steer2edit.method.scores import score_site
from steer2edit.models.sites import find_sites
from steer2edit.models.weights import weight_of

SHARDED, ONE_FILE = "20KB", "1GB"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def random_edit(model: Any, rho: float = 0.1, alpha: float = 0.0) -> s2e.Edit:
    """An edit of every site from random vectors and inputs; no traces are run."""
    draw = torch.Generator().manual_seed(11)
    sites, sketches = {}, {}
    for site in find_sites(model):
        weight = weight_of(model, site)
        v, mu = torch.randn(site.d, generator=draw), torch.randn(site.inputs, generator=draw)
        sites[site.key], sketches[site.key] = score_site(site, weight, v, mu), sketch(weight)
    return Scores(sites, sketches).edit(rho_attn=rho, rho_mlp=rho, alpha=alpha)


class Case(NamedTuple):
    model: Any
    base: Path
    edit: s2e.Edit


def make_case(folder: Path, shard_size: str = SHARDED, dtype: torch.dtype = torch.bfloat16, **edit: float) -> Case:
    model = make_pico("llama", dtype=dtype)
    model.save_pretrained(folder / "base", max_shard_size=shard_size)
    make_tokenizer().save_pretrained(folder / "base")
    return Case(model, folder / "base", random_edit(model, **edit))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
