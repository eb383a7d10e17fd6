"""What may be spent: calls, tokens and money; reserved before a call is sent, settled afterwards.

A transmission reserves the most that it could cost. It ends in one of three ways: *settled* (an
answer came, its usage is counted), *released* (it was certainly not paid for) or *possibly paid*
(it timed out, or the connection was cut): then the reservation stays, is written down, and counts
against the caps like what was spent. Spent + possibly paid + reserved never pass a cap.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from data_gen.prices import FREE, Rate, Usage


class BudgetSpent(RuntimeError):
    """The next call would break a cap."""


@dataclass
class Spent:
    """Requests sent, tokens of those that were answered, and what is possibly paid beside them."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    possibly_paid_tokens: int = 0
    possibly_paid_cost: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class AtMost(NamedTuple):
    """What the transmissions of one model that are out may cost at most."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0


class Ledger(Protocol):
    """Where reservations are made durable, so that a killed run cannot hide what it sent."""

    async def lease(self, held: Mapping[str, AtMost]) -> None: ...


class Reservation:
    """What one transmission may cost, until it is known what it did cost."""

    def __init__(self, budget: "Budget", model: str, most: Usage, rate: Rate, leased: bool) -> None:
        self._budget = budget
        self.model = model
        self.most = most
        self.rate = rate
        self.leased = leased
        self._open = True

    def settle(self, usage: Usage) -> None:
        """An answer came: count what it used."""
        if self._close():
            self._budget.count(usage, self.rate)

    def release(self) -> None:
        """Nothing was paid: the request was refused, or never sent."""
        self._close()

    def keep(self) -> None:
        """It is not known whether it was paid: it stays counted."""
        if self._close():
            spent = self._budget.spent
            spent.possibly_paid_tokens += self.most.tokens
            spent.possibly_paid_cost += self.rate.of(self.most)

    def _close(self) -> bool:
        was_open, self._open = self._open, False
        if was_open:
            self._budget.give_back(self)
        return was_open


@dataclass
class _Out:
    """The open reservations of one model."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0

    def add(self, most: Usage, sign: int) -> None:
        self.prompt_tokens += sign * most.prompt
        self.completion_tokens += sign * most.completion
        self.requests += sign


@dataclass(frozen=True)
class Caps:
    """The most that a job may spend; None is no cap."""

    calls: int | None = None
    tokens: int | None = None
    cost: float | None = None
    currency: str = ""


@dataclass
class Budget:
    """Counts what a job spends and stops it at its caps.

    A request that does not fit waits while others are in flight, then is refused. `concurrency`
    is the most requests in flight; batches, which are one request for many calls, take no slot.
    """

    concurrency: int
    caps: Caps = field(default_factory=Caps)
    spent: Spent = field(default_factory=Spent)
    ledger: Ledger | None = None

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.concurrency)
        self._settled = asyncio.Event()
        self._out: dict[str, _Out] = {}
        self._reserved_tokens = 0
        self._reserved_cost = 0.0
        self._in_flight = 0
        self._leased: dict[str, AtMost] = {}

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """One of the places for requests in flight."""
        async with self._slots:
            yield

    async def reserve(
        self, model: str, most: Usage, rate: Rate = FREE, leased: bool = True
    ) -> Reservation:
        """A reservation that is durable before it is returned; `BudgetSpent` if it cannot be.

        A batch is in the journal before it is sent and needs no lease.
        """
        while (refusal := self._refusal(most, rate)) is not None:
            if self._in_flight == 0 or refusal[0] == "max_calls":
                raise BudgetSpent(self._explain(*refusal))
            self._settled.clear()
            await self._settled.wait()
        reservation = Reservation(self, model, most, rate, leased)
        self.spent.calls += 1
        self._take(reservation, 1)
        if not leased:
            return reservation
        try:
            await self._make_durable()
        except BaseException:
            reservation.release()
            raise
        return reservation

    def adopt(self, model: str, most: Usage, rate: Rate) -> Reservation:
        """The reservation of a call that an earlier run sent, which was possibly paid until now."""
        self.spent.possibly_paid_tokens -= most.tokens
        self.spent.possibly_paid_cost -= rate.of(most)
        reservation = Reservation(self, model, most, rate, leased=False)
        self.spent.calls += 1
        self._take(reservation, 1)
        return reservation

    def count(self, usage: Usage, rate: Rate) -> None:
        """Count what an answered request used."""
        self.spent.prompt_tokens += usage.prompt
        self.spent.completion_tokens += usage.completion
        self.spent.cost += rate.of(usage)

    def give_back(self, reservation: Reservation) -> None:
        """The end of a reservation, whichever it is."""
        self._take(reservation, -1)
        self._settled.set()

    def held(self) -> dict[str, AtMost]:
        """The open reservations by model."""
        return {
            model: AtMost(out.prompt_tokens, out.completion_tokens, out.requests)
            for model, out in self._out.items()
        }

    def _take(self, reservation: Reservation, sign: int) -> None:
        most = reservation.most
        if reservation.leased:
            if reservation.model not in self._out:
                self._out[reservation.model] = _Out()
            self._out[reservation.model].add(most, sign)
        self._reserved_tokens += sign * most.tokens
        self._reserved_cost += sign * reservation.rate.of(most)
        self._in_flight += sign

    async def _make_durable(self) -> None:
        """Write the reservations down where they pass what was written before.

        Only new heights are written, with a little to spare, so this costs a commit a few dozen
        times a run and not once a call.
        """
        if self.ledger is None:
            return
        held = self.held()
        if all(_covers(self._leased.get(model, AtMost()), now) for model, now in held.items()):
            return
        lease = {
            model: AtMost(
                *(most + most // 8 for most in map(max, now, self._leased.get(model, now)))
            )
            if not _covers(self._leased.get(model, AtMost()), now)
            else self._leased[model]
            for model, now in held.items()
        }
        await self.ledger.lease(lease)
        for model, written in lease.items():
            before = self._leased.get(model, AtMost())
            self._leased[model] = AtMost(*map(max, before, written))

    def _refusal(self, most: Usage, rate: Rate) -> tuple[str, float, float] | None:
        """(field, cap, what is committed) of the first cap that another such call would break."""
        spent, caps = self.spent, self.caps
        tokens = spent.tokens + spent.possibly_paid_tokens + self._reserved_tokens
        cost = spent.cost + spent.possibly_paid_cost + self._reserved_cost
        if caps.calls is not None and spent.calls + 1 > caps.calls:
            return "max_calls", caps.calls, spent.calls
        if caps.tokens is not None and tokens + most.tokens > caps.tokens:
            return "max_tokens", caps.tokens, tokens
        if caps.cost is not None and cost + rate.of(most) > caps.cost:
            return "max_cost", caps.cost, cost
        return None

    def _explain(self, field_name: str, cap: float, committed: float) -> str:
        spent, caps = self.spent, self.caps
        said = f"{spent.calls} calls, {spent.tokens} tokens"
        if caps.cost is not None:
            said += f", {spent.cost:.2f} {caps.currency}".rstrip()
        said += " spent"
        if spent.possibly_paid_tokens:
            said += f", {spent.possibly_paid_tokens} tokens possibly paid"
        refused = f"limits.{field_name}={cap} does not allow another call"
        return f"{refused} ({said}); raise it and run again"


def _covers(leased: AtMost, now: AtMost) -> bool:
    return all(most >= need for most, need in zip(leased, now, strict=True))
