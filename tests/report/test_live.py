"""What a study shows while it runs: on a terminal, in a log, in a file."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest
from rich.cells import cell_len
from rich.console import Console

from runs import tiny_recipe
from steer2edit.behaviours.safety import Safety
from steer2edit.progress import Sample, be_quiet, current_screen, say, showing
from steer2edit.report.front_table import front_table
from steer2edit.report.live import LiveScreen, front, live_screen, watching
from steer2edit.searching.candidates import Candidate, Trial, asked, directed, edited, steered, steered_at
from steer2edit.searching.study import Discarded, Study

AIM = tiny_recipe().aim


def _trial(candidate: Candidate, refusal: float, cost: float | None, over_refusal: float | None = 0.125) -> Trial:
    means = {"refusal": refusal, "over_refusal": over_refusal, "degenerate": 0.0, "utility_loss": cost}
    return Trial(candidate, {name: (mean,) for name, mean in means.items()}, "0")


def _study() -> Study:
    return Study(
        [
            _trial(steered(0.4), 0.25, 0.5),
            _trial(edited(0.1, None, 0.2), 0.75, 0.625),
            _trial(edited(0.3, None, 0.2), 0.5, 0.25, None),
            _trial(edited(0.9, None, 0.2, "1-2", "l0"), 0.375, 0.375),  # beaten
        ],
        [Discarded(edited(0.05, None, 0.2), "it loops")],
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _watch(study: Study | None) -> None:
    with watching(Safety().measures, AIM) as (progress, on_round):
        progress(3, 40)
        if study:
            on_round(study)
        progress(40, 40)


def _on_a_terminal(monkeypatch: pytest.MonkeyPatch, study: Study | None) -> str:
    """What a terminal is sent, without colours and movements."""
    screen = Terminal()
    with monkeypatch.context() as patch:
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "120"), ("LINES", "50")):
            patch.setenv(name, value)
        patch.setattr(sys, "stderr", screen)
        _watch(study)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())


def test_a_quiet_study_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    be_quiet()
    _watch(_study())
    assert capsys.readouterr() == ("", "")


def test_a_quiet_study_prints_nothing_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    be_quiet()
    assert _on_a_terminal(monkeypatch, _study()) == ""


def test_in_a_log_each_round_is_a_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    _watch(_study())
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "  tried 3 edit, 1 steering; 1 discarded; highest refusal (harmful) 0.75 at KL per token 0.62",
    ]


def test_in_a_log_a_round_without_a_front_is_only_counted(capsys: pytest.CaptureFixture[str]) -> None:
    _watch(Study([_trial(edited(0.1, None, 0.2), 0.5, None)]))
    assert capsys.readouterr().err.splitlines() == ["  tried 1 edit; 0 discarded"]


def test_on_a_terminal_a_table_shows_the_fronts_of_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = _on_a_terminal(monkeypatch, _study())
    assert "search" in shown
    assert "40/40" in shown
    assert "Front on validation: tried 3 edit, 1 steering; 1 discarded" in shown
    assert _rows(shown)[-3:] == [  # the table is drawn anew every time
        ["ρ_attn 0.3, ρ_mlp off, α 0.2", "0.50", "–", "0.00", "0.25"],
        ["ρ_attn 0.1, ρ_mlp off, α 0.2", "0.75", "0.12", "0.00", "0.62"],
        ["γ 0.4", "0.25", "0.12", "0.00", "0.50"],
    ]
    assert "layers" not in shown  # beaten
    assert capsys.readouterr().out == ""


def _rows(shown: str) -> list[list[str]]:
    """The rows of tables: their cells stand two spaces apart, and the last one is a number."""
    lines = [re.split(" {2,}", line.strip()) for line in shown.splitlines()]
    return [cells for cells in lines if len(cells) > 2 and re.fullmatch(r"[\d.]+|–", cells[-1])]


def _with_baselines() -> Study:
    study = _study()
    study.trials += [
        _trial(asked(0, "Refuse everything."), 0.875, 0.5),
        _trial(asked(1, "Decline."), 0.5, 0.75),  # beaten
        _trial(steered_at(7, 0.4), 0.125, 0.25),
        _trial(steered_at(9, 1.2), 0.625, 0.375),
        _trial(directed(7, 1.0), 0.25, 0.125),
    ]
    return study


def test_every_baseline_is_counted_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    _watch(_with_baselines())
    (line,) = capsys.readouterr().err.splitlines()
    counts = "tried 3 edit, 1 direction, 2 one layer, 1 steering, 2 system prompt; 1 discarded"
    # The far end is the edits', whatever the others reach.
    assert line == f"  {counts}; highest refusal (harmful) 0.75 at KL per token 0.62"


def test_on_a_terminal_the_front_of_every_baseline_is_shown_below_the_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _on_a_terminal(monkeypatch, _with_baselines())
    rows = [(row[0], row[1], row[-1]) for row in _rows(shown)[-7:]]
    assert rows == [
        ("ρ_attn 0.3, ρ_mlp off, α 0.2", "0.50", "0.25"),
        ("ρ_attn 0.1, ρ_mlp off, α 0.2", "0.75", "0.62"),
        ("“Refuse everything.”", "0.88", "0.50"),
        ("γ 0.4", "0.25", "0.50"),
        ("layer 7, γ 0.4", "0.12", "0.25"),
        ("layer 9, γ 1.2", "0.62", "0.38"),
        ("layer 7, γ 1", "0.25", "0.12"),
    ]
    assert "Decline" not in shown


def test_before_the_first_round_there_is_only_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _on_a_terminal(monkeypatch, None)
    assert "40/40" in shown
    assert "Front" not in shown


def test_of_a_long_front_eight_rows_are_shown_from_end_to_end() -> None:
    study = Study([_trial(edited(0.01 * (i + 1), None, 0.2), 0.02 * i, 0.1 * i) for i in range(29)])
    assert [round((t.mean("utility_loss") or 0.0) * 10) for t in front(study, "edit", AIM)] == [
        0,
        4,
        8,
        12,
        16,
        20,
        24,
        28,
    ]
    assert len(front(Study(study.trials[:8]), "edit", AIM)) == 8
    assert front(study, "steering", AIM) == []


# The screen of a whole run -------------------------------------------------------------------------------------------

HOSTILE = "\x1b[2J\x1b[31mred\x1b]0;title\x07\x9b31m\u202egnp.exe\u2066\r\b\x00\u2028[bold]x[/bold]"
STAGES = ("traces", "probe", "search", "report")


def _screen(width: int, height: int, **variables: str) -> tuple[LiveScreen, Console]:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, _environ=variables)
    return LiveScreen(console, STAGES), console


def _drawn(screen: LiveScreen, console: Console) -> list[str]:
    """The lines of the screen, without colours."""
    with console.capture() as capture:
        console.print(screen)
    text = re.sub(r"\x1b\[[0-9;]*m", "", capture.get())
    assert "\x1b" not in text
    return text.removesuffix("\n").split("\n")


def _samples(*answers: str) -> list[Sample]:
    config = edited(0.1, None, 0.2).config
    return [Sample("edit", config, f"Prompt {i}?", answer) for i, answer in enumerate(answers)]


def test_the_screen_has_the_stages_a_bar_the_front_and_three_answers() -> None:
    screen, console = _screen(120, 40)
    screen.mark("traces", "done")
    screen.mark("probe", "failed")
    screen.mark("search", "running")
    screen.show_front(_study(), Safety().measures, AIM)
    screen.show_answers(_samples("One.", "Two.", "", "Four."))
    with screen.bar("search") as progress:
        progress(3, 40)
        lines = _drawn(screen, console)
    assert lines[0] == "✓\u00a0traces  ✗\u00a0probe  ●\u00a0search  ○\u00a0report"
    assert lines[1].startswith("  search ")
    assert "3/40" in lines[1]
    assert lines[2].strip() == "Front on validation: tried 3 edit, 1 steering; 1 discarded"
    assert [row[0] for row in _rows("\n".join(lines))] == [
        *("ρ_attn 0.3, ρ_mlp off, α 0.2", "ρ_attn 0.1, ρ_mlp off, α 0.2", "γ 0.4")
    ]
    assert [line.rstrip() for line in lines[-6:]] == [
        "edit ρ_attn 0.1, ρ_mlp off, α 0.2: Prompt 0?",
        "  One.",
        "edit ρ_attn 0.1, ρ_mlp off, α 0.2: Prompt 1?",
        "  Two.",
        "edit ρ_attn 0.1, ρ_mlp off, α 0.2: Prompt 2?",
        "  (empty)",
    ]
    screen.finish()
    assert all("Prompt" not in line and "3/40" not in line for line in _drawn(screen, console))


@pytest.mark.parametrize("text", [HOSTILE, HOSTILE * 3000, "x" * 100_000, "\n" * 100_000, "🙂" * 5000, "日本" * 5000])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (40, 12), (20, 5), (7, 3), (1, 1)])
def test_whatever_a_model_writes_is_text_and_the_screen_never_outgrows_the_terminal(
    text: str, width: int, height: int
) -> None:
    screen, console = _screen(width, height)
    screen.show_front(_study(), Safety().measures, AIM)
    screen.show_answers([Sample("edit", {"system": text}, text, text)] * 3)
    with screen.bar("search") as progress:
        progress(3, 40)
        lines = _drawn(screen, console)
    assert len(lines) <= max(1, height - 1)
    assert all(cell_len(line) <= width for line in lines)
    whole = "".join(lines)
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028]", whole)
    if text == HOSTILE and width == 120:
        assert r"  \x1b[2J\x1b[31mred\x1b]0;title\x07\x9b31m\u202egnp.exe\u2066 \x08\x00 [bold]x[/bold]" in whole


def test_a_narrow_table_has_letters_for_its_measures_and_a_legend() -> None:
    trials = [trial for trial in _study().trials if trial.candidate.kind == "edit"][:2]
    console = Console(file=io.StringIO(), width=50)
    with console.capture() as capture:
        console.print(
            front_table(trials, Safety().measures, 50, numbered=True, remarks={trials[1].candidate.id: "rule"})
        )
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert lines[0].split() == ["a", "b", "c", "d"]
    rows = [re.split(" {2,}", line.strip()) for line in lines if re.match(" *[12] ", line)]
    assert [row[0][0] for row in rows] == ["1", "2"]
    assert [row[-4:] for row in rows] == [["0.75", "0.12", "0.00", "0.62"], ["0.50", "–", "0.00", "0.25"]]
    assert "rule" in "\n".join(lines)
    legend = " ".join(" ".join(lines[lines.index(next(line for line in lines if "a\u00a0" in line)) :]).split())
    assert legend.replace("\u00a0", " ") == (
        "a refusal (harmful), b over-refusal (benign), c degenerate, d KL per token"
    )
    assert all(len(line) <= 50 for line in lines)


def test_the_front_has_as_many_rows_as_there_is_room_for() -> None:
    study = Study([_trial(edited(0.01 * (i + 1), None, 0.2), 0.02 * i, 0.1 * i) for i in range(29)])
    counts = {}
    for height in (30, 12, 8, 5):
        screen, console = _screen(120, height)
        screen.show_front(study, Safety().measures, AIM)
        counts[height] = len(_rows("\n".join(_drawn(screen, console))))
    # One line is the stages', one the cursor's, three are the table's title, its header and the rule below.
    assert counts == {30: 8, 12: 7, 8: 3, 5: 0}


def test_an_answer_and_its_prompt_share_a_line_where_there_is_little_room() -> None:
    screen, console = _screen(80, 9)
    screen.show_answers(_samples("One.", "Two.", "Three."))
    assert [line.rstrip() for line in _drawn(screen, console)][1:] == ["One.", "Two.", "Three."]


@pytest.mark.parametrize(("variables", "colours"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_leaves_the_signs(variables: dict[str, str], colours: bool) -> None:
    screen, console = _screen(80, 24, TERM="xterm-256color", **variables)
    screen.mark("traces", "done")
    with console.capture() as capture:
        console.print(screen)
    assert ("\x1b[32m" in capture.get()) == colours
    assert "✓" in capture.get()


def test_a_terminal_that_cannot_draw_again_gets_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Terminal()
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stderr", screen)
    with live_screen(STAGES) as mark:
        mark("traces", "running")
        _watch(_study())
    assert screen.getvalue().splitlines() == [
        "  tried 3 edit, 1 steering; 1 discarded; highest refusal (harmful) 0.75 at KL per token 0.62"
    ]


def test_a_run_has_one_screen_on_which_bars_messages_and_answers_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    with monkeypatch.context() as patch:
        for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "100"), ("LINES", "40")):
            patch.setenv(name, value)
        patch.setattr(sys, "stderr", screen)
        with live_screen(STAGES) as mark:
            shown = current_screen()
            assert shown is not None
            mark("traces", "running")
            with showing("own answers") as progress:
                progress(1, 2)
                say("a message")
            mark("traces", "done")
            shown.show_answers(_samples("One."))
            with watching(Safety().measures, AIM) as (_, on_round):
                assert current_screen() is shown
                on_round(_study())
        assert current_screen() is None
        assert sys.stderr is screen
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert text.count("a message") == 1
    assert "✓\u00a0traces" in text
    assert "Front on validation" in text
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") == 1


def test_an_error_closes_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", screen)
    with pytest.raises(KeyboardInterrupt), live_screen(STAGES):
        raise KeyboardInterrupt
    assert current_screen() is None
    assert sys.stderr is screen
    assert screen.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in screen.getvalue()


def test_the_screen_is_drawn_in_a_few_milliseconds() -> None:
    screen, console = _screen(120, 50)
    study = Study([_trial(edited(0.01 * (i + 1), None, 0.2), 0.02 * i, 0.1 * i) for i in range(200)])
    screen.show_front(study, Safety().measures, AIM)
    screen.show_answers(_samples("x" * 100_000, HOSTILE * 1000, "y"))
    with screen.bar("search") as progress:
        progress(3, 40)
        _drawn(screen, console)  # lays the front out
        started = time.process_time()
        for _ in range(20):
            _drawn(screen, console)
        each = (time.process_time() - started) / 20
    # Four times a second: a few per cent of one core at most.
    assert each < 0.02


def test_a_bar_counts_nothing_before_its_total_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from steer2edit.progress import columns

    out = io.StringIO()
    with Progress(*columns(), console=Console(file=out, force_terminal=True, width=80)) as bar:
        bar.add_task("  probe", total=None)
    assert "starting" in out.getvalue()
    assert "0/?" not in out.getvalue()
