"""Records to a prepared folder: encode, reject what does not fit, pack.

The work lies in `<folder>.partial` until it is whole: shards of tokenised records, each written at
once, then the packed rows. A run that was killed goes on with the shards that are missing, and its
result is that of one that was not, byte for byte.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medreason_jax.data.chat import TOKENIZER_FILES, ChatTokenizer, Encoded, Piece
from medreason_jax.data.dataset import read_facts, write_rows
from medreason_jax.data.packing import Row, pack_items, pack_pairs, split_document
from medreason_jax.data.records import Items, Kind, Unusable, record_items, record_name
from medreason_jax.data.shards import (
    finished_shards,
    read_facts_of_shard,
    shard_path,
    windows,
    write_shard,
)
from medreason_jax.data.sources import Record, Records, digest_files

SHARD_CHARACTERS = 2_000_000  # a shard is closed when it holds as many: seconds of work
WINDOW_ITEMS = 1_000_000  # as many items are packed together; bounds memory and the disk's reach


def prepare(
    records: Records,
    kind: Kind,
    tokenizer: ChatTokenizer,
    *,
    length: int,
    reset: bool = True,
    pairs_per_row: int | None,
    seed: int,
    folder: Path,
    shard_characters: int = SHARD_CHARACTERS,
) -> dict[str, Any]:
    """Prepare `records` into `folder`, unless it is there already; returns its facts.

    Items longer than a row are split when they are documents; others are left out, as are records
    without anything to learn, and stand in the folder's `rejected.jsonl`.
    """
    key = preparation_key(records, tokenizer, (kind, length, reset, pairs_per_row, seed))
    partial = folder.with_name(f"{folder.name}.partial")
    if (folder / "dataset.json").is_file() and read_facts(folder)["key"] == key:
        shutil.rmtree(partial, ignore_errors=True)
        return read_facts(folder)
    shards = _begin(partial, f"{key} {shard_characters}") / "shards"
    _tokenise(records, kind, tokenizer, length, shards, shard_characters)
    done = [read_facts_of_shard(path) for path in finished_shards(shards)]
    rejected = [reject for facts in done for reject in facts["rejected"]]
    items, tokens = (sum(facts[name] for facts in done) for name in ("items", "tokens"))
    if items == 0:
        raise ValueError(
            f"nothing to train on in {records.name}: of {sum(f['records'] for f in done)} records "
            f"{len(rejected)} were left out" + (f", first {rejected[0]}" if rejected else "")
        )
    facts = {
        "key": key,
        "kind": kind,
        "source": records.name,
        "records": sum(facts["records"] for facts in done),
        "items": items,
        "rejected": len(rejected),
        "tokens": tokens,
        "mean_tokens": tokens / items,
        "length": length,
        "reset": reset,
    }

    def rows() -> Iterator[Row]:
        for window in windows(finished_shards(shards), WINDOW_ITEMS):
            if kind == "preference":
                assert pairs_per_row is not None
                yield from pack_pairs(window, length, tokenizer.pad_id, pairs_per_row, seed)
            else:
                yield from pack_items(window, length, tokenizer.pad_id, seed, reset=reset)

    write_rows(rows(), partial / "done", facts, rejected)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial / "done", folder)
    shutil.rmtree(partial, ignore_errors=True)
    return read_facts(folder)


def preparation_key(records: Records, tokenizer: ChatTokenizer, settings: tuple) -> str:
    """Changes with the records, the tokenizer and the settings that rows depend on."""
    files = [tokenizer.folder / name for name in TOKENIZER_FILES]
    parts = (settings, tokenizer.template_text, records.identity, digest_files(files))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _begin(partial: Path, state: str) -> Path:
    """The folder of unfinished work; work for another key is forgotten."""
    file = partial / "key"
    if not file.is_file() or file.read_text() != state:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "shards").mkdir(parents=True)
        file.write_text(state)
    return partial


def _tokenise(
    records: Records,
    kind: Kind,
    tokenizer: ChatTokenizer,
    length: int,
    folder: Path,
    shard_characters: int,
) -> None:
    """Write the shards that are missing; records of finished ones are read past."""
    finished = finished_shards(folder)
    behind = sum(read_facts_of_shard(path)["records"] for path in finished)
    terminal = sys.stderr.isatty()
    with tqdm(
        desc=f"preparing {records.name}",
        unit=" records",
        initial=behind,
        mininterval=0.2 if terminal else 10.0,
        delay=0.0 if terminal else 10.0,
        ascii=not terminal,
    ) as bar:
        drafts = _drafts(islice(records.read(), behind, None), kind, tokenizer)
        for number, chunk in enumerate(_chunks(drafts, shard_characters), start=len(finished)):
            items, facts = _encode(chunk, kind, tokenizer, length)
            write_shard(shard_path(folder, number), items, facts)
            bar.update(len(chunk))


Draft = tuple[Any, Items | Unusable]  # a record's name, and its pieces or why there are none


def _drafts(
    placed: Iterable[tuple[str, Record]], kind: Kind, tokenizer: ChatTokenizer
) -> Iterator[Draft]:
    for place, record in placed:
        name = record_name(record, place)
        try:
            yield name, record_items(tokenizer, record, kind, place)
        except Unusable as reason:
            yield name, reason


def _chunks(drafts: Iterable[Draft], characters: int) -> Iterator[list[Draft]]:
    """Neighbouring records, up to the one with which their text reaches `characters`."""
    chunk, size = [], 0
    for draft in drafts:
        chunk.append(draft)
        size += _characters(draft)
        if size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _characters(draft: Draft) -> int:
    _, items = draft
    if isinstance(items, Unusable):
        return 0
    return sum(len(p.content) for item in items for p in item if isinstance(p.content, str))


def _encode(
    chunk: list[Draft], kind: Kind, tokenizer: ChatTokenizer, length: int
) -> tuple[list[Encoded], dict[str, Any]]:
    """Items that fit a row (the two of a pair together), and the facts of their shard."""
    usable: list[list[Piece]] = []
    for _, drafted in chunk:
        if not isinstance(drafted, Unusable):
            usable += drafted
    encoded = iter(tokenizer.encode_items(usable))
    kept, rejected, groups = [], [], 0
    for name, drafted in chunk:
        if isinstance(drafted, Unusable):
            rejected.append(_reject(name, drafted.reason, str(drafted)))
            continue
        group = list(islice(encoded, len(drafted)))
        if kind == "text":
            group = split_document(group[0], length)
        elif (size := sum(len(item.ids) for item in group)) > length:
            rejected.append(_reject(name, "too_long", f"{size} tokens, row length {length}"))
            continue
        kept += group
        groups += len(group) if kind == "text" else 1
    tokens = sum(len(item.ids) for item in kept)
    return kept, {"records": len(chunk), "items": groups, "tokens": tokens, "rejected": rejected}


def _reject(name: Any, reason: str, detail: str) -> dict[str, Any]:
    return {"id": name, "stage": "prepare", "reason": reason, "detail": detail}
