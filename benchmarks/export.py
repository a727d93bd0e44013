"""An edited checkpoint written from disk against copying the folder, and its memory; scoring from disk against reading.

Makes random checkpoints of 2, 4.5 and 8 GB in a temporary folder: 25 GB of disk, and files should fit the page cache.

Run: python benchmarks/export.py [--gigabytes 4.5]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import steer2edit as s2e
from steer2edit.files.writing import remove
from steer2edit.method.site import Site
from steer2edit.probing.probe import Probe
from timing import ratio, report

D, HEADS, NEURONS, VOCABULARY = 4096, 32, 14336, 32000
LAYER = {
    "self_attn.q_proj": (D, D),
    "self_attn.k_proj": (D // 4, D),
    "self_attn.v_proj": (D // 4, D),
    "self_attn.o_proj": (D, D),
    "mlp.gate_proj": (NEURONS, D),
    "mlp.up_proj": (NEURONS, D),
    "mlp.down_proj": (D, NEURONS),
}


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """A bf16 Llama-shaped checkpoint of random weights, two layers a shard. Returns how many layers it has."""
    folder.mkdir()
    layer_bytes = 2 * sum(a * b for a, b in LAYER.values())
    layers = round((gigabytes * 1e9 - 4 * VOCABULARY * D) / layer_bytes)
    one = {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in LAYER.items()}
    where: dict[str, str] = {}

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, str(folder / name), metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    for number, first in enumerate(range(0, layers, 2)):
        tensors = {}
        for i in range(first, min(first + 2, layers)):
            tensors |= {f"model.layers.{i}.{name}.weight": w.roll(i, 0) for name, w in one.items()}
        shard(number, tensors)
    embedding = torch.randn(VOCABULARY, D).mul_(0.02).bfloat16()
    shard(layers, {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.roll(1, 0)})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return layers


def random_probe(layers: int) -> Probe:
    """Means that a probe could have left, at random."""
    sites = []
    for i in range(layers):
        for block, path, n in (("attn", "self_attn.o_proj", HEADS), ("mlp", "mlp.down_proj", NEURONS)):
            name = f"model.layers.{i}.{path}"
            sites.append(Site(i, block, name, f"{name}.weight", D, n, LAYER[path][1] // n))  # type: ignore[arg-type]
    labels = ("positive", "negative")
    inputs = {s.key: {label: torch.randn(s.inputs) for label in labels} for s in sites}
    outputs = {s.key: {label: torch.randn(s.d) for label in labels} for s in sites}
    return Probe(tuple(sites), inputs, outputs, {})  # type: ignore[arg-type]


def read_only(folder: Path, probe: Probe) -> None:
    """Just reading the tensors that are scored, into memory."""
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for site in probe.sites:
        with safe_open(str(folder / where[site.tensor]), framework="pt") as file:
            file.get_tensor(site.tensor).clone()


def copy_and_sync(folder: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", str(folder), str(out)], check=True)
    subprocess.run(["sync"], check=True)


def timed(folder: Path, layers: int) -> None:
    probe = random_probe(layers)
    scores = s2e.score(folder, probe)
    edit = scores.edit(rho_attn=0.3, rho_mlp=0.3, alpha=0.0)  # dense: every column of every site changes
    size = sum(f.stat().st_size for f in folder.iterdir()) / 1e9
    print(f"a checkpoint of {size:.2f} GB in {len(list(folder.glob('*.safetensors')))} shards, every column edited")
    ours, theirs = folder.with_name("out"), folder.with_name("copy")

    def export() -> None:
        s2e.export_checkpoint(folder, edit, ours, hashes=False)

    def copy() -> None:
        copy_and_sync(folder, theirs)

    def clean() -> None:
        remove(ours)
        remove(theirs)
        subprocess.run(["sync"], check=True)

    ratio(export, copy, 6, ("<=", 1.3), "export / cp -r and sync", after=clean)
    ratio(
        lambda: s2e.score(folder, probe),
        lambda: read_only(folder, probe),
        5,
        ("<=", 1.5),
        "scoring from disk / reading those tensors",
    )


def memory(folder: Path, gigabytes: float) -> float:
    """Peak anonymous memory of an export, over what is held before it, in MB."""
    layers = make_checkpoint(folder, gigabytes)
    edit_file = folder.with_name("edit.safetensors")
    s2e.score(folder, random_probe(layers)).edit(rho_attn=0.3, rho_mlp=0.3, alpha=0.0).save(edit_file)
    code = f"""
import steer2edit as s2e, torch
from export import peak_of
edit = s2e.Edit.load({str(edit_file)!r})
print(peak_of(lambda: s2e.export_checkpoint({str(folder)!r}, edit, {str(folder.with_name("out"))!r})))
"""
    said = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    remove(folder.with_name("out"))
    return float(said.stdout)


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def peak_of(work) -> float:
    """The most anonymous memory while something runs, less what there was before, in MB, looked at every 2 ms."""
    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return (peak - before) / 1e6


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gigabytes", type=float, default=4.5)
    gigabytes = options.parse_args().gigabytes
    largest = max(a * b for a, b in LAYER.values()) * 2 / 1e6
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "base"
        timed(folder, make_checkpoint(folder, gigabytes))
        peaks = {}
        for size in (2.0, 8.0):
            remove(folder)
            peaks[size] = memory(folder, size)
            note = f"({peaks[size]:.0f} MB, the largest tensor {largest:.0f} MB)"
            report(f"export of {size:g} GB: peak anonymous memory less the largest tensor, MB", peaks[size] - largest,
                   ("<=", 600), note)  # fmt: skip
        report("export: peak for 8 GB less peak for 2 GB, MB", peaks[8.0] - peaks[2.0], ("<=", 50))


if __name__ == "__main__":
    main()
