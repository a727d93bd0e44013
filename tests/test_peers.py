"""The benchmark against other tools: pairs that take turns, a journal that survives a kill, and tools that agree."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import make_pico, make_tokenizer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SIZES = {"traces": 3, "prompts": 3, "strengths": 2, "tokens": 5, "rows": 4}
# A tool that tells what it is told to tell: a script with these names filled in. It notes that it was called.
STAND_IN = """
import json, os, pathlib, signal, sys
task, folder, out = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
log = pathlib.Path({log!r})
calls = log.read_text().split() if log.exists() else []
log.write_text(" ".join([*calls, {name!r}]))
number = calls.count({name!r})
if {kills} and number == 0:
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit()
if {fails}:
    sys.exit("boom | it is broken")
out.mkdir(parents=True)
(out / "answers.json").write_text({answers!r})
seconds = {seconds}[number % len({seconds})]
print("words that a tool prints")
print(json.dumps({{"load": 0.5, "seconds": seconds, "memory": {memory}, "versions": {{{name!r}: "1.2.3"}}}}))
"""


@pytest.fixture(scope="module")
def peers() -> Iterator[Any]:
    """The benchmark's module, and the scripts of the tools on the path."""
    folders = [str(BENCHMARKS), str(BENCHMARKS / "peer_tools")]
    sys.path[:0] = folders
    import peers

    yield peers
    for folder in folders:
        sys.path.remove(folder)


@pytest.fixture
def stand_in(peers: Any, tmp_path: Path) -> Any:
    """stand_in(name, …) makes a tool that only pretends."""

    def make(
        name: str,
        seconds: list[float],
        answers: str = "[[[1, 2], [3]]]",
        memory: int = 10_000_000,
        fails: bool = False,
        kills: bool = False,
    ) -> Any:
        script = tmp_path / f"{name}.py"
        log = str(tmp_path / "calls.txt")
        script.write_text(
            STAND_IN.format(
                log=log, name=name, kills=kills, fails=fails, answers=answers, seconds=seconds, memory=memory
            )
        )
        return peers.Tool(name, script, {"sweep-steer": ""}, beyond=f"{name}'s own")

    return make


@pytest.fixture(scope="module")
def plan(peers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A plan for a pico model."""
    from measure import read_plan
    from prepare import prepare

    folder = tmp_path_factory.mktemp("plan")
    make_pico("llama", max_position_embeddings=4096).save_pretrained(str(folder / "pico"))
    make_tokenizer().save_pretrained(str(folder / "pico"))
    prepare(folder, str(folder / "pico"), SIZES)
    return read_plan(folder)


def called(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls.txt").read_text().split()


# The harness --------------------------------------------------------------------------------------------------------


def test_both_sides_take_turns_and_the_table_has_medians_and_versions(
    peers: Any, stand_in: Any, tmp_path: Path
) -> None:
    ours = stand_in("mine", [1.0, 2.0, 4.0], memory=50_000_000)
    theirs = stand_in("theirs", [3.0, 8.0, 8.0], answers="[[[1, 2], [4]]]")
    table = peers.run(peers.Benchmark(tmp_path, tmp_path, ours), [theirs], 3, "A title.", tmp_path / "table.md")
    assert called(tmp_path) == ["mine", "theirs", "theirs", "mine", "mine", "theirs"]
    # Medians of 1, 2, 4 and of 3, 8, 8; the median of the ratios 3, 4, 2, which is not that of the medians.
    assert "| sweep-steer | theirs | 3 | 2.0 | 8.0 | 3.00 | 50 | 10 | 50.0% of 2 answers equal |" in table
    assert "| theirs | theirs 1.2.3 |" in table
    assert "- theirs holds less memory at sweep-steer: 0.20 of ours." in table
    assert "takes less time" not in table
    assert "- **theirs**: theirs's own" in table
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == table


def test_one_kind_of_task_and_a_slow_task_in_one_round_alone(peers: Any, stand_in: Any, tmp_path: Path) -> None:
    ours, theirs = stand_in("mine", [1.0]), stand_in("theirs", [2.0])
    slow = replace(theirs, tasks={"sweep-steer": "", "sweep-ablate": "", "edit": ""}, once=("sweep-steer",))
    table = peers.run(peers.Benchmark(tmp_path, tmp_path, ours), [slow], 3, "A title.", None, ["sweep"])
    assert "| sweep-steer | theirs | 1 | " in table
    assert "| sweep-ablate | theirs | 3 | " in table
    assert "| edit | theirs | 0 | | | | | | not measured yet |" in table


def test_the_large_sizes_have_as_many_prompts_as_they_ask_for(peers: Any) -> None:
    from prepare import asked

    assert len(set(asked(peers.FULL["prompts"]))) == peers.FULL["prompts"]


def test_a_tool_that_fails_has_a_row_that_says_so(peers: Any, stand_in: Any, tmp_path: Path) -> None:
    ours, broken, whole = stand_in("mine", [1.0]), stand_in("broken", [1.0], fails=True), stand_in("whole", [2.0])
    alone = peers.run(peers.Benchmark(tmp_path / "alone", tmp_path, ours), [broken], 1, "A title.", None)
    assert "Nothing is measured yet." in alone
    (tmp_path / "calls.txt").unlink()
    table = peers.run(peers.Benchmark(tmp_path, tmp_path, ours), [broken, whole], 3, "A title.", None)
    assert "| sweep-steer | broken | 0 | | | | | | broken failed: boom / it is broken |" in table
    assert "| sweep-steer | whole | 3 | 1.0 | 2.0 | 2.00 |" in table
    assert called(tmp_path).count("broken") == 1  # not again in the next rounds
    again = peers.Benchmark(tmp_path, tmp_path, ours, retry=True)
    peers.run(again, [broken], 1, "A title.", None)
    assert called(tmp_path).count("broken") == 2


@pytest.mark.parametrize(
    ("said", "cell"),
    [
        (
            "Traceback\n  File x\nImportError: \n it needs a | b\nthat is missing\n",
            "ImportError: it needs a / b that is missing",
        ),
        ("ERROR: no such version\nnote: a hint\n", "ERROR: no such version"),
        ("boom\n", "boom"),
        ("", "it said nothing"),
    ],
)
def test_the_last_error_stands_in_the_table(peers: Any, said: str, cell: str) -> None:
    assert peers.last_words(said) == cell


def test_an_environment_that_cannot_be_made_has_a_row_that_says_so(
    peers: Any, stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        failed = "no-such-tool==1.0" in command
        return subprocess.CompletedProcess(
            command, int(failed), "", "ERROR: No matching distribution\nWARNING: a hint\n"
        )

    ours, pins = stand_in("mine", [1.0]), ("torch",)
    missing = peers.Tool("missing", tmp_path, {"edit": "it does more"}, "no-such-tool==1.0", pins)
    benchmark = peers.Benchmark(tmp_path, tmp_path / "environments", ours)
    told = {"load": 0.0, "seconds": 1.0, "memory": 1, "versions": {}}
    monkeypatch.setattr(peers, "measure", lambda *_: told)
    monkeypatch.setattr(peers.subprocess, "run", run)
    table = peers.run(benchmark, [missing], 1, "A title.", None)
    assert "| edit (it does more) | missing | 0 | | | | | | missing could not be installed: ERROR: No match" in table
    assert "a hint" not in table
    assert [command[-1] for command in commands] == [
        str(tmp_path / "environments" / "missing"),
        "torch",
        "no-such-tool==1.0",
    ]
    written = (tmp_path / "environments" / "missing" / "constraints.txt").read_text(encoding="utf-8")
    assert written.startswith("torch==")
    assert written.count("\n") == 1


def test_a_killed_benchmark_goes_on_where_it_stopped(peers: Any, stand_in: Any, tmp_path: Path) -> None:
    ours, theirs = stand_in("mine", [1.0]), stand_in("theirs", [2.0], kills=True)
    driver = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import pathlib, peers\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "mine, theirs = (peers.Tool(n, folder / f'{n}.py', {'sweep-steer': ''}) for n in ('mine', 'theirs'))\n"
        "peers.run(peers.Benchmark(folder, folder, mine), [theirs], 1, 'A title.', None)"
    )
    assert subprocess.run([sys.executable, "-c", driver], capture_output=True).returncode == -9
    with open(tmp_path / "journal.jsonl", "ab") as file:
        file.write(b'{"tool": "the')  # as a kill in the middle of a line leaves it
    table = peers.run(peers.Benchmark(tmp_path, tmp_path, ours), [theirs], 1, "A title.", None)
    assert called(tmp_path) == ["mine", "theirs", "theirs"]
    assert "| sweep-steer | theirs | 1 | 1.0 | 2.0 | 2.00 | 10 | 10 | 100.0% of 2 answers equal |" in table


def test_another_plan_in_the_folder_is_refused(peers: Any, tmp_path: Path) -> None:
    (tmp_path / "made.json").write_text(json.dumps({"model": "a", "sizes": {"traces": 1}}))
    with pytest.raises(SystemExit, match="holds another plan"):
        peers.prepare(tmp_path, "b", {"traces": 1})


# What the tools do --------------------------------------------------------------------------------------------------


def done(script: str, task: str, plan: Any, out: Path) -> dict[str, Any]:
    """A script's task in this process."""
    from measure import measured

    module = __import__(script)
    return measured(module.TASKS[task], plan, out, ("torch",))


def test_vectors_are_the_same_one_at_a_time_and_at_one_token(plan: Any, tmp_path: Path) -> None:
    from peer_tools.compare import agreement

    told = done("with_steer2edit", "vectors-span", plan, tmp_path / "ours")
    assert told["versions"] == {"torch": torch.__version__}
    assert told["seconds"] > 0
    assert told["memory"] > 10_000_000
    done("one_at_a_time", "one-vectors", plan, tmp_path / "theirs")
    found = agreement("vectors-span", plan.folder / "model", tmp_path / "ours", tmp_path / "theirs")
    assert found["layers"] == 3
    assert found["smallest"] > 0.99999

    model = AutoModelForCausalLM.from_pretrained(plan.model).eval()
    for kind, at in (("last", lambda trace: len(trace.ids) - 1), ("prompt", lambda trace: trace.first)):
        done("with_steer2edit", f"vectors-{kind}", plan, tmp_path / kind)
        mine = load_file(tmp_path / kind / "vectors.safetensors")
        for layer in range(2):  # transformers gives the last one after the final norm
            means = {}
            for label in ("positive", "negative"):
                rows = []
                for trace in plan.of(label):
                    with torch.inference_mode():
                        states = model(torch.tensor([trace.ids]), output_hidden_states=True).hidden_states
                    rows.append(states[layer + 1][0, at(trace)])
                means[label] = torch.stack(rows).mean(dim=0)
            torch.testing.assert_close(mine[str(layer)], means["positive"] - means["negative"], atol=1e-4, rtol=1e-4)


def test_sweeps_and_edits_give_what_changed_weights_give(plan: Any, tmp_path: Path) -> None:
    from measure import answers_of, greedy

    from peer_tools.compare import agreement

    base = plan.folder / "model"
    done("one_at_a_time", "one-edit", plan, tmp_path / "theirs" / "one-edit")
    done("with_steer2edit", "edit", plan, tmp_path / "ours")
    found = agreement("edit", base, tmp_path / "ours", tmp_path / "theirs")
    assert found["change"] > 0.1
    assert found["difference"] < 1e-5 * found["change"]
    assert found["only_in_one"] == []

    done("with_steer2edit", "sweep-ablate", plan, tmp_path / "ablated")
    answers = json.loads((tmp_path / "ablated" / "answers.json").read_text())
    assert [len(answers), len(answers[0])] == [2, 3]
    edited = AutoModelForCausalLM.from_pretrained(str(tmp_path / "theirs" / "edited")).eval()
    assert plan.weights[-1] == plan.weight
    for prompt, answer in zip(plan.prompts, answers[-1], strict=True):
        made = edited.generate(torch.tensor([prompt.ids]), **greedy(plan))
        assert answers_of(plan, made, len(prompt.ids)) == [answer]


def test_the_whole_harness_with_our_side_in_its_own_process(
    peers: Any, stand_in: Any, plan: Any, tmp_path: Path
) -> None:
    from measure import measured
    from one_at_a_time import one_strength

    answers = []
    for number in range(SIZES["strengths"]):
        measured(lambda plan, out, n=number: one_strength(plan, out, n), plan, tmp_path / "one", ())
        answers += json.loads((tmp_path / "one" / "answers.json").read_text())
    theirs = stand_in("theirs", [0.001], answers=json.dumps(answers))
    table = peers.run(peers.Benchmark(plan.folder, tmp_path), [theirs], 1, "A title.", None)
    assert "100.0% of 6 answers equal" in table
    assert "- theirs takes less time at sweep-steer: 0.0" in table
    assert f"torch {torch.__version__}" in table
    assert not (plan.folder / "results" / "theirs-sweep-steer-0-ours").exists()


def test_every_tool_has_a_script_with_its_tasks(peers: Any) -> None:
    for tool in peers.TOOLS:
        text = tool.script.read_text(encoding="utf-8")
        assert all(f'"{task}":' in text for task in tool.tasks), tool.name
        assert set(tool.tasks) <= set(__import__("with_steer2edit").TASKS)
        assert tool.beyond
