"""Who writes the responses of a side: the model that is edited, another one, or a model on a server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from ..engines.base import Engine, Progress, Request
from ..errors import TraceError
from ..method.intervention import NOTHING
from .base import Item, Prompt
from .contrast import Side

_AT_ONCE = 8


def write_responses(
    engine: Engine,
    side: Side,
    prompts: Sequence[Prompt],
    system: str | None,
    new_tokens: int,
    progress: Progress | None = None,
) -> list[str]:
    """The responses to prompts under a side's instruction, greedy.

    Args:
        system: a system prompt that stands before the side's own.
    """
    asking = side.system if system is None else f"{system}\n\n{side.system}"
    messages = [Item("", prompt).messages(asking) for prompt in prompts]
    if side.endpoint is not None:
        return _from_server(side, messages, new_tokens, progress)
    if side.model is not None:
        engine = _other(side.model)
    requests = [Request(engine.tokens(some)) for some in messages]
    answers = engine.generate(requests, [NOTHING], new_tokens, progress)
    return [whole_sentences(answer.text[answer.start :], answer.ended) for answer in answers]


def _from_server(
    side: Side, messages: Sequence[list[dict[str, str]]], new_tokens: int, progress: Progress | None
) -> list[str]:
    """Raises TraceError if the server does not answer, or the client is not installed."""
    try:
        import openai
    except ImportError:
        raise TraceError(
            "responses from a server need the package openai",
            got="not installed",
            fix="pip install 'steer2edit[judge]'",
        ) from None
    key = os.environ.get(side.key, "").strip() or "none"
    client = openai.OpenAI(base_url=side.endpoint, api_key=key, max_retries=5)
    client.organization = client.project = None  # what the environment says of these is for another server

    def ask(some: list[dict[str, str]]) -> str:
        asked: Any = some
        reply = client.chat.completions.create(
            model=str(side.model), messages=asked, max_tokens=new_tokens, temperature=0
        )
        choice = reply.choices[0]
        return whole_sentences(choice.message.content or "", choice.finish_reason != "length")

    responses: list[str] = []
    try:
        with client, ThreadPoolExecutor(_AT_ONCE) as threads:
            for response in threads.map(ask, messages):
                responses.append(response)
                if progress:
                    progress(len(responses), len(messages))
    except (openai.OpenAIError, ValueError, LookupError, AttributeError, TypeError) as error:  # or a reply that is none
        raise TraceError(
            f"the server {urlsplit(side.endpoint).netloc!s} does not write the responses",
            got=(str(error).replace(key, "…").strip() or type(error).__name__).splitlines()[0],
            fix=f"Check the address, the model's name and ${side.key}; then run the same command again.",
        ) from None
    return responses


@lru_cache(maxsize=1)
def _other(name: str) -> Engine:
    from ..engines.transformers import TransformersEngine
    from ..models.load import load_model

    return TransformersEngine(*load_model(name))


def whole_sentences(text: str, ended: bool) -> str:
    """A response that was cut off, up to its last whole sentence or line, if it has one.

    >>> whole_sentences("Mix it. Bake it. Then wait for", ended=False)
    'Mix it. Bake it.'
    """
    if ended:
        return text.strip()
    ends = [text.rfind(mark) for mark in (". ", "! ", "? ", ".\n", "!\n", "?\n", "\n")]
    last = max(ends)
    return text[: last + 1].strip() if last > 0 else text.strip()
