"""What a folder holds so far, also beside a run that is writing it: `data-gen status`."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_gen.journal import read_cost, summarise
from data_gen.prices import NO_PRICES, PriceList
from data_gen.progress import read_snapshot
from data_gen.records import Rejected, Trace, iterate_records


def read_status(out: Path, prices: PriceList = NO_PRICES) -> dict[str, Any]:
    """Progress, calls by role, cost, possibly paid tokens, acceptance, rejects, records."""
    journal = out / "journal.sqlite"
    if not journal.exists():
        raise ValueError(f"{out}: no run has written here (journal.sqlite is missing)")
    cost = read_cost(journal, prices)
    return {
        "finished": (out / "report.json").exists(),
        "progress": read_snapshot(out),
        "calls": summarise(journal),
        "cost": {"currency": prices.currency, **cost},
        **read_acceptance(out),
        "records": {path.name: count_lines(path) for path in sorted(out.glob("*.jsonl"))},
    }


def read_acceptance(out: Path) -> dict[str, Any]:
    """Acceptance by strategy and attempt and rejects by reason: the report's, else the records'."""
    report = out / "report.json"
    if report.exists():
        told = json.loads(report.read_text(encoding="utf-8"))
        stages = [stage for stage in told.values() if isinstance(stage, dict)]
        rejected: Counter[str] = Counter()
        for stage in stages:
            if isinstance(stage.get("rejected"), dict):
                rejected.update(stage["rejected"])
        found = told.get("search", {})
        names = ("by_strategy", "by_attempt")
        return {**{name: found.get(name, {}) for name in names}, "rejected": dict(rejected)}
    return _count_records(out)


def _count_records(out: Path) -> dict[str, Any]:
    rejected: Counter[str] = Counter()
    judged: list[tuple[list[str], list[str]]] = []
    if (out / "rejected.jsonl").exists():
        for record in iterate_records(out / "rejected.jsonl", Rejected):
            rejected[f"{record.stage}: {record.reason}"] += 1
            if record.stage == "search":
                told = record.model_dump(include={"strategies", "verdicts"})
                judged.append((told["strategies"], told["verdicts"]))
    if (out / "traces.jsonl").exists():
        for trace in iterate_records(out / "traces.jsonl", Trace):
            judged.append((trace.strategies, list(trace.verdicts)))
    return {
        "by_strategy": _acceptance(
            pair for names, verdicts in judged for pair in zip(names, verdicts, strict=False)
        ),
        "by_attempt": _acceptance(
            (str(i), verdict) for _, verdicts in judged for i, verdict in enumerate(verdicts, 1)
        ),
        "rejected": dict(sorted(rejected.items())),
    }


def _acceptance(judged: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    tried: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    for name, verdict in judged:
        tried[name] += 1
        accepted[name] += verdict == "true"
    return {name: {"tried": tried[name], "accepted": accepted[name]} for name in sorted(tried)}


def count_lines(path: Path) -> int:
    """Records in a file of JSON Lines."""
    with open(path, "rb") as lines:
        return sum(1 for _ in lines)


def describe(found: Mapping[str, Any]) -> Iterable[str]:
    """The status as lines for a person."""
    yield "finished" if found["finished"] else "not finished"
    progress = found["progress"]
    if progress is not None and not found["finished"]:
        left = progress["seconds_left"]
        told = "" if left is None else f", about {left / 60:.0f} min left"
        yield f"{progress['stage']}: {progress['done']}/{progress['total']}{told}"
    for role, counts in found["calls"].items():
        tokens = f"{counts['prompt_tokens']} + {counts['completion_tokens']} tokens"
        yield f"{role}: {counts['calls']} calls in {counts['requests']} requests, {tokens}"
    cost = found["cost"]
    yield f"spent: {cost['requests']} requests, {cost['tokens']} tokens{_money(cost, 'cost')}"
    for why, counts in cost["possibly_paid"].items():
        yield f"possibly paid ({why}): {counts['requests']} requests, {counts['tokens']} tokens"
    if cost["possibly_paid_cost"]:
        yield f"possibly paid in all{_money(cost, 'possibly_paid_cost')}"
    for state, count in cost["batches"].items():
        yield f"batches {state}: {count}"
    for title, name in (("strategy", "by_strategy"), ("attempt", "by_attempt")):
        for key, counts in found[name].items():
            share = f"{100 * counts['accepted'] / counts['tried']:.0f} %"
            yield f"{title} {key}: {counts['accepted']} of {counts['tried']} accepted ({share})"
    for reason, count in found["rejected"].items():
        yield f"rejected, {reason}: {count}"
    for name, count in found["records"].items():
        yield f"{name}: {count} records"


def _money(cost: Mapping[str, Any], name: str) -> str:
    return f", {cost[name]:.2f} {cost['currency']}" if cost["currency"] else ""
