"""The budget: reserved before sent, settled after, never above a cap, over kills too."""

import asyncio
import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from data_gen.budget import Budget, BudgetSpent, Caps, Spent
from data_gen.journal import Journal, Unsettled, read_cost
from data_gen.prices import PriceList, Rate, Usage

MOST = Usage(60, 40)
EURO = PriceList("EUR", {"m": Rate(input=1.0, output=3.0, cached_input=0.5)}, batch_share=0.5)


def test_spent_and_reserved_never_pass_the_cap_at_any_concurrency():
    async def run(caps: Caps, seed: int) -> tuple[Budget, int]:
        budget, draw, highest = Budget(64, caps), random.Random(seed), 0

        async def call() -> None:
            nonlocal highest
            async with budget.slot():
                held = await budget.reserve("m", MOST)
                out = sum(h.prompt_tokens + h.completion_tokens for h in budget.held().values())
                committed = budget.spent.tokens + budget.spent.possibly_paid_tokens + out
                highest = max(highest, committed)
                await asyncio.sleep(draw.random() / 1000)
                how = draw.random()
                if how < 0.6:
                    held.settle(Usage(draw.randint(1, 60), draw.randint(0, 40)))
                elif how < 0.8:
                    held.release()
                else:
                    held.keep()

        results = await asyncio.gather(*(call() for _ in range(300)), return_exceptions=True)
        assert any(isinstance(result, BudgetSpent) for result in results)
        assert not any(h.requests for h in budget.held().values())
        return budget, highest

    for seed in range(5):
        budget, highest = asyncio.run(run(Caps(tokens=2000), seed))
        assert 2000 - MOST.tokens < highest <= 2000
        assert budget.spent.tokens + budget.spent.possibly_paid_tokens <= 2000


def test_a_call_that_does_not_fit_waits_for_others_and_is_refused_only_then():
    async def run() -> list[object]:
        budget = Budget(8, Caps(tokens=150))
        first = await budget.reserve("m", MOST)
        second = asyncio.create_task(budget.reserve("m", MOST))
        await asyncio.sleep(0.01)
        assert not second.done()
        first.settle(Usage(10, 10))
        third = asyncio.create_task(budget.reserve("m", MOST))
        (await second).settle(Usage(40, 11))
        return [await asyncio.gather(third, return_exceptions=True), budget.spent.tokens]

    [[refused], spent] = asyncio.run(run())  # type: ignore[misc]
    assert isinstance(refused, BudgetSpent) and spent == 71
    assert "limits.max_tokens=150" in str(refused) and "71 tokens spent" in str(refused)


def test_a_cap_in_money_counts_input_output_and_cached_tokens_by_the_price_table():
    rate = EURO.rate("m")
    assert rate.of(Usage(1_000_000, 1_000_000, 400_000)) == pytest.approx(0.6 + 0.2 + 3.0)
    assert EURO.rate("m", batch=True).of(Usage(1_000_000, 0)) == pytest.approx(0.5)
    assert EURO.rate("unknown").of(MOST) == 0

    async def run() -> None:
        budget = Budget(8, Caps(cost=4.0, currency="EUR"))
        (await budget.reserve("m", Usage(1_000_000, 1_000_000), rate)).settle(Usage(500_000, 0))
        most = Usage(500_000, 1_000_000)
        (await budget.reserve("m", most, rate)).settle(most)
        with pytest.raises(BudgetSpent, match=r"limits.max_cost=4.0 .*, 4.00 EUR spent"):
            await budget.reserve("m", Usage(0, 1), rate)

    asyncio.run(run())


def test_reservations_are_durable_before_the_request_and_gone_after_an_orderly_end(tmp_path):
    path = tmp_path / "j.sqlite"

    async def run() -> int:
        journal = Journal(path)
        budget = Budget(64, ledger=journal)
        held = await asyncio.gather(*(budget.reserve("m", MOST) for _ in range(10)))
        with closing(sqlite3.connect(path)) as db:
            leased = db.execute("SELECT SUM(prompt_tokens), SUM(requests) FROM leases").fetchone()
        for one in held:
            one.settle(Usage(1, 1))
        await journal.drain()
        journal.close()
        assert leased[0] >= 10 * MOST.prompt and leased[1] >= 10
        return leased[0]

    assert asyncio.run(run()) <= 12 * MOST.prompt
    assert read_cost(path)["possibly_paid"] == {}


KILLED = """
import asyncio, sys
from pathlib import Path
from data_gen.budget import Budget
from data_gen.journal import Journal
from data_gen.prices import Usage

async def main():
    budget = Budget(64, ledger=Journal(Path(sys.argv[1])))
    for _ in range(5):
        await budget.reserve("m", Usage(60, 40))
    print("sent", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_what_a_killed_run_had_out_is_possibly_paid_in_the_next(tmp_path):
    path = tmp_path / "j.sqlite"
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "sent\n"
        alive = read_cost(path)["possibly_paid"]
        child.send_signal(signal.SIGKILL)
    assert list(alive) == ["out now, at most"]
    told = read_cost(path, EURO)
    assert list(told["possibly_paid"]) == ["out when a run was killed"]
    assert told["possibly_paid_cost"] == pytest.approx(EURO.rate("m").of(Usage(300, 200)), rel=0.3)

    async def next_run() -> Spent:
        journal = Journal(path)
        try:
            spent = journal.spent()
            with pytest.raises(BudgetSpent, match="tokens possibly paid"):
                await Budget(8, Caps(tokens=550), spent, journal).reserve("m", MOST)
            return spent
        finally:
            journal.close()

    spent = asyncio.run(next_run())
    assert 500 <= spent.possibly_paid_tokens <= 650 and spent.calls >= 5


def test_a_call_that_timed_out_stays_possibly_paid_over_restarts(tmp_path):
    path = tmp_path / "j.sqlite"

    async def run() -> None:
        journal = Journal(path)
        journal.leave_unsettled(Unsettled("k", "reasoner", "m", "u", 60, 40, "no answer", 1.0))
        await journal.drain()
        journal.close()

    asyncio.run(run())
    cost = read_cost(path)
    assert cost["possibly_paid"] == {"timed out or cut": {"requests": 1, "tokens": 100}}
    assert cost["requests"] == 1 and cost["tokens"] == 0
