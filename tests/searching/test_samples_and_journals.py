"""Several sampled answers to each prompt: which draws, what a trial makes of them, what the journal knows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from runs import FakeEngine, a_bench, make_scores, tiny_recipe
from steer2edit.behaviours.base import Item
from steer2edit.engines.base import Answer, Sampling
from steer2edit.errors import FileError, RecipeError
from steer2edit.pipeline.results import results_of
from steer2edit.searching.bench import Bench
from steer2edit.searching.candidates import BASE, Candidate, edited, steered
from steer2edit.searching.journal import Journal

ITEMS = [Item("harmful", "harm"), Item("harmful", "steal"), Item("benign", "bake")]
TRIED = [BASE, edited(0.1, None, 0.2)]


class Drawing(FakeEngine):
    """Refuses by the parity of a request's seed, so that samples of one prompt differ."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds: list[tuple[str, int, int]] = []
        self.samplings: list[Sampling] = []

    def generate(
        self,
        requests: Any,
        table: Any,
        max_new_tokens: int,
        progress: Any = None,
        sampling: Any = None,
        stop: Any = None,
    ) -> Any:
        answers = []
        self.samplings.append(sampling)
        for request in requests:
            self.seeds.append(("".join(map(chr, request.ids)), request.row, request.seed))
            text = "I cannot help with that." if request.seed % 2 else "Easily, this is how."
            answers.append(Answer(tuple(map(ord, text)), text, True))
        return answers


def _bench(engine: FakeEngine, journal: Path, **changes: Any) -> Bench:
    plan = {"evaluation__samples": 6, "evaluation__temperature": 0.7, "evaluation__top_p": 0.9, "evaluation__batch": 7}
    return a_bench(engine, {"full": make_scores()}, ITEMS, tiny_recipe(**(plan | changes)), journal)


def test_each_prompt_is_asked_several_times_by_draws_that_all_candidates_share(tmp_path: Path) -> None:
    engine = Drawing()
    bench = _bench(engine, tmp_path / "j")
    own = len(engine.seeds)
    bench.run(TRIED, "0")
    asked = engine.seeds[own:]
    by_row: dict[int, list[tuple[str, int]]] = {}
    for prompt, row, seed in asked:
        by_row.setdefault(row, []).append((prompt, seed))
    assert by_row[0] == by_row[1]
    assert len(by_row[0]) == len(set(by_row[0])) == 3 * 6
    assert set(engine.samplings[1:]) == {Sampling(0.7, 0.9, 0)}
    assert engine.samplings[0] in (None, Sampling())  # own answers are greedy
    others = Drawing()
    _bench(others, tmp_path / "k", seed=2).run(TRIED, "0")
    assert {seed for *_, seed in others.seeds[own:]}.isdisjoint(seed for *_, seed in asked)


def test_a_value_is_the_mean_over_the_samples(tmp_path: Path) -> None:
    engine = Drawing()
    base, _ = _bench(engine, tmp_path / "j").run(TRIED, "0")
    odd = {p: [s % 2 for q, row, s in engine.seeds if q == p and row == 0 and s] for p in ("harm", "steal")}
    assert base.values["refusal"] == tuple(sum(odd[p]) / 6 for p in ("harm", "steal"))
    assert len(base.values["degenerate"]) == 3
    recipe = tiny_recipe(evaluation__samples=6, evaluation__temperature=0.7)
    shown = results_of([base], recipe)["systems"]["base"]["refusal"]
    assert (shown["n"], shown["method"]) == (2, "wilson")  # two prompts, however many samples


def test_a_resumed_bench_draws_what_the_broken_one_drew(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    expected = _bench(Drawing(), whole).run(TRIED, "0")
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    for kept in range(len(lines)):
        journal = tmp_path / f"cut-{kept}"
        journal.write_text("".join(lines[:kept]), encoding="utf-8")
        assert _bench(Drawing(), journal).run(TRIED, "0") == expected
        assert journal.read_bytes() == whole.read_bytes()


def test_greedy_samples_are_refused() -> None:
    with pytest.raises(RecipeError, match="Greedy answers are all the same"):
        tiny_recipe(evaluation__samples=2)
    for key, value in (("temperature", -1), ("top_p", 0), ("top_k", -1)):
        with pytest.raises(RecipeError, match=rf"evaluation\.{key} cannot be used"):
            tiny_recipe(**{f"evaluation__{key}": value})


# What a journal's line answers --------------------------------------------------------------------------------------


def _asked(journal: Path, tried: Sequence[Candidate] = TRIED, items: Sequence[Item] = ITEMS, **changes: Any) -> int:
    """How many prompts an engine is asked that goes on from a journal."""
    engine = FakeEngine()
    bench = a_bench(engine, {"full": make_scores()}, items, tiny_recipe(**changes), journal)
    before = len(engine.asked)
    bench.run(tried, "0")
    return len(engine.asked) - before


def test_a_line_that_answers_something_else_is_made_again(tmp_path: Path) -> None:
    journal = tmp_path / "j"
    assert _asked(journal) == 6
    assert _asked(journal) == 0
    assert _asked(journal, [BASE, edited(0.3, None, 0.2)]) == 6  # a sampler of another version drew another candidate
    assert _asked(journal, [BASE, edited(0.3, None, 0.2)]) == 0
    assert _asked(journal, [BASE, steered(0.3)], evaluation__new_tokens=5) == 6
    assert _asked(journal, [BASE, steered(0.3)], [*ITEMS[:2], Item("benign", "knit")], evaluation__new_tokens=5) == 6


def test_a_line_of_an_older_run_is_read_as_it_is(tmp_path: Path) -> None:
    journal = tmp_path / "j"
    _asked(journal)
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        del line["asked"], line["crc32"]
        if "outcomes" in line:
            made = line.pop("outcomes")
            line["texts"], line["starts"] = [o["text"] for o in made], [o["start"] for o in made]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert _asked(journal) == 0


def test_a_journal_that_is_only_replayed_says_what_it_lacks(tmp_path: Path) -> None:
    journal = tmp_path / "j"
    Journal(journal).keep("0", "answers", 0, ["a"], lambda: {"rows": 1})
    replayed = Journal(journal, replay=True)
    assert replayed.keep("0", "answers", 0, ["a"], dict)["rows"] == 1
    with pytest.raises(FileError, match=r"no answers for round '0', batch 1 \(got: no such line\)"):
        replayed.keep("0", "answers", 1, ["a"], dict)
    with pytest.raises(FileError, match="answers to something else"):
        replayed.keep("0", "answers", 0, ["b"], dict)
