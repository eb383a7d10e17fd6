"""The thread that drives the engine, and how its results reach the event loop.

All work on the devices is done by this one thread: it takes commands, scores prompts, runs a round
of the session, and hands what came to the event loop with one call. Nothing polls. Whatever waits
is bounded: no more than `capacity` pieces of work are let in, and one holds no more tokens than
were asked for.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from medreason_jax.generate.requests import Progress


class Session(Protocol):
    """The engine's session, of which this thread is the only user."""

    idle: bool

    def submit(self, request, /) -> int: ...

    def cancel(self, request: int, /) -> None: ...

    def round(self) -> Sequence[Progress]: ...


@dataclass(frozen=True)
class PromptText:
    """A prompt whose tokens' log-probs are asked for, with `top` alternatives each."""

    ids: Sequence[int]
    top: int


@dataclass(frozen=True)
class PromptScores:
    """Log-probs of a prompt's tokens from the second on, and the likeliest tokens there."""

    logprobs: list[float]
    top: list[list[tuple[int, float]]]


class Scoring(Protocol):
    def score(self, texts: Sequence[PromptText], /) -> list[PromptScores]: ...

    def fitting(self, texts: Sequence[PromptText], /) -> int: ...


class Mailbox:
    """What has been made for one answer and was not yet taken; `size` pieces of work fill it.

    `put` and `take` are the event loop's. `numbers` (the engine's, by the piece's index) and
    `missing` (scores that have to come before the requests start) are the engine thread's.
    """

    def __init__(self, requests: Sequence, texts: Sequence[PromptText]):
        self.requests, self.texts = requests, texts
        self.size = len(requests) + len(texts)
        self.numbers: dict[int, int] = {}
        self.missing = len(texts)
        self._items: list[tuple[int, Progress | PromptScores]] = []
        self._error: BaseException | None = None
        self._arrived = asyncio.Event()

    def put(self, index: int, item: Progress | PromptScores | BaseException) -> None:
        if isinstance(item, BaseException):
            self._error = item
        else:
            self._items.append((index, item))
        self._arrived.set()

    async def take(self) -> list[tuple[int, Progress | PromptScores]]:
        """All that has come, at least one; raises what went wrong.

        Scores carry the index of their text and come before any progress, which carries the index
        of its request.
        """
        await self._arrived.wait()
        self._arrived.clear()
        if self._error is not None:
            raise self._error
        items, self._items = self._items, []
        return items


class Unfit(ValueError):
    """The engine has refused a request."""


class CutOff(RuntimeError):
    """An answer that will not be finished: the engine has failed, or the server was told to end."""


class Driver:
    """The engine's thread and the places in it. `start`, `open`, `close` are the event loop's."""

    def __init__(self, session: Session, scoring: Scoring, capacity: int):
        self.capacity, self.used = capacity, 0
        self.failure: BaseException | None = None
        self.when_idle: Callable[[], None] = lambda: None
        self.when_failed: Callable[[], None] = lambda: None
        self._session, self._scoring = session, scoring
        self._open: set[Mailbox] = set()
        self._changed = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._ending = False
        self._running: dict[int, tuple[Mailbox, int]] = {}
        self._texts: list[tuple[Mailbox, int]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- the event loop's side ------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def stop(self, seconds: float | None = None) -> None:
        """End the thread after the round it is in; blocks."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(seconds)

    def open(self, requests: Sequence, texts: Sequence[PromptText]) -> Mailbox | None:
        """Start an answer's work; None when there are not enough places."""
        if self.failure is not None:
            raise CutOff("the engine has stopped")
        mailbox = Mailbox(requests, texts)
        if self.used + mailbox.size > self.capacity:
            return None
        self.used += mailbox.size
        self._open.add(mailbox)
        self._command(lambda: self._begin(mailbox))
        return mailbox

    def close(self, mailbox: Mailbox) -> None:
        """The answer needs nothing more; its places are free when the thread knows."""
        self._open.discard(mailbox)
        self._command(lambda: self._end(mailbox))

    def drop(self, mailbox: Mailbox, index: int) -> None:
        """One request of an answer needs nothing more."""
        self._command(lambda: self._cancel(mailbox, index))

    def cut_off(self, reason: str) -> int:
        """Fail every open answer; returns how many there were."""
        for mailbox in self._open:
            mailbox.put(0, CutOff(reason))
        return len(self._open)

    def _command(self, command: Callable[[], None]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def _free(self, places: int) -> None:
        self.used -= places
        if self.used == 0:
            self.when_idle()

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.cut_off("the engine has stopped")
        self.when_failed()

    # --- the engine thread's side ---------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self._texts:
                    self._score()
                if not self._session.idle:
                    self._deliver(self._session.round())
        except BaseException as error:  # whatever it is, the server has to end and say it
            self._tell(partial(self._fail, error))

    def _take_commands(self) -> bool:
        """Wait for something to do, and do what was asked; False when the thread is to end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._commands or self._ending or self._texts or not self._session.idle
            )
            if self._ending:
                return False
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        return True

    def _begin(self, mailbox: Mailbox) -> None:
        self._texts += [(mailbox, index) for index in range(len(mailbox.texts))]
        if not mailbox.texts:
            self._submit(mailbox)

    def _submit(self, mailbox: Mailbox) -> None:
        for index, request in enumerate(mailbox.requests):
            try:
                number = self._session.submit(request)
            except ValueError as error:
                self._tell(partial(mailbox.put, 0, Unfit(str(error))))
                return
            mailbox.numbers[index] = number
            self._running[number] = (mailbox, index)

    def _cancel(self, mailbox: Mailbox, index: int) -> None:
        number = mailbox.numbers.pop(index, None)
        if number is not None:
            del self._running[number]
            self._session.cancel(number)

    def _end(self, mailbox: Mailbox) -> None:
        for index in list(mailbox.numbers):
            self._cancel(mailbox, index)
        self._texts = [entry for entry in self._texts if entry[0] is not mailbox]
        self._tell(partial(self._free, mailbox.size))

    def _score(self) -> None:
        """One batch of the prompts that wait; then start the requests of those that have all."""
        waiting = [mailbox.texts[index] for mailbox, index in self._texts]
        count = self._scoring.fitting(waiting)
        batch, self._texts = self._texts[:count], self._texts[count:]
        scores = self._scoring.score(waiting[:count])
        self._put([(*place, found) for place, found in zip(batch, scores, strict=True)])
        for mailbox, _ in batch:
            mailbox.missing -= 1
            if mailbox.missing == 0:
                self._submit(mailbox)

    def _deliver(self, round: Iterable[Progress]) -> None:
        parts = []
        for progress in round:
            mailbox, index = self._running[progress.request]
            parts.append((mailbox, index, progress))
            if progress.finish_reason is not None:
                del self._running[progress.request], mailbox.numbers[index]
        if parts:
            self._put(parts)

    def _put(self, parts: list[tuple[Mailbox, int, Progress | PromptScores]]) -> None:
        def put() -> None:
            for mailbox, index, item in parts:
                mailbox.put(index, item)

        self._tell(put)

    def _tell(self, call: Callable[[], None]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)
