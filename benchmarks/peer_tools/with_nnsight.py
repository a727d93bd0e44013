"""nnsight: interventions written inside a trace, on batches of any size."""

from __future__ import annotations

from pathlib import Path

from measure import Layers, Plan, Task, Work, answers_of, batches, greedy, main, padded, spans

# Texts that go through the model at once; they are taken in the order of their lengths.
TEXTS = 16


def load(plan: Plan):
    import torch
    from nnsight import TransformersModel

    # The task is named, since it would be asked for on the Hub.
    return TransformersModel(plan.model, task="text-generation", dispatch=True, dtype=torch.float32, device="cpu")


def vectors(plan: Plan, out: Path) -> Work:
    """Our definition, written in traces: the mean of the stream over the positions that predict the response."""
    import nnsight
    import torch

    model = load(plan)

    @torch.no_grad()
    def mean_of(label: str) -> torch.Tensor:
        traces = sorted(plan.of(label), key=lambda trace: len(trace.ids))
        total = 0
        for some in batches(traces, TEXTS):
            ids, mask = padded([trace.ids for trace in some], plan.stops[0], "right")
            weights = spans(some, ids.shape[1])
            with model.trace({"input_ids": ids, "attention_mask": mask}) as tracer:
                sums = nnsight.save([])
                for layer in model.model.layers:
                    sums.append(torch.einsum("bt,btd->d", weights, layer.output))
                tracer.stop()  # the head is not needed
            total = total + torch.stack(list(sums))
        return total / len(traces)

    return lambda: Layers(dict(enumerate(mean_of("positive") - mean_of("negative"))))


def sweep(plan: Plan, out: Path) -> Work:
    model = load(plan)
    vector = plan.vectors()[plan.layer]

    def answers_under(strength: float) -> list[list[int]]:
        answers = []
        for some in batches(plan.prompts, plan.rows):
            ids, mask = padded([p.ids for p in some], plan.stops[0], "left")
            with model.generate(**greedy(plan)) as tracer:
                with tracer.invoke({"input_ids": ids, "attention_mask": mask}):
                    for _ in tracer.iter[:]:
                        model.model.layers[plan.layer].output[:] += strength * vector
                with tracer.invoke():  # apart, since the loop ends only with the run
                    made = tracer.result.save()
            answers += answers_of(plan, made, ids.shape[1])
        return answers

    return lambda: [answers_under(strength) for strength in plan.strengths]


TASKS: dict[str, Task] = {"vectors-span": vectors, "sweep-steer": sweep}

if __name__ == "__main__":
    main(TASKS, ("nnsight", "transformers", "torch"))
