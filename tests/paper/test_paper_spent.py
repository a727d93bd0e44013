"""What a suite took beside its estimate: a clock that outlives kills, sums by hand; and a suite's page for the docs."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

import pytest

from steer2edit.errors import FileError
from steer2edit.paper import clock as clocks
from steer2edit.paper.clock import Clock
from steer2edit.paper.cost import cost_of
from steer2edit.paper.forecast import Forecast
from steer2edit.paper.pages import command_of, write_pages
from steer2edit.paper.plan import plan_suite
from steer2edit.paper.spent import Spent, said_of, spent_markdown, spent_of, write_spent

ESTIMATED = {"one": {"search": 100.0, "evaluate": 50.0}, "two": {"search": 100.0, "side effects": 10.0}}
TAKEN = {"one": {"search": 120.0, "evaluate": 40.0}, "two": {"search": 90.0}, "all runs": {"side effects": 36.0}}


def test_a_clock_goes_on_counting_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    path = tmp_path / "clock.json"
    with Clock(path).counting("a run", "search"):
        now[0] += 10

    def stopped() -> None:
        with Clock(path).counting("a run", "search"):
            now[0] += 5
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with Clock(path).counting("a run", "evaluate"):
        now[0] += 2
    assert Clock(path).taken == {"a run": {"search": 15.0, "evaluate": 2.0}}


def test_a_killed_part_loses_a_few_seconds_of_its_count_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "_EVERY", 0.01)
    path = tmp_path / "clock.json"
    with Clock(path).counting("a run", "search"):
        deadline = time.monotonic() + 5
        while Clock(path).taken.get("a run", {}).get("search", 0.0) < 0.1 and time.monotonic() < deadline:
            time.sleep(0.01)
        # What a process that starts now would read, while the first one never ends its part.
        assert Clock(path).taken["a run"]["search"] >= 0.1


def test_a_file_that_is_no_clocks_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "clock.json").write_text('{"a": 3}', encoding="utf-8")
    with pytest.raises(FileError, match=r"clock\.json holds no times \(got: dict\)\. Delete it\."):
        Clock(tmp_path / "clock.json")


def test_estimated_and_taken_are_summed_by_part(tmp_path: Path) -> None:
    spent = Spent(ESTIMATED, TAKEN)
    assert spent.rows() == [("search", 200.0, 210.0), ("evaluate", 50.0, 40.0), ("side effects", 10.0, 36.0)]
    assert spent.totals == (260.0, 286.0)
    assert said_of(spent) == "It took 5 min; 4 min were estimated before it, a factor of 1.10."
    assert "| search | 3 min | 4 min | 1.05 |" in spent_markdown(spent)
    data = json.loads(write_spent(spent, tmp_path).read_text(encoding="utf-8"))
    assert data["all"] == {"estimated": 260.0, "taken": 286.0, "ratio": pytest.approx(1.1)}
    assert data["parts"][2] == {"part": "side effects", "estimated": 10.0, "taken": 36.0}
    assert data["taken"]["one"]["search"] == 120.0


def test_without_an_estimate_the_time_that_it_took_stands_alone(tmp_path: Path) -> None:
    for estimated in ({}, {"one": {}, "two": {"search": 1.0}}):
        spent = Spent(estimated, TAKEN)
        assert spent.totals is None
        assert said_of(spent) == "It took 5 min; no time was estimated before it."
        assert json.loads(write_spent(spent, tmp_path).read_text(encoding="utf-8"))["all"] is None
    assert "| search | – | 4 min | – |" in spent_markdown(Spent({}, TAKEN))


def test_parts_of_another_suite_in_the_same_folder_do_not_count(tmp_path: Path) -> None:
    plan = plan_suite("safety", tmp_path, profile="smoke")
    cost = cost_of(plan.runs[0], plan)
    name = plan.runs[0].name
    found = [Forecast(cost, dict.fromkeys(cost.parts, 1.0))]
    taken = {name: {"search": 5.0, "ablations": 90.0}, "all runs": {"tables and figures": 2.0}}
    assert spent_of(found, taken).taken == {name: {"search": 5.0}, "all runs": {"tables and figures": 2.0}}
    taken["another-model-safety"] = {"search": 800.0}
    taken["all runs"]["side effects"] = 400.0
    assert spent_of(found, taken).taken == {name: {"search": 5.0}, "all runs": {"tables and figures": 2.0}}


def test_without_forecasts_all_that_was_taken_counts() -> None:
    assert spent_of([], TAKEN).taken == TAKEN


# A page for the documentation -----------------------------------------------------------------------------------------


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    out = tmp_path / "runs" / "suite"
    (out / "figures").mkdir(parents=True)
    (out / "figures" / "trade_off.png").write_bytes(b"a figure")
    lines = ["# The suite", "", "# Trade-off", "", "## A model", "", "![A](figures/trade_off.png)", ""]
    (out / "paper.md").write_text("\n".join([*lines, f"- not measured: no {out}/data.jsonl"]) + "\n", encoding="utf-8")
    return out


def test_a_page_has_one_title_the_command_and_its_figures_beside_it(suite: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs" / "results"
    page, figure = write_pages(suite, docs, "all-cpu", ["steer2edit", "paper", "all", "--data", "/somewhere/sets"])
    text = page.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# The suite"]
    assert text.startswith(
        "# The suite\n\nMade by\n\n    steer2edit paper all --data sets\n\n## Trade-off\n\n### A model\n"
    )
    assert "![A](all-cpu/trade_off.png)" in text
    assert figure.read_bytes() == b"a figure"
    assert figure == docs / "all-cpu" / "trade_off.png"
    assert str(tmp_path) not in text  # nothing of this machine
    before = {path: path.read_bytes() for path in docs.rglob("*") if path.is_file()}
    write_pages(suite, docs, "all-cpu", ["steer2edit", "paper", "all", "--data", "/somewhere/sets"])
    assert {path: path.read_bytes() for path in docs.rglob("*") if path.is_file()} == before


def test_a_page_names_no_folder_of_the_sets(suite: Path, tmp_path: Path) -> None:
    (suite / "paper.md").write_text("# The suite\n\n- no file in /data/sets\n", encoding="utf-8")
    (page,) = write_pages(suite, tmp_path / "docs", "of-sets", [], {Path("/data/sets"): "DATA"})
    assert page.read_text(encoding="utf-8").endswith("- no file in DATA\n")


def test_a_suite_without_a_page_or_a_figure_is_one_sentence(suite: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="the suite has no page yet"):
        write_pages(tmp_path / "nowhere", tmp_path, "x", [])
    (suite / "figures" / "trade_off.png").unlink()
    with pytest.raises(FileError, match="a figure of the page is missing"):
        write_pages(suite, tmp_path, "x", [])


def test_the_command_gives_the_plan_again(tmp_path: Path) -> None:
    words = command_of("styles", {"--profile": "smoke", "--seeds": 2, "--set": ["data.test=4"], "--data": None})
    assert shlex.join(words) == "steer2edit paper styles --profile smoke --seeds 2 --set data.test=4"
