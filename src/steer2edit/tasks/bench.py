"""A task's questions under every candidate: the prompts, what is too long for the model, and the replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..behaviours.base import Item
from ..engines.base import GREEDY, Progress, Sampling
from ..errors import Steer2EditError
from ..method.intervention import Intervention
from ..progress import say
from .asking import WINDOWS, Asking, Group
from .base import Question, Reply, Task
from .encoding import Ids, encode, pair, prefix_token, windows

# The most tokens of a window of a long text, and of a context where the model's own limit is not known.
WINDOW = 2048


@dataclass(frozen=True)
class Replies:
    """What a task's questions were answered with.

    Attributes:
        questions: those that were asked. left_out: how many were not, since they are longer than the model reads.
        replies: [candidates][questions][samples]; None for a candidate that the task cannot be asked of.
    """

    questions: list[Question]
    left_out: int
    replies: list[list[list[Reply]] | None]


class TaskBench:
    """Asks tasks' questions.

    Args:
        groups: the candidates by what they read; together they hold every candidate of `asking.tried`.
        system: the system prompt of answers; a candidate's own stands after it.
        sampling: of answers.
        samples: answers to each question.
        seed: of sampled answers.
    """

    def __init__(
        self,
        asking: Asking,
        groups: Sequence[Group],
        *,
        system: str | None = None,
        tokens: int = 512,
        sampling: Sampling = GREEDY,
        samples: int = 1,
        seed: int = 0,
    ):
        self.asking, self.groups, self.system = asking, groups, system
        self.tokens, self.sampling, self.samples, self.seed = tokens, sampling, samples, seed
        self._prompts: dict[str, Ids] = {}

    def replies(self, task: Task, questions: Sequence[Question], progress: Progress | None = None) -> Replies:
        """Raises Steer2EditError if every question is longer than the model reads."""
        if task.form == "document":
            return self._documents(task, questions, progress)
        kept = self._kept(task, questions)
        asked = [questions[i] for i in kept]
        ask = self._choices if task.form == "choices" else self._answers
        return Replies(asked, len(questions) - len(kept), ask(task, asked, progress))

    # What fits ------------------------------------------------------------------------------------------------------

    def _kept(self, task: Task, questions: Sequence[Question]) -> list[int]:
        """The numbers of the questions that fit, under every candidate's prompt."""
        prompts = [[self._shown(task, question, group) for group in self.groups] for question in questions]

        def make() -> dict[str, list[int]]:
            longest = self.asking.engine.context
            lengths = [max(self._length(task, q, g) for g in self.groups) for q in questions]
            return {"too_long": [i for i, n in enumerate(lengths) if longest is not None and n > longest]}

        asked = [prompts, [question.continuations for question in questions], self._most(task)]
        too_long = self.asking.journal.keep(task.name, "too long", 0, asked, make)["too_long"]
        if too_long and len(too_long) == len(questions):
            raise Steer2EditError(
                f"every question of {task.name} is longer than the model reads",
                got=f"{len(questions)} questions with {self._most(task)} tokens for each answer",
                fix="Lower evaluation.task_tokens, or leave the task out.",
            )
        if too_long:
            say(f"  {task.name}: {len(too_long)} questions are longer than the model reads and are left out")
        return [i for i in range(len(questions)) if i not in set(too_long)]

    def _most(self, task: Task) -> int:
        """The most tokens of an answer; of a continuation those that it has."""
        return 0 if task.form == "choices" else task.tokens or self.tokens

    def _length(self, task: Task, question: Question, group: Group) -> int:
        if task.form == "answer":
            return len(self._tokens(question, group)) + self._most(task)
        pairs = [self._pair(question, group, text) for text in question.continuations]
        return max(len(context) + len(continuation) - 1 for context, continuation in pairs)

    # Log-probabilities ----------------------------------------------------------------------------------------------

    def _context(self, question: Question, group: Group) -> str:
        """A raw prompt, as lm-eval has it: no chat template; a system prompt stands before it."""
        prompt = str(question.prompt)
        return prompt if group.system is None else f"{group.system}\n\n{prompt}"

    def _pair(self, question: Question, group: Group, continuation: str) -> tuple[Ids, Ids]:
        return pair(self.asking.engine.tokenizer, self._context(question, group), continuation)

    def _choices(
        self, task: Task, questions: Sequence[Question], progress: Progress | None
    ) -> list[list[list[Reply]] | None]:
        flat = [(question, continuation) for question in questions for continuation in question.continuations]
        replies: list[list[list[Reply]] | None] = [None] * len(self.asking.tried)
        for group in self.groups:
            scored = self.asking.scored(
                task.name,
                group,
                [[self._context(question, group), continuation] for question, continuation in flat],
                lambda i, group=group: self._pair(flat[i][0], group, flat[i][1]),  # type: ignore[misc]
                progress,
            )
            for at, candidate in enumerate(group.candidates):
                rest = iter(scored)
                of_candidate = []
                for question in questions:
                    some = [next(rest) for _ in question.continuations]
                    greedy = tuple(one.greedy[at] for one in some if one.greedy is not None)
                    of_candidate.append([Reply(log_p=tuple(one.log_p[at] for one in some), greedy=greedy)])
                replies[candidate] = of_candidate
        return replies

    def _documents(self, task: Task, questions: Sequence[Question], progress: Progress | None) -> Replies:
        """Whole texts under the candidates that act inside the model: a text has nothing that a system prompt could
        stand before."""
        group = self.groups[0]
        longest = self._window()
        texts = [str(question.prompt) for question in questions]

        def cut() -> dict[str, list[list[int]]]:
            tokenizer = self.asking.engine.tokenizer
            return {"ids": [encode(tokenizer, text) for text in texts]}

        ids = self.asking.journal.keep(task.name, "tokens", 0, texts, cut)["ids"]
        first = self.asking.journal.keep(task.name, "first token", 0, texts, self._first)["first"]
        flat = [(i, one) for i in range(len(texts)) for one in windows(ids[i], first, longest)]
        scored = self.asking.scored(task.name, group, [one for _, one in flat], lambda i: flat[i][1], progress, WINDOWS)
        replies: list[list[list[Reply]] | None] = [None] * len(self.asking.tried)
        for at, candidate in enumerate(group.candidates):
            sums = [0.0] * len(texts)
            for (i, _), one in zip(flat, scored, strict=True):
                sums[i] += one.log_p[at]
            replies[candidate] = [[Reply(log_p=(total,))] for total in sums]
        return Replies(list(questions), 0, replies)

    def _first(self) -> dict[str, int]:
        return {"first": prefix_token(self.asking.engine.tokenizer)}

    def _window(self) -> int:
        def make() -> dict[str, int]:
            return {"longest": min(self.asking.engine.context or WINDOW, WINDOW)}

        return int(self.asking.journal.keep("window", "tokens", 0, None, make)["longest"])

    # Answers --------------------------------------------------------------------------------------------------------

    def _messages(self, question: Question, group: Group) -> list[dict[str, str]]:
        parts = [text for text in (self.system, group.system) if text is not None]
        return Item("task", question.prompt).messages("\n\n".join(parts) or None)

    def _shown(self, task: Task, question: Question, group: Group) -> object:
        return self._context(question, group) if task.form == "choices" else self._messages(question, group)

    def _tokens(self, question: Question, group: Group) -> Ids:
        messages = self._messages(question, group)
        key = repr(messages)
        if key not in self._prompts:
            self._prompts[key] = self.asking.engine.tokens(messages)
        return self._prompts[key]

    def _answers(
        self, task: Task, questions: Sequence[Question], progress: Progress | None
    ) -> list[list[list[Reply]] | None]:
        group_of = {candidate: group for group in self.groups for candidate in group.candidates}
        table: list[Intervention] = [
            group_of[c].table[group_of[c].candidates.index(c)] for c in range(len(self.asking.tried))
        ]
        work = [(q, c, s) for q in range(len(questions)) for c in range(len(table)) for s in range(self.samples)]
        answers = self.asking.generated(
            task.name,
            work,
            lambda q, c: self._messages(questions[q], group_of[c]),
            lambda q, c: self._tokens(questions[q], group_of[c]),
            table,
            self._most(task),
            self.sampling,
            seed=self.seed,
            early=task.early,
            progress=progress,
        )
        replies: list[list[list[Reply]]] = [[[] for _ in questions] for _ in table]
        for (q, c, _), row in zip(work, answers, strict=True):
            replies[c][q].append(Reply(row["text"][row["start"] :], row.get("early", "")))
        return list(replies)
