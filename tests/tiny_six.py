"""The paper's six models as tiny random ones of the same architectures, and a folder of evaluation sets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conftest import make_tokenizer
from families import make_family
from steer2edit.paper.facts import paper_models
from steer2edit.tasks.known import TASKS
from task_sets import local_rows, text, write

# So many of the vocabulary's tokens end an answer that some answers are short and some are long.
ENDS = list(range(5, 300, 9))


def save_tiny(folder: Path, model_type: str = "llama", **overrides: Any) -> str:
    """A tiny random model whose answers end after a few tokens, some sooner and some later."""
    model = make_family(model_type, max_position_embeddings=4096, **overrides)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(str(folder))
    make_tokenizer().save_pretrained(str(folder))
    return str(folder)


def save_like(folder: Path, name: str) -> str:
    """A tiny model of the architecture of one of the six. Answers end early where lengths are what is measured."""
    facts = paper_models()[name]
    model, tokenizer = make_family(facts.shape.model_type, max_position_embeddings=4096), make_tokenizer()
    model.get_output_embeddings().weight.data[:3] = 0  # no marks of the template within an answer
    ends = _ends(model, tokenizer) if facts.behaviour == "efficiency" else []
    model.generation_config.eos_token_id = ends or None
    model.save_pretrained(str(folder / name))
    tokenizer.save_pretrained(str(folder / name))
    return str(folder / name)


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end the answers to the probe's problems after a few tokens, and none at its first one."""
    answers = []
    for i in range(20):
        messages = [{"role": "user", "content": f"What is {i} + 3?"}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        answers.append(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist())
    first = {answer[0] for answer in answers}
    return sorted({token for i, answer in enumerate(answers) for token in answer[1 + i % 6 :][:1]} - first)


def write_sets(folder: Path, without: Sequence[str] = ()) -> Path:
    """Every file that the suites read, in the layouts of docs/paper.md, with few rows."""
    files: dict[str, list[Mapping[str, Any]]] = {
        "malicious_instruct.jsonl": [{"idx": i, "prompt": f"Do harm number {i} with a {text(i, 3)}"} for i in range(8)],
        "advbench.jsonl": [{"idx": i, "prompt": f"Write goal {i} on a {text(i, 4)}"} for i in range(120)],
        "alpaca_benign.jsonl": [
            {"prompt": f"Tell me fact {i} on a {text(i, 2)}", "split": "official_probe" if i < 8 else "alpaca_sample"}
            for i in range(260)
        ],
        "truthfulqa_probe.jsonl": [_question(i) for i in range(14)],
        "truthfulqa_test.jsonl": [_question(100 + i) for i in range(6)],
        "gsm8k_probe.jsonl": [{"idx": i, "question": f"What is {i} + 3?", "answer": str(i + 3)} for i in range(20)],
    }
    for name in ("gcg", "advllm"):
        for model in ("llama2-7b", "mistral-7b"):
            files[f"jailbreak_{name}_{model}.jsonl"] = [
                {"idx": i, "prompt": f"Write goal {i} !! {name} {model}", "goal": f"Write goal {i}"} for i in range(3)
            ]
    for name in ("gemma2-2b", "llama3-8b"):
        files[f"truthfulqa_judged_{name}.jsonl"] = [
            {
                "idx": i,
                "question": _question(i)["question"],
                "answer": f"{text(i, 4)}.",
                "label": "TRUE" if i % 2 else "FALSE",
            }
            for i in range(14)
        ]
    for task in ("commonsenseqa", "gsm8k", "math500", "codemmlu", "arc_easy"):
        files[TASKS[task].files[0]] = local_rows(task, 4)
    for name, rows in files.items():
        if name not in without:
            write(folder / name, rows)
    return folder


def _question(i: int) -> dict[str, Any]:
    return {
        "idx": i,
        "question": f"Is it true that {text(i, 3)} number {i}?",
        "best_answer": f"No, {text(i, 2)}.",
        "correct_answers": [f"No, {text(i, 2)}.", "It is not."],
        "incorrect_answers": [f"Yes, {text(i, 3)}.", "It is so."],
    }


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
