"""TransformerLens: its bridge over transformers' model, `run_with_cache`, and hooks around its own `generate`."""

from __future__ import annotations

from pathlib import Path

from measure import Layers, Plan, Task, Work, answers_of, batches, main, padded, spans

# Texts that go through the model at once; they are taken in the order of their lengths.
TEXTS = 16


def load(plan: Plan):
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(plan.model, device="cpu", dtype=torch.float32)


def vectors(plan: Plan, out: Path) -> Work:
    """Our definition, from the cache: the mean of the stream over the positions that predict the response."""
    import torch

    bridge = load(plan)
    names = [f"blocks.{layer}.hook_out" for layer in range(plan.layers)]

    @torch.inference_mode()
    def mean_of(label: str) -> torch.Tensor:
        traces = sorted(plan.of(label), key=lambda trace: len(trace.ids))
        total = 0
        for some in batches(traces, TEXTS):
            ids, mask = padded([trace.ids for trace in some], plan.stops[0], "right")
            weights = spans(some, ids.shape[1])
            _, cache = bridge.run_with_cache(ids, attention_mask=mask, names_filter=names, return_type=None)
            total = total + torch.stack([torch.einsum("bt,btd->d", weights, cache[name]) for name in names])
        return total / len(traces)

    return lambda: Layers(dict(enumerate(mean_of("positive") - mean_of("negative"))))


def sweep(plan: Plan, out: Path) -> Work:
    import torch

    bridge = load(plan)
    vector = plan.vectors()[plan.layer]

    def answers_under(strength: float) -> list[list[int]]:
        def steer(stream, hook):
            return stream + strength * vector

        answers = []
        with bridge.hooks(fwd_hooks=[(f"blocks.{plan.layer}.hook_out", steer)]):
            for some in batches(plan.prompts, plan.rows):
                ids, mask = padded([p.ids for p in some], plan.stops[0], "left")
                made = bridge.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=plan.tokens,
                    do_sample=False,
                    eos_token_id=plan.stops[0],
                    return_type="tokens",
                    verbose=False,
                )
                answers += answers_of(plan, made, ids.shape[1])
        return answers

    @torch.inference_mode()
    def work() -> list[list[list[int]]]:
        return [answers_under(strength) for strength in plan.strengths]

    return work


TASKS: dict[str, Task] = {"vectors-span": vectors, "sweep-steer": sweep}

if __name__ == "__main__":
    main(TASKS, ("transformer-lens", "transformers", "torch"))
