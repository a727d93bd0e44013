"""Reading a GGUF file's configuration without its vocabulary, which takes most of the time."""

from __future__ import annotations

import contextlib
import importlib.util
import struct
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

# Only a vocabulary's arrays are longer, with an element for each token or merge.
_LONG = 1024


@contextlib.contextmanager
def without_vocabulary() -> Iterator[None]:
    """While it lasts, the gguf package reads a long array of strings as that many empty strings.

    A configuration needs only the length of such an array: the size of the vocabulary.

    Raises:
        ValueError: the file ends within its metadata.
    """
    if importlib.util.find_spec("gguf") is None:  # transformers then says that it needs the package
        yield
        return
    import gguf

    class Reader(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            file: Any = self.data
            item, count = struct.unpack_from("=IQ", file, orig_offs)
            start = orig_offs + struct.calcsize("=IQ")
            types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(item)]
            if count > _LONG and item == gguf.GGUFValueType.STRING:
                end = _end_of_strings(memoryview(file), start, count)
                return end - orig_offs, [np.empty(0, np.uint8)], [0] * count, types
            if count > _LONG and item in self.gguf_scalar_to_np:
                numbers = np.asarray(self._get(start, self.gguf_scalar_to_np[types[1]], count))
                return start + numbers.nbytes - orig_offs, list(numbers[:, None]), list(range(count)), types
            return super()._get_field_parts(orig_offs, raw_type)

    with mock.patch.object(gguf, "GGUFReader", Reader):
        try:
            yield
        except struct.error:
            raise ValueError("the GGUF file ends within its metadata") from None


def _end_of_strings(file: memoryview, start: int, count: int) -> int:
    """Where `count` strings end, each of which follows its own length."""
    end = start
    for _ in range(count):
        end += 8 + struct.unpack_from("=Q", file, end)[0]
    return end
