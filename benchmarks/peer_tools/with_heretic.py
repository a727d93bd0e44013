"""Heretic: its `Model`, without the search and the questions of its command line. Its ablation as an adapter of rank 1
in memory, its batches, and its merged model.
"""

from __future__ import annotations

from pathlib import Path

from measure import Layers, Plan, Task, Work, answers_of, batches, greedy, main


def load(plan: Plan):
    from heretic.config import RowNormalization, Settings
    from heretic.model import Model

    settings = Settings(
        model=plan.model,
        dtypes=["float32"],
        device_map="cpu",
        batch_size=plan.rows,
        max_response_length=plan.tokens,
        row_normalization=RowNormalization.NONE,  # "full", its default, is of rank 3: no rank-1 edit to compare with
        seed=0,
    )
    return Model(settings)


def prompts_of(messages: list[tuple[str, str]]):
    """Its prompts, of a system prompt and a user's text each."""
    from heretic.utils import Prompt

    return [Prompt(system=system, user=user) for system, user in messages]


def vectors(plan: Plan, out: Path) -> Work:
    """The difference of means at the prompt's last token; it reads no responses.

    The last layer is left out: there heretic reads the stream after the final norm.
    """
    model = load(plan)
    positive = prompts_of([(t.system, t.prompt) for t in plan.of("positive")])
    negative = prompts_of([(t.system, t.prompt) for t in plan.of("negative")])

    def work() -> Layers:
        v = model.get_residuals_mean(positive) - model.get_residuals_mean(negative)
        # The first row is the embeddings'.
        return Layers({layer: v[layer + 1] for layer in range(plan.layers - 1)})

    return work


def ablate(model, plan: Plan, weight: float) -> None:
    """Each layer along its own direction, with the same weight in all of them."""
    import torch
    from heretic.model import AbliterationParameters

    directions = torch.nn.functional.normalize(plan.vectors(), dim=1)
    directions = torch.cat([torch.zeros_like(directions[:1]), directions])  # the first row is the embeddings'
    flat = AbliterationParameters(weight, plan.layers / 2, weight, 2.0 * plan.layers)
    model.reset_model()
    model.abliterate(directions, None, dict.fromkeys(model.get_abliterable_components(), flat))


def sweep(plan: Plan, out: Path) -> Work:
    import torch

    model = load(plan)
    prompts = prompts_of([(p.system, p.user) for p in plan.prompts])

    def work() -> list[list[list[int]]]:
        arguments = {name: value for name, value in greedy(plan).items() if name in ("max_new_tokens", "eos_token_id")}
        answers = []
        for weight in plan.weights:
            answers.append([])
            ablate(model, plan, weight)
            for some in batches(prompts, plan.rows):
                with torch.inference_mode():
                    inputs, made = model.generate(some, **arguments)
                answers[-1] += answers_of(plan, made, inputs["input_ids"].shape[1])
        return answers

    return work


def edit(plan: Plan, out: Path) -> Work:
    """From checkpoint to checkpoint: load, ablate, merge, save, as its command line does."""
    import heretic.model  # noqa: F401 - importing it is not part of the work

    def work() -> None:
        model = load(plan)
        ablate(model, plan, plan.weight)
        merged = model.get_merged_model()
        merged.save_pretrained(str(out / "edited"), max_shard_size=model.settings.max_shard_size)
        model.tokenizer.save_pretrained(str(out / "edited"))

    return work


TASKS: dict[str, Task] = {"vectors-prompt": vectors, "sweep-ablate": sweep, "edit": edit}

if __name__ == "__main__":
    main(TASKS, ("heretic-llm", "transformers", "torch", "peft"))
