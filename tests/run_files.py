"""The files of a whole run and their bytes."""

from __future__ import annotations

from pathlib import Path

# What two runs of one recipe must agree on to the byte. The manifest and the page, which shows it, hold times, and
# nothing else that may differ.
OUTPUTS = [
    "recipe.yaml",
    "traces.jsonl",
    "probe.safetensors",
    "scores.safetensors",
    "search/trials.jsonl",
    "search/discarded.jsonl",
    "search/study.json",
    "search/answers.jsonl",
    "choice.json",
    "edit.safetensors",
    "exports.json",
    "adapter/README.md",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/steer2edit.json",
    "evaluation/results.json",
    "evaluation/answers.jsonl",
    "figures/trade_off.png",
    "figures/trade_off.svg",
    "figures/trade_off.pdf",
    "figures/measures.png",
    "figures/measures.svg",
    "figures/measures.pdf",
    "figures/lambda.png",
    "figures/lambda.svg",
    "figures/lambda.pdf",
    "report.md",
]


UNDRAWN = [name for name in OUTPUTS if not name.startswith("figures/")]


def _bytes(folder: Path, names: list[str] = OUTPUTS) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def _alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
