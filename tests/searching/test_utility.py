"""The KL of an edit in Python, against the logits of the two models, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import steer2edit as s2e
from steer2edit.errors import EditError
from steer2edit.probing.chat import prompt_tokens

TEXTS = ["What is the capital of France?", "Please ask me something else!", "The answer to the question"]


def by_hand(model: Any, tokenizer: Any, edit: Any, new_tokens: int) -> list[float]:
    """Greedy answers by `generate`, and the KL of whole distributions at each of their tokens."""
    values = []
    for text in TEXTS:
        prompt = prompt_tokens(tokenizer, [{"role": "user", "content": text}])
        stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
        ids = list(prompt)
        for _ in range(new_tokens):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token in stops:
                break
            ids.append(token)
        if len(ids) == len(prompt):
            continue
        with torch.no_grad():
            base = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            with edit.applied(model):
                edited = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        at = range(len(prompt) - 1, len(ids) - 1)
        values.append(sum(float((base[i].exp() * (base[i] - edited[i])).sum()) for i in at) / len(at))
    return values


def test_the_kl_of_an_edit_is_that_of_the_two_models(pico: Any, tokenizer: Any, make_edit: Any) -> None:
    model = pico()
    edit = make_edit(model)
    values = by_hand(model, tokenizer, edit, 6)
    measured = s2e.kl(model, tokenizer, edit, TEXTS, new_tokens=6)
    assert measured["mean"] == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert measured["n"] == len(values)
    assert measured["empty"] == len(TEXTS) - len(values)
    assert measured["low"] <= measured["mean"] <= measured["high"]


def test_without_an_answer_there_is_no_kl(pico: Any, tokenizer: Any, make_edit: Any) -> None:
    model = pico()
    with pytest.raises(EditError, match="no answer to measure KL on"):
        s2e.kl(model, tokenizer, make_edit(model), [])
    with pytest.raises(EditError, match="needs its tokenizer"):
        s2e.kl(model, None, make_edit(model), TEXTS)


def test_an_edited_model_is_refused(pico: Any, tokenizer: Any, make_edit: Any) -> None:
    model = pico()
    edit = make_edit(model)
    edit.apply(model)
    with pytest.raises(EditError, match="already"):
        s2e.kl(model, tokenizer, edit, TEXTS)


def test_one_text_is_no_list_of_prompts(pico: Any, tokenizer: Any, make_edit: Any) -> None:
    model = pico()
    with pytest.raises(EditError, match="the prompts are one text"):
        s2e.kl(model, tokenizer, make_edit(model), TEXTS[0])
