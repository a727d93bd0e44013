"""A mixture of experts of 235 billion weights through doctor, scoring and export, and the memory that each takes.

The checkpoint has Qwen3-235B-A22B's shapes and names. Its files are sparse: only the weights that are read hold random
numbers, everything else is a hole, which takes no space on the disk. The export keeps the holes.

Run: python benchmarks/huge.py [--format fp8|bf16] [--layers 2] [--experts 16]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK = 128
SIZES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


@dataclass(frozen=True)
class Shape:
    """The numbers that make a Qwen3-MoE; the defaults are those of 235B-A22B."""

    layers: int = 94
    hidden: int = 4096
    heads: int = 64
    kv_heads: int = 4
    head: int = 128
    experts: int = 128
    neurons: int = 1536
    vocabulary: int = 151936

    def config(self, few_bits: bool) -> dict[str, Any]:
        config: dict[str, Any] = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "num_experts": self.experts,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": self.neurons,
            "intermediate_size": 3 * self.hidden,
            "vocab_size": self.vocabulary,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "max_position_embeddings": 40960,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
        if few_bits:
            config["quantization_config"] = {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "weight_block_size": [BLOCK, BLOCK],
            }
        return config


def tensors_of_layer(shape: Shape, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of a layer's maps, then those of its vectors."""
    at = f"model.layers.{layer}"
    wide, narrow = shape.heads * shape.head, shape.kv_heads * shape.head
    yield f"{at}.self_attn.q_proj.weight", (wide, shape.hidden)
    yield f"{at}.self_attn.k_proj.weight", (narrow, shape.hidden)
    yield f"{at}.self_attn.v_proj.weight", (narrow, shape.hidden)
    yield f"{at}.self_attn.o_proj.weight", (shape.hidden, wide)
    for expert in range(shape.experts):
        for name, size in (
            ("gate_proj", (shape.neurons, shape.hidden)),
            ("up_proj", (shape.neurons, shape.hidden)),
            ("down_proj", (shape.hidden, shape.neurons)),
        ):
            yield f"{at}.mlp.experts.{expert}.{name}.weight", size
    yield f"{at}.mlp.gate.weight", (shape.experts, shape.hidden)
    for name, size in (("input_layernorm", shape.hidden), ("post_attention_layernorm", shape.hidden)):
        yield f"{at}.{name}.weight", (size,)
    for name in ("q_norm", "k_norm"):
        yield f"{at}.self_attn.{name}.weight", (shape.head,)


def entries(shape: Shape, layer: int, few_bits: bool) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor of a layer's file."""
    for name, size in tensors_of_layer(shape, layer):
        if few_bits and "_proj" in name:
            yield name, "F8_E4M3", size
            yield f"{name}_scale_inv", "F32", tuple(-(-n // BLOCK) for n in size)
        else:
            yield name, "BF16", size


def write_sparse(path: Path, tensors: Iterator[tuple[str, str, tuple[int, ...]]]) -> dict[str, tuple[int, int]]:
    """A `safetensors` file that is one hole after its header. Returns where each tensor lies."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        end = at + SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    start = 8 + len(text)
    offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: (start + first, start + last) for name, (first, last) in offsets.items()}


def make_checkpoint(folder: Path, shape: Shape, few_bits: bool, filled: Callable[[str], bool]) -> None:
    """The checkpoint's folder, one file a layer. Maps that `filled` names hold random numbers."""
    folder.mkdir()
    where: dict[str, str] = {}
    draw = torch.Generator().manual_seed(0)
    for layer in range(shape.layers):
        file = f"model-{layer + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
        listed = list(entries(shape, layer, few_bits))
        places = write_sparse(folder / file, iter(listed))
        with open(folder / file, "r+b") as opened:
            for name, dtype, size in listed:
                where[name] = file
                if filled(name.removesuffix("_scale_inv")):
                    opened.seek(places[name][0])
                    opened.write(random_bytes(dtype, size, draw))
    file = f"model-{shape.layers + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
    matrix = (shape.vocabulary, shape.hidden)
    ends = [("model.embed_tokens.weight", "BF16", matrix), ("lm_head.weight", "BF16", matrix)]
    ends.append(("model.norm.weight", "BF16", (shape.hidden,)))
    write_sparse(folder / file, iter(ends))
    where |= dict.fromkeys((name for name, _, _ in ends), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(shape.config(few_bits)))


def random_bytes(dtype: str, size: tuple[int, ...], draw: torch.Generator) -> bytes:
    """Random weights of about 0.02; in fp8, codes of about 60 and scales of about 0.0003."""
    if dtype == "F32":
        return (0.0003 * (0.5 + torch.rand(size, generator=draw))).numpy().tobytes()
    numbers = torch.randn(size, generator=draw)
    stored = (60 * numbers).to(torch.float8_e4m3fn) if dtype == "F8_E4M3" else (0.02 * numbers).bfloat16()
    return stored.view(torch.uint8).numpy().tobytes()


def random_probe(shape: Shape, layers: range, experts: int) -> Any:
    """Means that a probe of some layers could have left, at random."""
    from steer2edit.method.site import Site
    from steer2edit.probing.probe import Probe

    sites = []
    for layer in layers:
        at = f"model.layers.{layer}"
        name = f"{at}.self_attn.o_proj"
        sites.append(Site(layer, "attn", name, f"{name}.weight", shape.hidden, shape.heads, shape.head))
        for expert in range(experts):
            sites.append(
                Site(
                    layer,
                    "mlp",
                    f"{at}.mlp.experts",
                    f"{at}.mlp.experts.{expert}.down_proj.weight",
                    shape.hidden,
                    shape.neurons,
                    1,
                    parameter="down_proj",
                    expert=expert,
                    experts=shape.experts,
                    output=f"{at}.mlp",
                )
            )
    draw = torch.Generator().manual_seed(1)

    def means(size: int) -> dict[str, Tensor]:
        return {label: torch.randn(size, generator=draw) for label in ("positive", "negative")}

    inputs = {site.key: means(site.inputs) for site in sites}
    outputs = {key: means(shape.hidden) for key in dict.fromkeys(site.block_key for site in sites)}
    return Probe(tuple(sites), inputs, outputs, {})  # type: ignore[arg-type]


def is_filled(layers: range, experts: int) -> Callable[[str], bool]:
    """Whether a weight is one of those that are scored."""
    names = {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in layers}
    names |= {f"model.layers.{i}.mlp.experts.{e}.down_proj.weight" for i in layers for e in range(experts)}
    return lambda name: name in names


def anonymous() -> int:
    """The memory of this process that no file backs, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def peak_of(work: Callable[[], Any]) -> float:
    """The most anonymous memory of this process while something runs, in MB, looked at every 2 ms."""
    peak, done = anonymous(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return peak / 1e6


def in_a_process(code: str) -> float:
    """What a Python process of its own prints last, as a number."""
    said = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    )
    return float(said.stdout.split()[-1])


def data_in(folder: Path) -> float:
    """What a folder's files take on the disk, in GB."""
    return sum(512 * file.stat().st_blocks for file in folder.iterdir()) / 1e9


def main() -> None:
    from timing import report

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--format", choices=("fp8", "bf16"), default="fp8")
    options.add_argument("--layers", type=int, default=2, help="how many layers are scored and edited")
    options.add_argument("--experts", type=int, default=16, help="how many experts of these layers")
    options.add_argument("--folder", type=Path, help="where to put the files; a temporary folder by default")
    given = options.parse_args()
    shape, layers = Shape(), range(40, 40 + given.layers)
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        base, out, edit = Path(place) / "base", Path(place) / "out", Path(place) / "edit.safetensors"
        make_checkpoint(base, shape, given.format == "fp8", is_filled(layers, given.experts))
        size = sum(file.stat().st_size for file in base.iterdir()) / 1e9
        print(f"a {given.format} checkpoint of {size:.0f} GB, {data_in(base):.2f} GB of it data")
        setup = "from huge import *; import steer2edit as s2e; from steer2edit import cli; import contextlib, io"
        doctor = f"""
{setup}
sys.argv = ["steer2edit", "doctor", {str(base)!r}, "--json"]
def work():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main()
print(peak_of(work))
"""
        score = f"""
{setup}
probe = random_probe(Shape(), range({layers.start}, {layers.stop}), {given.experts})
def work():
    edit = s2e.score({str(base)!r}, probe).edit(rho_attn=0.02, rho_mlp=0.02, alpha=0.2).with_strength(4.0)
    edit.save({str(edit)!r})
print(peak_of(work))
"""
        export = f"""
{setup}
edit = s2e.Edit.load({str(edit)!r})
print(peak_of(lambda: s2e.export_checkpoint({str(base)!r}, edit, {str(out)!r}, accept_rounding=True)))
"""
        for name, code in (("doctor", doctor), ("scoring", score), ("export", export)):
            started = time.monotonic()
            peak = in_a_process(code)
            note = f"({time.monotonic() - started:.0f} s)"
            report(f"{name} of {size:.0f} GB: peak anonymous memory, MB", peak, ("<=", 1000), note)
        rounding = json.loads((out / "manifest.json").read_text()).get("rounding")
        if rounding:
            print(
                f"rounding kept {rounding['kept']:.2f} of the edit, with noise of {rounding['noise']:.2f} of its size"
            )
        report("data in the export / data in the base", data_in(out) / data_in(base), ("<=", 1.05))


if __name__ == "__main__":
    main()
