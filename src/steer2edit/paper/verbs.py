"""The verbs of the command line on the paper's experiments; heavy imports inside the functions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..pipeline.options import Json, Quiet, print_json
from ..progress import be_quiet, say


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command()(paper)
    app.command(name="side-effects")(side_effects)


def paper(
    suite: Annotated[
        str,
        typer.Argument(help="safety, truthfulness, efficiency, ablations, sensitivity, training, all or styles."),
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="One of the paper's six models by any of its names, or another model.")
    ] = None,
    like: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Which of the six models the weights in --model are.")
    ] = None,
    profile: Annotated[str, typer.Option(help="paper, cpu or smoke: how much is run.")] = "cpu",
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A folder of the evaluation sets; docs/paper.md lists them.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The directory; runs/paper-PROFILE by default.")] = None,
    seeds: Annotated[
        int | None, typer.Option(help="How many seeds each run has; the profile's by default.", min=1)
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what it would cost.")] = False,
    pages: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also write the finished suite as a page with its figures there."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A recipe key to override in every run; may be given again.")
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Run the paper's experiments: plan them, run what is not done, write their tables and figures."""
    be_quiet(quiet)
    from .forecast import as_json, forecast, lines_of
    from .plan import plan_suite

    place = out or Path("runs") / f"paper-{profile}"
    planned = plan_suite(
        suite, place, model=model, like=like, profile=profile, data=data, seeds=seeds, changes=overrides or []
    )
    forecasts = forecast(planned, place, fetch=not plan)
    if plan:
        if json:
            print_json(as_json(planned, forecasts))
        else:
            print("\n".join(lines_of(planned, forecasts)))
        return
    for line in lines_of(planned, forecasts):
        say(line)
    from .work import PAGE, run_suite

    result = run_suite(planned, place, forecasts)
    if pages is not None:
        from .pages import command_of, write_pages

        options = {"--model": model, "--as": like, "--profile": profile, "--data": data, "--seeds": seeds}
        command = command_of(suite, {**options, "--set": overrides})
        places = {} if data is None else {Path(data): "DATA"}
        result.files += write_pages(place, pages, f"{suite}-{profile}", command, places)
    if json:
        print_json(
            {"page": str(place / PAGE), "files": [str(file) for file in result.files], "failures": result.failures}
        )
    else:
        for file in result.files:
            print(file)
    if result.first_error is not None:
        raise result.first_error


def side_effects(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="The directories of finished runs of one model.")],
    out: Annotated[Path, typer.Option(help="Where the table is written.")] = Path("runs/side-effects"),
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure what each run's edit does to every other run's behaviour: one table of differences with intervals."""
    be_quiet(quiet)
    from .side_effects import as_json, measure_side_effects, side_effects_markdown, write_side_effects

    effects = measure_side_effects(runs, out)
    files = write_side_effects(effects, out)
    if json:
        print_json(as_json(effects))
        return
    print(side_effects_markdown(effects), end="")
    for file in files:
        print(file, file=sys.stderr)
