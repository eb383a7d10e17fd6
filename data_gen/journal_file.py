"""The file of a journal: its schema and migrations, its one writer's lock, how it lies on a disk.

On a local file system SQLite's write-ahead log lets others read beside the writer. It needs shared
memory and byte-range locks, which NFS, Lustre and SMB do not give reliably: there, and wherever the
start-up test of the locks fails, the journal is a rollback journal that the writer holds alone.
"""

import errno
import fcntl
import os
import socket
import sqlite3
import struct
import sys
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from data_gen.records import make_private_folder

FORMAT = 2  # PRAGMA user_version; a file without one is of the first format
PRIVATE = 0o600

_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    key TEXT PRIMARY KEY, role TEXT NOT NULL, alias TEXT NOT NULL, revision TEXT NOT NULL,
    model TEXT NOT NULL, request TEXT NOT NULL, answer TEXT NOT NULL, finish TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL, usage TEXT NOT NULL, endpoint TEXT NOT NULL,
    request_id TEXT NOT NULL, batch TEXT NOT NULL, attempts INTEGER NOT NULL, time REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS unsettled (
    key TEXT NOT NULL, role TEXT NOT NULL, model TEXT NOT NULL, endpoint TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, reason TEXT NOT NULL,
    time REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS leases (
    run TEXT NOT NULL, model TEXT NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, requests INTEGER NOT NULL, PRIMARY KEY (run, model)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batches (
    tag TEXT PRIMARY KEY, place TEXT NOT NULL, state TEXT NOT NULL, provider_id TEXT NOT NULL,
    requests TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    model TEXT NOT NULL, time REAL NOT NULL
) WITHOUT ROWID;
"""
_TRIGGERS = """
CREATE TRIGGER IF NOT EXISTS calls_are_kept BEFORE DELETE ON calls
    BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
CREATE TRIGGER IF NOT EXISTS calls_are_final BEFORE UPDATE ON calls
    BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
"""
# The first format told the endpoint and the model in one column and knew no revision.
_FROM_FIRST_FORMAT = """
DROP TRIGGER IF EXISTS calls_are_kept;
DROP TRIGGER IF EXISTS calls_are_final;
ALTER TABLE calls RENAME TO calls_of_the_first_format;
{schema}
INSERT INTO calls SELECT
    key, role, '', '', substr(endpoint, instr(endpoint, ' ') + 1), request, answer, finish,
    prompt_tokens, completion_tokens, 0, '', substr(endpoint, 1, instr(endpoint, ' ') - 1),
    '', '', attempts, time FROM calls_of_the_first_format;
DROP TABLE calls_of_the_first_format;
"""

NETWORK_FILE_SYSTEMS = frozenset(
    "nfs nfs3 nfs4 lustre cifs smbfs smb2 smb3 gpfs beegfs ceph glusterfs afs pvfs2 orangefs 9p "
    "fuse.sshfs fuse.glusterfs fuse.ceph fuse.s3fs fuse.gcsfuse fuse.rclone fuse.mount-s3".split()
)
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Held(ValueError):
    """Another process is writing the journal."""


class Storage(NamedTuple):
    """How the journal is kept: shared (write-ahead log) or held by the writer alone, and why."""

    shared: bool
    why: str


class Lock:
    """The right to write a journal; the file beside it names host and pid of who has it."""

    def __init__(self, journal: Path) -> None:
        self._path = Path(f"{journal}.lock")
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, PRIVATE)
        self._made: Path | None = None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS_HERE:
                self._make_by_name(journal)
            else:
                holder = os.pread(self._handle, 200, 0).decode(errors="replace").strip()
                os.close(self._handle)
                raise _held_by(journal, holder) from None
        self._write_name(self._handle)

    def release(self) -> None:
        """Let another process have it."""
        if self._made is not None:
            self._made.unlink(missing_ok=True)
        os.close(self._handle)

    def _make_by_name(self, journal: Path) -> None:
        """Where files cannot be locked, creating one that must not exist is the lock."""
        made = Path(f"{self._path}.owner")
        try:
            handle = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
        except FileExistsError:
            holder = made.read_text(encoding="utf-8").strip()
            if not _is_dead(holder):
                os.close(self._handle)
                raise _held_by(journal, f"{holder} (if it has ended, remove {made})") from None
            made.unlink(missing_ok=True)
            return self._make_by_name(journal)
        self._made = made
        self._write_name(handle)
        os.close(handle)

    @staticmethod
    def _write_name(handle: int) -> None:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"host {socket.gethostname()} pid {os.getpid()}".encode(), 0)


def _held_by(journal: Path, holder: str) -> Held:
    return Held(
        f"{journal} is being written by {holder or 'another process'}; wait for it or stop it"
    )


def _is_dead(holder: str) -> bool:
    """Whether the named process was on this host and is gone."""
    words = holder.split()
    if len(words) != 4 or words[1] != socket.gethostname():
        return False
    try:
        os.kill(int(words[3]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, PermissionError):
        return False
    return False


def is_being_written(path: Path) -> bool:
    """Whether a process holds the journal's lock now."""
    lock = Path(f"{path}.lock")
    if not lock.exists():
        return False
    handle = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return Path(f"{lock}.owner").exists()
        return True
    finally:
        os.close(handle)
    return False


# --- where it lies ----------------------------------------------------------------------------


def choose_storage(folder: Path, mounts: Path = Path("/proc/mounts")) -> Storage:
    """Shared on a local file system whose locks work, else held alone."""
    kind = file_system_of(folder, mounts.read_text(errors="replace") if mounts.exists() else "")
    if kind in NETWORK_FILE_SYSTEMS:
        return Storage(False, f"{folder} lies on a network file system ({kind})")
    if not locks_work(folder):
        return Storage(False, f"locks do not work in {folder}")
    return Storage(True, kind)


def file_system_of(folder: Path, mounts: str) -> str:
    """The type of the file system a folder lies on, by a table of mounts; "" if it names none."""
    resolved = folder.resolve()
    best, found = -1, ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = Path(fields[1].encode().decode("unicode_escape"))  # a space is written as \040
        depth = len(point.parts)
        if depth >= best and resolved.is_relative_to(point):  # the later of two mounts is on top
            best, found = depth, fields[2]
    return found


def locks_work(folder: Path) -> bool:
    """Whether a byte-range lock that one open file holds keeps another one out."""
    path = folder / f".lock-test-{socket.gethostname()}-{os.getpid()}"
    first = os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE)
    second = os.open(path, os.O_RDWR)
    try:
        if not _lock_first_byte(first):
            return False
        return not _lock_first_byte(second)
    finally:
        os.close(second)
        os.close(first)
        path.unlink(missing_ok=True)


def _lock_first_byte(handle: int) -> bool:
    """Take SQLite's kind of lock, owned by the open file where the system can do that."""
    if sys.platform != "linux":
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
    wanted = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
    try:
        fcntl.fcntl(handle, fcntl.F_OFD_SETLK, wanted)
    except OSError:
        return False
    return True


# --- opening ----------------------------------------------------------------------------------


def open_for_writing(path: Path, storage: Storage) -> sqlite3.Connection:
    """The database, created for its owner only, in the current format."""
    make_private_folder(path.parent)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE))  # SQLite itself would let all read it
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        if not storage.shared:
            db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute(f"PRAGMA journal_mode={'WAL' if storage.shared else 'DELETE'}")
        db.execute("PRAGMA synchronous=FULL")
        _bring_up_to_date(db, path)
    except sqlite3.DatabaseError as error:
        db.close()
        raise ValueError(
            f"{path}: not a journal ({error}); move it away or name another out"
        ) from None
    except ValueError:
        db.close()
        raise
    return db


def _bring_up_to_date(db: sqlite3.Connection, path: Path) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    columns = [row[1] for row in db.execute("PRAGMA table_info(calls)")]
    if version > FORMAT:
        raise ValueError(
            f"{path} is of format {version}, this version reads up to {FORMAT}; "
            "use a newer data-gen"
        )
    if columns and version == 0:
        old = {"key", "role", "request", "answer", "finish", "endpoint", "attempts", "time"}
        if not old <= set(columns):
            raise ValueError(f"{path}: its table calls has the columns {columns}; it is no journal")
        steps = _FROM_FIRST_FORMAT.format(schema=_SCHEMA)
    else:
        steps = _SCHEMA
    db.executescript(f"BEGIN IMMEDIATE; {steps} {_TRIGGERS} PRAGMA user_version={FORMAT}; COMMIT;")


def open_for_reading(path: Path) -> sqlite3.Connection:
    """The database, read beside a running writer; close it."""
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=1.0)
    try:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        columns = [row[1] for row in db.execute("PRAGMA table_info(calls)")]
    except sqlite3.OperationalError as error:
        db.close()
        raise OSError(
            f"{path}: held by its writer alone ({error}); ask when it has ended"
        ) from None
    except sqlite3.DatabaseError as error:
        db.close()
        raise ValueError(f"{path}: not a journal ({error})") from None
    if version != FORMAT:
        db.close()
        what = (
            "is of an older format; `data-gen run` brings it up to date" if columns else "is empty"
        )
        raise ValueError(f"{path} {what}")
    return db


def read_all(path: Path, table: str) -> list[tuple[object, ...]]:
    """Every row of a table, ordered by its first column."""
    with closing(open_for_reading(path)) as db:
        return db.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
