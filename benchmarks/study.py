"""What a study costs: 32 configurations × 32 prompts in one study, against as many prompts of the plain base model at
the same batch size, and against one configuration at a time with its weights baked and the model loaded anew.

Each side of the second comparison is timed on its own: the study whole, and a few of the single runs, whose time is
multiplied up. A single run is a process of its own, as in the published code.

Run: python benchmarks/study.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import steer2edit as s2e
from steer2edit.behaviours.base import Item, Source
from steer2edit.behaviours.safety import BUILTIN, Safety
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.method.intervention import NOTHING
from steer2edit.recipe import parse_recipe
from steer2edit.searching.candidates import edited
from timing import report, seconds
from workload import base_model, open_bench, probe

ROWS, TOKENS, SINGLE_RUNS = 128, 16, 3
KINDS = {"harmful": 16, "benign": 16}
GRID = [(rho, None, alpha) for rho in (0.18, 0.2, 0.22, 0.24, 0.26, 0.3, 0.35, 0.4) for alpha in (0.1, 0.2, 0.3, 0.4)]
RECIPE = {
    "name": "benchmark",
    "model": {"name": "embedded:smollm2-135m-instruct"},
    "data": {"validation": KINDS, "test": KINDS},
    "search": {"rho_attn": [0.2], "rho_mlp": [None], "alpha": [0.2], "baselines": []},
    "evaluation": {"new_tokens": TOKENS, "rows": ROWS, "batch": 1024, "utility_prompts": 8, "utility_tokens": 32},
}
# One configuration as the published code runs it: a process, a model, its weights scored and edited, transformers'
# generate.
SINGLE = """
import json, sys, torch
import steer2edit as s2e
from steer2edit.models.embedded import EMBEDDED
folder, rho, alpha = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
model, tokenizer = s2e.load_model(EMBEDDED, dtype="float32", device="cpu")
scores = s2e.score(model, s2e.Probe.load(folder + "/probe.safetensors"))
scores.edit(rho_attn=rho, rho_mlp=None, alpha=alpha).apply(model)
prompts = json.load(open(folder + "/prompts.json"))
tokenizer.padding_side = "left"
texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
model.generate(**batch, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
"""


def main() -> None:
    model, tokenizer = base_model()
    recipe, seen = parse_recipe(RECIPE), probe()
    found = s2e.score(model, seen)
    prompts = Safety().items(Source(BUILTIN, {"validation": KINDS}), "validation")
    engine = TransformersEngine(model, tokenizer, rows=ROWS)
    tried = [edited(*configuration) for configuration in GRID]
    harmful = [p for p in prompts if p.kind == "harmful"] * 2  # without benign ones no losses are measured
    ids = [engine.tokens(p.messages(None)) for p in harmful]

    def study(asked: Sequence[Item] = harmful) -> None:
        with tempfile.TemporaryDirectory() as folder:
            open_bench(engine, {"full": found}, asked, recipe, Path(folder) / "journal.jsonl").run(tried, "0")

    def base() -> None:
        engine.generate([Request(x) for _ in tried for x in ids], [NOTHING], TOKENS)

    def single(rho: float, alpha: float, folder: str) -> float:
        return seconds(lambda: subprocess.run([sys.executable, "-c", SINGLE, folder, str(rho), str(alpha)], check=True))

    # Each takes a minute and more: no round is for warming up.
    ours, plain = [seconds(study)], [seconds(base), seconds(base)]
    ours.append(seconds(study))
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    label = f"{len(tried)} configurations × {len(harmful)} prompts / plain base model"
    report(label, statistics.mean(ratios), ("<=", 1.35), f"rounds {', '.join(f'{r:.3f}' for r in ratios)}")
    with tempfile.TemporaryDirectory() as folder:
        seen.save(f"{folder}/probe.safetensors")
        Path(folder, "prompts.json").write_text(json.dumps([p.messages(None) for p in harmful]))
        took = statistics.median(single(rho, alpha, folder) for rho, _, alpha in GRID[:SINGLE_RUNS])
    label = "one at a time, baked and loaded anew / in one study"
    told = f"{took:.1f} s each, {SINGLE_RUNS} of {len(GRID)} run; the study {statistics.mean(ours):.0f} s"
    report(label, took * len(GRID) / statistics.mean(ours), (">=", 5), told)


if __name__ == "__main__":
    main()
