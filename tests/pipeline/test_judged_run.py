"""A run whose judge is down, slow, rate-limited or talks nonsense: what is done stays, and the same command goes on."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runs import is_one_sentence, said_by, tiny_recipe, whole_run
from sides import ChatServer
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.files.reading import read_jsonl
from steer2edit.recipe import Recipe

pytestmark = pytest.mark.usefixtures("quiet")


class Moody:
    """A judge that answers sensibly so many times, and then fails in its own way.

    Attributes:
        mood: how it fails. good: how many sensible answers are left; None is any number.
    """

    def __init__(self) -> None:
        self.mood, self.good, self.asked = "down", None, 0
        self.lock = threading.Lock()
        self.server = ChatServer(self._answer)

    def _answer(self, body: dict[str, Any]) -> Any:
        with self.lock:
            self.asked += 1
            sensible = self.good is None or self.good > 0
            if self.good:
                self.good -= 1
        if sensible:
            return "Yes." if len(str(body["messages"])) % 2 else "No."
        if self.mood == "slow":
            time.sleep(1.0)
            return "Yes."
        return {"down": (503, "out of order"), "limited": (429, "slow down"), "nonsense": "Perhaps."}[self.mood]


@pytest.fixture(scope="module")
def judge() -> Iterator[Moody]:
    judge = Moody()
    yield judge
    judge.server.close()


@pytest.fixture(scope="module")
def recipe(judge: Moody, pico_folder: str) -> Recipe:
    asked = {"endpoint": judge.server.url, "model": "m", "question": "Does it decline?"}
    return tiny_recipe(pico_folder, behaviour__detector={**asked, "retries": 0, "timeout": 0.5, "concurrency": 1})


@pytest.fixture(scope="module")
def scored(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run up to its scores, for which no judge was asked; not to be changed."""
    return whole_run(tmp_path_factory.mktemp("runs") / "scored", recipe, until="score")


@pytest.mark.parametrize(
    ("mood", "said"),
    [
        ("down", "fails (got: 503: out of order, 1 try). Look at the server's log."),
        ("slow", "does not answer (got: no reply within 0.5 s, 1 try). Raise timeout or lower concurrency."),
        ("limited", "takes no more requests (got: 429: slow down, 1 try)"),
        ("nonsense", "without a verdict (got: Perhaps.)"),
    ],
)
def test_a_judge_that_fails_costs_no_finished_work(
    mood: str,
    said: str,
    judge: Moody,
    scored: Path,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("STEER2EDIT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(scored, tmp_path / "run")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    judge.mood, judge.good, judge.asked = mood, 4, 0
    search = ("search", file, "--out", tmp_path / "run", "--quiet")
    failed = said_by(monkeypatch, capfd, *search)
    is_one_sentence(failed, "the judge at 127.0.0.1", said, "4 of ", "verdicts are kept; run the same command again")
    (journal,) = (tmp_path / "run/search").glob("journal-*.jsonl")
    lines = journal.read_text(encoding="utf-8").splitlines()
    assert lines  # the answers, which a judge was to judge
    assert not (tmp_path / "run/search/trials.jsonl").exists()
    # The judge is well again: nothing is generated that the journal has, and no pair is asked about twice.
    judge.good, judge.asked = None, 0
    requests: list[int] = []
    generate = TransformersEngine.generate

    def counted(engine: Any, some: Any, *rest: Any, **more: Any) -> Any:
        requests.append(len(some))
        return generate(engine, some, *rest, **more)

    monkeypatch.setattr(TransformersEngine, "generate", counted)
    assert said_by(monkeypatch, capfd, *search).code == 0
    assert journal.read_text(encoding="utf-8").splitlines()[: len(lines)] == lines
    rows = read_jsonl(tmp_path / "run/search/answers.jsonl")
    distinct = {(row["prompt"], text) for row in rows for text in row["answers"].values()}
    assert 0 < judge.asked <= len(distinct) - 4
    assert requests == []
