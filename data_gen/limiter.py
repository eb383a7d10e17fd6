"""How fast one endpoint is asked: requests and tokens per minute, and how many at once.

The number at once adapts to what the endpoint bears (additive increase, multiplicative decrease:
Chiu and Jain 1989): an answer raises it by a little, a 429 halves it. A server that names a time to
wait, or fails, is rested. Written here because a token's cost is known only afterwards and both
rates, the window and the rest have to be waited for together; libraries limit one rate of events.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

BURST_SECONDS = 1.0  # of a rate may be used at once
FAILURES_BEFORE_REST = 3  # in a row; a single one is the call's own affair
FIRST_REST, LONGEST_REST = 0.5, 60.0  # seconds; doubled for every rest without an answer between
SMALLEST_WINDOW = 1.0
_SMOOTHING = 0.05  # weight of the newest answer in the mean length of answers


class Bucket:
    """A rate per minute; it may go into debt for one call that is larger than a burst."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float]) -> None:
        self._per_second = None if per_minute is None else per_minute / 60
        self._clock = clock
        self._level = self._most = max(1.0, (self._per_second or 0.0) * BURST_SECONDS)
        self._then = clock()

    def seconds_until(self, amount: float) -> float:
        """How long until the amount may be taken."""
        if self._per_second is None:
            return 0.0
        self._refill()
        missing = min(amount, self._most) - self._level
        return missing / self._per_second if missing > 1e-9 else 0.0

    def take(self, amount: float) -> None:
        """Take it, or give it back where it is negative."""
        if self._per_second is not None:
            self._refill()
            self._level = min(self._most, self._level - amount)

    def _refill(self) -> None:
        assert self._per_second is not None
        now = self._clock()
        self._level = min(self._most, self._level + (now - self._then) * self._per_second)
        self._then = now


@dataclass
class Pass:
    """The right to send one request, with the tokens that were counted for it."""

    gate: "Gate"
    tokens: float
    number: int


class Gate:
    """The way to one endpoint."""

    def __init__(
        self,
        url: str,
        most_at_once: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = url
        self.window = float(most_at_once)
        self.in_flight = 0
        self.waiting = 0
        self._most_at_once = most_at_once
        self._clock = clock
        self._requests = Bucket(requests_per_minute, clock)
        self._tokens = Bucket(tokens_per_minute, clock)
        self._rests_until = 0.0
        self.failures = self._rests = 0
        self._sent = 0
        self._halved_at = self._rested_at = 0
        self._mean_answer: float | None = None
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()

    @property
    def load(self) -> float:
        """How full it is, for choosing among several."""
        return (self.in_flight + self.waiting) / self.window

    def rest_seconds(self) -> float:
        """How long it is still rested."""
        return max(0.0, self._rests_until - self._clock())

    @asynccontextmanager
    async def enter(self, prompt_tokens: int, most_completion: int) -> AsyncIterator[Pass]:
        """Wait, first come first served, until the endpoint may be asked; then hold a place."""
        mean = self._mean_answer
        expected = most_completion if mean is None else min(most_completion, mean)
        allowed = await self._wait(prompt_tokens + expected)
        try:
            yield allowed
        finally:
            self.in_flight -= 1
            self._changed.set()

    async def _wait(self, tokens: float) -> Pass:
        self.waiting += 1
        try:
            async with self._turn:
                while (seconds := self._seconds_to_wait(tokens)) is None or seconds > 0:
                    self._changed.clear()
                    try:
                        await asyncio.wait_for(self._changed.wait(), seconds)
                    except TimeoutError:
                        pass
                self.in_flight += 1
                self._sent += 1
                self._requests.take(1)
                self._tokens.take(tokens)
                return Pass(self, tokens, self._sent)
        finally:
            self.waiting -= 1

    def _seconds_to_wait(self, tokens: float) -> float | None:
        """None: until another request ends."""
        if self.in_flight >= max(SMALLEST_WINDOW, int(self.window)):
            return None
        waits = (self._requests.seconds_until(1), self._tokens.seconds_until(tokens))
        return max(self.rest_seconds(), *waits)

    # --- what a request came to ---

    def answered(self, allowed: Pass, prompt_tokens: int, completion_tokens: int) -> None:
        """An answer: correct the count of tokens, allow a little more at once."""
        self._tokens.take(prompt_tokens + completion_tokens - allowed.tokens)
        mean = completion_tokens if self._mean_answer is None else self._mean_answer
        self._mean_answer = mean + _SMOOTHING * (completion_tokens - mean)
        self.failures = self._rests = 0
        self.window = min(float(self._most_at_once), self.window + 1 / self.window)

    def too_many(self, allowed: Pass, wait: float) -> None:
        """A 429: halve what is sent at once, once for all that were out; wait as long as asked."""
        self._tokens.take(-allowed.tokens)
        if allowed.number > self._halved_at:
            self._halved_at = self._sent
            self.window = max(SMALLEST_WINDOW, self.window / 2)
        self._rest(wait)

    def failed(self, allowed: Pass, wait: float) -> None:
        """It is broken or away: rest as long as it asks; after a few in a row rest it longer."""
        if wait > 0:
            self._rest(wait)
        if allowed.number <= self._rested_at:
            return  # sent before the rest: it tells nothing new
        self.failures += 1
        if self.failures >= FAILURES_BEFORE_REST:
            self._rested_at = self._sent
            self._rest(min(LONGEST_REST, FIRST_REST * 2 ** min(self._rests, 10)))
            self._rests += 1
            self.failures = FAILURES_BEFORE_REST - 1

    def _rest(self, seconds: float) -> None:
        self._rests_until = max(self._rests_until, self._clock() + seconds)
        self._changed.set()


def choose(gates: Sequence[Gate]) -> Gate:
    """The least busy of those that are not rested, else the one that is rested least."""
    return min(gates, key=lambda gate: (gate.rest_seconds(), gate.load + gate.failures / 4))
