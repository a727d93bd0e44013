"""Silences what other libraries print while they load, and what users can do nothing about."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

# On CPUs with bf16 units bitsandbytes looks for a kernel on the Hub when it is imported, and works without it.
_KERNELS = logging.getLogger("bitsandbytes.backends.cpu.ops")


def _is_news(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()


def quiet_kernels() -> None:
    """Drops bitsandbytes' message about a kernel that it cannot fetch; its other messages stay."""
    if _is_news not in _KERNELS.filters:
        _KERNELS.addFilter(_is_news)


@contextlib.contextmanager
def without_gguf_bar() -> Iterator[None]:
    """While it lasts, transformers draws no progress bar when it reads a GGUF file's tensors."""

    def plain(items: Iterable[Any], **_: Any) -> Iterable[Any]:
        return items

    with mock.patch("transformers.modeling_gguf_pytorch_utils.tqdm", plain):
        yield
