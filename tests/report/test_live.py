"""What a study shows while it runs, and what the report says of it: on a terminal, in a log, in a file."""

from __future__ import annotations

import io
import re
import sys
import time
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from runs import make_scores, tiny_recipe
from steer2edit.behaviours.safety import Safety
from steer2edit.progress import Sample, be_quiet, current_screen, say, showing
from steer2edit.report.front_table import front_table
from steer2edit.report.live import LiveScreen, front, live_screen, watching
from steer2edit.report.page import describe, markdown, markdown_table
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


# The report ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"gamma": 0.4}, "γ 0.4"),
        ({"rho_attn": 0.2, "rho_mlp": None, "alpha": 0.1}, "ρ_attn 0.2, ρ_mlp off, α 0.1"),
        (edited(None, 0.2, 0.1, "8-20", "k_svd").config, "ρ_attn off, ρ_mlp 0.2, α 0.1, layers 8-20, variant k_svd"),
        ({}, ""),
        (asked(2, "Refuse everything.").config, "“Refuse everything.”"),
        (asked(2, "x" * 40).config, f"“{'x' * 40}”"),
        (asked(2, "x" * 38 + " and more").config, f"“{'x' * 38}…”"),
        (steered_at(7, 0.4).config, "layer 7, γ 0.4"),
        (directed(12, 1.23456).config, "layer 12, γ 1.235"),
    ],
)
def test_a_configuration_is_described_in_words(config: dict[str, Any], words: str) -> None:
    assert describe(config) == words


def _rate(mean: float | None, n: int = 8) -> dict[str, Any]:
    return {"mean": mean, "low": None if mean is None else mean / 2, "high": None if mean is None else 2 * mean, "n": n}


def _results(accuracy: float | None) -> dict[str, Any]:
    numbers = ("refusal", "over_refusal", "over_refusal_borderline", "degenerate", "nll_rise", "utility_loss")
    by_style = ("refusal_request", "refusal_question", "refusal_long")
    measured = {name: _rate(0.25) for name in (*numbers, *by_style)} | {
        "accuracy": _rate(accuracy, 0 if accuracy is None else 4),
        "accuracy_loss": _rate(None, 0),
    }
    configs: dict[str, Any] = {"base": {}, "edit": edited(0.1, None, 0.2, variant="l0").config}
    return {
        "systems": {kind: {"id": kind, "config": config, **measured} for kind, config in configs.items()},
        "attribute": "refusal",
        "measures": [measure.to_json() for measure in Safety().measures],
        "differences": {},
        "agreement": {"not_measured": "quantised."},
    }


def _choice(**changes: Any) -> dict[str, Any]:
    empty = {"mean": 0.0, "low": 0.0, "high": 0.0, "reference": 2.0, "trials": 0}
    return {
        "tried": {"edit": 12, "steering": 3},
        "rule": "the knee",
        "limits": {"over_refusal": 0.2, "accuracy_loss": 0.05, "degenerate": None},
        "evaluations": {"edit": 240, "steering": 60},
        "discarded": 0,
        "refined": None,
        "front": {"edit": ["a", "b"], "steering": []},
        "hypervolume": {"edit": {**empty, "mean": 0.5, "low": 0.4, "high": 0.65, "trials": 9}, "steering": empty},
        "edit": {"id": "a", "config": edited(0.1, None, 0.2).config, "refusal": 0.5, "over_refusal": None},
        "steering": None,
        **changes,
    }


def _report(choice: dict[str, Any], accuracy: float | None = None, results: dict[str, Any] | None = None) -> list[str]:
    recipe = tiny_recipe(
        search__reference=2.0, search__limits={"over_refusal": 0.2, "accuracy_loss": 0.05, "degenerate": None}
    )
    edit = make_scores().edit(rho_attn=0.1, rho_mlp=None, alpha=0.2)
    return markdown(recipe, choice, results or _results(accuracy), edit).splitlines()


def test_the_report_has_a_row_of_the_budget_and_the_hypervolume_for_each_method() -> None:
    lines = _report(_choice())
    at = lines.index("| on validation | tried | configurations × prompts | hypervolume | on the front |")
    assert lines[at + 1 : at + 4] == [
        "| --- | --- | --- | --- | --- |",
        "| steering | 3 | 60 | 0.00 [0.00, 0.00] | 0 |",
        "| edit | 12 | 240 | 0.50 [0.40, 0.65] | 2 |",
    ]
    text = "\n".join(lines)
    assert "refusal (harmful) from worst to best and KL per token from 0 to 2 that" in text
    assert "On validation, of each method: the knee." in text
    assert "Limits: over-refusal (benign) ≤ 0.2, accuracy lost ≤ 0.05." in text
    assert "- steering: none stays within the limits." in text


BASELINE_CONFIGS = {
    "system": asked(1, "Refuse everything.").config,
    "steering": steered(0.4).config,
    "layer": steered_at(7, 0.5).config,
    "direction": directed(9, 1.25).config,
}


def test_the_report_has_rows_of_every_baseline_in_one_order() -> None:
    choice, results = _choice(), _results(None)
    empty = choice["hypervolume"]["steering"]
    measured = dict(results["systems"]["base"])
    results["systems"] = {"base": measured}
    for number, (kind, config) in enumerate(BASELINE_CONFIGS.items(), start=2):
        choice["tried"][kind], choice["evaluations"][kind] = number, 20 * number
        choice["front"][kind], choice["hypervolume"][kind] = ["x"] * number, {**empty, "mean": number / 10}
        choice[kind] = {"id": "x", "config": config, "refusal": number / 8, "over_refusal": 0.25}
        results["systems"][kind] = measured | {"id": "x", "config": config}
        results["differences"][f"edit - {kind}"] = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 8}
    choice["layer"] = None
    del results["systems"]["layer"]
    results["systems"]["edit"] = measured | {"config": edited(0.1, None, 0.2).config}
    lines = _report(choice, results=results)
    at = lines.index("| on validation | tried | configurations × prompts | hypervolume | on the front |")
    assert lines[at + 2 : at + 7] == [
        "| system prompt | 2 | 40 | 0.20 [0.00, 0.00] | 2 |",
        "| steering | 3 | 60 | 0.30 [0.00, 0.00] | 3 |",
        "| one layer | 4 | 80 | 0.40 [0.00, 0.00] | 4 |",
        "| direction | 5 | 100 | 0.50 [0.00, 0.00] | 5 |",
        "| edit | 12 | 240 | 0.50 [0.40, 0.65] | 2 |",
    ]
    chosen = [line for line in lines if line.startswith("- ") and ("; on validation" in line or "none" in line)]
    assert chosen == [
        "- system prompt: “Refuse everything.”; on validation refusal (harmful) 0.25, over-refusal (benign) 0.25.",
        "- steering: γ 0.4; on validation refusal (harmful) 0.38, over-refusal (benign) 0.25.",
        "- one layer: none stays within the limits.",
        "- direction: layer 9, γ 1.25; on validation refusal (harmful) 0.62, over-refusal (benign) 0.25.",
        "- edit: ρ_attn 0.1, ρ_mlp off, α 0.2; on validation refusal (harmful) 0.50.",
    ]
    names = [line.split(" | ")[0].removeprefix("| ") for line in markdown_table(results).splitlines()[2:]]
    assert names == [
        "original",
        "system prompt (“Refuse everything.”)",
        "steering (γ 0.4)",
        "direction (layer 9, γ 1.25)",
        "edit (ρ_attn 0.1, ρ_mlp off, α 0.2)",
        "n",
    ]
    expected = [line for line in lines if line.startswith("- refusal (harmful), edit - ")]
    assert expected == [
        f"- refusal (harmful), edit - {kind}: +0.50 [+0.25, +0.75], same 8 prompts." for kind in BASELINE_CONFIGS
    ]


def test_a_baseline_that_was_not_tried_has_no_row() -> None:
    text = "\n".join(_report(_choice()))
    assert "| steering |" in text
    for title in ("system prompt", "one layer", "direction"):
        assert title not in text


@pytest.mark.parametrize(("mean", "said"), [(0.95, True), (0.9, True), (0.85, False), (None, False)])
def test_where_the_original_model_shows_the_behaviour_already_the_report_says_so(mean: Any, said: bool) -> None:
    results = _results(None)
    results["systems"]["base"]["refusal"] = _rate(mean)
    text = "\n".join(_report(_choice(), results=results))
    remark = f"The original model shows it already: its refusal (harmful) is {mean or 0:.2f}, so that little is left"
    assert (remark in text) == said
    assert ("shows it already" in text) == said


def test_the_report_says_what_was_discarded_and_refined_only_where_something_was() -> None:
    plain = "\n".join(_report(_choice()))
    assert "discarded" not in plain
    assert "second grid" not in plain
    expected = "\n".join(_report(_choice(discarded=4, refined={"around": "edit-0.3-off-0.2"})))
    assert "4 configurations were discarded." in expected
    assert "The second grid was laid around edit-0.3-off-0.2." in expected


def test_the_table_has_an_accuracy_column_only_where_it_was_measured() -> None:
    without, measured = markdown_table(_results(None)), markdown_table(_results(0.5))
    assert "accuracy" not in without
    header, _, base, edit, n = measured.splitlines()
    assert header.endswith("| KL per token | accuracy (choices) |")
    assert base.endswith("| 0.25 [0.12, 0.50] | 0.50 [0.25, 1.00] |")
    assert edit.startswith("| edit (ρ_attn 0.1, ρ_mlp off, α 0.2, variant l0) | 0.25")
    assert n.endswith("| 8 | 4 |")
    assert "accuracy (choices)" in "\n".join(_report(_choice(), 0.5))


def test_a_bar_counts_nothing_before_its_total_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from steer2edit.progress import columns

    out = io.StringIO()
    with Progress(*columns(), console=Console(file=out, force_terminal=True, width=80)) as bar:
        bar.add_task("  probe", total=None)
    assert "starting" in out.getvalue()
    assert "0/?" not in out.getvalue()
