"""Prepared rows on disk, and batch(i) as a function of (seed, schedule, i).

A prepared folder is an Arrow file of packed rows beside `dataset.json` (kind, rows, items, tokens,
useful share, fingerprint) and `rejected.jsonl`.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import grain
import jax
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from jax.sharding import Mesh

from medreason_jax.data.packing import Row
from medreason_jax.data.schedule import Schedule, start_schedule
from medreason_jax.data.sources import write_lines
from medreason_jax.mesh import put_rows

ROWS = "rows.arrow"
WRITTEN_AT_ONCE = 64


def write_rows(
    rows: Iterable[Row], folder: Path, facts: dict[str, Any], rejected: list[dict[str, Any]]
) -> None:
    """Write rows (one at least), facts and what was left out; over what a killed run left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = iter(rows)
    first = next(rows)
    digest, count = hashlib.sha256(), 0
    features = Features(
        {name: List(Value(str(a.dtype)), length=len(a)) for name, a in first.items()}
    )
    schema = features.arrow_schema
    rows = chain([first], rows)
    with pa.OSFile(str(folder / ROWS), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while block := list(islice(rows, WRITTEN_AT_ONCE)):
            for row in block:
                for name in sorted(row):
                    digest.update(row[name].tobytes())
            writer.write_batch(_record_batch(block, schema))
            count += len(block)
    useful = facts["tokens"] / (count * facts["length"])
    facts = {**facts, "rows": count, "useful_share": useful, "fingerprint": digest.hexdigest()[:16]}
    (folder / "dataset.json").write_text(json.dumps(facts, indent=2))
    write_lines(folder / "rejected.jsonl", rejected)


def _record_batch(rows: list[Row], schema: pa.Schema) -> pa.RecordBatch:
    columns = [
        pa.FixedSizeListArray.from_arrays(
            pa.array(np.concatenate([row[field.name] for row in rows])), type=field.type
        )
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def read_facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "dataset.json").read_text())


class Rows(Sequence[Row]):
    """The rows of a prepared folder, memory-mapped; their arrays are views with their own dtypes.

    The numpy format of `datasets` would make every integer an int64.
    """

    def __init__(self, folder: Path):
        self.dataset = Dataset.from_file(str(folder / ROWS)).with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:  # pyright: ignore[reportIncompatibleMethodOverride]
        table: Any = self.dataset[index]
        return {
            name: table.column(name).combine_chunks().flatten().to_numpy()
            for name in table.column_names
        }


@dataclass(frozen=True)
class Source:
    """A prepared folder and its share of the rows of a mixture."""

    folder: Path
    weight: float


class Batches:
    """Rows of one or several sources, shuffled anew each epoch, mixed by a schedule of shares.

    Without a schedule the sources keep their weights from row 0 on; with one, it decides alone.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        batch_rows: int,
        seed: int,
        schedule: Schedule | None = None,
    ):
        self.batch_rows = batch_rows
        self.facts = [read_facts(source.folder) for source in sources]
        if schedule is None:
            schedule = start_schedule([source.weight for source in sources])
        self.schedule = schedule
        if len(self.schedule.segments[-1].weights) != len(sources):
            raise ValueError(
                f"the schedule is of {len(self.schedule.segments[-1].weights)} sources, "
                f"given are {len(sources)}"
            )
        opened = [Rows(source.folder) for source in sources]
        shapes = [{name: array.shape for name, array in rows[0].items()} for rows in opened]
        if any(each != shapes[0] for each in shapes):
            raise ValueError(
                f"rows of {sources[0].folder} and of another source differ in their fields or "
                "length, so they cannot be mixed; prepare them alike"
            )
        self.shapes = shapes[0]
        self.streams = [
            grain.MapDataset.source(rows).seed(seed + number).shuffle().repeat()
            for number, rows in enumerate(opened)
        ]

    @property
    def fingerprint(self) -> str:
        return "+".join(facts["fingerprint"] for facts in self.facts)

    def row(self, number: int) -> Row:
        """Row `number` of the run, on any mesh and any number of processes."""
        source, index = self.schedule.locate(number)
        return cast(Row, self.streams[source][index])

    def global_batch(self, index: int, mesh: Mesh) -> dict[str, jax.Array]:
        """Batch `index` over the mesh; each process reads the rows that its devices hold."""
        first = index * self.batch_rows
        return global_rows(
            lambda number: self.row(first + number), self.shapes, self.batch_rows, mesh
        )


def global_rows(
    read_row: Callable[[int], Row], shapes: dict[str, tuple[int, ...]], rows: int, mesh: Mesh
) -> dict[str, jax.Array]:
    """Rows 0 … `rows` - 1 over the mesh; each row is read once by a process that holds it."""
    held: dict[int, Row] = {}

    def read(part: slice, name: str) -> np.ndarray:
        numbers = range(*part.indices(rows))
        held.update({number: read_row(number) for number in numbers if number not in held})
        return np.stack([held[number][name] for number in numbers])

    return {
        name: put_rows(mesh, lambda part, n=name: read(part, n), (rows, *shape))
        for name, shape in shapes.items()
    }


def evaluation_batches(folder: Path, batch_rows: int, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """Every row of a prepared folder once, in order; the last batch is filled with zero rows.

    A zero row weighs nothing: weights, segments and pairs are 0.
    """
    rows = Rows(folder)
    shapes = {name: array.shape for name, array in rows[0].items()}
    empty = {name: np.zeros_like(array) for name, array in rows[0].items()}
    for first in range(0, len(rows), batch_rows):

        def read(number: int, first: int = first) -> Row:
            return rows[first + number] if first + number < len(rows) else empty

        yield global_rows(read, shapes, batch_rows, mesh)
