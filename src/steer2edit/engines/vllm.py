"""An engine that makes text with vLLM, in a worker process that has its own environment.

vLLM pins its own transformers, so the two do not share an environment; only token ids and files pass between them.
Edits run as LoRA adapters, many of them in one batch. Steering runs as hooks in vLLM's model, one steering strength
after the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Steer2EditError
from ..method.intervention import Intervention, Term
from ..models.architectures import Architecture, architecture_of, describe_as
from ..models.hooks import Interventions
from ..models.load import empty_model, load_config, local_folder
from ..models.sites import find_sites
from ..probing.chat import CHAT, Chat
from .answers import answer_of
from .base import GREEDY, Answer, Engine, Losses, Progress, Request, Sampling
from .transformers import stop_ids

_WORKER = Path(__file__).with_name("vllm_worker.py")

# Log-probabilities of the base model that the worker holds at once while scoring: 16 M numbers, 64 MB in fp32.
_HELD = 16_000_000

# What the engine sets itself, since its results depend on it.
_OURS = {
    "model", "worker_extension_cls", "enforce_eager", "skip_tokenizer_init", "generation_config", "disable_log_stats",
    "enable_lora", "max_lora_rank", "max_cpu_loras", "lora_target_modules", "max_num_seqs",
}  # fmt: skip


@dataclass(frozen=True)
class _Ready:
    """An intervention as the worker takes it: [name, number, folder] of an adapter, and a file of vectors."""

    adapter: tuple[str, int, str] | None = None
    vectors: str | None = None


class VllmEngine(Engine):
    """Makes and scores text with a model in a vLLM worker process.

    A context manager; the worker ends with it or with this process.

    Every row of a batch carries its own edit. Rows that steer run apart, one batch for each steering vector, since
    hooks act on the whole of vLLM's batch. A count checks that the hooks acted in every forward pass.

    Args:
        model_folder: a checkpoint of `safetensors` (a folder, a Hub id, or EMBEDDED).
        python: the interpreter of an environment with vLLM.
        rows: how many requests vLLM decodes at once (its `max_num_seqs`).
        chat: how messages become text, and the strings that end an answer.
        dtype: "auto", "float32", "bfloat16" or "float16", with vLLM's meaning.
        max_model_len: the longest prompt with its answer; by default what the model can read, at most 4096.
        max_rank: the highest rank of an intervention; only combined edits have more than 1.
        max_loras: how many different edits one forward pass may have; 0 switches adapters off.
        boot_seconds: how long vLLM may take to load the model.
        options: further fields of vLLM's EngineArgs, as they are named there. On a CPU its cache has 1 GiB unless
            VLLM_CPU_KVCACHE_SPACE says otherwise.

    Raises:
        ModelError: there is no such model, or its family is not supported.
        Steer2EditError: the worker does not start; an option is one that the engine sets.
    """

    rows_on_stream = False

    def __init__(
        self,
        model_folder: str | Path,
        tokenizer: Any,
        *,
        python: str | Path,
        rows: int = 64,
        chat: Chat = CHAT,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_rank: int = 1,
        max_loras: int = 8,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        trust_remote_code: bool = False,
        architecture: Architecture | None = None,
        boot_seconds: float = 900,
        **options: Any,
    ):
        if taken := sorted(_OURS & options.keys()):
            raise Steer2EditError("the engine sets an option itself", got=", ".join(taken), fix="Leave it out.")
        self.tokenizer, self.slots, self.chat, self.max_rank = tokenizer, rows, chat, max_rank
        folder = local_folder(str(model_folder))
        config = load_config(folder, trust_remote_code=trust_remote_code)
        self._model: Any = empty_model(config, trust_remote_code=trust_remote_code)
        if architecture is not None:
            describe_as(self._model, architecture)
        self.config = config.get_text_config()
        self.stops = stop_ids(_with_generation_config(self._model, folder), tokenizer)
        sites = find_sites(self._model)
        self._sites = {site.key: site for site in sites}
        self._blocks = {site.block_key: site.block_module for site in sites}
        modules = [site.module for site in sites if site.expert is None]
        limit = getattr(self.config, "max_position_embeddings", None) or 4096
        self.max_model_len = min(limit, max_model_len or 4096)
        self._ready: dict[str, _Ready] = {}
        self._process = _Process(python)
        adapters: dict[str, Any] = {}
        if max_loras:
            adapters = {
                "enable_lora": True,
                "max_loras": max_loras + 1,  # one of them for the base model
                "max_cpu_loras": max(max_loras + 1, 64),
                "max_lora_rank": 1 if max_rank == 1 else max(8, 1 << (max_rank - 1).bit_length()),  # a rank vLLM has
                "lora_target_modules": sorted({name.rsplit(".", 1)[-1] for name in modules}),
            }
        own = {
            "model": str(folder),
            "dtype": dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": rows,
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
            "trust_remote_code": trust_remote_code,
        }
        started = self._process.ask("start", seconds=boot_seconds, options=own | adapters | options, modules=modules)
        self.version: str = started["vllm"]
        self._adaptable = set(started["adaptable"])

    def generate(
        self,
        requests: Sequence[Request],
        table: Sequence[Intervention],
        max_new_tokens: int,
        progress: Progress | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Answers in the order of the requests. vLLM draws by each request's seed, but draws other tokens than ours.

        A stop string cuts the text afterwards: the worker has no tokenizer and goes on to the end of the turn.

        Args:
            requests: prompts of at least one token, each with its row of `table`.
            max_new_tokens: the most tokens of an answer.
            stop: strings that end an answer in place of `chat.stop`.

        Raises:
            ModelError: an intervention does not fit the model.
            Steer2EditError: an intervention that vLLM cannot run, a prompt too long for it, or a worker that died.
        """
        if max_new_tokens < 1:
            raise Steer2EditError("no token was asked for", got=max_new_tokens, fix="Ask for at least one new token.")
        if not requests:
            return []
        self._check_length(max(len(r.ids) for r in requests) + max_new_tokens)
        ready = {row: self._prepared(table[row]) for row in {r.row for r in requests}}
        groups: dict[str | None, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(ready[request.row].vectors, []).append(i)
        drawn: dict[str, Any] = {}
        if sampling.temperature > 0:
            drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p}
            if sampling.top_k:
                drawn["top_k"] = sampling.top_k
        ends = self.chat.stop if stop is None else stop
        answers: dict[int, Answer] = {}
        for vectors, members in groups.items():
            adapters = [ready[requests[i].row].adapter for i in members]
            if any(adapters):
                # On a CPU vLLM gives rows without an adapter the last one's (vllm-project/vllm#48421).
                adapters = [adapter or self._no_change() for adapter in adapters]
            reply = self._process.ask(
                "generate",
                progress=_after(progress, len(answers), len(requests)),
                requests=[[requests[i].ids, adapter] for i, adapter in zip(members, adapters, strict=True)],
                new=max_new_tokens,
                stops=sorted(self.stops),
                vectors=vectors,
                sampling=drawn,
                seeds=[requests[i].seed for i in members] if drawn else [],
            )
            # Every token takes a forward pass: the first one that of the prompt, each other one its own.
            needed = max(len(ids) for ids in reply["ids"])
            if vectors is not None and reply["steps"] < needed:
                raise RuntimeError(f"steering acted in {reply['steps']} forward passes, of at least {needed}")
            for i, ids in zip(members, reply["ids"], strict=True):
                end = next((at for at, token in enumerate(ids) if token in self.stops), len(ids))
                answers[i] = answer_of(self.tokenizer, requests[i], ids[:end], end < len(ids), ends)
        if progress:
            progress(len(requests), len(requests))
        return [answers[i] for i in range(len(requests))]

    def losses(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        table: Sequence[Intervention],
        progress: Progress | None = None,
    ) -> Losses:
        """KL and NLL per token of given answers under each intervention, fp32.

        The distributions stay in the worker; each answer is run alone under each intervention, not in a batch.

        Args:
            pairs: prompt ids and answer ids, neither empty.

        Raises:
            As `generate`.
        """
        kl, nll = torch.zeros(len(pairs), 1 + len(table)), torch.zeros(len(pairs), 1 + len(table))
        greedy = torch.zeros(len(pairs), 1 + len(table), dtype=torch.bool)
        if not pairs:
            return Losses(kl[:, 1:], nll[:, 1:], nll[:, 0], greedy[:, 1:], greedy[:, 0])
        longest = max(len(answer) for _, answer in pairs)
        self._check_length(max(len(prompt) + len(answer) for prompt, answer in pairs))
        ready = [self._prepared(intervention) for intervention in table]
        rows = [{"adapter": one.adapter, "vectors": one.vectors} for one in ready]
        at_once = max(1, _HELD // (self.config.vocab_size * longest))
        for first in range(0, len(pairs), at_once):
            some = pairs[first : first + at_once]
            whole = (1 + len(table)) * len(pairs)
            later = _after(progress, first * (1 + len(table)), whole)
            reply = self._process.ask("score", progress=later, pairs=some, rows=rows)
            kl[first : first + len(some)] = torch.tensor(reply["kl"])
            nll[first : first + len(some)] = torch.tensor(reply["nll"])
            greedy[first : first + len(some)] = torch.tensor(reply["greedy"]) > 0
        return Losses(kl[:, 1:], nll[:, 1:], nll[:, 0], greedy[:, 1:], greedy[:, 0])

    @property
    def context(self) -> int:
        return self.max_model_len - 1  # vLLM always writes a token after what it scores

    def close(self) -> None:
        """Ends the worker and removes its files."""
        self._process.close()

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_length(self, tokens: int) -> None:
        if tokens > self.max_model_len:
            raise Steer2EditError(
                "a prompt and its answer are longer than the engine was started for",
                got=f"{tokens} tokens, at most {self.max_model_len}",
                fix="Shorten the prompt, ask for fewer new tokens, or set max_model_len.",
            )

    def _prepared(self, intervention: Intervention) -> _Ready:
        """The intervention's adapter and vectors as files, written once for the same contents."""
        mark = _digest(intervention)
        if mark not in self._ready:
            Interventions(self._model, [intervention])  # refuses unknown sites and other sizes
            adapter = {key: term for key, term in intervention.terms.items() if term.a is not None}
            vectors = {self._block_module(key): t.b for key, t in intervention.terms.items() if t.b is not None}
            self._ready[mark] = _Ready(
                self._adapter(mark, intervention.name, adapter) if adapter else None,
                self._vectors(mark, vectors) if vectors else None,
            )
        return self._ready[mark]

    def _block_module(self, key: str) -> str:
        site = self._sites.get(key)
        layer, _, place = key.partition(".")
        if place == "residual":
            return f"{architecture_of(self._model).layers}.{layer}"
        if site is None:
            return self._blocks[key]
        if site.expert is not None:
            raise Steer2EditError(
                "vLLM cannot steer at one expert", got=key, fix="Steer at its block, or use the transformers engine."
            )
        return site.module

    def _adapter(self, mark: str, name: str, terms: Mapping[str, Term]) -> tuple[str, int, str]:
        if streams := [key for key in terms if key not in self._sites]:
            raise Steer2EditError(
                f"vLLM cannot take {name} as an adapter: it acts on the residual stream",
                got=", ".join(streams[:4]),
                fix="Use the transformers engine.",
            )
        if experts := [key for key in terms if self._sites[key].expert is not None]:
            raise Steer2EditError(
                f"vLLM cannot take {name} as an adapter: it edits experts",
                got=", ".join(experts[:4]),
                fix="Export a checkpoint (export_checkpoint) and start the engine on that.",
            )
        if missing := [key for key in terms if self._sites[key].module not in self._adaptable]:
            raise Steer2EditError(
                f"vLLM puts no adapter where {name} edits",
                got=", ".join(missing[:4]),
                fix="Export a checkpoint and start the engine on that; with max_loras=0 adapters are off.",
            )
        by_module = {self._sites[key].module: term for key, term in terms.items()}
        rank = max(term.a.shape[0] for term in by_module.values() if term.a is not None)
        if rank > self.max_rank:
            raise Steer2EditError(
                f"{name} has a higher rank than the engine was started for",
                got=f"{rank}, at most {self.max_rank}",
                fix=f"Start it with max_rank={rank}.",
            )
        folder = self._process.folder / mark
        _write_adapter(folder, by_module, rank)
        return mark, 1 + len(self._ready), str(folder)

    def _no_change(self) -> tuple[str, int, str]:
        """An adapter of zeros, for the base model in a batch with edits."""
        site = next(site for site in self._sites.values() if site.module in self._adaptable)
        zeros = Term(torch.zeros(site.d, 1), torch.zeros(1, site.inputs))
        ready = self._prepared(Intervention("no change", {site.key: zeros}))
        assert ready.adapter is not None
        return ready.adapter

    def _vectors(self, mark: str, vectors: Mapping[str, Tensor]) -> str:
        from safetensors.torch import save_file

        path = self._process.folder / f"{mark}.safetensors"
        save_file({name: b.float().contiguous() for name, b in vectors.items()}, str(path))
        return str(path)


def _write_adapter(folder: Path, terms: Mapping[str, Term], rank: int) -> None:
    """Writes a PEFT adapter in fp32 with scaling 1. Unlike `save_adapter` it knows no edit, only the sites' terms.

    Args:
        terms: module → u [d, r] and a [r, n·c], filled up with zeros to `rank`.
    """
    from safetensors.torch import save_file

    tensors = {}
    for module, term in terms.items():
        assert term.u is not None
        assert term.a is not None
        short = rank - term.a.shape[0]
        a = torch.nn.functional.pad(term.a.float(), (0, 0, 0, short))  # [rank, n·c]
        u = torch.nn.functional.pad(term.u.float(), (0, short))  # [d, rank]
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = u.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "target_modules": sorted(terms),
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _digest(intervention: Intervention) -> str:
    """A hash of what an intervention does, whatever its name."""
    digest = hashlib.sha256()
    for key in sorted(intervention.terms):
        term = intervention.terms[key]
        for name, tensor in (("u", term.u), ("a", term.a), ("b", term.b)):
            if tensor is not None:
                digest.update(f"{key} {name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]


def _with_generation_config(model: Any, folder: Path) -> Any:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model


def _after(progress: Progress | None, start: int, of: int) -> Progress | None:
    """The progress of a part that begins after `start` of `of` steps."""
    return None if progress is None else lambda done, _: progress(start + done, of)


class _Process:
    """A worker process, its folder, and the exchange of lines with it.

    Attributes:
        folder: temporary; holds the worker's own file, its adapters and vectors, and its log.
    """

    def __init__(self, python: str | Path):
        python = os.path.abspath(shutil.which(python) or python)  # it is started in another folder
        self.folder = Path(tempfile.mkdtemp(prefix="steer2edit-vllm-"))
        self.log = self.folder / "log.txt"
        shutil.copy(_WORKER, self.folder / "vllm_worker.py")
        # vLLM's processes find the worker's module by PYTHONPATH; our own value must not lead them to our packages.
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "VIRTUAL_ENV")}
        env |= {"PYTHONPATH": str(self.folder), "VLLM_NO_USAGE_STATS": "1"}
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | env
        try:
            with open(self.log, "wb") as log:
                self._process = subprocess.Popen(
                    [python, str(self.folder / "vllm_worker.py")],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=env,
                    cwd=self.folder,
                    encoding="utf-8",
                    start_new_session=True,  # so that its child processes can be ended with it
                )
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise Steer2EditError(
                "the vLLM worker cannot be started", got=error, fix="Give the python of an environment with vLLM."
            ) from None
        self.close = weakref.finalize(self, _end, self._process, self.folder)

    def ask(
        self, command: str, *, seconds: float | None = None, progress: Progress | None = None, **what: Any
    ) -> dict[str, Any]:
        """The worker's answer to a command.

        Raises:
            Steer2EditError: the worker reports an error, died, or did not answer in `seconds`.
        """
        if not self.close.alive:
            raise Steer2EditError("the vLLM engine is closed", got=command, fix="Start another one.")
        timer = threading.Timer(seconds, _kill, [self._process]) if seconds else None
        if timer:
            timer.start()
        try:
            answer = self._exchange({"command": command, **what}, progress)
        except BaseException:  # interrupted: a late answer would be taken for the next command's
            self.close()
            raise
        finally:
            if timer:
                timer.cancel()
        if "done" in answer:
            return answer["done"]
        last = self._last_lines()
        if command == "start" or not answer:
            self.close()
        if answer:
            raise Steer2EditError(f"vLLM cannot {command}", got=answer["error"], fix=f"Its last lines:\n{last}")
        raise Steer2EditError(
            f"the vLLM worker ended at {command}",
            got=f"exit code {self._process.poll()}",
            fix=f"Exit code -9 means that it lacked memory, or time to start. Its last lines:\n{last}",
        )

    def _exchange(self, command: Mapping[str, Any], progress: Progress | None) -> dict[str, Any]:
        """The worker's last line to a command; empty if it died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then its stdout has ended, too
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            answer = json.loads(line)
            if "progress" not in answer:
                return answer
            if progress:
                progress(*answer["progress"])
        self._process.wait()
        return {}

    def _last_lines(self, count: int = 12) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(line for line in lines[-count:] if line.strip()) or "(none)"


def _kill(process: subprocess.Popen[str]) -> None:
    """Ends a worker and its child processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[str], folder: Path) -> None:
    _kill(process)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    shutil.rmtree(folder, ignore_errors=True)
