"""Our engines as a model of lm-eval, under every candidate at once.

lm-eval asks one model at a time. The first candidate's requests are run for all candidates in mixed batches and kept;
when lm-eval asks for the next candidate, the replies are there already.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from ..engines.base import Sampling
from .asking import WINDOWS, Asking, Group
from .bench import WINDOW
from .encoding import Ids, encode, fitting, pair, prefix_token, windows

# lm-eval's own default for the tokens of an answer.
_NEW_TOKENS = 256


class EngineLM(LM):
    """What lm-eval measures.

    Args:
        asking: the engine and the journal.
        group: the candidates that read the same prompts.
        name: of the task, for the journal.
        seed: of sampled answers.

    Attributes:
        at: the number, within the group, of the candidate whose replies lm-eval gets.
    """

    def __init__(self, asking: Asking, group: Group, name: str, seed: int = 0):
        super().__init__()
        self.asking, self.group, self.name, self.seed = asking, group, name, seed
        self.at = 0
        self._known: dict[str, list[Any]] = {}
        self._rounds = 0

    @property
    def tokenizer_name(self) -> str:
        return str(getattr(self.asking.engine.tokenizer, "name_or_path", ""))

    @property
    def max_length(self) -> int:
        return self.asking.engine.context or WINDOW

    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one."""
        tokenizer = self.asking.engine.tokenizer

        def run(new: Sequence[Any]) -> list[list[Any]]:
            def of(i: int) -> tuple[Ids, Ids]:
                return fitting(*pair(tokenizer, *new[i]), self.max_length)

            scored = self.asking.scored(self._round("loglikelihood"), self.group, [list(args) for args in new], of)
            flags = [one.greedy or (False,) * len(one.log_p) for one in scored]
            return [list(zip(one.log_p, greedy, strict=True)) for one, greedy in zip(scored, flags, strict=True)]

        return [
            (float(log_p), bool(greedy))
            for log_p, greedy in self._replies("loglikelihood", [request.args for request in requests], run)
        ]

    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        """Log-probability of each whole text, in windows of what the model reads at once, 2,048 tokens at most."""
        tokenizer = self.asking.engine.tokenizer
        longest = min(self.max_length, WINDOW)

        def run(new: Sequence[Any]) -> list[list[Any]]:
            first = prefix_token(tokenizer)
            flat = [
                (i, one) for i, (text,) in enumerate(new) for one in windows(encode(tokenizer, text), first, longest)
            ]
            name = self._round("rolling")
            scored = self.asking.scored(name, self.group, [one for _, one in flat], lambda i: flat[i][1], None, WINDOWS)
            sums = [[0.0] * len(self.group.candidates) for _ in new]
            for (i, _), one in zip(flat, scored, strict=True):
                sums[i] = [total + log_p for total, log_p in zip(sums[i], one.log_p, strict=True)]
            return sums

        return [float(total) for total in self._replies("rolling", [request.args for request in requests], run)]

    def generate_until(self, requests: Any) -> list[str]:
        """An answer to each prompt, up to the first of its stop strings."""

        def run(new: Sequence[Any]) -> list[list[Any]]:
            by_settings: dict[str, list[int]] = {}
            for i, (_, settings, _) in enumerate(new):
                by_settings.setdefault(json.dumps(settings, sort_keys=True), []).append(i)
            texts_of: list[list[Any]] = [[] for _ in new]
            for members in by_settings.values():
                texts = self._written([(new[i][0], new[i][2]) for i in members], dict(new[members[0]][1]))
                for i, of_text in zip(members, texts, strict=True):
                    texts_of[i] = of_text
            return texts_of

        # Where answers are sampled, lm-eval asks the same several times.
        seen: Counter[str] = Counter()
        asked = []
        for request in requests:
            context, settings = request.args
            text = json.dumps([context, settings], sort_keys=True)
            asked.append((context, settings, seen[text] if settings.get("do_sample") else 0))
            seen[text] += 1
        return [str(text) for text in self._replies("generate", asked, run)]

    def _written(self, asked: Sequence[tuple[str, int]], settings: dict[str, Any]) -> list[list[str]]:
        """Texts [asked][candidates].

        Args:
            asked: a context, and which of several samples its answer is.
        """
        engine = self.asking.engine
        options: dict[str, Any] = dict(normalize_gen_kwargs(settings, _NEW_TOKENS))
        stop = [text for text in handle_stop_sequences(options.get("until"), None) if text]
        new_tokens = options["max_gen_toks"]
        sampling = Sampling()
        if options.get("do_sample") and options.get("temperature"):
            top_p, top_k = options.get("top_p", 1.0), options.get("top_k", 0)
            sampling = Sampling(float(options["temperature"]), float(top_p), int(top_k))
        keep = max(1, self.max_length - new_tokens)
        ids = {context: tuple(encode(engine.tokenizer, context)[-keep:]) for context, _ in asked}
        count = len(self.group.candidates)
        # `asking` numbers candidates over all groups, and asks for the intervention of each.
        table = [self.group.table[0]] * len(self.asking.tried)
        for at, candidate in enumerate(self.group.candidates):
            table[candidate] = self.group.table[at]
        answers = self.asking.generated(
            f"{self._round('generate')}{self.group.name}",
            [(i, c, sample) for i, (_, sample) in enumerate(asked) for c in self.group.candidates],
            lambda i, _: asked[i][0],
            lambda i, _: ids[asked[i][0]],
            table,
            min(new_tokens, self.max_length - 1),
            sampling,
            seed=self.seed,
            stop=stop,
        )
        texts = [postprocess_generated_text(answer["text"], stop, None) for answer in answers]
        return [texts[i * count : (i + 1) * count] for i in range(len(asked))]

    def _round(self, what: str) -> str:
        """The journal's name for the next requests; lm-eval asks in the same order every time."""
        self._rounds += 1
        return f"{self.name} {what} {self._rounds}"

    def _replies(self, what: str, asked: Sequence[Any], run: Any) -> list[Any]:
        """The current candidate's replies; what is new is run for all candidates of the group."""
        keys = [json.dumps([what, args], sort_keys=True, default=str) for args in asked]
        new = {key: args for key, args in zip(keys, asked, strict=True) if key not in self._known}
        if new:
            self._known |= dict(zip(new, run(list(new.values())), strict=True))
        return [self._known[key][self.at] for key in keys]
