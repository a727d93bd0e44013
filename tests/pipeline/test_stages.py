"""Whole runs of a pico model: what they leave, when they read a test prompt, and how they are judged again."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import steer2edit as s2e
from run_files import OUTPUTS, UNDRAWN, _alter, _bytes
from runs import save_pico, tiny_recipe
from steer2edit.behaviours import safety
from steer2edit.behaviours.base import Source
from steer2edit.behaviours.degenerate import degenerate
from steer2edit.behaviours.prompts import load_prompts, load_questions
from steer2edit.behaviours.refusal import declines
from steer2edit.behaviours.safety import BUILTIN, Safety
from steer2edit.errors import FileError, RecipeError
from steer2edit.files.reading import read_json, read_jsonl
from steer2edit.pipeline import stages as pipeline
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import STAGES, Stage, read_study, run_all, run_stage
from steer2edit.recipe import Recipe, load_recipe
from steer2edit.searching.candidates import edit_of

pytestmark = pytest.mark.usefixtures("quiet")


def test_a_run_writes_everything_and_nothing_else(tiny_run: Path) -> None:
    found = {str(file.relative_to(tiny_run)) for file in tiny_run.rglob("*") if file.is_file()}
    journals = {name for name in found if "/journal-" in name}
    assert len(journals) == 3
    assert found - journals == {*OUTPUTS, "report.html", "manifest.json", ".lock", "traces/own.jsonl"}


def test_the_manifest_holds_the_digest_of_every_output_and_the_whole_recipe(tiny_run: Path, recipe: Recipe) -> None:
    manifest = read_json(tiny_run / "manifest.json")
    assert list(manifest["stages"]) == list(STAGES)
    assert manifest["recipe"] == recipe.model_dump(mode="json")
    digests = {name: digest for entry in manifest["stages"].values() for name, digest in entry["files"].items()}
    written = _bytes(tiny_run, [*OUTPUTS, "report.html"])
    assert digests == {
        name: hashlib.sha256(content).hexdigest() for name, content in written.items() if name != "recipe.yaml"
    }


def test_the_recipe_that_is_written_is_the_recipe(tiny_run: Path, recipe: Recipe) -> None:
    assert load_recipe(tiny_run / "recipe.yaml") == recipe


def test_two_runs_give_the_same_bytes(tiny_run: Path, recipe: Recipe, tmp_path: Path) -> None:
    run_all(Run(tmp_path / "again", recipe))
    assert _bytes(tmp_path / "again") == _bytes(tiny_run)


def test_the_edit_that_is_written_is_the_best_trial_made_from_the_scores(tiny_run: Path) -> None:
    trials = [t for t in read_jsonl(tiny_run / "search/trials.jsonl") if t["kind"] == "edit"]
    assert [t["id"] for t in trials] == ["edit-0.1-off-0.2", "edit-0.3-off-0.2"]
    best = min(trials, key=lambda t: (-t["refusal"], t["utility_loss"]))
    choice = read_json(tiny_run / "choice.json")
    assert choice["edit"]["id"] == best["id"]
    assert choice["tried"] == {"steering": 2, "edit": 2}
    study = read_json(tiny_run / "search/study.json")
    ids = ["base", "steering-0.1", "steering-0.4", "edit-0.1-off-0.2", "edit-0.3-off-0.2"]
    assert study == {"evaluations": {"edit": 10, "steering": 10}, "refined": None, "rounds": {"0": ids}, "scale": None}
    assert {name: choice[name] for name in ("evaluations", "refined")} == {
        n: study[n] for n in ("evaluations", "refined")
    }
    assert (choice["method"], choice["discarded"]) == ("grid", 0)
    edit = s2e.Edit.load(tiny_run / "edit.safetensors")
    assert edit.id == edit_of(best["config"], {"full": s2e.Scores.load(tiny_run / "scores.safetensors")}).id
    assert read_json(tiny_run / "adapter/steer2edit.json")["edit"] == edit.id


def test_every_measure_of_every_system_has_its_mean_interval_and_n(tiny_run: Path) -> None:
    results = read_json(tiny_run / "evaluation/results.json")
    assert results["attribute"] == "refusal"
    names = [measure["name"] for measure in results["measures"]]
    assert {"refusal", "over_refusal", "utility_loss", "degenerate", "nll_rise"} <= set(names)
    assert set(results["systems"]) == {"base", "steering", "edit"}
    for system in results["systems"].values():
        for name in names:
            number = system[name]
            assert {"mean", "low", "high", "n"} <= set(number)
            assert number["n"] > 0 or number["mean"] is None
            if number["mean"] is not None:
                assert number["low"] <= number["mean"] <= number["high"]


def test_utility_may_be_measured_on_prompts_of_a_file(recipe: Recipe, run_copy: Path, tmp_path: Path) -> None:
    file = tmp_path / "neutral.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Neutral {i}"}) + "\n" for i in range(5)), encoding="utf-8")
    other = tiny_recipe(recipe.model.name, utility={"prompts": str(file)})
    run = Run(run_copy, other)
    asked = {split: [item.text for item in run._neutral(split, [])] for split in ("validation", "test")}
    assert asked == {"validation": ["Neutral 0", "Neutral 1"], "test": ["Neutral 2", "Neutral 3"]}
    own = Run(run_copy, recipe)
    assert [item.kind for item in own._neutral("validation", own.items("validation"))] == ["benign", "benign"]
    assert run.keys["search"] != own.keys["search"]
    assert run.keys["score"] == own.keys["score"]


def test_the_results_are_those_of_the_answers(tiny_run: Path) -> None:
    answers = read_jsonl(tiny_run / "evaluation/answers.jsonl")
    results = read_json(tiny_run / "evaluation/results.json")
    assert [a["kind"] for a in answers] == ["harmful", "harmful", "benign", "benign", "borderline"]
    for kind, system in results["systems"].items():
        texts = [(a["kind"], a[kind]) for a in answers]
        for number, of in (
            ("refusal", "harmful"),
            ("over_refusal", "benign"),
            ("over_refusal_borderline", "borderline"),
        ):
            flags = [declines(text) and not degenerate(text) for k, text in texts if k == of]
            assert system[number]["mean"] == sum(flags) / len(flags)
            assert system[number]["n"] == len(flags)
        assert system["degenerate"]["mean"] == sum(degenerate(text) for _, text in texts) / 5
    assert list(results["systems"]) == ["base", "steering", "edit"]
    assert results["agreement"]["largest_logit_difference"] < 1e-3
    assert results["systems"]["edit"]["utility_loss"]["mean"] > 0


def test_the_probe_says_whether_its_halves_agree(tiny_run: Path, recipe: Recipe, caplog: Any, tmp_path: Path) -> None:
    agree = s2e.Probe.load(tiny_run / "probe.safetensors").provenance["halves_agree"]
    assert set(agree) == {"attn", "mlp"}
    assert all(-1 <= cosine <= 1 for cosine in agree.values())
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    for limit, said in ((2.0, True), (-2.0, False)):
        caplog.clear()
        with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO", "steer2edit"):
            patch.setattr(pipeline, "WEAK_AGREEMENT", limit)
            run_stage(Run(folder, recipe), "probe", "tiny.yaml")
        shown = f"cosine attn {agree['attn']:.2f}, mlp {agree['mlp']:.2f}"
        assert shown in caplog.text
        assert ("hardly more than chance" in caplog.text) == said


def test_the_original_model_loses_nothing_and_that_is_certain(tiny_run: Path) -> None:
    base = read_json(tiny_run / "evaluation/results.json")["systems"]["base"]
    for number in ("utility_loss", "nll_rise"):
        assert (base[number]["mean"], base[number]["low"], base[number]["high"]) == (0.0, 0.0, 0.0)


def test_the_report_says_what_the_results_say(tiny_run: Path) -> None:
    report = (tiny_run / "report.md").read_text(encoding="utf-8")
    kl = read_json(tiny_run / "evaluation/results.json")["systems"]["edit"]["utility_loss"]
    assert f"{kl['mean']:.2f} [{kl['low']:.2f}, {kl['high']:.2f}]" in report
    tried = [line.split(" | ")[:3] for line in report.splitlines() if line.startswith(("| steering |", "| edit |"))]
    assert tried == [["| steering", "2", "10"], ["| edit", "2", "10"]]
    assert "Limits: none." in report
    pictures = [line.split("(")[1].rstrip(")") for line in report.splitlines() if line.startswith("![")]
    assert pictures == ["figures/trade_off.png", "figures/lambda.png"]
    for picture in pictures:
        assert (tiny_run / picture).read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (tiny_run / picture).with_suffix(".svg").read_text(encoding="utf-8")


@pytest.mark.usefixtures("undrawn")
def test_no_test_prompt_is_read_before_the_evaluation(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, set[str]] = {}
    loaded: list[tuple[str, str]] = []
    now = [""]

    def watched(name: str, stage: Stage) -> Stage:
        def work(run: Run) -> list[str]:
            now[0] = name
            return stage.work(run)

        return replace(stage, work=work)

    def tokens(self: Any, messages: list[dict[str, str]]) -> tuple[int, ...]:
        asked.setdefault(now[0], set()).update(m["content"] for m in messages)
        return made(self, messages)

    def load(source: str, kinds: Any, split: Any, counts: Any, target: Any = None) -> Any:
        loaded.append((now[0], split))
        return load_prompts(source, kinds, split, counts, target)

    from steer2edit.engines.transformers import TransformersEngine

    made = TransformersEngine.tokens
    monkeypatch.setattr(TransformersEngine, "tokens", tokens)
    monkeypatch.setattr("steer2edit.behaviours.safety.load_prompts", load)
    for name, stage in list(STAGES.items()):
        monkeypatch.setitem(STAGES, name, watched(name, stage))
    run_all(Run(tmp_path / "run", recipe))

    assert loaded == [("traces", "probe"), ("search", "validation"), ("evaluate", "test")]
    splits = {
        split: {p.text for p in Safety().items(Source(BUILTIN, {split: dict(getattr(recipe.data, split))}), split)}
        for split in ("probe", "validation", "test")
    }
    assert asked == {"traces": splits["probe"], "search": splits["validation"], "evaluate": splits["test"]}


def test_the_test_prompts_cannot_be_had_before_the_choice_is_whole(
    run_copy: Path, recipe: Recipe, tmp_path: Path
) -> None:
    assert len(Run(run_copy, recipe).items("test")) == 5
    for run in (Run(tmp_path / "new", recipe), Run(run_copy, tiny_recipe(recipe.model.name, search__rho_attn=[0.1]))):
        assert len(run.items("validation")) == 5
        with pytest.raises(FileError, match=r"test prompts are not read before an edit is chosen .* the stage edit"):
            run.items("test")
    _alter(run_copy / "choice.json")
    with pytest.raises(FileError, match="test prompts are not read"):
        Run(run_copy, recipe).items("test")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("search", [{"refine": 2}, {"method": "tpe", "trials": 6, "at_once": 3}], ids=["grid", "tpe"])
def test_a_run_of_variants_layers_sanity_and_questions_reads_the_first_questions_and_then_those_after(
    search: dict[str, Any], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, int]] = []
    splits: list[str] = []

    def questions(file: str, first: int, count: int) -> Any:
        asked.append((file, first, count))
        return load_questions(file, first, count)

    def prompts(source: str, kinds: Any, split: Any, counts: Any, target: Any = None) -> Any:
        splits.append(split)
        return load_prompts(source, kinds, split, counts, target)

    monkeypatch.setattr("steer2edit.pipeline.run.load_questions", questions)
    monkeypatch.setattr("steer2edit.behaviours.safety.load_prompts", prompts)
    file = tmp_path / "questions.jsonl"
    rows = [{"question": f"Is {n} even?", "choices": ["yes", "no"], "answer": n % 2} for n in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given: dict[str, Any] = {
        "variants": ["full", "k_mean", "l0"],
        "layers": [None, "0-1"],
        "sanity": 2,
        "steering": {"low": 0.1, "high": 0.4},
        "limits": {"over_refusal": None, "degenerate": 1.0},
        **search,
    }
    full = tiny_recipe(
        recipe.model.name,
        data__questions={"file": str(file), "validation": 2, "test": 3},
        **{f"search__{key}": value for key, value in given.items()},
    )
    folder = tmp_path / "run"
    run = Run(folder, full)
    run_all(run)
    assert asked == [(str(file), 0, 2), (str(file), 2, 3)]
    assert splits == ["probe", "validation", "test"]
    assert s2e.Scores.load(folder / "scores-k_mean.safetensors").provenance["variant"] == "k_mean"
    assert not (folder / "scores-l0.safetensors").exists()
    trials, study = read_jsonl(folder / "search/trials.jsonl"), read_json(folder / "search/study.json")
    counted = {kind: sum(t["kind"] == kind for t in trials) for kind in ("edit", "steering")}
    assert read_json(folder / "choice.json")["tried"] == counted
    # 5 validation prompts, two choices for each of 2 questions, and for edits 2 simple prompts.
    assert study["evaluations"]["edit"] == (5 + 4 + 2) * counted["edit"]
    assert study["evaluations"]["steering"] == (5 + 4) * counted["steering"] >= study["evaluations"]["edit"]
    assert read_jsonl(folder / "search/discarded.jsonl") == []
    assert all(t["accuracy"] in (0.0, 0.5, 1.0) and len(t["values"]["accuracy"]) == 2 for t in trials)
    assert ("texts" in trials[0], trials[0]["round"]) == (False, "0")
    chosen = next(t for t in trials if t["id"] == read_json(folder / "choice.json")["edit"]["id"])
    edit = s2e.Edit.load(folder / "edit.safetensors")
    assert edit.id == edit_of(chosen["config"], run.scores).id
    results = read_json(folder / "evaluation/results.json")
    assert results["systems"]["edit"]["accuracy"]["n"] == 3
    assert "accuracy (choices)" in (folder / "report.md").read_text(encoding="utf-8")
    before = (folder / "manifest.json").read_bytes()
    run_all(Run(folder, full))
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.usefixtures("undrawn")
def test_stages_one_by_one_give_the_run(tiny_run: Path, recipe: Recipe, tmp_path: Path) -> None:
    for stage in STAGES:
        run_stage(Run(tmp_path / "run", recipe), stage, "tiny.yaml")
    assert _bytes(tmp_path / "run", UNDRAWN) == _bytes(tiny_run, UNDRAWN)


def test_a_stage_whose_forerunner_is_missing_names_it_and_leaves_the_run_as_it_is(
    run_copy: Path, recipe: Recipe
) -> None:
    (run_copy / "probe.safetensors").unlink()
    before = {file: file.read_bytes() for file in run_copy.rglob("*") if file.is_file()}
    other = tiny_recipe(recipe.model.name, name="other")
    with pytest.raises(FileError, match=r"the stage probe has not been run .* Run `steer2edit probe tiny\.yaml` first"):
        run_stage(Run(run_copy, other), "search", "tiny.yaml")
    assert {file: file.read_bytes() for file in run_copy.rglob("*") if file.is_file()} == before


def test_a_run_directory_that_is_a_file_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(RecipeError, match="the run directory is a file"):
        run_all(Run(tmp_path / "file", recipe))
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


# Of two harmful prompts one is a short request and one a question: the styles are taken in turn.
REFUSED_NOTHING = "refusal (harmful) 0.00, refusal (short requests) 0.00, refusal (questions) 0.00"


@pytest.mark.parametrize(
    ("steering", "said"),
    [([], "- steering: none was tried."), ([0.1], f"- steering: γ 0.1; on validation {REFUSED_NOTHING}.")],
)
def test_without_benign_prompts_and_exports_there_is_still_a_report(
    steering: list[float], said: str, recipe: Recipe, tmp_path: Path
) -> None:
    bare = tiny_recipe(
        recipe.model.name,
        behaviour__negative=["harmful"],
        data={"probe": {"harmful": 2}, "validation": {"harmful": 2}, "test": {"harmful": 1}},
        search__steering=steering,
        exports=[],
    )
    run_all(Run(tmp_path / "run", bare))
    results = read_json(tmp_path / "run/evaluation/results.json")
    assert list(results["systems"]) == ["base", *["steering"] * len(steering), "edit"]
    assert results["systems"]["edit"]["over_refusal"] == {
        "mean": None,
        "low": None,
        "high": None,
        "n": 0,
        "method": "none",
    }
    report = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert said in report
    assert not (tmp_path / "run/adapter").exists()


def test_a_manifest_that_is_cut_is_an_error_that_names_it(run_copy: Path, recipe: Recipe) -> None:
    content = (run_copy / "manifest.json").read_text(encoding="utf-8")
    (run_copy / "manifest.json").write_text(content[: len(content) // 2], encoding="utf-8")
    with pytest.raises(FileError, match=r"manifest\.json is not valid JSON"):
        run_all(Run(run_copy, recipe))


@pytest.mark.parametrize("content", ["[]", "{}", '{"name": "an app", "icons": []}', '{"stages": []}'])
def test_a_folder_with_a_manifest_of_others_is_refused_and_left_alone(
    content: str, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(FileError, match=r"manifest\.json is not a run's manifest"):
        run_all(Run(tmp_path, recipe))
    assert (tmp_path / "manifest.json").read_text(encoding="utf-8") == content
    assert not (tmp_path / "traces.jsonl").exists()


def test_the_results_of_a_run_can_be_read(tiny_run: Path) -> None:
    results = pipeline.load_results(tiny_run)
    assert results == json.loads((tiny_run / "evaluation/results.json").read_text(encoding="utf-8"))
    assert results["split"] == "test"


def test_a_package_that_an_export_needs_is_missed_before_anything_runs(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer2edit.pipeline import exports

    monkeypatch.setitem(exports._NEEDS, "gguf", "no_such_package")
    with pytest.raises(FileError, match=r"the export gguf needs the package no_such_package .*pip install"):
        run_all(Run(tmp_path / "run", tiny_recipe(recipe.model.name, exports=["gguf"])))
    assert not (tmp_path / "run").exists()


def test_where_nothing_moves_the_run_says_so(tiny_run: Path) -> None:
    assert read_json(tiny_run / "choice.json")["moved"] is False  # random weights refuse nothing
    assert "Nothing moved: on validation" in (tiny_run / "report.md").read_text(encoding="utf-8")
    assert "Nothing moved: on validation" in (tiny_run / "adapter/README.md").read_text(encoding="utf-8")


# Judged again -------------------------------------------------------------------------------------------------------


def test_a_run_is_judged_again_without_a_model(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steer2edit.engines.host import Host
    from steer2edit.pipeline.judge import judge

    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Host, "engine", property(load))
    before = (run_copy / "evaluation/results.json").read_bytes()
    same = judge(run_copy)
    assert (same["changed"], same["after"]["systems"]) == ({}, same["before"]["systems"])
    monkeypatch.setitem(safety._DETECTORS, "declining", lambda text: True)
    monkeypatch.setattr(safety, "degenerate", lambda text: False)
    judged = judge(run_copy)
    assert judged["after"]["systems"]["base"]["refusal"]["mean"] == 1.0
    assert judged["changed"]["base"]["refusal"] == [0.0, 1.0]
    assert (run_copy / "evaluation/results.json").read_bytes() == before
    assert read_json(run_copy / "judged.json") == judged


def test_a_run_whose_journal_lacks_answers_is_not_judged(run_copy: Path, tmp_path: Path) -> None:
    from steer2edit.pipeline.judge import judge

    (journal,) = (run_copy / "search").glob("journal-*")
    journal.write_text("".join(journal.read_text(encoding="utf-8").splitlines(keepends=True)[:1]), encoding="utf-8")
    with pytest.raises(FileError, match=r"holds no answers for round '0', batch 0 .*run the stage again"):
        judge(run_copy)
    with pytest.raises(FileError, match="this is no finished run"):
        judge(tmp_path)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("search", [{"method": "tpe", "trials": 6, "at_once": 2}, {"refine": 3}], ids=["tpe", "refine"])
def test_a_search_that_would_now_go_another_way_is_judged_as_it_went(
    search: dict[str, Any], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer2edit.pipeline.judge import judge

    changes = {f"search__{key}": value for key, value in search.items()}
    run_all(Run(tmp_path / "run", tiny_recipe(recipe.model.name, search__rho_attn=[0.1, 0.3, 0.6], **changes)))
    monkeypatch.setitem(safety._DETECTORS, "declining", lambda text: len(text) % 2 == 0)
    trials = {row["id"] for row in read_jsonl(tmp_path / "run/search/trials.jsonl")}
    assert set(judge(tmp_path / "run")["changed"]) <= trials


@pytest.mark.usefixtures("undrawn")
def test_a_judgement_by_which_no_edit_is_within_the_limits_says_so(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer2edit.pipeline.judge import judge

    limits = {"over_refusal": 0.5, "degenerate": None}
    run_all(Run(tmp_path / "run", tiny_recipe(recipe.model.name, search__limits=limits)))
    monkeypatch.setattr("steer2edit.behaviours.safety.degenerate", lambda text: False)
    monkeypatch.setitem(safety._DETECTORS, "declining", lambda text: True)
    assert judge(tmp_path / "run")["choice"]["new"] is None


def test_a_whole_run_finds_its_scale_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"search__rho_attn": "auto", "search__rho_mlp": "auto", "search__steering": "auto", "search__points": 2}
    recipe = tiny_recipe(save_pico(tmp_path / "model"), **changes)
    run = Run(tmp_path / "run", recipe)
    with caplog.at_level("INFO", "steer2edit"):
        run_all(run)
    study = read_study(run)
    assert study.scale is not None
    assert study.scale["edits"]
    assert "ρ_attn at α 0.2: KL 0.02 at" in caplog.text
    assert read_json(run.path("choice.json"))["edit"]["id"] in {t.candidate.id for t in study.of_kind("edit")}
    for trial in [*study.of_kind("edit"), *study.of_kind("steering")]:
        assert trial.mean("utility_loss") < 3.0  # never noise
