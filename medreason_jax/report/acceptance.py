"""The counts of data generation as tables.

Data generation writes a nested dict: a stage holds `in`, `accepted` and `rejected` by reason. These
become two tables; whatever else it counts is shown by its nesting, so that a count it adds later
needs no change here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from medreason_jax.report.summary import format_interval

# Shown above the tables: what decides whether the data can be trusted.
# Each is {"wrong", "of", "interval95"}.
PROMINENT = {
    "wrong_accepted": "of the records written for SFT end in a wrong answer by the bank's key",
    "verifier_accepted_wrong": (
        "of the traces that the verifier accepted end in a wrong answer by the bank's key"
    ),
}
SHOWN_AS_TILES = {*PROMINENT, "wrong_accepted_share"}
STAGE_KEYS = {"in", "accepted", "rejected"}


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
    if isinstance(value, list) and key.endswith("interval95") and "kappa" not in key:
        return format_interval((value[0], value[1])) + "%"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return str(value)


def is_stage(value: Any) -> bool:
    return isinstance(value, Mapping) and value.keys() >= STAGE_KEYS


def tabulate_counts(counts: Mapping[str, Any]) -> list[CountTable]:
    """Stages, rejects by reason, then everything else."""
    stages = {name: value for name, value in counts.items() if is_stage(value)}
    tables = []
    if stages:
        rows = [
            (
                spell(name),
                [f"{s['in']:,}", f"{s['accepted']:,}", format_ratio(s["accepted"], s["in"])],
            )
            for name, s in stages.items()
        ]
        tables.append(CountTable("stages", ["in", "accepted", "share"], rows))
    rejects = [
        (f"{name}, {reason}", [f"{n:,}"])
        for name, stage in stages.items()
        for reason, n in sorted(stage["rejected"].items(), key=lambda item: -item[1])
    ]
    if rejects:
        tables.append(CountTable("rejected, by reason", [""], rejects))
    rest = {
        name: {k: v for k, v in value.items() if k not in STAGE_KEYS} if name in stages else value
        for name, value in counts.items()
        if name not in SHOWN_AS_TILES
    }
    return [*tables, *tabulate("", rest)]


def format_ratio(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "–"


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
    shared = len(flat) > 1 or columns == ["tried", "accepted"]
    shared = shared and all(len(row) * 2 >= len(columns) for row in flat.values())
    if shared:
        rows = [
            (spell(k), [format_count(c, row[c]) if c in row else "" for c in columns])
            for k, row in flat.items()
        ]
        headings = [spell(c) for c in columns]
        if columns == ["tried", "accepted"]:
            headings.append("share")
            for (_, cells), row in zip(rows, flat.values(), strict=True):
                cells.append(format_ratio(row["accepted"], row["tried"]))
        yield CountTable(spell(title), headings, rows)
    for key, value in nested.items():
        if not (shared and key in flat):
            yield from tabulate(f"{title}: {key}" if title else key, value)


def find_tiles(counts: Mapping[str, Any]) -> Iterator[Tile]:
    for key, meaning in PROMINENT.items():
        if key in counts:
            wrong, of = counts[key]["wrong"], counts[key]["of"]
            interval = format_count("interval95", counts[key]["interval95"])
            detail = f"({wrong:,} of {of:,}, 95% interval {interval})"
            yield Tile(format_ratio(wrong, of), f"{meaning} {detail}")
