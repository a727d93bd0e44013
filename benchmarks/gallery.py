"""Runs the shipped recipes on the embedded model, and puts their edits into the package's gallery.

What each entry holds is what `steer2edit reproduce gallery:NAME` needs and what people read: the edit, its card, the
recipe, what was chosen and what it measured on test prompts. Some forty minutes on two cores; a run that is finished
already, in runs/NAME, is taken as it is.

Run: python benchmarks/gallery.py [RECIPE …]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from steer2edit.edits import Edit
from steer2edit.files import gallery
from steer2edit.files.reading import read_json
from steer2edit.files.writing import write_text
from steer2edit.recipe import load_recipe, shipped_recipes
from steer2edit.report.card import model_card

SHELF = Path(gallery.__file__).parents[1] / "gallery"
# Where each stands in a run.
KEPT = {
    gallery.EDIT: gallery.EDIT,
    gallery.CHOICE: gallery.CHOICE,
    gallery.RESULTS: f"evaluation/{gallery.RESULTS}",
    gallery.RECIPE: gallery.RECIPE,
}


def main() -> None:
    for name in sys.argv[1:] or shipped_recipes():
        run = Path("runs") / load_recipe(name).name
        subprocess.run([sys.executable, "-m", "steer2edit", "run", name, "--out", str(run)], check=True)
        if not (run / gallery.EDIT).is_file():
            print(f"{name}: nothing was chosen, so that it has no place in the gallery")
            continue
        (SHELF / name).mkdir(parents=True, exist_ok=True)
        for kept, made in KEPT.items():
            shutil.copyfile(run / made, SHELF / name / kept)
        card = model_card(
            load_recipe(run / gallery.RECIPE),
            Edit.load(run / gallery.EDIT),
            read_json(run / gallery.CHOICE),
            read_json(run / KEPT[gallery.RESULTS]),
            "edit",
        )
        write_text(SHELF / name / gallery.CARD, card.replace("THIS_FILE", f"gallery:{name}"))
        print(f"{name}: {(SHELF / name / gallery.EDIT).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
