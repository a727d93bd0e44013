"""The tasks that come with the package, and how a recipe's names are told from lm-eval's."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Task
from .choices import CHOICES
from .language import LANGUAGE
from .worded import WORDED

TASKS: dict[str, Task] = {task.name: task for task in (*WORDED, *CHOICES, *LANGUAGE)}
# Before the name of one of lm-eval's tasks that has the name of one of these.
LM_EVAL = "lm_eval:"


def known(names: Sequence[str]) -> list[Task]:
    """The own tasks among the names."""
    return [TASKS[name] for name in names if name in TASKS]


def others(names: Sequence[str]) -> list[str]:
    """The names that are lm-eval's: those of no own task.

    >>> others(["gsm8k", "lm_eval:gsm8k", "boolq"])
    ['lm_eval:gsm8k', 'boolq']
    """
    return [name for name in names if name not in TASKS]
