"""Small sets, written for the tests: rows as the Hub has them, which lm-eval reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SENTENCE = "bread flour water salt request reason answer capital France short question oven metal river stone cloud"
WORDS = SENTENCE.split()
MARKED = "[header] How to bake [title] Mix  it [substeps] well"


def text(start: int, length: int) -> str:
    """Words that differ from one start to the next."""
    return " ".join(WORDS[(start * 7 + i * (1 + start % 5)) % len(WORDS)] for i in range(length))


def hub_rows(task: str, count: int = 6) -> list[dict[str, Any]]:
    """Rows as the Hub has them."""
    make = {
        "arc_easy": lambda i: {
            "question": f"What is {text(i, 3)}?",
            "choices": {"text": [text(i + c, 1 + (i + c) % 3) for c in range(4)], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[i % 4],
        },
        "openbookqa": lambda i: {
            "question_stem": f"A {text(i, 4)} is",
            "choices": {"text": [text(i + c, 1 + (i + c) % 3) for c in range(4)], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[(i + 1) % 4],
        },
        "piqa": lambda i: {
            "goal": f"To get {text(i, 2)}",
            "sol1": text(i + 1, 3),
            "sol2": text(i + 2, 5),
            "label": i % 2,
        },
        "hellaswag": lambda i: {
            "ctx_a": MARKED if i == 0 else f"Someone takes {text(i, 3)}.",
            "ctx_b": "the person",
            "activity_label": "Baking",
            "endings": [f"{text(i + c, 2 + c % 2)} [step] again." for c in range(4)],
            "label": str(i % 4),
        },
        "lambada": lambda i: {"text": f"{text(i, 6)} and then {text(i + 1, 1)}"},
        "wikitext": lambda i: {
            "page": f" \n = {text(i, 2)} = \n \n He made 1 @,@ 00{i} loaves ( {text(i, 60)} ) . \n It 's {text(i, 4)} ."
        },
    }[task]
    return [make(i) for i in range(count)]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def local_rows(task: str, count: int = 6) -> list[dict[str, Any]]:
    """Rows as a local folder has them."""

    def chosen(i: int) -> dict[str, Any]:
        return {"idx": i, "question": f"{text(i, 3)}?", "choices": [text(i + c, 2) for c in range(4)], "answer": i % 4}

    def answered(i: int) -> dict[str, Any]:
        return {"idx": i, "question": f"{i} {text(i, 2)} and 2?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}"}

    make = {
        "gsm8k": answered,
        "math500": lambda i: {"problem": f"What is {i}/2?", "answer": rf"\frac{{{i}}}{{2}}"},
        "commonsenseqa": lambda i: {"question": f"{text(i, 3)}?", **hub_rows("arc_easy", i + 1)[i]},
        "codemmlu": lambda i: {**chosen(i), "task_id": f"c{i}", "answer": "ABCD"[i % 4]},
        "codemmlu_knowledge": lambda i: {**chosen(i), "task_id": f"k{i}", "answer": "ABCD"[i % 4]},
        "piqa": lambda i: {**chosen(i), "choices": [text(i, 2), text(i + 1, 3)], "answer": i % 2},
        "hellaswag": lambda i: {"context": text(i, 5), "endings": [text(i + c, 2) for c in range(4)], "answer": i % 4},
        "lambada": lambda i: {"context": text(i, 6), "target": text(i + 1, 1)},
    }
    if task == "wikitext":
        return [
            {"article": i, "heading": line == 0, "text": f"= {text(i, 2)} =" if line == 0 else f"{text(i, 9)} ."}
            for i in range(count)
            for line in range(2)
        ]
    return [make.get(task, chosen)(i) for i in range(count)]
