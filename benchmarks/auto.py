"""What `auto` gives up against a hand-made grid of twice as many edits: the difference of their hypervolumes.

Three of the shipped recipes, on the same traces, prompts and limits. The hand-made grids are what a careful user would
write who knows the scale of this model: ρ_attn in equal steps of log ρ over the range that is useful here, for all
layers, for the middle third and for the upper half. A grid of which no edit stays within the limits has a hypervolume
of 0. For each recipe that is one search by `auto` and three by hand.

The hypervolume ends at the recipe's limit of the KL: no choice may take an edit beyond it, and `auto` tries none there.

Run: python benchmarks/auto.py [RECIPE …]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from steer2edit.behaviours.base import UTILITY_LOSS
from steer2edit.errors import EditError
from steer2edit.files.reading import read_json
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import STAGES, run_stage
from steer2edit.recipe import load_recipe
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
        volumes = [volume_of(grid) for grid in grids] or [0.0]
        tried = [grid["tried"]["edit"] for grid in grids]
        print(
            f"{name}: auto {volume_of(found):.3f} with {half} edits; hand-made {volumes} with {tried} edits", flush=True
        )
        report(
            f"{name}: hypervolume of auto less the best hand-made grid's",
            volume_of(found) - max(volumes),
            (">=", -0.05),
        )


def searched(name: str, folder: Path, overrides: list[str], stages: list[str]) -> dict[str, Any]:
    """What the stage `edit` writes of a recipe's search, without baselines."""
    limit = load_recipe(name).aim.limits[UTILITY_LOSS]
    run = Run(folder, load_recipe(name, ["search.baselines=[]", f"search.reference={limit}", *overrides]))
    for stage in stages:
        run_stage(run, stage, name)
    return read_json(folder / "choice.json")


def volume_of(choice: dict[str, Any]) -> float:
    return choice["hypervolume"]["edit"]["mean"]


if __name__ == "__main__":
    main()
