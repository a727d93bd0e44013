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

_SEAL = re.compile(r'(.+), "crc32": "([^"]*)"\}', re.DOTALL)
_DIGEST = re.compile(r'(.+), "sha256": "([^"]*)"\}', re.DOTALL)


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


def sealed_header(header: str, tensors: Mapping[str, Tensor]) -> str:
    """A header, a JSON object that is not empty, with a SHA-256 of itself and of its tensors as its last key.

    It has no key of its own in a file's metadata, since `safetensors` writes those in any order.
    """
    return f'{header[:-1]}, "sha256": "{_digest_of(tensors, header)}"}}'


def unsealed_header(text: str, tensors: Mapping[str, Tensor]) -> str:
    """The header without its SHA-256. Raises ValueError if it is not the one of the header and of the tensors."""
    match = _DIGEST.fullmatch(text)
    if match is None:
        return text
    header = match[1] + "}"
    if _digest_of(tensors, header) != match[2]:
        raise ValueError("not as it was written: its checksum is another")
    return header


def _digest_of(tensors: Mapping[str, Tensor], header: str) -> str:
    import torch

    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _crc32(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
