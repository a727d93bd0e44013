"""What a probe costs: against the plain forward passes over the same batches, and against one response at a time.

Run: python benchmarks/probe.py
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import torch

import steer2edit as s2e
from steer2edit.method.preserve import PARTS
from steer2edit.models.sites import module_of
from steer2edit.probing.collect import batches_by_length
from steer2edit.probing.spans import response_span
from timing import ratio, report
from workload import base_model, traces


def main() -> None:
    model, tokenizer = base_model()
    some = traces(tokenizer, 24)
    spans = [response_span(tokenizer, t)[0] for t in some]
    spans = [s for s in spans if s is not None]
    sites = s2e.find_sites(model)

    @torch.inference_mode()
    def plain() -> None:
        for batch in batches_by_length([len(s.ids) for s in spans], 1024):
            width = max(len(spans[i].ids) for i in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            for row, i in enumerate(batch):
                ids[row, : len(spans[i].ids)] = torch.tensor(spans[i].ids)
            model.base_model(input_ids=ids, use_cache=False)

    @torch.inference_mode()
    def one_at_a_time() -> None:
        kept: dict[str, list[torch.Tensor]] = {}

        def keep(key: str):
            def hook(module, args, output) -> None:
                kept.setdefault(f"{key}.input", []).append(args[0][0].clone())
                kept.setdefault(f"{key}.output", []).append(output[0].clone())

            return hook

        handles = [module_of(model, site).register_forward_hook(keep(site.key)) for site in sites]
        for span in spans:
            model(torch.tensor([span.ids]), use_cache=False)
        for handle in handles:
            handle.remove()
        for parts in kept.values():
            means = [x[s.first : s.last].double().mean(dim=0) for x, s in zip(parts, spans, strict=True)]
            torch.stack(means).mean(dim=0)

    def probe() -> None:
        s2e.collect(model, tokenizer, some)

    groups = sorted({trace.group for trace in some if trace.label == "negative"})

    def probe_with_evidence() -> None:
        s2e.collect(model, tokenizer, some, preserve=groups)

    print(f"{len(spans)} responses, {sum(len(s.ids) for s in spans)} tokens, {len(sites)} sites")
    ratio(probe, plain, 7, ("<=", 1.10), "probe / plain forward passes without the head")
    ratio(one_at_a_time, probe, 3, (">=", 1.7), "batch-of-one passes that keep every activation / probe")
    ratio(probe_with_evidence, probe, 7, ("<=", 1.15), "probe that keeps evidence / probe")
    size = 240 * len(PARTS) * (4096 + 4) * 32 / 1e6
    report(
        "evidence of 240 responses of a 7B model's shapes, MB", size, ("<=", 100), "bytes and scales, 32 layers of 4096"
    )
    extra = {length: _extra_memory(length) for length in (512, 2048)}
    note = ", ".join(f"{length} tokens: {mb:.0f} MB" for length, mb in extra.items())
    report("probe's extra memory at 2048 tokens less that at 512, MB", extra[2048] - extra[512], ("<=", 25), note)


def _extra_memory(length: int) -> float:
    """Peak resident MB of a probe over one response of `length` tokens, less that of the plain pass."""
    peaks = {}
    for what in ("plain", "probe"):
        runs = []
        for _ in range(2):
            # A fixed threshold makes the allocator give large tensors back at once: the peak is what was in use.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
            command = [sys.executable, __file__, what, str(length)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            runs.append(float(done.stdout.split()[-1]))
        peaks[what] = min(runs)
    return peaks["probe"] - peaks["plain"]


def _peak(what: str, length: int) -> None:
    model, tokenizer = base_model()
    text = " word" * length
    trace = s2e.Trace("Say it.", text, "positive")
    with torch.inference_mode():
        if what == "plain":
            span, _ = response_span(tokenizer, trace, max_tokens=length)
            assert span is not None
            for _ in range(2):
                model.base_model(input_ids=torch.tensor([span.ids]), use_cache=False)
        else:
            s2e.collect(model, tokenizer, [trace], [s2e.Trace("Say it.", text, "negative")], max_tokens=length)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        _peak(sys.argv[1], int(sys.argv[2]))
    else:
        main()
