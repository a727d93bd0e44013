"""Our numbers against lm-eval's own: its HFLM on the same model, its own task files on the same rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.tasks
import numpy as np
import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM

from runs import save_pico
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.method.intervention import NOTHING, Intervention
from steer2edit.models.load import load_model
from steer2edit.searching.candidates import BASE, Candidate
from steer2edit.searching.journal import Journal
from steer2edit.tasks import harness
from steer2edit.tasks.asking import Asking, groups
from steer2edit.tasks.bench import TaskBench
from steer2edit.tasks.engine_lm import EngineLM
from steer2edit.tasks.known import TASKS
from steer2edit.tasks.sets import load_set
from steer2edit.tasks.summary import summarised, values_of
from task_sets import hub_rows, write

pytestmark = pytest.mark.lm_eval
CONTEXT = 192
THEIRS = {
    "arc_easy": "arc/arc_easy.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada": "lambada/lambada_openai.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}
# lm-eval's name of each of our numbers.
METRICS = {
    **{
        name: {name: "acc,none", f"{name}_norm": "acc_norm,none"}
        for name in ("arc_easy", "openbookqa", "piqa", "hellaswag")
    },
    "lambada": {"lambada": "acc,none", "lambada_perplexity": "perplexity,none"},
    "wikitext": {"wikitext": "word_perplexity,none", "wikitext_bits_per_byte": "bits_per_byte,none"},
}
EDIT = Candidate("an edit", "edit", {})
ASKED = Candidate("system-0", "system", {"system": "Answer with bread."})


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_pico(tmp_path_factory.mktemp("pico") / "model", initializer_range=0.3)


@pytest.fixture
def loaded(base: str) -> tuple[Any, Any]:
    model, tokenizer = load_model(base, dtype="float32", device="cpu")
    model.config.max_position_embeddings = CONTEXT  # so that an article takes several windows
    return model, tokenizer


def hflm(model: Any, tokenizer: Any) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=CONTEXT)


def their_task(name: str, folder: Path) -> tuple[str, Path]:
    """lm-eval's own task file, whose rows are ours; its name, and the rows' file."""
    rows = write(folder / "rows" / f"{TASKS[name].files[0]}", hub_rows(name, 4 if name == "wikitext" else 24))
    own = Path(lm_eval.tasks.__file__).parent / THEIRS[name]
    splits = "\n".join(f"    {split}: {rows}" for split in ("train", "validation", "test"))
    (folder / f"{name}.yaml").write_text(
        f"include: {own}\ntask: pico_{name}\ntag: null\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs:\n  data_files:\n{splits}\n",
        encoding="utf-8",
    )
    return str(folder / f"{name}.yaml"), rows


def asking_of(engine: TransformersEngine, tried: list[Candidate], path: Path) -> Asking:
    return Asking(engine, Journal(path), tried, 4)


def by_lm_eval(name: str, path: str, lm: Any, **more: Any) -> dict[str, Any]:
    (task,) = harness._loaded(path)["tasks"].values()
    manager = harness._manager(str(Path(path).parent))
    results = simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0, task_manager=manager, **more)
    of_item = {"acc": {}, "acc_norm": {}}
    for row in results["samples"][f"pico_{name}"]:
        for metric in of_item.keys() & row.keys():
            of_item[metric][row["doc_id"]] = row[metric]
    in_order = {metric: [values[i] for i in sorted(values)] for metric, values in of_item.items()}
    return results["results"][f"pico_{name}"] | {"items": in_order}


@pytest.mark.parametrize("name", THEIRS)
def test_our_numbers_are_lm_evals_own(name: str, loaded: Any, make_edit: Any, tmp_path: Path) -> None:
    model, tokenizer = loaded
    edit = make_edit(model, rho_attn=0.1, rho_mlp=0.1)
    engine = TransformersEngine(model, tokenizer)
    tried = [BASE, EDIT]
    path, rows = their_task(name, tmp_path)

    interventions = {BASE.id: NOTHING, EDIT.id: edit.intervention(EDIT.id)}
    together = groups(tried, lambda candidate: interventions[candidate.id])
    bench = TaskBench(asking_of(engine, tried, tmp_path / "journal.jsonl"), together)
    questions = load_set(TASKS[name], rows.parent, None, "first", 0).questions
    values = values_of(TASKS[name], bench.replies(TASKS[name], questions))

    theirs = [by_lm_eval(name, path, hflm(model, tokenizer))]
    edit.apply(model)
    theirs.append(by_lm_eval(name, path, hflm(model, tokenizer)))
    assert values[0] != values[1]
    for metric in TASKS[name].metrics:
        for ours, their in zip(values, theirs, strict=True):
            mean = summarised(metric, ours[metric.name], 20, 0, 1)["mean"]
            their_name = METRICS[name][metric.name]
            assert mean == pytest.approx(their[their_name], rel=1e-4), metric.name
            if their_name.startswith("acc"):
                assert ours[metric.name] == their["items"][their_name.removesuffix(",none")]


@pytest.mark.parametrize("name", ["arc_easy", "lambada", "wikitext"])
def test_lm_eval_over_the_engine_gives_what_it_gives_over_its_own_model(
    name: str, loaded: Any, make_edit: Any, tmp_path: Path
) -> None:
    model, tokenizer = loaded
    edit = make_edit(model, rho_attn=0.1, rho_mlp=0.1)
    engine = TransformersEngine(model, tokenizer)
    tried = [BASE, EDIT, *([ASKED] if name != "wikitext" else [])]
    path, _ = their_task(name, tmp_path)
    interventions = {BASE.id: NOTHING, EDIT.id: edit.intervention(EDIT.id), ASKED.id: NOTHING}
    together = groups(tried, lambda candidate: interventions[candidate.id])
    asking = asking_of(engine, tried, tmp_path / "journal.jsonl")
    measured = harness.measured(path, asking, together, items=None, order="first", seed=0)

    theirs = [by_lm_eval(name, path, hflm(model, tokenizer))]
    edit.apply(model)
    theirs.append(by_lm_eval(name, path, hflm(model, tokenizer)))
    edit.revert(model)
    if name != "wikitext":
        theirs.append(by_lm_eval(name, path, hflm(model, tokenizer), system_instruction=ASKED.config["system"]))
    for ours, their in zip(measured.values, theirs, strict=True):
        for metric in measured.metrics:
            key = metric.name.removeprefix(f"{path}_") if metric.name != path else next(iter(their_metrics(name)))
            mean = summarised(metric, ours[metric.name], 20, 0, 1)["mean"]
            assert mean == pytest.approx(their[f"{key},none"], rel=1e-4), metric.name


def their_metrics(name: str) -> list[str]:
    return {
        "arc_easy": ["acc"],
        "lambada": ["perplexity"],
        "wikitext": ["word_perplexity"],
    }[name]


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def test_the_adapter_equals_hflm_request_by_request(loaded: Any, make_edit: Any, tmp_path: Path) -> None:
    model, tokenizer = loaded
    edit = make_edit(model, rho_attn=0.1, rho_mlp=0.1)
    engine = TransformersEngine(model, tokenizer)
    tried = [BASE, EDIT]
    interventions: dict[str, Intervention] = {BASE.id: NOTHING, EDIT.id: edit.intervention(EDIT.id)}
    (group,) = groups(tried, lambda candidate: interventions[candidate.id])
    ours = EngineLM(asking_of(engine, tried, tmp_path / "journal.jsonl"), group, "pico")
    long = "bread and water " * 40
    pairs = requests(
        ("The capital", " of France"),
        ("The capital ", "of France"),
        ("", "The capital"),
        (long, " of France is Paris."),
        ("a", " "),
    )
    rolling = requests(("The capital of France is Paris.",), (long,), ("x",))
    greedy = {"until": ["\n", "qq"], "max_gen_toks": 12, "do_sample": False}
    asked = requests(("The capital of", greedy), ("Sure, here is", greedy), (long, greedy))
    for at in (0, 1):
        ours.at = at
        if at == 1:
            edit.apply(model)
        theirs = hflm(model, tokenizer)
        wanted = theirs.loglikelihood(pairs), theirs.loglikelihood_rolling(rolling), theirs.generate_until(asked)
        if at == 1:
            edit.revert(model)
        got = ours.loglikelihood(pairs), ours.loglikelihood_rolling(rolling), ours.generate_until(asked)
        np.testing.assert_allclose([p for p, _ in got[0]], [p for p, _ in wanted[0]], rtol=1e-5, atol=1e-4)
        assert [flag for _, flag in got[0]] == [flag for _, flag in wanted[0]]
        np.testing.assert_allclose(got[1], wanted[1], rtol=1e-5, atol=1e-4)
        assert got[2] == wanted[2]
        assert all(got[2])


def test_what_the_model_would_write_is_greedy_and_stop_strings_end_an_answer(loaded: Any, tmp_path: Path) -> None:
    model, tokenizer = loaded
    engine = TransformersEngine(model, tokenizer)
    (group,) = groups([BASE], lambda _: NOTHING)
    ours = EngineLM(asking_of(engine, [BASE], tmp_path / "journal.jsonl"), group, "pico")
    settings = {"until": [], "max_gen_toks": 9, "do_sample": False}
    (whole,) = ours.generate_until(requests(("The capital of", settings)))
    stop = whole[3:5]
    (cut,) = ours.generate_until(requests(("The capital of", settings | {"until": [stop]})))
    assert cut == whole[: whole.index(stop)]
    (theirs,) = hflm(model, tokenizer).generate_until(requests(("The capital of", settings | {"until": [stop]})))
    assert cut == theirs
