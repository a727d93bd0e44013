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


def keeping(seen: dict[tuple[int, str], tuple[Any, Any]], where: tuple[int, str]) -> Any:
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
    d, width = weight.shape[0], weight.shape[1] // n
    v = label_mean(responses, "positive", "outputs") - label_mean(responses, "negative", "outputs")
    mu = (label_mean(responses, "positive", "inputs") + label_mean(responses, "negative", "inputs")) / 2
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
