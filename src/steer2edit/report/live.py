"""What a run shows while it works: on a terminal one screen with its stages, a bar, the front so far and three answers;
plain lines elsewhere; nothing when quiet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..behaviours.base import UTILITY_LOSS, Measure
from ..method.rivals import RIVALS
from ..progress import Progress, Sample, columns, current_screen, is_quiet, on_a_terminal, say, showing, shown_on
from ..searching.candidates import BASELINES, TITLES, Trial
from ..searching.front import Aim, pareto
from ..searching.study import Study
from .front_table import front_table
from .page import describe
from .visible import one_line

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.segment import Segment
    from rich.text import Text

OnRound = Callable[[Study], None]
StageMark = Literal["done", "running", "failed", "waiting"]
OnStage = Callable[[str, StageMark], None]
_LABEL = "search"
# Rows of the front that are shown, spread evenly over it.
_ROWS = 8
_PER_SECOND = 4
_MARKS: dict[StageMark, tuple[str, str]] = {
    "done": ("✓", "green"),
    "running": ("●", "bold"),
    "failed": ("✗", "red"),
    "waiting": ("○", "dim"),
}
# How many characters of a prompt or an answer are looked at; more than three lines never fit.
_LOOKED_AT = 600
_ANSWERS = 3


class LiveScreen:
    """One screen for a whole run. Everything on it is cut to the size that the terminal has at that moment.

    Args:
        stages: their names, in order; none for a study alone.
    """

    def __init__(self, console: Console, stages: Sequence[str] = ()):
        from rich.progress import Progress as Bars

        self.console = console
        self.marks: dict[str, StageMark] = dict.fromkeys(stages, "waiting")
        self.bars = Bars(*columns(console.width), console=console, auto_refresh=False)
        self._ended: list[Any] = []
        self.samples: Sequence[Sample] = ()
        self.study: tuple[Study, Sequence[Measure], Aim] | None = None
        # The front is laid out once for a state of the study and a size of the terminal.
        self._rounds = 0
        self._front: tuple[tuple[int, int, int], list[list[Segment]]] | None = None

    def mark(self, stage: str, mark: StageMark) -> None:
        self.marks[stage] = mark

    @contextlib.contextmanager
    def bar(self, label: str) -> Iterator[Progress]:
        for ended in self._ended:
            self.bars.remove_task(ended)
        self._ended = []
        task = self.bars.add_task(f"  {label}", total=None)
        try:
            yield lambda done, total: self.bars.update(task, completed=done, total=total)
        finally:
            self._ended.append(task)  # it stands until the next one

    def show_answers(self, samples: Sequence[Sample]) -> None:
        self.samples = samples[:_ANSWERS]

    def show_front(self, study: Study, measures: Sequence[Measure], aim: Aim) -> None:
        self.study = study, measures, aim
        self._rounds += 1

    def finish(self) -> None:
        """Leaves the stages and the front on the terminal when the work ends; of a study alone, its bar too."""
        self.samples = ()
        for task in self.bars.task_ids if self.marks else ():
            self.bars.remove_task(task)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import SegmentLines

        options = options.update(height=None)
        lines: list[list[Segment]] = []
        if self.marks:
            lines += console.render_lines(self._stages(), options, pad=False)
        if self.bars.tasks:
            lines += console.render_lines(self.bars.get_renderable(), options, pad=False)
        # The cursor stands on a line of its own.
        room = max(0, console.height - 1 - len(lines))
        answers = self._answers(console, options, room)
        lines += self._front_lines(console, options, room - len(answers)) + answers
        yield SegmentLines(lines[: max(1, console.height - 1)], new_lines=True)

    def _stages(self) -> Text:
        from rich.text import Text

        line = Text()
        for name, mark in self.marks.items():
            sign, style = _MARKS[mark]
            # A space that does not break, so that a sign stays with its name.
            line.append(f"{sign}\u00a0{name}", style)
            line.append("  ")
        line.rstrip()
        return line

    def _answers(self, console: Console, options: ConsoleOptions, room: int) -> list[list[Segment]]:
        """The sample answers, each below its prompt if there is room, else on one line."""
        from rich.text import Text

        if not self.samples or room < len(self.samples):
            return []
        roomy = room >= 4 * len(self.samples)
        lines: list[list[Segment]] = []
        for sample in self.samples:
            prompt = one_line(sample.prompt[:_LOOKED_AT])
            answer = one_line(sample.answer[:_LOOKED_AT]) or "(empty)"
            who = one_line(f"{TITLES.get(sample.kind, sample.kind)} {describe(sample.config)}")
            texts = [Text(f"{who}: {prompt}", "dim"), Text(f"  {answer}")] if roomy else [Text(answer)]
            for text in texts:
                text.truncate(options.max_width - 1, overflow="ellipsis")
                text.no_wrap = True
                lines += console.render_lines(text, options, pad=False)[:1]
        return lines

    def _front_lines(self, console: Console, options: ConsoleOptions, room: int) -> list[list[Segment]]:
        """The fronts so far, with as many rows as there is room for."""
        if self.study is None:
            return []
        key = (self._rounds, options.max_width, room)
        if self._front is None or self._front[0] != key:
            self._front = key, self._laid_out(console, options, room)
        return self._front[1]

    def _laid_out(self, console: Console, options: ConsoleOptions, room: int) -> list[list[Segment]]:
        assert self.study is not None
        study, measures, aim = self.study
        trials = [trial for kind in ("edit", *BASELINES, *RIVALS) for trial in front(study, kind, aim)]
        title = f"Front on validation: {_counts(study)}"
        for count in range(len(trials), 0, -1):
            table = front_table(trials[:count], measures, options.max_width, title=title)
            lines = console.render_lines(table, options, pad=False)
            if len(lines) <= room:
                return lines
        return []


@contextlib.contextmanager
def live_screen(stages: Sequence[str] = ()) -> Iterator[OnStage]:
    """Opens the screen of a run, on a terminal. Yields what to call with a stage and how it stands."""
    if is_quiet() or not on_a_terminal():
        yield lambda stage, mark: None
        return
    with _opened(stages) as screen:
        yield screen.mark


@contextlib.contextmanager
def _opened(stages: Sequence[str]) -> Iterator[LiveScreen]:
    import sys

    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    screen = LiveScreen(console, stages)
    # What goes to stdout while the work goes on is a result, if stdout is not this terminal.
    with (
        Live(
            screen,
            console=console,
            refresh_per_second=_PER_SECOND,
            vertical_overflow="crop",
            redirect_stdout=sys.stdout.isatty(),
        ),
        shown_on(screen),
    ):
        try:
            yield screen
        finally:
            screen.finish()


@contextlib.contextmanager
def watching(measures: Sequence[Measure], aim: Aim) -> Iterator[tuple[Progress, OnRound]]:
    """Gives what to call with (steps done, in all), and what to call with the study after each round.

    Args:
        measures: the table's columns, those of them that were measured.
    """
    if is_quiet() or not on_a_terminal():
        with showing(_LABEL) as progress:
            yield progress, lambda study: say(f"  {_line(study, aim)}")
        return
    screen: Any = current_screen()
    opened = _opened(()) if screen is None else contextlib.nullcontext(screen)
    with opened as screen, screen.bar(_LABEL) as progress:
        yield progress, lambda study: screen.show_front(study, measures, aim)


def _line(study: Study, aim: Aim) -> str:
    """What was tried, and the far end of the edits' front."""
    edits = front(study, "edit", aim)
    if not edits:
        return _counts(study)
    word = "highest" if aim.attribute.better == "higher" else "lowest"
    attribute, cost = edits[-1].mean(aim.attribute.name), edits[-1].mean(UTILITY_LOSS.name)
    return f"{_counts(study)}; {word} {aim.attribute.title} {attribute:.2f} at {UTILITY_LOSS.title} {cost:.2f}"


def _counts(study: Study) -> str:
    tried = [f"{len(some)} {TITLES[kind]}" for kind in TITLES if kind != "base" and (some := study.of_kind(kind))]
    return f"tried {', '.join(reversed(tried)) or 'nothing'}; {len(study.discarded)} discarded"


def front(study: Study, kind: str, aim: Aim) -> list[Trial]:
    """Its Pareto front so far, whatever the limits, at most this many rows of it."""
    whole = pareto(study.of_kind(kind), aim)
    if len(whole) <= _ROWS:
        return whole
    return [whole[round(i * (len(whole) - 1) / (_ROWS - 1))] for i in range(_ROWS)]
