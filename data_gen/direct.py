"""Asking one by one: choose an endpoint, reserve, send, try again while it is busy or broken."""

import asyncio
import random
import time

from data_gen.asking import (
    Answer,
    Endpoint,
    Patience,
    Question,
    TeacherFailed,
    count_usage,
    keep_unsettled,
    refusal,
)
from data_gen.budget import Budget
from data_gen.journal import Journal
from data_gen.limiter import Gate, choose
from data_gen.transport import Failure, Reply, Wire

LONGEST_RETRY_AFTER = 120.0  # seconds; a server that asks for more is taken as down


class DirectLine:
    """One role's way to its endpoints, least busy first."""

    def __init__(
        self, place: Endpoint, wire: Wire, journal: Journal, budget: Budget, patience: Patience
    ) -> None:
        self._place = place
        self._address = place.address
        self._wire = wire
        self._journal = journal
        self._budget = budget
        self._patience = patience
        self._gates = [
            wire.gate(url, budget.concurrency, place.requests_per_minute, place.tokens_per_minute)
            for url in place.base_urls
        ]
        self._doubt = _Doubt()

    async def answer(self, question: Question) -> Answer:
        """The answer, after as many tries as it takes and patience allows."""
        with self._doubt:
            return await self._ask(question)

    async def close(self) -> None:
        """Nothing is held open between calls."""

    async def _ask(self, question: Question) -> Answer:
        attempts = tries = 0
        deadline = time.monotonic() + self._patience.busy_seconds
        while True:
            gate = choose(self._gates)
            attempts += 1
            try:
                reply = await self._try(question, gate)
            except Failure as failure:
                if failure.kind == "refused":
                    return await self._refused(question, failure, gate, attempts)
                tries += failure.kind == "broken"
                self._give_up_on(failure, tries, attempts, deadline)
            else:
                self._doubt.dispel()
                return Answer(reply, count_usage(reply, question), attempts, gate.url)
            await asyncio.sleep(self._back_off(attempts))

    async def _try(self, question: Question, gate: Gate) -> Reply:
        most = question.most
        async with gate.enter(most.prompt // 4, most.completion) as allowed, self._budget.slot():
            held = await self._budget.reserve(self._place.model, most, self._place.rate)
            try:
                reply = await self._wire.post_chat(gate.url, question.body, self._address)
            except Failure as failure:
                if failure.maybe_paid:
                    sent = [(question, held)]
                    keep_unsettled(self._journal, self._place, sent, gate.url, str(failure))
                held.release()
                if failure.kind == "busy":
                    gate.too_many(allowed, failure.wait)
                elif failure.kind == "broken":
                    gate.failed(allowed, failure.wait)
                raise
            except BaseException:
                sent = [(question, held)]
                keep_unsettled(
                    self._journal, self._place, sent, gate.url, "given up while it was out"
                )
                raise
            used = count_usage(reply, question)
            held.settle(used)
            gate.answered(allowed, used.prompt, used.completion)
            return reply

    def _give_up_on(self, failure: Failure, tries: int, attempts: int, deadline: float) -> None:
        """`TeacherFailed` where another try would be no use."""
        lasting = failure.kind == "lasting"
        spent = tries >= self._patience.attempts or time.monotonic() >= deadline
        if lasting or spent or self._rest_seconds() > LONGEST_RETRY_AFTER:
            told = str(failure) if lasting else f"{failure} ({attempts} tries)"
            raise TeacherFailed(self._place.complaint(told)) from None

    def _rest_seconds(self) -> float:
        """How long until the first of the endpoints may be asked."""
        return min(gate.rest_seconds() for gate in self._gates)

    def _back_off(self, attempts: int) -> float:
        """Exponential with full jitter; a time that the server names is waited for at its gate."""
        longest = self._patience.first_wait * 2 ** min(attempts - 1, 30)
        return random.uniform(0, min(self._patience.longest_wait, longest))

    async def _refused(
        self, question: Question, failure: Failure, gate: Gate, attempts: int
    ) -> Answer:
        if await self._doubt.is_confirmed():
            raise TeacherFailed(self._place.complaint(str(failure))) from None
        reply = refusal(self._address.hide(failure))
        return Answer(reply, count_usage(reply, question), attempts, gate.url)


class _Doubt:
    """Whether a refused request says something about itself or about the settings of all.

    An endpoint that has answered once refuses a request for what is in it (a content filter, a
    length): that one item is rejected. One that has answered nothing, and has nothing else to
    answer, is not set up right: the run stops.
    """

    def __init__(self) -> None:
        self._dispelled = False
        self._asking = 0
        self._doubting = 0
        self._changed = asyncio.Event()

    def __enter__(self) -> None:
        self._asking += 1

    def __exit__(self, *_: object) -> None:
        self._asking -= 1
        self._changed.set()

    def dispel(self) -> None:
        """An answer came."""
        if not self._dispelled:
            self._dispelled = True
            self._changed.set()

    async def is_confirmed(self) -> bool:
        """Wait until an answer came to another call, or none is left that could bring one."""
        self._doubting += 1
        try:
            while not self._dispelled and self._doubting < self._asking:
                self._changed.clear()
                await self._changed.wait()
            return not self._dispelled
        finally:
            self._doubting -= 1
            self._changed.set()
