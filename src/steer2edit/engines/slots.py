"""A key/value cache of slots: each row writes at its own position, so rows of any length share a batch without
padding, leave it when they are done, and make room for the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class _Cursor:
    """Where the next forward pass writes: all rows from `start` on, or row i at `at[i]`. It sees `length` positions."""

    start: int = 0
    at: Tensor | None = None
    length: int = 0


class _SlotLayer(CacheLayerMixin):
    """Keys and values [rows, heads, capacity, head_dim], allocated once."""

    is_sliding = False

    def __init__(self, cursor: _Cursor, rows: int, capacity: int):
        super().__init__()
        self.cursor, self.rows, self.capacity = cursor, rows, capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (self.rows, key_states.shape[1], self.capacity, key_states.shape[3])
        self.keys = key_states.new_zeros(shape)
        self.values = value_states.new_zeros((*shape[:3], value_states.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        cursor = self.cursor
        if cursor.at is None:
            span = slice(cursor.start, cursor.start + key_states.shape[2])
            self.keys[:, :, span] = key_states
            self.values[:, :, span] = value_states
        else:
            rows = torch.arange(self.rows, device=key_states.device)
            at = cursor.at.to(key_states.device)
            self.keys[rows, :, at] = key_states[:, :, 0]
            self.values[rows, :, at] = value_states[:, :, 0]
        return self.keys[:, :, : cursor.length], self.values[:, :, : cursor.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cursor.length, 0

    def get_seq_length(self) -> int:
        return self.cursor.start

    def get_max_length(self) -> int:
        return self.capacity


class SlotCache(Cache):
    """Slots for `rows` sequences of up to `capacity` tokens."""

    def __init__(self, layers: int, rows: int, capacity: int):
        self.cursor = _Cursor()
        self.rows, self.capacity = rows, capacity
        self.slots = [_SlotLayer(self.cursor, rows, capacity) for _ in range(layers)]
        super().__init__(layers=list(self.slots))

    def write_from(self, start: int, tokens: int) -> None:
        """Lets the next pass write `tokens` tokens of every row from position `start` on."""
        self.cursor.start, self.cursor.at, self.cursor.length = start, None, start + tokens

    def write_at(self, positions: Tensor) -> None:
        """Lets the next pass write one token of row i at positions[i]."""
        self.cursor.at, self.cursor.start = positions, int(positions.max())
        self.cursor.length = self.cursor.start + 1

    def copy(self, source: SlotCache, rows: Tensor, into: Tensor, length: int) -> None:
        """Copies the first `length` positions of `source`'s rows into this cache's rows `into`."""
        for mine, theirs in zip(self.slots, source.slots, strict=True):
            assert theirs.keys is not None
            assert theirs.values is not None
            if not mine.is_initialized:
                mine.lazy_initialization(theirs.keys, theirs.values)
            assert mine.keys is not None
            assert mine.values is not None
            source_rows, own_rows = rows.to(theirs.keys.device), into.to(theirs.keys.device)
            mine.keys[own_rows, :, :length] = theirs.keys[source_rows, :, :length]
            mine.values[own_rows, :, :length] = theirs.values[source_rows, :, :length]

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these, in this order."""
        self.rows = len(rows)
        for layer in self.slots:
            layer.rows = len(rows)
            if layer.is_initialized:
                assert layer.keys is not None
                assert layer.values is not None
                kept = rows.to(layer.keys.device)
                layer.keys, layer.values = layer.keys[kept], layer.values[kept]

    def resize(self, rows: int, capacity: int) -> None:
        """Makes room for `rows` sequences, not fewer than now, of up to `capacity` tokens; what is kept stays in place.

        A smaller capacity drops the positions behind it.
        """
        before, kept = self.rows, min(capacity, self.capacity)
        self.rows, self.capacity = rows, capacity
        for layer in self.slots:
            layer.rows, layer.capacity = rows, capacity
            if layer.is_initialized:
                old_keys, old_values = layer.keys, layer.values
                assert old_keys is not None
                assert old_values is not None
                layer.lazy_initialization(old_keys, old_values)
                assert layer.keys is not None
                assert layer.values is not None
                layer.keys[:before, :, :kept] = old_keys[:, :, :kept]
                layer.values[:before, :, :kept] = old_values[:, :, :kept]

    def clear(self, rows: Sequence[int]) -> None:
        """Sets rows to 0. Masked keys count for nothing, but a masked value that is not finite would not."""
        for layer in self.slots:
            if layer.is_initialized:
                assert layer.keys is not None
                assert layer.values is not None
                layer.keys[list(rows)] = 0
                layer.values[list(rows)] = 0
