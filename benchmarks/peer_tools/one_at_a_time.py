"""The way of code that is published with a paper: each configuration is a process of its own, which loads the model,
hooks it or changes its weights, and gives it one text after the other. It needs transformers alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from measure import Layers, Plan, Task, Work, answers_of, greedy, main, measured, padded, read_plan, write_result


def loaded(plan: Plan):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(plan.model, dtype=torch.float32).eval()


def in_processes(plan: Plan, out: Path, parts: list[str]) -> int:
    """One process after the other, each with a part of the task; returns the most memory that one of them held."""
    most = 0
    for part in parts:
        command = [sys.executable, __file__, part, str(plan.folder), str(out / part.replace(":", "-"))]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        most = max(most, json.loads(said.strip().splitlines()[-1])["memory"])
    return most


def vectors(plan: Plan, out: Path) -> Work:
    def work() -> int:
        most = in_processes(plan, out, ["one-vectors"])
        (out / "one-vectors" / "vectors.safetensors").rename(out / "vectors.safetensors")
        return most

    return work


def one_vectors(plan: Plan, out: Path) -> Work:
    """Every activation of one text at a time is kept, then averaged over the response."""
    import torch

    model = loaded(plan)
    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int):
        def hook(module, args, output) -> None:
            kept[layer] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    for layer, module in enumerate(model.model.layers):
        module.register_forward_hook(keep(layer))

    @torch.inference_mode()
    def work() -> Layers:
        means = {}
        for label in ("positive", "negative"):
            rows = []
            for trace in plan.of(label):
                model(torch.tensor([trace.ids]))
                rows.append(torch.stack([kept[i][0, trace.first : trace.last].mean(0) for i in range(plan.layers)]))
            means[label] = torch.stack(rows).mean(dim=0)
        return Layers(dict(enumerate(means["positive"] - means["negative"])))

    return work


def sweep(plan: Plan, out: Path) -> Work:
    def work() -> int:
        parts = [f"one-strength:{i}" for i in range(len(plan.strengths))]
        most = in_processes(plan, out, parts)
        answers = [json.loads((out / part.replace(":", "-") / "answers.json").read_text("utf-8"))[0] for part in parts]
        write_result(out, answers)
        return most

    return work


def one_strength(plan: Plan, out: Path, number: int) -> Work:
    """The prompts one by one under a hook, which adds at every position."""
    import torch

    model = loaded(plan)
    added = plan.strengths[number] * plan.vectors()[plan.layer]

    def hook(module, args, output):
        return output + added if isinstance(output, torch.Tensor) else (output[0] + added, *output[1:])

    model.model.layers[plan.layer].register_forward_hook(hook)

    @torch.inference_mode()
    def work() -> list[list[list[int]]]:
        answers = []
        for prompt in plan.prompts:
            ids, mask = padded([prompt.ids], plan.stops[0], "left")
            answers += answers_of(plan, model.generate(ids, attention_mask=mask, **greedy(plan)), ids.shape[1])
        return [answers]

    return work


def edit(plan: Plan, out: Path) -> Work:
    return lambda: in_processes(plan, out, ["one-edit"])


def one_edit(plan: Plan, out: Path) -> Work:
    """W − weight · v̂ v̂ᵀ W in the loaded model, and `save_pretrained`."""
    import torch
    from transformers import AutoTokenizer

    @torch.inference_mode()
    def work() -> None:
        model = loaded(plan)
        v = torch.nn.functional.normalize(plan.vectors(), dim=1)
        for layer, module in enumerate(model.model.layers):
            for linear in (module.self_attn.o_proj, module.mlp.down_proj):
                linear.weight -= plan.weight * torch.outer(v[layer], v[layer] @ linear.weight)
        model.save_pretrained(str(out.parent / "edited"))
        AutoTokenizer.from_pretrained(plan.model).save_pretrained(str(out.parent / "edited"))

    return work


TASKS: dict[str, Task] = {
    "vectors-span": vectors,
    "sweep-steer": sweep,
    "edit": edit,
    "one-vectors": one_vectors,
    "one-edit": one_edit,
}
PACKAGES = ("transformers", "torch")

if __name__ == "__main__":
    if sys.argv[1].startswith("one-strength:"):
        number = int(sys.argv[1].split(":")[1])
        told = measured(
            lambda plan, out: one_strength(plan, out, number), read_plan(sys.argv[2]), Path(sys.argv[3]), PACKAGES
        )
        print(json.dumps(told), flush=True)
    else:
        main(TASKS, PACKAGES)
