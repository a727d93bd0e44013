"""Judges say of prompts and their responses whether a response shows something, such as a refusal.

A judge is a section of the recipe: a server that is asked, a chat model in this process, or a text classifier. Verdicts
are kept on disk, so that no run asks twice about the same pair.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import threading
import time
from abc import abstractmethod
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, model_validator

from ..engines.base import Request
from ..errors import Steer2EditError
from ..files.schema import Count, Many, Positive, Section, Text, nearest
from ..method.intervention import NOTHING
from ..probing.chat import answer_start
from ..progress import Progress, say
from .addresses import HIDDEN, hide_password, hide_secret, is_base_url, is_variable
from .judge_formats import (
    FORMATS,
    TEMPLATES,
    Ask,
    Format,
    Pair,
    Verdicts,
    chat_engine,
    encodable,
    filled,
    hash_of,
    label_probabilities,
    retry_after,
    short,
    source_of,
    text_classifier,
    times,
)

Arriving = Generator[tuple[Pair, float], None, None]

# Part of every identity: raise it when replies are read in another way.
_VERSION = 1
# The temperatures at which a server is asked about a pair, until a reply can be read.
_TEMPERATURES = (0.0, 0.7, 0.7)
# How many pairs without a readable reply end the work.
_UNREADABLE = 5
# Seconds before the first retry, doubled for each further one, and the longest wait. If a server asks for more than
# _PATIENCE seconds, the work ends.
_BACKOFF, _LONGEST, _PATIENCE = 1.0, 60.0, 300.0
# Texts that a classifier reads at once.
_ROWS = 16
# Only one thread at a time uses the models in this process.
_models = threading.RLock()


class JudgeError(Steer2EditError):
    """A judge does not answer, refuses to, or gives replies that cannot be read."""


class _NoVerdict(JudgeError):
    """One pair gets no verdict; others still can."""


class _Stopped(Exception):
    """This request is not sent, since another one has failed."""


class Judge(Section):
    """What all judges share: each pair is judged once."""

    @property
    def identity(self) -> str:
        """A hash of all that verdicts depend on. Verdicts are kept in a file of that name.

        >>> a, b = (Endpoint(endpoint=f"http://localhost:{port}/v1", model="m", question="Rude?") for port in (1, 2))
        >>> a.identity == b.identity
        False
        """
        return hash_of(_VERSION, *self._basis())[:32]

    def judged(self, pairs: Sequence[Pair], progress: Progress | None = None) -> list[float]:
        """For each pair of a prompt and a response, the probability that the answer is yes; 0 or 1 if the judge only
        says yes or no.

        Args:
            progress: called with the number of different pairs that have a verdict, and the number of different pairs.

        Raises:
            JudgeError: some pairs have no verdict. The other verdicts are kept, and the same call goes on from there.
            ModelError: the judge's model cannot be loaded. FileError: verdicts cannot be kept.
        """
        pairs = [(encodable(prompt), encodable(response)) for prompt, response in pairs]
        verdicts = Verdicts(self.identity)
        different = list(dict.fromkeys(pairs))
        missing = [pair for pair in different if pair not in verdicts]
        done = len(different) - len(missing)
        if progress:
            progress(done, len(different))
        if not missing:
            return [verdicts[pair] for pair in pairs]
        try:
            with contextlib.closing(self._verdicts(missing)) as arriving:
                for pair, yes in arriving:
                    verdicts.keep(pair, yes)
                    done += 1
                    if progress:
                        progress(done, len(different))
        except JudgeError as error:
            kept = f"{done} of {len(different)} verdicts are kept; run the same command again to go on."
            raise JudgeError(error.what, got=error.got, fix=f"{error.fix} {kept}" if done else error.fix) from None
        return [verdicts[pair] for pair in pairs]

    @abstractmethod
    def _basis(self) -> list[Any]:
        """What verdicts depend on, as JSON."""

    @abstractmethod
    def _verdicts(self, pairs: Sequence[Pair]) -> Arriving:
        """Each verdict as it arrives. Raises JudgeError after the last one if some are missing."""


class ChatJudge(Judge):
    """A judge that replies in words.

    Attributes:
        question: asked about the response, to be answered yes or no, like "Does the response decline the request?".
        format: the published format of a judge that was trained on its own question. `qwen3guard` and `wildguard` say
            whether the response is a refusal; `qwen3guard-unsafe` and `wildguard-harmful` whether it is harmful.
        tokens: the most tokens of a reply; None is what the format needs, 16 for a question and 128 for the others.
    """

    question: Text | None = None
    format: Literal["yes-no", "qwen3guard", "qwen3guard-unsafe", "wildguard", "wildguard-harmful"] | None = None
    tokens: Many | None = None

    @model_validator(mode="after")
    def _one_question(self) -> ChatJudge:
        if self._format.takes_question and self.question is None:
            others = ", ".join(name for name, format in FORMATS.items() if not format.takes_question)
            raise ValueError(f"Give a question, or the format of a judge that has its own: {others}")
        if not self._format.takes_question and self.question is not None:
            raise ValueError(f"Leave out question or format: {self.format} has its own question")
        return self

    @property
    def _format(self) -> Format:
        return FORMATS[self.format or "yes-no"]

    @property
    def _most_tokens(self) -> int:
        return self.tokens or self._format.tokens

    def _ask(self, pair: Pair) -> Ask:
        return self._format.ask(*pair, self.question or "")

    def _basis(self) -> list[Any]:
        return [self.format or "yes-no", self._ask(("{prompt}", "{response}")), self._most_tokens]


class Endpoint(ChatJudge):
    """A model on a server with OpenAI's API. The prompts and responses are sent to that server.

    Attributes:
        endpoint: the base URL, up to and including /v1.
        model: the model's name on the server.
        key: the NAME of the environment variable that holds the API key. If the default one is not set, no key is sent.
        concurrency: how many requests run at once.
        retries: how often a request is repeated after a rate limit, a server error, a timeout or a lost connection.
        timeout: seconds to wait for a reply.

    >>> Endpoint(endpoint="http://localhost:8000/v1", model="qwen", question="Does the response decline?").concurrency
    8
    """

    endpoint: Annotated[str, AfterValidator(is_base_url), BeforeValidator(hide_password)]
    model: Text
    key: Annotated[str, AfterValidator(is_variable), BeforeValidator(hide_secret)] = "OPENAI_API_KEY"
    concurrency: Many = 8
    retries: Count = 5
    timeout: Positive = 60.0

    def _basis(self) -> list[Any]:
        return ["endpoint", self.endpoint, self.model, *super()._basis()]

    def _verdicts(self, pairs: Sequence[Pair]) -> Arriving:
        requests = _Requests(self)
        failures: list[JudgeError] = []
        with contextlib.closing(requests.client), ThreadPoolExecutor(min(self.concurrency, len(pairs))) as threads:
            try:
                futures = {threads.submit(requests.verdict, pair): pair for pair in pairs}
                for future in as_completed(futures):
                    try:
                        yes = future.result()
                    except _Stopped:
                        continue
                    except JudgeError as error:
                        failures.append(error)
                        continue
                    yield futures[future], yes  # also of requests that were under way when another one failed
            finally:
                requests.stop.set()
        if failures:
            raise next((error for error in failures if not isinstance(error, _NoVerdict)), failures[0])

    def _secret(self) -> str | None:
        """The key, or None if there is none.

        Raises:
            JudgeError: the variable that the recipe names is not set, or its value cannot be sent.
        """
        key = os.environ.get(self.key, "").strip()
        if not key and self.key != type(self).model_fields["key"].default:
            got = f"no environment variable {self.key}"
            raise JudgeError("the judge's key is missing", got=got, fix="Set the variable, or leave out key.")
        if not re.fullmatch(r"[!-~]*", key):
            got = f"spaces, or characters outside ASCII, in the environment variable {self.key}"
            raise JudgeError("the judge's key cannot be sent", got=got, fix="Set the variable to the key alone.")
        return key or None


class _Requests:
    """The requests of one call to an endpoint, and what its threads share.

    Attributes:
        stop: once it is set, no further request is sent.
    """

    def __init__(self, judge: Endpoint):
        try:
            import openai
        except ImportError:
            fix = "pip install 'steer2edit[judge]'."
            raise JudgeError("an endpoint needs the openai package", got="it is not installed", fix=fix) from None
        self.judge, self.openai, self.key = judge, openai, judge._secret()
        self.who = f"the judge at {urlsplit(judge.endpoint).netloc}"
        # The client takes what it is not given from the environment, for every server; so it always gets a key.
        ours: dict[str, Any] = {"OpenAI-Organization": openai.omit, "OpenAI-Project": openai.omit}
        self.client: Any = openai.OpenAI(
            api_key=self.key or "none",
            base_url=judge.endpoint,
            timeout=judge.timeout,
            max_retries=0,
            default_headers={} if urlsplit(judge.endpoint).hostname == "api.openai.com" else ours,
        )
        self.stop = threading.Event()
        self.unreadable: list[Pair] = []
        self.resume_at = 0.0  # by the monotonic clock: when the server takes requests again
        self.limit, self.takes_temperature = "max_tokens", True

    def verdict(self, pair: Pair) -> float:
        """Asks about a pair until a reply can be read. A failure that is not of this pair alone stops all requests.

        Raises:
            _NoVerdict: no reply can be read, or the server refuses this request. JudgeError: the server does not
                answer, or refuses every request. _Stopped: another request has failed.
        """
        try:
            return self._readable(self.judge._ask(pair))
        except _NoVerdict:
            self.unreadable.append(pair)
            if len(self.unreadable) >= _UNREADABLE:
                self.stop.set()
            raise
        except JudgeError:
            self.stop.set()
            raise

    def _readable(self, ask: Ask) -> float:
        for temperature in _TEMPERATURES:
            reply, cut = self._reply(ask, temperature)
            answer = reply[answer_start(reply) :]
            if (yes := self.judge._format.read(answer)) is not None:
                return yes
        raise _unreadable(self.who, self._clean(answer or reply), cut)

    def _reply(self, ask: Ask, temperature: float) -> tuple[str, bool]:
        """A reply, and whether it was cut at the token limit. Retries where that can help."""
        tries = adapted = 0
        while True:
            self._wait_until(self.resume_at)
            tries += 1
            wait: float | None = None
            try:
                return self._request(ask, temperature)
            except self.openai.APITimeoutError:
                got = f"no reply within {self.judge.timeout:g} s, {times(tries)}"
                failure = JudgeError(f"{self.who} does not answer", got=got, fix="Raise timeout or lower concurrency.")
            except self.openai.APIConnectionError as error:
                got = f"{self._clean(str(error.__cause__ or error))}, {times(tries)}"
                failure = JudgeError(f"{self.who} does not answer", got=got, fix="Check endpoint; start the server.")
            except self.openai.APIStatusError as error:
                if adapted < 3 and self._adapts_to(error):
                    tries, adapted = tries - 1, adapted + 1
                    continue
                failure, wait = self._refusal(error, tries), retry_after(error.response.headers)
                passing = error.status_code in (408, 409, 425, 429) or error.status_code >= 500
                if not passing or error.code == "insufficient_quota" or (wait or 0.0) > _PATIENCE:
                    raise failure from None
            if tries > self.judge.retries:
                raise failure
            at = time.monotonic() + (min(_LONGEST, _BACKOFF * 2 ** (tries - 1)) if wait is None else wait)
            if wait is not None:
                self.resume_at = max(self.resume_at, at)  # a server's Retry-After is meant for all threads
            self._wait_until(at)

    def _wait_until(self, at: float) -> None:
        if self.stop.wait(max(0.0, at - time.monotonic())):
            raise _Stopped

    def _request(self, ask: Ask, temperature: float) -> tuple[str, bool]:
        parameters: dict[str, Any] = {"model": self.judge.model, self.limit: self.judge._most_tokens}
        if self.takes_temperature:
            parameters["temperature"] = temperature
        try:
            if isinstance(ask, str):
                completion = self.client.completions.create(prompt=ask, **parameters)
            else:
                completion = self.client.chat.completions.create(messages=ask, **parameters)
        except json.JSONDecodeError as error:  # the client does not catch it
            return str(error), False
        try:
            choice = completion.choices[0]
            text = choice.text if isinstance(ask, str) else choice.message.content or choice.message.refusal
            return str(text or ""), choice.finish_reason == "length"
        except (AttributeError, IndexError, TypeError):  # a web page, or other JSON than a completion
            return str(completion), False

    def _adapts_to(self, error: Any) -> bool:
        """Whether the model refused a parameter that later requests leave out or name in another way."""
        if not str(error.code).startswith("unsupported_"):
            return False
        if error.param == "max_tokens":
            self.limit = "max_completion_tokens"
        elif error.param == "temperature":
            self.takes_temperature = False
        return error.param in ("max_tokens", "temperature")

    def _refusal(self, error: Any, tries: int) -> JudgeError:
        status, judge = error.status_code, self.judge
        body = error.body if isinstance(error.body, dict) else {}
        got = f"{status}: {self._clean(str(body.get('message') or error.response.text))}, {times(tries)}"
        if status in (401, 403):
            got += "" if self.key else f"; no key was sent, since {judge.key} is not set"
            fix = f"Set the environment variable {judge.key} to a key that may use {judge.model}."
            return JudgeError(f"{self.who} refuses the key", got=got, fix=fix)
        if status in (404, 405):
            fix = "Check model, and that endpoint is the base URL, which usually ends in /v1."
            return JudgeError(f"{self.who} does not have what is asked for", got=got, fix=fix)
        if status in (402, 429):
            fix = "Lower concurrency, or wait until the limit has passed."
            return JudgeError(f"{self.who} takes no more requests", got=got, fix=fix)
        if status in (400, 413, 422):
            fix = "Check model and format. The pair may also be too long for the judge."
            return _NoVerdict(f"{self.who} refuses a request", got=got, fix=fix)
        return JudgeError(f"{self.who} fails", got=got, fix="Look at the server's log.")

    def _clean(self, text: str) -> str:
        """One short line without the key, whatever a server or a library has put there."""
        return short(text.replace(self.key, HIDDEN) if self.key else text)


class LocalChat(ChatJudge):
    """A chat model in this process. It answers greedily.

    Attributes:
        local: a Hub id, a folder that `save_pretrained` wrote, a `.gguf` file, or the embedded model's name.

    >>> LocalChat(local="Qwen/Qwen3Guard-Gen-0.6B", format="qwen3guard").question is None
    True
    """

    local: Text

    def _basis(self) -> list[Any]:
        return ["local", source_of(self.local)[1], *super()._basis()]

    def _verdicts(self, pairs: Sequence[Pair]) -> Arriving:
        failures: list[JudgeError] = []
        waiting = list(pairs)
        with _models:
            engine = chat_engine(*source_of(self.local))
            while waiting and len(failures) < _UNREADABLE:
                some, waiting = waiting[: engine.slots], waiting[engine.slots :]
                requests = [Request(_token_ids(engine, self._ask(pair))) for pair in some]
                answers = engine.generate(requests, [NOTHING], self._most_tokens)
                for pair, answer in zip(some, answers, strict=True):
                    reply = answer.text[answer.start :]
                    if (yes := self._format.read(reply)) is not None:
                        yield pair, yes
                    else:
                        failures.append(_unreadable(f"the judge {self.local}", short(reply), not answer.ended))
        if failures:
            raise failures[0]


def _token_ids(engine: Any, ask: Ask) -> tuple[int, ...]:
    return tuple(engine.tokenizer(ask)["input_ids"]) if isinstance(ask, str) else engine.tokens(ask)


def _is_template(value: str) -> str:
    if value not in TEMPLATES and "{response}" not in value:
        hint = nearest(value, list(TEMPLATES), "Known formats").rstrip(".")
        raise ValueError(f"Give a known format, or a text with {{prompt}} and {{response}}. {hint}")
    return value


class Classifier(Judge):
    """A text-classification model in this process. Its verdict is the probability of one label.

    Attributes:
        classifier: a Hub id, or a folder that `save_pretrained` wrote, with safetensors weights.
        label: the label that means yes.
        format: what the model reads: `response` is the response alone, `minos` follows the model card of
            NousResearch/Minos-v1, and anything else is a text with {prompt} and {response}.

    >>> Classifier(classifier="NousResearch/Minos-v1", label="Refusal", format="minos").format
    'minos'
    """

    classifier: Text
    label: Text
    format: Annotated[str, AfterValidator(_is_template)] = "response"

    def _basis(self) -> list[Any]:
        return ["classifier", source_of(self.classifier)[1], self.label, self._template]

    @property
    def _template(self) -> str:
        return TEMPLATES.get(self.format, self.format)

    def _verdicts(self, pairs: Sequence[Pair]) -> Arriving:
        with _models:
            model, tokenizer = text_classifier(*source_of(self.classifier))
            column, cut = self._column(model.config), 0
            # Texts of similar lengths go together, so that little is padded.
            in_order = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
            for first in range(0, len(in_order), _ROWS):
                some = in_order[first : first + _ROWS]
                texts = [filled(self._template, prompt=prompt, response=response) for prompt, response in some]
                probabilities, cut_here = label_probabilities(model, tokenizer, texts)
                cut += cut_here
                for pair, row in zip(some, probabilities, strict=True):
                    if not math.isfinite(row[column]):
                        what = f"the classifier {self.classifier} gives no number"
                        raise JudgeError(what, got=row, fix="Take another classifier.")
                    yield pair, row[column]
        if cut:
            say(f"  {cut} texts were too long for the classifier {self.classifier}; their ends were cut off")

    def _column(self, config: Any) -> int:
        labels = [str(config.id2label[i]) for i in range(config.num_labels)]
        if config.problem_type == "regression":
            what = f"the classifier {self.classifier} gives scores, and no probabilities"
            raise JudgeError(what, got="problem_type: regression", fix="Take a model that was trained to classify.")
        if self.label not in labels:
            what = f"the classifier {self.classifier} does not have that label"
            raise JudgeError(what, got=self.label, fix=nearest(self.label, labels, "Its labels"))
        return labels.index(self.label)


def _unreadable(who: str, reply: str, cut: bool) -> _NoVerdict:
    fix = "Raise tokens." if cut else "Ask a simpler question, or take another model."
    return _NoVerdict(f"{who} gives a reply without a verdict", got=reply or "an empty reply", fix=fix)
