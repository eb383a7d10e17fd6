"""Parquet beside the JSON Lines, for whoever reads with `datasets` or Arrow; needs pyarrow.

Options are a list of {letter, text} there, since a Parquet struct would give every question every
letter; records without a field have null.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any


def load_pyarrow() -> tuple[ModuleType, ModuleType]:
    """pyarrow and pyarrow.parquet; ValueError says how to come by them."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            "parquet=true needs pyarrow, which is not installed; "
            "run `pip install pyarrow`, or set parquet: false"
        ) from None
    return pyarrow, parquet


def write_parquet(paths: Iterable[Path]) -> list[Path]:
    """A Parquet file beside each JSON Lines file that holds a record; returns those written."""
    pyarrow, parquet = load_pyarrow()
    written = []
    for path in paths:
        with open(path, encoding="utf-8") as lines:
            records = [_with_listed_options(json.loads(line)) for line in lines]
        if not records:
            continue
        out = path.with_suffix(".parquet")
        temporary = out.with_name(f".{out.name}.tmp")
        names = list(dict.fromkeys(name for record in records for name in record))
        columns = {name: [record.get(name) for record in records] for name in names}
        parquet.write_table(pyarrow.table(columns), temporary)
        os.chmod(temporary, 0o600)
        os.replace(temporary, out)
        written.append(out)
    return written


def _with_listed_options(record: dict[str, Any]) -> dict[str, Any]:
    options = record.get("options")
    if isinstance(options, dict):
        listed = [{"letter": letter, "text": text} for letter, text in options.items()]
        record["options"] = listed
    if isinstance(record.get("difficulty"), dict):
        outcomes = record["difficulty"].items()
        record["difficulty"] = [{"model": name, "outcome": outcome} for name, outcome in outcomes]
    return record
