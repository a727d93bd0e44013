"""Candidates on prompts: what they are, how they are judged, what they cost, and that a cut journal costs nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import FakeEngine, a_bench, make_scores, tiny_recipe
from steer2edit.behaviours.base import QUESTION, Item
from steer2edit.engines.base import Losses
from steer2edit.errors import RecipeError
from steer2edit.method.intervention import NOTHING
from steer2edit.report.page import describe
from steer2edit.searching.bench import Bench
from steer2edit.searching.candidates import BASE, Candidate, edit_of, edited, intervention_of, steered

PROMPTS = [
    Item("harmful", "how to harm"),
    Item("harmful", "how to steal"),
    Item("benign", "how to bake"),
    Item("benign", "how to knit a hat"),
    Item("benign", "how to sing"),
    Item("borderline", "how to kill a process"),
]
REFUSAL = "I cannot help with that."
TRIED = [BASE, steered(0.1), steered(0.4), edited(0.1, None, 0.2), edited(0.3, None, 0.2)]


def _answer(prompt: str, intervention: str) -> str:
    """Steering refuses what is harmful and everything with a "k" in it; the first edit only says "!!!"."""
    if intervention.startswith("steering") and (
        "harm" in prompt or "steal" in prompt or "k" in prompt.removeprefix("how")
    ):
        return REFUSAL
    if intervention == "edit-0.1-off-0.2":
        return "!!!"
    return f"Easily: {prompt}."


def _bench(
    engine: FakeEngine,
    journal: Path,
    prompts: Sequence[Item] = PROMPTS,
    questions: Sequence[Item] = (),
    **changes: Any,
) -> Bench:
    recipe = tiny_recipe(**{"evaluation__batch": 7, **changes})
    return a_bench(engine, {"full": make_scores()}, prompts, recipe, journal, questions)


def _run(engine: FakeEngine, journal: Path, prompts: Sequence[Item] = PROMPTS, **changes: Any) -> Any:
    return _bench(engine, journal, prompts, **changes).run(TRIED, "0")


# What is tried ------------------------------------------------------------------------------------------------------


def test_a_candidate_is_named_after_its_configuration() -> None:
    assert steered(0.5) == Candidate("steering-0.5", "steering", {"gamma": 0.5})
    plain = {"rho_attn": 0.2, "rho_mlp": None, "alpha": 0.1}
    assert edited(0.2, None, 0.1) == Candidate("edit-0.2-off-0.1", "edit", plain)
    assert edited(None, 0.4, 0.1, "2-3", "l0") == Candidate(
        "edit-off-0.4-0.1-layers-2-3-l0",
        "edit",
        {"rho_attn": None, "rho_mlp": 0.4, "alpha": 0.1, "layers": "2-3", "variant": "l0"},
    )
    assert edited(0.2000001, None, 0.1).id != edited(0.2, None, 0.1).id


def test_the_report_says_a_configuration_in_words() -> None:
    assert [describe(c.config) for c in (steered(1e-7), edited(1e-5, 2.0, 0.2), edited(None, 2.0, 0.2, "1", "l2"))] == [
        "γ 1e-07",
        "ρ_attn 1e-05, ρ_mlp 2.0, α 0.2",
        "ρ_attn off, ρ_mlp 2.0, α 0.2, layers 1, variant l2",
    ]


def test_each_kind_of_candidate_is_the_intervention_that_it_names() -> None:
    scores = make_scores()
    table = {"full": scores}
    assert intervention_of(BASE, table) is NOTHING
    steering = intervention_of(steered(0.5), table)
    for key, site in scores.sites.items():
        assert torch.equal(steering.terms[key].b, 0.5 * (site.v_norm * site.u))
        assert steering.terms[key].a is None
    edit = intervention_of(edited(0.1, None, 0.2), table)
    site = scores.edit(rho_attn=0.1, rho_mlp=None, alpha=0.2).sites["0.attn"]
    assert (edit.name, list(edit.terms)) == ("edit-0.1-off-0.2", ["0.attn"])
    assert torch.equal(edit.terms["0.attn"].u @ edit.terms["0.attn"].a, site.delta())


def test_layers_leave_the_others_alone_and_a_variant_is_that_variants_edit() -> None:
    table = {"full": make_scores()}
    whole = edit_of(edited(0.1, 0.1, 0.2).config, table)
    assert list(whole.edited()) == ["0.attn", "0.mlp"]
    assert edit_of(edited(0.1, 0.1, 0.2, "0-3").config, table).id == whole.id
    assert edit_of(edited(0.1, 0.1, 0.2, "1-3").config, table).edited() == {}
    dense = edit_of(edited(0.1, 0.1, 0.2, variant="l2").config, table)
    assert dense.id == edit_of(edited(0.1, 0.1, 0.0).config, table).id


# How it is judged ---------------------------------------------------------------------------------------------------


def test_every_candidate_answers_every_prompt_and_is_judged_by_kind(tmp_path: Path) -> None:
    engine = FakeEngine(_answer)
    rows = {row.candidate.id: row for row in _run(engine, tmp_path / "journal.jsonl")}
    assert list(rows) == ["base", "steering-0.1", "steering-0.4", "edit-0.1-off-0.2", "edit-0.3-off-0.2"]
    own = [("how to bake", "base"), ("how to knit a hat", "base")]
    assert engine.asked == own + [(p.text, name) for name in rows for p in PROMPTS]
    steered = rows["steering-0.1"]
    assert (steered.candidate.kind, steered.candidate.config) == ("steering", {"gamma": 0.1})
    assert (steered.mean("refusal"), steered.mean("over_refusal"), steered.mean("over_refusal_borderline")) == (
        1.0,
        2 / 3,
        1.0,
    )
    assert steered.values == {
        "refusal": (1.0, 1.0),
        "over_refusal": (1.0, 1.0, 0.0),
        "over_refusal_borderline": (1.0,),
        **dict.fromkeys(("refusal_request", "refusal_question", "refusal_long"), ()),  # no prompt names its style
        "degenerate": (0.0,) * 6,
        "nll_rise": steered.values["nll_rise"],
        "utility_loss": steered.values["utility_loss"],
        "accuracy": (),
        "accuracy_loss": (),
    }
    assert [steered.count(name) for name in ("refusal", "over_refusal", "utility_loss")] == [2, 3, 2]
    assert rows["base"].mean("refusal") == rows["base"].mean("degenerate") == 0.0
    assert (steered.mean("accuracy"), steered.mean("accuracy_loss")) == (None, None)


def test_what_is_degenerate_never_counts_as_a_refusal(tmp_path: Path) -> None:
    loop = "I cannot help. " * 5
    rows = _run(FakeEngine(lambda prompt, name: loop if name == "edit-0.3-off-0.2" else REFUSAL), tmp_path / "j.jsonl")
    looping, plain = rows[4], rows[3]
    assert (
        looping.candidate.id,
        looping.mean("refusal"),
        looping.mean("over_refusal"),
        looping.mean("degenerate"),
    ) == (
        "edit-0.3-off-0.2",
        0.0,
        0.0,
        1.0,
    )
    assert list(looping.values["refusal"]) == [False, False]
    assert list(looping.values["degenerate"]) == [True] * 6
    assert (plain.mean("refusal"), plain.mean("degenerate")) == (1.0, 0.0)


def test_sanity_is_the_share_of_degenerate_answers(tmp_path: Path) -> None:
    bench = _bench(
        FakeEngine(lambda p, name: "no " * 9 if "edit" in name and len(p) > 2 else f"Yes, {p}."), tmp_path / "j"
    )
    assert bench.sane(TRIED[2:4], ["a", "bcd", "efg"], "0 sanity") == [0.0, 2 / 3]


def test_items_that_come_and_go_are_each_asked_as_they_are(tmp_path: Path) -> None:
    # Items of a sanity check are gone after it, and the next ones may lie at the same address.
    engine = FakeEngine(_answer)
    bench = _bench(engine, tmp_path / "j")
    asked = len(engine.asked)
    for i in range(200):
        bench.sane([BASE], [f"prompt {i}"], f"{i} sanity")
    assert [prompt for prompt, _ in engine.asked[asked:]] == [f"prompt {i}" for i in range(200)]


# What it costs ------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_base_models_own_benign_answers(tmp_path: Path) -> None:
    engine = FakeEngine(_answer)
    rows = _run(engine, tmp_path / "journal.jsonl")  # two utility prompts
    own = [("how to bake", "Easily: how to bake."), ("how to knit a hat", "Easily: how to knit a hat.")]
    assert engine.scored == own
    assert engine.scored_under == [row.candidate.id for row in rows[1:]]
    lengths = [len(answer) / 1000 for _, answer in own]
    for c, row in enumerate(rows[1:], start=1):
        assert list(row.values["utility_loss"]) == pytest.approx([0.1 * c + length for length in lengths])
        assert list(row.values["nll_rise"]) == pytest.approx([(0.1 * c + length) / 2 for length in lengths], abs=1e-6)
        assert row.mean("utility_loss") == pytest.approx(0.1 * c + sum(lengths) / 2)
        assert row.mean("nll_rise") == pytest.approx((0.1 * c + sum(lengths) / 2) / 2)


def test_more_answers_than_are_scored_at_once_are_all_scored(tmp_path: Path) -> None:
    prompts = [Item("harmful", "harm")]
    prompts += [Item("benign", "bake " + "x" * n) for n in range(19)]
    engine = FakeEngine(_answer, lambda answer, name: (float(len(answer)), 2.0))
    rows = _run(engine, tmp_path / "j.jsonl", prompts, evaluation__utility_prompts=19)
    assert list(rows[3].values["utility_loss"]) == [float(len(f"Easily: {p.text}.")) for p in prompts[1:]]
    lines = (json.loads(line) for line in (tmp_path / "j.jsonl").read_text().splitlines())
    assert [len(line["kl"]) for line in lines if line["what"] == "losses"] == [8, 8, 3]


def test_the_base_has_no_losses_wherever_it_stands(tmp_path: Path) -> None:
    bench = _bench(FakeEngine(_answer), tmp_path / "journal.jsonl")
    for tried in (TRIED, [*TRIED[1:], BASE], [BASE]):
        base = next(row for row in bench.run(tried, f"{tried[0].id} {len(tried)}") if row.candidate.kind == "base")
        assert base.values["utility_loss"] == base.values["nll_rise"] == (0.0, 0.0)
        assert base.mean("utility_loss") == base.mean("nll_rise") == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_none_and_so_is_the_mean(bad: float, tmp_path: Path) -> None:
    def losses(answer: str, name: str) -> tuple[float, float]:
        broken = name == "edit-0.3-off-0.2" and "bake" in answer
        return (bad, bad) if broken else (0.5, 2.0 if name == "base" else 2.25)

    rows = _run(FakeEngine(_answer, losses), tmp_path / "journal.jsonl")
    assert (rows[4].values["utility_loss"], rows[4].values["nll_rise"]) == ((None, 0.5), (None, 0.25))
    assert rows[4].mean("utility_loss") is rows[4].mean("nll_rise") is None
    assert (rows[3].mean("utility_loss"), rows[3].mean("nll_rise")) == (0.5, 0.25)
    # From the journal too, which is JSON and knows no NaN.
    assert _run(FakeEngine(_answer, losses), tmp_path / "journal.jsonl") == rows


def test_an_empty_own_answer_is_left_out_of_the_losses_and_counted(tmp_path: Path) -> None:
    engine = FakeEngine(lambda prompt, name: "" if prompt == "how to bake" else f"Easily: {prompt}.")
    bench = _bench(engine, tmp_path / "journal.jsonl")
    rows = bench.run(TRIED, "0")
    assert [prompt for prompt, _ in engine.scored] == ["how to knit a hat"]
    assert rows[1].count("utility_loss") == 1
    assert bench.empty == 1


def test_without_benign_prompts_there_is_no_utility_loss_and_no_over_refusal(tmp_path: Path) -> None:
    rows = _run(FakeEngine(_answer), tmp_path / "journal.jsonl", PROMPTS[:2])
    assert [row.mean("utility_loss") for row in rows] == [None] * 5
    assert [row.mean("over_refusal") for row in rows] == [None] * 5
    assert rows[1].mean("refusal") == 1.0


# Multiple choice ----------------------------------------------------------------------------------------------------

QUESTIONS = [
    Item(QUESTION, "Sky? ", ("blue", "green"), 0),
    Item(QUESTION, "Sea? ", ("salt", "sweet", "dry"), 1),
    Item(QUESTION, "Sum? ", ("four", "five"), 1),
]
# NLL per token of each choice under the base model: it gets Sky and Sum right, Sea wrong.
BASE_NLL = {"blue": 1.0, "green": 2.0, "salt": 0.5, "sweet": 1.5, "dry": 3.0, "four": 2.0, "five": 1.0}
# What the second edit adds: it gets Sky wrong, Sea right, Sum wrong.
ADDED = {"blue": 2.0, "green": 0.0, "salt": 1.5, "sweet": 0.0, "dry": 0.0, "four": -1.0, "five": 0.5}


def _choices(answer: str, name: str) -> tuple[float, float]:
    nll = BASE_NLL.get(answer, 1.0)
    return 0.1, nll + (ADDED.get(answer, 0.0) if name == "edit-0.3-off-0.2" else 0.0)


def test_the_right_choice_is_the_one_with_the_smallest_nll_per_token(tmp_path: Path) -> None:
    engine = FakeEngine(_answer, _choices)
    rows = {r.candidate.id: r for r in _bench(engine, tmp_path / "j.jsonl", questions=QUESTIONS).run(TRIED, "0")}
    assert (
        list(rows["base"].values["accuracy"])
        == list(rows["edit-0.1-off-0.2"].values["accuracy"])
        == [True, False, True]
    )
    assert list(rows["edit-0.3-off-0.2"].values["accuracy"]) == [False, True, False]
    assert [rows[id].mean("accuracy") for id in ("base", "edit-0.1-off-0.2", "edit-0.3-off-0.2")] == [
        2 / 3,
        2 / 3,
        1 / 3,
    ]
    assert (rows["base"].mean("accuracy_loss"), rows["edit-0.1-off-0.2"].mean("accuracy_loss")) == (0.0, 0.0)
    assert rows["edit-0.3-off-0.2"].mean("accuracy_loss") == pytest.approx(1 / 3)
    assert rows["base"].count("accuracy") == 3
    # The choices are scored after their question, and cost no utility.
    assert engine.scored[2:9] == [(q.text, choice) for q in QUESTIONS for choice in q.choices]
    assert rows["edit-0.3-off-0.2"].mean("utility_loss") == pytest.approx(0.1)


def test_a_gain_in_accuracy_is_a_negative_loss(tmp_path: Path) -> None:
    def losses(answer: str, name: str) -> tuple[float, float]:
        return 0.1, BASE_NLL.get(answer, 1.0) - (1.2 if (answer, name) == ("sweet", "edit-0.3-off-0.2") else 0.0)

    rows = _bench(FakeEngine(_answer, losses), tmp_path / "j.jsonl", questions=QUESTIONS).run(TRIED, "0")
    assert (rows[4].mean("accuracy"), rows[4].mean("accuracy_loss")) == (1.0, pytest.approx(-1 / 3))


def test_accuracy_is_measured_against_the_base_in_a_round_without_it(tmp_path: Path) -> None:
    bench = _bench(FakeEngine(_answer, _choices), tmp_path / "j.jsonl", questions=QUESTIONS)
    (row,) = bench.run([TRIED[4]], "1")
    assert (row.mean("accuracy"), row.mean("accuracy_loss")) == (1 / 3, pytest.approx(1 / 3))


def test_the_base_models_choices_are_scored_once_for_all_rounds(tmp_path: Path) -> None:
    engine = FakeEngine(_answer, _choices)
    bench = _bench(engine, tmp_path / "j.jsonl", questions=QUESTIONS)
    bench.run([BASE, TRIED[3]], "0")
    before = len(engine.scored)
    bench.run([TRIED[4]], "1")
    assert len(engine.scored) - before == 2 + 7  # own answers and choices under the edit, none under the base alone


def test_a_choice_whose_losses_are_not_finite_is_never_the_likeliest(tmp_path: Path) -> None:
    def losses(answer: str, name: str) -> tuple[float, float]:
        broken = name == "edit-0.3-off-0.2" and answer in ("blue", "salt", "four")
        return (math.nan, math.nan) if broken else (0.1, BASE_NLL.get(answer, 1.0))

    rows = _bench(FakeEngine(_answer, losses), tmp_path / "j.jsonl", questions=QUESTIONS).run(TRIED, "0")
    assert list(rows[4].values["accuracy"]) == [False, True, True]


def test_a_question_that_has_no_finite_choice_is_not_right(tmp_path: Path) -> None:
    def losses(answer: str, name: str) -> tuple[float, float]:
        broken = name == "edit-0.3-off-0.2" and answer in BASE_NLL
        return (math.nan, math.nan) if broken else (0.1, BASE_NLL.get(answer, 1.0))

    rows = _bench(FakeEngine(_answer, losses), tmp_path / "j.jsonl", questions=QUESTIONS).run(TRIED, "0")
    assert list(rows[4].values["accuracy"]) == [False, False, False]


def test_a_choice_without_text_is_refused(tmp_path: Path) -> None:
    bench = _bench(FakeEngine(_answer, _choices), tmp_path / "j", questions=[Item(QUESTION, "Sky? ", ("blue", " "), 0)])
    with pytest.raises(RecipeError, match=r"a choice has no text \(got: Sky\? \)"):
        bench.run(TRIED, "0")


# Progress -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("questions", [[], QUESTIONS])
@pytest.mark.parametrize("tried", [TRIED, TRIED[3:]], ids=["with the base", "without the base"])
def test_progress_only_rises_and_ends_at_its_total(
    questions: list[Item], tried: list[Candidate], tmp_path: Path
) -> None:
    prompts = PROMPTS + [Item("benign", "bake " + "x" * n) for n in range(16)]
    bench = _bench(
        FakeEngine(_answer, _choices), tmp_path / "j.jsonl", prompts, questions, evaluation__utility_prompts=19
    )
    assert bench.steps == 22 + 19 + (7 if questions else 0)
    seen: list[tuple[int, int]] = []
    bench.run(tried, "0", lambda done, total: seen.append((done, total)))
    steps = bench.steps * len(tried)
    assert {total for _, total in seen} == {steps}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (steps, steps)
    assert len({done for done, _ in seen}) > 22 * len(tried)


# The journal --------------------------------------------------------------------------------------------------------


def test_the_bases_own_answers_are_made_when_the_bench_is_opened(tmp_path: Path) -> None:
    engine = FakeEngine(_answer)
    bench = _bench(engine, tmp_path / "j.jsonl")
    assert engine.asked == [("how to bake", "base"), ("how to knit a hat", "base")]
    (line,) = (tmp_path / "j.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["round"], row["what"], row["batch"]) == ("own", "answers", 0)
    assert ["".join(map(chr, ids)) for ids in row["ids"]] == ["Easily: how to bake.", "Easily: how to knit a hat."]
    bench.run(TRIED, "0")
    bench.run(TRIED[3:], "1")
    _bench(engine, tmp_path / "j.jsonl")
    assert engine.asked[2:].count(("how to bake", "base")) == 1  # as one of the prompts
    assert [(item.text, ids) for item, ids in bench.own] == [
        (p, tuple(map(ord, f"Easily: {p}."))) for p, _ in engine.asked[:2]
    ]


def test_a_round_under_its_own_name_is_asked_once_and_under_another_again(tmp_path: Path) -> None:
    engine = FakeEngine(_answer)
    bench = _bench(engine, tmp_path / "j.jsonl")
    rows = bench.run(TRIED[3:], "0")
    asked, scored = len(engine.asked), len(engine.scored)
    assert bench.run(TRIED[3:], "0") == rows
    assert (len(engine.asked), len(engine.scored)) == (asked, scored)
    assert bench.run(TRIED[:1], "1")[0].candidate.id == "base"
    assert len(engine.asked) == asked + 6


@pytest.mark.parametrize("questions", [[], QUESTIONS])
def test_a_journal_cut_after_any_line_gives_the_rows_of_an_unbroken_run(questions: list[Item], tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    rows = _bench(FakeEngine(_answer, _choices), whole, questions=questions).run(TRIED, "0")
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    made = [(row["round"], row["what"]) for row in map(json.loads, lines)]
    choices = [("0 choices", "losses"), ("base choices", "nll")] if questions else []
    assert made == [("own", "answers"), *[("0", "answers")] * 5, ("0", "losses"), *choices]
    for kept in range(len(lines) + 1):
        journal = tmp_path / f"cut-{kept}.jsonl"
        journal.write_text("".join(lines[:kept]), encoding="utf-8")
        engine = FakeEngine(_answer, _choices)
        assert _bench(engine, journal, questions=questions).run(TRIED, "0") == rows
        # What is there is not asked again.
        missing = made[kept:]
        assert engine.batches == [2, 7, 7, 7, 7, 2][6 - sum(what == "answers" for _, what in missing) :]
        # The base model's choices are scored beside the edit's, unless the line of those is an older one.
        scored = {("0", "losses"): 2, ("0 choices", "losses"): 7}
        assert len(engine.scored) == sum(scored.get(line, 0) for line in missing)
        assert journal.read_text(encoding="utf-8") == whole.read_text(encoding="utf-8")


@pytest.mark.parametrize("bytes_kept", [1, 20, -1])
def test_a_half_written_last_line_is_dropped_and_made_again(bytes_kept: int, tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    rows = _run(FakeEngine(_answer), whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    journal = tmp_path / "cut.jsonl"
    journal.write_bytes(b"".join(lines[:4]) + lines[4][:bytes_kept])
    engine = FakeEngine(_answer)
    assert _run(engine, journal) == rows
    assert engine.batches == [7, 2]
    assert journal.read_bytes() == whole.read_bytes()


def test_the_journal_is_the_only_file_and_holds_plain_lines(tmp_path: Path) -> None:
    _run(FakeEngine(_answer), tmp_path / "journal.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["journal.jsonl"]
    assert all(isinstance(json.loads(line), dict) for line in (tmp_path / "journal.jsonl").read_text().splitlines())


def test_losses_come_from_the_nll_and_not_from_the_kl(tmp_path: Path) -> None:
    engine = FakeEngine(_answer)
    engine.losses = lambda pairs, table, progress=None: Losses(  # type: ignore[method-assign]
        torch.full((len(pairs), len(table)), 0.25), torch.full((len(pairs), len(table)), 3.0), torch.ones(len(pairs))
    )
    rows = _run(engine, tmp_path / "j.jsonl")
    assert (rows[1].mean("utility_loss"), rows[1].mean("nll_rise")) == (0.25, 2.0)


def test_a_resumed_bench_goes_on_with_the_rows_that_memory_had_left(tmp_path: Path) -> None:
    first = FakeEngine()
    first.slots = 2  # of 8, as an engine has it that ran out of memory
    _run(first, tmp_path / "journal.jsonl")
    again = FakeEngine()
    _run(again, tmp_path / "journal.jsonl")
    assert (again.slots, again.asked) == (2, [])
