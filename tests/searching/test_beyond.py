"""benchmarks/beyond.py: its numbers by hand, its draws of the prompts, and a run that is killed and goes on."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runs import save_pico
from steer2edit.behaviours.base import DEGENERATE
from steer2edit.behaviours.prompts import data_path
from steer2edit.behaviours.safety import OVER_REFUSAL, REFUSAL
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.files.reading import read_jsonl

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import beyond_numbers

    return beyond_numbers


@pytest.fixture
def beyond(numbers: Any) -> Any:
    import beyond

    return beyond


@pytest.fixture
def draw(numbers: Any) -> Any:
    import beyond_seed

    return beyond_seed


def test_the_figure_draws_each_method_over_kl_and_over_the_attribute(
    numbers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import beyond_figure

    names = {"refusal": "refused", "over_refusal": "plain refused", "utility_loss": "KL"}
    curve = {
        "preserve": {"refusal": [0.0, 0.4, 0.8], "over_refusal": [0.0, 0.1, 0.2], "utility_loss": [0.0, 0.05, 0.1]},
        "steering": {"refusal": [0.0, None, 0.6], "over_refusal": [0.0, None, 0.3], "utility_loss": [0.0, None, 0.1]},
    }
    results = {"attribute": "refusal", "titles": names, "curve": curve, "seeds": [0, 1]}
    titles = {"preserve": "quiet", "steering": "steering"}
    drawn: list[Any] = []
    monkeypatch.setattr(beyond_figure, "save", lambda figure, path: drawn.append(figure))
    beyond_figure.draw_curves(results, titles, ("over_refusal", "not_measured"), tmp_path / "curves")
    first, second = drawn[0].axes
    assert [first.get_xlabel(), first.get_ylabel()] == ["KL", "refused"]
    assert [second.get_xlabel(), second.get_ylabel()] == ["refused", "plain refused"]
    assert [list(line.get_ydata()) for line in second.lines] == [[0.0, 0.1, 0.2], [0.0, 0.3]]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["quiet", "steering"]


# The numbers --------------------------------------------------------------------------------------------------------


def strength(target: float, refused: list[float], benign: list[float], kl: float) -> dict[str, Any]:
    test = {"refusal": refused, "over_refusal": benign, "utility_loss": [kl, kl], "nll_rise": [kl / 2, kl / 2]}
    return {"id": f"{target}", "target": target, "test": test}


def a_seed(number: int = 0) -> dict[str, Any]:
    """Two methods of two strengths; `quiet` refuses half as many benign prompts at as many harmful ones."""
    loud = [strength(0.02, [1, 0, 0, 0], [0, 1], 0.02), strength(0.2, [1, 1, 1, 0], [1, 1], 0.1)]
    quiet = [strength(0.02, [1, 1, 0, 0], [0, 0], 0.02), strength(0.2, [1, 1, 1, 1], [1, 0], 0.2)]
    return {
        "seed": number,
        "items": {"test": {"harmful": 4, "benign": 2}},
        "base": {"test": {"refusal": [0, 0, 0, 0], "over_refusal": [0, 0], "utility_loss": [0, 0], "nll_rise": [0, 0]}},
        "methods": {"quiet": quiet, "loud": loud},
        "front": {"quiet": ["0.02", "0.2"], "loud": ["0.2"]},
        "chosen": {"quiet": "0.02", "loud": None},
        "within_limits": ["quiet"],
        "sets": {"AdvBench": {"base": [0.0, 0.0], "quiet": [1.0, 0.0]}},
    }


def test_a_level_is_found_between_its_two_neighbours(numbers: Any) -> None:
    nan = float("nan")
    assert numbers.interpolated([0.0, 0.4, 0.8], [0.0, 0.1, 0.3], 0.4) == 0.1
    assert numbers.interpolated([0.0, nan, 0.8], [0.0, 9.0, 0.4], 0.4) == 0.2
    assert numbers.interpolated([0.0, 0.8, 0.2, 0.9], [0.0, 0.4, 5.0, 6.0], 0.6) == pytest.approx(0.3)  # the first
    assert numbers.interpolated([0.0, 0.4], [0.0, 0.1], 0.5) is None
    assert numbers.interpolated([], [], 0.5) is None


def test_what_two_methods_cost_at_the_same_refusal_and_their_ratio(numbers: Any) -> None:
    seeds = [a_seed(0), a_seed(1)]
    measures = (REFUSAL, OVER_REFUSAL, DEGENERATE)  # the last one was not measured
    found = numbers.results_of(
        seeds, measures, curves=["quiet", "loud"], levels=[0.5, 0.9], kls=[0.02], reference=0.4, resamples=40
    )
    at = found["at_equal_attribute"]["0.5"]
    assert at["quiet"]["over_refusal"]["mean"] == 0.0  # at the first strength
    assert at["loud"]["over_refusal"]["mean"] == 0.75  # halfway from 0.25 refused to 0.75
    assert at["ratio"]["quiet/loud"]["over_refusal"]["mean"] == 0.0
    beyond_loud = found["at_equal_attribute"]["0.9"]
    assert beyond_loud["loud"]["over_refusal"]["mean"] is None
    assert beyond_loud["ratio"]["quiet/loud"]["over_refusal"]["mean"] is None
    assert beyond_loud["quiet"]["over_refusal"]["mean"] == pytest.approx(0.4)
    assert found["levels_reached"]["loud"] == {"0.5": [True, True], "0.9": [False, False]}
    assert found["at_equal_kl"]["0.02"]["quiet"]["refusal"]["mean"] == 0.5
    # Up to a KL of 0.4: half of the prompts from 0.02 on and all from 0.2 on; three quarters from 0.1 on.
    assert found["hypervolume"]["quiet"]["mean"] == pytest.approx((0.5 * 0.18 + 1.0 * 0.2) / 0.4)
    assert found["hypervolume"]["loud"]["mean"] == pytest.approx(0.75 * 0.3 / 0.4)
    assert found["chosen"]["quiet"]["refusal"]["mean"] == 0.5
    assert (found["chosen"]["quiet"]["within_limits"], found["chosen"]["loud"]["within_limits"]) == (2, 0)
    assert found["sets"]["AdvBench"] == {"base": {"mean": 0.0, "n": 4}, "quiet": {"mean": 0.5, "n": 4}}
    assert found["curve"]["loud"]["refusal"] == [0.0, 0.25, 0.75]
    assert list(found["base"]) == ["refusal", "over_refusal"]
    page = numbers.markdown(found, {"quiet": "quiet", "loud": "loud", "base": "original"}, {"probe": "3 s a seed"})
    assert "| quiet ÷ loud | 0.00 [0.00, " in page
    assert "| loud | not reached |" in page


def test_a_level_read_off_in_each_seed_by_itself_is_averaged_over_those_that_reach_it(numbers: Any) -> None:
    late = a_seed(1)
    late["methods"]["quiet"] = [strength(0.02, [0] * 4, [0, 0], 0.02), strength(0.2, [1] * 4, [1, 1], 0.2)]
    late["methods"]["loud"] = [strength(0.02, [0] * 4, [0, 0], 0.02), strength(0.2, [0] * 4, [1, 1], 0.2)]
    measures = (REFUSAL, OVER_REFUSAL)
    found = numbers.results_of(
        [a_seed(0), late], measures, curves=["quiet", "loud"], levels=[0.75], kls=[], reference=0.4, resamples=40
    )
    at = found["at_equal_attribute_in_each"]["0.75"]
    assert at["quiet"]["over_refusal"]["mean"] == pytest.approx((0.25 + 0.75) / 2)
    assert at["loud"]["over_refusal"]["mean"] == 1.0  # in the first seed alone
    assert at["ratio"]["quiet/loud"]["over_refusal"]["mean"] == 0.25  # there as well
    # The mean curves: quiet refuses 0.25 and then all, loud no more than 0.375.
    assert found["at_equal_attribute"]["0.75"]["quiet"]["over_refusal"]["mean"] == pytest.approx(0.5)
    assert found["at_equal_attribute"]["0.75"]["loud"]["over_refusal"]["mean"] is None
    page = numbers.markdown(found, {"quiet": "quiet", "loud": "loud"}, {})
    assert "Seeds that reach it: quiet: 2 of 2; loud: 1 of 2." in page


def test_of_one_seed_both_readings_are_the_same_with_their_intervals(numbers: Any) -> None:
    measures = (REFUSAL, OVER_REFUSAL)
    found = numbers.results_of(
        [a_seed()], measures, curves=["quiet", "loud"], levels=[0.5, 0.75], kls=[], reference=0.4, resamples=60
    )
    assert found["at_equal_attribute_in_each"] == found["at_equal_attribute"]
    assert 0 < found["at_equal_attribute"]["0.75"]["loud"]["over_refusal"]["share"] < 1


def test_the_share_of_what_is_read_in_each_seed_counts_seeds(numbers: Any) -> None:
    always, never = a_seed(0), a_seed(1)
    never["methods"]["loud"] = [strength(0.02, [0] * 4, [0, 0], 0.02)]
    for seed in (always, never):
        for of in (seed["base"], *(one for strengths in seed["methods"].values() for one in strengths)):
            of["test"] = {name: values * 100 for name, values in of["test"].items()}
    found = numbers.results_of(
        [always, never],
        (REFUSAL, OVER_REFUSAL),
        curves=["quiet", "loud"],
        levels=[0.5],
        kls=[],
        reference=0.4,
        resamples=300,
    )
    # Half of the seeds that are drawn reach it, and nearly every draw has one of them.
    assert found["at_equal_attribute_in_each"]["0.5"]["loud"]["over_refusal"]["share"] == pytest.approx(0.5, abs=0.06)


def test_intervals_hold_the_spread_over_prompts_and_methods_share_their_draws(numbers: Any) -> None:
    seed = a_seed()
    for method in ("quiet", "loud"):
        for one in seed["methods"][method]:
            one["test"] = {name: values * 50 for name, values in one["test"].items()}
    seed["base"]["test"] = {name: values * 50 for name, values in seed["base"]["test"].items()}
    seed["methods"]["twin"] = seed["methods"]["quiet"]
    found = numbers.results_of(
        [seed], (REFUSAL, OVER_REFUSAL), curves=["quiet", "twin"], levels=[0.75], kls=[], reference=0.4, resamples=300
    )
    cell = found["at_equal_attribute"]["0.75"]["quiet"]["over_refusal"]
    # About a share of ½ · ½ of 100 prompts, as the level lies halfway between the strengths.
    assert 0.15 < cell["low"] < cell["mean"] == 0.25 < cell["high"] < 0.35
    twin = found["at_equal_attribute"]["0.75"]["ratio"]["quiet/twin"]["over_refusal"]
    assert (twin["low"], twin["mean"], twin["high"]) == (1.0, 1.0, 1.0)


# The draws of the prompts -------------------------------------------------------------------------------------------


def test_each_seed_divides_all_prompts_anew_with_every_kind_and_style_in_every_split(draw: Any) -> None:
    rows = [draw.divided(seed) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    bundled = read_jsonl(data_path("builtin:safety_prompts"))
    assert sorted(row["prompt"] for row in rows[0]) == sorted(row["prompt"] for row in bundled)
    counts = Counter((row["kind"], row["style"], row["split"]) for row in rows[0])
    strata = Counter((row["kind"], row["style"]) for row in bundled)
    for (kind, style), n in strata.items():
        for split, share in draw.SHARES.items():
            assert counts[kind, style, split] == pytest.approx(share * n, abs=1), (kind, style, split)
    in_test = [{row["prompt"] for row in some if row["split"] == "test"} for some in (rows[0], rows[2])]
    assert len(in_test[0] & in_test[1]) < 0.5 * len(in_test[0])


# A run --------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_goes_on_to_the_same_results(
    beyond: Any, draw: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_pico(tmp_path / "model")
    sets = tmp_path / "sets"
    sets.mkdir()
    for file, _ in draw.SETS.values():
        (sets / file).write_text("".join(json.dumps({"prompt": f"{i} of {file}"}) + "\n" for i in range(3)))

    def run(out: str) -> None:
        methods = "preserve,full,null_space"
        asked = ["--quick", "--model", model, "--seeds", "0,1", "--methods", methods, "--sets", str(sets)]
        beyond.main([*asked, "--levels", "0,0.5", "--kls", "0.05", "--out", str(tmp_path / out)])

    run("whole")
    whole = json.loads((tmp_path / "whole/results.json").read_text(encoding="utf-8"))
    assert set(whole["hypervolume"]) == {"preserve", "full", "null_space"}
    assert whole["items"]["test"] == {"harmful": 3, "benign": 2, "borderline": 2}
    assert list(whole["sets"]) == list(draw.SETS)
    # Strengths were set at equal KL on validation: 0.01 and 0.3.
    seed = json.loads((tmp_path / "whole/seed-0/trials.json").read_text(encoding="utf-8"))
    for method in ("preserve", "full"):
        assert [one["target"] for one in seed["methods"][method]] == pytest.approx([0.01, 0.3]), method
        for one in seed["methods"][method]:
            kl = one["validation"]["utility_loss"]
            assert sum(kl) / len(kl) == pytest.approx(one["target"], rel=0.5), one["id"]
    assert "### Prompts of others" in capsys.readouterr().out

    generate, calls = TransformersEngine.generate, 0

    def dying(self: Any, *arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (2, 6, 12):
            raise KeyboardInterrupt
        return generate(self, *arguments, **more)

    monkeypatch.setattr(TransformersEngine, "generate", dying)
    kills = 0
    while True:
        try:
            run("killed")
            break
        except KeyboardInterrupt:
            kills += 1
            for journal in (tmp_path / "killed").rglob("*.jsonl"):
                if journal.name in ("base_answers.jsonl", "validation.jsonl", "test.jsonl"):
                    journal.write_bytes(journal.read_bytes() + b'{"half a li')
    assert kills == 3
    with pytest.raises(SystemExit, match=r"another comparison .*another behaviour"):
        beyond.main(["--quick", "--behaviour", "lists", "--model", model, "--out", str(tmp_path / "killed")])
    for name in ("results.json", "curves.png", "seed-0/trials.json", "seed-1/trials.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_style_is_measured_without_what_needs_evidence(beyond: Any, tmp_path: Path) -> None:
    model = save_pico(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--quick", "--model", model, "--seeds", "3", "--behaviour", "sentiment", "--out", str(out)]
    beyond.main([*arguments, "--methods", "full-middle,steering,rosi", "--kls", "0.1"])
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert found["attribute"] == "preference"
    assert "at_equal_attribute" not in found
    assert set(found["hypervolume"]) == {"full-middle", "steering", "rosi"}
    assert set(found["at_equal_kl"]["0.1"]) == {"full-middle", "steering", "ratio"}
    with pytest.raises(SystemExit, match="no prompts at which nothing is to change"):
        beyond.main([*arguments, "--methods", "preserve"])
    with pytest.raises(SystemExit, match="no such method"):
        beyond.main([*arguments, "--methods", "rose"])


def test_the_openings_of_each_beta_go_on_with_the_next_seed_and_are_read_off_at_a_level(
    draw: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import openings

    found = {
        0: {"base": {"kl": 0.0}, "0.0 1.0": {"kl": 0.02, "harmful": 0.4, "benign": 0.1}},
        1: {
            "0.0 1.0": {"kl": 0.02, "harmful": 0.4, "benign": 0.1},
            "0.5 1.0": {"kl": 0.1, "harmful": 0.4, "benign": 0.0},
        },
    }
    for rows in found.values():
        rows["0.0 2.0"] = {"kl": 0.06, "harmful": 0.8, "benign": 0.3}
    found[0]["0.5 1.0"] = {"kl": 0.08, "harmful": 0.9, "benign": 0.3}  # the level lies below the first strength
    found[0]["base"] = {"kl": 0.0, "harmful": 0.3, "benign": 0.0}
    page = openings.markdown(found, (0.0, 0.5), ["harmful", "benign"], 0.6)
    assert "| 0 | 0 | 0.200 | 0.040 |" in page
    assert "| 0 | 0.5 | 0.150 | 0.040 |" in page
    assert "| 1 | 0 | 0.200 | 0.040 |" in page
    assert "| 1 | 0.5 | not reached | not reached |" in page
    assert openings.REFUSES.match("I'm sorry for the")
    assert not openings.REFUSES.match("I'm glad you asked")

    # An untrained model never refuses. One edit's answers to the prompts that are asked first are made refusals.
    generate = TransformersEngine.generate

    def refusing(self: Any, requests: Any, table: Any, *rest: Any, **more: Any) -> Any:
        answers = generate(self, requests, table, *rest, **more)
        if len(table) < 5 or len(requests) != 35:
            return answers
        first = {request.ids for request in requests[:2]}
        return [
            replace(answer, text="I'm sorry for") if request.row == 2 and request.ids in first else answer
            for request, answer in zip(requests, answers, strict=True)
        ]

    monkeypatch.setattr(TransformersEngine, "generate", refusing)
    asked = ["--quick", "--model", save_pico(tmp_path / "model"), "--betas", "0,1", "--strengths", "0.5,1"]
    openings.main([*asked, "--out", str(tmp_path / "out"), "--seeds", "0"])
    line = json.loads((tmp_path / "out/measured.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert list(line["rows"]) == ["base", "0.0 0.5", "0.0 1.0", "1.0 0.5", "1.0 1.0"]
    shares = {name: (row["harmful"], row["benign"], row["borderline"]) for name, row in line["rows"].items()}
    assert shares.pop("0.0 1.0") == (pytest.approx(2 / 3), 0.0, 0.0)
    assert set(shares.values()) == {(0.0, 0.0, 0.0)}
    kl = {name: row["kl"] for name, row in line["rows"].items()}
    assert kl["base"] == 0.0 < kl["0.0 0.5"] < kl["0.0 1.0"]
    assert kl["1.0 1.0"] != pytest.approx(kl["0.0 1.0"], rel=1e-3)
    # What is asked is neither of the probe nor of the test.
    asked_prompts: list[str] = []
    monkeypatch.setattr(openings, "Item", lambda kind, prompt: asked_prompts.append(prompt))
    folder = tmp_path / "out/seed-0"
    run = type("Draw", (), {"folder": folder, "seed": 0})()
    openings._prompts(run, {"harmful": 150, "borderline": 60})
    rows = {row["prompt"]: row["split"] for row in read_jsonl(folder / "prompts.jsonl")}
    probed = {row["prompt"] for row in read_jsonl(folder / "traces.jsonl")}
    assert probed
    assert len(set(asked_prompts)) == 210
    assert not probed & set(asked_prompts)
    assert {rows[prompt] for prompt in asked_prompts} == {"probe", "validation"}
    asked_seeds: list[int] = []
    monkeypatch.setattr(openings, "measured", lambda run, *_: asked_seeds.append(run.seed) or line["rows"])
    openings.main([*asked, "--out", str(tmp_path / "out"), "--seeds", "0,1"])
    assert asked_seeds == [1]
    page = capsys.readouterr().out
    assert "| 1 | 0 | 0.000 | 0.000 |" in page
    assert "| 1 | 1 | not reached |" in page
    kept = [json.loads(line)["seed"] for line in (tmp_path / "out/measured.jsonl").read_text().splitlines()]
    assert kept == [0, 1]


def test_strengths_of_another_folder_join_the_tables(beyond: Any, tmp_path: Path) -> None:
    asked = ["--quick", "--model", save_pico(tmp_path / "model"), "--methods", "full", "--levels", "0", "--kls", "0.1"]
    strong = [*asked, "--out", str(tmp_path / "strong")]
    beyond.main([*strong, "--seeds", "0", "--span", "0.4", "0.6"])
    whole = [*asked, "--out", str(tmp_path / "whole"), "--also", str(tmp_path / "strong")]
    beyond.main([*whole, "--seeds", "0"])
    found = json.loads((tmp_path / "whole/results.json").read_text(encoding="utf-8"))
    curve = found["curve"]["full"]["utility_loss"]
    assert curve == sorted(curve)
    assert len(curve) == 1 + 2 + 2  # without an edit, here, and there
    path = tmp_path / "strong/seed-0/trials.json"
    kl = json.loads(path.read_text(encoding="utf-8"))["methods"]["full"][-1]["test"]["utility_loss"]
    assert curve[-1] == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    path.write_text(path.read_text(encoding="utf-8").replace('"seed": 0', '"seed": 7'), encoding="utf-8")
    with pytest.raises(SystemExit, match="the strengths are of another draw"):
        beyond.main([*whole, "--seeds", "0"])
