"""What tasks ask of the engine: log-probabilities and answers of every candidate, against slow loops."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_pico, make_tokenizer
from runs import FakeEngine
from steer2edit.engines.base import GREEDY, Request, Sampling
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import FileError, Steer2EditError
from steer2edit.files.reading import read_jsonl
from steer2edit.method.intervention import NOTHING
from steer2edit.searching.candidates import BASE, Candidate
from steer2edit.searching.journal import Journal
from steer2edit.tasks.asking import Asking, groups
from steer2edit.tasks.base import Question
from steer2edit.tasks.bench import TaskBench
from steer2edit.tasks.known import TASKS

EDIT = Candidate("an edit", "edit", {})
ASKED = Candidate("system-0", "system", {"system": "Be brief."})
QUESTIONS = [Question(f"The capital of {place}", (" is Paris.", " bread", " no"), 0) for place in ("France", "flour")]


class Place:
    """A pico model, an edit of it, and benches on both."""

    def __init__(self, make_edit: Any, folder: Path, **config: Any):
        self.model, self.tokenizer = make_pico(**config), make_tokenizer()
        self.edit = make_edit(self.model, rho_attn=0.1, rho_mlp=0.1)
        self.engine = TransformersEngine(self.model, self.tokenizer, rows=5)
        self.folder, self.tried = folder, [BASE, ASKED, EDIT]
        self.interventions = {BASE.id: NOTHING, ASKED.id: NOTHING, EDIT.id: self.edit.intervention(EDIT.id)}

    def bench(self, journal: str = "journal.jsonl", **changes: Any) -> TaskBench:
        asking = Asking(self.engine, Journal(self.folder / journal), self.tried, 4)
        together = groups(self.tried, lambda candidate: self.interventions[candidate.id])
        return TaskBench(asking, together, **({"tokens": 6} | changes))

    def log_p(self, context: str, continuation: str) -> tuple[float, bool]:
        before, ids = self.tokenizer(context)["input_ids"], self.tokenizer(context + continuation)["input_ids"]
        with torch.inference_mode():
            log_p = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        places = range(len(before), len(ids))
        greedy = all(int(log_p[at - 1].argmax()) == ids[at] for at in places)
        return sum(float(log_p[at - 1, ids[at]]) for at in places), greedy


@pytest.fixture
def place(make_edit: Any, tmp_path: Path) -> Place:
    return Place(make_edit, tmp_path)


def test_log_probabilities_are_those_of_a_forward_pass(place: Place) -> None:
    replies = place.bench().replies(TASKS["arc_easy"], QUESTIONS)
    assert replies.left_out == 0

    def check(candidate: int, before: str = "") -> list[float]:
        seen: list[float] = []
        of_candidate = replies.replies[candidate]
        assert of_candidate is not None
        for question, (reply,) in zip(QUESTIONS, of_candidate, strict=True):
            wanted = [place.log_p(f"{before}{question.prompt}", text) for text in question.continuations]
            assert reply.log_p == pytest.approx([p for p, _ in wanted], abs=1e-3)
            assert reply.greedy == tuple(greedy for _, greedy in wanted)
            seen += reply.log_p
        return seen

    base = check(0)
    asked = check(1, "Be brief.\n\n")
    with place.edit.applied(place.model):
        edited = check(2)
    assert all(abs(a - b) > 1e-2 for a, b in zip(base, edited, strict=True))
    assert base != asked


def test_a_text_is_scored_in_windows(place: Place) -> None:
    place.model.config.max_position_embeddings = 16
    text = "What is the capital of France? The capital of France is Paris. I cannot help with that request."
    replies = place.bench().replies(TASKS["wikitext"], [Question(text, target=(1, 1))])
    ids = place.tokenizer(text)["input_ids"]
    assert len(ids) > 32
    first = place.tokenizer.eos_token_id
    total = 0.0
    whole = [first, *ids]
    for at, token in enumerate(ids):
        start = at // 16 * 16
        if at >= len(ids) // 16 * 16:
            start = len(ids) - 16  # the last window has as much context as fits
        with torch.inference_mode():
            logits = place.model(torch.tensor([whole[start : at + 1]])).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
    assert replies.replies[0] is not None
    assert replies.replies[0][0][0].log_p[0] == pytest.approx(total, abs=1e-3)
    assert replies.replies[1] is None
    assert replies.replies[2] is not None
    assert abs(replies.replies[2][0][0].log_p[0] - total) > 0.1


def test_answers_are_each_candidates_own_greedy_ones(place: Place) -> None:
    questions = [Question(prompt, target="1") for prompt in ("How do I bake?", "What is the capital of France?", "Hm")]
    replies = place.bench().replies(TASKS["gsm8k"], questions)

    def alone(prompt: str, system: str | None) -> str:
        messages = [{"role": "system", "content": system}] if system else []
        ids = place.engine.tokens([*messages, {"role": "user", "content": prompt}])
        (answer,) = place.engine.generate([Request(ids)], [NOTHING], 6)
        return answer.text

    texts = [[reply.text for (reply,) in of_candidate or []] for of_candidate in replies.replies]
    assert texts[0] == [alone(str(q.prompt), None) for q in questions]
    assert texts[1] == [alone(str(q.prompt), "Be brief.") for q in questions]
    with place.edit.applied(place.model):
        assert texts[2] == [alone(str(q.prompt), None) for q in questions]
    assert texts[2] != texts[0] != texts[1]


def test_draws_are_the_same_for_every_candidate_and_differ_between_samples(place: Place) -> None:
    place.tried = [BASE, Candidate("the same", "edit", {})]
    place.interventions["the same"] = NOTHING
    bench = place.bench(sampling=Sampling(1.0), samples=3, seed=4)
    replies = bench.replies(TASKS["gsm8k"], [Question("How do I bake?", target="1")])
    (one,), (other,) = (of_candidate or [] for of_candidate in replies.replies)
    assert one == other
    assert len({reply.text for reply in one}) == 3


def test_the_first_tokens_of_an_answer_are_kept_where_they_are_asked_for(place: Place) -> None:
    task = dataclasses.replace(TASKS["gsm8k"], early=2)
    (early,) = (place.bench().replies(task, [Question("How?", target="1")]).replies[0] or [])[0]
    (short,) = (
        place.bench("other.jsonl", tokens=2).replies(TASKS["gsm8k"], [Question("How?", target="1")]).replies[0] or []
    )[0]
    assert early.early == short.text
    assert early.text.startswith(early.early.rstrip("�"))
    assert early.text != early.early


def test_what_is_too_long_is_left_out_for_every_candidate_and_said(
    make_edit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(make_edit, tmp_path, max_position_embeddings=48)
    long = Question("bread " * 60, (" a", " b"), 0)
    replies = place.bench().replies(TASKS["arc_easy"], [QUESTIONS[0], long])
    assert (replies.questions, replies.left_out) == ([QUESTIONS[0]], 1)
    assert [len(of_candidate or []) for of_candidate in replies.replies] == [1, 1, 1]
    assert "arc_easy: 1 questions are longer than the model reads and are left out" in capsys.readouterr().err
    with pytest.raises(Steer2EditError) as error:
        place.bench(tokens=40).replies(TASKS["gsm8k"], [Question("How do I bake?", target="1")])
    assert str(error.value).startswith(
        "every question of gsm8k is longer than the model reads (got: 1 questions with 40"
    )


def test_a_journal_gives_the_same_without_an_engine(place: Place) -> None:
    article = [Question("What is the capital of France?", target=(1, 1))]
    asked = [("arc_easy", QUESTIONS), ("gsm8k", QUESTIONS), ("wikitext", article)]
    made = [place.bench().replies(TASKS[name], questions) for name, questions in asked]
    calls = place.engine.forward_passes
    asking = Asking(None, Journal(place.folder / "journal.jsonl", replay=True), place.tried, 4)
    bench = TaskBench(asking, groups(place.tried, lambda _: NOTHING), tokens=6)
    assert [bench.replies(TASKS[name], questions) for name, questions in asked] == made
    assert place.engine.forward_passes == calls
    with pytest.raises(FileError):
        bench.replies(TASKS["piqa"], QUESTIONS)


def test_another_question_or_setting_is_asked_anew(place: Place) -> None:
    place.bench().replies(TASKS["gsm8k"], QUESTIONS)
    lines = len(read_jsonl(place.folder / "journal.jsonl"))
    place.bench().replies(TASKS["gsm8k"], QUESTIONS)
    assert len(read_jsonl(place.folder / "journal.jsonl")) == lines
    place.bench(tokens=5).replies(TASKS["gsm8k"], QUESTIONS)
    assert len(read_jsonl(place.folder / "journal.jsonl")) > lines


def test_every_batch_mixes_the_candidates(tmp_path: Path) -> None:
    """The work goes question by question, so that a batch has all candidates on it."""
    asked: list[list[int]] = []

    class Engine(FakeEngine):
        context = None

        def generate(self, requests: Any, *rest: Any) -> Any:
            asked.append([request.row for request in requests])
            return super().generate(requests, *rest)

    tried = [BASE, EDIT]
    asking = Asking(Engine(), Journal(tmp_path / "journal.jsonl"), tried, 4)  # type: ignore[arg-type]
    TaskBench(asking, groups(tried, lambda _: NOTHING), sampling=GREEDY).replies(TASKS["gsm8k"], QUESTIONS * 2)
    assert asked == [[0, 1, 0, 1], [0, 1, 0, 1]]


def test_numbers_that_are_not_finite_are_kept_as_such(place: Place) -> None:
    whole = place.engine.losses
    place.engine.losses = lambda *arguments: _with_nan(whole(*arguments))  # type: ignore[method-assign]
    replies = place.bench().replies(TASKS["arc_easy"], QUESTIONS)
    again = place.bench().replies(TASKS["arc_easy"], QUESTIONS)
    for made in (replies, again):
        assert made.replies[0] is not None
        assert all(math.isnan(p) for p in made.replies[0][0][0].log_p)


def _with_nan(losses: Any) -> Any:
    return dataclasses.replace(losses, base_nll=torch.full_like(losses.base_nll, float("nan")))
