"""What runs in vLLM's own environment: a process that makes and scores text on command, a JSON line at a time.

It is copied to a folder of its own before it is run, since the modules beside it are named like the packages that it
imports, and it imports nothing of steer2edit. Lines that come in are commands; lines that go out hold `progress`,
`error`, or what was asked for.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any


class Extension:
    """Methods that vLLM gives to each of its workers, where the model is: steering by hooks, and losses.

    Their arguments are file names and plain numbers, so that nothing has to be pickled.
    """

    def s2e_adaptable(self: Any, names: list[str]) -> list[str]:
        """Those of the modules that an adapter changes here; a pipeline's other stages have others."""
        return [name for name in names if hasattr(_module(self.get_model(), name), "lora_a_stacked")]

    def s2e_steer(self: Any, path: str) -> list[str]:
        """out += b at every module that the file names and that is here, until `s2e_release`.

        Args:
            path: a safetensors file, module → b [d].

        Returns:
            The names that were found here.
        """
        from safetensors.torch import load_file

        self.s2e_release()
        self._s2e_steps = {}
        found = []
        for name, b in load_file(path).items():
            module = _module(self.get_model(), name)
            if module is None:
                continue
            # A map whose partial sums are added up elsewhere must gain b once, not once a rank.
            layer = getattr(module, "base_layer", module)
            partial = getattr(layer, "tp_size", 1) > 1 and not getattr(layer, "reduce_results", True)
            if not (partial and layer.tp_rank > 0):
                self._s2e_steps[name] = 0
                self._s2e_hooks.append(module.register_forward_hook(_adding(b, self._s2e_steps, name)))
            found.append(name)
        return found

    def s2e_release(self: Any) -> int | None:
        """Takes the hooks off; says in how many forward passes all of them acted, None if there were none."""
        for hook in getattr(self, "_s2e_hooks", []):
            hook.remove()
        self._s2e_hooks = list[Any]()
        return min(getattr(self, "_s2e_steps", {}).values(), default=None)

    def s2e_watch(self: Any, first: int, count: int) -> None:
        """Keeps the last hidden states at positions [first, first + count) of the one request that comes next."""
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
            # A long prompt comes in parts, and a part may be padded: what counts goes on where the last one stopped.
            wanted = torch.arange(seen, seen + len(positions), device=positions.device)
            new = (positions == wanted) & (wanted < first + count)
            kept.append(hidden[new & (wanted >= first)].clone())
            seen += int(new.sum())

        self._s2e_kept = kept
        self._s2e_watching = self.get_model().register_forward_hook(hook, with_kwargs=True)

    def s2e_score(self: Any, pair: int, answer: list[int], base: bool) -> list[float] | None:
        """KL and NLL per token of the answer at the watched positions.

        Args:
            base: keep this pair's log-probabilities, for the rows that come later to be compared with.

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
        return [float(kl), float(nll)]


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
    """The commands, each a method that takes what its line held and gives what its answer holds."""

    def __init__(self, say: Any):
        self.say = say
        self.engine: Any = None
        self.number = 0

    def start(self, options: dict[str, Any], modules: list[str]) -> dict[str, Any]:
        """Loads the model; which of its modules an adapter can change."""
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
        found = {name for some in self.engine.collective_rpc("s2e_adaptable", args=(modules,)) for name in some}
        return {"vllm": vllm.__version__, "adaptable": sorted(found)}

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

        # The only ends are those that were given, as everywhere in steer2edit.
        fixed = {"max_tokens": new, "stop_token_ids": stops, "ignore_eos": True, "detokenize": False}
        if sampling:
            params = [SamplingParams(**fixed, **sampling, seed=seed) for seed in seeds or []]
        else:
            params = [SamplingParams(**fixed, temperature=0.0) for _ in requests]
        ids, steps = self._steered(vectors, lambda: self._run(requests, params, vectors, self._progress))
        return {"ids": ids, "steps": steps}

    def score(self, pairs: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        """KL and NLL of every pair of prompt and answer under every row, [pairs][1 + rows]; the base model is first.

        One request at a time, so that it is known whose the positions are that come by.
        """
        kl: list[list[float]] = [[] for _ in pairs]
        nll: list[list[float]] = [[] for _ in pairs]
        rows = [{"adapter": None, "vectors": None}, *rows]
        for number, row in enumerate(rows):

            def of_row(number: int = number, row: dict[str, Any] = row) -> None:
                for i, (prompt, answer) in enumerate(pairs):
                    one = self._score(i, prompt, answer, row, number == 0)
                    kl[i].append(one[0])
                    nll[i].append(one[1])
                    self._progress(number * len(pairs) + i + 1, len(rows) * len(pairs))

            self._steered(row["vectors"], of_row)
        return {"kl": kl, "nll": nll}

    def _score(self, i: int, prompt: list[int], answer: list[int], row: dict[str, Any], base: bool) -> list[float]:
        from vllm import SamplingParams

        # Every position must be run, so that none may come out of the cache.
        params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, skip_reading_prefix_cache=True)
        self.engine.collective_rpc("s2e_watch", args=(len(prompt) - 1, len(answer)))
        self._run([[[*prompt, *answer[:-1]], row["adapter"]]], [params], row["vectors"])
        scored = self.engine.collective_rpc("s2e_score", args=(i, answer, base))
        return next(one for one in scored if one is not None)

    def _steered(self, vectors: str | None, run: Any) -> tuple[Any, int]:
        """What `run` gives, and in how many forward passes every hook acted."""
        if vectors is None:
            return run(), 0
        from safetensors import safe_open

        try:
            found = {name for some in self.engine.collective_rpc("s2e_steer", args=(vectors,)) for name in some}
            with safe_open(vectors, framework="pt") as file:
                if strangers := sorted(set(file.keys()) - found):
                    raise ValueError(f"vLLM's model has no module {', '.join(strangers[:4])} to steer at")
            result = run()
        finally:
            steps = [count for count in self.engine.collective_rpc("s2e_release") if count is not None]
        return result, min(steps, default=0)

    def _run(self, requests: list[Any], params: list[Any], salt: str | None, progress: Any = None) -> list[list[int]]:
        """Token ids of each request, which runs by its own params."""
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        names = {}
        try:
            for i, ((ids, adapter), own) in enumerate(zip(requests, params, strict=True)):
                self.number += 1
                # Keys and values depend on the steering, so that a cache must not mix them up; adapters it knows.
                prompt = {"prompt_token_ids": ids} | ({"cache_salt": salt} if salt else {})
                lora = None if adapter is None else LoRARequest(adapter[0], adapter[1], adapter[2])
                name = str(self.number)
                self.engine.add_request(name, prompt, own, lora_request=lora)
                names[name] = i
            made: list[list[int]] = [[] for _ in requests]
            done, reported = 0, time.monotonic()
            while self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    if output.finished:
                        made[names[output.request_id]] = list(output.outputs[0].token_ids)
                        done += 1
                if progress and time.monotonic() - reported > 0.3:
                    reported = time.monotonic()
                    progress(done, len(requests))
            return made
        except BaseException:
            self.engine.abort_request(list(names))
            raise

    def _progress(self, done: int, of: int) -> None:
        self.say({"progress": [done, of]})


def main() -> None:
    # vLLM prints, and so do the processes that it starts: what it prints goes to the log, answers where stdout went.
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
