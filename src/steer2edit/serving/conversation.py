"""A conversation with the original model, the steered one and the edited one, side by side in one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from ..edits import Edit, combine
from ..engines.base import GREEDY, Sampling
from ..errors import EditError, FileError
from ..files.writing import write_text
from ..method.intervention import NOTHING, Intervention, steering
from ..searching.candidates import TITLES, steering_vectors
from .catalogue import mixed
from .sources import Source
from .worker import Event, Failed, Piece, Question, Worker, streamed

ORIGINAL, STEERING, EDIT = TITLES["base"], TITLES["steering"], TITLES["edit"]
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Budget:
    """The (ρ, α) of an edit; None switches a block type off."""

    rho_attn: float | None
    rho_mlp: float | None
    alpha: float


@dataclass(frozen=True)
class Settings:
    """What the next answer is made under.

    Attributes:
        strengths: source → the factor that scales its edit; a source that is not named is left out.
        gamma: of steering.
        budget: of the first source's edit; None is the edit as its file has it.
        tokens: the most new tokens.
    """

    strengths: Mapping[str, float]
    gamma: float = 0.0
    budget: Budget | None = None
    sampling: Sampling = GREEDY
    seed: int = 0
    tokens: int = 512


@dataclass(frozen=True)
class Turn:
    """One question under all systems.

    Attributes:
        texts: system → the answer so far. failures: system → why there is none. done: the systems that have ended.
    """

    texts: Mapping[str, str]
    failures: Mapping[str, str] = field(default_factory=dict)
    done: frozenset[str] = frozenset()


class Conversation:
    """Asks one model, as it is and under interventions; the model is not loaded again for other settings.

    Args:
        sources: the first one is the edit that ρ and α belong to, and the run whose vectors steer.
    """

    def __init__(self, worker: Worker, sources: Sequence[Source]):
        self.worker, self.sources = worker, tuple(sources)
        self._vectors = {} if sources[0].scores is None else steering_vectors(sources[0].scores)
        self._interventions: dict[tuple[object, ...], Intervention] = {}

    @property
    def systems(self) -> tuple[str, ...]:
        """What can be asked; steering needs a run, whose scores hold the vectors' lengths."""
        return (ORIGINAL, STEERING, EDIT) if self._vectors else (ORIGINAL, EDIT)

    @property
    def budget(self) -> Budget | None:
        """The (ρ, α) of the first source's edit, if they can be changed."""
        edit = self.sources[0].edit
        if not isinstance(edit, Edit) or not {"rho_attn", "rho_mlp", "alpha"} <= set(edit.config):
            return None
        budget = Budget(edit.config["rho_attn"], edit.config["rho_mlp"], edit.config["alpha"])
        try:
            self.sources[0].with_budget(rho_attn=budget.rho_attn, rho_mlp=budget.rho_mlp, alpha=budget.alpha)
        except EditError:
            return None
        return budget

    def defaults(self) -> Settings:
        """The first edit at strength 1, and the run's own γ."""
        strengths = {source.name: float(i == 0) for i, source in enumerate(self.sources)}
        return Settings(strengths, self.sources[0].gamma or 0.0)

    def edits(self, settings: Settings) -> list[Edit]:
        """The edits that act, at their strengths."""
        acting = []
        for i, source in enumerate(self.sources):
            strength = settings.strengths.get(source.name, 0.0)
            edit = source.edit
            if i == 0 and settings.budget is not None and isinstance(edit, Edit):
                b = settings.budget
                edit = source.with_budget(rho_attn=b.rho_attn, rho_mlp=b.rho_mlp, alpha=b.alpha)
            if strength:
                acting += [part.with_strength(strength * part.strength) for part in edit.parts]
        return acting

    def intervention(self, system: str, settings: Settings) -> Intervention:
        """What a system does inside the model; the same settings give the same object.

        Raises:
            EditError: ρ or α is out of its range, or a strength is not finite.
        """
        if system == ORIGINAL or (system == STEERING and not settings.gamma):
            return NOTHING
        if system == STEERING:
            key: tuple[object, ...] = (system, settings.gamma)
        else:
            key = (system, tuple(settings.strengths.items()), settings.budget)
        intervention = self._interventions.get(key)
        if intervention is None:
            if system == STEERING:
                intervention = steering(self._vectors, settings.gamma)
            else:
                intervention = mixed([(edit, 1.0) for edit in self.edits(settings)], "edit")
            if len(self._interventions) >= 32:
                self._interventions.clear()
            self._interventions[key] = intervention
        return intervention

    def ask(self, histories: Mapping[str, Messages], settings: Settings) -> Generator[Turn, None, None]:
        """Asks every system that has a history, whose last message is the question, in one batch. Yields what there is
        so far after every piece of text.

        Systems that would do the same are asked once: at strength 0 the edit's answer is the original's.

        Raises:
            TooLong, Full: nothing was asked. EditError: see `intervention`.
        """
        numbers: dict[tuple[object, ...], int] = {}
        questions: list[Question] = []
        owners: dict[int, list[str]] = {}
        for system, messages in histories.items():
            intervention = self.intervention(system, settings)
            ids = self.worker.encode(messages)
            number = numbers.setdefault((ids, id(intervention)), len(questions))
            if number == len(questions):
                questions.append(Question(ids, intervention, None, settings.sampling, settings.seed))
            owners.setdefault(number, []).append(system)
        room = self.worker.context - max(len(question.ids) for question in questions)
        tokens = max(1, min(settings.tokens, room))
        turn = Turn(dict.fromkeys(histories, ""))
        events = streamed(self.worker, [replace(question, tokens=tokens) for question in questions])
        with contextlib.closing(events):
            yield from self._turns(turn, events, owners)

    def _turns(
        self, turn: Turn, events: Iterator[tuple[int, Event]], owners: Mapping[int, Sequence[str]]
    ) -> Iterator[Turn]:
        for i, event in events:
            for system in owners[i]:
                if isinstance(event, Piece):
                    turn = replace(turn, texts={**turn.texts, system: turn.texts[system] + event.text})
                    continue
                if isinstance(event, Failed):
                    turn = replace(turn, failures={**turn.failures, system: str(event.error)})
                turn = replace(turn, done=turn.done | {system})
            yield turn

    def save(self, settings: Settings, path: Path) -> None:
        """Writes the setting: an edit file at its strength, or as `.yaml` the part of a recipe that makes it.

        Raises:
            FileError: the file exists already. EditError: nothing acts, or the edits cannot be combined.
        """
        if path.exists():
            raise FileError("the file exists already", got=path, fix="Give another name.")
        if path.suffix in (".yaml", ".yml"):
            write_text(path, self.fragment(settings))
            return
        edits = [edit for edit in self.edits(settings) if edit.edited()]
        if not edits:
            raise EditError("there is no edit to save", got="strength 0", fix="Give a strength, or lower ρ or α.")
        (edits[0] if len(edits) == 1 else combine(*edits)).save(path)

    def fragment(self, settings: Settings) -> str:
        """The part of a recipe that tries this ρ, α and γ alone, in the run's layers and variant.

        A strength has no place in a recipe.
        """
        budget = settings.budget or self.budget
        search: dict[str, object] = {"steering": [settings.gamma] if settings.gamma else []}
        if budget is not None:
            # YAML's word for off is false.
            rho = {"rho_attn": budget.rho_attn, "rho_mlp": budget.rho_mlp}
            search |= {name: [False if value is None else value] for name, value in rho.items()}
            search["alpha"] = [budget.alpha]
            first = self.sources[0]
            if first.layers is not None:
                search["layers"] = [first.layers]
            if isinstance(first.edit, Edit) and "variant" in first.edit.config:
                search["variants"] = [first.edit.config["variant"]]
        strengths = ", ".join(f"{name} {strength:g}" for name, strength in settings.strengths.items())
        return f"# strength: {strengths}\n" + yaml.safe_dump({"search": search}, sort_keys=False)
