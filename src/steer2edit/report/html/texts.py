"""Text on the page: strangers' texts made visible, and answers packed so that the page stays small.

Prompts, answers and names come from models and from files of others. They are shown as text, with the characters that
would change a line's direction or a terminal's state in sight.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Bytes of base64 for the answers on test, and for all answers: validation has what test leaves.
TEST_BUDGET, ANSWERS_BUDGET = 1_600_000, 3_700_000

# Lengths at which answers are cut, one after the other, until they fit.
_LENGTHS = (20_000, 4_000, 1_000, 300, 100)
# If there are many trials, some are left out before answers are cut to less than this; if few, answers are cut further.
_READABLE, _FEW = 1_000, 8

# C0 and C1 controls but tab and newline, marks and overrides of direction, and halves of surrogate pairs.
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_CONTROL_PICTURES = 0x2400


def visible(text: str) -> str:
    """The text with a sign in place of each character that acts on what stands around it.

    >>> visible("a\\x1b[31mb"), visible("\\u202eabc")
    ('a␛[31mb', '‹U+202E›abc')
    """
    return _HIDDEN.sub(lambda match: _sign(ord(match[0])), text)


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(_CONTROL_PICTURES + code)
    return f"‹U+{code:04X}›"


@dataclass(frozen=True)
class Packed:
    """Rows of prompts and answers, as base64 of gzipped JSON.

    Attributes:
        left_out: ids of the trials whose answers found no room. cut: at how many characters answers are cut, if any is.
    """

    data: str
    left_out: tuple[str, ...] = ()
    cut: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"data": self.data, "left_out": list(self.left_out), "cut": self.cut}


def pack_rows(
    rows: Sequence[Mapping[str, Any]], ids: Sequence[str], measures: Sequence[str], budget: int
) -> Packed | None:
    """Packs rows, cutting long answers and leaving out the last ids until they fit.

    Args:
        rows: each with prompt, kind, `answers` (id → text or texts) and `labels` (id → measure → number).
        ids: whose answers are packed, the most wanted first.
        budget: the most bytes of the result.

    Returns:
        None if not even the first answers fit.
    """
    kept, length = list(ids), max((_longest(row, ids) for row in rows), default=0)
    shorter = [one for one in _LENGTHS if one < length]
    is_cut = False
    while kept:
        table = [_table_row(row, kept, measures, length) for row in rows]
        plain = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        data = base64.b64encode(gzip.compress(plain, 6, mtime=0)).decode()
        if len(data) <= budget:
            return Packed(data, tuple(ids[len(kept) :]), length if is_cut else None)
        if shorter and (shorter[0] >= _READABLE or len(kept) <= _FEW):
            length, is_cut = shorter.pop(0), True
        else:
            kept = kept[: int(len(kept) * min(0.9, 0.95 * budget / len(data)))]
    return None


def _table_row(row: Mapping[str, Any], ids: Sequence[str], measures: Sequence[str], length: int) -> dict[str, Any]:
    """One prompt; many trials give the same answer, which is held once.

    Returns:
        prompt: [role, text] of each message. texts: the different answers. which: of each id the number of its answer,
        −1 where it has none. labels: measure → of each id its number.
    """
    texts: dict[str, int] = {}
    which = []
    for id in ids:
        answer = row["answers"].get(id)
        if answer is None:
            which.append(-1)
            continue
        samples = answer if isinstance(answer, list) else [answer]
        key = json.dumps([_cut(text, length) for text in samples], ensure_ascii=False)
        which.append(texts.setdefault(key, len(texts)))
    labels = {}
    for name in measures:
        values = [row["labels"].get(id, {}).get(name) for id in ids]
        if any(value is not None for value in values):
            labels[name] = values
    return {
        "prompt": [[role, _cut(text, length)] for role, text in _messages(row["prompt"])],
        "kind": row["kind"],
        "texts": [json.loads(key) for key in texts],
        "which": which,
        "labels": labels,
    }


def _cut(text: str, length: int) -> str | list[Any]:
    """The text, or what fits of it beside its whole length."""
    return text if len(text) <= length else [text[:length], len(text)]


def _longest(row: Mapping[str, Any], ids: Sequence[str]) -> int:
    answers = [row["answers"].get(id, "") for id in ids]
    texts = [text for answer in answers for text in (answer if isinstance(answer, list) else [answer])]
    return max(map(len, [*texts, *(text for _, text in _messages(row["prompt"]))]), default=0)


def _messages(prompt: Any) -> list[tuple[str, str]]:
    if isinstance(prompt, str):
        return [("user", prompt)]
    return [(str(message["role"]), str(message["content"])) for message in prompt]
