"""What truthfulness measures on a model: against losses by hand, and against lm-eval's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import steer2edit as s2e
from conftest import _byte_level, _wrapped, make_pico, make_tokenizer
from runs import FakeEngine
from sides import chatml, nll_by_hand, write_rows
from steer2edit.behaviours.base import Item
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.probing.chat import Chat, named_template
from steer2edit.probing.spans import response_span
from steer2edit.probing.traces import Trace
from steer2edit.searching.bench import Bench
from steer2edit.searching.candidates import BASE, Trial, asked, edited
from steer2edit.searching.plan import Evaluation
from truthful_questions import _row, _source, truthfulness

# Losses and spans -----------------------------------------------------------------------------------------------------

ANSWERS = [
    "The capital of France is Paris.",
    "I am sorry, but no.",
    "Sure: mix the flour, the water and the salt.",
    "No.",
    "Please ask me something else!",
    "It is forty-two",
]


def _questions(folder: Path, count: int = 6) -> str:
    """Questions of unlike lengths, each with two correct and two incorrect answers, all of the test split but two."""
    rows = []
    for i in range(count):
        texts = [f"{ANSWERS[(i + k) % 6]} {'So it is. ' * (k % 2)}".strip() for k in range(4)]
        row = {"question": f"What is {'really ' * (i % 3)}so {i}?", "best_answer": texts[1], "split": "test"}
        rows.append(row | {"correct_answers": texts[:2], "incorrect_answers": texts[2:]})
    for i, split in enumerate(("probe", "validation")):
        rows.append(_row(i, split=split))
    return write_rows(folder / "questions.jsonl", rows)


class Recording(TransformersEngine):
    """Keeps what was scored."""

    def losses(self, pairs: Any, table: Any, progress: Any = None) -> Any:
        self.__dict__.setdefault("scored", []).extend(pairs)
        return super().losses(pairs, table, progress)


def _bench(engine: Any, path: str, journal: Path, scores: Any = None, **options: Any) -> Bench:
    behaviour = truthfulness(opened=0, **options)
    items = behaviour.items(_source(path), "test")
    return Bench(engine, scores or {}, items, behaviour, Evaluation(), journal)


def _by_hand(
    model: Any, tokenizer: Any, items: Sequence[Item], prompt: Callable[[Item], str]
) -> dict[str, list[float]]:
    """The measures in fp64, each choice in a pass of its own."""
    values: dict[str, list[float]] = {name: [] for name in ("truthful", "margin", "mc1", "mc2")}
    for item in items:
        scored = [nll_by_hand(model, tokenizer, prompt(item), choice) for choice in item.choices]
        correct = item.target[0]
        whole = [-nll * count for nll, count in scored]
        p = [math.exp(x - max(whole)) for x in whole]
        values["truthful"].append(float(scored[0][0] < scored[correct][0]))
        values["margin"].append(scored[correct][0] - scored[0][0])
        values["mc1"].append(float(whole[0] > max(whole[correct:])))
        values["mc2"].append(sum(p[:correct]) / sum(p))
    return values


def _assert_close(trial: Trial, values: Mapping[str, list[float]]) -> None:
    for name, wanted in values.items():
        assert list(trial.values[name]) == pytest.approx(wanted, abs=2e-5), name


def test_a_models_measures_are_those_of_losses_by_hand_with_and_without_an_edit(tmp_path: Path) -> None:
    model, tokenizer = make_pico(max_position_embeddings=512), make_tokenizer()
    engine = TransformersEngine(model, tokenizer)
    traces = truthfulness().make_traces(engine, truthfulness().items(_source(_questions(tmp_path)), "probe"))
    scores = s2e.score(model, s2e.collect(model, tokenizer, traces))
    bench = _bench(engine, _questions(tmp_path), tmp_path / "journal.jsonl", {"full": scores}, system="Be kind.")
    candidate, prompted = edited(0.05, None, 0.2), asked(0, "Be true.")
    base, with_edit, with_prompt = bench.run([BASE, candidate, prompted], "0")
    _assert_close(base, _by_hand(model, tokenizer, bench.closed, lambda item: chatml(item.text, "Be kind.")))
    both = "Be kind.\n\nBe true."
    _assert_close(with_prompt, _by_hand(model, tokenizer, bench.closed, lambda item: chatml(item.text, both)))
    edit = scores.edit(rho_attn=0.05, rho_mlp=None, alpha=0.2)
    with edit.applied(model):
        values = _by_hand(model, tokenizer, bench.closed, lambda item: chatml(item.text, "Be kind."))
    _assert_close(with_edit, values)
    moved = [abs(a - b) for a, b in zip(with_edit.values["margin"], base.values["margin"], strict=True)]
    assert min(moved) > 1e-3
    assert 0 < sum(base.values["mc2"]) < 6


def test_a_later_round_has_the_numbers_of_a_first_one_and_does_not_run_the_original_model_again(tmp_path: Path) -> None:
    model, tokenizer = make_pico(max_position_embeddings=512), make_tokenizer()
    engine = Recording(model, tokenizer)
    traces = truthfulness().make_traces(engine, truthfulness().items(_source(_questions(tmp_path)), "probe"))
    scores = {"full": s2e.score(model, s2e.collect(model, tokenizer, traces))}
    first, second = edited(0.05, None, 0.2), edited(0.02, None, 0.2)
    path = _questions(tmp_path)
    together = _bench(engine, path, tmp_path / "together.jsonl", scores).run([BASE, first, second], "0")
    apart = _bench(engine, path, tmp_path / "apart.jsonl", scores)
    apart.run([BASE, first], "0")
    engine.__dict__["scored"].clear()
    (later,) = apart.run([second], "1")
    assert engine.__dict__["scored"] == []
    _assert_close(later, {name: list(together[2].values[name]) for name in ("truthful", "margin", "mc1", "mc2")})
    # Resumed from the journal, the later round has the same numbers, and nothing is run.
    passes, again = engine.forward_passes, _bench(engine, path, tmp_path / "apart.jsonl", scores)
    again.run([BASE, first], "0")
    assert again.run([second], "1")[0].values == later.values
    assert engine.forward_passes == passes


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {}), ("qwen3", {"head_dim": 16}), ("mistral", {"num_key_value_heads": 4, "sliding_window": 24})],
)
def test_the_numbers_do_not_depend_on_what_is_scored_at_once(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model, tokenizer = make_pico(model_type, max_position_embeddings=512, **changes), make_tokenizer()
    probe = truthfulness().items(_source(_questions(tmp_path)), "probe")
    traces = truthfulness().make_traces(FakeEngine(), probe)
    scores = s2e.score(model, s2e.collect(model, tokenizer, traces))
    tried = [BASE, edited(0.05, None, 0.2), edited(0.1, 0.1, 0.2)]
    trials = []
    for number, logits in enumerate((None, 1)):  # one intervention beside the original model, or all of them
        engine = TransformersEngine(model, tokenizer, rows=64 if logits is None else 1)
        engine.logits = logits or engine.logits
        bench = _bench(engine, _questions(tmp_path), tmp_path / f"{number}.jsonl", {"full": scores})
        trials.append(bench.run(tried, "0"))
    alone = []
    for number, item in enumerate(bench.closed):  # each question in a bench of its own
        engine = TransformersEngine(model, tokenizer)
        behaviour = truthfulness(opened=0)
        one = Bench(engine, {"full": scores}, [item], behaviour, Evaluation(), tmp_path / f"alone-{number}.jsonl")
        alone.append(one.run(tried, "0"))
    _assert_close(trials[0][0], _by_hand(model, tokenizer, bench.closed, lambda item: chatml(item.text)))
    for c in range(len(tried)):
        for name in ("truthful", "margin", "mc1", "mc2"):
            large, small = (list(some[c].values[name]) for some in trials)
            single = [one[c].values[name][0] for one in alone]
            assert small == pytest.approx(large, abs=1e-5)
            assert single == pytest.approx(large, abs=1e-5)


def test_choices_scored_together_or_each_alone_have_the_same_nll(tmp_path: Path) -> None:
    model, tokenizer = make_pico(max_position_embeddings=512), make_tokenizer()
    engine = Recording(model, tokenizer)
    _bench(engine, _questions(tmp_path), tmp_path / "journal.jsonl").run([BASE], "0")
    pairs = engine.__dict__["scored"]
    assert len(pairs) == 24
    together = engine.losses(pairs, []).base_nll
    alone = torch.cat([TransformersEngine(model, tokenizer).losses([pair], []).base_nll for pair in pairs])
    backwards = engine.losses(pairs[::-1], []).base_nll.flip(0)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, backwards, rtol=0, atol=1e-5)


CLOSED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if not loop.last or m['role'] == 'user' %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", [None, CLOSED, "qa"], ids=["chatml", "closing", "qa"])
def test_the_span_of_a_choice_is_its_own_tokens_and_no_others(template: str | None, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    chat = named_template("qa") if template == "qa" else Chat()
    if template == CLOSED:
        tokenizer.chat_template = CLOSED
    engine = Recording(make_pico(max_position_embeddings=512), tokenizer, chat=chat)
    bench = _bench(engine, _questions(tmp_path), tmp_path / "journal.jsonl")
    (trial,) = bench.run([BASE], "0")
    choices = [(item, choice) for item in bench.closed for choice in item.choices]
    assert len(engine.__dict__["scored"]) == len(choices)
    for (item, choice), (prompt, answer) in zip(choices, engine.__dict__["scored"], strict=True):
        before = f"Question: {item.text}\nAnswer: " if template == "qa" else chatml(item.text)
        assert tokenizer.decode([*prompt, *answer]) == before + choice
        assert tokenizer.decode(answer).lstrip() == choice  # a token may begin with the space before the answer
        assert not set(answer) & set(tokenizer.all_special_ids)
    lengths = [len(answer) for _, answer in engine.__dict__["scored"]]
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["lengths"] for line in lines if line["what"] == "nll"] == [lengths]
    assert trial.count("mc2") == len(bench.closed)


def test_a_choice_that_ends_its_turn_has_the_same_span(metaspace_tokenizer: Any) -> None:
    """An end-of-turn token after the answer is not scored, whatever the tokenizer."""
    for tokenizer, end in ((make_tokenizer(), "<|im_end|>"), (metaspace_tokenizer, "</s>")):
        spans = []
        for response in ("The capital of France is Paris.", f"The capital of France is Paris.{end}"):
            span, cut = response_span(tokenizer, Trace("What is it?", response, "positive"), positions="response")
            assert span is not None
            assert not cut
            spans.append((span.ids, span.first, span.last))
        assert spans[0] == spans[1]
        ids, first, last = spans[0]
        assert (tokenizer.decode(ids[first:last]).strip(), last) == ("The capital of France is Paris.", len(ids))


# lm-eval --------------------------------------------------------------------------------------------------------------


def _lm_eval(folder: Path, model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], chat: bool) -> Any:
    """What lm-eval's own tasks say of each question: contexts, mc1 and mc2."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    docs = []
    for row in rows:
        correct = list(dict.fromkeys([row["best_answer"], *row["correct_answers"]]))
        wrong = list(row["incorrect_answers"])
        mc1 = {"choices": [row["best_answer"], *wrong], "labels": [1] + [0] * len(wrong)}
        mc2 = {"choices": [*correct, *wrong], "labels": [1] * len(correct) + [0] * len(wrong)}
        docs.append({"question": row["question"], "mc1_targets": mc1, "mc2_targets": mc2})
    (folder / "tasks").mkdir(parents=True)
    data = write_rows(folder / "docs.jsonl", docs)
    for name in ("mc1", "mc2"):
        theirs = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa" / f"truthfulqa_{name}.yaml"
        task = {
            "include": str(theirs),
            "task": f"pico_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": data}, "cache_dir": str(folder / "cache")},
        }
        (folder / "tasks" / f"pico_{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=1024),
        tasks=["pico_mc1", "pico_mc2"],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = {name: sorted(found["samples"][f"pico_{name}"], key=lambda s: s["doc_id"]) for name in ("mc1", "mc2")}
    means = {name: found["results"][f"pico_{name}"]["acc,none"] for name in ("mc1", "mc2")}
    return samples, means


PLACES = ["The moon", "Paris", "The capital", "bread", "France", "water", "The salt", "the flour", "a loaf"]
NUMBERS = ["42", "1969", "7", "360", "99"]


def _rows(tokenizer: Any, starts: Sequence[str]) -> list[dict[str, Any]]:
    """Ten questions, the answers to each of which have as many tokens, so that their probabilities are of one order."""
    by_length: dict[int, list[str]] = {}
    for end in ("is the answer", "is here", "and Paris", "and the salt", "is not to be", "or will be"):
        for start in starts:
            text = f"{start} {end}."
            by_length.setdefault(len(tokenizer.tokenize(f"A: {text}")), []).append(text)
    pool = max(by_length.values(), key=len)
    assert len(pool) >= 8
    rows = []
    for i in range(10):
        texts = [pool[(i + k) % len(pool)] for k in range(6)]
        row = {"question": f"What is the {'short ' * (i % 3)}reason {i}?", "best_answer": texts[0], "split": "test"}
        rows.append(row | {"correct_answers": texts[: 1 + i % 2], "incorrect_answers": texts[2 : 4 + i % 3]})
    return rows


def _ours(folder: Path, engine: TransformersEngine, rows: Sequence[Mapping[str, Any]]) -> Trial:
    others = [_row(i, split=split) for i, split in enumerate(("probe", "validation"))]
    path = write_rows(folder / "q.jsonl", [*rows, *others])
    bench = _bench(engine, path, folder / "journal.jsonl")
    assert [item.text for item in bench.closed] == [row["question"] for row in rows]
    return bench.run([BASE], "0")[0]


def _merging(vocabulary: int = 420) -> Any:
    """Byte-level BPE in which the space before these answers is a part of their first token, as in real tokenizers."""
    from tokenizers import Tokenizer

    made = _wrapped(
        Tokenizer.from_str(_byte_level(True, vocabulary)), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = make_tokenizer().chat_template
    return made


@pytest.mark.lm_eval
@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True], ids=["its own template", "chat template"])
def test_mc1_and_mc2_are_those_of_lm_eval(chat: bool, tmp_path: Path) -> None:
    tokenizer = _merging()
    rows = _rows(tokenizer, PLACES)
    starts = {tokenizer.tokenize(f"A: {row['best_answer']}")[2] for row in rows}
    assert all(len(start) > 1 and start[0] == "Ġ" for start in starts)
    _compare(tmp_path, tokenizer, rows, chat)


@pytest.mark.lm_eval
@pytest.mark.slow
def test_mc1_and_mc2_are_those_of_lm_eval_where_some_answers_begin_with_a_space_of_its_own(tmp_path: Path) -> None:
    tokenizer = _merging()
    rows, mixed = _rows(tokenizer, [*NUMBERS, *PLACES]), 0
    for row in rows:
        starts = [tokenizer.tokenize(f"A: {text}")[2] for text in (row["best_answer"], *row["incorrect_answers"])]
        mixed += len({len(start) > 1 for start in starts}) == 2
    assert mixed > 5
    _compare(tmp_path, tokenizer, rows, chat=False)


def _compare(folder: Path, tokenizer: Any, rows: Sequence[Mapping[str, Any]], chat: bool) -> None:
    import lm_eval

    # A gentle init, so that the answers' probabilities are of one order.
    model = make_pico(max_position_embeddings=1024, vocab_size=len(tokenizer), initializer_range=0.1)
    samples, means = _lm_eval(folder / "theirs", model, tokenizer, rows, chat)
    theirs = yaml.safe_load(
        (Path(lm_eval.__file__).parent / "tasks" / "truthfulqa" / "truthfulqa_mc1.yaml").read_text(encoding="utf-8")
    )
    if chat:  # what the task asks is what the user says
        texts = [_rendered(theirs["doc_to_text"], row["question"]) for row in rows]
        engine = TransformersEngine(model, tokenizer)
        ours = _ours(folder, engine, [{**row, "question": text} for row, text in zip(rows, texts, strict=True)])
    else:
        template = "{% set question = messages[-1]['content'] %}" + theirs["doc_to_text"]
        engine = TransformersEngine(model, tokenizer, chat=Chat(template=template))
        ours = _ours(folder, engine, rows)
    for i, row in enumerate(rows):
        prompt = engine.tokens([{"role": "user", "content": row["question"]}])
        if chat:
            prompt = engine.tokens([{"role": "user", "content": _rendered(theirs["doc_to_text"], row["question"])}])
        assert samples["mc1"][i]["arguments"][0][0] == tokenizer.decode(prompt)
    assert list(ours.values["mc1"]) == [sample["acc"] for sample in samples["mc1"]]
    assert list(ours.values["mc2"]) == pytest.approx([float(s["acc"]) for s in samples["mc2"]], rel=1e-4, abs=1e-6)
    assert ours.mean("mc1") == pytest.approx(means["mc1"], abs=1e-4)
    assert ours.mean("mc2") == pytest.approx(means["mc2"], abs=1e-4)
    assert set(ours.values["mc1"]) == {0.0, 1.0}
    assert sum(0.05 < x < 0.95 for x in ours.values["mc2"] if x is not None) >= 5


def _rendered(text: str, question: str) -> str:
    from jinja2 import Template

    return Template(text).render(question=question)
