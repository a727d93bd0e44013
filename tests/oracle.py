"""The paper read slowly: its sections 1 and 2 as plain loops over layers, components and tokens, in float64.

Written from the paper's formulas and from nothing in the library, so that the two can be compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = np.ndarray

# Where the four families keep what the paper calls o_proj and down_proj.
PATHS = {"attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}


# Label, group, token ids, and the positions [first, last) that count.
Run = tuple[str, str, list[int], int, int]


@dataclass
class Response:
    """What one response left at one projection: its inputs and outputs, a row for each position that counts."""

    label: str
    group: str
    inputs: Array  # [tokens, components · width]
    outputs: Array  # [tokens, d]


@dataclass
class Reading:
    """What the paper says of one projection."""

    v: Array  # [d]
    mu: Array  # [components, width]
    u: Array  # [d]
    k: Array  # [components, width]
    g: Array  # [components]
    lam: Array  # [components]
    delta: Array  # [d, components · width]


def runs_of(tokenizer: Any, traces: Any, predicting: bool = True) -> list[Run]:
    """Each ChatML trace and its positions, found by counting the characters that the tokens decode to."""
    runs = []
    for trace in traces:
        system = f"<|im_start|>system\n{trace.system}<|im_end|>\n" if trace.system else ""
        prompt = f"{system}<|im_start|>user\n{trace.prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(prompt + trace.response)["input_ids"]
        start = next(i for i in range(len(ids)) if len(tokenizer.decode(ids[: i + 1])) > len(prompt))
        end = len(ids)
        run = (ids[:-1], start - 1, end - 1) if predicting else (ids, start, end)
        runs.append((trace.label, trace.group, *run))
    return runs


def keeping(seen: dict[Any, tuple[Any, Any]], where: Any) -> Any:
    def keep(module: Any, args: Any, out: Any) -> None:
        seen[where] = (args[0], out)

    return keep


def capture(model: Any, runs: list[Run]) -> dict[tuple[int, str], list[Response]]:
    """Runs texts one by one and keeps every activation that counts."""
    kept: dict[tuple[int, str], list[Response]] = {}
    for label, group, ids, first, last in runs:
        seen: dict[tuple[int, str], tuple[Any, Any]] = {}
        handles = []
        for number, layer in enumerate(model.model.layers):
            for block, path in PATHS.items():
                handles.append(layer.get_submodule(path).register_forward_hook(keeping(seen, (number, block))))
        with torch.no_grad():
            model.model(input_ids=torch.tensor([ids]), use_cache=False)
        for handle in handles:
            handle.remove()
        for where, (x, out) in seen.items():
            x, out = x[0, first:last].double().numpy(), out[0, first:last].double().numpy()
            kept.setdefault(where, []).append(Response(label, group, x, out))
    return kept


def capture_streams(model: Any, runs: list[Run], layers: str = "model.layers") -> dict[int, list[Response]]:
    """Runs texts one by one and keeps the residual stream after every layer, where it counts."""
    kept: dict[int, list[Response]] = {}
    for label, group, ids, first, last in runs:
        seen: dict[int, tuple[Any, Any]] = {}
        handles = [
            layer.register_forward_hook(keeping(seen, number))
            for number, layer in enumerate(model.get_submodule(layers))
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]), use_cache=False)
        for handle in handles:
            handle.remove()
        for number, (_, out) in seen.items():
            x = (out if isinstance(out, torch.Tensor) else out[0]).reshape(len(ids), -1)[first:last]
            kept.setdefault(number, []).append(Response(label, group, np.zeros((last - first, 0)), array(x)))
    return kept


def mean(rows: list[Array]) -> Array:
    total = np.zeros_like(rows[0])
    for row in rows:
        total = total + row
    return total / len(rows)


def label_mean(responses: list[Response], label: str, side: str) -> Array:
    """Over the label's groups, of each group's mean over responses, of each response's mean over tokens."""
    groups: dict[str, list[Array]] = {}
    for response in responses:
        if response.label == label:
            groups.setdefault(response.group, []).append(mean(list(getattr(response, side))))
    return mean([mean(rows) for rows in groups.values()])


def dot(a: Array, b: Array) -> float:
    return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def read_site(responses: list[Response], weight: Array, n: int, rho: float | None, alpha: float) -> Reading:
    """Equation 1 and steps 1 to 3 for one projection of n components.

    Args:
        weight: [d, n · width]; component i is the columns i · width up to (i + 1) · width.
    """
    v = label_mean(responses, "positive", "outputs") - label_mean(responses, "negative", "outputs")
    mu = (label_mean(responses, "positive", "inputs") + label_mean(responses, "negative", "inputs")) / 2
    return edit_of(v, mu, weight, n, rho, alpha)


def edit_of(v: Array, mu: Array, weight: Array, n: int, rho: float | None, alpha: float) -> Reading:
    """Steps 1 to 3 for one projection of n components, from its block's v [d] and its own mean input [n · width]."""
    d, width = weight.shape[0], weight.shape[1] // n
    size = math.sqrt(dot(v, v))
    u = np.array([x / size for x in v])
    k, g, lam = np.zeros((n, width)), np.zeros(n), np.zeros(n)
    delta = np.zeros_like(weight)
    for i in range(n):
        columns = slice(i * width, (i + 1) * width)
        W_i, mu_i = weight[:, columns], mu[columns]
        # Step 2: the input direction, W_i^T v, of length one.
        k_i = np.array([dot(W_i[:, j], v) for j in range(width)])
        k[i] = k_i / math.sqrt(dot(k_i, k_i))
        # Step 3: the cosine of v and the component's mean output, then the soft threshold.
        out = np.array([dot(W_i[row], mu_i) for row in range(d)])
        g[i] = dot(v, out) / (size * math.sqrt(dot(out, out))) if np.any(out != 0) else 0.0
        if rho is not None:
            left = abs(g[i]) - rho * alpha
            if left > 0:
                lam[i] = math.copysign(left / (rho * (1 - alpha)), g[i])
        for row in range(d):
            for j in range(width):
                delta[row, i * width + j] = lam[i] * u[row] * k[i, j]
    return Reading(v, mu.reshape(n, width), u, k, g, lam, delta)


def read(model: Any, runs: list[Run], rho: dict[str, float | None], alpha: float) -> dict[tuple[int, str], Reading]:
    """Every layer and block of a model: (layer, block) → what the paper says of it."""
    kept = capture(model, runs)
    found = {}
    for number, layer in enumerate(model.model.layers):
        for block, path in PATHS.items():
            weight = layer.get_submodule(path).weight.detach().double().numpy()
            n = model.config.num_attention_heads if block == "attn" else weight.shape[1]
            found[number, block] = read_site(kept[number, block], weight, n, rho[block], alpha)
    return found


# Any family: sites are told by rows written by hand (families.py), experts are computed anew --------------------------


@dataclass
class Routed:
    """The down projection's inputs of the tokens that one response sent to one expert."""

    label: str
    group: str
    tokens: int  # of the response that count, whether or not they came to this expert
    inputs: list[Array]  # [neurons] each


@dataclass
class Seen:
    """Everything that the texts left: dense sites' inputs, blocks' outputs, and what came to each expert."""

    inputs: dict[str, list[Response]]  # by site key
    outputs: dict[str, list[Response]]  # by block module
    routed: dict[str, list[Routed]]  # by site key


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def array(tensor: Any) -> Array:
    return tensor.detach().double().numpy()


def expert_input(experts: Any, expert: int, x: Array, transposed: bool) -> Array:
    """What one expert's down projection gets of one token [d]: act(gate · x) ∘ (up · x), [neurons].

    As gpt-oss has it (`transposed`): [d, 2 · neurons] with gates and ups in turn, biases, a limit, and up + 1; as all
    others have it: [2 · neurons, d], first the gates, then the ups, and SiLU.
    """
    weight = array(experts.gate_up_proj[expert])
    if not transposed:
        both = np.array([dot(row, x) for row in weight])
        half = len(both) // 2
        return silu(both[:half]) * both[half:]
    both = np.array([dot(column, x) for column in weight.T]) + array(experts.gate_up_proj_bias[expert])
    gate, up = np.minimum(both[0::2], experts.limit), np.clip(both[1::2], -experts.limit, experts.limit)
    return (up + 1) * gate / (1 + np.exp(-experts.alpha * gate))


def keeping_arguments(sent: dict[str, list[Any]], name: str) -> Any:
    def keep(module: Any, args: Any, kwargs: Any) -> None:
        sent[name] = [*args, *kwargs.values()]

    return keep


def capture_rows(model: Any, runs: list[Run], rows: Any) -> Seen:
    """Runs texts one by one: inputs and outputs by hooks, the experts' inputs from what the router sent them."""
    dense = {row.key: row.module for row in rows if row.expert is None}
    blocks = {row.block for row in rows}
    mixtures = {row.module for row in rows if row.expert is not None}
    found = Seen({}, {}, {})
    for label, group, ids, first, last in runs:
        seen: dict[Any, tuple[Any, Any]] = {}
        sent: dict[str, list[Any]] = {}
        handles = []
        for name in {*dense.values(), *blocks}:
            handles.append(model.get_submodule(name).register_forward_hook(keeping(seen, name)))
        for name in mixtures:
            hook = keeping_arguments(sent, name)
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]), use_cache=False)
        for handle in handles:
            handle.remove()
        none = np.zeros((last - first, 0))
        for key, name in dense.items():
            x = seen[name][0].reshape(len(ids), -1)[first:last]
            found.inputs.setdefault(key, []).append(Response(label, group, array(x), none))
        for name in blocks:
            out = seen[name][1]
            out = (out if isinstance(out, torch.Tensor) else out[0]).reshape(len(ids), -1)[first:last]
            found.outputs.setdefault(name, []).append(Response(label, group, none, array(out)))
        for row in rows:
            if row.expert is None:
                continue
            hidden, chosen = sent[row.module][:2]
            experts = model.get_submodule(row.module)
            inputs = [
                expert_input(experts, row.expert, array(hidden[token]), row.transposed)
                for token in range(first, last)
                for choice in chosen[token].tolist()
                if choice == row.expert
            ]
            found.routed.setdefault(row.key, []).append(Routed(label, group, last - first, inputs))
    return found


def reached(routed: list[Routed], label: str) -> int:
    return sum(len(r.inputs) for r in routed if r.label == label)


def routed_mean(routed: list[Routed], label: str, neurons: int) -> Array:
    """Over the tokens that came to the expert, each weighing one over the tokens of its group; 0 if none came."""
    of_group: dict[str, int] = {}
    for r in routed:
        if r.label == label:
            of_group[r.group] = of_group.get(r.group, 0) + r.tokens
    total, weights = np.zeros(neurons), 0.0
    for r in routed:
        for x in r.inputs if r.label == label else ():
            total = total + x / of_group[r.group]
            weights += 1 / of_group[r.group]
    return total / weights if weights else total


def mean_inputs(seen: Seen, row: Any) -> dict[str, Array]:
    """A site's mean input for each label."""
    if row.expert is None:
        return {label: label_mean(seen.inputs[row.key], label, "inputs") for label in ("positive", "negative")}
    return {label: routed_mean(seen.routed[row.key], label, row.n) for label in ("positive", "negative")}


def mean_outputs(seen: Seen, row: Any) -> dict[str, Array]:
    """The mean output of a site's block for each label."""
    return {label: label_mean(seen.outputs[row.block], label, "outputs") for label in ("positive", "negative")}


def weight_of_row(model: Any, row: Any) -> Array:
    """[d, n · width]"""
    weight = array(getattr(model.get_submodule(row.module), row.parameter))
    if row.expert is not None:
        weight = weight[row.expert]
    return weight.T if row.transposed else weight


def read_row(model: Any, seen: Seen, row: Any, rho: float | None, alpha: float) -> Reading:
    """What the paper says of one site, with the block's v; an expert that one label never reached has the other's
    mean.
    """
    inputs, outputs = mean_inputs(seen, row), mean_outputs(seen, row)
    labels = [l for l in inputs if row.expert is None or reached(seen.routed[row.key], l)]
    mu = mean([inputs[label] for label in labels])
    return edit_of(outputs["positive"] - outputs["negative"], mu, weight_of_row(model, row), row.n, rho, alpha)
