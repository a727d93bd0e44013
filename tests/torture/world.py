"""What is tortured: a pico model, its whole run, its edits, a base in many files, and a GGUF file. Made once."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import steer2edit as s2e
from conftest import make_pico, make_tokenizer, make_traces
from runs import save_pico, tiny_recipe
from steer2edit.edits import combine
from torture.warm import command, say

# What holds times, the prompts' own journals, which end with the run, and the lock: not compared to the byte.
UNLIKE = {"manifest.json", "report.html", ".lock"}


@dataclass(frozen=True)
class World:
    """The files, under one folder, and what an undisturbed run and an undisturbed export left."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def whole(self) -> Path:
        """A finished run. It is made by this process, which has then imported whatever a run needs."""
        _make_whole(self)
        return self.folder / "whole"

    @property
    def base(self) -> Path:
        """A checkpoint in many files, of which `edit.safetensors` is an edit."""
        return self.folder / "base"

    @property
    def edited(self) -> Path:
        """The base with the edit in it."""
        return self.folder / "edited"

    def file(self, name: str) -> Path:
        """probe, scores, edit, other or combination: of the base. small: an edit of the GGUF file."""
        return self.folder / f"{name}.safetensors"

    @property
    def gguf(self) -> Path:
        return self.folder / "small.gguf"


def make_world(folder: Path) -> World:
    """Makes it, or takes what an earlier call made."""
    world = World(folder)
    if not (folder / "ready").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_pico(world.model)
        world.recipe.write_text(tiny_recipe(str(world.model)).to_yaml(), encoding="utf-8")
        _make_base(world)
        _make_gguf(world)
        ended = say(folder, "apply", world.base, world.file("edit"), "--to", world.edited, cpu=120)
        assert ended.code == 0, ended.err
        (folder / "ready").touch()
    return world


def _make_base(world: World) -> None:
    model = make_pico(
        dtype=torch.bfloat16,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.05,
    )
    model.save_pretrained(world.base, max_shard_size="200KB")
    probe = s2e.collect(model, make_tokenizer(), *make_traces())
    scores = s2e.score(model, probe)
    edit = scores.edit(rho_attn=0.3, rho_mlp=0.3, alpha=0.2)
    other = scores.edit(rho_attn=0.2, rho_mlp=None, alpha=0.2)
    made: dict[str, Any] = {"probe": probe, "scores": scores, "edit": edit, "other": other}
    made["combination"] = combine(edit.only(layers=[0]), other.with_strength(-0.5))
    for name, one in made.items():
        one.save(world.file(name))


def _make_gguf(world: World) -> None:
    import gguf

    model = make_pico(num_hidden_layers=2)
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(world.gguf), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_merges(["t 1"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in state.items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    probe = s2e.collect(model, make_tokenizer(), *make_traces())
    s2e.score(model, probe).edit(rho_attn=0.3, rho_mlp=0.3, alpha=0.2).save(world.file("small"))


@cache
def _make_whole(world: World) -> None:
    """The finished run; if it is there, another one, so that no child has to import what this process can."""
    import fastapi  # noqa: F401
    import uvicorn  # noqa: F401

    from steer2edit.progress import be_quiet

    whole, out = world.folder / "whole", world.folder / f"making-{os.getpid()}"
    shutil.rmtree(out, ignore_errors=True)
    assert command("run", world.recipe, "--out", out, "--quiet", "--json")() == 0
    be_quiet()
    if whole.is_dir():
        shutil.rmtree(out)
    else:
        out.rename(whole)


def contents(folder: Path, leave: set[str] = UNLIKE) -> dict[str, bytes]:
    """Name → bytes of every file in a folder, hidden ones too."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name not in leave}


def difference(folder: Path, expected: Path, leave: set[str] = UNLIKE) -> str:
    """How a folder differs from another one, file by file; empty if it does not."""
    here, there = contents(folder, leave), contents(expected, leave)
    missing, more = sorted(there.keys() - here.keys()), sorted(here.keys() - there.keys())
    other = sorted(name for name in here.keys() & there.keys() if here[name] != there[name])
    words = [f"{word}: {', '.join(names)}" for word, names in (("missing", missing), ("more", more), ("other", other))]
    return "; ".join(word for word in words if not word.endswith(": "))


def half_written(folder: Path, expected: Path) -> str:
    """What stands in the folder of a killed command, as if it were whole, and is not; empty if nothing does.

    A journal may be the beginning of the other one; temporary files have names of their own.
    """
    if (folder / "manifest.json").is_file():
        json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    told = contents(expected)
    for name, data in contents(folder).items():
        hidden = any(part.startswith(".") for part in Path(name).parts)
        journal = "journal" in name
        if hidden or name not in told or data == told[name] or (journal and told[name].startswith(data)):
            continue
        return f"half of {name}"
    return ""
