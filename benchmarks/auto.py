"""What `auto` gives up against a hand-made grid of twice as many edits: the difference of their hypervolumes.

Three of the shipped recipes, on the same traces, prompts and limits. The hand-made grids are what a careful user would
write who knows the scale of this model: ρ_attn in equal steps of log ρ over the range that is useful here, for all
layers, for the middle third and for the upper half. A grid of which no edit stays within the limits has a hypervolume
of 0. For each recipe that is one search by `auto` and three by hand.

The bound is on the hypervolume up to the recipe's reference, a KL of 1. It is printed up to the recipe's limit of the
KL, too: no choice takes an edit beyond the limit.

Run: python benchmarks/auto.py [RECIPE …]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from steer2edit.behaviours.base import UTILITY_LOSS
from steer2edit.errors import EditError
from steer2edit.pipeline.reporting import read_study
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import STAGES, run_stage
from steer2edit.recipe import load_recipe
from steer2edit.searching.choice import summary
from timing import report

# ρ_attn of the hand-made grids by layers: in the upper half ρ is ten times smaller at equal KL.
GRIDS = {
    "null": [0.15, 0.18, 0.22, 0.26, 0.32, 0.4],
    "33%-67%": [0.1, 0.12, 0.14, 0.17, 0.2, 0.24],
    "50%-100%": [0.02, 0.025, 0.03, 0.037, 0.045, 0.055],
}
UP_TO_EDIT = list(STAGES)[: list(STAGES).index("edit") + 1]


def main() -> None:
    for name in sys.argv[1:] or ("demo", "sentiment", "lists"):
        with tempfile.TemporaryDirectory() as folder:
            found = searched(name, Path(folder) / "auto", [], UP_TO_EDIT)
            half = found["tried"]["edit"]
            grids: list[dict[str, Any]] = []
            for layers, rhos in GRIDS.items():
                hand = Path(folder) / layers
                shutil.copytree(Path(folder) / "auto", hand)
                written = [f"search.rho_attn={rhos[: half or None]}", f"search.layers=[{layers}]"]
                written += ["search.rho_mlp=[off]", "search.alpha=[0.2, 0.4]", "search.steering=[]"]
                try:
                    grids.append(searched(name, hand, written, ["search", "edit"]))
                except EditError as error:
                    print(f"{name}, layers {layers}: {error}", flush=True)
        tried = [grid["tried"]["edit"] for grid in grids]
        for part in ("whole", "within the limit"):
            volumes = [grid[part] for grid in grids] or [0.0]
            print(f"{name}, {part}: auto {found[part]:.3f} with {half}; hand-made {volumes} with {tried}", flush=True)
            difference = found[part] - max(volumes)
            if part == "whole":
                report(f"{name}: hypervolume of auto less the best hand-made grid's", difference, (">=", -0.05))
            else:
                print(f"  the difference up to the limit: {difference:.3f}", flush=True)


def searched(name: str, folder: Path, overrides: list[str], stages: list[str]) -> dict[str, Any]:
    """What a recipe's search tried, without baselines, and the hypervolume of its edits."""
    run = Run(folder, load_recipe(name, ["search.baselines=[]", *overrides]))
    for stage in stages:
        run_stage(run, stage, name)
    return volumes_of(run)


def volumes_of(run: Run) -> dict[str, Any]:
    """How many candidates of each kind were tried, and the hypervolume of the edits, up to the reference and up to the
    limit of the KL.
    """
    aim, study = run.recipe.aim, read_study(run)
    limit = aim.limits[UTILITY_LOSS]
    assert limit is not None
    whole, within = (
        summary(study, one, run.recipe.search.method, 2, run.recipe.seed)
        for one in (aim, replace(aim, reference=limit))
    )
    return {
        "tried": whole["tried"],
        "whole": whole["hypervolume"]["edit"]["mean"],
        "within the limit": within["hypervolume"]["edit"]["mean"],
    }


if __name__ == "__main__":
    main()
