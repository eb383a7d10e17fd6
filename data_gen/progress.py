"""Progress on stderr: a bar on a terminal, a plain line now and then in a log."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A function to call once for every finished item."""
    if sys.stderr.isatty():
        with tqdm(total=total, desc=label, unit="item") as bar:

            def move() -> None:
                bar.update()

            yield move
        return
    done, last = 0, time.monotonic()

    def advance() -> None:
        nonlocal done, last
        done += 1
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES and done < total:
            last = time.monotonic()
            print(f"{label}: {done}/{total}", file=sys.stderr, flush=True)

    yield advance
    print(f"{label}: {done}/{total} done", file=sys.stderr, flush=True)


async def map_concurrently(
    items: Sequence[Item], work: Callable[[Item], Awaitable[Result]], workers: int, label: str
) -> list[Result]:
    """`work` of every item, at most `workers` at a time; results in the order of the items.

    The first failure stops the others and is raised.
    """
    results: dict[int, Result] = {}
    queue = iter(enumerate(items))

    with progress(label, len(items)) as advance:

        async def worker() -> None:
            for index, item in queue:
                results[index] = await work(item)
                advance()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(workers, len(items))):
                    group.create_task(worker())
        except BaseExceptionGroup as failures:
            raise _first_of(failures) from None
    return [results[index] for index in range(len(items))]


def _first_of(failures: BaseExceptionGroup) -> BaseException:
    first = failures.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first
