"""The edits that come with the package: `gallery:NAME` wherever the path of an edit or of a shared folder may stand."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ..errors import FileError

GALLERY = "gallery:"
EDIT, CARD, CHOICE, RESULTS, RECIPE = "edit.safetensors", "README.md", "choice.json", "results.json", "recipe.yaml"


def gallery() -> dict[str, Path]:
    """Name → folder, each with an edit, its card, the recipe that made it, what was chosen and what that measured.

    >>> "pirate" in gallery()
    True
    """
    shelf = Path(str(files("steer2edit") / "data" / "gallery"))
    return {folder.name: folder for folder in sorted(shelf.iterdir()) if (folder / EDIT).is_file()}


def is_of_gallery(place: str | Path) -> bool:
    return str(place).startswith(GALLERY)


def folder_of(place: str | Path) -> Path:
    """The folder of `gallery:NAME`; any other path as it is.

    Raises:
        FileError: there is no such edit.
    """
    if not is_of_gallery(place):
        return Path(place)
    known, name = gallery(), str(place).removeprefix(GALLERY)
    if name not in known:
        raise FileError("no such edit in the gallery", got=name or "no name", fix=f"It has {', '.join(known)}.")
    return known[name]


def edit_file(place: str | Path) -> Path:
    """The edit file of `gallery:NAME`; any other path as it is. Raises FileError as `folder_of` does."""
    return folder_of(place) / EDIT if is_of_gallery(place) else Path(place)
