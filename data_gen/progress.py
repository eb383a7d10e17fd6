"""Progress on stderr: a bar on a terminal, a plain line now and then in a log.

While a run's folder is set, what is being done is also written there for `data-gen status`.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from data_gen.records import write_atomically

Item = TypeVar("Item")
Result = TypeVar("Result")

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_SNAPSHOTS = 2.0
SNAPSHOT = "progress.json"

_folder: ContextVar[Path | None] = ContextVar("progress_folder", default=None)


@contextmanager
def snapshots_in(folder: Path) -> Iterator[None]:
    """Write what is being done into this folder; an orderly end takes it away."""
    before = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(before)
        (folder / SNAPSHOT).unlink(missing_ok=True)


def read_snapshot(folder: Path) -> dict[str, Any] | None:
    """What a run is doing, or was doing when it was killed; None if nothing is told."""
    try:
        return json.loads((folder / SNAPSHOT).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


class _Snapshots:
    """Writes the progress of one stage, at most every few seconds."""

    def __init__(self, label: str, total: int) -> None:
        self._folder = _folder.get()
        self._label = label
        self._total = total
        self._started = time.time()
        self._last = float("-inf")
        self.write(0)

    def write(self, done: int) -> None:
        if self._folder is None or time.monotonic() - self._last < SECONDS_BETWEEN_SNAPSHOTS:
            return
        self._last = time.monotonic()
        seconds = time.time() - self._started
        left = seconds / done * (self._total - done) if done else None
        told = {
            "stage": self._label,
            "done": done,
            "total": self._total,
            "seconds": round(seconds, 1),
            "seconds_left": None if left is None else round(left, 1),
            "pid": os.getpid(),
        }
        write_atomically(self._folder / SNAPSHOT, [json.dumps(told) + "\n"])


def tell(notes: Iterable[str]) -> None:
    """Lines that a user should read before the work goes on."""
    for note in notes:
        print(f"data-gen: {note}", file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A function to call once for every finished item."""
    snapshots = _Snapshots(label, total)
    if sys.stderr.isatty():
        with tqdm(total=total, desc=label, unit="item") as bar:

            def move() -> None:
                bar.update()
                snapshots.write(int(bar.n))

            yield move
        return
    done, last = 0, time.monotonic()

    def advance() -> None:
        nonlocal done, last
        done += 1
        snapshots.write(done)
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
