"""What may be spent: calls in flight, calls and tokens in all; reserved before a call is sent."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


class BudgetSpent(RuntimeError):
    """The next call would break a cap."""


@dataclass
class Spent:
    """Requests sent, and the tokens of those that were answered."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Budget:
    """Counts what a job spends and stops it at its caps.

    A request reserves the most tokens it could use; the reservation becomes the real count when the
    answer is there. A request that does not fit waits while others are in flight, then is refused.
    """

    def __init__(
        self,
        concurrency: int,
        max_calls: int | None = None,
        max_tokens: int | None = None,
        before: Spent | None = None,
    ) -> None:
        self.spent = before if before is not None else Spent()
        self._max_calls = max_calls
        self._max_tokens = max_tokens
        self._reserved = 0
        self._in_flight = 0
        self._slots = asyncio.Semaphore(concurrency)
        self._settled = asyncio.Event()

    @asynccontextmanager
    async def request(self, most_tokens: int) -> AsyncIterator[None]:
        """Hold one of the slots and a reservation while a request is out."""
        async with self._slots:
            await self._reserve(most_tokens)
            try:
                yield
            finally:
                self._reserved -= most_tokens
                self._in_flight -= 1
                self._settled.set()

    def record(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count what an answered request used."""
        self.spent.prompt_tokens += prompt_tokens
        self.spent.completion_tokens += completion_tokens

    async def _reserve(self, tokens: int) -> None:
        if self._max_calls is not None and self.spent.calls + 1 > self._max_calls:
            raise BudgetSpent(self._refusal("max_calls", self._max_calls))
        while self._max_tokens is not None and (
            self.spent.tokens + self._reserved + tokens > self._max_tokens
        ):
            if self._in_flight == 0:
                raise BudgetSpent(self._refusal("max_tokens", self._max_tokens))
            self._settled.clear()
            await self._settled.wait()
        self.spent.calls += 1
        self._reserved += tokens
        self._in_flight += 1

    def _refusal(self, field: str, cap: int) -> str:
        return (
            f"limits.{field}={cap} does not allow another call "
            f"({self.spent.calls} calls, {self.spent.tokens} tokens spent); raise it and run again"
        )
