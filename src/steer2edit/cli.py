"""The command line: one verb a stage. Heavy imports stand inside the functions, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import Steer2EditError
from .progress import be_quiet, say

app = typer.Typer(
    name="steer2edit",
    help="Change how a language model behaves by editing its weights, without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeName = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Recipe keys to override. Quote brackets for your shell: 'search.steering=[0.1,0.2]'."),
]

ModelName = Annotated[
    str | None, typer.Option("--model", help="Hub id, folder or .gguf file in place of the recipe's.")
]

Out = Annotated[Path | None, typer.Option("--out", help="The run directory; runs/NAME by default.")]

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only results and errors.")]

TrustCode = Annotated[
    bool, typer.Option("--trust-recipe-code", help="Run the Python file that the recipe's score names.")
]

Json = Annotated[bool, typer.Option("--json", help="Results as JSON on standard output.")]


_INTERRUPTED = 130


def main() -> None:
    """Runs the command line; a user's mistake is one sentence on stderr and exit code 2."""
    # OpenMP's threads spin while they wait, which makes everything several times slower beside another busy process;
    # threads that sleep at once are slower alone. A short spin is good in both cases (benchmarks/busy.py). It is read
    # when torch is loaded; what the user has set stands.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    be_quiet(False)
    try:
        app(prog_name="steer2edit")
    except Steer2EditError as error:
        print(f"steer2edit: {error}", file=sys.stderr)
        sys.exit(2)
    except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
        print(
            f"steer2edit: {error.filename or 'a file'} cannot be used (got: {error.strerror}). Check the path.",
            file=sys.stderr,
        )
        sys.exit(2)
    except OSError as error:
        if error.errno != 28:
            raise
        print(
            "steer2edit: the disk is full (got: no space left). Free some space and run the same command again.",
            file=sys.stderr,
        )
        sys.exit(2)
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # Typer turns Ctrl-C into this exit code, and says nothing
            print("\nsteer2edit: stopped; the same command goes on from here.", file=sys.stderr)
        raise


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
    from .files.reading import read_jsonl
    from .pipeline.stages import load_results, run_all

    run_all(run)
    results = load_results(run.folder)
    if json:
        _print_json(results)
        return
    from .report.page import print_answers, print_results

    console = _console()
    print_answers(console, read_jsonl(run.path("evaluation/answers.jsonl")))
    print_results(console, results)
    print(f"Report, figures, edit and adapter: {run.folder}/")


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False))


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
_stage("evaluate", "Stage 7: measure original, steering and edit on test.")


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
        _print_json(contents)
        return

    show(_console(), contents)


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
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code from the model's folder.")
    ] = False,
    json: Json = False,
) -> None:
    """Say whether a model is supported, what would be edited, what not and why, and what each stage needs."""
    from .engines.plan import Model
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
    else:
        options = {"revision": revision, "trust_remote_code": trust_remote_code, "dtype": dtype, "device": device}
        section = parse(Model, {"name": model, **options})
    from .engines.plan import load_section
    from .models.architectures import describe_as
    from .models.inventory import examine
    from .models.load import empty_model, load_config
    from .models.selfcheck import self_check
    from .report.doctor import show

    if weights:
        loaded, _ = load_section(section)
        findings = examine(loaded, self_check(loaded, thorough=True))
    else:
        where: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
        empty = empty_model(load_config(section.name, revision=section.revision, **where), **where)
        if section.architecture is not None:
            describe_as(empty, section.architecture)
        findings = examine(empty)
    findings["model"] = section.name
    if json:
        _print_json(findings)
        return
    show(_console(), findings)


@app.command(name="apply")
def apply_edits(
    base: Annotated[str, typer.Argument(help="The base: a checkpoint's folder or a Hub id.")],
    edits: Annotated[list[Path], typer.Argument(metavar="EDIT", help="Edit files; several are combined into one.")],
    to: Annotated[Path, typer.Option("--to", help="Where to: a new folder, or a new file for gguf and edit.")],
    kind: Annotated[
        str, typer.Option("--as", metavar="KIND", help="checkpoint, adapter (PEFT), gguf (llama.cpp's LoRA) or edit.")
    ] = "checkpoint",
    strength: Annotated[
        list[float] | None, typer.Option(help="Scale the edit; again for each of several, in order, or one for all.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Only these layers, like 8-20, the last one too.")] = None,
    blocks: Annotated[str | None, typer.Option(help="Only this block type: attn or mlp.")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write edit files as a checkpoint, an adapter, a GGUF adapter or one edit file; no recipe is needed."""
    from .errors import EditError
    from .method.site import BLOCKS

    be_quiet(quiet)
    chosen = _layers(layers)
    if blocks is not None and blocks not in BLOCKS:
        raise EditError("no such block type", got=blocks, fix=f"Use one of {', '.join(BLOCKS)}, or leave --blocks out.")
    from .edits import meetings
    from .pipeline.apply import KINDS, gather, write

    if kind not in KINDS:
        raise EditError("an edit cannot be written as that", got=f"--as {kind}", fix=f"Use one of {', '.join(KINDS)}.")
    edit = gather(edits, strength or (), chosen, BLOCKS if blocks is None else (blocks,))
    met = meetings(edit)
    for pair in met:
        one, other = pair["edits"]
        share = f"{pair['opposed']} of them opposite ways ({pair['opposed_share']:.0%})"
        say(f"  {one} and {other} both change {pair['shared']} components, {share}")
    write(edit, kind, to, base)
    changes = edit.changes()
    summary = {
        "kind": "apply",
        "as": kind,
        "path": str(to),
        "edit": edit.id,
        "parts": [{"id": part.id, "strength": part.strength, "config": dict(part.config)} for part in edit.parts],
        "sites": list(changes),
        "rank": max(len(change.a) for change in changes.values()),
        "interference": met,
    }
    strengths = ", ".join(f"{part.strength:g}" for part in edit.parts)
    say(f"  {kind}: {len(changes)} sites, rank {summary['rank']}, strength {strengths}, edit {edit.id}")
    if json:
        _print_json(summary)
    else:
        print(to)


def _layers(text: str | None) -> range | None:
    import re

    from .errors import EditError
    from .searching.candidates import layers_of

    if text is None:
        return None
    layers = layers_of(text) if re.fullmatch(r"\d+(-\d+)?", text) else range(0)
    if not layers:
        raise EditError(
            "--layers names no layers", got=text, fix="Write them as first-last, like 8-20, or as one number."
        )
    return layers


@app.command()
def verify(
    base: Annotated[str, typer.Argument(help="The base: a checkpoint's folder, a Hub id, or embedded:….")],
    edit: Annotated[Path, typer.Argument(help="The edit file.")],
    edited: Annotated[Path, typer.Argument(help="The edited checkpoint's folder.")],
    json: Json = False,
) -> None:
    """Check, bit by bit, that a checkpoint is the base with the edit in it and nothing else; exit code 1 if not."""
    from .artefacts.audit import verify as check
    from .edits import load_any
    from .models.load import local_folder

    audit = check(local_folder(base), load_any(edit), edited)
    if json:
        _print_json(audit)
    else:
        for word, count in audit["counts"].items():
            print(f"{count} tensors {word}")
        for name, word in (audit["tensors"] | audit["files"]).items():
            if word not in ("equal", "edited as expected"):
                print(f"{word}: {name}")
        print("as expected" if audit["as_expected"] else "NOT as expected")
    sys.exit(0 if audit["as_expected"] else 1)


@app.command()
def diff(
    base: Annotated[Path, typer.Argument(help="The base checkpoint's folder.")],
    edited: Annotated[Path, typer.Argument(help="The other checkpoint's folder.")],
    top: Annotated[int, typer.Option(help="How many of a site's largest components to list.", min=0)] = 5,
    json: Json = False,
) -> None:
    """Say what differs between two checkpoints, and whether it is a rank-1 edit of heads and neurons."""
    from .artefacts.audit import diff as compare

    differences = compare(base, edited, top)
    if json:
        _print_json(differences)
        return

    from .report.inspection import show

    for row in differences["sites"]:
        row["largest"] = ", ".join(f"{i}: {lam:+.2f}" for i, lam in row["largest"])
    show(_console(), differences)


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
        _print_json(judged)
        return
    from .report.page import print_results

    print("As judged before:")
    print_results(_console(), judged["before"])
    print("As judged now:")
    print_results(_console(), judged["after"])
    choice = judged["choice"]
    print(f"{len(judged['changed'])} validation trials are judged in another way.")
    if choice["new"] is None:
        print("By the new judgement no edit is within the limits.")
    elif choice["old"] != choice["new"]:
        print(f"The rule now takes {choice['new']} in place of {choice['old']}: run the stages edit to report again.")


def _console() -> Any:
    """As wide as the terminal or COLUMNS say; where neither does, wide enough for a table."""
    from rich.console import Console

    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    return Console(width=None if known else 150)


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
            _print_json(sorted(shipped))
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


if __name__ == "__main__":
    main()
