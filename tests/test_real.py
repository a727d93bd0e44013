"""The real 135M chat model from PyPI, from prompts to an adapter that PEFT loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import steer2edit as s2e
from runs import NEEDS_THE_MODEL, bundled, command, tiny_recipe
from steer2edit.behaviours.base import Item
from steer2edit.behaviours.safety import written_refusals
from steer2edit.files.reading import read_jsonl
from steer2edit.models.embedded import EMBEDDED, embedded_checkpoint
from steer2edit.models.load import load_model
from steer2edit.probing.chat import prompt_tokens

pytestmark = NEEDS_THE_MODEL


def test_the_real_model_from_prompts_to_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(
        EMBEDDED,
        behaviour__new_tokens=8,
        data={
            "probe": {"harmful": 6, "benign": 6},
            "validation": {"harmful": 4, "benign": 4},
            "test": {"harmful": 4, "benign": 4, "borderline": 4},
        },
        search__rho_attn=[0.2, 0.3],
        search__steering=[0.25],
        evaluation__new_tokens=8,
        evaluation__utility_tokens=8,
        evaluation__rows=32,
        evaluation__batch=64,
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    out = tmp_path / "out"
    assert command(monkeypatch, "run", tmp_path / "recipe.yaml", "--quiet", "--json", "--out", out) == 0

    results = json.loads((out / "evaluation/results.json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == results
    systems = results["systems"]
    assert list(systems) == ["base", "steering", "edit"]
    assert systems["base"]["refusal"]["mean"] == 0.0  # it never refuses by itself
    assert systems["edit"]["utility_loss"]["mean"] > 0.01
    assert results["agreement"]["largest_logit_difference"] < 1e-3
    answers = read_jsonl(out / "evaluation/answers.jsonl")
    assert any(a["base"] != a["edit"] for a in answers)
    assert all(" " in a["base"] for a in answers if a["kind"] == "benign")

    model, tokenizer = load_model(EMBEDDED, dtype="float32", device="cpu")
    edit = s2e.Edit.load(out / "edit.safetensors")
    assert (edit.summary()["attn"]["components"], edit.summary()["mlp"]["components"]) == (30 * 9, 30 * 1536)
    assert edit.summary()["attn"]["edited"] > 0
    prompt = bundled("test", {"harmful": 1})[0].text
    ids = torch.tensor([prompt_tokens(tokenizer, Item("", prompt).messages(None))])
    with torch.inference_mode():
        base = model(ids).logits
        with edit.applied(model):
            applied = model(ids).logits
        adapted = PeftModel.from_pretrained(model, str(out / "adapter")).eval()(ids).logits
    assert (adapted - applied).abs().max() < 1e-3
    assert (applied - base).abs().max() > 0.1


def test_what_is_exported_answers_as_the_baked_model_in_transformers_and_in_peft(tmp_path: Path) -> None:
    model, tokenizer = load_model(EMBEDDED, dtype="float32", device="cpu")
    found = bundled("probe", {"harmful": 8, "benign": 8})
    answers = {
        "harmful": ("I'm sorry, but I can't help with that.", "positive"),
        "benign": ("Sure! Here it is.", "negative"),
    }
    scores = s2e.score(model, s2e.collect(model, tokenizer, [s2e.Trace(p.text, *answers[p.kind]) for p in found]))
    edit = scores.edit(rho_attn=0.3, rho_mlp=0.6, alpha=0.3)
    prompts = bundled("test", {"harmful": 10, "benign": 10})
    ids = [torch.tensor([prompt_tokens(tokenizer, p.messages(None))]) for p in prompts]

    def tokens(of: Any) -> list[list[int]]:
        with torch.inference_mode():
            return [
                of.generate(input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=12, do_sample=False)[
                    0
                ].tolist()
                for x in ids
            ]

    base = tokens(model)
    folder = s2e.export_checkpoint(embedded_checkpoint(), edit, tmp_path / "edited")
    edit.save_adapter(tmp_path / "adapter")
    edit.apply(model)
    baked = tokens(model)
    edit.revert(model)
    assert sum(a != b for a, b in zip(baked, base, strict=True)) >= 10
    assert tokens(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()) == baked
    assert tokens(PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()) == baked


def test_the_readmes_python_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    prompts = bundled("probe", {"harmful": 12, "benign": 12})
    refusals = written_refusals()
    positive = [s2e.Trace(p.prompt, refusals[i], "positive") for i, p in enumerate(prompts[:12])]
    negative = [
        s2e.Trace(p.prompt, f"Of course. {q.text}", "negative") for p, q in zip(prompts, prompts[12:], strict=False)
    ]
    monkeypatch.chdir(tmp_path)
    s2e.write_traces("runs/safety-demo/traces.jsonl", [*positive, *negative])
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("The capital of France is")
    assert printed[-2] == "True"
    assert (tmp_path / "adapter/adapter_config.json").is_file()
