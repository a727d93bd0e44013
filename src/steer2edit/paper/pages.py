"""A finished suite as a page for documentation: its Markdown, the command that made it on top, its figures beside it.

The page holds no date and no absolute path, so that the same results give the same page.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import FileError
from ..files.writing import replacing, write_text
from .work import PAGE

_FIGURE = re.compile(r"\]\((figures/[^)\s]+\.png)\)")


def write_pages(
    out: str | Path, folder: str | Path, name: str, command: Sequence[str], places: Mapping[Path, str] | None = None
) -> list[Path]:
    """Copies a suite's page and its PNG figures.

    Args:
        out: the suite's directory. folder: gets `NAME.md`, and the figures in `NAME/`.
        command: the words that made it, for the top of the page.
        places: a folder of this machine → what the page calls it, beside OUT, the working directory and the home.

    Returns:
        The files written.

    Raises:
        FileError: the suite has no page yet, or a figure is missing.

    >>> import pathlib
    >>> suite = pathlib.Path(folder) / "suite"
    >>> (suite / "figures").mkdir(parents=True)
    >>> _ = (suite / "paper.md").write_text("# Suite\\n\\n![A](figures/a.png)\\n")
    >>> _ = (suite / "figures" / "a.png").write_bytes(b"")
    >>> page, figure = write_pages(suite, folder, "cpu", ["steer2edit", "paper", "all"])
    >>> page.read_text().splitlines()[:4]
    ['# Suite', '', 'Made by', '']
    >>> page.read_text().splitlines()[-1], figure.name
    ('![A](cpu/a.png)', 'a.png')
    """
    out, folder = Path(out), Path(folder)
    source = out / PAGE
    if not source.is_file():
        raise FileError("the suite has no page yet", got=f"no {PAGE} in {out}", fix="Run the suite first.")
    title, *rest = _one_title(source.read_text(encoding="utf-8")).splitlines()
    text = "\n".join([title, "", "Made by", "", f"    {shlex.join(_relative(command))}", *rest]) + "\n"
    written = []
    for figure in dict.fromkeys(_FIGURE.findall(text)):
        path = out / figure
        if not path.is_file():
            raise FileError("a figure of the page is missing", got=path, fix="Run the suite again.")
        copy = folder / name / path.name
        with replacing(copy) as temporary:
            shutil.copyfile(path, temporary)
        written.append(copy)
    text = _FIGURE.sub(lambda match: f"]({name}/{Path(match[1]).name})", text)
    page = folder / f"{name}.md"
    write_text(page, _without_places(text, {**(places or {}), out: "OUT", Path.cwd(): ".", Path.home(): "~"}))
    return [page, *written]


def _one_title(text: str) -> str:
    """The page with one heading of the first level: the others and those below them go one level down."""
    first, *rest = text.splitlines()
    return "\n".join([first, *(f"#{line}" if line.startswith("#") else line for line in rest)])


def _relative(command: Sequence[str]) -> list[str]:
    """The command's words; of an absolute path the last part."""
    return [Path(word).name if Path(word).is_absolute() else word for word in command]


def _without_places(text: str, names: Mapping[Path, str]) -> str:
    """The text without the folders of this machine."""
    for place, name in names.items():
        if place == Path(place.anchor):  # at the root every path would be one of its own
            continue
        text = text.replace(str(place.resolve()), name)
        if place.is_absolute():
            text = text.replace(str(place), name)
    return text


def command_of(suite: str, options: Mapping[str, object]) -> list[str]:
    """A suite's command line, without options that have no value.

    >>> command_of("all", {"--profile": "cpu", "--data": None, "--set": ["a=1", "b=2"]})
    ['steer2edit', 'paper', 'all', '--profile', 'cpu', '--set', 'a=1', '--set', 'b=2']
    """
    words = ["steer2edit", "paper", suite]
    for name, value in options.items():
        if isinstance(value, list):
            for one in value:
                words += [name, str(one)]
        elif value is not None:
            words += [name, str(value)]
    return words
