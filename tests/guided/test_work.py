"""What a run will cost: the work that is counted is the work that is done, and the timing finds the speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from runs import FakeEngine, tiny_recipe
from sides import small_recipe, write_rows
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.guided import timing
from steer2edit.guided.timing import Speed, about, interventions, measured, rounded, seconds_of
from steer2edit.guided.work import Work, prompts_of, tried_of, work_of
from steer2edit.method.intervention import NOTHING
from steer2edit.pipeline.keys import ORDER
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import run_all
from steer2edit.recipe import Recipe
from steer2edit.searching.plan import Search

pytestmark = pytest.mark.usefixtures("quiet", "undrawn")


@pytest.fixture
def model(pico_folder: str) -> str:
    # Its turns hardly ever end by themselves, so that answers have their longest length.
    return pico_folder


class Counted:
    """Counts, stage by stage, what the transformers engine is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.written: dict[str, int] = {}
        self.asked: dict[str, int] = {}
        self.stage = ""
        counted = self
        generate, losses = TransformersEngine.generate, TransformersEngine.losses

        def counting(engine: Any, requests: Sequence[Request], table: Any, tokens: int, *rest: Any, **more: Any) -> Any:
            counted.written[counted.stage] = counted.written.get(counted.stage, 0) + len(requests) * tokens
            return generate(engine, requests, table, tokens, *rest, **more)

        def counting_losses(engine: Any, pairs: Any, table: Any, *rest: Any) -> Any:
            counted.asked[counted.stage] = counted.asked.get(counted.stage, 0) + len(pairs) * (1 + len(table))
            return losses(engine, pairs, table, *rest)

        monkeypatch.setattr(TransformersEngine, "generate", counting)
        monkeypatch.setattr(TransformersEngine, "losses", counting_losses)


def _run_counted(run: Run, counted: Counted) -> None:
    for stage in ORDER:
        counted.stage = stage
        run_all(run, until=stage)


def _work(run: Run) -> dict[str, Work]:
    work = {part.stage: part for part in work_of(run, run.engine)}
    run.close()
    return work


def _check(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch, stages: Sequence[str]) -> Counted:
    work = _work(Run(folder, recipe))
    counted = Counted(monkeypatch)
    _run_counted(Run(folder, recipe), counted)
    for stage in stages:
        assert work[stage].written == counted.written.get(stage, 0), stage
    return counted


def test_the_tokens_of_a_search_with_numbers_are_counted_to_the_last_one(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(model)
    counted = _check(recipe, tmp_path / "run", monkeypatch, ["traces", "search", "evaluate"])
    # 6 own answers of 5 tokens; 5 candidates on 5 prompts of 4 tokens, and 2 of the neutral answers.
    assert counted.written["traces"] == 6 * 5
    assert counted.written["search"] == 5 * 5 * 4 + 2 * 4


def test_system_prompts_sanity_checks_and_samples_are_counted(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(
        model,
        search__baselines=["system"],
        search__sanity=3,
        search__limits={"over_refusal": None, "degenerate": None},
        evaluation__samples=2,
        evaluation__temperature=1.0,
    )
    work = _work(Run(tmp_path / "run", recipe))
    asking = len(recipe.behaviour.asking())
    assert asking > 0
    assert work["search"].written == (5 + asking) * 5 * 2 * 4 + 2 * 4 + 2 * 3 * 4
    assert work["evaluate"].written == 4 * 5 * 2 * 4 + 2 * 4  # of each method one


def test_the_answers_under_two_instructions_are_counted(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Why {i}?"} for i in range(20)])
    behaviour = {"name": "custom", "more": {"system": "Loud."}, "less": {"system": "Soft."}, "new_tokens": 6}
    recipe = small_recipe(
        model,
        behaviour | {"score": {"phrases": ["the"]}, "weak_contrast": "go on"},
        data={"prompts": prompts, "probe": 6, "validation": 4, "test": 5},
    )
    _check(recipe, tmp_path / "run", monkeypatch, ["traces", "search", "evaluate"])


def test_the_traces_of_two_files_are_counted_by_their_tokens(model: str, tmp_path: Path) -> None:
    more, less = (
        write_rows(tmp_path / f"{side}.jsonl", [{"prompt": f"Why {i}?", "response": f"{side} {i}"} for i in range(20)])
        for side in ("more", "less")
    )
    behaviour = {"name": "custom", "more": {"file": more}, "less": {"file": less}, "score": {"phrases": ["the"]}}
    recipe = small_recipe(model, behaviour, data={"probe": 6, "validation": 4, "test": 5})
    run = Run(tmp_path / "run", recipe)
    work = _work(run)
    assert not work["traces"].is_some
    run_all(run, until="probe")
    probe = json.loads((tmp_path / "run/manifest.json").read_text(encoding="utf-8"))["stages"]["probe"]
    assert probe["seconds"] >= 0
    # 12 traces; each is its prompt in the template and a few tokens of response.
    ids = prompts_of(run.engine, run.items("validation"), None)
    shortest, longest = min(map(len, ids)), max(map(len, ids))
    run.close()
    assert 12 * shortest < work["probe"].passed < 12 * (longest + 20)


def test_a_stage_that_is_whole_costs_nothing_more(model: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", tiny_recipe(model))
    run_all(run, until="probe")
    assert list(_work(run)) == ["search", "evaluate"]


def test_the_test_prompts_are_not_read_for_an_estimate(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run", tiny_recipe(model))
    kind = type(run.recipe.behaviour)
    items, read = kind.items, []

    def watched(self: Any, source: Any, split: Any) -> Any:
        read.append(split)
        return items(self, source, split)

    monkeypatch.setattr(kind, "items", watched)
    assert _work(run)["evaluate"].written > 0
    assert set(read) == {"probe", "validation"}


@pytest.mark.parametrize(
    ("search", "edits", "changed", "kinds"),
    [
        ({"rho_attn": [0.1, 0.2], "rho_mlp": [None], "alpha": [0.2, 0.4], "baselines": []}, 4, 4, 1),
        ({"rho_attn": [0.1, 0.2], "rho_mlp": [None], "steering": [1.0, 2.0], "baselines": ["layer"]}, 2, 2 + 2 + 6, 3),
        # One ladder of three points; as many of steering, two a layer of three layers for each of two kinds.
        ({"rho_mlp": [None], "points": 3}, 3, 3 + 3 + 6 + 6, 5),
        ({"rho_mlp": [None], "points": 3, "layers": ["0-1", "1-2"], "baselines": []}, 6, 12, 2),
        # Two strengths for each of three layers of ROSI, three for each of two ranges of LLM-VA.
        ({"rho_mlp": [None], "points": 3, "layers": ["0-1", "1-2"], "baselines": ["rosi", "llm_va"]}, 6, 24, 4),
        # Each block type alone, and both.
        ({"points": 4, "baselines": []}, 12, 24, 2),
        ({"rho_mlp": [None], "method": "tpe", "trials": 9, "baselines": []}, 9, 18, 2),
        ({"rho_attn": [0.1, 0.2], "rho_mlp": [None], "steering": {"low": 1, "high": 2}, "baselines": []}, 2, 4, 2),
    ],
)
def test_what_a_search_tries_is_counted(search: dict[str, Any], edits: int, changed: int, kinds: int) -> None:
    section = Search(**search)
    tried = tried_of(section, 2)
    asks = 2 if "system" in section.baselines else 0
    assert (tried.edits, tried.changed, tried.prompts, tried.kinds) == (edits, changed, asks, kinds)
    assert (tried.rungs > 0) == (section.automatic or "layer" in section.baselines)


# The timing ---------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that an engine moves on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Paced(FakeEngine):
    """An engine of a known speed, in seconds a token."""

    def __init__(self, clock: Clock, write: float, read: float, compare: float, slots: int = 128):
        super().__init__(answer=lambda prompt, name: "x" * 1000)
        self.clock, self.write, self.read, self.compare = clock, write, read, compare
        self.slots = slots
        self.rows: list[int] = []

    def generate(self, requests: Any, table: Any, max_new_tokens: int, *rest: Any, **more: Any) -> Any:
        answers = super().generate(requests, table, max_new_tokens)
        self.rows.append(len(requests))
        self.clock.now += len(requests) * (max_new_tokens * self.write + 10 * self.read)
        self.clock.now += min(len(requests), len(table)) * 4 * self.read  # what all prompts begin with
        return [type(a)(a.ids[:max_new_tokens], a.text[:max_new_tokens], False) for a in answers]

    def losses(self, pairs: Any, table: Any, progress: Any = None) -> Any:
        self.clock.now += (1 + len(table)) * (4 + len(pairs) * (10 + 14)) * self.compare
        return super().losses(pairs, table)


def _paced(monkeypatch: pytest.MonkeyPatch, **speed: Any) -> tuple[Speed, Paced, float]:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    engine = Paced(clock, **speed)
    # 14 tokens each, 4 of which all of them begin with.
    prompts = [tuple(map(ord, f"same{letter * 10}")) for letter in "abc"]
    before = clock.now
    found = measured(engine, prompts, [NOTHING] * 6, tiny_recipe(evaluation__rows=128))
    return found, engine, clock.now - before


def test_the_timing_finds_the_speed_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    found, engine, _ = _paced(monkeypatch, write=0.002, read=0.0005, compare=0.001)
    assert found.write == pytest.approx(0.002)
    assert found.read == pytest.approx(0.0005)
    assert found.compare == pytest.approx(0.001)
    assert found.rows == max(engine.rows) == 128


def test_the_timing_is_short_whatever_the_engines_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _, seconds = _paced(monkeypatch, write=0.1, read=0.01, compare=0.001)
    assert found.write == pytest.approx(0.1)
    assert 4 <= found.rows < 12
    assert seconds < 15
    _, slots_few, _ = _paced(monkeypatch, write=0.001, read=0.001, compare=0.001, slots=3)
    assert max(slots_few.rows) == 3


def test_the_time_of_a_stage_is_its_tokens_at_that_speed() -> None:
    speed = Speed(rows=8, write=2.0, read=0.5, compare=0.25)
    assert speed.seconds(Work("search", written=3, read=4, compared=8)) == 6 + 2 + 2
    assert speed.seconds(Work("probe", passed=4)) == 3  # it reads, and sums
    seconds = seconds_of([Work("search", written=1)], speed, ["search", "report"])
    assert seconds["search"] == 2
    assert list(seconds) == ["search", "report"]


def test_timed_edits_act_on_the_blocks_that_the_recipe_edits(model: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", tiny_recipe(model))
    attn_alone = interventions(run.engine, run.recipe)
    both = interventions(run.engine, tiny_recipe(model, search__rho_mlp=[0.2]))
    run.close()
    assert len(attn_alone) > 1
    assert {key.partition(".")[2] for key in attn_alone[0].terms} == {"attn"}
    assert {key.partition(".")[2] for key in both[0].terms} == {"attn", "mlp"}
    assert interventions(FakeEngine(), run.recipe) == [NOTHING]  # type: ignore[arg-type]


@pytest.mark.parametrize(("seconds", "words"), [(0, "about 5 s"), (3599, "about 1 h"), (61, "about 1 min")])
def test_a_time_is_said_no_more_exactly_than_it_is(seconds: float, words: str) -> None:
    assert about(seconds) == words


def test_a_count_is_rounded_to_two_digits() -> None:
    assert [rounded(x) for x in (0, 99, 100, 12_345, 999_999)] == ["0", "99", "100", "12 000", "1 000 000"]
