"""The journal: durable before used, asked once, one writer, append-only."""

import asyncio
import errno
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from data_gen import journal_file
from data_gen.journal import Call, Journal, call_key, open_journal, summarise
from data_gen.journal_file import choose_storage, file_system_of, is_being_written, locks_work

MESSAGES = [{"role": "user", "content": "q"}]


def make_call(key: str, answer: str = "a") -> Call:
    texts = ("reasoner", "a", "", "m", "{}", answer, "stop")
    return Call(key, *texts, 5, 2, 0, "", "http://x", "", "", 1, 1.0)


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
        call_key("m", MESSAGES, settings, 0, revision="2"),
    }
    assert len(keys) == 6
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
        return Call(str(i), *"raxm{as", 1, 1, 0, "", "e", "", "", 1, 1.0)
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


# --- the file -----------------------------------------------------------------------------------

FIRST_FORMAT = """
CREATE TABLE calls (
    key TEXT PRIMARY KEY, role TEXT NOT NULL, request TEXT NOT NULL, answer TEXT NOT NULL,
    finish TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    endpoint TEXT NOT NULL, attempts INTEGER NOT NULL, time REAL NOT NULL
) WITHOUT ROWID;
CREATE TRIGGER calls_are_kept BEFORE DELETE ON calls
    BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
CREATE TRIGGER calls_are_final BEFORE UPDATE ON calls
    BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
"""


def test_a_journal_of_the_first_format_is_brought_up_to_date_and_its_answers_are_found(tmp_path):
    path = tmp_path / "j.sqlite"
    settings = {"temperature": 0.7, "max_tokens": 64, "seed": 5}
    key = call_key("m", MESSAGES, settings, 0)
    with closing(sqlite3.connect(path)) as db, db:
        db.executescript(FIRST_FORMAT)
        row = (key, "reasoner", "{}", "old", "stop", 5, 2, "http://x/v1 my model", 3, 1.0)
        db.execute("INSERT INTO calls VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    with pytest.raises(ValueError, match="is of an older format; `data-gen run` brings it up"):
        summarise(path)

    async def run():
        journal = Journal(path)
        found = await record(journal, key, "new")
        spent = journal.spent()
        journal.close()
        return found, spent

    found, spent = asyncio.run(run())
    assert (found.answer, found.endpoint, found.model) == ("old", "http://x/v1", "my model")
    assert (spent.calls, spent.tokens) == (3, 7)
    test_recorded_calls_can_be_neither_changed_nor_deleted(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("CREATE TABLE calls (key TEXT)", "it is no journal"),
        ("PRAGMA user_version=99", "is of format 99, this version reads up to 2"),
        (None, "not a journal"),
    ],
)
def test_another_file_is_refused_with_what_it_is(tmp_path, content, words):
    path = tmp_path / "j.sqlite"
    if content is None:
        path.write_text("no database at all" * 100)
    else:
        with closing(sqlite3.connect(path)) as db:
            db.execute(content)
    with pytest.raises(ValueError, match=words):
        Journal(path)
    with pytest.raises(ValueError, match=words):  # and the lock was given back
        Journal(path)


def test_journal_lock_and_folder_are_their_owners_alone(tmp_path):
    path = tmp_path / "new" / "out" / "j.sqlite"
    before = os.umask(0)
    try:

        async def run():
            journal = Journal(path)
            await record(journal, "k")
            modes = {p.name: p.stat().st_mode & 0o777 for p in path.parent.iterdir()}
            journal.close()
            return modes

        modes = asyncio.run(run())
    finally:
        os.umask(before)
    assert {"j.sqlite", "j.sqlite.lock", "j.sqlite-wal"} <= modes.keys()
    assert set(modes.values()) == {0o600}
    assert path.parent.stat().st_mode & 0o777 == path.parent.parent.stat().st_mode & 0o777 == 0o700


MOUNTS = """
/dev/vda / ext4 rw 0 0
server:/disk /disk nfs4 rw 0 0
/dev/vdb /disk/me/local\\040disk xfs rw 0 0
10.0.0.1@tcp:/scratch /scratch lustre rw 0 0
//server/share /share cifs rw 0 0
overlay /disk/me/local\\040disk overlay rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/var/runs", "ext4"),
        ("/disk/me/runs", "nfs4"),
        ("/disks", "ext4"),
        ("/disk/me/local disk/runs", "overlay"),
        ("/scratch/a", "lustre"),
        ("/share", "cifs"),
    ],
)
def test_the_file_system_is_that_of_the_deepest_and_latest_mount(folder, kind):
    assert file_system_of(Path(folder), MOUNTS) == kind


def test_a_network_file_system_gets_a_journal_that_the_writer_holds_alone(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"server:/x {tmp_path.resolve()} nfs4 rw 0 0\n")
    storage = choose_storage(tmp_path, mounts)
    assert not storage.shared and "nfs4" in storage.why
    mounts.write_text(f"/dev/vda {tmp_path.resolve()} ext4 rw 0 0\n")
    assert choose_storage(tmp_path, mounts).shared


def test_locks_that_keep_nobody_out_get_one_too(tmp_path, monkeypatch):
    assert locks_work(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(journal_file, "_lock_first_byte", lambda handle: True)
    assert not locks_work(tmp_path)
    storage = choose_storage(tmp_path, tmp_path / "no-mounts")
    assert not storage.shared and "locks do not work" in storage.why


def test_a_journal_held_alone_keeps_answers_and_says_so_to_who_looks(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "data_gen.journal.choose_storage", lambda folder: journal_file.Storage(False, "nfs")
    )
    path = tmp_path / "j.sqlite"

    async def run():
        journal = Journal(path)
        calls = await asyncio.gather(*(record(journal, str(n)) for n in range(50)))
        with pytest.raises(OSError, match="held by its writer alone"):
            summarise(path)
        assert not Path(f"{path}-wal").exists()
        assert [journal.find(call.key) for call in calls] == calls
        await journal.drain()
        journal.close()

    asyncio.run(run())
    assert summarise(path)["reasoner"]["calls"] == 50


def test_where_files_cannot_be_locked_a_file_that_must_not_exist_is_the_lock(tmp_path, monkeypatch):
    def refuse(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(journal_file.fcntl, "flock", refuse)
    path = tmp_path / "j.sqlite"
    journal = Journal(path)
    with pytest.raises(ValueError, match=rf"host .* pid {os.getpid()} \(if it has ended, remove"):
        Journal(path)
    assert is_being_written(path)
    journal.close()
    assert not is_being_written(path)
    owner = Path(f"{path}.lock.owner")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owner.write_text(f"host {socket.gethostname()} pid {dead.pid}")
    Journal(path).close()  # its writer is gone
    owner.write_text("host another-machine pid 1")
    with pytest.raises(ValueError, match="another-machine"):
        Journal(path)
