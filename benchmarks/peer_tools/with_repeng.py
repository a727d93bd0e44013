"""repeng: `ControlVector.train` with batches of its own, and `set_control` before its `generate`."""

from __future__ import annotations

from pathlib import Path

from measure import Layers, Plan, Task, Work, answers_of, batches, greedy, main, padded
from with_steering_vectors import check_tokens, load


def vectors(plan: Plan, out: Path) -> Work:
    """The first principal component of the paired differences at the last token of each text.

    The last layer is left out: there repeng reads the stream after the final norm.
    """
    import torch
    from repeng import ControlVector, DatasetEntry

    model, tokenizer = load(plan)
    check_tokens(plan, tokenizer)
    entries = [DatasetEntry(p.text, n.text) for p, n in zip(plan.of("positive"), plan.of("negative"), strict=True)]

    def work() -> Layers:
        trained = ControlVector.train(model, tokenizer, entries)
        return Layers({i: torch.tensor(v) for i, v in trained.directions.items() if i < plan.layers - 1})

    return work


def sweep(plan: Plan, out: Path) -> Work:
    import torch
    from repeng import ControlModel, ControlVector

    model, _ = load(plan)
    vector = ControlVector(model.config.model_type, {plan.layer: plan.vectors()[plan.layer].numpy()})
    model = ControlModel(model, [plan.layer])

    @torch.inference_mode()
    def work() -> list[list[list[int]]]:
        answers = []
        for strength in plan.strengths:
            answers.append([])
            model.set_control(vector, strength)
            for some in batches(plan.prompts, plan.rows):
                ids, mask = padded([p.ids for p in some], plan.stops[0], "left")
                made = model.generate(input_ids=ids, attention_mask=mask, **greedy(plan))
                answers[-1] += answers_of(plan, made, ids.shape[1])
        return answers

    return work


TASKS: dict[str, Task] = {"vectors-last": vectors, "sweep-steer": sweep}

if __name__ == "__main__":
    main(TASKS, ("repeng", "transformers", "torch", "numpy"))
