"""lm-eval, by its own command line, measures on the exports what the edit does to the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import steer2edit as s2e
from conftest import make_tokenizer
from runs import save_pico
from steer2edit.models.load import load_model

pytestmark = [
    pytest.mark.lm_eval,
    pytest.mark.slow,
]

QUESTIONS = [f"{words} {number}" for words in ("What is", "Do I bake", "Who wrote", "I am") for number in range(5)]
CHOICES = ["the capital of France", "a loaf", "I am sorry, but no"]


def write_task(folder: Path) -> Path:
    """A task of twenty questions with three choices each; JSON is YAML too."""
    folder.mkdir()
    rows = [json.dumps({"question": question, "choices": CHOICES}) for question in QUESTIONS]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    task = {
        "task": "pico",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}?",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "pico.yaml").write_text(json.dumps(task), encoding="utf-8")
    return folder


def lm_eval(task: Path, out: Path, model_args: str) -> torch.Tensor:
    """What `lm_eval` writes as the log-likelihood of each choice: [questions, choices]."""
    home = {"HF_HOME": str(task / "home"), "HF_DATASETS_CACHE": str(task / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"{model_args},dtype=float32"]
    command += ["--include_path", str(task), "--tasks", "pico", "--device", "cpu", "--batch_size", "8"]
    command += ["--log_samples", "--output_path", str(out)]
    done = subprocess.run(
        command,
        cwd=task,
        env=os.environ | home,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = out.rglob("samples_pico_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row["doc_id"])
    assert [row["doc"]["question"] for row in rows] == QUESTIONS
    return torch.tensor([[float(answer[0][0]) for answer in row["resps"]] for row in rows])


def by_hand(model: Any, tokenizer: Any) -> torch.Tensor:
    """The same: the choice's tokens are those of the whole text after the question's, a space between the two."""
    out = torch.empty(len(QUESTIONS), len(CHOICES))
    for i, question in enumerate(QUESTIONS):
        for j, choice in enumerate(CHOICES):
            start = len(tokenizer(f"{question}?")["input_ids"])
            ids = torch.tensor(tokenizer(f"{question}? {choice}")["input_ids"])
            with torch.inference_mode():
                log_p = model(ids[None]).logits[0].double().log_softmax(-1)
            out[i, j] = sum(log_p[at - 1, ids[at]] for at in range(start, len(ids)))
    return out


def test_lm_eval_measures_the_edit_on_the_checkpoint_and_on_the_adapter(tmp_path: Path, traces: Any) -> None:
    # With an adapter lm-eval cuts a vocabulary that is larger than the tokenizer's, which moves every likelihood.
    base = save_pico(tmp_path / "base", vocab_size=len(make_tokenizer()))
    model, tokenizer = load_model(base, dtype="float32", device="cpu")
    edit = s2e.score(model, s2e.collect(model, tokenizer, *traces)).edit(rho_attn=0.3, rho_mlp=0.3, alpha=0.3)
    s2e.export_checkpoint(base, edit, tmp_path / "edited")
    edit.save_adapter(tmp_path / "adapter", base)

    task = write_task(tmp_path / "task")
    of_base = lm_eval(task, tmp_path / "out_base", f"pretrained={base}")
    of_checkpoint = lm_eval(task, tmp_path / "out_checkpoint", f"pretrained={tmp_path / 'edited'}")
    of_adapter = lm_eval(task, tmp_path / "out_adapter", f"pretrained={base},peft={tmp_path / 'adapter'}")

    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(of_base, by_hand(model, tokenizer), **close)
    edit.apply(model)
    torch.testing.assert_close(of_checkpoint, by_hand(model, tokenizer), **close)
    torch.testing.assert_close(of_adapter, of_checkpoint, **close)
    assert ((of_checkpoint - of_base).abs() > 0.01).all()
