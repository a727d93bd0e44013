"""steering-vectors: `train_steering_vector` with batches of its own, and `apply` around transformers' `generate`."""

from __future__ import annotations

from pathlib import Path

from measure import Layers, Plan, Task, Work, answers_of, batches, greedy, main, padded


def load(plan: Plan):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(plan.model, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(plan.model)


def vectors(plan: Plan, out: Path) -> Work:
    """The difference of means at the last token of each text."""
    from steering_vectors import train_steering_vector

    model, tokenizer = load(plan)
    pairs = [(p.text, n.text) for p, n in zip(plan.of("positive"), plan.of("negative"), strict=True)]
    check_tokens(plan, tokenizer)

    def work() -> Layers:
        trained = train_steering_vector(model, tokenizer, pairs, read_token_index=-1, batch_size=16)
        return Layers(trained.layer_activations)

    return work


def check_tokens(plan: Plan, tokenizer) -> None:
    """This tokenizer must give the tokens that the other side has."""
    for trace in plan.traces:
        ids = tokenizer(trace.text)["input_ids"]
        if tuple(ids) != trace.ids:
            raise ValueError(f"the tokenizer gives other tokens: {ids[:8]} … in place of {trace.ids[:8]} …")


def sweep(plan: Plan, out: Path) -> Work:
    import torch
    from steering_vectors import SteeringVector

    model, _ = load(plan)
    vector = SteeringVector({plan.layer: plan.vectors()[plan.layer]}, "decoder_block")

    @torch.inference_mode()
    def work() -> list[list[list[int]]]:
        answers = []
        for strength in plan.strengths:
            answers.append([])
            with vector.apply(model, multiplier=strength):
                for some in batches(plan.prompts, plan.rows):
                    ids, mask = padded([p.ids for p in some], plan.stops[0], "left")
                    made = model.generate(input_ids=ids, attention_mask=mask, **greedy(plan))
                    answers[-1] += answers_of(plan, made, ids.shape[1])
        return answers

    return work


TASKS: dict[str, Task] = {"vectors-last": vectors, "sweep-steer": sweep}

if __name__ == "__main__":
    main(TASKS, ("steering-vectors", "transformers", "torch"))
