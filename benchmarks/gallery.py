"""Runs the shipped recipes on the embedded model, and puts their edits into the package's gallery.

What each entry holds is what `steer2edit reproduce gallery:NAME` needs and what people read: the edit, its card, the
recipe, what was chosen and what it measured on test prompts. Some forty minutes on two cores; a run that is finished
already, in runs/NAME, is taken as it is.

Run: python benchmarks/gallery.py [RECIPE …]      RECIPE=FOLDER takes the finished run in a folder
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

SHELF = Path(gallery.__file__).parents[1] / "data" / "gallery"
# Where each stands in a run.
KEPT = {
    gallery.EDIT: gallery.EDIT,
    gallery.CHOICE: gallery.CHOICE,
    gallery.RESULTS: f"evaluation/{gallery.RESULTS}",
    gallery.RECIPE: gallery.RECIPE,
}


def main() -> None:
    for asked in sys.argv[1:] or shipped_recipes():
        name, _, given = asked.partition("=")
        run = Path(given) if given else Path("runs") / load_recipe(name).name
        if not given:
            subprocess.run([sys.executable, "-m", "steer2edit", "run", name, "--out", str(run)], check=True)
        if not (run / gallery.EDIT).is_file():
            print(f"{name}: nothing was chosen, so that it has no place in the gallery")
            continue
        add(name, run)


def add(name: str, run: Path) -> None:
    """Puts a finished run's edit into the gallery."""
    folder = SHELF / name
    folder.mkdir(parents=True, exist_ok=True)
    for kept, made in KEPT.items():
        shutil.copyfile(run / made, folder / kept)
    recipe, edit = load_recipe(folder / gallery.RECIPE), Edit.load(folder / gallery.EDIT)
    choice, results = read_json(folder / gallery.CHOICE), read_json(folder / gallery.RESULTS)
    card = model_card(recipe, edit, choice, results, "edit").replace("THIS_FILE", f"gallery:{name}")
    write_text(folder / gallery.CARD, card)
    print(f"{name}: {(folder / gallery.EDIT).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
