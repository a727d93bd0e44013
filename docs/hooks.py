"""What the site has beside the pages in this folder. MkDocs calls these functions by their names.

`recipe_reference.md` is made from the recipe's schema. `contributing.md`, `security.md` and `changelog.md` are the
files beside the README. `results.md` gets the README's sections of numbers, so that those stand in one place.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from recipe_reference import descriptions, reference_page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
README = "README.md"
MEASURED = ("What the demo measured", "What it costs", "Supported models")
COPIED = {"contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md", "changelog.md": "CHANGELOG.md"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made."""
    said = descriptions((DOCS / "recipe.md").read_text(encoding="utf-8"))
    made = {"recipe_reference.md": reference_page(said)}
    for page, file in COPIED.items():
        made[page] = of_the_root((ROOT / file).read_text(encoding="utf-8"))
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links that leave this folder lead to where the site has the same, or are text alone."""
    if page.file.src_uri == "results.md":
        readme = (ROOT / README).read_text(encoding="utf-8")
        markdown += "".join(f"\n## {title}\n{of_the_root(section(readme, title))}" for title in MEASURED)
    return _LINK.sub(_inside, markdown)


def section(page: str, title: str) -> str:
    """What stands under a heading of the second level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    if found is None:
        raise KeyError(f"there is no section {title!r}")
    return found[1]


def of_the_root(text: str) -> str:
    """A text from the folder above, with its links as they are from this folder."""

    def moved(match: re.Match[str]) -> str:
        image, words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        return f"{image}[{words}]({target.removeprefix('docs/') if target.startswith('docs/') else '../' + target})"

    return _LINK.sub(moved, text)


def _inside(match: re.Match[str]) -> str:
    image, words, target = match.groups()
    if not target.startswith("../"):
        return match[0]
    file, _, anchor = target.removeprefix("../").partition("#")
    anchors = {slug(title) for title in MEASURED}
    if file == README and anchor in anchors:
        return f"{image}[{words}](results.md#{anchor})"
    if file == README:
        return f"{image}[{words}](start.md)"
    for page, copied in COPIED.items():
        if file == copied:
            return f"{image}[{words}]({page})"
    return words


def slug(title: str) -> str:
    """A heading's anchor, as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
