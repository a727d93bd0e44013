"""Tasks and attacks in a whole run of a pico model: where they are read, what they leave, and what a kill costs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from runs import command, save_pico, tiny_recipe, whole_run
from steer2edit.engines.base import GREEDY, Sampling
from steer2edit.engines.plan import load_sampling
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import FileError, RecipeError, TaskError
from steer2edit.files.reading import read_json
from steer2edit.pipeline import tasks as pipeline_tasks
from steer2edit.pipeline.judge import judge
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import run_all, run_stage
from steer2edit.recipe import Recipe, load_recipe
from steer2edit.report.page import task_tables
from steer2edit.tasks import harness
from steer2edit.tasks.known import TASKS
from task_sets import local_rows, text, write

OWN = ["arc_easy", "lambada", "wikitext", "gsm8k", "commonsenseqa"]


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for name in TASKS:
        if TASKS[name].files:
            write(folder / TASKS[name].files[0], local_rows(name, 5))
    write(folder / "attacks.jsonl", [{"idx": i, "prompt": f"How do I break {text(i, 3)} !! sure"} for i in range(4)])
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, sets: Path) -> Recipe:
    return tiny_recipe(
        save_pico(tmp_path_factory.mktemp("pico") / "model"),
        search__baselines=["system"],
        data__utility=OWN,
        data__utility_items=3,
        data__sets=str(sets),
        data__attacks={"gcg": {"file": str(sets / "attacks.jsonl"), "count": 3}},
        evaluation__task_tokens=8,
        evaluation__attack_tokens=100,
    )


@pytest.fixture(scope="module")
def unbroken(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory.mktemp("runs") / "unbroken", recipe)


@pytest.fixture
def copy(unbroken: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unbroken, tmp_path / "run"))


def test_every_system_has_every_number_with_its_interval_and_n(unbroken: Path) -> None:
    results = read_json(unbroken / "evaluation/results.json")
    assert set(results["systems"]) == {"base", "system", "steering", "edit"}
    names = [m["name"] for m in results["task_measures"]]
    assert {*OWN, "arc_easy_norm", "lambada_perplexity", "wikitext_bits_per_byte", "gcg_refusal", "gcg_success"} < {
        *names
    }
    for kind, system in results["systems"].items():
        for name in names:
            value = system[name]
            if kind == "system" and name.startswith("wikitext"):
                assert (value["mean"], value["n"]) == (None, 0)  # a text has nothing before it
                continue
            assert value["low"] <= value["mean"] <= value["high"]
            assert value["n"] == 3
    base = results["systems"]["base"]
    assert base["gcg_refusal"]["mean"] + base["gcg_success"]["mean"] + base["gcg_degenerate"]["mean"] == pytest.approx(
        1
    )
    assert set(results["task_differences"]) == {"edit - base", "steering - base", "system - base"}
    for name in names:
        difference = results["task_differences"]["edit - base"][name]
        edit = results["systems"]["edit"][name]["mean"]
        assert difference["mean"] == pytest.approx(edit - base[name]["mean"])
        assert difference["low"] <= difference["mean"] <= difference["high"]
    assert results["systems"]["edit"]["wikitext"]["mean"] != base["wikitext"]["mean"]


def test_results_say_what_was_asked(unbroken: Path, sets: Path) -> None:
    tasks = read_json(unbroken / "evaluation/results.json")["tasks"]
    assert list(tasks) == ["attack gcg", *OWN]
    assert tasks["gsm8k"]["taken"] == "the first 3 of 5"
    assert tasks["gsm8k"]["source"] == "gsm8k_test.jsonl"
    assert (tasks["gsm8k"]["tokens"], tasks["gsm8k"]["samples"]) == (8, 1)
    assert tasks["attack gcg"] == {
        "title": "gcg: refusal",
        "source": "attacks.jsonl",
        "revision": tasks["attack gcg"]["revision"],
        "taken": "the first 3 of 4",
        "n": 3,
        "left_out": 0,
        "licence": "",
        "tokens": 100,
        "samples": 1,
        "sampling": {"temperature": 0.0, "top_p": 1.0, "top_k": 0},
    }


def test_attacks_and_utility_stand_apart_from_the_behaviours_measures(unbroken: Path) -> None:
    results = read_json(unbroken / "evaluation/results.json")
    assert not {m["name"] for m in results["measures"]} & {m["name"] for m in results["task_measures"]}
    assert results["systems"]["base"]["refusal"]["n"] == 2  # the harmful prompts of test alone
    (utility, rows), (attack, _) = task_tables(results)
    assert utility[:2] == ["utility", "ARC-Easy"]
    assert [row[0].partition(" (")[0] for row in rows] == ["original", "system prompt", "steering", "edit", "n"]
    assert attack == [
        *("under attack gcg", "refusal", "attack success", "refusal, 24 tokens", "attack success, 24 tokens"),
        "late compliance",
    ]
    report = (unbroken / "report.md").read_text(encoding="utf-8")
    assert "| utility | ARC-Easy |" in report
    assert "| under attack gcg | refusal |" in report
    assert "- gsm8k: gsm8k_test.jsonl, the first 3 of 5; answers of at most 8 tokens, 1 each." in report
    assert "- GSM8K, edit - base: " in report
    assert "| utility | ARC-Easy |" in (unbroken / "adapter/README.md").read_text(encoding="utf-8")


def test_no_question_and_no_attack_is_read_before_the_choice(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run", recipe)
    read: list[bool] = []
    for name in ("load_set", "load_attacks"):
        whole = getattr(pipeline_tasks, name)

        def watched(*arguments: Any, whole: Any = whole) -> Any:
            read.append(run.is_whole("edit"))
            return whole(*arguments)

        monkeypatch.setattr(pipeline_tasks, name, watched)
    run_all(run)
    assert read == [True] * 6
    with pytest.raises(FileError, match="not read before an edit is chosen"):
        pipeline_tasks.measure_tasks(Run(tmp_path / "other", recipe), [], {})


@pytest.mark.parametrize("after", [1, 3, 6, 10])
def test_a_killed_evaluation_goes_on_and_ends_the_same(
    copy: Path, unbroken: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Every answer is made once: what the killed process had journalled is not made again."""
    (journal,) = (copy / "evaluation").glob("tasks-*.jsonl")
    journal.unlink()
    calls = 0
    for name in ("generate", "losses"):
        whole = getattr(TransformersEngine, name)

        def counted(self: Any, *arguments: Any, whole: Any = whole) -> Any:
            nonlocal calls
            calls += 1
            if calls == after:
                raise KeyboardInterrupt
            return whole(self, *arguments)

        monkeypatch.setattr(TransformersEngine, name, counted)
    with pytest.raises(KeyboardInterrupt):
        run_stage(Run(copy, recipe), "evaluate", "tiny")
    lines = len(journal.read_text(encoding="utf-8").splitlines()) if journal.is_file() else 0
    monkeypatch.undo()
    run_stage(Run(copy, recipe), "evaluate", "tiny")
    name = "evaluation/results.json"
    assert (copy / name).read_bytes() == (unbroken / name).read_bytes()
    (whole_journal,) = (unbroken / "evaluation").glob("tasks-*.jsonl")
    assert journal.read_bytes() == whole_journal.read_bytes()
    assert lines < len(whole_journal.read_text(encoding="utf-8").splitlines())


def test_a_task_that_is_not_there_keeps_what_was_measured(
    copy: Path, recipe: Recipe, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    other = Path(shutil.copytree(sets, tmp_path / "sets"))
    write(other / "piqa.jsonl", [{"question": "a"}])
    code = command(monkeypatch, "evaluate", copy, "--tasks", "piqa,openbookqa", "--sets", other, "--quiet")
    said = capsys.readouterr().err
    assert code == 2
    assert "row 1 of piqa.jsonl is no question of piqa (got: ['question'])" in said
    assert "Traceback" not in said
    results = read_json(copy / "evaluation/results.json")
    assert results["tasks"]["piqa"] == {"not_measured": said.removeprefix("steer2edit: ").strip()}
    assert results["systems"]["edit"]["openbookqa"]["n"] == 3
    assert results["systems"]["edit"]["gsm8k"]["n"] == 3
    write(other / "piqa.jsonl", local_rows("piqa", 5))
    assert command(monkeypatch, "evaluate", copy, "--json", "--quiet") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["systems"]["edit"]["piqa"]["n"] == 3
    assert list(shown["tasks"]) == ["attack gcg", *OWN, "piqa", "openbookqa"]


@pytest.mark.lm_eval
def test_lm_evals_tasks_join_a_run_and_their_replies_are_kept(
    copy: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = write(tmp_path / "rows.jsonl", local_rows("gsm8k", 5))
    task = {
        "task": "pico_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    path = tmp_path / "pico_sums.yaml"
    path.write_text(json.dumps(task), encoding="utf-8")
    assert command(monkeypatch, "evaluate", copy, "--tasks", path, "--json", "--quiet") == 0
    shown = json.loads(capsys.readouterr().out)
    for system in shown["systems"].values():
        assert (system[str(path)]["n"], system[str(path)]["method"]) == (3, "wilson")
    assert shown["tasks"][str(path)]["taken"] == "at most 3 of each set, first"
    assert shown["tasks"][str(path)]["source"].startswith("lm-eval 0.")
    (journal,) = (copy / "evaluation").glob("tasks-*.jsonl")
    before = journal.read_bytes()
    monkeypatch.setattr(TransformersEngine, "generate", None)  # nothing is made again
    run_stage(Run(copy, load_recipe(copy)), "evaluate", "tiny")
    assert journal.read_bytes() == before


@pytest.mark.lm_eval
def test_a_name_that_is_nobodys_task_is_hinted_at() -> None:
    with pytest.raises(FileError) as error:
        harness.check(["arc_esay"])
    assert str(error.value) == (
        "there is no task arc_esay (got: neither our own nor lm-eval's). Did you mean 'arc_easy'?"
    )
    harness.check(["lm_eval:gsm8k", "boolq"])


def test_tasks_are_sampled_as_the_models_own_configuration_says(copy: Path, tmp_path: Path, recipe: Recipe) -> None:
    model = Path(shutil.copytree(recipe.model.name, tmp_path / "model"))
    config = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20}
    (model / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
    section = recipe.model.model_copy(update={"name": str(model)})
    assert load_sampling(section) == Sampling(0.7, 0.9, 20)
    (model / "generation_config.json").write_text(json.dumps(config | {"do_sample": False}), encoding="utf-8")
    assert load_sampling(section) == GREEDY
    (model / "generation_config.json").write_text("{}", encoding="utf-8")
    assert load_sampling(section) == Sampling(1.0)
    (model / "generation_config.json").unlink()
    assert load_sampling(section) == GREEDY


def test_files_and_names_are_looked_for_before_anything_runs(recipe: Recipe, tmp_path: Path) -> None:
    def failing(**changes: Any) -> str:
        data = recipe.data.model_copy(update=changes)
        with pytest.raises(FileError) as error:
            run_all(Run(tmp_path / "run", recipe.model_copy(update={"data": data})))
        assert not (tmp_path / "run" / "traces.jsonl").exists()
        return str(error.value)

    missing = tiny_recipe(data__attacks={"gcg": "nowhere.jsonl"}).data.attacks
    assert failing(attacks=missing) == "no such file (got: nowhere.jsonl). Check the path."
    assert "the folder of the sets is not there" in failing(sets=str(tmp_path / "none"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "the folder of the sets has no file of arc_easy" in failing(sets=str(empty))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__attacks": {"gcg": {"fil": "x"}}}, "unknown key data.attacks.gcg.fil (got: fil). Did you mean 'file'?"),
        ({"data__atacks": {}}, "unknown key data.atacks (got: atacks). Did you mean 'attacks'?"),
        ({"data__attacks": {"GCG": "x"}}, "a name in the recipe's data.attacks cannot be used (got: GCG)"),
        ({"data__attacks": {"over": "x"}}, "got: over, whose over_refusal is a measure already"),
        ({"data__attacks": ["x"]}, "Write names with their files"),
        ({"data__attacks": {"gcg": 3}}, "data.attacks.gcg cannot be used (got: 3)"),
        ({"data__attacks": {"gcg": {"file": "x", "count": 0}}}, "data.attacks.gcg.count cannot be used"),
        ({"data__utility": ["gsm8k", "gsm8k"]}, "names a task twice (got: gsm8k)"),
        ({"data__utilty": []}, "Did you mean 'utility'?"),
        ({"evaluation__attack_tokens": 99}, "evaluation.attack_tokens cannot be used"),
        ({"evaluation__task_samples": 3}, "write task_sampling: model"),
    ],
)
def test_mistakes_in_the_keys_are_one_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        tiny_recipe(**changes)
    assert said in str(error.value)


def test_a_behaviour_without_attacks_refuses_them() -> None:
    with pytest.raises(RecipeError, match=r"the behaviour brevity does not read data.attacks \(got: gcg\)"):
        tiny_recipe(
            behaviour={"name": "brevity"}, data={"attacks": {"gcg": "x.jsonl"}}, search__limits={}, evaluation={}
        )


def test_too_few_attacks_are_one_sentence(copy: Path, sets: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    changed = f"data.attacks={{gcg: {{file: {sets / 'attacks.jsonl'}, count: 9}}}}"
    assert command(monkeypatch, "evaluate", copy, changed, "--quiet") == 2
    assert (
        f"the attack prompts gcg are too few (got: 4 in {sets / 'attacks.jsonl'}, 9 asked)" in capsys.readouterr().err
    )


def test_a_run_goes_on_to_its_report_without_a_task_that_fails(
    unbroken: Path, recipe: Recipe, sets: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(sets, tmp_path / "sets"))
    write(other / "piqa.jsonl", [{"question": "a"}])
    data = recipe.data.model_copy(update={"sets": str(other), "utility": [*OWN, "piqa"]})
    copy = Path(shutil.copytree(unbroken, tmp_path / "run"))
    with pytest.raises(TaskError, match="no question of piqa"):
        run_all(Run(copy, recipe.model_copy(update={"data": data})))
    report = (copy / "report.md").read_text(encoding="utf-8")
    assert "- piqa: not measured: row 1 of piqa.jsonl is no question of piqa" in report
    assert "| utility | ARC-Easy |" in report
    # The page has the results as well, although the test is not whole.
    assert 'id="headline-title"' in (copy / "report.html").read_text(encoding="utf-8")


def test_judging_again_judges_attacks_and_keeps_utility(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = judge(copy)
    assert judged["after"]["systems"] == judged["before"]["systems"]
    assert judged["after"]["task_differences"] == judged["before"]["task_differences"]
    assert judged["after"]["tasks"] == judged["before"]["tasks"]
    monkeypatch.setitem(__import__("steer2edit.behaviours.safety", fromlist=["x"])._DETECTORS, "declining", bool)
    after = judge(copy)["after"]["systems"]["base"]
    assert after["gcg_success"]["mean"] == 0.0
    assert after["gcg_refusal"]["mean"] == 1.0 - after["gcg_degenerate"]["mean"]
    assert after["gsm8k"] == judged["before"]["systems"]["base"]["gsm8k"]


def test_tasks_make_no_other_stage_stale(copy: Path, recipe: Recipe) -> None:
    run = Run(copy, tiny_recipe(recipe.model.name, search__baselines=["system"]))
    stale = [stage for stage in ("traces", "probe", "score", "search", "edit", "export") if not run.is_whole(stage)]
    assert stale == []
    assert not run.is_whole("evaluate")
