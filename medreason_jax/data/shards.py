"""Tokenised items on disk, between encoding and packing: Arrow files that appear at once.

Items of a shard lie end to end; they are read memory-mapped.
"""

import bisect
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from medreason_jax.data.chat import Encoded

FACTS = b"facts"


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.arrow"


def finished_shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


def write_shard(path: Path, items: Sequence[Encoded], facts: dict[str, Any]) -> None:
    """Items and facts, whole or not at all."""
    offsets = np.cumsum([0, *(len(item.ids) for item in items)], dtype=np.int64)
    empty = np.empty(0, np.int32)
    columns = {
        "ids": np.concatenate([empty, *(item.ids for item in items)]).astype(np.int32),
        "is_target": np.concatenate([empty, *(item.is_target for item in items)]).astype(np.uint8),
    }
    table = pa.table(
        {
            name: pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))
            for name, values in columns.items()
        }
    ).replace_schema_metadata({FACTS: json.dumps(facts, ensure_ascii=False).encode()})
    partial = path.with_name(path.name + ".partial")
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    os.replace(partial, path)


def read_facts_of_shard(path: Path) -> dict[str, Any]:
    with pa.memory_map(str(path)) as file:
        return json.loads(pa.ipc.open_file(file).schema.metadata[FACTS])


class Shard:
    """The items of one file."""

    def __init__(self, path: Path):
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        ids, is_target = (table.column(name).combine_chunks() for name in ("ids", "is_target"))
        self.offsets = ids.offsets.to_numpy()
        self.ids = ids.values.to_numpy()
        self.is_target = is_target.values.to_numpy().view(bool)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Encoded:
        start, end = self.offsets[index], self.offsets[index + 1]
        return Encoded(self.ids[start:end], self.is_target[start:end])


class Window(Sequence[Encoded]):
    """Items of several shards, end to end."""

    def __init__(self, shards: Sequence[Shard]):
        self.shards = shards
        self.ends = np.cumsum([len(shard) for shard in shards]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Encoded:  # pyright: ignore[reportIncompatibleMethodOverride]
        number = bisect.bisect_right(self.ends, index)
        before = self.ends[number - 1] if number else 0
        return self.shards[number][index - before]


def windows(paths: Sequence[Path], items: int) -> Iterator[Window]:
    """Neighbouring shards, grouped until they hold `items`."""
    group, held = [], 0
    for path in paths:
        group.append(shard := Shard(path))
        held += len(shard)
        if held >= items:
            yield Window(group)
            group, held = [], 0
    if held:
        yield Window(group)
