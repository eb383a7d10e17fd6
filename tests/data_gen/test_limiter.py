"""Rates, windows and rests of an endpoint, on a clock of the test's own."""

import asyncio
import time

from data_gen.limiter import Bucket, Gate, choose


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_no_minute_holds_more_than_the_rate_and_one_burst():
    clock = Clock()
    bucket, taken = Bucket(600, clock), []
    while clock.now < 180:
        wait = bucket.seconds_until(1)
        if wait > 0:
            clock.now += wait
        else:
            bucket.take(1)
            taken.append(clock.now)
    most = max(sum(start <= t < start + 60 for t in taken) for start in range(0, 120, 5))
    assert 595 <= most <= 611


def test_a_call_larger_than_a_burst_is_let_through_and_paid_off():
    clock = Clock()
    bucket = Bucket(600, clock)  # 10 a second
    assert bucket.seconds_until(100) == 0
    bucket.take(100)
    assert bucket.seconds_until(1) == (100 - 10 + 1) / 10
    bucket.take(-80)  # it used less than was counted
    assert bucket.seconds_until(1) == (20 - 10 + 1) / 10


def gate(clock, most=8, **rates) -> Gate:
    return Gate("http://x", most, clock=clock, **rates)


def test_a_429_halves_what_is_out_once_and_answers_bring_it_back():
    clock = Clock()

    async def run() -> list[float]:
        one = gate(clock)
        out = [one.enter(1, 1) for _ in range(4)]
        passes = [await way.__aenter__() for way in out]
        for each in passes:
            one.too_many(each, 0.0)  # all four were out when the first was refused
        windows = [one.window]
        for way in out:
            await way.__aexit__(None, None, None)
        for _ in range(200):
            async with one.enter(1, 1) as each:
                one.answered(each, 1, 1)
        return [*windows, one.window]

    assert asyncio.run(run()) == [4.0, 8.0]


def test_no_more_are_out_than_the_window():
    async def run() -> int:
        one, now, most = gate(time.monotonic, most=3), 0, 0

        async def call() -> None:
            nonlocal now, most
            async with one.enter(1, 1) as each:
                now += 1
                most = max(most, now)
                await asyncio.sleep(0.001)
                now -= 1
                one.answered(each, 1, 1)

        await asyncio.gather(*(call() for _ in range(30)))
        return most

    assert asyncio.run(run()) == 3


def test_requests_per_minute_space_the_calls():
    async def run() -> float:
        one = gate(time.monotonic, most=64, requests_per_minute=600)  # 10 at once, then 10 a second
        start = time.monotonic()

        async def call() -> None:
            async with one.enter(1, 1):
                pass

        await asyncio.gather(*(call() for _ in range(15)))
        return time.monotonic() - start

    assert 0.4 < asyncio.run(run()) < 2.0


def test_tokens_per_minute_are_counted_by_what_was_used():
    clock = Clock()

    async def run() -> list[float]:
        one = gate(clock, tokens_per_minute=6000)  # 100 a second
        waits = []
        for _ in range(3):
            async with one.enter(10, 1000) as each:
                one.answered(each, 10, 190)
            clock.now += 1
            waits.append(one._tokens.seconds_until(100))
            clock.now += waits[-1]
        return waits

    # 200 tokens each take 2 s at 100 a second, though 1010 and then 200 were expected.
    assert asyncio.run(run()) == [1.0, 1.0, 1.0]


def test_a_busy_server_is_rested_as_long_as_it_asks():
    clock = Clock()

    async def run() -> float:
        one = gate(clock)
        async with one.enter(1, 1) as each:
            one.too_many(each, 7.0)
        return one.rest_seconds()

    assert asyncio.run(run()) == 7.0


def test_an_endpoint_that_keeps_failing_is_rested_longer_each_time_and_the_other_is_chosen():
    clock = Clock()

    async def fail(one: Gate) -> None:
        async with one.enter(1, 1) as each:
            one.failed(each, 0.0)

    async def run() -> None:
        bad, good = gate(clock), gate(clock)
        await fail(bad)
        assert bad.rest_seconds() == 0 and choose([bad, good]) is good
        await fail(bad)
        await fail(bad)
        first = bad.rest_seconds()
        assert first > 0 and choose([bad, good]) is good
        clock.now += first
        await fail(bad)
        assert bad.rest_seconds() == 2 * first
        clock.now += 2 * first
        async with bad.enter(1, 1) as each:
            bad.answered(each, 1, 1)
        await fail(bad)
        assert bad.rest_seconds() == 0

    asyncio.run(run())


def test_the_least_busy_endpoint_is_chosen():
    async def run() -> None:
        one, two = gate(time.monotonic), gate(time.monotonic)
        async with one.enter(1, 1):
            assert choose([one, two]) is two
            async with two.enter(1, 1), two.enter(1, 1):
                assert choose([one, two]) is one

    asyncio.run(run())
