"""The traces as spans of tokens: what one pass runs, which positions count, and what of it is kept as evidence."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import TraceError
from ..method.preserve import FIRST, PARTS, EvidenceRow
from ..progress import say
from .chat import Chat
from .spans import Span, response_span
from .traces import LABELS, Label, Part, Positions, Trace

# With fewer responses on a side, a message says that the mean is uncertain.
FEW = 8


@dataclass(frozen=True)
class Plan:
    """The traces as spans of tokens, and what was counted on the way.

    Attributes:
        spans, owners: of each response its span and its trace.
        rows: of each response the row of the sums that it goes to. Every group has two, one for each half of its
            responses, so that it can be seen whether the halves agree.
        groups: (label, group), in order.
        provenance: how the spans were made.
        evidence: the rows of the evidence, in order; none if none is kept.
    """

    spans: Sequence[Span]
    owners: Sequence[Trace]
    rows: Sequence[int]
    groups: Sequence[tuple[Label, str]]
    counts: Mapping[str, Any]
    provenance: Mapping[str, Any]
    evidence: Sequence[EvidenceRow] = ()

    @cached_property
    def kept(self) -> dict[int, list[tuple[int, int]]]:
        """Response → (row of the evidence, part)."""
        kept: dict[int, list[tuple[int, int]]] = {}
        for i, row in enumerate(self.evidence):
            kept.setdefault(row.response, []).append((i, row.part))
        return kept


def part_of(span: Span, part: int, positions: Positions) -> range:
    """The positions of one of PARTS. The first part is the prompt's last position, whatever positions the means take.

    >>> [list(part_of(Span(tuple(range(20)), first=4, last=12), part, "predicting")) for part in range(3)]
    [[4], [5, 6, 7, 8, 9], [10, 11]]
    """
    start = span.first - (positions == "response")
    edges = (start, start + 1, min(start + FIRST, span.last), span.last)
    return range(edges[part], edges[part + 1])


def plan_pass(
    tokenizer: Any,
    traces: Sequence[Trace],
    *,
    chat: Chat,
    part: Part,
    positions: Positions,
    max_tokens: int,
    preserve: Collection[str] = (),
) -> Plan:
    """Every trace's span.

    Raises:
        TraceError: an item is not a Trace, a label has no trace with a response, or there is no group to preserve.
    """
    for trace in traces:
        if not isinstance(trace, Trace):
            raise TraceError(
                "a trace is not a Trace",
                got=repr(trace)[:80],
                fix="Make each with steer2edit.Trace(prompt, response, label), or read_traces(file).",
            )
    groups = sorted({(t.label, t.group) for t in traces})
    spans: list[Span] = []
    owners: list[Trace] = []
    counts: dict[str, Any] = {
        label: {"responses": 0, "tokens": 0, "groups": {}, "group_tokens": {}} for label in LABELS
    }
    skipped, cut = Counter[str](), Counter[str]()
    for trace in traces:
        span, was_cut = response_span(
            tokenizer, trace, chat=chat, part=part, positions=positions, max_tokens=max_tokens
        )
        cut[trace.label] += was_cut
        if span is None:
            skipped[trace.label] += 1
            continue
        spans.append(span)
        owners.append(trace)
        label = counts[trace.label]
        label["responses"] += 1
        label["tokens"] += span.last - span.first
        for what, more in (("groups", 1), ("group_tokens", span.last - span.first)):
            label[what][trace.group] = label[what].get(trace.group, 0) + more
    for name in LABELS:
        if not counts[name]["responses"]:
            raise TraceError(
                f"there is no {name} trace with a response",
                got=f"{sum(t.label == name for t in traces)} {name} traces, {skipped[name]} of them without "
                + ("a response" if part == "both" else f"the part {part!r}"),
                fix="Give both sides: responses that show the behaviour, and responses that don't.",
            )
    few = [f"{counts[name]['responses']} {name}" for name in LABELS if counts[name]["responses"] < FEW]
    if few:
        say(f"  only {' and '.join(few)} responses: so few say more about themselves than about the behaviour")
    counts["skipped_empty"], counts["cut_at_max_tokens"] = dict(skipped), dict(cut)
    rows = _rows(owners, groups)
    provenance = {
        "positions": positions,
        "part": part,
        "chat": dataclasses.asdict(chat)
        | {"stop": list(chat.stop), "template": _digest(chat.template or getattr(tokenizer, "chat_template", None))},
        "max_tokens": max_tokens,
    }
    evidence = _evidence_rows(spans, owners, preserve, positions)
    return Plan(spans, owners, rows, groups, counts, provenance, evidence)


def _evidence_rows(
    spans: Sequence[Span], owners: Sequence[Trace], preserve: Collection[str], positions: Positions
) -> list[EvidenceRow]:
    if not preserve:
        return []
    negative = sorted({trace.group for trace in owners if trace.label == "negative"})
    if unknown := sorted(set(preserve) - set(negative)):
        raise TraceError(
            "there is no such group of negative traces to preserve",
            got=unknown[0],
            fix=f"Groups with a response: {', '.join(negative)}.",
        )
    return [
        EvidenceRow(trace.label, trace.group, i, part)
        for i, (span, trace) in enumerate(zip(spans, owners, strict=True))
        if trace.label == "positive" or trace.group in preserve
        for part in range(len(PARTS))
        if part_of(span, part, positions)
    ]


def _rows(owners: Sequence[Trace], groups: Sequence[tuple[Label, str]]) -> list[int]:
    """For each response the number of its half: group i has the halves 2i and 2i + 1, which take turns."""
    number = {group: i for i, group in enumerate(groups)}
    seen = Counter[int]()
    rows = []
    for trace in owners:
        group = number[trace.label, trace.group]
        rows.append(2 * group + seen[group] % 2)
        seen[group] += 1
    return rows


def _digest(template: Any) -> str | None:
    # It tells a template from that of another revision, whatever system prompt the template brings.
    return hashlib.sha256(str(template).encode()).hexdigest()[:16] if template else None
