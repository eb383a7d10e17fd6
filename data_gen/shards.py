"""One bank on several machines: every group of questions belongs to one shard.

A shard is a run of its own, with its own journal and files. `merge` checks that the shards are all
there and of one job, joins their journals, and makes the files anew from the joined journal: what a
run without shards would have made, with no call asked again.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data_gen.journal_file import Lock, choose_storage, open_for_reading, open_for_writing
from data_gen.records import iterate_records, make_private_folder, write_atomically

MANIFEST = "shard.json"
_JOINED = ("calls", "unsettled", "leases", "batches")


@dataclass(frozen=True)
class Shard:
    """Number `number` (from 1) of `of` parts of a bank."""

    number: int
    of: int

    def holds(self, group: str) -> bool:
        """Whether a group of questions belongs to it; a group is never in two."""
        digest = hashlib.sha256(f"shard\x1f{group}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.of == self.number - 1

    @property
    def folder(self) -> str:
        return f"shard-{self.number}-of-{self.of}"


def read_shard(text: str) -> Shard:
    """The shard that `i/n` names."""
    number, _, of = text.partition("/")
    if not number.isdecimal() or not of.isdecimal() or not 1 <= int(number) <= int(of):
        raise ValueError(f"shard={text}: it should be i/n with 1 <= i <= n, as 1/4")
    return Shard(int(number), int(of))


def write_manifest(out: Path, shard: Shard, job: str) -> None:
    """Say which part of which job a folder holds; written when it is complete."""
    content = {"shard": f"{shard.number}/{shard.of}", "job": job}
    write_atomically(out / MANIFEST, [json.dumps(content) + "\n"])


def check_shards(folders: Sequence[Path], job: str, questions: Iterable[str]) -> None:
    """`ValueError` unless the folders are every shard of this job, each question in one of them."""
    if not folders:
        raise ValueError("there are no shards to merge; run them with --shard i/n, or name folders")
    shards = []
    for folder in folders:
        manifest = _read_manifest(folder)
        if manifest["job"] != job:
            raise ValueError(
                f"{folder} is a shard of another job (bank or settings differ); "
                "merge with the configuration that made it"
            )
        shards.append(read_shard(manifest["shard"]))
    of = shards[0].of
    for folder, shard in zip(folders, shards, strict=True):
        if shard.of != of:
            raise ValueError(f"{folder} is one of {shard.of} shards, {folders[0]} one of {of}")
    _check_numbers([shard.number for shard in shards], of)
    _check_questions(folders, questions)


def _check_numbers(numbers: list[int], of: int) -> None:
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise ValueError(f"shard {twice[0]}/{of} is there twice; give every shard once")
    missing = sorted(set(range(1, of + 1)) - set(numbers))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        named = ", ".join(map(str, missing[:3]))
        raise ValueError(f"shards missing of {of}: {named}{more}; run them first")


def _check_questions(folders: Sequence[Path], wanted: Iterable[str]) -> None:
    held: dict[str, Path] = {}
    for folder in folders:
        for question in _questions_in(folder):
            if question in held:
                raise ValueError(f"question {question} is in {held[question]} and in {folder}")
            held[question] = folder
    lost = sorted(set(wanted) - set(held))
    if lost:
        named = ", ".join(lost[:3])
        raise ValueError(f"{len(lost)} questions of the bank are in no shard, first {named}")


def _questions_in(folder: Path) -> set[str]:
    """The bank's questions that a folder accounts for: as a problem or as rejected."""
    found = {str(record.mcq_id) for record in iterate_records(folder / "problems.jsonl", _OfBank)}
    rejected = iterate_records(folder / "rejected.jsonl", _OfBank)
    return found | {record.mcq_id for record in rejected if record.mcq_id is not None}


class _OfBank(BaseModel, extra="ignore"):
    mcq_id: str | None = None


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is no finished shard ({MANIFEST} is missing); run it with --shard to its end"
        ) from None
    except ValueError:
        raise ValueError(f"{path}: not JSON; run the shard again") from None
    if not isinstance(value, dict) or not {"shard", "job"} <= value.keys():
        raise ValueError(f"{path} is no manifest of a shard; run the shard again")
    return value


def join_journals(folders: Sequence[Path], out: Path) -> dict[str, int]:
    """One journal of all shards' calls; a call that two shards paid is kept from the first."""
    path = out / "journal.sqlite"
    make_private_folder(out)
    counts = {"calls": 0, "paid_twice": 0, "answered_differently": 0}
    lock = Lock(path)
    try:
        with closing(open_for_writing(path, choose_storage(out))) as joined:
            for folder in folders:
                with closing(open_for_reading(folder / "journal.sqlite")) as shard:
                    joined.execute("BEGIN IMMEDIATE")
                    for table in _JOINED:
                        _copy(table, shard, joined, counts)
                    joined.execute("COMMIT")
            counts["calls"] = joined.execute("SELECT COUNT(*) FROM calls").fetchone()[0]
            joined.execute("PRAGMA journal_mode=DELETE")
    finally:
        lock.release()
    return counts


def _copy(
    table: str, source: sqlite3.Connection, target: sqlite3.Connection, counts: dict[str, int]
) -> None:
    cursor = source.execute(f"SELECT * FROM {table}")
    names = [column[0] for column in cursor.description]
    marks = ", ".join("?" * len(names))
    add = f"INSERT OR IGNORE INTO {table} ({', '.join(names)}) VALUES ({marks})"
    same = " AND ".join(f"{name} = ?" for name in names)
    there = f"SELECT 1 FROM {table} WHERE {same}"
    for row in cursor:
        if table == "unsettled" and target.execute(there, row).fetchone() is not None:
            continue  # an earlier merge copied it
        if target.execute(add, row).rowcount or table != "calls":
            continue
        first = target.execute("SELECT answer, time FROM calls WHERE key = ?", row[:1]).fetchone()
        if first[1] != row[names.index("time")]:
            counts["paid_twice"] += 1
            counts["answered_differently"] += first[0] != row[names.index("answer")]
