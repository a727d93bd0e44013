"""Traces: what a model or a person answered, and which side of a behaviour the answer shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import TraceError
from ..files.reading import numbered_jsonl
from ..files.writing import write_jsonl

Label = Literal["positive", "negative"]

LABELS: tuple[Label, ...] = get_args(Label)

Positions = Literal["predicting", "response"]

# Which part of a thinking model's response counts.
Part = Literal["both", "thinking", "answer"]


@dataclass(frozen=True)
class Trace:
    """One response to one prompt.

    A label's mean is the mean over its groups of each group's mean over responses, so groups weigh alike whatever their
    sizes.

    Attributes:
        prompt: the user's text, or a list of chat messages ({"role": …, "content": …}).
        response: the answer's text, without an end-of-turn token.
        label: "positive" shows the behaviour, "negative" does not.
        system: a system prompt, if any.
        group: the part of its label's set that the trace belongs to.
        source: where the trace came from, for people.
        answer_start: the character of the response at which the answer starts, after a model's thinking; 0 without any.

    Raises:
        TraceError: the label is neither of the two, or the prompt or the response has another type.

    >>> Trace("How are you?", "Fine.", "positive").messages()
    [{'role': 'user', 'content': 'How are you?'}]
    """

    prompt: str | Sequence[Mapping[str, str]]
    response: str
    label: Label
    system: str | None = None
    group: str = ""
    source: str = ""
    answer_start: int = 0

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise TraceError("a trace has no such label", got=repr(self.label), fix=f"Use {' or '.join(LABELS)}.")
        if not is_prompt(self.prompt):
            raise TraceError(
                "a trace's prompt is neither a text nor a list of messages",
                got=repr(self.prompt)[:80],
                fix='Give a text, or messages like {"role": "user", "content": "…"}.',
            )
        if not isinstance(self.response, str):
            raise TraceError("a trace's response is not a text", got=type(self.response).__name__, fix="Give a text.")

    def messages(self) -> list[dict[str, str]]:
        given = [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else map(dict, self.prompt)
        return ([{"role": "system", "content": self.system}] if self.system is not None else []) + list(given)


def write_traces(path: str | Path, traces: Iterable[Trace]) -> None:
    """Writes JSON Lines, one trace per line. Fields that hold their default are left out.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_traces(f"{folder}/traces.jsonl", [Trace("How are you?", "Fine.", "positive")])
    ...     print(Path(f"{folder}/traces.jsonl").read_text(), end="")
    {"prompt": "How are you?", "response": "Fine.", "label": "positive"}
    """
    defaults = {"system": None, "group": "", "source": "", "answer_start": 0}
    write_jsonl(path, ({k: v for k, v in vars(t).items() if (k, v) not in defaults.items()} for t in traces))


def read_traces(path: str | Path) -> list[Trace]:
    """Reads JSON Lines, one trace per line.

    Raises:
        TraceError: a line is not a trace. FileError: a line is not a JSON object. Both name the line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_traces(f"{folder}/traces.jsonl", [Trace("How are you?", "Fine.", "positive")])
    ...     read_traces(f"{folder}/traces.jsonl")[0].response
    'Fine.'
    """
    traces = []
    for number, row in numbered_jsonl(path):
        unknown = set(row) - set(Trace.__dataclass_fields__)
        missing = {"prompt", "response", "label"} - set(row)
        if unknown or missing:
            raise TraceError(
                f"line {number} of {path} is not a trace",
                got=f"missing {sorted(missing)}, unknown {sorted(unknown)}",
                fix='Write {"prompt": …, "response": …, "label": "positive" or "negative"} and no other keys.',
            )
        if row["label"] not in LABELS:
            raise TraceError(
                f"line {number} of {path} has an unknown label", got=repr(row["label"]), fix=f"Use one of {LABELS}."
            )
        texts = [row["response"], row.get("group", ""), row.get("source", ""), row.get("system") or ""]
        start = row.get("answer_start", 0)
        fits = type(start) is int and isinstance(row["response"], str) and 0 <= start <= len(row["response"])
        if not all(isinstance(text, str) for text in texts) or not is_prompt(row["prompt"]) or not fits:
            raise TraceError(
                f"line {number} of {path} holds a value of the wrong type",
                got=repr({k: type(v).__name__ for k, v in row.items()}),
                fix="A prompt is a text or a list of {role, content} messages, answer_start the number of one of the "
                "response's characters; everything else is a text.",
            )
        traces.append(Trace(**row))
    return traces


def is_prompt(value: Any) -> bool:
    """Whether a value from a file is a prompt: a text, or a list of messages with role and content."""

    def is_message(m: Any) -> bool:
        return isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))

    return isinstance(value, str) or (isinstance(value, list) and len(value) > 0 and all(map(is_message, value)))
