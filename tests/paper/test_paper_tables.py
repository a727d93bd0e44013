"""The tables of a suite from rows that were written by hand: numbers, ranks, published values, and no signal."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runs import tiny_recipe
from steer2edit.errors import FileError
from steer2edit.method.variants import PAPERS
from steer2edit.paper.figures import figure_of
from steer2edit.paper.overall import averages_csv, averages_markdown, averages_of
from steer2edit.paper.plan import Planned
from steer2edit.paper.rows import Front, PartResult, Tried
from steer2edit.paper.tables import (
    ATTRIBUTE,
    PER_TOKENS,
    PRODUCT,
    Line,
    Of,
    Table,
    shown_draws,
    table_of,
    utility_draws,
)
from steer2edit.paper.writing import FIELDS, csv_of, markdown_of
from steer2edit.recipe import parse_recipe
from steer2edit.searching.statistics import wilson

ITEMS = 40
CONFIG = {"rho_attn": 0.2, "rho_mlp": None, "alpha": 0.4}


def shares(yes: int, items: int = ITEMS) -> tuple[float, ...]:
    return (1.0,) * yes + (0.0,) * (items - yes)


def tried(
    method: str, how: Any, yes: int, kl: float = 0.1, config: dict[str, Any] | None = None, **tasks: int
) -> Tried:
    values = {"refusal": shares(yes), "over_refusal": shares(0), "utility_loss": (kl, kl), "degenerate": shares(0)}
    answered = {name: shares(right, 20) for name, right in tasks.items()}
    return Tried(method, how, f"{method}-{how}-{yes}-{kl}", config or CONFIG, values, answered)


def steered(how: Any, yes: int, gamma: float, kl: float, **tasks: int) -> Tried:
    return tried("steering", how, yes, kl, {"gamma": gamma}, **tasks)


def planned(paper: str | None = None, seed: int = 0) -> Planned:
    recipe = tiny_recipe(evaluation__resamples=300)
    return Planned("run", paper or "some-model", paper, "safety", seed, recipe)


def table(rows: list[Tried], part: str = "ablations", paper: str | None = None, **more: Any) -> Table:
    result = PartResult(part, "key", (tried("original", "original", 4, 0.0, {}, **more.pop("base", {})), *rows), **more)
    return table_of(part, Of((planned(paper),), (result,)))


def line(of: Table, method: str, how: str) -> Line:
    return next(one for one in of.lines if (one.method, one.how) == (method, how))


SIGNAL = [
    tried("full", "same numbers", 30),
    tried("k_mean", "same numbers", 20),
    tried("full", "equal budget", 28),
    tried("k_mean", "equal budget", 31),
]


def test_ranks_stand_within_a_condition() -> None:
    of = table(SIGNAL)
    ranks = {(one.method, one.how): one.rank for one in of.lines}
    assert of.moves
    assert ranks == {
        ("original", "original"): None,
        ("full", "same numbers"): 1,
        ("k_mean", "same numbers"): 2,
        ("full", "equal budget"): 2,
        ("k_mean", "equal budget"): 1,
    }
    assert line(of, "full", "same numbers").differences["refusal"].mean == pytest.approx(26 / 40)


@pytest.mark.parametrize("yes", [[3, 5], [4, 4], [2, 6], [0, 1]])
def test_without_a_signal_nothing_is_ranked_and_the_table_says_so(yes: list[int]) -> None:
    rows = [tried(m, "equal budget", n) for m, n in zip(("full", "k_mean"), yes, strict=True)]
    # What is not chosen on validation does not make a signal either, however large it is.
    of = table([*rows, tried("l0", "equal KL", 40)])
    assert not of.moves
    assert {one.rank for one in of.lines} == {None}
    text = markdown_of(of)
    assert "No method moves refusal (harmful) beyond its interval, so nothing is ranked" in text
    assert all(row["rank"] == "" for row in csv.DictReader(io.StringIO(csv_of([of]))))


def test_worse_beyond_the_interval_is_no_signal() -> None:
    base = {"base": {}}
    of = table([tried("full", "equal budget", 0)], **base)
    assert not of.moves


def test_where_utility_is_known_ranks_go_by_its_product_with_the_attribute() -> None:
    rows = [tried("full", "equal budget", 30, gsm8k=2), tried("k_mean", "equal budget", 20, gsm8k=18)]
    of = table(rows, base={"gsm8k": 10}, task_first={"gsm8k": "gsm8k"}, task_about={"gsm8k": {}})
    products = {one.method: one.numbers[PRODUCT].mean for one in of.lines[1:]}
    assert products == {"full": pytest.approx(0.75 * 0.1), "k_mean": pytest.approx(0.5 * 0.9)}
    assert {one.method: one.rank for one in of.lines[1:]} == {"full": 2, "k_mean": 1}


def test_without_utility_ranks_go_by_the_mean_of_the_attacks_where_they_were_asked() -> None:
    rows = [
        tried("full", "equal budget", 30, gcg_refusal=4, advllm_refusal=6),
        tried("k_mean", "equal budget", 20, gcg_refusal=12, advllm_refusal=10),
    ]
    asked = {"gcg_refusal": 0, "advllm_refusal": 0}
    first = {"attack gcg": "gcg_refusal", "attack advllm": "advllm_refusal"}
    of = table(rows, base=asked, task_first=first, task_about={name: {} for name in first})
    means = {one.method: one.numbers[ATTRIBUTE].mean for one in of.lines[1:]}
    assert means == {"full": pytest.approx(0.25), "k_mean": pytest.approx(0.55)}
    assert {one.method: one.rank for one in of.lines[1:]} == {"full": 2, "k_mean": 1}


def test_a_length_is_weighed_as_utility_per_100_tokens() -> None:
    def answered(method: str, how: Any, tokens: float, right: int) -> Tried:
        return replace(tried(method, how, 0, gsm8k=right), values={"tokens": (tokens, tokens + 2) * 20})

    raw = {"name": "r", "model": {"name": "m"}, "behaviour": {"name": "brevity"}, "evaluation": {"resamples": 50}}
    rows = (
        answered("original", "original", 299, 12),
        answered("full", "equal budget", 99, 8),
        answered("k_mean", "equal budget", 49, 2),
    )
    result = PartResult("ablations", "k", rows, task_first={"gsm8k": "gsm8k"}, task_about={"gsm8k": {}})
    of = table_of("ablations", Of((replace(planned(), recipe=parse_recipe(raw)),), (result,)))
    assert of.moves  # fewer tokens
    numbers = {one.method: one.numbers[PER_TOKENS].mean for one in of.lines}
    assert numbers == {
        "original": pytest.approx(100 * 0.6 / 300), "full": pytest.approx(100 * 0.4 / 100),
        "k_mean": pytest.approx(100 * 0.1 / 50),
    }  # fmt: skip
    # The shortest answers come second: they are wrong.
    assert {one.method: one.rank for one in of.lines} == {"original": None, "full": 1, "k_mean": 2}
    longer = (rows[0], answered("full", "equal budget", 399, 12))
    assert not table_of(
        "ablations", Of((replace(planned(), recipe=parse_recipe(raw)),), (replace(result, rows=longer),))
    ).moves


def test_the_paper_stands_beside_the_rows_that_it_has() -> None:
    attacks = {"gcg_refusal": 10, "advllm_refusal": 6, "gsm8k": 5, "piqa": 9}
    rows = [
        tried("full", "same numbers", 30, **attacks),
        tried("full", "equal budget", 30, **attacks),
        tried("attention alone", "equal budget", 30, **attacks),
    ]
    first = {"attack gcg": "gcg_refusal", "attack advllm": "advllm_refusal", "gsm8k": "gsm8k", "piqa": "piqa"}
    about = {name: {} for name in first}
    of = table(rows, paper="llama-2-7b-chat", base=attacks, task_first=first, task_about=about)
    known = line(of, "full", "same numbers")
    assert known.published == {
        "gcg_refusal": 0.951, "advllm_refusal": 0.812, "gsm8k": 0.1893, "attribute": 0.8815,
    }  # fmt: skip
    assert line(of, "full", "equal budget").published == {}
    assert line(of, "attention alone", "equal budget").published == {}
    assert known.numbers["attribute"].mean == pytest.approx((10 / 20 + 6 / 20) / 2)
    assert known.numbers["utility"].mean == pytest.approx((5 / 20 + 9 / 20) / 2)
    assert known.numbers["product"].mean == pytest.approx(0.4 * 0.35)
    assert (known.numbers["attribute"].n, known.numbers["utility"].n) == (40, 40)
    rows_of_csv = list(csv.DictReader(io.StringIO(csv_of([of]))))
    assert tuple(rows_of_csv[0]) == FIELDS
    published = {(r["method"], r["condition"], r["measure"]): r["published"] for r in rows_of_csv}
    assert published["edit", "same numbers", "gcg_refusal"] == "0.951"
    assert published["edit", "same numbers", "piqa"] == published["edit", "same numbers", "refusal"] == ""
    assert "(paper 0.951)" in markdown_of(of)


def test_a_mean_over_the_papers_sets_stands_beside_the_papers_mean() -> None:
    asked = {"gcg_refusal": 10, "advllm_refusal": 6, "commonsenseqa": 8, "codemmlu": 4, "gsm8k": 5}
    first = {f"attack {name}" if "refusal" in name else name: name for name in asked}
    rows = [tried("full", "same numbers", 30, **asked)]
    of = table(rows, paper="llama-2-7b-chat", base=asked, task_first=first, task_about={name: {} for name in first})
    published = line(of, "full", "same numbers").published
    assert {name: published[name] for name in ("attribute", "utility", "product")} == {
        "attribute": 0.8815, "utility": 0.28, "product": 0.2468,
    }  # fmt: skip


def test_a_mean_over_fewer_sets_stands_beside_no_published_mean() -> None:
    rows = [tried("full", "same numbers", 30, gcg_refusal=10, gsm8k=5)]
    first = {"attack gcg": "gcg_refusal", "gsm8k": "gsm8k"}
    about = {name: {} for name in first}
    asked = {"gcg_refusal": 10, "gsm8k": 5}
    of = table(rows, paper="llama-2-7b-chat", base=asked, task_first=first, task_about=about)
    assert line(of, "full", "same numbers").published == {"gcg_refusal": 0.951, "gsm8k": 0.1893}


def test_another_model_has_nothing_published() -> None:
    of = table(SIGNAL)
    assert all(row["published"] == "" for row in csv.DictReader(io.StringIO(csv_of([of]))))
    assert "(paper" not in markdown_of(of)


def test_every_row_holds_n_intervals_and_its_budget() -> None:
    fronts = (
        Front("full", 3, 18, {"mean": 0.4, "low": 0.3, "high": 0.5, "reference": 1.0}),
        Front("l0", 0, 0, None, "it jumps"),
    )
    of = table(SIGNAL, fronts=fronts)
    for row in csv.DictReader(io.StringIO(csv_of([of]))):
        assert int(row["n"]) in (2, ITEMS)
        assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])
        if row["method"] == "edit":
            assert (row["configurations"], row["evaluations"]) == ("3", "18")
    text = markdown_of(of)
    assert "- edit: 3 configurations, 18 answers on validation; hypervolume 0.40 [0.30, 0.50] up to a KL of 1." in text
    assert "- l0: not tried: it jumps." in text
    assert f"| n |  |  | {ITEMS} | {ITEMS} |" in text


def test_a_task_without_numbers_says_why() -> None:
    of = table(SIGNAL, task_about={"gpqa": {"not_measured": "the set of gpqa is gated (got: x). Log in."}})
    assert "- gpqa is not measured: the set of gpqa is gated (got: x). Log in." in markdown_of(of)


def trade_off(edit: tuple[int, float]) -> Table:
    steering = Front("steering", 2, 12, {"mean": 0.1, "low": 0.0, "high": 0.2, "reference": 1.0}, ids=("s1", "s2"))
    rows = [
        tried("full", "chosen", edit[0], edit[1]),
        tried("full", "star", 20, 0.3),
        replace(steered("swept", 12, 0.1, 0.2), id="s1"),
        replace(steered("swept", 20, 0.4, 0.4), id="s2"),
        replace(steered("swept", 40, 0.2, 0.3), id="s3"),  # not on the front of validation
    ]
    return table(rows, "trade_off", fronts=(steering,))


def test_the_headline_is_the_edit_less_steerings_front_at_the_edits_kl() -> None:
    of = trade_off((24, 0.3))
    # At a KL of 0.3 the line from (0.2, 0.3) to (0.4, 0.5) is at 0.4.
    assert of.headline["utility_loss"].mean == pytest.approx(24 / 40 - 0.4)
    assert "edit less steering at the edit's KL per token: +0.20 [" in markdown_of(of)
    assert "(the paper, at matched utility over its two models: +0.172)" in markdown_of(of)


def test_a_kl_that_steering_does_not_reach_is_said() -> None:
    of = trade_off((24, 0.9))
    assert of.headline["utility_loss"].mean is None
    assert "not reached: steering has no point on both sides of the edit's KL" in markdown_of(of)


def test_seeds_are_pooled_and_counted() -> None:
    base = tried("original", "original", 4, 0.0, {})
    results = [PartResult("ablations", "k", (base, tried("full", "equal budget", yes))) for yes in (20, 30)]
    of = table_of("ablations", Of((planned(), planned(seed=1)), tuple(results)))
    number = line(of, "full", "equal budget").numbers["refusal"]
    assert (number.mean, number.n, number.seeds, of.seeds) == (pytest.approx(25 / 40), 2 * ITEMS, 2, 2)
    assert "over prompts and 2 seeds" in markdown_of(of)


def test_the_figures_of_a_part_are_written(tmp_path: Path) -> None:
    swept = [
        replace(tried("ρ_attn", "swept", 10, config={**CONFIG, "rho_attn": rho}), id=str(rho))
        for rho in (0.3, 0.1, 0.2)
    ]
    for of in (table(SIGNAL), trade_off((24, 0.3)), table(swept, "sensitivity")):
        files = figure_of(of, tmp_path / of.part)
        assert {file.suffix for file in files} == {".png", ".svg", ".pdf"}
        assert all(file.stat().st_size > 1000 for file in files)
    assert figure_of(table([], "sensitivity"), tmp_path / "none") == []


def test_a_part_is_read_as_it_was_written(tmp_path: Path) -> None:
    row = replace(tried("full", "same numbers", 3), values={"refusal": (1.0, None)}, target=0.1)
    part = PartResult("ablations", "key", (row,), (Front("full", 1, 2, None, "why", ("a",)),), {"gsm8k": {"n": 1}})
    part.save(tmp_path / "part.json")
    assert PartResult.load(tmp_path / "part.json") == part
    (tmp_path / "part.json").write_text('{"part": 3}', encoding="utf-8")
    with pytest.raises(FileError, match=r"part\.json is no part of a suite"):
        PartResult.load(tmp_path / "part.json")


def of_behaviour(behaviour: str, paper: str | None, lengths: dict[str, float] | None = None) -> Of:
    """Ablations of one model on the paper's sets: 20 + 2·i of 40 items under the i-th variant, which are as many under
    either attack, or lengths in tokens; half of each utility set."""
    attacks = ("gcg_refusal", "advllm_refusal") if behaviour == "safety" else ()
    utility = ("commonsenseqa", "codemmlu", "gsm8k") if lengths is None else ("math500", "gpqa", "codemmlu", "gsm8k")
    rows = [tried("original", "original", 4, 0.0, {}, **dict.fromkeys((*attacks, *utility), 10))]
    for i, variant in enumerate(PAPERS):
        asked = dict.fromkeys(attacks, 10 + i) | dict.fromkeys(utility, 10)
        row = tried(variant, "same numbers", 20 + 2 * i, **asked)
        if lengths is not None:
            row = replace(row, values={"tokens": (lengths[variant],) * ITEMS})
        rows.append(row)
    of = planned(paper)
    if lengths is not None:
        raw = {"name": "r", "model": {"name": "m"}, "behaviour": {"name": "brevity"}, "evaluation": {"resamples": 50}}
        of = replace(of, recipe=parse_recipe(raw))
    first = {f"attack {name}": name for name in attacks} | {name: name for name in utility}
    result = PartResult("ablations", "k", tuple(rows), task_first=first)
    return Of((replace(of, behaviour=behaviour),), (result,))


def test_the_overall_table_averages_models_and_then_behaviours() -> None:
    lengths = {variant: 100.0 * (1 + i) for i, variant in enumerate(PAPERS)}
    ablations = [
        of_behaviour("safety", "llama-2-7b-chat"),
        of_behaviour("safety", "mistral-7b-instruct-v0.2"),
        of_behaviour("efficiency", "qwen3-4b-thinking-2507", lengths),
    ]
    averages = {average.variant: average for average in averages_of(ablations)}
    assert list(averages) == list(PAPERS)
    numbers = averages["k_mean"].numbers
    assert numbers["safety"].mean == pytest.approx(22 / 40)
    assert numbers["efficiency"].mean == pytest.approx(100 / 200)
    assert numbers["attribute"].mean == pytest.approx((22 / 40 + 0.5) / 2)
    assert numbers["utility"].mean == pytest.approx(0.5)
    assert numbers["attribute × utility"].mean == pytest.approx((22 / 40 + 0.5) / 2 * 0.5)
    assert averages["full"].numbers["efficiency"].mean == 1.0
    paper = averages["full"].published
    assert paper["safety"] == pytest.approx(0.807, abs=1e-3)  # the paper's own table 3
    assert paper["utility, safety"] == pytest.approx(0.341, abs=1e-3)
    assert averages["k_mean"].published["efficiency"] == 1.0  # the paper's variant is shorter than its full method
    assert "(paper 0.8065)" in averages_markdown(list(averages.values()), ["a"])
    rows = list(csv.DictReader(io.StringIO(averages_csv(list(averages.values())))))
    assert {row["method"] for row in rows} == {"edit", "k_mean", "k_svd", "g_dot", "l0", "l2"}
    assert all(row["published"] for row in rows)


def test_averages_over_other_sets_have_nothing_published() -> None:
    of = of_behaviour("safety", "llama-2-7b-chat")
    fewer = replace(of.results[0], task_first={"gsm8k": "gsm8k"})
    assert all(average.published == {} for average in averages_of([Of(of.planned, (fewer,))]))


def test_another_models_averages_have_nothing_published() -> None:
    (first, *_) = averages_of([of_behaviour("safety", None)])
    assert first.published == {}
    assert first.numbers["safety"].mean == 0.5


BREVITY = {"name": "r", "model": {"name": "m"}, "behaviour": {"name": "brevity"}, "evaluation": {"resamples": 50}}


def lengths_table(part: str, *rows: Tried, **more: Any) -> Table:
    of = replace(planned(), recipe=parse_recipe(BREVITY))
    return table_of(part, Of((of,), (PartResult(part, "k", rows, **more),)))


def of_length(method: str, how: Any, tokens: float, kl: float = 0.1) -> Tried:
    values = {"tokens": (tokens,) * 20, "utility_loss": (kl, kl)}
    return replace(tried(method, how, 0), id=f"{method}-{tokens:g}", values=values)


def test_the_headline_of_a_length_is_the_relative_change() -> None:
    of = lengths_table(
        "trade_off",
        of_length("original", "original", 120.0, 0.0),
        of_length("full", "chosen", 60.0, 0.1),
        of_length("steering", "swept", 80.0, 0.2),
        fronts=(Front("steering", 1, 6, None, ids=("steering-80",)),),
    )
    # Between the original model, 120 tokens at no cost, and steering, 80 at 0.2, the line is at 100.
    assert of.headline["utility_loss"].mean == pytest.approx(60 / 100 - 1)
    assert "relative change: -0.40 [" in markdown_of(of)


def test_of_lengths_alone_the_shortest_ranks_first() -> None:
    of = lengths_table(
        "ablations",
        of_length("original", "original", 300.0, 0.0),
        of_length("full", "equal budget", 90.0),
        of_length("k_mean", "equal budget", 50.0),
    )
    assert {one.method: one.rank for one in of.lines} == {"original": None, "full": 2, "k_mean": 1}


def test_what_is_shown_under_an_attack_is_a_signal_too() -> None:
    first = {"attack gcg": "gcg_refusal"}
    rows = [tried("full", "equal budget", 4, gcg_refusal=18)]
    of = table(rows, base={"gcg_refusal": 0}, task_first=first, task_about={"attack gcg": {}})
    assert of.moves
    assert line(of, "full", "equal budget").rank == 1


def test_attribute_and_utility_are_resampled_apart() -> None:
    """They are of other prompts: with the same draws their product would vary as the square of one of them."""
    row = replace(tried("full", "chosen", 20), tasks={"gsm8k": shares(20)})
    of = Of((planned(),), (PartResult("ablations", "k", (row,), task_first={"gsm8k": "gsm8k"}),))
    shown, utility = shown_draws(of, [row]), utility_draws(of, [row])
    assert shown is not None
    assert utility is not None
    assert abs(np.corrcoef(shown.drawn, utility.drawn)[0, 1]) < 0.3


def test_an_interval_counts_every_sample_of_a_prompt() -> None:
    recipe = tiny_recipe(evaluation__resamples=50, evaluation__samples=10, evaluation__temperature=0.7)
    row = replace(tried("full", "chosen", 0), values={"refusal": (0.5,) * ITEMS}, tasks={"gsm8k": (0.5,) * ITEMS})
    base = replace(row, method="original", how="original")
    result = PartResult("ablations", "k", (base, row), task_first={"gsm8k": "gsm8k"})
    of = table_of("ablations", Of((replace(planned(), recipe=recipe),), (result,)))
    for name in ("refusal", "gsm8k"):
        number = line(of, "full", "chosen").numbers[name]
        assert (number.low, number.high) == pytest.approx(wilson(0.5, 10 * ITEMS))


def test_a_variant_that_is_shorter_than_the_full_method_scores_one() -> None:
    lengths = dict.fromkeys(PAPERS, 100.0) | {"k_mean": 50.0}
    averages = {average.variant: average for average in averages_of([of_behaviour("efficiency", None, lengths)])}
    score = averages["k_mean"].numbers["efficiency"]
    assert (score.mean, score.low, score.high) == (1.0, 1.0, 1.0)
