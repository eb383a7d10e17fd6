"""The journal of teacher calls: what was paid for once is never asked again.

Append-only SQLite. A call's key is a hash of what was asked (not of where), so a resumed run, or
one with another endpoint for the same model, finds its answers. An answer is on disk before it is
used: answers that arrive within a few milliseconds share one commit. One process writes at a time.
"""

import asyncio
import fcntl
import hashlib
import os
import socket
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from data_gen.budget import Spent
from data_gen.records import canonical_json

GROUP_SECONDS = 0.01  # answers that arrive this close together share a commit
LOCK_PATIENCE = 15.0  # seconds; the child of a killed run may still be closing the journal
_SECONDS_BETWEEN_TRIES = 0.2

_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    key TEXT PRIMARY KEY, role TEXT NOT NULL, request TEXT NOT NULL, answer TEXT NOT NULL,
    finish TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    endpoint TEXT NOT NULL, attempts INTEGER NOT NULL, time REAL NOT NULL
) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS calls_are_kept BEFORE DELETE ON calls
    BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
CREATE TRIGGER IF NOT EXISTS calls_are_final BEFORE UPDATE ON calls
    BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
"""
_COLUMNS = (
    "key, role, request, answer, finish, prompt_tokens, completion_tokens, endpoint, attempts, time"
)


class Call(NamedTuple):
    """One answered call."""

    key: str
    role: str
    request: str
    answer: str
    finish: str
    prompt_tokens: int
    completion_tokens: int
    endpoint: str
    attempts: int
    time: float


def call_key(
    alias: str, messages: list[dict[str, str]], settings: dict[str, Any], sample: int
) -> str:
    """sha256 of what is asked: the model's alias, messages, settings, the sample's index."""
    return hashlib.sha256(canonical_json([alias, messages, settings, sample]).encode()).hexdigest()


class Held(ValueError):
    """Another process is writing the journal."""


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
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = _take_lock(path)
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        self._reader = sqlite3.connect(path, isolation_level=None)
        self._pending: list[tuple[Call, asyncio.Future[None]]] = []
        self._in_flight: dict[str, asyncio.Future[Call]] = {}
        self._flusher: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self.repeated = 0

    def find(self, key: str) -> Call | None:
        """The recorded call of this key."""
        row = self._reader.execute(f"SELECT {_COLUMNS} FROM calls WHERE key = ?", (key,)).fetchone()
        return None if row is None else Call(*row)

    def spent(self) -> Spent:
        """What all recorded calls cost."""
        return read_spent(self._reader)

    async def fetch(self, key: str, make: Callable[[], Awaitable[Call]]) -> Call:
        """The recorded call; else the same one in flight; else make it and record it."""
        found = self.find(key)
        if found is not None:
            self.repeated += 1
            return found
        if key in self._in_flight:
            return await asyncio.shield(self._in_flight[key])
        promise: asyncio.Future[Call] = asyncio.get_running_loop().create_future()
        self._in_flight[key] = promise
        try:
            call = await make()
            await self._record(call)
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

    async def drain(self) -> None:
        """Wait until every answer that has arrived is on disk."""
        if self._flusher is not None:
            await asyncio.shield(self._flusher)

    def close(self) -> None:
        """Give the file free; call `drain` first."""
        self._thread.shutdown()
        self._reader.close()
        self._db.execute("PRAGMA journal_mode=DELETE")  # one file, no -wal beside it
        self._db.close()
        self._lock.close()

    async def _record(self, call: Call) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append((call, done))
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush())
        await done

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._pending:
                await asyncio.sleep(GROUP_SECONDS)
                batch, self._pending = self._pending, []
                try:
                    calls = [call for call, _ in batch]
                    await loop.run_in_executor(self._thread, self._commit, calls)
                except sqlite3.Error as error:
                    failure = OSError(f"{self.path}: the journal cannot be written: {error}")
                    for _, done in batch:
                        if not done.done():
                            done.set_exception(failure)
                else:
                    for _, done in batch:
                        if not done.done():
                            done.set_result(None)
        finally:
            self._flusher = None

    def _commit(self, calls: list[Call]) -> None:
        marks = ", ".join("?" * len(Call._fields))
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany(
                f"INSERT OR IGNORE INTO calls ({_COLUMNS}) VALUES ({marks})", calls
            )
            self._db.execute("COMMIT")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


def read_spent(db: sqlite3.Connection) -> Spent:
    """What the calls of a journal cost, requests that failed before an answer included."""
    row = db.execute(
        "SELECT COALESCE(SUM(attempts), 0), COALESCE(SUM(prompt_tokens), 0),"
        " COALESCE(SUM(completion_tokens), 0) FROM calls"
    ).fetchone()
    return Spent(*row)


def summarise(path: Path) -> dict[str, Any]:
    """Calls and tokens by role, read beside a running writer."""
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        rows = db.execute(
            "SELECT role, COUNT(*), SUM(attempts), SUM(prompt_tokens), SUM(completion_tokens),"
            " MAX(time) FROM calls GROUP BY role ORDER BY role"
        ).fetchall()
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path}: not a journal ({error})") from None
    finally:
        db.close()
    names = ("calls", "requests", "prompt_tokens", "completion_tokens", "last")
    return {role: dict(zip(names, counts, strict=True)) for role, *counts in rows}


def now() -> float:
    """Seconds since 1970, for the journal's time column."""
    return time.time()


def _take_lock(path: Path) -> Any:
    lock = open(f"{path}.lock", "a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise Held(f"{path} is being written by {holder}; wait for it or stop it") from None
    lock.truncate(0)
    lock.write(f"host {socket.gethostname()} pid {os.getpid()}")
    lock.flush()
    return lock
