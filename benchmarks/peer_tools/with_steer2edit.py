"""Our side of every pair: what a peer does, done with steer2edit as its documentation says."""

from __future__ import annotations

from pathlib import Path

from measure import Layers, Plan, Task, Work, main


def vectors(plan: Plan, out: Path, kind: str) -> Work:
    """One pass with `collect`, which also leaves the mean input of every head and neuron.

    Args:
        kind: where the stream is read: "span", at the positions that predict the response; "last", at the text's last
            token; "prompt", at the prompt's last token.
    """
    import steer2edit as s2e

    model, tokenizer = s2e.load_model(plan.model, dtype="float32", device="cpu")
    s2e.self_check(model)  # when a model is loaded, not in what is timed
    if kind == "last":
        traces = [_last_token(tokenizer, trace.text, trace.label) for trace in plan.traces]
    else:
        # At a response of one token, what predicts it is the prompt's last token.
        traces = [
            s2e.Trace(t.prompt, "I" if kind == "prompt" else response_of(tokenizer, t), t.label, system=t.system)
            for t in plan.traces
        ]

    def work() -> Layers:
        if kind == "last":
            probe = s2e.collect(model, tokenizer, traces, plain=True, positions="response")
        else:
            probe = s2e.collect(model, tokenizer, traces)
        return Layers({layer: means["positive"] - means["negative"] for layer, means in probe.residual.items()})

    return work


def response_of(tokenizer, trace):
    """A trace's response, out of its text."""
    messages = [{"role": "system", "content": trace.system}, {"role": "user", "content": trace.prompt}]
    before = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert trace.text.startswith(before)
    return trace.text[len(before) :]


def _last_token(tokenizer, text, label):
    import steer2edit as s2e

    start = tokenizer(text, return_offsets_mapping=True)["offset_mapping"][-1][0]
    return s2e.Trace(text[:start], text[start:], label)


def sweep(plan: Plan, out: Path, kind: str) -> Work:
    """All strengths in one call: every row of the batch carries its own.

    Args:
        kind: "steer" adds to the stream after one layer; "ablate" weakens a direction in all that writes into the
            stream.
    """
    import steer2edit as s2e
    from steer2edit.engines.base import Request
    from steer2edit.engines.transformers import TransformersEngine
    from steer2edit.method.intervention import Intervention, Term, residual_key

    model, tokenizer = s2e.load_model(plan.model, dtype="float32", device="cpu")
    engine = TransformersEngine(model, tokenizer, rows=plan.rows)
    v = plan.vectors()
    strengths = plan.strengths if kind == "steer" else plan.weights

    def work() -> list[list[list[int]]]:
        if kind == "steer":
            key = residual_key(plan.layer)
            table = [Intervention(f"{g:g}", {key: Term(b=g * v[plan.layer])}) for g in strengths]
        else:
            scores = s2e.score(model, s2e.Probe.load(plan.folder / "probe.safetensors"), vectors=dict(enumerate(v)))
            table = [ablation(scores, weight).intervention(f"{weight:g}") for weight in strengths]
        requests = [Request(p.ids, row) for row in range(len(table)) for p in plan.prompts]
        answers = [list(a.ids) for a in engine.generate(requests, table, plan.tokens)]
        return [answers[i : i + len(plan.prompts)] for i in range(0, len(answers), len(plan.prompts))]

    return work


def ablation(scores, weight):
    """W − weight · v̂ v̂ᵀ W at every site. k̂ and ‖W_iᵀv̂‖ give v̂ᵀW: λ_i = −weight · ‖W_iᵀv̂‖."""
    from steer2edit import Edit
    from steer2edit.method.change import SiteEdit

    sites = {k: SiteEdit(s.site, s.u, s.k, s.g, s.reach, -weight * s.reach) for k, s in scores.sites.items()}
    config = {"rho_attn": None, "rho_mlp": None, "alpha": 0.0}
    return Edit(sites, config, scores.fingerprint, scores.provenance)


def edit(plan: Plan, out: Path) -> Work:
    """The ablation of one direction a layer, from checkpoint to checkpoint; no model is built."""
    # By name, since importing them is not part of the work.
    from steer2edit import Probe, export_checkpoint, score

    def work() -> None:
        probe = Probe.load(plan.folder / "probe.safetensors")
        scores = score(plan.model, probe, vectors=dict(enumerate(plan.vectors())))
        export_checkpoint(plan.model, ablation(scores, plan.weight), out / "edited")

    return work


TASKS: dict[str, Task] = {
    "vectors-span": lambda plan, out: vectors(plan, out, "span"),
    "vectors-last": lambda plan, out: vectors(plan, out, "last"),
    "vectors-prompt": lambda plan, out: vectors(plan, out, "prompt"),
    "sweep-steer": lambda plan, out: sweep(plan, out, "steer"),
    "sweep-ablate": lambda plan, out: sweep(plan, out, "ablate"),
    "edit": edit,
}

if __name__ == "__main__":
    main(TASKS, ("steer2edit", "transformers", "torch"))
