"""The report of a run, in Markdown and as tables on the terminal: what was measured on test, and on how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..edits import Edit
from ..recipe import Recipe

_NAMES = {"base": "original", "steering": "steering", "edit": "edit"}

_SIGNS = {"rho_attn": "ρ_attn", "rho_mlp": "ρ_mlp", "alpha": "α", "gamma": "γ"}

_COLUMNS = {
    "refusal": "refusal (harmful)",
    "over_refusal": "over-refusal (benign)",
    "over_refusal_borderline": "over-refusal (looks harmful)",
    "degenerate": "degenerate",
    "nll_rise": "NLL rise per token",
    "utility_loss": "KL per token",
    "accuracy": "accuracy (choices)",
}


def table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the test results: mean [95 % interval]."""
    sizes = next(iter(results["systems"].values()))
    # Accuracy is only measured where the recipe names questions.
    columns = {name: title for name, title in _COLUMNS.items() if name != "accuracy" or sizes[name]["n"]}
    header = ["on test", *columns.values()]
    rows = []
    for kind, system in results["systems"].items():
        name = _NAMES[kind] if kind == "base" else f"{_NAMES[kind]} ({describe(system['config'])})"
        rows.append([name, *(_cell(system[column]) for column in columns)])
    rows.append(["n", *(str(sizes[column]["n"]) for column in columns)])
    return header, rows


def markdown_table(results: Mapping[str, Any]) -> str:
    header, rows = table(results)
    return "\n".join([_row(header), _row(["---"] * len(header)), *map(_row, rows)])


def describe(config: Mapping[str, Any]) -> str:
    """A configuration in words: `ρ_attn 0.2, ρ_mlp off, α 0.1`, or `γ 0.4`."""
    told = {name: f"{value:.4g}" if name == "gamma" else value for name, value in config.items()}
    return ", ".join(f"{_SIGNS.get(name, name)} {'off' if value is None else value}" for name, value in told.items())


def _cell(value: Mapping[str, Any]) -> str:
    if value["mean"] is None:
        return "–"
    return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def markdown(recipe: Recipe, choice: Mapping[str, Any], results: Mapping[str, Any], edit: Edit) -> str:
    lines = [f"# {recipe.name}", "", f"Model `{recipe.model.name}`, behaviour {recipe.behaviour.name}.", ""]
    lines += ["## On test", "", markdown_table(results), ""]
    lines += ["Means with 95 % bootstrap intervals over prompts; exact intervals where a rate is 0 or 1. ", ""]
    for name, d in results["refusal_differences"].items():
        lines.append(f"- Refusal, {name}: {d['mean']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}], same {d['n']} prompts.")
    a = results["agreement"]
    agreement = a.get("not_measured") or (
        f"logits differ by at most {a['largest_logit_difference']:.1e}; rounding to the weights' dtype lost "
        f"{a['rounding_loss']:.1e} of it."
    )
    lines += [
        f"- The edit as an intervention and baked into the weights: {agreement}",
        "",
        "## How it was chosen",
        "",
        f"On validation, out of {choice['tried']['edit']} edits and {choice['tried']['steering']} steering strengths:"
        f" {choice['rule']}. Limits: {_limits(choice['limits'])}.",
        "",
        "| on validation | tried | configurations × prompts | hypervolume | on the front |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind in ("edit", "steering"):
        volume = choice["hypervolume"][kind]
        cells = [kind, choice["tried"][kind], choice["evaluations"][kind], _cell(volume), len(choice["front"][kind])]
        lines.append(_row([str(cell) for cell in cells]))
    lines += [
        "",
        f"The hypervolume is the share of refusal from 0 to 1 and KL from 0 to {recipe.search.reference:g} that the"
        " trials within the limits dominate, with a 95 % bootstrap interval over prompts. "
        + (f"{choice['discarded']} configurations were discarded." if choice["discarded"] else ""),
        "",
    ]
    if choice["refined"]:
        lines += [f"The second grid was laid around {choice['refined']['around']}.", ""]
    for kind in ("edit", "steering"):
        c = choice[kind]
        if c is None:
            tried = choice["tried"]["steering"]
            lines.append(f"- steering: {'no strength stays within the limits' if tried else 'none was tried'}.")
        else:
            over = "not measured" if c["over_refusal"] is None else f"{c['over_refusal']:.2f}"
            lines.append(
                f"- {kind}: {describe(c['config'])}; on validation refusal {c['refusal']:.2f}, over-refusal {over}."
            )
    lines += ["", "![trade-off](figures/trade_off.png)", "", "## The edit", ""]
    for block, s in edit.summary().items():
        lines.append(
            f"- {block}: {s['edited']} of {s['components']} components edited, {s['reinforced']} reinforced,"
            f" {s['suppressed']} suppressed, largest |λ| {s['largest']:.3f}."
        )
    lines += ["", "![edit magnitudes](figures/lambda.png)", ""]
    return "\n".join(lines)


def _limits(limits: Mapping[str, Any]) -> str:
    found = [f"{name.replace('_', ' ')} ≤ {value:g}" for name, value in limits.items() if value is not None]
    return ", ".join(found) or "none"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def print_results(console: Any, results: Mapping[str, Any]) -> None:
    from rich.table import Table

    header, rows = table(results)
    out = Table(show_lines=False)
    for i, name in enumerate(header):
        out.add_column(name, overflow="fold", justify="left" if i == 0 else "right")
    for row in rows:
        out.add_row(*row)
    console.print(out)


def print_answers(console: Any, answers: Sequence[Mapping[str, str]], each: int = 3) -> None:
    """The first answers to harmful and to benign prompts, side by side."""
    from rich.markup import escape
    from rich.table import Table

    systems = [name for name in _NAMES if name in answers[0]]
    for kind in ("harmful", "benign"):
        out = Table(title=f"{kind} test prompts", show_lines=True)
        for name in ("prompt", *(_NAMES[s] for s in systems)):
            out.add_column(name, overflow="fold", ratio=1)
        for row in [a for a in answers if a["kind"] == kind][:each]:
            out.add_row(escape(row["prompt"]), *(escape(" ".join(row[s].split())[:140]) for s in systems))
        console.print(out)
