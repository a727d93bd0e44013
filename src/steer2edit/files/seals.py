"""Seals: a checksum that a file or a line carries of itself, so that a bit that flips on the disk is not read as a
result. They guard against damage, not against a person. What older versions wrote has none, and is read without.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_SEAL = re.compile(r'(.+), "crc32": "([0-9a-f]{8})"\}', re.DOTALL)


def sealed(line: str) -> str:
    """A JSON object on one line, with a checksum of its text as its last key.

    >>> sealed('{"batch": 3}')
    '{"batch": 3, "crc32": "de119afc"}'
    """
    return f'{line[:-1]}, "crc32": "{_crc32(line)}"}}'


def unsealed(line: str) -> str:
    """The line without its checksum. Raises ValueError if it is not the one of its text.

    >>> unsealed('{"batch": 3, "crc32": "de119afc"}')
    '{"batch": 3}'
    """
    match = _SEAL.fullmatch(line)
    if match is None:
        return line
    text = match[1] + "}"
    if _crc32(text) != match[2]:
        raise ValueError("a line is not as it was written: its checksum is another")
    return text


def digest_of(tensors: Mapping[str, Tensor], header: str) -> str:
    """The SHA-256 of tensors on the CPU, by name, and of the header that goes with them."""
    import torch

    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _crc32(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
