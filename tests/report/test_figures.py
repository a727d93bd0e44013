"""The figures: no text lies over another or leaves its axes, nothing empty is drawn, and signs show without colour."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pages import make_contents, random_scores
from steer2edit.errors import FileError
from steer2edit.files.writing import write_json
from steer2edit.pipeline.report import compare
from steer2edit.report import comparison, figures
from steer2edit.report.comparison import Compared, comparison_figure, comparison_table
from steer2edit.report.drawing import LOOKS, SERIES


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn from now on, none of which is saved."""
    kept: list[Any] = []

    def keep(figure: Any, path: Path) -> list[Path]:
        kept.append(figure)
        return [path.with_suffix(".png")]

    monkeypatch.setattr(figures, "save", keep)
    monkeypatch.setattr(comparison, "save", keep)
    return kept


def _assert_legible(figure: Any) -> None:
    """No two labels overlap, each is within its axes, and the legend covers no axes."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    for axis in figure.axes:
        frame = axis.get_window_extent(renderer)
        boxes = [text.get_window_extent(renderer) for text in axis.texts if text.get_text()]
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other)
        for box in boxes:
            assert frame.padded(1).fully_containsx(box.x0)
            assert frame.padded(1).fully_containsx(box.x1)
            assert frame.padded(1).fully_containsy(box.y0)
            assert frame.padded(1).fully_containsy(box.y1)
        for legend in figure.legends:
            assert not legend.get_window_extent(renderer).overlaps(frame)
        assert axis.get_legend() is None


def _trade_off(trials: int = 40, **limits: float) -> None:
    contents = make_contents(trials, 30)
    assert contents.study is not None
    assert contents.choice is not None
    choice = {**contents.choice, "limits": {**contents.choice["limits"], **limits}}
    measures = contents.recipe.behaviour.measures
    figures.trade_off(contents.study.trials, choice, measures, Path("trade_off"), resamples=50)


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.1, 0.2, 0.3, 0.4])
def test_labels_limit_and_legend_cover_nothing(drawn: list[Any], limit: float) -> None:
    _trade_off(utility_loss=limit, over_refusal=2 * limit)
    (figure,) = drawn
    _assert_legible(figure)
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert f"limit {limit:g}" in texts
    assert "edit" in texts


def test_a_limit_far_from_every_point_does_not_squeeze_them(drawn: list[Any]) -> None:
    _trade_off(utility_loss=50.0)
    axis = drawn[0].axes[0]
    assert axis.get_xlim()[1] < 1
    assert not any(text.get_text().startswith("limit") for text in axis.texts)


def test_every_trial_is_drawn_and_the_chosen_have_error_bars(drawn: list[Any]) -> None:
    contents = make_contents(40, 30)
    _trade_off()
    axis = drawn[0].axes[0]
    assert contents.study is not None
    attribute = contents.recipe.behaviour.attribute.name
    points = {
        (float(x), float(y))
        for line in axis.lines
        if line.get_linestyle() == "None"
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }
    for trial in contents.study.trials:
        assert (trial.mean("utility_loss"), trial.mean(attribute)) in points
    assert contents.choice is not None
    chosen = [kind for kind in LOOKS if contents.choice.get(kind)]
    assert len(axis.containers) == len(chosen) > 1


def test_methods_differ_in_shape_and_in_lightness() -> None:
    from matplotlib.colors import to_rgb

    assert len({look.marker for look in LOOKS.values()}) == len(LOOKS)
    assert len(set(SERIES)) == len(SERIES)
    light = sorted(float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114))) for colour in SERIES)
    assert light[0] == 0
    assert light[-1] - light[0] > 0.6


def test_each_measure_has_a_panel_with_every_system(drawn: list[Any]) -> None:
    contents = make_contents(40, 30)
    results = contents.results
    assert results is not None
    figures.each_measure(results, Path("measures"))
    panels = [axis for axis in drawn[0].axes if axis.get_visible()]
    shown = [m for m in results["measures"] if m["column"] and results["systems"]["base"][m["name"]]["n"]]
    assert [axis.get_title(loc="left") for axis in panels] == [
        f"{m['title']}, n = {results['systems']['base'][m['name']]['n']}" for m in shown
    ]
    for axis, measure in zip(panels, shown, strict=True):
        means = [float(container[0].get_xdata()[0]) for container in axis.containers]
        assert means == [system[measure["name"]]["mean"] for system in results["systems"].values()]
    _assert_legible(drawn[0])


def test_a_block_type_that_is_off_has_no_panel(drawn: list[Any]) -> None:
    scores = random_scores(4, 6, 50)
    for rho_attn, rho_mlp, titles in ((0.3, None, ["attn"]), (None, 0.3, ["mlp"]), (0.3, 0.3, ["attn", "mlp"])):
        figures.heat_map(scores.edit(rho_attn=rho_attn, rho_mlp=rho_mlp, alpha=0.5), Path("lambda"))
        panels = [axis for axis in drawn[-1].axes if axis.get_title()]
        assert [axis.get_title().split(":")[0] for axis in panels] == titles
    figures.heat_map(scores.edit(rho_attn=None, rho_mlp=None, alpha=0.5), Path("lambda"))
    assert [text.get_text() for text in drawn[-1].axes[0].texts] == ["The edit touches no component."]


def test_what_is_suppressed_carries_a_minus(drawn: list[Any]) -> None:
    edit = random_scores(4, 6, 50).edit(rho_attn=0.3, rho_mlp=None, alpha=0.5)
    figures.heat_map(edit, Path("lambda"))
    axis = drawn[0].axes[0]
    (minuses,) = axis.collections
    marked = {(int(layer), int(head)) for head, layer in minuses.get_offsets()}
    assert marked == {(s.site.layer, int(i)) for s in edit.sites.values() for i in (s.lam < 0).nonzero()}
    assert marked


def test_the_same_numbers_give_the_same_files(tmp_path: Path) -> None:
    edit = random_scores(2, 3, 5).edit(rho_attn=0.3, rho_mlp=None, alpha=0.5)
    one, other = (figures.heat_map(edit, tmp_path / name / "lambda") for name in ("one", "other"))
    assert [path.suffix for path in one] == [".png", ".svg", ".pdf"]
    for a, b in zip(one, other, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert one[2].read_bytes().startswith(b"%PDF")


# Several runs --------------------------------------------------------------------------------------------------------


def _results(**changes: Any) -> dict[str, Any]:
    results = make_contents(40, 30).results
    assert results is not None
    return {**results, **changes}


def test_runs_stand_on_one_axis_with_their_own_values(drawn: list[Any]) -> None:
    runs = [Compared("one", _results()), Compared("two", _results())]
    comparison_figure(runs, Path("compare"))
    (axis,) = drawn[0].axes
    assert axis.get_ylabel() == runs[0].attribute["title"]
    systems = runs[0].results["systems"]
    assert len(axis.containers) == 2 * len(systems)
    name = runs[0].attribute["name"]
    for container, system in zip(axis.containers, systems.values(), strict=False):
        assert float(container[0].get_ydata()[0]) == system[name]["mean"]
        assert float(container[0].get_xdata()[0]) == system["utility_loss"]["mean"]
    _assert_legible(drawn[0])
    header, rows = comparison_table(runs)
    assert header == ["run", "system", "configuration", runs[0].attribute["title"], "KL per token", "n"]
    assert [row[0] for row in rows] == ["one"] * len(systems) + ["two"] * len(systems)


def test_runs_of_different_measures_stand_on_their_scales(drawn: list[Any]) -> None:
    other = _results()
    measure = {"name": "words", "title": "words", "better": "lower", "column": True, "scale": [80.0, 20.0]}
    cell = {"mean": 50.0, "low": 35.0, "high": 65.0, "n": 9}
    other["measures"] = [measure, *other["measures"]]
    other["attribute"] = "words"
    other["systems"] = {kind: {**system, "words": cell} for kind, system in other["systems"].items()}
    runs = [Compared("one", _results()), Compared("two", other)]
    comparison_figure(runs, Path("compare"))
    (axis,) = drawn[0].axes
    assert axis.get_ylabel() == "share of the attribute's scale, from worst to best"
    last = axis.containers[-1]
    assert float(last[0].get_ydata()[0]) == pytest.approx(0.5)  # (50 − 80)/(20 − 80)
    ends = last[2][1].get_segments()[0][:, 1]
    np.testing.assert_allclose(sorted(ends), [0.25, 0.75])  # 65 words are worse than 35
    header, rows = comparison_table(runs)
    assert header[3:5] == ["measure", "on test"]
    assert rows[-1][3:5] == ["words", "50.00 [35.00, 65.00]"]


def test_runs_are_compared_from_their_folders(tmp_path: Path) -> None:
    for name in ("a/run", "b/run"):
        write_json(tmp_path / name / "evaluation/results.json", _results())
    files = compare([tmp_path / "a/run", tmp_path / "b/run"], tmp_path / "out")
    assert [path.name for path in files] == ["compare.md", "compare.png", "compare.svg", "compare.pdf"]
    table = files[0].read_text(encoding="utf-8")
    assert f"| {tmp_path / 'a/run'} | original | – |" in table  # the folders have the same name
    assert "![runs compared](compare.png)" in table


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "run/evaluation/results.json", _results())
    with pytest.raises(FileError, match=r"nothing to compare .*1 run.* Give two or more"):
        compare([tmp_path / "run"], tmp_path / "out")
    with pytest.raises(FileError, match=r"is no finished run .*evaluation/results\.json"):
        compare([tmp_path / "run", tmp_path / "nothing"], tmp_path / "out")
    write_json(tmp_path / "old/evaluation/results.json", {"systems": {}})
    with pytest.raises(FileError, match="has no measures"):
        compare([tmp_path / "run", tmp_path / "old"], tmp_path / "out")
    many = [Compared(str(i), _results()) for i in range(len(SERIES) + 1)]
    with pytest.raises(FileError, match="too many runs"):
        comparison_figure(many, tmp_path / "compare")
