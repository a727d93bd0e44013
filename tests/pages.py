"""Runs that were never run, for the tests of the page: as many trials and prompts as wanted, and hostile text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import lru_cache
from html.parser import HTMLParser
from typing import Any

import torch

from runs import tiny_recipe
from steer2edit.edits import Scores
from steer2edit.method.scores import SiteScores
from steer2edit.method.site import Site
from steer2edit.pipeline.keys import ORDER
from steer2edit.pipeline.results import results_of
from steer2edit.recipe import Recipe
from steer2edit.report.html.contents import Contents, StageState
from steer2edit.report.html.render import page_of
from steer2edit.searching.candidates import BASE, Candidate, Trial, asked, directed, edited, steered, steered_at
from steer2edit.searching.choice import summary
from steer2edit.searching.front import choose
from steer2edit.searching.study import Study

# Everything that would act if it were not text.
HOSTILE = (
    "<script>document.title='owned'</script></script><img src=x onerror=\"document.title='owned'\">"
    " <!-- &amp; <![CDATA[ {{ 7 * 7 }} \x1b[31mred\x1b[0m \u202egnirts\u202c \u2028 \ud800 \x00 <b>bold</b>"
    " <a href='https://example.org'>link</a> %{customdata}"
)
WORDS = """
the model says that it would rather not answer this because of what it may lead to and then goes on
""".split()  # noqa: SIM905


def some_words(draw: random.Random, count: int = 18) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(count))


def random_scores(layers: int, heads: int, neurons: int, seed: int = 0) -> Scores:
    """Scores of a model of that shape, with g spread over [−1, 1] and a sketch of each weight."""
    draw = torch.Generator().manual_seed(seed)
    sites, sketches = {}, {}
    for layer in range(layers):
        for block, module, n, width in (("attn", "self_attn.o_proj", heads, 2), ("mlp", "mlp.down_proj", neurons, 1)):
            name = f"model.layers.{layer}.{module}"
            site = Site(layer, block, name, f"{name}.weight", 6, n, width)  # type: ignore[arg-type]
            u, k = torch.randn(6, generator=draw), torch.randn(n, width, generator=draw)
            g = (0.25 * torch.randn(n, generator=draw)).clamp(-1, 1)
            unit_k = k / k.norm(dim=1, keepdim=True)
            sites[site.key] = SiteScores(site, u / u.norm(), unit_k, g, torch.ones(n), 1.0)
            sketches[site.key] = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0 + layer])
    return Scores(sites, sketches)


def candidates(count: int, system: str = "Answer so.") -> list[Candidate]:
    """The original, a system prompt, and strengths of every method; mostly edits."""
    some: list[Candidate] = [BASE, asked(0, system)]
    each = max(1, (count - 2) // 8)
    some += [steered(0.1 + i) for i in range(each)]
    some += [steered_at(1, 0.2 + i) for i in range(each)]
    some += [directed(1, 0.3 + i) for i in range(each)]
    edits = count - len(some)
    return some + [edited(round(0.1 + i / 1000, 4), 0.4 if i % 2 else None, 0.3) for i in range(edits)]


def make_trial(candidate: Candidate, recipe: Recipe, prompts: int, draw: random.Random) -> Trial:
    """A trial whose numbers are drawn; the original loses nothing."""
    strength = 0.0 if candidate.kind == "base" else draw.uniform(0.1, 0.9)
    values: dict[str, tuple[float | None, ...]] = {}
    for measure in recipe.behaviour.measures:
        if measure.name.startswith("accuracy"):
            values[measure.name] = ()
        elif measure.rate:
            values[measure.name] = tuple(float(draw.random() < strength) for _ in range(prompts))
        else:
            values[measure.name] = tuple(strength * draw.uniform(0.2, 0.6) for _ in range(min(prompts, 24)))
    return Trial(candidate, values, "0")


def make_contents(
    trials: int = 12,
    prompts: int = 10,
    *,
    answer: Callable[[random.Random], str] = some_words,
    layers: int = 3,
    heads: int = 4,
    neurons: int = 60,
    kind: str = "harmful",
    system: str = "Answer so.",
    samples: int = 1,
    recipe: Recipe | None = None,
) -> Contents:
    """A finished run.

    Args:
        answer: makes a prompt's or an answer's text.
    """
    draw = random.Random(4)
    recipe = recipe or tiny_recipe()
    tried = candidates(trials, system)
    study = Study([make_trial(c, recipe, prompts, draw) for c in tried])
    study.evaluations |= {c.kind: prompts for c in tried if c.kind != "base"}
    chosen = {kind: choose(study.of_kind(kind), recipe.aim) for kind in study.evaluations}
    choice: dict[str, Any] = summary(study, recipe.aim, "grid", 50, 0)
    for name, trial in chosen.items():
        c = None if trial is None else trial.candidate
        choice[name] = None if c is None else {"id": c.id, "config": dict(c.config)}
    choice["moved"] = True
    picked = [BASE, *(trial.candidate for trial in chosen.values() if trial is not None)]
    results = results_of([make_trial(c, recipe, prompts, draw) for c in picked], recipe)
    results["agreement"] = {"not_measured": "not here."}
    config = chosen["edit"].candidate.config  # type: ignore[union-attr]
    budgets = {name: config[name] for name in ("rho_attn", "rho_mlp", "alpha")}
    edit = random_scores(layers, heads, neurons).edit(**budgets)
    label = recipe.behaviour.attribute.name

    def text() -> Any:
        return answer(draw) if samples == 1 else [answer(draw) for _ in range(samples)]

    def row(ids: list[str]) -> dict[str, Any]:
        labels = {id: {label: float(draw.random() < 0.5)} for id in ids}
        return {"prompt": answer(draw), "kind": kind, "answers": {id: text() for id in ids}, "labels": labels}

    test = [row([c.kind for c in picked]) for _ in range(prompts)]
    entry = {"seconds": 1.5, "files": {"some/file.json": "0" * 64}, "model": {"dtype": "float32"}}
    return Contents(
        recipe=recipe,
        manifest={"steer2edit": "0.1.0", "versions": {"torch": "2.13.0+cpu"}, "machine": {"python": "3.11"}},
        stages=[StageState(name, "whole", entry) for name in ORDER if name != "report"],
        study=study,
        choice=choice,
        results=results,
        answers=[{k: v for k, v in r.items() if k != "answers"} | r["answers"] for r in test],
        tried_answers=[row([c.id for c in tried]) for _ in range(prompts)],
        edit=edit,
    )


@lru_cache
def largest_page() -> str:
    """The page of 500 trials on 400 prompts, of a model with a thousand heads and half a million neurons."""
    return page_of(make_contents(500, 400, answer=_unlike_answers, layers=32, heads=32, neurons=14336))


def _unlike_answers(draw: random.Random) -> str:
    """Text that packs worse than a model's: of a hundred characters most were not there before."""
    return " ".join(f"{WORDS[number % 19]} {number:x}" for number in (draw.getrandbits(24) for _ in range(10)))


class Parsed(HTMLParser):
    """A page taken apart: its text by element, the attributes of each element, and the data of its script."""

    def __init__(self, page: str):
        super().__init__()
        self.stack: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br", "img", "link"):
            self.stack.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        open_tag, _ = self.stack.pop()
        assert open_tag == tag, f"</{tag}> closes <{open_tag}>"

    def handle_data(self, data: str) -> None:
        tag = self.stack[-1][0] if self.stack else ""
        self.scripts.append(data) if tag == "script" else self.texts.append((tag, data))

    @property
    def text(self) -> str:
        """What a reader without scripts sees."""
        return " ".join(" ".join(data for tag, data in self.texts if tag not in ("style", "title")).split())

    @property
    def data(self) -> Any:
        return json.loads(next(script for script in self.scripts if script.startswith("{")))

    def cells(self) -> dict[tuple[str, str], dict[str, str | None]]:
        """(system, measure) → the attributes of a cell of the results."""
        found = [attributes for tag, attributes in self.elements if tag == "td" and "data-system" in attributes]
        return {(str(a["data-system"]), str(a["data-measure"])): a for a in found}


def parsed(contents: Contents) -> Parsed:
    return Parsed(page_of(contents))
