"""What runs in vLLM's own environment: a process that makes and scores text on command, a JSON line at a time.

It is copied to a folder of its own before it runs, since the modules beside it have the names of packages that it
imports, and it imports nothing of steer2edit. Lines that come in are commands; lines that go out hold `progress`,
`error`, or, under `done`, the result.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any


class Extension:
    """Methods that vLLM adds to each of its workers, which hold the model: steering by hooks, and losses.

    Their arguments are file names and plain numbers, so that nothing has to be pickled.
    """

    def s2e_adaptable(self: Any, names: list[str]) -> list[str]:
        """Those of the modules that this worker holds and an adapter can change; other pipeline stages hold others."""
        return [name for name in names if hasattr(_module(self.get_model(), name), "lora_a_stacked")]

    def s2e_steer(self: Any, path: str) -> list[str]:
        """Adds b to the output of every module that the file names and this worker holds, until `s2e_release`.

        Args:
            path: a safetensors file, module → b [d].

        Returns:
            The names of these modules.
        """
        from safetensors.torch import load_file

        self.s2e_release()
        self._s2e_steps = {}
        steered = []
        for name, b in load_file(path).items():
            module = _module(self.get_model(), name)
            if module is None:
                continue
            # A map whose partial sums are added up elsewhere must get b once, not once per rank.
            layer = getattr(module, "base_layer", module)
            partial = getattr(layer, "tp_size", 1) > 1 and not getattr(layer, "reduce_results", True)
            if not (partial and layer.tp_rank > 0):
                self._s2e_steps[name] = 0
                self._s2e_hooks.append(module.register_forward_hook(_adding(b, self._s2e_steps, name)))
            steered.append(name)
        return steered

    def s2e_release(self: Any) -> int | None:
        """Removes the hooks. Returns in how many forward passes all of them acted, or None without hooks."""
        for hook in getattr(self, "_s2e_hooks", []):
            hook.remove()
        self._s2e_hooks = list[Any]()
        return min(getattr(self, "_s2e_steps", {}).values(), default=None)

    def s2e_watch(self: Any, first: int, count: int) -> None:
        """Keeps the last hidden states at positions [first, first + count) of the next request."""
        import torch

        kept: list[torch.Tensor] = []
        seen = 0

        def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            nonlocal seen
            hidden = output[0] if isinstance(output, tuple) else output
            if not isinstance(hidden, torch.Tensor):  # a pipeline's earlier stage
                return
            positions = kwargs["positions"]
            positions = positions[0] if positions.dim() > 1 else positions
            # A long prompt comes in parts, which may be padded: counting goes on where the last part stopped.
            wanted = torch.arange(seen, seen + len(positions), device=positions.device)
            new = (positions == wanted) & (wanted < first + count)
            kept.append(hidden[new & (wanted >= first)].clone())
            seen += int(new.sum())

        self._s2e_kept = kept
        self._s2e_watching = self.get_model().register_forward_hook(hook, with_kwargs=True)

    def s2e_score(self: Any, pair: int, answer: list[int], base: bool) -> list[float] | None:
        """KL and NLL per token of the answer at the watched positions, and 1 if each of its tokens is the likeliest.

        Args:
            base: keep this pair's log-probabilities, to compare later rows with.

        Returns:
            None on a worker that does not see the logits.
        """
        import torch

        self._s2e_watching.remove()
        if not self._s2e_kept:
            return None
        with torch.inference_mode():
            hidden = torch.cat(self._s2e_kept)  # [m, d]
            self._s2e_kept = []
            if len(hidden) != len(answer):
                raise RuntimeError(f"{len(hidden)} positions were seen, of {len(answer)}")
            logits = self.get_model().compute_logits(hidden)  # on all ranks, since they gather
            if logits is None:
                return None
            log_row = logits.float().log_softmax(dim=-1)  # [m, vocabulary]
            if base:
                if pair == 0:
                    self._s2e_base = {}
                self._s2e_base[pair] = log_row
            log_base = self._s2e_base[pair]
            kl = (log_base.exp() * (log_base - log_row)).sum(dim=-1).mean()
            wanted = torch.tensor(answer, device=log_row.device)
            nll = -log_row.gather(1, wanted[:, None]).mean()
            greedy = (log_row.argmax(dim=-1) == wanted).all()
        return [float(kl), float(nll), float(greedy)]


def _adding(b: Any, steps: dict[str, int], name: str) -> Any:
    placed = b

    def hook(module: Any, args: Any, output: Any) -> Any:
        nonlocal placed
        steps[name] += 1
        out = output[0] if isinstance(output, tuple) else output
        placed = placed.to(out.device, out.dtype)
        added = out + placed
        return (added, *output[1:]) if isinstance(output, tuple) else added

    return hook


def _module(model: Any, name: str) -> Any:
    """The module that transformers calls `name`, or None; vLLM renames those of some models."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None:
        mapper = mapper.get_rename_mapper() if hasattr(mapper, "get_rename_mapper") else mapper
        name = next(iter(mapper.apply_list([name])), name)
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return None if type(module).__name__ == "PPMissingLayer" else module


class Worker:
    """The commands. Each is a method that takes the values of its line and returns those of its answer."""

    def __init__(self, say: Any):
        self.say = say
        self.engine: Any = None
        self.number = 0

    def start(self, options: dict[str, Any], modules: list[str]) -> dict[str, Any]:
        """Loads the model. Returns vLLM's version and which of the modules an adapter can change."""
        import vllm  # type: ignore[import-not-found]
        from vllm import EngineArgs, LLMEngine

        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                **options,
                worker_extension_cls="vllm_worker.Extension",
                enforce_eager=True,  # a compiled model runs no hooks
                skip_tokenizer_init=True,
                generation_config="vllm",  # no penalties of the model's own
                disable_log_stats=True,
            )
        )
        adaptable = {name for some in self.engine.collective_rpc("s2e_adaptable", args=(modules,)) for name in some}
        return {"vllm": vllm.__version__, "adaptable": sorted(adaptable)}

    def generate(
        self,
        requests: list[Any],
        new: int,
        stops: list[int],
        vectors: str | None,
        sampling: dict[str, Any] | None = None,
        seeds: list[int] | None = None,
    ) -> dict[str, Any]:
        """Token ids of each request, greedy unless `sampling` has a temperature; request i then draws by `seeds[i]`."""
        from vllm import SamplingParams

        # Only the given tokens end an answer, as everywhere in steer2edit.
        fixed = {"max_tokens": new, "stop_token_ids": stops, "ignore_eos": True, "detokenize": False}
        if sampling:
            params = [SamplingParams(**fixed, **sampling, seed=seed) for seed in seeds or []]
        else:
            params = [SamplingParams(**fixed, temperature=0.0) for _ in requests]
        ids, steps = self._steered(vectors, lambda: self._run(requests, params, vectors, self._progress))
        return {"ids": ids, "steps": steps}

    def score(self, pairs: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        """KL, NLL and greediness of every pair of prompt and answer under every row, [pairs][1 + rows]; the base model
        is first.

        Requests run one at a time, so that it is known which request a position belongs to.
        """
        kl: list[list[float]] = [[] for _ in pairs]
        nll: list[list[float]] = [[] for _ in pairs]
        greedy: list[list[float]] = [[] for _ in pairs]
        rows = [{"adapter": None, "vectors": None}, *rows]
        for number, row in enumerate(rows):

            def of_row(number: int = number, row: dict[str, Any] = row) -> None:
                for i, (prompt, answer) in enumerate(pairs):
                    one = self._score(i, prompt, answer, row, number == 0)
                    kl[i].append(one[0])
                    nll[i].append(one[1])
                    greedy[i].append(one[2])
                    self._progress(number * len(pairs) + i + 1, len(rows) * len(pairs))

            self._steered(row["vectors"], of_row)
        return {"kl": kl, "nll": nll, "greedy": greedy}

    def _score(self, i: int, prompt: list[int], answer: list[int], row: dict[str, Any], base: bool) -> list[float]:
        from vllm import SamplingParams

        # Every position must be computed, so none may come from the cache.
        params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, skip_reading_prefix_cache=True)
        self.engine.collective_rpc("s2e_watch", args=(len(prompt) - 1, len(answer)))
        self._run([[[*prompt, *answer[:-1]], row["adapter"]]], [params], row["vectors"])
        scored = self.engine.collective_rpc("s2e_score", args=(i, answer, base))
        return next(one for one in scored if one is not None)

    def _steered(self, vectors: str | None, run: Any) -> tuple[Any, int]:
        """What `run` returns, and in how many forward passes every hook acted."""
        if vectors is None:
            return run(), 0
        from safetensors import safe_open

        try:
            steered = {name for some in self.engine.collective_rpc("s2e_steer", args=(vectors,)) for name in some}
            with safe_open(vectors, framework="pt") as file:
                if strangers := sorted(set(file.keys()) - steered):
                    raise ValueError(f"vLLM's model has no module {', '.join(strangers[:4])} to steer at")
            result = run()
        finally:
            steps = [count for count in self.engine.collective_rpc("s2e_release") if count is not None]
        return result, min(steps, default=0)

    def _run(self, requests: list[Any], params: list[Any], salt: str | None, progress: Any = None) -> list[list[int]]:
        """Token ids of each request, which runs with its own params."""
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        names = {}
        try:
            for i, ((ids, adapter), own) in enumerate(zip(requests, params, strict=True)):
                self.number += 1
                # Keys and values depend on the steering, so the cache must separate them; adapters it separates itself.
                prompt = {"prompt_token_ids": ids} | ({"cache_salt": salt} if salt else {})
                lora = None if adapter is None else LoRARequest(adapter[0], adapter[1], adapter[2])
                name = str(self.number)
                self.engine.add_request(name, prompt, own, lora_request=lora)
                names[name] = i
            answers: list[list[int]] = [[] for _ in requests]
            done, reported = 0, time.monotonic()
            while self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    if output.finished:
                        answers[names[output.request_id]] = list(output.outputs[0].token_ids)
                        done += 1
                if progress and time.monotonic() - reported > 0.3:
                    reported = time.monotonic()
                    progress(done, len(requests))
            return answers
        except BaseException:
            self.engine.abort_request(list(names))
            raise

    def _progress(self, done: int, of: int) -> None:
        self.say({"progress": [done, of]})


def main() -> None:
    # vLLM and its processes print to stdout. That goes to the log; answers go to what stdout was before.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(row: dict[str, Any]) -> None:
        channel.write(json.dumps(row) + "\n")
        channel.flush()

    worker = Worker(say)
    for line in sys.stdin:
        command = json.loads(line)
        what = command.pop("command")
        if what == "close":
            break
        try:
            say({"done": getattr(worker, what)(**command)})
        except Exception as error:
            traceback.print_exc()
            say({"error": f"{type(error).__name__}: {str(error).strip() or 'no message'}"})


if __name__ == "__main__":
    main()
