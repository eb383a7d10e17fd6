"""The journal: durable before used, asked once, one writer, append-only."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from data_gen.journal import Call, Journal, call_key, open_journal, summarise

MESSAGES = [{"role": "user", "content": "q"}]


def make_call(key: str, answer: str = "a") -> Call:
    return Call(key, "reasoner", "{}", answer, "stop", 5, 2, "http://x m", 1, 1.0)


async def record(journal: Journal, key: str, answer: str = "a") -> Call:
    async def make() -> Call:
        return make_call(key, answer)

    return await journal.fetch(key, make)


def test_the_key_depends_on_everything_that_is_asked():
    settings = {"temperature": 1.0}
    keys = {
        call_key("m", MESSAGES, settings, 0),
        call_key("n", MESSAGES, settings, 0),
        call_key("m", [*MESSAGES, *MESSAGES], settings, 0),
        call_key("m", MESSAGES, {"temperature": 0.5}, 0),
        call_key("m", MESSAGES, settings, 1),
    }
    assert len(keys) == 5
    assert call_key("m", MESSAGES, settings, 0) in keys


def test_a_recorded_call_is_not_made_again_even_by_another_run(tmp_path):
    path = tmp_path / "j.sqlite"

    async def first():
        journal = Journal(path)
        await record(journal, "k", "old")
        journal.close()

    async def second():
        journal = Journal(path)
        found = await record(journal, "k", "new")
        journal.close()
        return found.answer

    asyncio.run(first())
    assert asyncio.run(second()) == "old"
    assert summarise(path)["reasoner"]["calls"] == 1


def test_two_that_ask_the_same_at_once_share_one_call(tmp_path):
    async def run():
        journal = Journal(tmp_path / "j.sqlite")
        made = 0

        async def make() -> Call:
            nonlocal made
            made += 1
            await asyncio.sleep(0.01)
            return make_call("k")

        found = await asyncio.gather(*(journal.fetch("k", make) for _ in range(5)))
        journal.close()
        return made, found

    made, found = asyncio.run(run())
    assert made == 1
    assert len(set(found)) == 1


def test_a_failed_call_fails_all_who_wait_and_may_be_tried_again(tmp_path):
    async def run():
        journal = Journal(tmp_path / "j.sqlite")

        async def fail() -> Call:
            await asyncio.sleep(0.01)
            raise RuntimeError("down")

        results = await asyncio.gather(
            *(journal.fetch("k", fail) for _ in range(2)), return_exceptions=True
        )
        again = await record(journal, "k")
        journal.close()
        return results, again

    results, again = asyncio.run(run())
    assert [str(error) for error in results] == ["down", "down"]
    assert again.answer == "a"


def test_a_second_writer_is_refused_with_host_and_pid_of_the_first(tmp_path):
    path = tmp_path / "j.sqlite"
    journal = Journal(path)
    with pytest.raises(ValueError, match=f"host .* pid {os.getpid()}"):
        Journal(path)
    journal.close()
    Journal(path).close()


HOLDER = """
import sys, time
from pathlib import Path
from data_gen.journal import Journal

journal = Journal(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def hold(path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLDER, str(path), str(seconds)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_writer_that_is_about_to_end_is_waited_for(tmp_path, capsys):
    path = tmp_path / "j.sqlite"
    with hold(path, 1.0) as holder:
        asyncio.run(open_journal(path)).close()
    [said] = capsys.readouterr().err.splitlines()
    assert f"pid {holder.pid}" in said and "waiting" in said


def test_a_writer_that_stays_is_named_when_the_patience_ends(tmp_path, capsys):
    path = tmp_path / "j.sqlite"
    with hold(path, 60) as holder:
        with pytest.raises(ValueError, match=f"host .* pid {holder.pid}; wait for it or stop it"):
            asyncio.run(open_journal(path, patience=0.5))
        holder.kill()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_recorded_calls_can_be_neither_changed_nor_deleted(tmp_path):
    path = tmp_path / "j.sqlite"

    async def run():
        journal = Journal(path)
        await record(journal, "k")
        journal.close()

    asyncio.run(run())
    db = sqlite3.connect(path)
    for statement in ("DELETE FROM calls", "UPDATE calls SET answer = 'x'"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(statement)
    db.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from data_gen.journal import Call, Journal

async def one(journal, i):
    async def make():
        return Call(str(i), "r", "{}", "a", "stop", 1, 1, "e", 1, 1.0)
    await journal.fetch(str(i), make)
    print(i, flush=True)

async def main():
    journal = Journal(Path(sys.argv[1]))
    for start in range(0, 10**6, 8):
        await asyncio.gather(*(one(journal, i) for i in range(start, start + 8)))

asyncio.run(main())
"""


def test_every_answer_that_was_used_before_a_kill_is_in_the_journal(tmp_path):
    path = tmp_path / "j.sqlite"
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    used = [child.stdout.readline().strip() for _ in range(100)]
    child.send_signal(signal.SIGKILL)
    used += child.stdout.read().split()
    child.wait()
    child.stdout.close()
    journal = Journal(path)  # the dead writer's lock is no hindrance
    assert all(journal.find(key) is not None for key in used)
    assert journal.find(str(10**6)) is None
    journal.close()
