"""Brevity, the paper's reasoning efficiency: the model reaches its answer in fewer tokens.

Traces are the model's own answers, the shortest share of them positive and the longest negative. The attribute is the
mean number of generated tokens; the share that ended and the accuracy say what that cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ..engines.base import Answer, Engine, Progress, Request
from ..errors import TraceError
from ..files.reading import sha256
from ..files.schema import Many, _number
from ..method.intervention import NOTHING
from ..probing.traces import LABELS, Trace
from ..progress import say
from .base import AUTOMATIC, Behaviour, Item, Measure, Outcome, Source, Split
from .mathematics import is_right
from .prompts import data_path
from .questions import Row, read_rows, rows_of

PROBLEM = "problem"
ENDED = Measure("ended", "ended", better="higher", worst=0.0, best=1.0)
CORRECT = Measure("correct", "correct", better="higher", worst=0.0, best=1.0)
CORRECT_LOSS = Measure("correct_loss", "correct, lost", limit=0.1, rate=False, column=False)
THINKING = Measure("thinking_tokens", "tokens of thinking", rate=False, worst=1.0, best=0.0)
ANSWER = Measure("answer_tokens", "tokens of the answer", rate=False, worst=1.0, best=0.0)
INSTRUCTIONS = ("Be brief. Give the answer in as few words as you can.", "Answer with one short calculation, no more.")


class Brevity(Behaviour):
    """The recipe's section. `data.prompts` is a file with `question` and `answer`.

    Attributes:
        share: which share of the model's own answers is positive (the shortest) and which negative (the longest).
        correct_only: take correct answers alone.
        new_tokens: where the model's own answers are cut, those of the traces. An answer that was cut does not count
            as a short one.
        longest: the number of tokens at the end of the scale from worst to best; the recipe's evaluation.new_tokens.
    """

    kinds: ClassVar[tuple[str, ...]] = (PROBLEM,)
    required: ClassVar[tuple[str, ...]] = (PROBLEM,)
    probe_kinds: ClassVar[tuple[str, ...]] = (PROBLEM,)
    neutral_prompts: ClassVar[str | None] = "builtin:neutral_prompts"
    prompts: ClassVar[str | None] = "builtin:word_problems"
    evaluation: ClassVar[Mapping[str, Any]] = {"utility_prompts": 8, "utility_tokens": 32}
    limits: ClassVar[Mapping[str, float]] = {"utility_loss": 0.45}
    search: ClassVar[Mapping[str, Any]] = AUTOMATIC
    divides: ClassVar[bool] = True
    second_file: ClassVar[bool] = True
    remark: ClassVar[str] = "Shorter answers may leave out what a reader needs: see the accuracy."

    name: Literal["brevity"] = "brevity"
    share: Annotated[float, Field(gt=0, le=0.5), BeforeValidator(_number)] = 0.05
    correct_only: bool = False
    new_tokens: Many = 256
    longest: Many = 256

    @property
    def attribute(self) -> Measure:
        return Measure("tokens", "tokens", worst=float(self.longest), best=0.0, rate=False)

    @property
    def costs(self) -> tuple[Measure, ...]:
        return (CORRECT, ENDED, CORRECT_LOSS, THINKING, ANSWER)

    def asking(self) -> list[str]:
        return list(INSTRUCTIONS) if self.instructions is None else self.instructions

    def items(self, source: Source, split: Split) -> list[Item]:
        rows = rows_of(source, PROBLEM, _read)[split]
        return [Item(PROBLEM, row.question, target=row.values.get("answer")) for row in rows]

    def measure(self, item: Item, outcome: Outcome, base: Outcome) -> Mapping[str, float]:
        """Tokens are those that the engine made, whether the answer ended or was cut."""
        values = {"tokens": float(outcome.tokens), ENDED.name: float(outcome.ended)}
        if outcome.thinking or base.thinking:
            values |= {
                THINKING.name: float(outcome.thinking),
                ANSWER.name: float(outcome.tokens - outcome.thinking),
            }
        if item.target is None:
            return values
        right = float(is_right(outcome.answer, str(item.target)))
        base_right = float(is_right(base.answer, str(item.target)))
        return values | {CORRECT.name: right, CORRECT_LOSS.name: base_right - right}

    def make_traces(self, engine: Engine, items: Sequence[Item], progress: Progress | None = None) -> list[Trace]:
        """The shortest and the longest of the model's own answers.

        Raises:
            TraceError: there are too few to have both.
        """
        requests = [Request(engine.tokens(item.messages(self.system))) for item in items]
        answers = engine.generate(requests, [NOTHING], self.new_tokens, progress)
        kept = [(item, answer) for item, answer in zip(items, answers, strict=True) if self._counts(item, answer)]
        kept.sort(key=lambda pair: len(pair[1].ids))
        ended = [pair for pair in kept if pair[1].ended]
        # The small term is for shares like 0.29, whose product with 100 is a little below 29.
        count = min(max(1, int(self.share * len(kept) + 1e-9)), max(1, len(ended)))
        shortest, longest = ended[:count], kept[-count:]
        if len(kept) < 2 * count or not shortest or len(shortest[-1][1].ids) >= len(longest[0][1].ids):
            raise TraceError(
                "there is no contrast between short and long answers",
                got=f"{len(kept)} answers, {len(ended)} of which ended",
                fix="Give more probe questions, a larger behaviour.share, or a larger behaviour.new_tokens.",
            )
        short = sum(len(answer.ids) for _, answer in shortest) / len(shortest)
        long = sum(len(answer.ids) for _, answer in longest) / len(longest)
        say(f"  of {len(kept)} answers the {count} shortest have {short:.0f} tokens on average, the longest {long:.0f}")
        return [
            Trace(item.prompt, answer.text, label, self.system, "", f"own, {len(answer.ids)} tokens", answer.start)
            for label, side in zip(LABELS, (shortest, longest), strict=True)
            for item, answer in side
        ]

    def answers_kept(self, items: Sequence[Item]) -> int:
        return 2 * max(1, int(self.share * len(items)))

    def _counts(self, item: Item, answer: Answer) -> bool:
        said = answer.text[answer.start :]
        return bool(answer.ids) and (not self.correct_only or is_right(said, str(item.target)))


def _fits(row: Mapping[str, Any]) -> bool:
    answer = row.get("answer")
    return isinstance(answer, str) and bool(answer.strip())


@lru_cache(maxsize=4)
def _cached(path: str, digest: str) -> list[Row]:
    return read_rows(path, 'a row like {"question": …, "answer": "42"}', _fits)


def _read(path: str) -> list[Row]:
    return _cached(path, sha256(data_path(path)))
