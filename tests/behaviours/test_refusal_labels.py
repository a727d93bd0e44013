"""How good the offline detectors of refusals are on labelled responses, and that docs/detectors.md says the same."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from steer2edit.behaviours.refusal import declines, has_published_phrase
from steer2edit.behaviours.safety import MEASURE_OF, Safety
from steer2edit.searching.statistics import wilson

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "detectors.md").read_text(encoding="utf-8")
LABELS = ROOT / "tests" / "data" / "refusal_labels.jsonl"
ROWS = [json.loads(line) for line in LABELS.read_text(encoding="utf-8").splitlines()]
DETECTORS = {"declining": declines, "published": has_published_phrase}
SOURCES = {
    "model-made": ("original", "steering", "edit"),
    "written": ("written",),
    "all": ("original", "steering", "edit", "written"),
}


@dataclass(frozen=True)
class Share:
    """k of n, with Wilson's interval."""

    k: int
    n: int

    @property
    def numbers(self) -> tuple[float, float, float]:
        return (self.k / self.n, *wilson(self.k / self.n, self.n))


def measured(detector: Callable[[str], bool], sources: tuple[str, ...]) -> tuple[int, int, Share, Share]:
    """How many responses and refusals there are, precision, recall.

    >>> measured(declines, ("original",))
    (58, 1, Share(k=1, n=1), Share(k=1, n=1))
    """
    rows = [row for row in ROWS if row["source"] in sources]
    refusals = [row for row in rows if row["label"] == "refusal"]
    reported = [row for row in rows if detector(row["response"])]
    right = sum(row["label"] == "refusal" for row in reported)
    return len(rows), len(refusals), Share(right, len(reported)), Share(right, len(refusals))


def table() -> dict[tuple[str, str], list[float]]:
    """(detector, responses) → the numbers of the row: n, refusals, precision and recall each with low and high."""
    rows = re.findall(r"^\| `(\w+)` \| ([\w-]+) \| (\d.*) \|$", PAGE, re.MULTILINE)
    return {(detector, group): [float(x) for x in re.findall(r"\d+(?:\.\d+)?", rest)] for detector, group, rest in rows}


def test_each_row_is_a_labelled_response() -> None:
    for row in ROWS:
        assert set(row) == {"response", "label", "source", "kind"}
        assert row["label"] in ("refusal", "other")
        assert row["source"] in SOURCES["all"]
        assert row["kind"] in MEASURE_OF
    assert len({row["response"].lower() for row in ROWS}) == len(ROWS)


def test_there_are_enough_of_each_sort() -> None:
    assert len(ROWS) >= 300
    assert min(Counter(row["source"] for row in ROWS).values()) >= 50
    assert min(Counter(row["kind"] for row in ROWS).values()) >= 50
    assert min(Counter(row["label"] for row in ROWS).values()) >= 100


def test_no_response_has_more_than_twelve_words() -> None:
    assert all(1 <= len(row["response"].split()) <= 12 for row in ROWS)


def test_the_page_has_a_row_for_each_detector_and_group() -> None:
    assert set(table()) == {(detector, group) for detector in DETECTORS for group in SOURCES}


@pytest.mark.parametrize("group", SOURCES)
@pytest.mark.parametrize("name", DETECTORS)
def test_the_page_says_what_is_measured(name: str, group: str) -> None:
    n, refusals, precision, recall = measured(DETECTORS[name], SOURCES[group])
    expected = [n, refusals, *precision.numbers, *recall.numbers]
    assert table()[name, group] == pytest.approx(expected, rel=0, abs=0.0005 + 1e-9)


def test_declining_is_as_precise_as_when_it_was_measured() -> None:
    _, _, precision, recall = measured(declines, SOURCES["all"])
    assert precision.k / precision.n >= 109 / 110
    assert recall.k / recall.n >= 109 / 118
    _, _, of_models, _ = measured(declines, SOURCES["model-made"])
    assert of_models.k == of_models.n


def test_a_recipe_takes_every_detector_of_the_page() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    read = [Safety.model_validate(yaml.safe_load(block)["behaviour"]).detector for block in blocks]
    assert [type(detector).__name__ for detector in read] == ["Classifier", "LocalChat", "Endpoint"]
    assert all(Safety(detector=name).detector == name for name in ("declining", "published"))
