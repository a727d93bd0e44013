"""One thread that owns the model: requests come to it from any thread, and it tells each asker what was made."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..engines.base import GREEDY, Answer, Sampling
from ..engines.open_batch import OpenBatch, OpenRow
from ..engines.transformers import TransformersEngine
from ..errors import Steer2EditError
from ..method.intervention import NOTHING, Intervention
from .stream import TextStream

# Seconds between two calls of `give_memory_back` while answers are made.
TRIM = 5.0


class Full(Steer2EditError):
    """As many requests wait as may wait."""


class TooLong(Steer2EditError):
    """A prompt, or a prompt with its answer, is longer than the context."""


class Closed(Steer2EditError):
    """The model is not served any more."""


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        ids: the prompt's tokens.
        tokens: the most new ones; None is as many as the context and the worker allow.
        stop: strings that end the answer, beside those of the engine's chat.
    """

    ids: tuple[int, ...]
    intervention: Intervention = NOTHING
    tokens: int | None = None
    sampling: Sampling = GREEDY
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """More text of an answer."""

    text: str


@dataclass(frozen=True)
class Done:
    """The end of an answer. `tokens` were made, also those of a stop string."""

    answer: Answer
    tokens: int


@dataclass(frozen=True)
class Failed:
    """There is no answer."""

    error: Exception


Event = Piece | Done | Failed


class Ticket:
    """A request under way. `cancel` may be called by any thread, also after the end."""

    def __init__(self, worker: Worker, row: OpenRow, stream: TextStream, on_event: Callable[[Event], None]):
        self._worker, self.row, self.stream, self.on_event = worker, row, stream, on_event

    def cancel(self) -> None:
        self._worker.cancel(self)


@contextlib.contextmanager
def one_team() -> Iterator[int]:
    """While it lasts, this thread and those that begin later each compute without helpers. Gives the number of threads
    that this one had, for the worker.

    On a CPU OpenMP keeps a team of helpers for every thread that computes with more than one. Once the teams together
    have more threads than there are cores, none of these spins while it waits, and decoding a few rows takes up to
    twice as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def give_memory_back() -> bool:
    """Gives memory that was freed, and that the C library keeps, back to the system. Whether this library can.

    Caches that come and go between those of rows that stay leave glibc's heap in pieces: without this a busy server's
    memory creeps up.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    trim(0)
    return True


class Worker:
    """Runs the decode batch in a thread of its own.

    Args:
        threads: with how many threads the model computes on a CPU; None is torch's own number. See `one_team`.
        waiting: how many requests may wait for a slot, beside those that run.
        context: the most tokens of a prompt and its answer; the model's own limit if it is lower.
        tokens: the most new tokens of a request that names no number.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        *,
        waiting: int = 128,
        context: int = 8192,
        tokens: int = 1024,
        threads: int | None = None,
    ):
        self.engine = engine
        limit = getattr(engine.config, "max_position_embeddings", None)
        self.context = min(context, limit) if limit else context
        self.waiting, self.tokens, self.threads = waiting, tokens, threads
        self._batch = OpenBatch(engine)
        self._tickets: dict[OpenRow, Ticket] = {}
        self._arrived: list[Ticket] = []
        self._left: list[Ticket] = []
        self._changed = threading.Condition()
        self._closing = False
        self._encoding = threading.Lock()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="steer2edit-model", daemon=True)
        self._thread.start()
        if threads is not None:
            # What one thread sets, torch takes for all that begin later: they are to compute as this one does.
            started.wait()
            torch.set_num_threads(torch.get_num_threads())

    # Called by any thread ------------------------------------------------------------------------------------------

    def encode(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """A prompt's tokens. Neither tokenizers nor the clock of chat templates may be used by two threads at once."""
        with self._encoding:
            return self.engine.tokens(list(messages))

    def ask(self, questions: Sequence[tuple[Question, Callable[[Event], None]]]) -> list[Ticket]:
        """Asks several questions at once, each with a function that is told what becomes of it.

        The function is called by the worker's thread: it must return at once.

        Raises:
            TooLong, Full, Closed: nothing was asked.
        """
        tickets = []
        for question, on_event in questions:
            stop = tuple(dict.fromkeys((*self.engine.chat.stop, *question.stop)))
            row = OpenRow(
                self.engine,
                question.ids,
                question.intervention,
                limit=self._limit(question),
                sampling=question.sampling,
                seed=question.seed,
                stop=stop,
            )
            tickets.append(Ticket(self, row, TextStream(self.engine.tokenizer, stop), on_event))
        with self._changed:
            if self._closing:
                raise Closed("the model is not served any more", got="a request", fix="Start it again.")
            # What runs has a slot. All that has none waits.
            if len(self._tickets) + len(tickets) > self.engine.slots + self.waiting:
                raise Full(
                    "too many requests wait",
                    got=f"{len(self._tickets)} under way",
                    fix="Ask again in a moment, or with fewer at once.",
                )
            for ticket in tickets:
                self._tickets[ticket.row] = ticket
            self._arrived += tickets
            self._changed.notify()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Frees the row of a request. Nothing is told about it from then on."""
        with self._changed:
            if self._tickets.pop(ticket.row, None) is not None:
                self._left.append(ticket)
                self._changed.notify()

    def counts(self) -> dict[str, int]:
        """How many requests have a slot, and how many wait for one."""
        with self._changed:
            running = sum(row.running for row in self._tickets)
            return {"running": running, "waiting": len(self._tickets) - running}

    def close(self) -> None:
        """Ends the thread; requests under way fail."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _limit(self, question: Question) -> int:
        left = self.context - len(question.ids)
        wanted = min(self.tokens, left) if question.tokens is None else question.tokens
        if wanted > left or left < 1 or not question.ids:
            raise TooLong(
                f"this model's maximum context length is {self.context} tokens",
                got=f"{len(question.ids)} tokens in the prompt and {max(wanted, 1)} in the answer",
                fix="Shorten the prompt, or ask for fewer tokens.",
            )
        return wanted

    # The thread ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self, started: threading.Event) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
            torch.get_num_threads()  # a new thread's number becomes its own only when it is read
        started.set()
        trimmed = time.monotonic()
        while True:
            with self._changed:
                while not (self._arrived or self._left or self._batch.busy or self._closing):
                    self._changed.wait()
                arrived, self._arrived = self._arrived, []
                left, self._left = self._left, []
                closing = self._closing
            for ticket in arrived:
                self._batch.add(ticket.row)
            for ticket in left:
                self._batch.drop(ticket.row)
            if closing:
                self._tell(self._batch.fail(Closed("the model is not served any more", got="an end", fix="Ask again.")))
                return
            self._tell(self._rows())
            if time.monotonic() - trimmed > TRIM:
                give_memory_back()
                trimmed = time.monotonic()

    def _rows(self) -> list[OpenRow]:
        try:
            return self._batch.step()
        except Exception as error:  # a bug of ours must not end the service: those who asked are told
            return self._batch.fail(error)

    def _tell(self, rows: Sequence[OpenRow]) -> None:
        with self._changed:
            tickets = [self._tickets[row] for row in rows if row in self._tickets]
            for ticket in tickets:
                if ticket.row.done:
                    del self._tickets[ticket.row]
        for ticket in tickets:
            try:
                for event in self._events(ticket):
                    ticket.on_event(event)
            except Exception as error:  # who asked is gone, or the answer cannot be decoded
                self.cancel(ticket)
                if not isinstance(error, RuntimeError):
                    ticket.on_event(Failed(error))

    def _events(self, ticket: Ticket) -> list[Event]:
        row, stream = ticket.row, ticket.stream
        if row.failure is not None:
            return [Failed(row.failure)]
        if not row.done:
            piece = stream.push(row.ids)
            return [Piece(piece)] if piece else []
        answer = row.answer(self.engine.tokenizer)
        rest = stream.finish(answer.text)
        done = Done(answer, len(row.ids))
        return [Piece(rest), done] if rest else [done]


def streamed(worker: Worker, questions: Sequence[Question]) -> Generator[tuple[int, Event], None, None]:
    """What becomes of questions that run side by side: the question's number, and an event, until all have ended.

    Whoever stops iterating frees the rows.
    """
    events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    listeners = [lambda event, i=i: events.put((i, event)) for i in range(len(questions))]
    tickets = worker.ask(list(zip(questions, listeners, strict=True)))
    try:
        left = len(questions)
        while left:
            i, event = events.get()
            left -= not isinstance(event, Piece)
            yield i, event
    finally:
        for ticket in tickets:
            ticket.cancel()


def answers_of(worker: Worker, questions: Sequence[Question]) -> list[Done]:
    """The answers to questions that run side by side, once all are complete. Raises what went wrong."""
    answers: dict[int, Done] = {}
    for i, event in streamed(worker, questions):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Done):
            answers[i] = event
    return [answers[i] for i in range(len(questions))]
