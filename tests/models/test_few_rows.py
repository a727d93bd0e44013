"""A few rows are multiplied in another order of the same numbers, and nothing stays in the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from steer2edit.models.few_rows import MOST_ROWS, few_rows


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), ()])
def test_the_product_is_the_linear_layers(rows: int, bias: bool, shape: tuple[int, ...]) -> None:
    layer, x = nn.Linear(40, 24, bias=bias), torch.randn(rows, *shape, 40)
    with torch.inference_mode():
        expected = layer(x)
        with few_rows(layer):
            out = layer(x)
            strided = layer(x.double().float().mT.contiguous().mT)
    assert out.shape == expected.shape
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(strided, expected, rtol=1e-5, atol=1e-6)
    if not 2 <= rows <= MOST_ROWS:
        assert torch.equal(out, expected)


def test_a_model_answers_as_before_and_is_left_as_it_was(pico: Any) -> None:
    model, ids = pico(), torch.randint(3, 300, (3, 1))
    with torch.inference_mode():
        before = model(ids).logits
        with few_rows(model):
            assert "forward" in vars(model.lm_head)
            torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(ids).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_other_dtypes_and_layers_are_left_alone(pico: Any) -> None:
    model = pico(dtype=torch.bfloat16)
    with few_rows(model):
        assert not any("forward" in vars(module) for module in model.modules())
