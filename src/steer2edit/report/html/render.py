"""The page: sections as one HTML file that holds its styles, scripts, charts and data, and needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...files.writing import write_text
from .contents import REASONS, Contents
from .sections import SECTIONS
from .texts import visible

PAGE = "report.html"
_CHARTS = "plotly/plotly-cartesian.min.js"
_SCRIPTS = ("page.js", "trade_off.js", "components.js", "diff.js", "answers.js", "start.js")


def write_page(contents: Contents, path: Path) -> None:
    """Writes the page of a run, finished or not."""
    write_text(path, page_of(contents))


def page_of(contents: Contents) -> str:
    """The page as text. Sections for which there is nothing are left out, and the page says which stage would give
    them."""
    shown = [(section, data) for section in SECTIONS if (data := section.data(contents)) is not None]
    ids = [section.id for section, _ in shown]
    absent = [section for section in SECTIONS if section.id not in ids and section.needs is not None]
    script_data = {s.id: data for s in SECTIONS if s.id in ids and (data := s.script(contents)) is not None}
    scripts = [_asset(_CHARTS), "\n".join(_asset(name) for name in _SCRIPTS)]
    drawn = [{"id": section.id, "link": section.link, "title": section.title, "data": data} for section, data in shown]
    return _environment().get_template("page.html.j2").render(
        recipe=contents.recipe,
        version=contents.manifest.get("steer2edit", ""),
        sections=drawn,
        missing=[{"title": section.title, "stage": section.needs} for section in absent],
        unfinished=[{"name": stage.name, "reason": REASONS[stage.state]} for stage in contents.unfinished],
        styles=_markup(_asset("page.css")),
        scripts=[_markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
        payload=_markup(_json(script_data)),
    )  # fmt: skip


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("steer2edit.report.html"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"exact": repr, "short": _short}
    return environment


def _shown(value: Any) -> Any:
    """Every text of a template, with hidden characters in sight; what is markup already is ours."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return visible(value)
    return value


def _short(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


def _json(value: Mapping[str, Any]) -> str:
    """JSON that ends no script element, whatever the texts in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.encode("utf-8", "replace").decode("utf-8")  # a half of a surrogate pair is no text
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _asset(name: str) -> str:
    text = (files("steer2edit.report.html") / "assets" / name).read_text(encoding="utf-8")
    return text.replace("</script", "<\\/script")


def _hash(script: str) -> str:
    """As a content security policy names a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
