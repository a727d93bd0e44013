"""An engine that asks a server: vLLM's, or another with OpenAI's completions that takes token ids as a prompt."""

from __future__ import annotations

import http.client
import json
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import Steer2EditError
from ..method.intervention import Intervention
from ..probing.chat import CHAT, Chat
from .answers import answer_of
from .base import GREEDY, Answer, Engine, Losses, Progress, Request, Sampling


class ServerEngine(Engine):
    """Makes text with a server. It can only generate, and only under adapters that the server holds: no steering, no
    losses.

    Args:
        base_url: the URL up to and including `/v1`.
        model: the served name of the base model.
        adapters: an intervention's name → the served name of its adapter.
        stops: tokens that end a turn, in addition to the tokenizer's and those that the server knows.
        rows: how many requests are sent at once.
        seconds: how long an answer may take.
        key: the server's bearer token.
    """

    def __init__(
        self,
        base_url: str,
        tokenizer: Any,
        *,
        model: str,
        adapters: Mapping[str, str] | None = None,
        chat: Chat = CHAT,
        rows: int = 64,
        stops: Sequence[int] = (),
        seconds: float = 600,
        key: str | None = None,
    ):
        self.base_url, self.tokenizer, self.model, self.chat = base_url.rstrip("/"), tokenizer, model, chat
        self.adapters = dict(adapters or {})
        self.slots, self.seconds = rows, seconds
        self.stops = {*stops, tokenizer.eos_token_id} - {None}
        self._key = key

    def load_adapter(self, intervention: str, folder: str | Path, name: str | None = None) -> None:
        """Has the server load an adapter that `save_adapter` wrote, for the interventions of that name.

        Args:
            folder: its path on the server.
            name: the served name; the intervention's by default.

        Raises:
            Steer2EditError: the server cannot load it, or is not allowed to.
        """
        name = name or intervention
        try:
            self._post("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except Steer2EditError as error:
            raise Steer2EditError(
                "the server does not load the adapter",
                got=error.got,
                fix="Start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, or with --lora-modules.",
            ) from None
        self.adapters[intervention] = name

    def generate(
        self,
        requests: Sequence[Request],
        table: Sequence[Intervention],
        max_new_tokens: int,
        progress: Progress | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Like `VllmEngine.generate`. If the server gives no token ids, its text is encoded, which may give other ids.

        Raises:
            Steer2EditError: an intervention steers or has no adapter on the server, or the server does not answer.
        """
        if max_new_tokens < 1:
            raise Steer2EditError("no token was asked for", got=max_new_tokens, fix="Ask for at least one new token.")
        ends = self.chat.stop if stop is None else tuple(stop)
        served = {row: self._served(table[row]) for row in {r.row for r in requests}}
        # On a CPU vLLM gives rows without an adapter the last one's (vllm-project/vllm#48421), so they are sent apart.
        plain = [i for i, request in enumerate(requests) if served[request.row] == self.model]
        edited = sorted(set(range(len(requests))) - set(plain))
        answers: dict[int, Answer] = {}
        for members in (plain, edited):
            with ThreadPoolExecutor(self.slots) as threads:
                ask = {
                    i: threads.submit(
                        self._complete, requests[i], served[requests[i].row], max_new_tokens, sampling, ends
                    )
                    for i in members
                }
                try:
                    for i, one in ask.items():
                        answers[i] = one.result()
                        if progress:
                            progress(len(answers), len(requests))
                except BaseException:
                    threads.shutdown(wait=False, cancel_futures=True)
                    raise
        return [answers[i] for i in range(len(requests))]

    def losses(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        table: Sequence[Intervention],
        progress: Progress | None = None,
    ) -> Losses:
        """Raises Steer2EditError: a server does not give them."""
        raise Steer2EditError(
            "a server gives no distributions to compute losses from",
            got=self.base_url,
            fix="Use the transformers engine, or the vLLM engine with its own worker.",
        )

    def _served(self, intervention: Intervention) -> str:
        if not intervention.terms:
            return self.model
        if any(term.b is not None for term in intervention.terms.values()):
            raise Steer2EditError(
                "a server cannot steer",
                got=intervention.name,
                fix="Use the transformers engine, or the vLLM engine with its own worker.",
            )
        if intervention.name not in self.adapters:
            raise Steer2EditError(
                "the server holds no adapter for an intervention",
                got=intervention.name,
                fix="Name it in `adapters`, or call load_adapter with a folder that save_adapter wrote.",
            )
        return self.adapters[intervention.name]

    def _complete(self, request: Request, model: str, new: int, sampling: Sampling, stop: Sequence[str]) -> Answer:
        asked: dict[str, Any] = {
            "model": model,
            "prompt": list(request.ids),
            "max_tokens": new,
            "temperature": sampling.temperature,
            "repetition_penalty": 1.0,  # the server may have other defaults
            "stop_token_ids": sorted(self.stops),
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        if sampling.temperature > 0:
            # What is left out vLLM takes from the model's generation_config.json: all tokens are -1 there.
            asked |= {"top_p": sampling.top_p, "top_k": sampling.top_k or -1, "min_p": 0.0, "seed": request.seed}
        if stop:
            asked["stop"] = list(stop)
        reply = self._post("/completions", asked)
        try:
            choice = reply["choices"][0]
            text, ended, ids = choice["text"], choice["finish_reason"] == "stop", choice.get("token_ids")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Steer2EditError(
                "the server's answer is no completion", got=str(reply)[:200], fix="Give a URL that ends in /v1."
            ) from None
        if ids is None:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = self.stops | set(self.tokenizer.all_special_ids)
        if ended and ids and ids[-1] in ends:
            ids = ids[:-1]
        return answer_of(self.tokenizer, request, ids, ended, stop)

    def _post(self, path: str, what: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        url = self.base_url + path
        asked = urllib.request.Request(url, json.dumps(what).encode(), headers)
        try:
            with urllib.request.urlopen(asked, timeout=self.seconds) as reply:
                body = reply.read().decode("utf-8")
        except urllib.error.HTTPError as error:
            reason = error.read().decode("utf-8", "replace")[:300]
            raise Steer2EditError(
                f"the server refuses {url}", got=f"{error.code}: {reason}", fix="Check the model's name and the prompt."
            ) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise Steer2EditError(
                f"no answer from {url}", got=error, fix="Check that the server runs, or raise `seconds`."
            ) from None
        try:
            return json.loads(body)
        except ValueError:
            return body  # the answer to loading an adapter is a sentence
