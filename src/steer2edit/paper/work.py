"""Running a suite: its runs, their parts, and the tables and figures of all that was measured.

A run that fails says why in one sentence, and the others go on. Everything is kept, so that the same command goes on
where it stopped, and ends with the same tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..edits import Edit
from ..errors import Steer2EditError
from ..files.writing import write_text
from ..pipeline.names import EDIT
from ..pipeline.run import Run
from ..pipeline.stages import run_all
from ..progress import say
from ..report.figures import heat_map
from .clock import ALL_RUNS, Clock
from .cost import SIDE_EFFECTS, TABLES
from .facts import published
from .figures import figure_of
from .forecast import Forecast
from .overall import averages_csv, averages_markdown, averages_of
from .parts import measure_part
from .plan import SUITES, Part, Planned, SuitePlan
from .rows import PartResult
from .side_effects import SideEffects, measure_side_effects, side_effects_csv, side_effects_markdown
from .spent import Spent, said_of, spent_markdown, spent_of, write_spent
from .tables import Of, Table, table_of
from .writing import csv_of, markdown_of

PAGE = "paper.md"
CLOCK = "clock.json"
TITLES: Mapping[str, str] = {
    "trade_off": "Trade-off",
    "ablations": "Ablations and component-wise budgets",
    "sensitivity": "Budget sensitivity",
    "training": "Training baselines",
    "side_effects": "Side effects",
}


@dataclass
class SuiteResult:
    """What a suite left.

    Attributes:
        parts: run and part → what was measured.
        failures: run, or run and part → why it could not be measured. files: tables, figures and the page.
    """

    tables: list[Table] = field(default_factory=list)
    parts: dict[tuple[str, Part], PartResult] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    first_error: Steer2EditError | None = None

    def failed(self, name: str, error: Steer2EditError) -> None:
        say(f"{name} is not measured: {error}")
        self.failures[name] = str(error)
        self.first_error = self.first_error or error


def run_suite(plan: SuitePlan, out: str | Path, forecasts: Sequence[Forecast] = ()) -> SuiteResult:
    """Every run and part of a suite, then the tables and figures of those that could be measured.

    Args:
        out: a directory; `runs/` in it holds the runs.
        forecasts: what the runs were estimated to cost, which the page has beside what they took.
    """
    out, result = Path(out), SuiteResult()
    out.mkdir(parents=True, exist_ok=True)
    clock = Clock(out / CLOCK)
    for number, planned in enumerate(plan.runs, start=1):
        say(f"run {number} of {len(plan.runs)}: {planned.name}")
        _run(planned, plan, out, clock, result)
    side_effects = None
    if plan.suite == "all":
        with clock.counting(ALL_RUNS, SIDE_EFFECTS):
            side_effects = _side_effects(plan, out, result)
    with clock.counting(ALL_RUNS, TABLES):
        page = _page(plan, out, result, side_effects, set(SUITES[plan.suite]) - set(plan.parts))
    spent = spent_of(forecasts, clock.taken)
    result.files.append(write_spent(spent, out))
    _file(out / PAGE, "\n".join([*page, *_spent_lines(spent)]).rstrip() + "\n", result)
    say(said_of(spent))
    return result


def _spent_lines(spent: Spent) -> list[str]:
    return ["# What it took", "", spent_markdown(spent)]


def run_of(out: Path, planned: Planned) -> Run:
    return Run(out / "runs" / planned.name, planned.recipe)


def _run(planned: Planned, plan: SuitePlan, out: Path, clock: Clock, result: SuiteResult) -> None:
    run = run_of(out, planned)
    run.during = partial(clock.counting, planned.name)
    try:
        run_all(run)
    except Steer2EditError as error:
        result.failed(planned.name, error)
    if not run.is_whole("edit"):
        return
    with run.working():
        for part in plan.parts:
            try:
                with clock.counting(planned.name, part):
                    result.parts[planned.name, part] = measure_part(part, run, planned, plan.profile)
            except Steer2EditError as error:
                result.failed(f"{planned.name}, {TITLES[part].lower()}", error)


def _side_effects(plan: SuitePlan, out: Path, result: SuiteResult) -> SideEffects | None:
    """Of every model its chosen edits on every behaviour's test items, if it has more than one."""
    effects = SideEffects(())
    by_model: dict[str, list[Path]] = {}
    for planned in plan.runs:
        run = run_of(out, planned)
        if planned.seed == 0 and run.is_whole("edit"):
            by_model.setdefault(planned.model, []).append(run.folder)
    for model, folders in by_model.items():
        if len(folders) < 2:
            continue
        try:
            effects = effects.joined(measure_side_effects(folders, out / "side-effects" / model))
        except Steer2EditError as error:
            result.failed(f"{model}, side effects", error)
    return effects if effects.rows else None


# Tables and figures --------------------------------------------------------------------------------------------------


def _page(
    plan: SuitePlan, out: Path, result: SuiteResult, side_effects: SideEffects | None, left_out: set[Part]
) -> list[str]:
    """Writes tables and figures; the lines of the page that shows them."""
    page = [f"# {_title(plan)}, profile {plan.profile_name}", "", *_introduction(plan)]
    for part in plan.parts:
        measured = list(_measured(part, plan, result))
        tables = [table_of(part, of) for of in measured]
        if not tables:
            continue
        result.tables += tables
        page += [f"# {TITLES[part]}", ""]
        if part == "ablations":
            page += _averages(measured, out, result)
        _file(out / "tables" / f"{part}.csv", csv_of(tables), result)
        shown = []
        for table in tables:
            text = markdown_of(table)
            shown.append(text)
            page += [text]
            name = f"{part}-{table.model}-{table.behaviour}"
            figures = figure_of(table, out / "figures" / name)
            result.files += figures
            if figures:
                page += [f"![{TITLES[part]}, {table.model}, {table.behaviour}](figures/{name}.png)", ""]
        _file(out / "tables" / f"{part}.md", "\n".join(shown), result)
    page += _heat_maps(plan, out, result)
    if side_effects is not None:
        text = side_effects_markdown(side_effects)
        _file(out / "tables" / "side_effects.csv", side_effects_csv(side_effects), result)
        _file(out / "tables" / "side_effects.md", text, result)
        page += [f"# {TITLES['side_effects']}", "", text]
    missing = [f"- {TITLES[part]}: they need pip install 'steer2edit[train]'." for part in sorted(left_out)]
    missing += [f"- {name}: {why}" for name, why in result.failures.items()]
    if missing:
        page += ["# Not measured", "", *missing, ""]
    return page


def _averages(ablations: list[Of], out: Path, result: SuiteResult) -> list[str]:
    """The paper's table 3, of what was measured."""
    averages = averages_of(ablations)
    if not averages:
        return []
    text = averages_markdown(averages, list(dict.fromkeys(of.planned[0].model for of in ablations)))
    _file(out / "tables" / "overall.csv", averages_csv(averages), result)
    _file(out / "tables" / "overall.md", text, result)
    return ["## All models and behaviours", "", text]


def _title(plan: SuitePlan) -> str:
    return "Styles, which are not the paper's" if plan.suite == "styles" else f"The paper's experiments: {plan.suite}"


def _introduction(plan: SuitePlan) -> Iterator[str]:
    of_paper = "" if plan.suite == "styles" else f"; *paper* is {published().source}"
    yield (
        f"Numbers in brackets are 95 % intervals{of_paper}. Every choice was made on validation; every number below was"
        " measured on test."
    )
    if plan.profile_name != "paper" and plan.suite != "styles":
        yield (
            f"\nThe profile {plan.profile_name} has fewer prompts, shorter answers and other sets than the paper: its"
            " numbers cannot be compared with the paper's one by one."
        )
    few = {"ablations": plan.profile.ablations.prompts, "sensitivity": plan.profile.sensitivity.prompts}
    for part in plan.parts:
        if few.get(part) is not None:
            yield f"\n{TITLES[part]}: measured on the first {few[part]} test prompts of each kind."
    yield ""


def _measured(part: Part, plan: SuitePlan, result: SuiteResult) -> Iterator[Of]:
    """Of every model and behaviour the seeds whose part was measured."""
    groups: dict[tuple[str, str], list[Planned]] = {}
    for planned in plan.runs:
        if (planned.name, part) in result.parts:
            groups.setdefault((planned.model, planned.behaviour), []).append(planned)
    for some in groups.values():
        yield Of(tuple(some), tuple(result.parts[planned.name, part] for planned in some))


def _heat_maps(plan: SuitePlan, out: Path, result: SuiteResult) -> list[str]:
    """λ of what each first seed chose."""
    page: list[str] = []
    for planned in plan.runs:
        run = run_of(out, planned)
        if planned.seed or "trade_off" not in plan.parts or not run.is_whole("edit"):
            continue
        name = f"lambda-{planned.model}-{planned.behaviour}"
        result.files += heat_map(Edit.load(run.path(EDIT)), out / "figures" / name)
        page += [f"![λ of the chosen edit, {planned.model}, {planned.behaviour}](figures/{name}.png)", ""]
    return ["# Edit magnitudes", "", *page] if page else []


def _file(path: Path, text: str, result: SuiteResult) -> None:
    write_text(path, text)
    result.files.append(path)
