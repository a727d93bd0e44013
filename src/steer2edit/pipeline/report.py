"""The verb `report`: the report of one run, finished or not, or several runs on one axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import FileError
from ..files.reading import read_json
from ..files.writing import make_folder, write_text
from ..report.comparison import Compared, comparison_figure, comparison_markdown
from ..report.html.render import PAGE
from .keys import stages_of
from .names import RESULTS
from .reporting import write_what_is_there
from .run import Run
from .stages import run_stage

RECIPE = "recipe.yaml"


def recipe_of(folder: str | Path) -> Path:
    """The recipe that a run directory holds. Raises FileError if it holds none."""
    path = Path(folder) / RECIPE
    if not path.is_file():
        raise FileError(f"{folder} is no run directory", got=f"no {RECIPE}", fix="Give a run directory or a recipe.")
    return path


def report(run: Run, recipe_name: str, unfinished: bool) -> Path:
    """Draws the figures and writes `report.md` and the page; gives the page's path.

    Args:
        recipe_name: for messages. unfinished: of a run that lacks a stage, write the page of what is there.

    Raises:
        FileError: a stage has not been run. The page is written before that, if the run has begun.
    """
    if unfinished and not all(run.is_whole(stage) for stage in stages_of(run.recipe) if stage != "report"):
        with run.working():
            write_what_is_there(run)
    else:
        run_stage(run, "report", recipe_name)
    return run.path(PAGE)


def compare(folders: Sequence[str | Path], to: str | Path) -> list[Path]:
    """Puts finished runs on one axis: `compare.png`, `.svg` and `.pdf`, and the table `compare.md`.

    Args:
        folders: run directories. to: the folder that they are written into.

    Returns:
        The files written, the page first.

    Raises:
        FileError: fewer than two runs, or one without results of this version.
    """
    if len(folders) < 2:
        raise FileError("there is nothing to compare", got=f"{len(folders)} run", fix="Give two or more.")
    names = _names([Path(folder) for folder in folders])
    runs = [_compared(Path(folder), name) for folder, name in zip(folders, names, strict=True)]
    to = Path(to)
    make_folder(to)
    files = comparison_figure(runs, to / "compare")
    page = to / "compare.md"
    write_text(page, comparison_markdown(runs, files[0].name))
    return [page, *files]


def _compared(folder: Path, name: str) -> Compared:
    path = folder / RESULTS
    if not path.is_file():
        raise FileError(f"{folder} is no finished run", got=f"no {RESULTS}", fix="Give run directories.")
    results = read_json(path)
    if not isinstance(results, dict) or not {"measures", "attribute", "systems"} <= set(results):
        raise FileError(
            f"{path} has no measures", got="results of an older version", fix="Run the stage evaluate again."
        )
    return Compared(name, results)


def _names(folders: Sequence[Path]) -> list[str]:
    """Each run's folder name; whole paths where two are the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
