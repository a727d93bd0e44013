"""What a suite runs: the recipes of every profile, the prompts of a folder, and mistakes in one sentence."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from sides import three_parts
from steer2edit.errors import FileError, RecipeError, Steer2EditError
from steer2edit.models.embedded import EMBEDDED
from steer2edit.paper.facts import paper_models
from steer2edit.paper.plan import SUITES, _pairs, plan_suite
from steer2edit.searching.grid import coarse_grid
from task_sets import write
from tiny_six import rows_of, write_sets

MODELS = list(paper_models())


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets"))


FEW = [
    "data.validation={harmful: 6, benign: 5, borderline: 3}",
    "data.test={harmful: 9, benign: 8, borderline: 3}",
    "data.probe={harmful: 8, benign: 8}",
]


@pytest.mark.parametrize("name", MODELS)
def test_the_papers_profile_has_the_models_grid_and_samples(name: str, sets: Path, tmp_path: Path) -> None:
    facts = paper_models()[name]
    changes = FEW if facts.behaviour == "safety" else ["data.probe=8", "data.validation=4", "data.test=4"]
    (run,) = plan_suite("all", tmp_path, model=name, profile="paper", data=sets, changes=changes).runs
    assert (run.behaviour, run.paper, run.facts) == (facts.behaviour, name, facts)
    recipe = run.recipe
    assert recipe.model.name == facts.hub
    configs = {(c.config["rho_attn"], c.config["rho_mlp"], c.config["alpha"]) for c in coarse_grid(recipe.search)}
    assert configs == set(itertools.product(facts.grid.rho_attn, facts.grid.rho_mlp, facts.grid.alpha))
    assert (facts.best.rho_attn, facts.best.rho_mlp, facts.best.alpha) in configs
    assert recipe.search.steering == pytest.approx([0.1 * i for i in range(1, 16)])
    assert (recipe.search.sanity, recipe.search.refine, recipe.search.baselines) == (20, 0, [])
    assert recipe.evaluation.task_sampling == "model"
    assert recipe.behaviour.system == facts.system
    expected = {"safety": (10, 10), "truthfulness": (1, 10), "efficiency": (3, 3)}[facts.behaviour]
    assert (recipe.evaluation.samples, recipe.evaluation.task_samples) == expected
    assert set(recipe.data.attacks) == set(facts.attacks)
    if facts.labelled:
        assert recipe.behaviour.answers == str(sets / facts.labelled)  # type: ignore[attr-defined]


@pytest.mark.parametrize("suite", ["safety", "efficiency", "ablations"])
def test_without_a_model_the_papers_profile_runs_those_of_the_suite(suite: str, tmp_path: Path) -> None:
    wanted = [name for name, model in paper_models().items() if suite in ("ablations", model.behaviour)]
    if suite == "safety":
        runs = plan_suite(suite, tmp_path, profile="paper", data=_large(tmp_path / "sets")).runs
        assert [run.paper for run in runs] == wanted
        assert [run.recipe.data.test for run in runs] == [{"harmful": 100, "benign": 100, "borderline": 60}] * 2
    pairs = _pairs(suite, "paper", None, None)
    assert [key for _, key, _ in pairs] == wanted
    assert all(paper_models()[str(key)].behaviour == behaviour for _, key, behaviour in pairs)


def _large(folder: Path) -> Path:
    """A folder with as many prompts as the profile `paper` asks for."""
    write_sets(folder)
    write(folder / "malicious_instruct.jsonl", [{"prompt": f"Harm {i} now"} for i in range(100)])
    write(folder / "advbench.jsonl", [{"prompt": f"Goal {i} now"} for i in range(300)])
    splits = ["official_probe"] * 100 + ["alpaca_sample"] * 700
    benign = [{"prompt": f"Fact {i} now", "split": split} for i, split in enumerate(splits)]
    write(folder / "alpaca_benign.jsonl", benign)
    return folder


def test_a_model_that_the_paper_steered_to_another_behaviour_gets_the_coarse_grid(sets: Path, tmp_path: Path) -> None:
    changes = ["data.probe=8", "data.validation=4", "data.test=4"]
    (run,) = plan_suite(
        "truthfulness", tmp_path, model="llama-2-7b-chat", profile="paper", data=sets, changes=changes
    ).runs
    assert run.facts is None
    assert len(coarse_grid(run.recipe.search)) == 125
    assert (run.recipe.search.refine, run.recipe.behaviour.system) == (5, None)


def test_another_model_has_every_behaviour_of_the_suite(tmp_path: Path) -> None:
    assert [run.name for run in plan_suite("all", tmp_path).runs] == [
        f"smollm2-135m-instruct-{behaviour}" for behaviour in ("safety", "truthfulness", "efficiency")
    ]
    (run,) = plan_suite("safety", tmp_path, model="someone/Some-Model").runs
    assert (run.name, run.model, run.recipe.model.name) == ("some-model-safety", "some-model", "someone/Some-Model")
    assert plan_suite("safety", tmp_path).runs[0].recipe.model.name == EMBEDDED


def test_seeds_are_runs_of_their_own(tmp_path: Path) -> None:
    runs = plan_suite("truthfulness", tmp_path, profile="smoke", seeds=2).runs
    assert [(run.name, run.recipe.seed) for run in runs] == [
        ("smollm2-135m-instruct-truthfulness-seed-0", 0),
        ("smollm2-135m-instruct-truthfulness-seed-1", 1),
    ]


def test_a_folders_prompts_stand_in_one_split_alone_and_the_jailbreaks_goals_in_test(
    sets: Path, tmp_path: Path
) -> None:
    (run,) = plan_suite("safety", tmp_path, model="llama-2-7b-chat", profile="smoke", data=sets).runs
    rows = rows_of(tmp_path / "data" / "safety_prompts.jsonl")
    texts = [row["prompt"] for row in rows]
    assert len(set(texts)) == len(texts)
    split_of = {row["prompt"]: (row["kind"], row["split"]) for row in rows}
    goals = [row["prompt"] for row in rows_of(sets / "advbench.jsonl")]
    assert {split_of[goal] for goal in goals[:100]} == {("harmful", "test")}
    assert {split_of[goal] for goal in goals[100:]} == {("harmful", "validation")}
    assert {split_of[row["prompt"]] for row in rows_of(sets / "malicious_instruct.jsonl")} == {("harmful", "probe")}
    benign = [row["prompt"] for row in rows_of(sets / "alpaca_benign.jsonl")]
    assert [split_of[prompt][1] for prompt in benign] == ["probe"] * 8 + ["validation"] * 200 + ["test"] * 52
    assert run.recipe.data.prompts == str(tmp_path / "data" / "safety_prompts.jsonl")


def test_what_a_folder_lacks_is_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    sets = write_sets(tmp_path / "sets", without=["jailbreak_gcg_llama2-7b.jsonl", "commonsenseqa_validation.jsonl"])
    (run,) = plan_suite("safety", tmp_path, model="llama-2-7b-chat", profile="smoke", data=sets).runs
    assert set(run.recipe.data.attacks) == {"advllm"}
    assert run.recipe.data.utility == ["gsm8k"]
    assert run.notes[0] == "gcg is not measured: there is no jailbreak_gcg_llama2-7b.jsonl"
    assert run.notes[1].startswith("commonsenseqa is not measured: the folder of the sets has no file of commonsenseqa")


def test_a_prompt_file_that_is_missing_is_one_sentence(tmp_path: Path) -> None:
    sets = write_sets(tmp_path / "sets", without=["advbench.jsonl"])
    with pytest.raises(FileError) as error:
        plan_suite("safety", tmp_path, profile="smoke", data=sets)
    what, got, _ = three_parts(error.value)
    assert (what, got) == ("the folder of the sets lacks prompts", f"no advbench.jsonl in {sets}")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"suite": "safty"}, "there is no such suite (got: safty). Did you mean 'safety'?"),
        ({"profile": "gpu"}, "there is no such profile (got: gpu)"),
        ({"profile": "paper"}, "the profile paper asks the paper's prompts (got: no folder of them)"),
        ({"data": "nowhere"}, "the folder of the sets is not there (got: nowhere)"),
        ({"like": "llama-9"}, "the paper has no such model (got: llama-9)"),
        ({"changes": ["search.alfa=[0.1]"]}, "the recipe has an unknown key search.alfa"),
    ],
)
def test_a_mistake_is_one_sentence(wrong: dict[str, object], said: str, tmp_path: Path) -> None:
    given = {"suite": "safety", "model": "some/model", **wrong}
    with pytest.raises(Steer2EditError) as error:
        plan_suite(out=tmp_path, **given)  # type: ignore[arg-type]
    assert str(error.value).startswith(said)
    three_parts(error.value)


def test_a_line_without_a_prompt_is_named(tmp_path: Path) -> None:
    sets = write_sets(tmp_path / "sets")
    with open(sets / "malicious_instruct.jsonl", "a", encoding="utf-8") as file:
        file.write('{"text": "no prompt"}\n')
    with pytest.raises(FileError, match=r"line 9 of malicious_instruct\.jsonl is not a prompt"):
        plan_suite("safety", tmp_path, profile="smoke", data=sets)


def test_a_name_of_no_model_is_not_taken_for_one_of_the_six(tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        plan_suite("safety", tmp_path, model="folder", like="gpt2")


def test_every_suite_has_parts() -> None:
    assert set(SUITES) == {
        *("safety", "truthfulness", "efficiency", "ablations", "sensitivity", "training", "all", "styles")
    }
    assert set(SUITES["all"]) == {part for parts in SUITES.values() for part in parts}


@pytest.mark.parametrize("profile", ["cpu", "smoke"])
def test_no_prompt_of_a_style_stands_in_two_splits_or_has_a_response_in_the_traces(
    profile: str, tmp_path: Path
) -> None:
    for run in plan_suite("styles", tmp_path, profile=profile).runs:
        behaviour, source = run.recipe.behaviour, run.recipe.source
        texts = {
            split: {item.text for item in behaviour.items(source, split)} for split in ("probe", "validation", "test")
        }
        assert not texts["probe"] & texts["validation"]
        assert not texts["test"] & (texts["probe"] | texts["validation"])
        assert len(texts["test"]) == (200 if profile == "cpu" else 3)


def test_the_papers_profile_has_no_styles(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the styles are not the paper's"):
        plan_suite("styles", tmp_path, profile="paper", data=tmp_path)
