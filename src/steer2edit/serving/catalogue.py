"""Model names → interventions: `name`, `name@0.5`, and several joined by `+`."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import Steer2EditError
from ..method.intervention import NOTHING, Intervention, together
from ..models.bake import check_base
from .sources import AND, BASE, STRENGTH, Source

# Interventions that are kept: an edit's rows are made anew for every strength.
KEPT = 64


class UnknownName(Steer2EditError):
    """No model of that name is served."""


class Catalogue:
    """What can be asked for by name.

    Args:
        model_name: another name of the original model, beside "base".
        sources: the edits. Each must be of the model.

    Raises:
        ModelError, EditError: an edit is of another model.
    """

    def __init__(self, model: nn.Module, model_name: str, sources: Sequence[Source]):
        for source in sources:
            check_base(source.edit, model)
        self.model_name = model_name
        self._edits = {source.name: source.edit for source in sources}
        self._kept: OrderedDict[str, Intervention] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        return [BASE, self.model_name, *self._edits]

    def intervention(self, name: str) -> Intervention:
        """What a name stands for; the same name gives the same object.

        Raises:
            UnknownName: no model has that name, or its strength is not a number.
        """
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
            intervention = self._built(name)
            self._kept[name] = intervention
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return intervention

    def _built(self, name: str) -> Intervention:
        if name in (BASE, self.model_name):
            return NOTHING
        strengths: dict[str, float] = {}
        for part in name.split(AND):
            edit, strength = self._parsed(part, name)
            strengths[edit] = strengths.get(edit, 0.0) + strength
        return mixed([(self._edits[edit], strength) for edit, strength in strengths.items()], name)

    def _parsed(self, part: str, name: str) -> tuple[str, float]:
        edit, sign, number = part.partition(STRENGTH)
        try:
            strength = float(number) if sign else 1.0
        except ValueError:
            strength = math.nan
        if edit not in self._edits or not math.isfinite(strength):
            raise UnknownName(
                f"the model {name[:200]!r} does not exist",
                got=part[:200],
                fix=f"Served are {', '.join(self.names())}; NAME{STRENGTH}0.5 is a strength, A{AND}B are two at once.",
            )
        return edit, strength


def mixed(parts: Sequence[tuple[Any, float]], name: str) -> Intervention:
    """Edits at strengths, at the same time. What is at strength 0 is left out; nothing is the original model.

    Args:
        parts: an edit or a combination, and the factor that scales it.
    """
    acting = [
        part.with_strength(strength * part.strength) for edit, strength in parts if strength for part in edit.parts
    ]
    if not acting:
        return NOTHING
    return together([part.intervention() for part in acting], name)
