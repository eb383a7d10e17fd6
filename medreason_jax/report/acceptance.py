"""The counts of data generation as tables.

Data generation writes a nested dict of counts; any nesting is shown, so that a count it adds later
needs no change here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Shown above the tables: what decides whether the data can be trusted.
PROMINENT = {
    "wrong_accepted_share": "of accepted traces end in a wrong answer",
    "accepted_share": "of problems end in an accepted trace",
}


@dataclass(frozen=True)
class CountTable:
    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Tile:
    value: str
    meaning: str


def spell(key: str) -> str:
    return key.replace("_", " ")


def is_share(key: str) -> bool:
    return key.endswith(("share", "rate", "acceptance", "accuracy"))


def format_count(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and is_share(key):
        return f"{100 * value:.1f}%"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return str(value)


def tabulate(title: str, counts: Mapping[str, Any]) -> Iterator[CountTable]:
    """One table of the plain values, one of the dicts of plain values, then what lies deeper."""
    plain = {k: v for k, v in counts.items() if not isinstance(v, Mapping)}
    nested = {k: v for k, v in counts.items() if isinstance(v, Mapping) and v}
    if plain:
        rows = [
            (spell(k), [format_count(title if is_share(title) else k, v)]) for k, v in plain.items()
        ]
        yield CountTable(spell(title or "totals"), [""], rows)
    flat = {k: v for k, v in nested.items() if not any(isinstance(x, Mapping) for x in v.values())}
    columns = list(dict.fromkeys(name for row in flat.values() for name in row))
    shared = len(flat) > 1 and all(len(row) * 2 >= len(columns) for row in flat.values())
    if shared:
        rows = [
            (spell(k), [format_count(c, row[c]) if c in row else "" for c in columns])
            for k, row in flat.items()
        ]
        yield CountTable(spell(title), [spell(c) for c in columns], rows)
    for key, value in nested.items():
        if not (shared and key in flat):
            yield from tabulate(f"{title}: {key}" if title else key, value)


def find_tiles(counts: Mapping[str, Any]) -> Iterator[Tile]:
    for key, value in counts.items():
        if isinstance(value, Mapping):
            yield from find_tiles(value)
        elif key in PROMINENT and value is not None:
            yield Tile(format_count(key, value), PROMINENT[key])
