"""Prepared rows on disk, and batch(i) as a function of (seed, i).

A prepared folder is an Arrow table of packed rows beside `dataset.json` (kind, rows, items,
fingerprint).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grain
import jax
import numpy as np
from datasets import Dataset, disable_progress_bars, load_from_disk
from jax.sharding import Mesh

from medreason_jax.data.packing import Row
from medreason_jax.data.sources import write_lines
from medreason_jax.mesh import put_rows


def write_rows(rows: Sequence[Row], folder: Path, facts: dict, rejected: list[dict]) -> None:
    """Write rows, facts and what was left out; the folder appears whole or not at all."""
    if not rows:
        raise ValueError(f"nothing to train on in {folder}: no item was left after preparation")
    digest = hashlib.sha256()
    for row in rows:
        for name in sorted(row):
            digest.update(row[name].tobytes())
    facts = {**facts, "rows": len(rows), "fingerprint": digest.hexdigest()[:16]}
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    disable_progress_bars()
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    Dataset.from_dict(columns).save_to_disk(str(partial))
    (partial / "dataset.json").write_text(json.dumps(facts, indent=2))
    write_lines(partial / "rejected.jsonl", rejected)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def read_facts(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text())


def open_rows(folder: Path) -> Any:
    """The rows of a prepared folder, memory-mapped, as numpy arrays."""
    return load_from_disk(str(folder)).with_format("numpy")


@dataclass(frozen=True)
class Source:
    """A prepared folder and its share of the rows of a mixture."""

    folder: Path
    weight: float


class Batches:
    """Rows of one or several sources, shuffled anew each epoch, mixed by share."""

    def __init__(self, sources: Sequence[Source], batch_rows: int, seed: int):
        self.batch_rows = batch_rows
        self.facts = [read_facts(source.folder) for source in sources]
        streams = [
            grain.MapDataset.source(open_rows(source.folder)).seed(seed + number).shuffle().repeat()
            for number, source in enumerate(sources)
        ]
        self.rows = (
            streams[0]
            if len(streams) == 1
            else grain.MapDataset.mix(streams, weights=[source.weight for source in sources])
        )

    @property
    def fingerprint(self) -> str:
        return "+".join(facts["fingerprint"] for facts in self.facts)

    def global_batch(self, index: int, mesh: Mesh) -> dict[str, jax.Array]:
        """Batch `index` over the mesh; each process reads the rows that its devices hold."""
        first = index * self.batch_rows
        held: dict[int, Row] = {}

        def read(rows: slice, name: str) -> np.ndarray:
            start, stop, _ = rows.indices(self.batch_rows)
            for row in range(start, stop):
                if row not in held:
                    held[row] = cast(Row, self.rows[first + row])
            return np.stack([held[row][name] for row in range(start, stop)])

        example: Any = self.rows[0]
        return {
            name: put_rows(
                mesh, lambda rows, n=name: read(rows, n), (self.batch_rows, *array.shape)
            )
            for name, array in example.items()
        }
