"""The utility loss of an edit in Python, without a recipe: how far it moves a model on ordinary text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..behaviours.base import Item, Prompt
from ..edits import Combination, Edit
from ..engines.base import Engine, Request
from ..errors import EditError
from ..method.intervention import NOTHING
from ..probing.chat import CHAT, Chat
from .statistics import finite, interval

Ids = tuple[int, ...]


def kl(
    model: Engine | nn.Module,
    tokenizer: Any,
    edit: Edit | Combination,
    texts: Sequence[Prompt],
    *,
    new_tokens: int = 64,
    chat: Chat = CHAT,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """KL(base ‖ edited) per token on the base model's own greedy answers: the utility loss of a recipe.

    Args:
        model: without the edit: a transformers model, or an engine (its own tokenizer counts).
        texts: prompts, as texts or as chat messages, on which the model should stay as it is.
        new_tokens: at most this many tokens an answer.
        chat: how a model's prompts are written; an engine has its own.
        resamples, seed: of the bootstrap.

    Returns:
        mean, low and high in nats (a 95 % interval over prompts), n, and `empty`: prompts without any answer, left out.

    Raises:
        EditError: the model answers no text, or has the edit in it already. ModelError: the edit is of another model.

    >>> cost = s2e.kl(model, tokenizer, edit, ["How are you?", "Why?"], new_tokens=4)
    >>> cost["n"], cost["mean"] > 0
    (2, True)
    """
    engine = engine_of(model, tokenizer, chat)
    refuse_other_base(engine, edit)
    pairs = base_answers(engine, texts, new_tokens)
    values = finite(engine.losses(pairs, [edit.intervention()]).kl[:, 0].tolist())
    return interval(values, False, resamples, seed) | {"empty": len(texts) - len(pairs)}


def engine_of(model: Engine | nn.Module, tokenizer: Any, chat: Chat) -> Engine:
    """The engine itself, or one of a model. Raises EditError for a model without a tokenizer."""
    if isinstance(model, Engine):
        return model
    if tokenizer is None:
        raise EditError("a model needs its tokenizer here", got="none", fix="Give the tokenizer, or an engine.")
    from ..engines.transformers import TransformersEngine

    return TransformersEngine(model, tokenizer, chat=chat)


def refuse_other_base(engine: Engine, edit: Edit | Combination) -> None:
    """Raises EditError or ModelError if the engine's model is here and is not the edit's base."""
    model = getattr(engine, "model", None)
    if model is not None:
        with edit.applied(model):  # where an edit is compared with the model
            pass


def base_answers(engine: Engine, texts: Sequence[Prompt], new_tokens: int) -> list[tuple[Ids, Ids]]:
    """Prompt and greedy answer of the base model, of each text that it answers. Raises EditError if it answers none."""
    if isinstance(texts, str):
        raise EditError("the prompts are one text", got=repr(texts[:40]), fix="Give a list of prompts.")
    ids = [engine.tokens(Item("text", text).messages(None)) for text in texts]
    answers = engine.generate([Request(prompt) for prompt in ids], [NOTHING], new_tokens) if ids else []
    pairs = [(prompt, answer.ids) for prompt, answer in zip(ids, answers, strict=True) if answer.ids]
    if not pairs:
        raise EditError("there is no answer to measure KL on", got=f"{len(ids)} texts", fix="Give other prompts.")
    return pairs
