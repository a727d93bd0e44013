"""Whole suites on tiny random models: what they leave, what a kill costs, and runs beside each other."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from runs import command
from sides import SENTENCE
from steer2edit.engines.host import Host
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import FileError
from steer2edit.paper import rows
from steer2edit.paper.forecast import forecast
from steer2edit.paper.parts import FOLDER
from steer2edit.paper.plan import plan_suite
from steer2edit.paper.rows import PartResult
from steer2edit.paper.work import PAGE, run_suite
from steer2edit.pipeline import training
from steer2edit.pipeline.run import Run
from steer2edit.progress import be_quiet
from steer2edit.searching import journal
from steer2edit.training import course
from suites import FAST, NAMES, everything, rows_of, tables_of
from tiny_six import save_tiny

pytestmark = pytest.mark.usefixtures("quiet", "undrawn")  # but for the suite that `whole` is: it is made before


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@dataclass
class Watch:
    """Which test prompts reached the model, and which of them before their run had its choice.

    Attributes:
        texts: run → the texts of its test prompts. run: that is at work now.
    """

    texts: dict[str, list[str]]
    run: Run | None = None
    seen: set[str] = field(default_factory=set)
    early: set[str] = field(default_factory=set)

    def look(self, tokenizer: Any, sequences: Iterable[Sequence[int]]) -> None:
        if self.run is None:
            return
        name = self.run.folder.name
        texts = "\n".join(tokenizer.decode(list(ids)) for ids in sequences)
        found = {text for text in self.texts[name] if text in texts}
        self.seen |= found
        if found and not self.run.is_whole("edit"):
            self.early |= found


@pytest.fixture(scope="module")
def watch(model: str) -> Watch:
    plan = everything(model, Path("nowhere"))
    items = {run.name: run.recipe.behaviour.items(run.recipe.source, "test") for run in plan.runs}
    return Watch({name: [item.text for item in of_run] for name, of_run in items.items()})


@pytest.fixture(scope="module")
def whole(model: str, watch: Watch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite `all`, watched, that nothing disturbed. Nobody changes it."""
    be_quiet()
    out = tmp_path_factory.mktemp("suites") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        _watch_engine(watch, patch)
        result = run_suite(everything(model, out), out)
    assert result.failures == {}
    return out


def _watch_engine(watch: Watch, patch: pytest.MonkeyPatch) -> None:
    """All that a model reads goes through these: answers, given texts, the traces of the probe and of training."""
    generate, losses, working = TransformersEngine.generate, TransformersEngine.losses, Run.working
    run_pass, examples_of = Host.run_pass, training.examples_of

    def watched_generate(self: Any, requests: Any, *rest: Any) -> Any:
        watch.look(self.tokenizer, [request.ids for request in requests])
        return generate(self, requests, *rest)

    def watched_losses(self: Any, pairs: Any, *rest: Any) -> Any:
        watch.look(self.tokenizer, [prompt + answer for prompt, answer in pairs])
        return losses(self, pairs, *rest)

    def watched_pass(self: Any, plan: Any, *rest: Any) -> Any:
        watch.look(self.engine.tokenizer, [span.ids for span in plan.spans])
        return run_pass(self, plan, *rest)

    def watched_examples(tokenizer: Any, *rest: Any, **more: Any) -> Any:
        examples = examples_of(tokenizer, *rest, **more)
        watch.look(tokenizer, [span.ids for span in examples])
        return examples

    @contextlib.contextmanager
    def watched_working(self: Run) -> Iterator[None]:
        watch.run = self
        with working(self):
            yield
        watch.run = None

    patch.setattr(TransformersEngine, "generate", watched_generate)
    patch.setattr(TransformersEngine, "losses", watched_losses)
    patch.setattr(Host, "run_pass", watched_pass)
    patch.setattr(training, "examples_of", watched_examples)
    patch.setattr(Run, "working", watched_working)


def test_every_part_has_a_table_and_every_table_its_figures(whole: Path) -> None:
    parts = ("trade_off", "ablations", "overall", "sensitivity", "training", "side_effects")
    assert set(tables_of(whole)) == {f"{part}.{kind}" for part in parts for kind in ("csv", "md")}
    figures = {path.stem for path in (whole / "figures").glob("*.pdf")}
    assert figures == {path.stem for path in (whole / "figures").glob("*.png")}
    drawn = ("trade_off", "ablations", "sensitivity", "lambda")
    assert figures == {f"{part}-model-{name}" for part in drawn for name in NAMES}
    page = (whole / PAGE).read_text(encoding="utf-8")
    assert all(f"(figures/{name}.png)" in page for name in figures)
    assert "# Not measured" not in page


def test_no_model_reads_a_test_prompt_before_its_run_has_its_choice(whole: Path, watch: Watch) -> None:
    assert watch.early == set()
    # And afterwards every one of them, so that the watch sees what there is.
    assert watch.seen == {text for texts in watch.texts.values() for text in texts}


def test_no_test_prompt_can_be_read_before_the_choice(model: str, tmp_path: Path) -> None:
    planned = everything(model, tmp_path).runs[0]
    run = Run(tmp_path / "run", planned.recipe)
    with pytest.raises(FileError, match="the test prompts are not read before an edit is chosen"):
        run.items("test")


def test_every_row_has_its_n_and_its_interval(whole: Path) -> None:
    for part in ("trade_off", "ablations", "sensitivity"):
        rows = rows_of(whole, part)
        assert {row["behaviour"] for row in rows} == set(NAMES)
        for row in rows:
            assert int(row["n"]) > 0
            assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])
            assert row["published"] == ""


def test_every_choice_stands_beside_its_budget(whole: Path) -> None:
    for part in ("trade_off", "ablations", "training"):
        chosen = [row for row in rows_of(whole, part) if row["condition"] in ("chosen", "equal budget")]
        assert {row["behaviour"] for row in chosen} == set(NAMES)
        for row in chosen:
            assert int(row["configurations"]) > 0
            assert int(row["evaluations"]) >= int(row["configurations"])


def test_the_trade_off_has_the_sweep_the_best_edits_and_the_original(whole: Path) -> None:
    for name in NAMES:
        lines = {
            (row["method"], row["condition"], row["configuration"])
            for row in rows_of(whole, "trade_off")
            if row["behaviour"] == name
        }
        kinds = [(method, how) for method, how, _ in lines]
        assert kinds.count(("original model", "original")) == 1
        assert kinds.count(("edit", "chosen")) == kinds.count(("steering", "chosen")) == 1
        assert kinds.count(("edit", "star")) == 1  # of two stars the other is the choice
        assert {c for _, how, c in lines if how == "swept"} == {"γ 0.1", "γ 0.4"}


def test_the_ablations_have_every_variant_with_the_same_numbers_and_at_equal_budgets(whole: Path) -> None:
    variants = ["edit", "k_mean", "k_svd", "g_dot", "l0", "l2"]
    for name in NAMES:
        rows = [row for row in rows_of(whole, "ablations") if row["behaviour"] == name]
        same = {row["method"]: row["configuration"] for row in rows if row["condition"] == "same numbers"}
        assert list(same) == variants
        # The same (ρ, α) for all: nothing but the variant differs.
        assert len({text.partition(", variant")[0] for text in same.values()}) == 1
        budgets = {row["method"]: int(row["configurations"]) for row in rows if row["condition"] == "equal budget"}
        assert set(budgets.values()) <= {1, 2}
        kls = {row["found_for_kl"] for row in rows if row["condition"] == "equal KL"}
        assert len(kls) <= 1
        part = PartResult.load(whole / "runs" / f"model-{name}" / FOLDER / "ablations.json")
        assert {front.method for front in part.fronts} == {
            *("full", "k_mean", "k_svd", "g_dot", "l0", "l2"), "attention alone", "MLP alone", "steering"
        }  # fmt: skip
        assert all(front.hypervolume or front.why for front in part.fronts)


def test_each_block_type_alone_has_no_budget_for_the_other(whole: Path) -> None:
    alone = {"attention alone": "ρ_mlp off", "MLP alone": "ρ_attn off"}
    rows = [row for row in rows_of(whole, "ablations") if row["method"] in alone]
    assert rows
    assert all(alone[row["method"]] in row["configuration"] for row in rows)


def test_the_sensitivity_sweeps_one_budget_at_the_chosen_alpha(whole: Path) -> None:
    rows = [row for row in rows_of(whole, "sensitivity") if row["condition"] == "swept"]
    swept = ("ρ_attn 0.1, ρ_mlp off", "ρ_attn 0.3, ρ_mlp off", "ρ_attn off, ρ_mlp 0.1", "ρ_attn off, ρ_mlp 0.3")
    assert {row["configuration"] for row in rows} == {f"{settings}, α 0.3" for settings in swept}
    assert {row["rank"] for row in rows} == {""}


def test_what_a_runs_own_test_has_asked_is_not_asked_again(whole: Path) -> None:
    run = whole / "runs" / "model-safety"
    choice = json.loads((run / "choice.json").read_text(encoding="utf-8"))
    known = {"base", choice["edit"]["id"], choice["steering"]["id"]}
    part = PartResult.load(run / FOLDER / "trade_off.json")
    left = {row.id for row in part.rows} - known
    (path,) = (run / "evaluation").glob("journal-*.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    asked = [line for line in lines if line["round"] == f"trade_off {part.key}" and line["what"] == "answers"]
    prompts = sum(len(part.base.values[name]) for name in ("refusal", "over_refusal", "over_refusal_borderline"))
    assert sum(len(line["outcomes"]) for line in asked) == len(left) * prompts > 0
    assert [line for line in lines if line["round"].startswith("training")] == []


def test_the_sensitivity_asks_the_first_prompts_of_each_kind_alone(whole: Path) -> None:
    """Two of each, as the profile says; the values are those that the same candidate has on all prompts."""
    runs = {name: whole / "runs" / f"model-{name}" / FOLDER for name in NAMES}
    few, all_of_them = (PartResult.load(runs["safety"] / f"{part}.json") for part in ("sensitivity", "trade_off"))
    for name in ("refusal", "over_refusal", "over_refusal_borderline"):
        values = all_of_them.base.values[name]
        assert few.base.values[name] == values[:2]
    assert len(few.base.values["refusal"]) == 2 < len(all_of_them.base.values["refusal"])
    page = (whole / PAGE).read_text(encoding="utf-8")
    assert "Budget sensitivity: measured on the first 2 test prompts of each kind." in page


def test_the_last_table_has_every_measure_of_every_behaviour_under_every_edit(whole: Path) -> None:
    rows = rows_of(whole, "side_effects")
    places = {(row["edit"], row["of"]) for row in rows}
    assert places == {(f"model-{edit}", f"model-{of}") for edit in NAMES for of in NAMES}
    attributes = {("model-safety", "refusal"), ("model-truthfulness", "truthful"), ("model-efficiency", "tokens")}
    assert {(row["of"], row["measure"]) for row in rows if row["own"] == "1"} == attributes
    for row in rows:
        difference = float(row["edited"]) - float(row["original"])
        assert float(row["difference"]) == pytest.approx(difference, abs=1e-4)
        assert float(row["low"]) - 1e-6 <= float(row["difference"]) <= float(row["high"]) + 1e-6


def test_an_edits_effect_on_its_own_items_is_that_of_its_run(whole: Path) -> None:
    """The side effects are measured by themselves, and give what the run's own test gave."""
    for row in rows_of(whole, "side_effects"):
        if row["edit"] == row["of"]:
            results = json.loads((whole / "runs" / row["of"] / "evaluation/results.json").read_text(encoding="utf-8"))
            measured = results["systems"]["edit"][row["measure"]]
            assert float(row["edited"]) == pytest.approx(measured["mean"], abs=1e-4)
            assert int(row["n"]) == measured["n"]


def test_a_suite_that_is_done_asks_nothing_again(whole: Path, model: str, tmp_path: Path, monkeypatch: Any) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "suite"))
    forget_time(out)
    for name in ("generate", "losses"):
        monkeypatch.setattr(TransformersEngine, name, refuse)
    run_suite(everything(model, out), out)
    assert tables_of(out) == tables_of(whole)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("the engine is asked again")


def forget_time(out: Path) -> None:
    """Removes what is made of the rest: tables, figures and the page."""
    for name in ("tables", "figures"):
        shutil.rmtree(out / name)
    (out / PAGE).unlink()


# What a suite writes as it goes on, by the part of its work: the kill comes after one of these.
MOMENTS = {
    "traces": r"model-safety/traces/journal",
    "search": r"model-safety/search/journal",
    "between two runs": r"model-safety/paper/[a-z]+\.json",
    "training": r"model-truthfulness/training/.*\.safetensors",
    "evaluate": r"model-truthfulness/evaluation/journal",
    "ablations": r"model-efficiency/paper/ablations-validation",
    "side effects": r"/side-effects/",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process of its own is a fork here")
def test_a_suite_that_was_killed_goes_on_and_ends_with_the_same_tables(whole: Path, model: str, tmp_path: Path) -> None:
    """Killed by SIGKILL once in each part of the work, after a number of writes that a seeded generator draws."""
    out = tmp_path / "suite"
    draw = random.Random(0)
    for place in MOMENTS.values():
        writes = sum(
            len(path.read_bytes().splitlines()) if path.suffix == ".jsonl" else 1
            for path in whole.rglob("*")
            if path.is_file() and re.search(place, str(path))
        )
        assert writes > 0, place
        killed_after(draw.randint(1, min(writes, 3)), place, model, out)
    run_suite(everything(model, out), out)
    assert tables_of(out) == tables_of(whole)


def killed_after(count: int, place: str, model: str, out: Path) -> None:
    """Runs the suite in another process, which is killed after so many writes to files whose path fits a pattern."""
    child = os.fork()
    if child == 0:
        try:
            _die_after(count, place)
            run_suite(everything(model, out), out)
        finally:
            os._exit(1)  # it was not killed: nothing of pytest may go on here
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the suite was never stopped at {place}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def _die_after(count: int, place: str) -> None:
    """Patches every function that writes a file of the suite's work; this process ends, so that nothing is undone."""
    left = count

    def fatal(write: Any) -> Any:
        def writing(path: Any, *rest: Any, **more: Any) -> Any:
            nonlocal left
            written = write(path, *rest, **more)
            if re.search(place, str(path)):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
            return written

        return writing

    journal.append_jsonl = fatal(journal.append_jsonl)
    course.write_weights = fatal(course.write_weights)
    rows.write_json = fatal(rows.write_json)


# Failures ------------------------------------------------------------------------------------------------------------


def test_a_gated_model_is_one_sentence_and_what_others_gave_is_kept(
    whole: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    load = AutoConfig.from_pretrained

    def gated(name: str, *rest: Any, **more: Any) -> Any:
        if name == "owner/gated":  # as transformers has it
            raise OSError("You are trying to access a gated repo.\nMake sure to have access to it at …\n401")
        return load(name, *rest, **more)

    monkeypatch.setattr(AutoConfig, "from_pretrained", gated)
    out = Path(shutil.copytree(whole, tmp_path / "suite"))
    plan = everything(model, out)
    other = plan_suite("truthfulness", out, model="owner/gated", profile="smoke", changes=FAST).runs
    both = replace(plan, runs=(*other, *plan.runs))
    said = "the model owner/gated is gated (got: no access to it). Ask for access on its page on the Hub"
    found = forecast(both, out)
    assert [one.why.startswith(said) for one in found] == [True, False, False, False]
    result = run_suite(both, out, found)
    assert list(result.failures) == ["gated-truthfulness"]
    assert result.failures["gated-truthfulness"].startswith(said)
    assert {name: text for name, text in tables_of(out).items() if name.endswith(".csv")} == {
        name: text for name, text in tables_of(whole).items() if name.endswith(".csv")
    }
    page = (out / PAGE).read_text(encoding="utf-8")
    assert f"- gated-truthfulness: {said}" in page
    assert "no time was estimated before it" in page


def test_side_effects_of_any_runs(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [whole / "runs" / f"model-{name}" for name in ("safety", "efficiency")]
    code = command(monkeypatch, "side-effects", *runs, "--out", tmp_path / "effects", "--quiet", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert code == 0
    assert {(row["edit"], row["of"]) for row in rows} == {
        (f"model-{a}", f"model-{b}") for a in ("safety", "efficiency") for b in ("safety", "efficiency")
    }
    assert {file.name for file in (tmp_path / "effects").iterdir()} >= {"side_effects.csv", "side_effects.md"}


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["model-safety"], "side effects are those on another behaviour (got: 1 run)"),
        (["model-safety", "model-safety"], "two runs have the same name (got: model-safety)"),
        (["model-safety", "nowhere"], "nowhere is no run directory (got: no recipe.yaml)"),
    ],
)
def test_runs_that_cannot_be_compared_are_one_sentence(
    whole: Path,
    folders: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [whole / "runs" / name for name in folders]
    assert command(monkeypatch, "side-effects", *runs, "--out", tmp_path, "--quiet") == 2
    error = capsys.readouterr().err
    assert said in error
    assert SENTENCE.fullmatch(error)


def test_runs_of_two_models_are_refused(whole: Path, tmp_path: Path) -> None:
    from steer2edit.paper.side_effects import measure_side_effects

    other = Path(shutil.copytree(whole / "runs/model-safety", tmp_path / "other"))
    run = Run(other, Run(other, everything("elsewhere", tmp_path).runs[0].recipe).recipe)
    with run.working():  # writes the other model's recipe
        pass
    with pytest.raises(FileError, match=r"not read before an edit is chosen|of several models"):
        measure_side_effects([whole / "runs/model-efficiency", other], tmp_path / "out")
