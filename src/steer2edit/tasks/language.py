"""Language modelling: the last word of a passage (LAMBADA) and the perplexity of articles (WikiText-2)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..behaviours.base import Measure
from .base import Hub, Metric, Question, Reply, Row, Task, Value, accuracy, bits, each, perplexity

_WORST = 1000.0  # where a perplexity's scale ends


def _lambada(row: Row, seed: str) -> Question | None:
    context, target = row.get("context"), row.get("target")
    if isinstance(text := row.get("text"), str):
        context, _, target = text.rpartition(" ")
    if not (isinstance(context, str) and context and isinstance(target, str) and target):
        return None
    return Question(context, (f" {target}",))


def _last_word(question: Question, reply: Reply) -> Mapping[str, Value]:
    return {"lambada": float(reply.greedy[0]), "lambada_perplexity": -reply.log_p[0]}


def _article(row: Row, seed: str) -> Question | None:
    page = row.get("page")
    if not isinstance(page, str) or not page.strip():
        return None
    # Words and bytes are those of the original text, before it is put in order.
    return Question(detokenised(page), target=(len(re.split(r"\s+", page)), len(page.encode())))


def _of_article(question: Question, reply: Reply) -> Mapping[str, Value]:
    words, size = question.target
    nll = -reply.log_p[0]
    return {"wikitext": (nll, float(words)), "wikitext_bits_per_byte": (nll, float(size))}


# What WikiText's own tokenisation wrote, and the usual text for it, in the order of lm-eval's `wikitext`.
_REPLACED = (("s '", "s'"),)
_SPACED = (
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
)
_INSIDE = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenised(text: str) -> str:
    """WikiText without its tokenisation, so that spaces stand where a writer puts them.

    >>> detokenised("He won 1 @,@ 000 ( in all ) .")
    'He won 1,000 (in all) .'
    """
    for old, new in (*_REPLACED, *_SPACED):
        text = text.replace(old, new)
    for pattern, replacement in _INSIDE:
        text = re.sub(pattern, replacement, text)
    for old, new in _REST:
        text = text.replace(old, new)
    return text


def pages(rows: list[Row]) -> list[Row]:
    """Articles from rows of lines; rows of whole articles stay as they are.

    A line of the original begins and ends with a space, and an empty one stands around each heading.

    Args:
        rows: `page`, or `article` (a number), `heading` and `text`.
    """
    lines: dict[object, list[str]] = {}
    for row in rows:
        if not isinstance(row.get("text"), str) or "article" not in row:
            return rows
        of_article = lines.setdefault(row["article"], [])
        of_article += ["", str(row["text"]), ""] if row.get("heading") else [str(row["text"])]
    return [{"page": "".join(f" {line} \n" if line else " \n" for line in some)} for some in lines.values()]


LANGUAGE = (
    Task(
        "lambada",
        "choices",
        (
            accuracy("lambada", "LAMBADA"),
            Metric(Measure("lambada_perplexity", "LAMBADA perplexity", worst=_WORST, best=1.0, rate=False), perplexity),
        ),
        _lambada,
        each(_last_word),
        Hub("EleutherAI/lambada_openai", "default", "test"),
        ("lambada.jsonl",),
        "MIT",
    ),
    Task(
        "wikitext",
        "document",
        (
            Metric(Measure("wikitext", "WikiText perplexity (words)", worst=_WORST, best=1.0, rate=False), perplexity),
            Metric(
                Measure(
                    "wikitext_bits_per_byte", "WikiText bits per byte", worst=8.0, best=0.0, rate=False, column=False
                ),
                bits,
            ),
        ),
        _article,
        each(_of_article),
        Hub("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"),
        ("wikitext2_test.jsonl", "wikitext.jsonl"),
        "CC BY-SA 3.0",
    ),
)
