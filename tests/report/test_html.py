"""The page of a run, without a browser: its HTML, its data, its size, and what hostile text becomes in it."""

from __future__ import annotations

import base64
import gzip
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pages import HOSTILE, Parsed, largest_page, make_contents, parsed, random_scores
from runs import tiny_recipe
from shouting import Shouting, shouting_recipe
from steer2edit.behaviours import known
from steer2edit.method.theorems import magnitudes
from steer2edit.report.html import components, texts
from steer2edit.report.html.contents import Contents, StageState
from steer2edit.report.html.render import page_of
from steer2edit.report.html.texts import pack_rows, visible
from steer2edit.report.html.verdict import outcome_of, verdict


@pytest.fixture(scope="module")
def contents() -> Contents:
    return make_contents()


@pytest.fixture(scope="module")
def page(contents: Contents) -> Parsed:
    return parsed(contents)


# The page ------------------------------------------------------------------------------------------------------------


def test_every_element_is_closed_and_every_section_is_linked(page: Parsed) -> None:
    assert page.stack == []
    sections = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert sections == ["headline", "trade_off", "map", "scores", "answers", "provenance"]
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == ["#main", *(f"#{section}" for section in sections)]


def test_the_page_names_nothing_outside_itself(page: Parsed) -> None:
    for tag, attributes in page.elements:
        assert "src" not in attributes, tag
        assert not attributes.get("href", "").startswith("http"), tag  # type: ignore[union-attr]
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_numbers_are_those_of_the_results_to_the_last_bit(page: Parsed, contents: Contents) -> None:
    assert contents.results is not None
    cells = page.cells()
    for kind, system in contents.results["systems"].items():
        for measure in contents.results["measures"]:
            name = measure["name"]
            if not measure["column"] or not system[name]["n"]:
                assert (kind, name) not in cells
                continue
            for end in ("mean", "low", "high"):
                assert float(cells[kind, name][f"data-{end}"] or "") == system[name][end]
            assert cells[kind, name]["data-n"] == str(system[name]["n"])


def test_every_trial_is_in_the_chart_with_its_means(page: Parsed, contents: Contents) -> None:
    assert contents.study is not None
    assert contents.choice is not None
    chart = page.data["trade_off"]
    assert [row["id"] for row in chart["trials"]] == [trial.candidate.id for trial in contents.study.trials]
    for row, trial in zip(chart["trials"], contents.study.trials, strict=True):
        assert row["means"] == {m["name"]: trial.mean(m["name"]) for m in chart["measures"]}
    assert chart["fronts"] == contents.choice["front"]
    assert chart["chosen"]["edit"] == contents.choice["edit"]["id"]
    low, high = chart["intervals"][chart["chosen"]["edit"]][chart["attribute"]]
    assert low <= next(row for row in chart["trials"] if row["id"] == chart["chosen"]["edit"])["means"][
        chart["attribute"]
    ] <= high  # fmt: skip


def test_tables_have_captions_and_controls_have_labels(page: Parsed) -> None:
    tags = [tag for tag, _ in page.elements]
    assert tags.count("caption") == tags.count("table") > 0
    assert {"header", "nav", "main", "footer", "h1"} <= set(tags)
    assert dict(page.elements)["html"]["lang"] == "en"
    for tag, attributes in page.elements:
        if attributes.get("role") in ("img", "region"):
            assert attributes.get("aria-label"), (tag, attributes)
        if tag == "th":
            assert attributes.get("scope") in ("col", "row")


def test_the_same_run_gives_the_same_bytes(contents: Contents) -> None:
    assert page_of(contents) == page_of(contents)


def test_the_commands_and_the_recipe_are_in_the_page(page: Parsed, contents: Contents) -> None:
    assert "pip install steer2edit==0.1.0 torch==2.13.0 " in page.text
    assert "steer2edit run recipe.yaml --out runs/tiny" in page.text
    assert "rho_attn:" in page.text


def test_a_name_is_quoted_for_the_shell() -> None:
    recipe = tiny_recipe(name="a b; rm -rf $HOME")
    assert "--out 'runs/a b; rm -rf $HOME'" in parsed(make_contents(recipe=recipe)).text


def test_any_behaviour_has_a_page_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known.BEHAVIOURS, "shouting", Shouting)
    recipe = shouting_recipe(limits={"blunt": None, "degenerate": None})
    page = parsed(make_contents(kind="loud", recipe=recipe))
    assert "capitals (%)" in page.text
    assert "refus" not in page.text.lower()
    measures = [m["title"] for m in page.data["trade_off"]["measures"]]
    assert measures == ["capitals (%)", "blunt answers", "words", "degenerate", "NLL rise per token", "KL per token"]


# What is missing -----------------------------------------------------------------------------------------------------


def _without(contents: Contents, *stages: str, **fields: Any) -> Contents:
    states = [
        StageState(stage.name, "missing") if stage.name in stages else stage for stage in contents.stages
    ]  # fmt: skip
    return replace(contents, stages=states, **fields)


def test_a_run_that_failed_half_way_says_what_is_missing(contents: Contents) -> None:
    nothing = {"results": None, "answers": (), "tried_answers": (), "edit": None, "choice": None, "study": None}
    early = _without(contents, "search", "edit", "export", "evaluate", **nothing, scores=random_scores(2, 3, 5))
    page = parsed(early)
    for stage in ("search", "edit", "export", "evaluate"):
        assert f"The stage {stage} has not been run, or did not finish." in page.text
    assert "Trade-off (stage search)" in page.text
    sections = [attributes["id"] for tag, attributes in page.elements if tag == "section" and "id" in attributes]
    assert sections == ["scores", "provenance"]
    assert list(page.data) == ["scores"]


def test_a_search_without_a_choice_shows_its_trials_and_fronts(contents: Contents) -> None:
    nothing = {"results": None, "answers": (), "edit": None, "choice": None}
    page = parsed(_without(contents, "edit", "export", "evaluate", **nothing))
    chart = page.data["trade_off"]
    assert chart["chosen"] == {}
    assert chart["fronts"]["edit"]
    assert "validation" in page.data["answers"]
    assert "test" not in page.data["answers"]


def test_a_run_with_nothing_but_a_recipe_has_a_page(contents: Contents) -> None:
    stages = [StageState(stage.name, "missing") for stage in contents.stages]
    page = parsed(Contents(contents.recipe, {"stages": {}}, stages))
    assert "This run is not finished" in page.text
    assert page.data == {}


def test_a_finished_run_says_nothing_of_missing_things(page: Parsed) -> None:
    assert "not finished" not in page.text
    assert "missing" not in page.text


def test_stages_of_another_recipe_are_named_as_such(contents: Contents) -> None:
    stages = [replace(stage, state="stale") if stage.name == "evaluate" else stage for stage in contents.stages]
    page = parsed(replace(contents, stages=stages, results=None, answers=()))
    assert "The stage evaluate was run with another recipe." in page.text


# Hostile text --------------------------------------------------------------------------------------------------------


def test_hostile_text_stays_text_wherever_it_stands() -> None:
    recipe = tiny_recipe(name="x<script>alert(1)<b>\u202e\x1b[0m")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": HOSTILE})})
    hostile = make_contents(answer=lambda draw: HOSTILE, kind=HOSTILE, system=HOSTILE, recipe=recipe)
    text = page_of(hostile)
    text.encode("utf-8")  # no half of a surrogate pair is left
    page = Parsed(text)
    assert page.stack == []
    assert [tag for tag, _ in page.elements].count("script") == 3
    assert "img" not in {tag for tag, _ in page.elements}
    assert all(str(a["href"]).startswith("#") for tag, a in page.elements if tag == "a")
    for hidden in "\x1b\x00\u202e\u202c":
        assert hidden not in text
    assert "x<script>alert(1)<b>‹U+202E›␛[0m" in page.text
    assert "␛[31mred" in page.text  # the model's name
    rows = unpacked(page.data["answers"]["test"])
    assert rows[0]["texts"][0] == [HOSTILE.replace("\ud800", "?")]


def unpacked(packed: dict[str, Any]) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(packed["data"])))


def test_hidden_characters_become_signs_and_others_stay() -> None:
    assert visible("a\tb\nc é 日本 👩‍🔬 \u200d") == "a\tb\nc é 日本 👩‍🔬 \u200d"
    assert visible("\x1b\x00\x07\r") == "␛␀␇␍"
    assert visible("\x7f\x9b\u200f\u2066\ud800") == "‹U+007F›‹U+009B›‹U+200F›‹U+2066›‹U+D800›"


# Size ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_largest_run_stays_under_eight_megabytes() -> None:
    text = largest_page()
    assert len(text.encode()) <= 8_000_000
    page = Parsed(text)
    packed = page.data["answers"]["validation"]
    assert len(packed["ids"]) + len(packed["left_out"]) == 500
    chosen = page.data["trade_off"]["chosen"].values()
    assert set(chosen) <= set(packed["ids"])  # what is looked for first is there
    assert len(unpacked(page.data["answers"]["test"])) == 400


def _row(**answers: Any) -> dict[str, Any]:
    labels = {id: {"m": float(i)} for i, id in enumerate(answers)}
    return {"prompt": "p", "kind": "k", "answers": answers, "labels": labels}


def test_answers_are_packed_once_and_come_back() -> None:
    rows = [_row(base="same", one="same", two="other"), _row(base=["s1", "s2"], one=["s1", "s3"])]
    packed = pack_rows(rows, ["base", "one", "two"], ["m", "absent"], 10_000)
    assert packed is not None
    assert (packed.left_out, packed.cut) == ((), None)
    first, second = unpacked(packed.to_json())
    assert first["texts"] == [["same"], ["other"]]
    assert first["which"] == [0, 0, 1]
    assert first["labels"] == {"m": [0.0, 1.0, 2.0]}
    assert second["texts"] == [["s1", "s2"], ["s1", "s3"]]
    assert second["which"] == [0, 1, -1]
    assert first["prompt"] == [["user", "p"]]


def test_long_answers_are_cut_with_their_length_before_any_is_left_out() -> None:
    draw = np.random.RandomState(0)
    long = "".join(map(chr, draw.randint(33, 3000, size=100_000)))
    packed = pack_rows([_row(base=long, one="short")], ["base", "one"], ["m"], 40_000)
    assert packed is not None
    assert packed.cut == 4_000
    assert packed.left_out == ()
    (row,) = unpacked(packed.to_json())
    assert row["texts"] == [[[long[:4_000], 100_000]], ["short"]]


def test_a_long_answer_that_packs_well_stays_whole() -> None:
    packed = pack_rows([_row(base="word " * 20_000)], ["base"], ["m"], 40_000)
    assert packed is not None
    assert packed.cut is None
    assert unpacked(packed.to_json())[0]["texts"] == [["word " * 20_000]]


def test_the_least_wanted_are_left_out_first() -> None:
    draw = np.random.RandomState(0)
    ids = [f"t{i}" for i in range(30)]
    rows = [_row(**{id: "".join(map(chr, draw.randint(33, 3000, size=200))) for id in ids}) for _ in range(5)]
    packed = pack_rows(rows, ids, ["m"], 30_000)
    assert packed is not None
    kept = [id for id in ids if id not in packed.left_out]
    assert 0 < len(kept) < 30
    assert kept == ids[: len(kept)]
    assert len(packed.data) <= 30_000


def test_what_cannot_fit_is_not_there() -> None:
    assert pack_rows([_row(base="a")], ["base"], ["m"], 10) is None


def test_a_prompt_of_many_messages_keeps_their_roles() -> None:
    row = _row(base="a") | {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    packed = pack_rows([row], ["base"], ["m"], 10_000)
    assert packed is not None
    assert unpacked(packed.to_json())[0]["prompt"] == [["system", "s"], ["user", "u"]]


# The components ------------------------------------------------------------------------------------------------------


def test_the_map_has_the_edits_own_numbers() -> None:
    edit = random_scores(3, 4, 40).edit(rho_attn=0.4, rho_mlp=0.8, alpha=0.5).with_strength(-2.0)
    heads, neurons = components.block_maps(edit)
    assert (heads["block"], neurons["block"]) == ("attn", "mlp")
    for row in heads["rows"]:
        site = edit.sites[f"{row['layer']}.attn"]
        np.testing.assert_allclose(row["lam"], -2.0 * site.lam.numpy(), rtol=1e-5)
        np.testing.assert_allclose(row["g"], site.g.numpy(), rtol=1e-5)
        # ‖v̂‖ = ‖k̂_i‖ = 1, and the sketch says ‖W‖ = 2 + layer
        delta = torch.stack(
            [2.0 * torch.outer(site.u, lam * k).norm() for lam, k in zip(site.lam, site.k, strict=True)]
        )
        np.testing.assert_allclose(row["ratio"], delta.numpy() / (2 + row["layer"]), rtol=1e-4)
    for row in neurons["rows"]:
        lam = -2.0 * edit.sites[f"{row['layer']}.mlp"].lam
        order = lam.abs().argsort(descending=True)[: len(row["lam"])]
        assert row["names"] == [f"neuron {i}" for i in order.tolist()]
        np.testing.assert_allclose(row["lam"], lam[order].numpy(), rtol=1e-5)
        assert (row["reinforced"], row["suppressed"]) == (int((lam > 0).sum()), int((lam < 0).sum()))
    assert sum(neurons["spread"]["counts"]) == neurons["edited"]


def test_a_block_type_that_is_off_has_no_map() -> None:
    edit = random_scores(2, 4, 10).edit(rho_attn=0.2, rho_mlp=None, alpha=0.3)
    assert [m["block"] for m in components.block_maps(edit)] == ["attn"]
    nothing = random_scores(2, 4, 10).edit(rho_attn=None, rho_mlp=None, alpha=0.3)
    assert components.block_maps(nothing) == []


def test_g_is_in_the_page_to_the_last_bit() -> None:
    scores = random_scores(3, 4, 40)
    attn, mlp = components.spreads(scores.sites, {"rho_attn": 0.3, "rho_mlp": None})
    for shown, block in ((attn, "attn"), (mlp, "mlp")):
        g = torch.cat([s.g for s in scores.sites.values() if s.site.block == block])
        values = np.frombuffer(base64.b64decode(shown["values"]), dtype="<f4")
        assert sorted(values.tolist()) == sorted(g.tolist())
        assert (shown["total"], sum(shown["counts"]), shown["floor"]) == (len(g), len(g), 0.0)
        assert shown["largest"] == float(g.abs().max())
    assert (attn["rho"], mlp["rho"]) == (0.3, None)


def test_of_too_many_components_the_largest_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "EXACT", 50)
    scores = random_scores(3, 4, 40)
    mlp = components.spreads(scores.sites, {})[1]
    g = torch.cat([s.g for s in scores.sites.values() if s.site.block == "mlp"])
    values = np.frombuffer(base64.b64decode(mlp["values"]), dtype="<f4")
    assert len(values) == 50
    assert mlp["floor"] == float(g.abs().sort(descending=True).values[50])
    rho, alpha = mlp["floor"] / 0.5, 0.5
    assert int((magnitudes(g, rho, alpha) != 0).sum()) == int((np.abs(values) > np.float32(rho * alpha)).sum())
    assert sum(mlp["counts"]) == mlp["total"] == 120


def test_an_edit_of_some_layers_counts_their_components_alone() -> None:
    scores = random_scores(4, 4, 10)
    attn, mlp = components.spreads(scores.sites, {"layers": "1-2"})
    assert (attn["total"], mlp["total"]) == (8, 20)


def test_experts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    site = random_scores(1, 1, 1).sites["0.mlp"].site
    assert components.component_name(replace(site, expert=3, experts=4), 7) == "expert 3, neuron 7"
    assert components.component_name(replace(site, shared=True), 7) == "shared expert, neuron 7"


# The verdict ---------------------------------------------------------------------------------------------------------


def _cell(mean: float | None, low: float = 0.0, high: float = 1.0) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high, "n": 50}


def _difference(mean: float, low: float, high: float) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high, "n": 50}


def _results(better: str = "higher") -> dict[str, Any]:
    def measure(name: str, title: str, better: str) -> dict[str, Any]:
        return {"name": name, "title": title, "better": better, "column": True, "scale": [0.0, 1.0]}

    measures = [
        measure("shown", "what is wanted", better),
        measure("paid", "a cost", "lower"),
        measure("utility_loss", "KL per token", "lower"),
    ]
    systems = {
        "base": {"shown": _cell(0.1), "paid": _cell(0.05), "utility_loss": _cell(0.0)},
        "steering": {"shown": _cell(0.3), "paid": _cell(0.05), "utility_loss": _cell(0.3)},
        "layer": {"shown": _cell(0.45), "paid": _cell(0.2), "utility_loss": _cell(0.04)},
        "edit": {"shown": _cell(0.5), "paid": _cell(0.1), "utility_loss": _cell(0.12)},
    }
    differences = {
        "edit - base": _difference(0.4, 0.3, 0.5),
        "edit - steering": _difference(0.2, 0.1, 0.3),
        "edit - layer": _difference(0.05, -0.05, 0.15),
    }
    return {"attribute": "shown", "measures": measures, "systems": systems, "differences": differences}


def test_the_sentence_says_what_was_bought_what_it_cost_and_against_whom() -> None:
    said = verdict(_results())
    assert said is not None
    assert said.sentence == (
        "On 50 test prompts the edit takes what is wanted from 0.10 to 0.50 (+0.40 [+0.30, +0.50]);"
        " it costs 0.12 KL per token and a cost 0.05 → 0.10;"
        " it does better than steering; it is not told apart from one layer."
    )
    assert said.remarks == (
        "One layer is not told apart from the edit (+0.05 [−0.05, +0.15]), and costs less (0.04 against 0.12 KL per"
        " token).",
        "a cost: the edit has 0.10, steering 0.05.",
    )


def test_where_less_is_better_a_higher_number_is_worse() -> None:
    said = verdict(_results("lower"))
    assert said is not None
    assert "the edit makes it worse: it takes what is wanted from 0.10 to 0.50" in said.sentence
    assert "it does worse than steering" in said.sentence
    assert said.remarks[0] == "Steering does better: the edit's what is wanted differs by +0.20 [+0.10, +0.30]."


def test_a_loss_that_is_not_finite_is_no_loss_of_nothing() -> None:
    results = _results()
    results["systems"]["edit"] |= {
        "utility_loss": {"mean": None, "low": None, "high": None, "n": 20, "not_finite": 3},
        "paid": _cell(0.05),
    }
    said = verdict(results)
    assert said is not None
    assert "it costs a KL per token that is not finite on 3 of 20 prompts;" in said.sentence


def test_an_edit_that_wins_nowhere_says_so() -> None:
    results = _results()
    results["differences"]["edit - base"] = _difference(0.02, -0.03, 0.07)
    results["systems"]["edit"]["shown"] = _cell(0.12)
    results["differences"]["edit - steering"] = _difference(-0.2, -0.3, -0.1)
    said = verdict(results)
    assert said is not None
    assert "does not move what is wanted beyond chance: 0.10 becomes 0.12 (+0.02 [−0.03, +0.07])" in said.sentence
    assert "it does worse than steering" in said.sentence
    assert "better than" not in said.sentence


@pytest.mark.parametrize(
    ("low", "high", "better", "outcome"),
    [
        (0.1, 0.2, "higher", "better"),
        (0.1, 0.2, "lower", "worse"),
        (-0.2, -0.1, "higher", "worse"),
        (-0.2, -0.1, "lower", "better"),
        (0.0, 0.2, "higher", "not told apart"),
        (-0.2, 0.0, "lower", "not told apart"),
    ],
)
def test_a_difference_is_told_apart_where_its_interval_leaves_zero_out(
    low: float, high: float, better: str, outcome: str
) -> None:
    assert outcome_of(_difference((low + high) / 2, low, high), {"better": better}) == outcome


def test_results_that_cannot_be_compared_have_no_sentence() -> None:
    results = _results()
    results["systems"]["edit"]["shown"] = {"mean": None, "low": None, "high": None, "n": 50}
    assert verdict(results) is None
    old = _results()
    del old["measures"]
    assert verdict(old) is None


def test_the_characters_of_page_and_script_are_the_same() -> None:
    from importlib.resources import files

    script = (files("steer2edit.report.html") / "assets/page.js").read_text(encoding="utf-8")
    pattern = texts._HIDDEN.pattern.replace("\\x", "\\u00")
    assert f"/{pattern}/gu" in script
