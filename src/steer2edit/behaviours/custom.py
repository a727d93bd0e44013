"""A behaviour of one's own, without code: two sides that contrast, and a score.

The sides are files of responses, or two instructions under which a model answers the same prompts. Some of the
prompts give the traces; the score of the model's answers to the others says how much of the behaviour it shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, SerializeAsAny, model_validator

from ..engines.base import Engine, Progress
from ..errors import RecipeError, TraceError
from ..files.reading import sha256
from ..files.schema import Many, Text
from ..probing.traces import Label, Trace
from ..progress import say
from .base import AUTOMATIC, SPLITS, WEAK_AGREEMENT, Behaviour, Item, Measure, Outcome, Source, Split
from .contrast import Pair, Side, divided, divided_files, read_pairs, read_prompts
from .measures import MARGIN, PREFERENCE, Length, Python, Score, score_of
from .prompts import BUILTIN, data_path, key_of
from .writers import write_responses

# The kinds of items: prompts that are answered, and pairs of responses of which the model prefers one.
PROMPT, PAIR = "prompt", "pair"
# How many prompts are answered beside pairs to compare: enough to see a model that is broken, and so many that one
# degenerate answer is within the usual limit of 0.1.
_OPEN: Mapping[Split, int] = {"validation": 10, "test": 24}
# Every candidate reads each pair on validation: more of them cost more than they tell.
_PAIRS = 12
EVERYDAY = "builtin:everyday_prompts"


class Custom(Behaviour):
    """The recipe's section.

    Attributes:
        title: what the behaviour is called in tables.
        more, less: where the responses come from that show the behaviour, and those that don't.
        score: what says how much of it a model shows; "preference": the share of unseen prompts on which the response
            of `more` has the higher log-probability per token than that of `less`.
        new_tokens: where responses are cut that a model writes.
        keep_instruction: whether traces keep the instruction that they were written under as their system prompt.
        weak_contrast: what happens if the answers under the two instructions do not differ: "stop" or "go on".
    """

    kinds: ClassVar[tuple[str, ...]] = (PROMPT,)
    required: ClassVar[tuple[str, ...]] = (PROMPT,)
    probe_kinds: ClassVar[tuple[str, ...]] = (PROMPT,)
    neutral_prompts: ClassVar[str | None] = "builtin:neutral_prompts"
    evaluation: ClassVar[Mapping[str, Any]] = {"utility_prompts": 8, "utility_tokens": 32}
    limits: ClassVar[Mapping[str, float]] = {"utility_loss": 0.45}
    search: ClassVar[Mapping[str, Any]] = AUTOMATIC
    divides: ClassVar[bool] = True
    second_file: ClassVar[bool] = True
    completes: ClassVar[bool] = True

    name: Literal["custom"] = "custom"
    title: Text = "behaviour shown"
    more: Side
    less: Side
    score: Annotated[Literal["preference"] | SerializeAsAny[Score], BeforeValidator(score_of)] = "preference"
    new_tokens: Many = 48
    keep_instruction: bool = False
    weak_contrast: Literal["stop", "go on"] = "stop"

    @model_validator(mode="after")
    def _sides_differ(self) -> Custom:
        if (self.more.file is None) != (self.less.file is None):
            raise ValueError("Give both sides in the same way: two system prompts, or two files")
        same_model = (self.more.model, self.more.endpoint) == (self.less.model, self.less.endpoint)
        if self.more.system is not None and self.more.system == self.less.system and same_model:
            raise ValueError("more and less are the same: give instructions that differ")
        return self

    @property
    def attribute(self) -> Measure:
        if isinstance(self.score, Score):
            return self.score.measure(self.title)
        return Measure(PREFERENCE, f"prefers {self.title}", better="higher", worst=0.0, best=1.0)

    @property
    def costs(self) -> tuple[Measure, ...]:
        return () if isinstance(self.score, Score) else (MARGIN,)

    @property
    def ranked(self) -> Measure:
        return self.attribute if isinstance(self.score, Score) else MARGIN

    @property
    def files(self) -> tuple[str, ...]:
        named = [name for name in (self.more.file, self.less.file) if name is not None and not name.startswith(BUILTIN)]
        code = [self.score.python.rpartition(":")[0]] if isinstance(self.score, Python) else []
        return (*super().files, *named, *code)

    @property
    def runs_code(self) -> bool:
        return isinstance(self.score, Python)

    def asking(self) -> list[str]:
        """The instruction of `more`; of a file the title alone says what to ask for."""
        if self.instructions is not None:
            return self.instructions
        return [self.more.system or f"Answer in this manner, whatever is asked: {self.title}."]

    # Items ---------------------------------------------------------------------------------------------------------

    def items(self, source: Source, split: Split) -> list[Item]:
        """A prompt that is answered, and with "preference" a pair of responses to compare, for each of the split's."""
        counts = {name: None if of is None else of[PROMPT] for name, of in source.counts.items()}
        # With prompts of their own the counts are of those; the files are then divided by share.
        own_prompts = source.prompts is not None
        of_files = self._of_files(dict.fromkeys(SPLITS) if own_prompts else counts, source.seed, own_prompts)
        prompts = of_files
        if source.prompts is not None or self.more.file is None:
            path = data_path(source.prompts or EVERYDAY)
            prompts = _divided_prompts(path, source, counts)
            _refuse_seen(of_files.get("probe", []), prompts)
        elif "validation" not in of_files:
            raise RecipeError(
                "there are no unseen prompts to measure on",
                got=f"{self.more.file} and {self.less.file} share no prompt",
                fix="Give data.prompts, or let the files answer the same prompts.",
            )
        if split == "probe":
            return [_item(PAIR, pair) for pair in (of_files or prompts)[split]]
        opened = [_item(PROMPT, pair) for pair in prompts[split]]
        if isinstance(self.score, Score):
            return opened
        pairs = [_item(PAIR, pair) for pair in (of_files or prompts)[split]]
        return [*opened[: _OPEN[split]], *(pairs[:_PAIRS] if split == "validation" else pairs)]

    def _of_files(self, counts: Mapping[Split, int | None], seed: int, own_prompts: bool) -> dict[Split, list[Pair]]:
        """The files' pairs by split; none if the sides are no files. Only pairs that both sides answer are compared.

        Args:
            own_prompts: whether there are other prompts to measure on. Then every pair that no measure needs is used
                for traces.
        """
        if self.more.file is None or self.less.file is None:
            return {}
        pairs = read_pairs(self.more.file, self.less.file)
        whole = [pair for pair in pairs if pair.is_whole and pair.more != pair.less]
        alone = [pair for pair in pairs if not pair.is_whole and pair.split in (None, "probe")]
        if own_prompts and isinstance(self.score, Score):
            return {"probe": [pair for pair in whole if pair.split in (None, "probe")] + alone}
        if not whole:
            if isinstance(self.score, Score):
                return {"probe": alone}
            raise TraceError(
                "preference compares two responses to the same prompt",
                got="no prompt that both files answer",
                fix="Let the files answer the same prompts, or give another behaviour.score.",
            )
        split = divided(whole, counts, seed, f"the prompts that {self.more.file} and {self.less.file} share")
        return {**split, "probe": [*split["probe"], *alone]}

    def completed(self, engine: Engine, items: Sequence[Item], progress: Progress | None = None) -> list[Item]:
        """The pairs with both sides' responses as their choices; without those whose two responses are the same."""
        waiting = [item for item in items if item.kind == PAIR and not item.choices]
        if not waiting:
            return list(items)
        more, less = self._written(engine, waiting, progress)
        choices = {id(item): pair for item, *pair in zip(waiting, more, less, strict=True)}
        differing = {key for key, (a, b) in choices.items() if a.strip() and b.strip() and a != b}
        if left_out := len(waiting) - len(differing):
            say(f"  {left_out} of {len(waiting)} prompts have an empty answer, or the same on both sides: left out")
        if not differing:
            raise TraceError(
                "the two sides answer alike", got=f"{len(waiting)} prompts without a difference", fix=_WHAT_TO_DO
            )
        completed = []
        for item in items:
            if id(item) in differing:
                completed.append(Item(PAIR, item.prompt, tuple(choices[id(item)])))
            elif id(item) not in choices:
                completed.append(item)
        return completed

    def _written(
        self, engine: Engine, items: Sequence[Item], progress: Progress | None = None
    ) -> tuple[list[str], list[str]]:
        """What each side answers."""
        prompts = [item.prompt for item in items]
        more = write_responses(engine, self.more, prompts, self.system, self.new_tokens, progress)
        less = write_responses(engine, self.less, prompts, self.system, self.new_tokens, progress)
        return more, less

    # Traces --------------------------------------------------------------------------------------------------------

    def answers_wanted(self, items: Sequence[Item]) -> int:
        return 0 if self.more.file is not None else 2 * len(items)

    def given_responses(self, items: Sequence[Item]) -> tuple[list[str], list[str]]:
        if self.more.file is None:
            return [], []
        more, less = zip(*(item.target for item in items), strict=True) if items else ((), ())
        return [text for text in more if text is not None], [text for text in less if text is not None]

    def choices_of(self, item: Item) -> int:
        return 2 if item.kind == PAIR else 0

    def make_traces(self, engine: Engine, items: Sequence[Item], progress: Progress | None = None) -> list[Trace]:
        """Also measures, where a model wrote the responses, whether the two sides differ in the behaviour.

        Raises:
            TraceError: they do not.
        """
        if self.more.file is not None:
            return [
                Trace(item.prompt, response, label, self.system, source=f"{side}, a file")
                for item in items
                for label, side, response in zip(_LABELS, ("more", "less"), item.target, strict=True)
                if response is not None
            ]
        more, less = self._written(engine, items, progress)
        traces: list[Trace] = []
        for item, *pair in zip(items, more, less, strict=True):
            for label, side, response in zip(_LABELS, (self.more, self.less), pair, strict=True):
                system = side.system if self.keep_instruction else self.system
                traces.append(Trace(item.prompt, response, label, system, source=f"{label}, written"))
        self._check_scores(engine, items, more, less)
        return traces

    def _check_scores(self, engine: Engine, items: Sequence[Item], more: Sequence[str], less: Sequence[str]) -> None:
        """Says how the two sides score, and stops if they do not differ beyond chance."""
        if not isinstance(self.score, Score):
            alike = sum(a == b for a, b in zip(more, less, strict=True))
            if alike:
                say(f"  {alike} of {len(items)} answers are the same under both instructions")
            return
        asked = [
            (item, Outcome(text, tokens=len(engine.tokenizer(text, add_special_tokens=False)["input_ids"])))
            for side in (more, less)
            for item, text in zip(items, side, strict=True)
        ]
        counted = self.score.counted(asked)
        high, low = counted[: len(items)], counted[len(items) :]
        measure = self.attribute
        shown = [sum(side) / len(side) for side in (high, low)]
        say(
            f"  {measure.title}: {shown[0]:.2f} under `more`, {shown[1]:.2f} under `less`, of {len(items)} answers each"
        )
        gains = [measure.gain(a) - measure.gain(b) for a, b in zip(high, low, strict=True)]
        mean = sum(gains) / len(gains)
        error = (sum((gain - mean) ** 2 for gain in gains) / max(1, len(gains) - 1) / len(gains)) ** 0.5
        if mean - 1.96 * error > 0 or self.weak_contrast == "go on":
            return
        raise TraceError(
            f"the model does not follow the two instructions: there is no contrast in {measure.title}",
            got=f"{shown[0]:.2f} under `more` and {shown[1]:.2f} under `less`, of {len(items)} answers each"
            f"{self._cut(asked)}",
            fix=_WHAT_TO_DO,
        )

    def _cut(self, asked: Sequence[tuple[Item, Outcome]]) -> str:
        """Of a score that counts tokens how many answers were cut, since those all count the same."""
        cut = sum(outcome.tokens >= self.new_tokens for _, outcome in asked)
        if not isinstance(self.score, Length) or not cut:
            return ""
        return f"; {cut} of {len(asked)} were cut at {self.new_tokens} tokens, which behaviour.new_tokens raises"

    def check_contrast(self, agreement: float) -> None:
        """Checks responses that a model made under two instructions; written ones are as their author wants them."""
        if self.more.file is not None or self.weak_contrast == "go on" or agreement >= WEAK_AGREEMENT:
            return
        raise TraceError(
            "the model does not follow the two instructions: its answers under them differ by chance",
            got=f"the steering vectors of two halves of the answers have a cosine of {agreement:.2f}",
            fix=_WHAT_TO_DO,
        )

    # Measures ------------------------------------------------------------------------------------------------------

    def measure(self, item: Item, outcome: Outcome, base: Outcome) -> Mapping[str, float]:
        return self.measure_all([(item, outcome, base)])[0]

    def measure_all(
        self, asked: Sequence[tuple[Item, Outcome, Outcome]], progress: Progress | None = None
    ) -> list[Mapping[str, float]]:
        if isinstance(self.score, Score):
            name = self.attribute.name
            return [{name: x} for x in self.score.counted([(item, outcome) for item, outcome, _ in asked], progress)]
        return [_preferred(item, outcome) for item, outcome, _ in asked]


_LABELS: tuple[Label, Label] = ("positive", "negative")
_WHAT_TO_DO = (
    "Give files of responses (more.file, less.file), let a larger model write them (more.model, less.model), or write"
    " instructions that this model can follow; behaviour.weak_contrast: go on searches all the same."
)


def _item(kind: str, pair: Pair) -> Item:
    if kind == PAIR and pair.is_whole:
        return Item(kind, pair.prompt, (str(pair.more), str(pair.less)), [pair.more, pair.less])
    return Item(kind, pair.prompt, target=[pair.more, pair.less] if kind == PAIR else None)


def _preferred(item: Item, outcome: Outcome) -> dict[str, float]:
    """Whether a pair's first response is likelier per token, and by how much; nothing for an open answer."""
    if item.kind != PAIR:
        return {}
    more, less = outcome.nll
    return {PREFERENCE: float(more < less), MARGIN.name: less - more}


@lru_cache(maxsize=8)
def _read_prompts(path: str, digest: str) -> list[Pair]:
    return read_prompts(path)


def _divided_prompts(path: str, source: Source, counts: Mapping[Split, int | None]) -> dict[Split, list[Pair]]:
    """The prompts of each split."""
    pairs, name = _read_prompts(path, sha256(path)), Path(path).name
    if source.test_prompts is None:
        return divided(pairs, counts, source.seed, name)
    test = data_path(source.test_prompts)
    others = _read_prompts(test, sha256(test))
    return divided_files(pairs, others, counts, source.seed, (name, Path(test).name), lambda p: key_of(p.prompt))


def _refuse_seen(probe: Sequence[Pair], prompts: Mapping[Split, Sequence[Pair]]) -> None:
    """Raises RecipeError if a prompt that is measured on has a response among the traces."""
    seen = {key_of(pair.prompt) for pair in probe}
    for split in ("validation", "test"):
        both = [pair for pair in prompts[split] if key_of(pair.prompt) in seen]
        if both:
            raise RecipeError(
                f"data.prompts repeats prompts of the files of responses in {split}",
                got=f"{len(both)}, such as {key_of(both[0].prompt)[:60]!r}",
                fix="Take them out of data.prompts: what traces are made of must not be measured on.",
            )
