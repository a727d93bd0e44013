"""What further configurations cost: scoring plus λ for 125 of them against scoring plus λ for one.

Run: python benchmarks/scoring.py
"""

from __future__ import annotations

import itertools

import steer2edit as s2e
from timing import ratio
from workload import base_model, traces

GRID = list(itertools.product((0.1, 0.3, 0.5, 0.7, 0.9), repeat=3))


def main() -> None:
    model, tokenizer = base_model()
    probe = s2e.collect(model, tokenizer, traces(tokenizer, 8))

    def configurations(count: int) -> list[s2e.Edit]:
        scores = s2e.score(model, probe)
        return [scores.edit(rho_attn=a, rho_mlp=m, alpha=alpha) for a, m, alpha in GRID[:count]]

    label = "scoring plus λ for 125 configurations / for one"
    ratio(lambda: configurations(125), lambda: configurations(1), 15, ("<=", 1.2), label)


if __name__ == "__main__":
    main()
