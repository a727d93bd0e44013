"""How TPE compares with the grid: the hypervolume of 60 trials, averaged over three seeds, against the paper's coarse
grid of 125, in the same space, on the same prompts. Some ten minutes on two cores.

Run: python benchmarks/tpe.py
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import steer2edit as s2e
from steer2edit.behaviours.base import Source
from steer2edit.behaviours.safety import BUILTIN, Safety
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.recipe import parse_recipe
from steer2edit.searching.choice import summary
from steer2edit.searching.rounds import run_study
from timing import report
from workload import base_model, open_bench

KINDS = {"harmful": 16, "benign": 8}
AXIS = [0.1, 0.3, 0.5, 0.7, 0.9]


def main() -> None:
    model, tokenizer = base_model()
    engine = TransformersEngine(model, tokenizer, rows=128)
    asked = Safety().items(Source(BUILTIN, {"probe": {"harmful": 48, "benign": 48}}), "probe")
    traces = Safety().make_traces(engine, asked)
    found = {"full": s2e.score(model, s2e.collect(model, tokenizer, traces))}
    prompts = Safety().items(Source(BUILTIN, {"validation": KINDS}), "validation")

    def volume(seed: int = 0, **search: Any) -> float:
        recipe = parse_recipe(
            {
                "name": "benchmark",
                "seed": seed,
                "model": {"name": "embedded:smollm2-135m-instruct"},
                "data": {"validation": KINDS, "test": KINDS},
                "search": {
                    "baselines": [],
                    "rho_attn": AXIS,
                    "rho_mlp": AXIS,
                    "alpha": AXIS,
                    "limits": {"over_refusal": None, "degenerate": 0.25},
                    **search,
                },
                "evaluation": {
                    "new_tokens": 12,
                    "rows": 128,
                    "utility_prompts": 6,
                    "utility_tokens": 16,
                    "resamples": 200,
                },
            }
        )
        with tempfile.TemporaryDirectory() as folder:
            bench = open_bench(engine, found, prompts, recipe, Path(folder) / "journal.jsonl")
            study = run_study(bench, recipe.search, recipe.aim, seed)
        shown = summary(study, recipe.aim, recipe.search.method, recipe.evaluation.resamples, seed)
        v = shown["hypervolume"]["edit"]
        name = search or "grid of 125"
        print(f"  {name} seed {seed}: {v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]", flush=True)
        return v["mean"]

    grid = volume()
    drawn = [volume(seed, method="tpe", trials=60, at_once=12) for seed in range(3)]
    report(
        "hypervolume of 60 TPE trials, mean of 3 seeds / of the 125-point grid",
        statistics.mean(drawn) / grid,
        (">=", 1),
    )


if __name__ == "__main__":
    main()
