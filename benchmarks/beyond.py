"""Edits that preserve against the paper's edit and every rival, over several draws of probe, validation and test.

For each seed the bundled safety prompts are pooled and divided anew, by kind and style. The probe, the scores and the
rivals are made as the demo makes them; every method gets as many strengths, at equal KL; the rule takes one of each on
validation; test says what they do. `--behaviour sentiment` (lists, pirate) does the same for a style.

Every batch is journalled in the folder, so that a run that was killed goes on. The folder then holds `results.json`,
`tables.md`, the figure `curves` and, apart since they differ from run to run, `costs.json`.

Run: python benchmarks/beyond.py --out runs/beyond
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import steer2edit as s2e
from beyond_figure import draw_curves
from beyond_numbers import markdown, results_of
from beyond_seed import EDITS, METHODS, NEED_EVIDENCE, TITLE, Plan, Remembered, SeedRun
from steer2edit.behaviours.base import SPLITS, Split
from steer2edit.behaviours.safety import BORDERLINE, OVER_REFUSAL
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import Steer2EditError
from steer2edit.files.reading import read_json
from steer2edit.files.writing import write_json, write_text
from steer2edit.models.embedded import EMBEDDED
from steer2edit.progress import be_quiet, say
from steer2edit.recipe import load_recipe


class Clock:
    """Adds up the seconds of each part, of a run that was killed as well, in a file of its own."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = read_json(path)["seconds"] if path.is_file() else {}

    def __call__(self, part: str) -> Clock:
        self.part = part
        return self

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.part] = self.seconds.get(self.part, 0.0) + time.monotonic() - self.began
        write_json(self.path, {"seconds": self.seconds})

    def rows(self, seeds: int) -> dict[str, str]:
        return {part: f"{took / seeds:.0f} s a seed" for part, took in self.seconds.items()}


def run(plan: Plan, seeds: Sequence[int], out: Path, also: Path | None = None) -> dict[str, Any]:
    """Every seed that is not whole yet, then the tables, in which the strengths of another folder may take part."""
    out.mkdir(parents=True, exist_ok=True)
    _refuse_other_plan(plan, out / "plan.json")
    clock = Clock(out / "costs.json")
    model, tokenizer = s2e.load_model(plan.model, dtype="float32", device="cpu")
    engine = Remembered(TransformersEngine(model, tokenizer, rows=128), out / "base_answers.jsonl")
    rows, began = [], time.monotonic()
    for number, seed in enumerate(seeds, start=1):
        row = SeedRun(plan, engine, model, seed, out / f"seed-{seed}", clock).row()
        rows.append(row if also is None else _with_strengths_of(row, also / f"seed-{seed}" / "trials.json"))
        took = time.monotonic() - began
        left = took / number * (len(seeds) - number)
        say(f"seed {seed}: done, {number} of {len(seeds)}; {took:.0f} s so far, about {left:.0f} s left")
    behaviour = load_recipe("demo" if plan.is_safety else plan.behaviour).behaviour
    results = results_of(
        rows,
        behaviour.measures,
        curves=plan.curves,
        levels=plan.levels,
        kls=plan.kls,
        reference=plan.reference,
        resamples=plan.resamples,
    )
    write_json(out / "results.json", results)
    first = out / f"seed-{seeds[0]}"
    costs = clock.rows(len(seeds)) | _megabytes(first)
    write_text(out / "tables.md", markdown(results, TITLE, costs))
    draw_curves(results, TITLE, (OVER_REFUSAL.name, BORDERLINE.name), out / "curves")
    return results


def _with_strengths_of(row: dict[str, Any], path: Path) -> dict[str, Any]:
    """A seed's row with further strengths of its methods; what was chosen stays.

    Raises:
        Steer2EditError: the other row is of other prompts, or of another model.
    """
    other = read_json(path)
    if any(other[name] != row[name] for name in ("seed", "base")):
        raise Steer2EditError("the strengths are of another draw", got=str(path), fix="Give --also a run of the same.")
    methods = {
        method: sorted([*strengths, *other["methods"].get(method, [])], key=lambda one: one["target"])
        for method, strengths in row["methods"].items()
    }
    return row | {"methods": methods}


def _refuse_other_plan(plan: Plan, path: Path) -> None:
    """Raises Steer2EditError if the folder holds measurements of another kind; else keeps what these are."""
    if path.is_file() and (before := read_json(path)) != (now := plan.measured()):
        differs = [name for name in now if before.get(name) != now[name]]
        raise Steer2EditError(
            "the folder holds another comparison", got=f"another {', '.join(differs)}", fix="Give another --out."
        )
    write_json(path, plan.measured())


def _megabytes(folder: Path) -> dict[str, str]:
    """What the evidence adds to a probe's file."""
    probe = s2e.Probe.load(folder / "probe.safetensors")
    if probe.evidence is None:
        return {}
    size = sum(t.numel() * t.element_size() for t in probe.evidence.tensors().values())
    return {
        "evidence in the probe": f"{size / 1e6:.1f} MB of {(folder / 'probe.safetensors').stat().st_size / 1e6:.1f}"
    }


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in names if name not in METHODS]:
        raise Steer2EditError("there is no such method", got=unknown[0], fix=f"Known: {', '.join(METHODS)}.")
    return names


def numbers_of(text: str) -> tuple[float, ...]:
    return tuple(float(x) for x in text.split(",") if x.strip())


def kinds_of(text: str) -> dict[str, int]:
    """`harmful=15,benign=8` → {"harmful": 15, "benign": 8}"""
    return {kind: int(count) for kind, _, count in (part.partition("=") for part in text.split(","))}


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Raises Steer2EditError for a method that is not known, or one that the behaviour gives no evidence for."""
    safety, quick = arguments.behaviour == "safety", arguments.quick
    without_evidence = tuple(name for name in METHODS if name not in NEED_EVIDENCE)
    methods = _names(arguments.methods) if arguments.methods else (METHODS if safety else without_evidence)
    if not safety and (some := NEED_EVIDENCE & set(methods)):
        raise Steer2EditError(
            "a style has no prompts at which nothing is to change", got=min(some), fix="Leave it out of --methods."
        )
    curves = _names(arguments.curves) if arguments.curves else tuple(m for m in (*EDITS, "steering") if m in methods)
    counts: dict[Split, Mapping[str, int]] = {}
    if safety:
        texts = arguments.probe, arguments.validation, arguments.test
        counts = {split: kinds_of(text) for split, text in zip(SPLITS, texts, strict=True)}
    evaluation = {"rows": 128, "batch": 512}  # the rest as the recipe has it
    if quick:
        small = "harmful=3,benign=2,borderline=2" if safety else "prompt=4"
        counts = {split: kinds_of(small) for split in SPLITS}
        evaluation = {"new_tokens": 4, "utility_prompts": 2, "utility_tokens": 4, "rows": 16, "batch": 16}
    low, high = arguments.span or ((0.01, 0.3) if safety else (0.05, 0.4))
    return Plan(
        behaviour=arguments.behaviour,
        model=arguments.model,
        methods=methods,
        curves=curves,
        span=(low, high),
        points=2 if quick else arguments.points,
        counts=counts,
        evaluation=evaluation,
        reference=0.3 if safety else 0.5,
        levels=numbers_of(arguments.levels) if safety else (),
        kls=numbers_of(arguments.kls),
        resamples=50 if quick else 1000,
        sets=arguments.sets,
        set_items=2 if quick else arguments.set_items,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/beyond"), help="where the journals and the tables lie")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--behaviour", choices=["safety", "sentiment", "lists", "pirate"], default="safety")
    parser.add_argument("--methods", default="", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--curves", default="", help="methods of which every strength is tested, the first against all")
    parser.add_argument("--span", nargs=2, type=float, metavar="KL", help="of the weakest and the strongest strength")
    parser.add_argument("--points", type=int, default=6, help="strengths of each method")
    parser.add_argument("--levels", default="0.5,0.6,0.7", help="of refusal, at which methods are compared")
    parser.add_argument("--kls", default="0.03,0.06,0.12", help="of KL, at which methods are compared")
    parser.add_argument("--probe", default="harmful=80,benign=80,borderline=80")
    parser.add_argument("--validation", default="harmful=15,benign=8,borderline=12")
    parser.add_argument("--test", default="harmful=36,benign=18,borderline=24")
    parser.add_argument("--sets", type=Path, help="a folder with prompts of others")
    parser.add_argument("--set-items", type=int, default=60)
    parser.add_argument("--also", type=Path, help="an --out of the same draws, whose strengths join the tables")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--quick", action="store_true", help="a few prompts, to see that it runs")
    arguments = parser.parse_args(argv)
    be_quiet(False)
    try:
        run(plan_of(arguments), [int(seed) for seed in arguments.seeds.split(",")], arguments.out, arguments.also)
    except Steer2EditError as error:
        raise SystemExit(str(error)) from None
    print((arguments.out / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
