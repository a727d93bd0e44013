"""The report of a run, in Markdown and as tables on the terminal: what was measured on test, and on how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..behaviours.base import UTILITY_LOSS
from ..edits import Edit
from ..files.reading import read_jsonl
from ..recipe import Recipe
from ..searching.candidates import TITLES
from ..searching.front import Aim
from .visible import in_markup, one_line

_SIGNS = {"rho_attn": "ρ_attn", "rho_mlp": "ρ_mlp", "alpha": "α", "gamma": "γ", "learning_rate": "learning rate"}
# How much of a system prompt a table shows, in characters.
_PROMPT = 40
# From this share of the scale on, the original model leaves little to gain.
_NEARLY_ALL = 0.9


def table(
    results: Mapping[str, Any], titles: Mapping[str, str] | None = None, corner: str = "on test"
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the test results: mean [95 % interval] of every measure that was measured.

    Args:
        titles: measure → title of its column; None is the behaviour's measures.
    """
    sizes = next(iter(results["systems"].values()))
    shown = table_columns(results) if titles is None else titles
    columns = {name: title for name, title in shown.items() if sizes[name]["n"]}
    header = [corner, *columns.values()]
    rows = []
    for kind, system in results["systems"].items():
        name = TITLES[kind] if kind == "base" else f"{TITLES[kind]} ({describe(system['config'])})"
        rows.append([name, *(interval_cell(system[column]) if column in system else "–" for column in columns)])
    rows.append(["n", *(str(sizes[column]["n"]) for column in columns)])
    return header, rows


def table_columns(results: Mapping[str, Any]) -> dict[str, str]:
    """Measure → title. Results of older runs do not hold the titles: there the names serve."""
    if "measures" in results:
        return {m["name"]: m["title"] for m in results["measures"] if m["column"]}
    system = next(iter(results["systems"].values()))
    return {
        name: name.replace("_", " ") for name, value in system.items() if isinstance(value, dict) and "mean" in value
    }


def markdown_table(results: Mapping[str, Any]) -> str:
    return _markdown(*table(results))


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([_row(header), _row(["---"] * len(header)), *map(_row, rows)])


# Before the name of a set of attack prompts among the tasks.
_ATTACK = "attack "


def task_tables(results: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of the utility tasks' table, and of one for each set of attack prompts; none without tasks."""
    measures = [m for m in results.get("task_measures", []) if m["column"]]
    tables = {"utility": {m["name"]: m["title"] for m in measures if not m["task"].startswith(_ATTACK)}}
    for m in measures:
        if m["task"].startswith(_ATTACK):
            title = m["title"].removeprefix(f"{m['task'].removeprefix(_ATTACK)}: ")
            tables.setdefault(f"under {m['task']}", {})[m["name"]] = title
    return [table(results, titles, corner) for corner, titles in tables.items() if titles]


def task_lines(results: Mapping[str, Any]) -> list[str]:
    """The tables of the tasks in Markdown, with what was asked and how far the edit is from the original model."""
    tables = task_tables(results)
    about = results.get("tasks", {})
    if not about:
        return []
    lines = ["## Utility and attacks", ""]
    for header, rows in tables:
        lines += [_markdown(header, rows), ""]
    for name, one in about.items():
        if "not_measured" in one:
            lines.append(f"- {name}: not measured: {one['not_measured']}")
            continue
        answers = f"; answers of at most {one['tokens']} tokens, {one['samples']} each" if "tokens" in one else ""
        left_out = f"; {one['left_out']} too long for the model and left out" if one["left_out"] else ""
        lines.append(f"- {name}: {one['source']}, {one['taken']}{left_out}{answers}.")
    titles = {m["name"]: m["title"] for m in results.get("task_measures", []) if m["column"]}
    for name, d in results.get("task_differences", {}).get("edit - base", {}).items():
        if name in titles and d["mean"] is not None:
            difference = f"{d['mean']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]"
            lines.append(f"- {titles[name]}, edit - base: {difference}, same {d['n']} questions.")
    return [*lines, ""]


def describe(config: Mapping[str, Any]) -> str:
    """A configuration in words: `ρ_attn 0.2, ρ_mlp off, α 0.1`, `γ 0.4`, or a system prompt's beginning."""
    return ", ".join(_setting(name, value) for name, value in config.items())


def shortened(text: str) -> str:
    """A text's beginning, as a cell of a table can hold it."""
    return text if len(text) <= _PROMPT else text[: _PROMPT - 1].rstrip() + "…"


def _setting(name: str, value: Any) -> str:
    if name == "system":
        return f"“{shortened(one_line(value))}”"
    if name == "gamma":
        return f"γ {value:.4g}"
    return f"{_SIGNS.get(name, name)} {'off' if value is None else value}"


def interval_cell(value: Mapping[str, Any]) -> str:
    if value["mean"] is None:
        return f"not finite in {value['not_finite']}" if value.get("not_finite") else "–"
    return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def already_there(results: Mapping[str, Any]) -> str:
    """A remark, if the original model shows so much of the behaviour that little is left to gain; else nothing."""
    measure: Mapping[str, Any] = next((m for m in results.get("measures", []) if m["name"] == results["attribute"]), {})
    mean = results["systems"]["base"][results["attribute"]]["mean"]
    if mean is None or "scale" not in measure:
        return ""
    worst, best = measure["scale"]
    if (mean - worst) / (best - worst) < _NEARLY_ALL:
        return ""
    return f"The original model shows it already: its {measure['title']} is {mean:.2f}, so that little is left to gain."


def nothing_moved(choice: Mapping[str, Any]) -> str:
    """A warning, if no edit within the limits has a better attribute than the original model; else nothing."""
    if choice.get("moved", True):
        return ""
    title = choice.get("ranking", choice["attribute"])["title"]
    return f"**Nothing moved: on validation no edit has a better {title} than the original model.** "


def picked_by_a_person(choice: Mapping[str, Any]) -> str:
    """What a reader must know of an edit that a person picked, and not the rule; else nothing."""
    picked = choice.get("picked")
    if picked is None:
        return ""
    by_rule = picked["by_rule"]
    if by_rule is None:
        rule = "By the rule there is none, since no edit is within the limits."
    elif by_rule["id"] == choice["edit"]["id"]:
        rule = "The rule takes the same one."
    else:
        rule = f"The rule takes another one: {describe(by_rule['config'])}."
    missed = f" The picked one misses limits: {'; '.join(picked['missed'])}." if picked["missed"] else ""
    return f"A person picked the edit on validation. {rule}{missed}"


def markdown(recipe: Recipe, choice: Mapping[str, Any], results: Mapping[str, Any], edit: Edit) -> str:
    lines = [f"# {recipe.name}", "", f"Model `{recipe.model.name}`, behaviour {recipe.behaviour.name}.", ""]
    if warning := nothing_moved(choice):
        lines += [warning, ""]
    lines += ["## On test", "", markdown_table(results), ""]
    lines += ["Means with 95 % intervals over prompts: Wilson's for rates, the bootstrap's for everything else.", ""]
    title = recipe.behaviour.attribute.title
    if remark := already_there(results):
        lines += [remark, ""]
    for name, d in results["differences"].items():
        if d["mean"] is not None:
            difference = f"{d['mean']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]"
            lines.append(f"- {title}, {name}: {difference}, same {d['n']} prompts.")
    a = results["agreement"]
    agreement = a.get("not_measured") or (
        f"logits differ by at most {a['largest_logit_difference']:.1e}; rounding to the weights' dtype lost "
        f"{a['rounding_loss']:.1e} of it."
    )
    lines += [
        f"- The edit as an intervention and baked into the weights: {agreement}",
        "",
        *task_lines(results),
        "## How it was chosen",
        "",
        f"On validation, of each method: {choice['rule']}. Limits: {describe_limits(recipe.aim)}.",
        *(["", person] if (person := picked_by_a_person(choice)) else []),
        "",
        "| on validation | tried | evaluations | hypervolume | on the front |",
        "| --- | --- | --- | --- | --- |",
    ]
    methods = [kind for kind in TITLES if kind in choice["tried"]]
    for kind in methods:
        counts = [choice["tried"][kind], choice["evaluations"][kind]]
        cells = [TITLES[kind], *counts, interval_cell(choice["hypervolume"][kind]), len(choice["front"][kind])]
        lines.append(_row([str(cell) for cell in cells]))
    lines += [
        "",
        f"The hypervolume is the share of {title} from worst to best and {UTILITY_LOSS.title} from 0 to"
        f" {recipe.search.reference:g} that the trials within the limits dominate, with a 95 % bootstrap interval over"
        " prompts. " + (f"{choice['discarded']} configurations were discarded." if choice["discarded"] else ""),
        "",
    ]
    if choice["refined"]:
        lines += [f"The second grid was laid around {choice['refined']['around']}.", ""]
    for kind in methods:
        c = choice.get(kind)
        if c is None:
            tried = choice["tried"][kind]
            lines.append(f"- {TITLES[kind]}: {'none stays within the limits' if tried else 'none was tried'}.")
        else:
            shown = [recipe.behaviour.attribute, *recipe.behaviour.costs]
            means = [f"{m.title} {c[m.name]:.2f}" for m in shown if c.get(m.name) is not None]
            lines.append(f"- {TITLES[kind]}: {describe(c['config'])}; on validation {', '.join(means)}.")
    lines += ["", *block_lines(recipe, choice), "![trade-off](figures/trade_off.png)", "", "## The edit", ""]
    for block, s in edit.summary().items():
        lines.append(
            f"- {block}: {s['edited']} of {s['components']} components edited, {s['reinforced']} reinforced,"
            f" {s['suppressed']} suppressed, largest |λ| {s['largest']:.3f}."
        )
    lines += ["", "![edit magnitudes](figures/lambda.png)", "", *firing_lines(choice)]
    return "\n".join(lines)


FIRING = (
    "The push along the edit's direction on the probe's own prompts, as a share of the push on positive responses. AUC:"
    " how often a positive response is pushed more than one of the group; in brackets, what a linear probe on the same"
    " inputs reaches on responses that it has not seen."
)


def firing_lines(choice: Mapping[str, Any]) -> list[str]:
    """Where the edit fires, in Markdown; nothing if the probe kept no evidence."""
    rows = choice.get("firing")
    if not rows:
        return []
    table = _markdown(list(rows[0]), [[str(cell) for cell in row.values()] for row in rows])
    return ["## Where it fires", "", FIRING, "", table, ""]


def block_lines(recipe: Recipe, choice: Mapping[str, Any]) -> list[str]:
    """A table of the block types that edits may change, from a run's `choice.json`; none if one alone was tried."""
    rows = choice.get("by_block", {})
    if not rows:
        return []
    measures = [recipe.behaviour.attribute, *recipe.behaviour.costs, UTILITY_LOSS]
    header = ["edits of", "tried", "compared", "hypervolume", "best within the limits", *(m.title for m in measures)]
    cells = []
    for name, row in rows.items():
        best = row["best"] or {}
        means = ["–" if best.get(m.name) is None else f"{best[m.name]:.2f}" for m in measures]
        shown = describe(best["config"]) if best else "none"
        cells.append([name, str(row["tried"]), str(row["compared"]), interval_cell(row["hypervolume"]), shown, *means])
    return ["By block type, on validation, with as many configurations of each:", "", _markdown(header, cells), ""]


def describe_limits(aim: Aim) -> str:
    """The limits in words, by the measures' titles."""
    limits = [(measure, limit) for measure, limit in aim.limits.items() if limit is not None]
    return ", ".join(f"{m.title} {'≥' if m.better == 'higher' else '≤'} {limit:g}" for m, limit in limits) or "none"


def _row(cells: Sequence[str]) -> str:
    """One line of a table, whatever stands in its cells."""
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def print_run(console: Any, results: Mapping[str, Any], answers: Path) -> None:
    """The first answers on test, side by side, and the results.

    Args:
        answers: the run's file of them.
    """
    print_answers(console, read_jsonl(answers))
    print_results(console, results)


def print_results(console: Any, results: Mapping[str, Any]) -> None:
    """The test results as tables that break between words alone: the behaviour's measures, utility, attacks.

    A console that is too narrow for a column a measure gets a row a measure, with n below its title.
    """
    for header, rows in (table(results), *task_tables(results)):
        _print_table(console, header, rows)


def _print_table(console: Any, header: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table

    # Cells never break; titles may, between their words.
    widest = [max(len(row[i]) for row in rows) for i in range(1, len(header))]
    if sum(widest) + 3 * len(header) + 24 > console.width:
        header, rows = _turned(header, rows)
    out = Table(show_lines=False)
    for i, name in enumerate(header):
        longest = max(len(line) for row in rows for line in row[i].split("\n"))
        justify: Any = "left" if i == 0 else "right"
        out.add_column(in_markup(name), overflow="fold", justify=justify, min_width=longest if i else None)
    for row in rows:
        out.add_row(*map(in_markup, row))
    console.print(out)


def _turned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """A row for each measure, a column for each system; configurations, intervals and n on lines of their own."""
    *systems, sizes = rows
    names = [row[0].replace(" (", "\n(").replace(", ", ",\n") for row in systems]
    turned = []
    for i, title in enumerate(header[1:], start=1):
        turned.append([f"{title}\nn = {sizes[i]}", *(row[i].replace(" [", "\n[") for row in systems)])
    return [header[0], *names], turned


def print_answers(console: Any, answers: Sequence[Mapping[str, Any]], each: int = 3) -> None:
    """The first answers to the first two kinds of prompts, side by side."""
    from rich.table import Table

    if not answers:
        return
    systems = [name for name in TITLES if name in answers[0]]
    kinds = list(dict.fromkeys(row["kind"] for row in answers))
    for kind in kinds[:2]:
        out = Table(title=f"{in_markup(kind)} test prompts", show_lines=True)
        for name in ("prompt", *(TITLES[s] for s in systems)):
            out.add_column(name, overflow="fold", ratio=1)
        for row in [answer for answer in answers if answer["kind"] == kind][:each]:
            out.add_row(in_markup(_one_line(row["prompt"])), *(in_markup(_one_line(row[s], 140)) for s in systems))
        console.print(out)


def _one_line(value: Any, length: int | None = None) -> str:
    """A text, the last message of a conversation, or the first of several answers, on one line.

    Args:
        length: of its beginning that is taken; None is all.
    """
    if isinstance(value, list):
        value = value[-1]["content"] if isinstance(value[0], dict) else value[0]
    return one_line(value, length)
