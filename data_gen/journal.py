"""The journal of teacher calls: what was paid for once is never asked again.

Append-only SQLite. A call's key is a hash of what was asked (not of where), so a resumed run, or
one with another endpoint for the same model, finds its answers. An answer is on disk before it is
used: answers that arrive within a few milliseconds share one commit. One process writes at a time.
Beside the calls stand what was sent and never answered (`unsettled`), what a run may have out at
most (`leases`, so that a killed run cannot hide it), and the batches a provider works on.
"""

import asyncio
import hashlib
import os
import socket
import sqlite3
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from threading import Lock as ThreadLock
from typing import Any, NamedTuple

from data_gen import budget
from data_gen.journal_file import (
    Held,
    Lock,
    choose_storage,
    is_being_written,
    open_for_reading,
    open_for_writing,
)
from data_gen.prices import NO_PRICES, PriceList, Usage
from data_gen.records import canonical_json, make_private_folder

GROUP_SECONDS = 0.01  # answers that arrive this close together share a commit
LOCK_PATIENCE = 15.0  # seconds; the child of a killed run may still be closing the journal
_SECONDS_BETWEEN_TRIES = 0.2


class Call(NamedTuple):
    """One answered call. `usage` is the provider's own count, as JSON; "" where it gave none."""

    key: str
    role: str
    alias: str
    revision: str
    model: str
    request: str
    answer: str
    finish: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    usage: str
    endpoint: str
    request_id: str
    batch: str
    attempts: int
    time: float

    @property
    def used(self) -> Usage:
        return Usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens)


class Unsettled(NamedTuple):
    """A transmission that may have been paid for and gave no answer."""

    key: str
    role: str
    model: str
    endpoint: str
    prompt_tokens: int
    completion_tokens: int
    reason: str
    time: float


class Batch(NamedTuple):
    """Requests that go to a provider together; `requests` is JSON Lines as it is uploaded."""

    tag: str
    place: str
    state: str
    provider_id: str
    requests: str
    prompt_tokens: int
    completion_tokens: int
    model: str
    time: float


def _insert(table: str, row: type[Any]) -> str:
    marks = ", ".join("?" * len(row._fields))
    return f"INSERT OR IGNORE INTO {table} ({', '.join(row._fields)}) VALUES ({marks})"


_COLUMNS = ", ".join(Call._fields)
_ADD_CALL = _insert("calls", Call)
_ADD_UNSETTLED = _insert("unsettled", Unsettled)
_ADD_BATCH = _insert("batches", Batch)
_RAISE_LEASE = (
    "INSERT INTO leases (run, model, prompt_tokens, completion_tokens, requests)"
    " VALUES (?, ?, ?, ?, ?) ON CONFLICT (run, model) DO UPDATE SET"
    " prompt_tokens = MAX(prompt_tokens, excluded.prompt_tokens),"
    " completion_tokens = MAX(completion_tokens, excluded.completion_tokens),"
    " requests = MAX(requests, excluded.requests)"
)
_END_LEASES = "DELETE FROM leases WHERE run = ?"
_MARK_BATCH = "UPDATE batches SET state = ?, provider_id = ? WHERE tag = ?"


def call_key(
    alias: str,
    messages: list[dict[str, str]],
    settings: Mapping[str, Any],
    sample: int,
    revision: str = "",
) -> str:
    """sha256 of what is asked: the model's alias and revision, messages, settings, sample index.

    A model without a revision is hashed as before revisions were known: old answers stay found.
    """
    asked = [alias, messages, settings, sample]
    if revision:
        asked = [alias, revision, messages, settings, sample]
    return hashlib.sha256(canonical_json(asked).encode()).hexdigest()


async def open_journal(path: Path, patience: float = LOCK_PATIENCE) -> "Journal":
    """The journal, as soon as its writer has ended; `Held` if it has not in `patience` seconds."""
    deadline = time.monotonic() + patience
    told = False
    while True:
        try:
            return Journal(path)
        except Held as held:
            if time.monotonic() >= deadline:
                raise
            if not told:
                said = f"data-gen: {held.args[0].partition(';')[0]}; waiting up to {patience:g} s"
                print(said, file=sys.stderr, flush=True)
                told = True
        await asyncio.sleep(_SECONDS_BETWEEN_TRIES)


class Journal:
    """The one writer of a journal file; refused while another process holds it."""

    def __init__(self, path: Path) -> None:
        make_private_folder(path.parent)
        self.path = path
        self.run = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex[:8]}"
        self._lock = Lock(path)
        try:
            self.storage = choose_storage(path.parent)
            self._db = open_for_writing(path, self.storage)
        except BaseException:
            self._lock.release()
            raise
        # A connection that holds the file alone is the only one: then reading waits for a commit.
        shared = self.storage.shared
        self._reader = sqlite3.connect(path, isolation_level=None) if shared else self._db
        self._turn = nullcontext() if shared else ThreadLock()
        self._pending: list[tuple[str, Sequence[Any], asyncio.Future[None]]] = []
        self._in_flight: dict[str, asyncio.Future[Call]] = {}
        self._flusher: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self.repeated = 0

    def find(self, key: str) -> Call | None:
        """The recorded call of this key."""
        with self._turn:
            row = self._reader.execute(f"SELECT {_COLUMNS} FROM calls WHERE key = ?", (key,))
            found = row.fetchone()
        return None if found is None else Call(*found)

    def spent(self, prices: PriceList = NO_PRICES) -> budget.Spent:
        """What all recorded calls cost, and what may have been paid beside them."""
        with self._turn:
            return read_spent(self._reader, prices)

    async def fetch(self, key: str, make: Callable[[], Awaitable[Call]]) -> Call:
        """The recorded call; else the same one in flight; else make it and record it."""
        while True:
            found = self.find(key)
            if found is not None:
                self.repeated += 1
                return found
            if key not in self._in_flight:
                return await self._make(key, make)
            other = self._in_flight[key]
            try:
                return await asyncio.shield(other)
            except asyncio.CancelledError:
                if not other.cancelled() or _is_cancelled_itself():
                    raise
                # Whoever was making it gave up; it is this one's turn.

    async def _make(self, key: str, make: Callable[[], Awaitable[Call]]) -> Call:
        promise: asyncio.Future[Call] = asyncio.get_running_loop().create_future()
        self._in_flight[key] = promise
        try:
            call = await make()
            await self._write(_ADD_CALL, call)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                promise.cancel()
            else:
                promise.set_exception(error)
                promise.exception()  # whoever waits for it gets it too; nobody need
            raise
        else:
            promise.set_result(call)
            return call
        finally:
            del self._in_flight[key]

    # --- what was sent and may have been paid ---

    def leave_unsettled(self, sent: Unsettled) -> None:
        """Write down a transmission that may have been paid for, with the next commit."""
        self._queue(_ADD_UNSETTLED, sent)

    async def lease(self, held: Mapping[str, budget.AtMost]) -> None:
        """Make durable what may be out at most, by model, before it is sent."""
        await asyncio.gather(
            *(self._write(_RAISE_LEASE, (self.run, model, *most)) for model, most in held.items())
        )

    # --- batches ---

    async def plan_batch(self, batch: Batch) -> None:
        """Write a batch down before anything of it is uploaded."""
        await self._write(_ADD_BATCH, batch)

    async def mark_batch(self, tag: str, state: str, provider_id: str) -> None:
        """Write down what became of a batch."""
        await self._write(_MARK_BATCH, (state, provider_id, tag))

    async def record_batch(self, batch: Batch, calls: Sequence[Call]) -> None:
        """The answers of a batch, and that it is done."""
        done = [self._queue(_ADD_CALL, call) for call in calls]
        done.append(self._queue(_MARK_BATCH, ("done", batch.provider_id, batch.tag)))
        await asyncio.gather(*done)

    def open_batches(self, place: str) -> list[Batch]:
        """The batches of a place whose answers have not been recorded."""
        with self._turn:
            rows = self._reader.execute(
                f"SELECT {', '.join(Batch._fields)} FROM batches"
                " WHERE place = ? AND state != 'done' ORDER BY time, tag",
                (place,),
            ).fetchall()
        return [Batch(*row) for row in rows]

    # --- the end ---

    async def drain(self) -> None:
        """Wait until every answer that has arrived is on disk."""
        while self._flusher is not None:
            await asyncio.shield(self._flusher)

    def close(self) -> None:
        """Give the file free; call `drain` first."""
        self._thread.shutdown()
        try:
            self._db.execute(_END_LEASES, (self.run,))  # an orderly end has nothing out
            if self.storage.shared:
                self._reader.close()
                self._db.execute("PRAGMA journal_mode=DELETE")  # one file, no -wal beside it
        finally:
            self._db.close()
            self._lock.release()

    # --- writing ---

    async def _write(self, statement: str, row: Sequence[Any]) -> None:
        await self._queue(statement, row)

    def _queue(self, statement: str, row: Sequence[Any]) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.add_done_callback(_look_at)
        self._pending.append((statement, row, done))
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush())
        return done

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._pending:
                await asyncio.sleep(GROUP_SECONDS)
                group, self._pending = self._pending, []
                try:
                    rows = [(statement, row) for statement, row, _ in group]
                    await loop.run_in_executor(self._thread, self._commit, rows)
                except sqlite3.Error as error:
                    failure = OSError(f"{self.path}: the journal cannot be written: {error}")
                    for *_, done in group:
                        if not done.done():
                            done.set_exception(failure)
                else:
                    for *_, done in group:
                        if not done.done():
                            done.set_result(None)
        finally:
            self._flusher = None

    def _commit(self, rows: list[tuple[str, Sequence[Any]]]) -> None:
        with self._turn:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for statement, row in rows:
                    self._db.execute(statement, row)
                self._db.execute("COMMIT")
            except sqlite3.Error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


def _is_cancelled_itself() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _look_at(done: asyncio.Future[None]) -> None:
    """A row that nobody waits for may fail without a warning: whoever waits next is told."""
    if not done.cancelled():
        done.exception()


# --- sums -------------------------------------------------------------------------------------

# A try without an answer is among the attempts of the call that a later try answered.
_LOST_TRIES = "SELECT COUNT(*) FROM unsettled WHERE key NOT IN (SELECT key FROM calls)"
_POSSIBLY_PAID = {
    "timed out or cut": (
        "SELECT model, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens)"
        " FROM unsettled GROUP BY model"
    ),
    "out when a run was killed": (
        "SELECT model, SUM(requests), SUM(prompt_tokens), SUM(completion_tokens)"
        " FROM leases GROUP BY model"
    ),
    "in a batch": (
        "SELECT model, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens)"
        " FROM batches WHERE state != 'done' GROUP BY model"
    ),
}


def read_spent(db: sqlite3.Connection, prices: PriceList = NO_PRICES) -> budget.Spent:
    """What the calls of a journal cost, requests that failed before an answer included."""
    spent = budget.Spent()
    for model, batch, attempts, *tokens in db.execute(
        "SELECT model, batch != '', SUM(attempts), SUM(prompt_tokens), SUM(completion_tokens),"
        " SUM(cached_tokens) FROM calls GROUP BY model, batch != ''"
    ):
        used = Usage(*tokens)
        spent.calls += attempts
        spent.prompt_tokens += used.prompt
        spent.completion_tokens += used.completion
        spent.cost += prices.rate(model, bool(batch)).of(used)
    spent.calls += db.execute(_LOST_TRIES).fetchone()[0]
    for why, query in _POSSIBLY_PAID.items():
        for model, requests, prompt, completion in db.execute(query):
            most = Usage(prompt, completion)
            spent.calls += requests if why.startswith("out") else 0
            spent.possibly_paid_tokens += most.tokens
            spent.possibly_paid_cost += prices.rate(model, why == "in a batch").of(most)
    return spent


def summarise(path: Path) -> dict[str, Any]:
    """Calls and tokens by role, read beside a running writer."""
    with closing(open_for_reading(path)) as db:
        rows = db.execute(
            "SELECT role, COUNT(*), SUM(attempts), SUM(prompt_tokens), SUM(completion_tokens),"
            " MAX(time) FROM calls GROUP BY role ORDER BY role"
        ).fetchall()
    names = ("calls", "requests", "prompt_tokens", "completion_tokens", "last")
    return {role: dict(zip(names, counts, strict=True)) for role, *counts in rows}


def read_cost(path: Path, prices: PriceList = NO_PRICES) -> dict[str, Any]:
    """What was spent, what is possibly paid and why, and the batches that are out."""
    with closing(open_for_reading(path)) as db:
        spent = read_spent(db, prices)
        kinds = dict(_POSSIBLY_PAID)
        if is_being_written(path):  # what the writer may have out is not lost
            kinds["out now, at most"] = kinds.pop("out when a run was killed")
        possibly = {
            why: {"requests": sum(r[1] for r in rows), "tokens": sum(r[2] + r[3] for r in rows)}
            for why, query in kinds.items()
            if (rows := db.execute(query).fetchall())
        }
        batches = db.execute("SELECT state, COUNT(*) FROM batches GROUP BY state").fetchall()
    return {
        "requests": spent.calls,
        "tokens": spent.tokens,
        "cost": spent.cost,
        "possibly_paid": possibly,
        "possibly_paid_cost": spent.possibly_paid_cost,
        "batches": dict(batches),
    }


def now() -> float:
    """Seconds since 1970, for the journal's time column."""
    return time.time()
