"""The command line: one verb a stage. Heavy imports stand inside the functions, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import Interrupted, Steer2EditError, refused_by_the_system
from .guided import verb as guided
from .paper import verbs as paper
from .pipeline import file_verbs, share_verbs
from .pipeline.options import Json, Quiet, TrustCode, console, print_json
from .progress import be_quiet
from .report.visible import visible
from .serving import verbs as serving
from .serving.verbs import TrustRemoteCode

app = typer.Typer(
    name="steer2edit",
    cls=guided.VerbOrModel,
    help="Change how a language model behaves by editing its weights, without training. `steer2edit MODEL` asks how.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeName = Annotated[str, typer.Argument(help="A recipe file, a run directory, or a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Recipe keys to override. Quote brackets for your shell: 'search.steering=[0.1,0.2]'."),
]
ModelName = Annotated[
    str | None, typer.Option("--model", help="Hub id, folder or .gguf file in place of the recipe's.")
]
Out = Annotated[Path | None, typer.Option("--out", help="The run directory; runs/NAME by default.")]
_INTERRUPTED = 130
# How often a thread of OpenMP looks whether there is work before it sleeps: some tens of microseconds.
SPIN_COUNT = "5000"
# How many characters of each part of an error are shown.
_SHOWN = 600


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"steer2edit {version('steer2edit')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command line itself."""


def main() -> None:
    """Runs the command line; a user's mistake is one sentence on stderr and exit code 2."""
    # OpenMP's threads spin while they wait, which makes everything several times slower beside another busy process;
    # threads that sleep at once are slower alone. A short spin lies between the two (benchmarks/busy.py). It is read
    # when torch is loaded; what the user has set stands.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    be_quiet(False)
    try:
        app(prog_name="steer2edit")
    except Steer2EditError as error:
        _refuse(error)
    except Interrupted as stop:
        print(f"\nsteer2edit: stopped; {stop}.", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except OSError as error:
        if (sentence := refused_by_the_system(error)) is None:
            raise
        _refuse(sentence)
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # Typer turns Ctrl-C into this exit code, and says nothing
            print("\nsteer2edit: stopped; the same command goes on from here.", file=sys.stderr)
        raise


def _refuse(error: Steer2EditError) -> None:
    """Says in one line what the user can act on, and exits with code 2. What was got may be megabytes of anything."""
    texts = (error.what, error.got, error.fix)
    parts = [visible(text[:_SHOWN]).replace("\n", " ") + ("…" if len(text) > _SHOWN else "") for text in texts]
    print("steer2edit: {} (got: {}). {}".format(*parts), file=sys.stderr)
    sys.exit(2)


def _open(
    recipe: str,
    overrides: list[str] | None,
    model: str | None,
    out: Path | None,
    quiet: bool,
    trust_code: bool = False,
) -> Any:
    import json

    from .recipe import load_recipe, refuse_code

    be_quiet(quiet)
    if (Path(recipe) / "recipe.yaml").is_file():  # a run directory, whose recipe goes on there
        out = out or Path(recipe)
    # An override's value is YAML, a name is a text whatever it looks like.
    changes = [*(overrides or []), *([f"model.name={json.dumps(model)}"] if model is not None else [])]
    parsed = load_recipe(recipe, changes)
    refuse_code(parsed, trust_code)
    from .pipeline.run import Run  # after the recipe, so that a mistake there comes before torch is loaded

    return Run(out or Path("runs") / parsed.name, parsed)


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    model: ModelName = None,
    out: Out = None,
    trust_recipe_code: TrustCode = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Run every stage of a recipe; a run that was stopped goes on."""
    _run_and_show(_open(recipe, overrides, model, out, quiet, trust_recipe_code), json)


@app.command()
def demo(overrides: Overrides = None, out: Out = None, quiet: Quiet = False, json: Json = False) -> None:
    """Run the whole method on a small chat model that comes from PyPI: prompts and recipe included."""
    _run_and_show(_open("demo", overrides, None, out, quiet), json)


@app.command()
def make(
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or embedded:smollm2-135m-instruct.")],
    more: Annotated[str, typer.Option(help="What to show: an instruction, or a .jsonl file of responses.")],
    less: Annotated[str, typer.Option(help="What not to show: an instruction, or a .jsonl file of responses.")],
    out: Annotated[Path, typer.Option("--out", help="The run directory.")],
    title: Annotated[str | None, typer.Option(help="What the behaviour is called in tables.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="A .jsonl file with prompts, in place of those that come with the package.")
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="How it is measured, as a recipe has it: {phrases: [ahoy, matey]}.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A recipe key to override; may be given again: seed=1.")
    ] = None,
    trust_recipe_code: TrustCode = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Make an edit for a behaviour of your own, from two instructions or two files of responses.

    The recipe that it writes into the run directory holds every choice that it made.
    """
    be_quiet(quiet)
    from .pipeline.make import made_recipe
    from .recipe import overridden, refuse_code

    recipe = made_recipe(model, more, less, name=out.name, title=title, prompts=prompts, score=score)
    recipe = overridden(recipe, overrides or [])
    refuse_code(recipe, trust_recipe_code)
    from .pipeline.run import Run

    _run_and_show(Run(out, recipe), json)


def _run_and_show(run: Any, json: bool) -> None:
    from .pipeline.stages import run_all

    run_all(run)
    _show_results(run, json)
    if not json:
        print(f"Report, figures, edit and adapter: {run.folder}/")


def _show_results(run: Any, json: bool) -> None:
    from .pipeline.stages import load_results
    from .report.page import print_run

    results = load_results(run.folder)
    if json:
        print_json(results)
    else:
        print_run(console(), results, run.path("evaluation/answers.jsonl"))


def _stage(name: str, help: str) -> None:
    def command(
        recipe: RecipeName,
        overrides: Overrides = None,
        model: ModelName = None,
        out: Out = None,
        trust_recipe_code: TrustCode = False,
        quiet: Quiet = False,
    ) -> None:
        from .pipeline.stages import run_stage

        opened = _open(recipe, overrides, model, out, quiet, trust_recipe_code)
        run_stage(opened, name, recipe)
        print(f"{name}: done, see {opened.folder}/")

    app.command(name, help=help)(command)


_stage("traces", "Stage 1: make the traces, responses that show the behaviour and responses that don't.")
_stage("probe", "Stage 2: run the traces through the model once and keep each site's means.")
_stage("score", "Stage 3: score every attention head and neuron.")
_stage("search", "Stage 4: try the recipe's edits and steering strengths on validation.")
_stage("edit", "Stage 5: choose one of each by the recipe's rule and write the edit.")
_stage("export", "Stage 6: write the edit for other tools.")


@app.command()
def evaluate(
    recipe: RecipeName,
    overrides: Overrides = None,
    tasks: Annotated[str | None, typer.Option(help="Utility tasks too: gsm8k,arc_easy, or any of lm-eval's.")] = None,
    sets: Annotated[str | None, typer.Option(help="A folder of sets, in place of the Hub.")] = None,
    items: Annotated[int | None, typer.Option(help="At most this many questions of each task.", min=1)] = None,
    model: ModelName = None,
    out: Out = None,
    trust_recipe_code: TrustCode = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Stage 7: measure original, steering and edit on test, and on the tasks and attacks of the recipe."""
    from .recipe import task_overrides

    changes = [*(overrides or []), *task_overrides(recipe, tasks, sets, items)]
    opened = _open(recipe, changes, model, out, quiet, trust_recipe_code)
    from .pipeline.stages import run_stage

    run_stage(opened, "evaluate", recipe)
    _show_results(opened, json)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    method: Annotated[
        list[str] | None, typer.Option(help="lora or full; may be given again. By default the recipe's, or both.")
    ] = None,
    model: ModelName = None,
    out: Out = None,
    trust_recipe_code: TrustCode = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train rank-1 LoRA or the whole model on a run's positive traces, and put them beside the edit in its results."""
    from .recipe import training_overrides

    changes = [*training_overrides(recipe, method or []), *(overrides or [])]
    opened = _open(recipe, changes, model, out, quiet, trust_recipe_code)
    from .pipeline.stages import run_training

    run_training(opened, recipe)
    _show_results(opened, json)


@app.command()
def report(
    recipe: Annotated[str, typer.Argument(help="A recipe, or the directory of a run, whether it is finished or not.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Recipe keys to override, or more runs.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Put several runs on one axis.")] = False,
    model: ModelName = None,
    out: Annotated[Path | None, typer.Option(help="The run directory; of --compare where it writes.")] = None,
    trust_recipe_code: TrustCode = False,
    quiet: Quiet = False,
) -> None:
    """Stage 8: draw the figures and write the report and its page; or compare several runs."""
    be_quiet(quiet)
    from .pipeline import report as verb

    if compare:
        for written in verb.compare([recipe, *(overrides or [])], out or Path("compare")):
            print(written)
        return
    folder = Path(recipe) if Path(recipe).is_dir() else None
    name = recipe if folder is None else str(verb.recipe_of(folder))
    opened = _open(name, overrides, model, out or folder, quiet, trust_recipe_code)
    print(f"report: done, see {verb.report(opened, name, unfinished=folder is not None)}")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A probe, scores or edit file, or a run directory.")],
    picture: Annotated[Path | None, typer.Option(help="Also draw an edit's λ, as FILE.png, .svg and .pdf.")] = None,
    top: Annotated[int, typer.Option(help="How many of the largest components to list.", min=0)] = 10,
    json: Json = False,
) -> None:
    """Show what is in a probe, scores, an edit or a run."""
    from .report.inspection import describe, show

    contents = describe(file, top)
    if picture is not None:
        from .edits import Edit
        from .report.figures import heat_map

        edit_file = file / "edit.safetensors" if file.is_dir() else file
        for written in heat_map(Edit.load(edit_file), picture.with_suffix("")):
            print(written, file=sys.stderr)
    if json:
        print_json(contents)
        return

    show(console(), contents)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Hub id, folder, .gguf file, or a recipe whose model section counts.")
    ] = None,
    families: Annotated[bool, typer.Option("--families", help="Only list the families in the table.")] = False,
    weights: Annotated[bool, typer.Option("--weights", help="Load the weights and run the self-check.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="The model's revision on the Hub.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Say whether a model is supported, what would be edited, what not and why, and what each stage needs."""
    from .engines.plan import Model, refuse_remote_code
    from .errors import ModelError
    from .files.schema import parse
    from .recipe import load_recipe, shipped_recipes

    if families:
        from .models.inventory import families as table

        print(table())
        return
    if model is None:
        raise ModelError("no model is given", got="nothing", fix="Give a Hub id, a folder, a .gguf file or a recipe.")
    if model in shipped_recipes() or Path(model).suffix in (".yaml", ".yml"):
        section = load_recipe(model).model
        refuse_remote_code(section, trust_remote_code)
    else:
        options = {"revision": revision, "trust_remote_code": trust_remote_code, "dtype": dtype, "device": device}
        section = parse(Model, {"name": model, **options})
    from .artefacts.bases import how_stored
    from .engines.plan import load_section
    from .models.architectures import describe_as
    from .models.inventory import examine
    from .models.load import empty_model, load_config
    from .models.selfcheck import self_check
    from .models.sites import find_sites
    from .report.doctor import show

    if weights:
        loaded, _ = load_section(section)
        findings, sites = examine(loaded, self_check(loaded, thorough=True)), find_sites(loaded)
    else:
        where: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
        empty = empty_model(load_config(section.name, revision=section.revision, **where), **where)
        if section.architecture is not None:
            describe_as(empty, section.architecture)
        findings, sites = examine(empty), find_sites(empty)
    findings["model"] = section.name
    if stored := how_stored(section.name, sites):
        findings["stored"] = stored
    if json:
        print_json(findings)
        return
    show(console(), findings)


@app.command()
def judge(
    run: Annotated[Path, typer.Argument(help="The directory of a finished run.")],
    trust_recipe_code: TrustCode = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Judge the answers that a run kept once more, without a model: after a detector was improved."""
    from .pipeline.judge import judge as judge_again

    be_quiet(quiet)
    judged = judge_again(run, trust_recipe_code)
    if json:
        print_json(judged)
        return
    from .report.page import print_results

    print("As judged before:")
    print_results(console(), judged["before"])
    print("As judged now:")
    print_results(console(), judged["after"])
    choice = judged["choice"]
    print(f"{len(judged['changed'])} validation trials are judged in another way.")
    if choice["new"] is None:
        print("By the new judgement no edit is within the limits.")
    elif choice["old"] != choice["new"]:
        print(f"The rule now takes {choice['new']} in place of {choice['old']}: run the stages edit to report again.")


@app.command()
def recipes(
    copy: Annotated[str | None, typer.Option(help="Copy this recipe.")] = None,
    to: Annotated[Path | None, typer.Option(help="Where to; NAME.yaml by default.")] = None,
    json: Json = False,
) -> None:
    """List the shipped recipes, or copy one to change it."""
    from .errors import FileError, RecipeError
    from .files.writing import write_text
    from .recipe import shipped_recipes

    shipped = shipped_recipes()
    if copy is None:
        if json:
            print_json(sorted(shipped))
            return
        for name, text in shipped.items():
            print(f"{name:12} {text.splitlines()[0].lstrip('# ')}")
        return
    if copy not in shipped:
        raise RecipeError("no such shipped recipe", got=copy, fix=f"Shipped: {', '.join(shipped)}.")
    target = to or Path(f"{copy}.yaml")
    if target.exists():
        raise FileError("the file exists already", got=target, fix="Give another --to.")
    write_text(target, shipped[copy])
    print(target)


serving.register(app)
share_verbs.register(app)
file_verbs.register(app)
guided.register(app)
paper.register(app)

if __name__ == "__main__":
    main()
