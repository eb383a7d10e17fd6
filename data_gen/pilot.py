"""Every step on a few questions, and from them what the whole bank will give, cost and take.

The pilot's calls go into the run's journal, so the run does not pay for them again. Sums of the
whole bank are extrapolated from the questions, with 95 % intervals by the bootstrap over them.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from data_gen import pipeline
from data_gen.answers import accuracy_interval
from data_gen.config import Config
from data_gen.endpoints import price_list, roles_of
from data_gen.estimate import search_share
from data_gen.journal_file import open_for_reading
from data_gen.prices import Usage
from data_gen.records import (
    Mcq,
    Problem,
    Rejected,
    Sft,
    Trace,
    hash_fraction,
    read_records,
    write_records,
)
from data_gen.shards import join_journals

_DRAWS = 2000
_MADE, _SEARCHED = 0, 1  # the half of the graph that a call belongs to
_MAKING = {"rules", "difficulty", "filter", "reformat", "decontaminate", "duplicate"}


@dataclass
class Spent:
    """What one question took in one half of the graph."""

    calls: float = 0.0
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    cost: float = 0.0


def run_pilot(config: Config, count: int) -> dict[str, Any]:
    """Run `count` questions of the bank, all of them searched; returns what they foretell."""
    bank = list({mcq.id: mcq for mcq in read_records(config.bank, Mcq)}.values())
    chosen = sorted(bank, key=lambda mcq: hash_fraction(config.seed, "pilot", mcq.id))[:count]
    folder = config.out / "pilot"
    write_records(
        folder / "bank.jsonl", [mcq.model_copy(update={"split": "search"}) for mcq in chosen]
    )
    settings = {"bank": folder / "bank.jsonl", "out": folder, "mix": [], "shard": None}
    # All questions at once: the time between two calls of one is then a call's, not a queue's.
    settings |= {"concurrency": len(chosen)}
    report = pipeline.run(config.model_copy(update=settings))
    join_journals([folder], config.out)
    calls = _read_calls(config, folder / "journal.sqlite")
    keys = list(_keys_of(folder))
    by_question = _by_question([mcq.id for mcq in chosen], keys, calls)
    latency = _latency(keys, calls)
    return {
        "questions": len(chosen),
        "of": len(bank),
        "acceptance": _acceptance(report, len(chosen)),
        "rejected": report["problems"]["rejected"]
        | report["decontaminate"]["rejected"]
        | report["search"]["rejected"]
        | report["rewrite"]["rejected"],
        "seconds_a_call": latency,
        "currency": config.prices.currency,
        "whole_bank": _extrapolate(config, bank, by_question, latency),
    }


def _acceptance(report: Mapping[str, Any], questions: int) -> dict[str, Any]:
    """Of the questions: those that became problems, verified traces, SFT records."""
    counts = {
        "problems": report["decontaminate"]["accepted"],
        "verified": report["search"]["accepted"],
        "written": report["rewrite"]["accepted"],
    }
    return {
        name: {
            "of_questions": n,
            "rate": n / questions,
            "interval95": list(accuracy_interval(n, questions)),
        }
        for name, n in counts.items()
    }


@dataclass(frozen=True)
class _Call:
    used: Spent
    time: float


def _read_calls(config: Config, journal: Path) -> dict[str, _Call]:
    prices, roles = price_list(config.prices), roles_of(config.teacher)
    batched = {name for name, role in roles.items() if role.batch is not None}
    with closing(open_for_reading(journal)) as db:
        rows = db.execute(
            "SELECT key, role, model, prompt_tokens, completion_tokens, time FROM calls"
        ).fetchall()
    return {
        key: _Call(
            Spent(1, prompt, said, prices.rate(model, role in batched).of(Usage(prompt, said))),
            time,
        )
        for key, role, model, prompt, said, time in rows
    }


def _keys_of(folder: Path) -> Iterator[tuple[str, int, list[str]]]:
    """(question, half of the graph, keys of its calls in their order), of every record."""
    question: dict[str, str] = {}
    for problem in read_records(folder / "problems.jsonl", Problem):
        question[problem.id] = str(problem.mcq_id)
        yield str(problem.mcq_id), _MADE, (problem.model_extra or {}).get("calls") or []
    for trace in read_records(folder / "traces.jsonl", Trace):
        yield question[trace.problem_id], _SEARCHED, trace.calls
    for record in read_records(folder / "sft.jsonl", Sft):
        calls = (record.model_extra or {}).get("calls") or []
        yield question[str(record.problem_id)], _SEARCHED, calls
    for record in read_records(folder / "rejected.jsonl", Rejected):
        half = _MADE if record.stage in _MAKING else _SEARCHED
        owner = record.mcq_id if record.mcq_id is not None else question[str(record.problem_id)]
        yield owner, half, record.calls


def _by_question(
    questions: Sequence[str],
    keys: Sequence[tuple[str, int, list[str]]],
    calls: Mapping[str, _Call],
) -> list[tuple[Spent, Spent]]:
    spent = {question: (Spent(), Spent()) for question in questions}
    counted: set[tuple[str, str]] = set()
    for question, half, own in keys:
        for key in own:
            if key in calls and (question, key) not in counted:
                counted.add((question, key))
                _add(spent[question][half], calls[key].used)
    return list(spent.values())


def _add(total: Spent, used: Spent) -> None:
    for name in vars(used):
        setattr(total, name, getattr(total, name) + getattr(used, name))


def _latency(
    keys: Sequence[tuple[str, int, list[str]]], calls: Mapping[str, _Call]
) -> float | None:
    """Mean seconds between a call of a question and its next one; None with no such pair."""
    gaps: list[float] = []
    for _, _, own in keys:
        times = [calls[key].time for key in own if key in calls]
        gaps += [after - before for before, after in pairwise(times)]
    found = [gap for gap in gaps if gap >= 0]
    return fmean(found) if found else None


def _extrapolate(
    config: Config,
    bank: Sequence[Mcq],
    spent: Sequence[tuple[Spent, Spent]],
    latency: float | None,
) -> dict[str, Any]:
    """Sums of the whole bank: {name: {"expected", "interval95"}}, hours at the concurrency."""
    searched = search_share(config, bank)
    drawn = random.Random(config.seed)
    samples = [drawn.choices(range(len(spent)), k=len(spent)) for _ in range(_DRAWS)]
    told = {}
    for name in vars(Spent()):
        each = [getattr(made, name) + searched * getattr(rest, name) for made, rest in spent]
        sums = sorted(len(bank) * fmean(each[i] for i in sample) for sample in samples)
        low, high = (sums[round(q * (_DRAWS - 1))] for q in (0.025, 0.975))
        told[name] = {"expected": len(bank) * fmean(each), "interval95": [low, high]}
    if latency is not None:
        hours = latency / config.concurrency / 3600  # a call
        low, high = told["calls"]["interval95"]
        expected = told["calls"]["expected"] * hours
        told["hours"] = {"expected": expected, "interval95": [low * hours, high * hours]}
    return told


def describe(told: Mapping[str, Any]) -> Iterator[str]:
    """The pilot's result as lines for a person."""
    yield f"{told['questions']} of {told['of']} questions, every step"
    for name, part in told["acceptance"].items():
        low, high = (f"{100 * limit:.0f}" for limit in part["interval95"])
        yield f"  {name}: {part['of_questions']} ({low} to {high} %)"
    for reason, count in told["rejected"].items():
        yield f"  rejected: {count} {reason}"
    yield "the whole bank, 95 % intervals:"
    for name, part in told["whole_bank"].items():
        low, high = part["interval95"]
        unit = f" {told['currency']}" if name == "cost" else ""
        form = ",.2f" if name in ("cost", "hours") else ",.0f"
        yield (
            f"  {name.replace('_', ' ')}: {part['expected']:{form}}{unit} "
            f"({low:{form}} to {high:{form}})"
        )
    if told["seconds_a_call"] is not None:
        yield f"  (a call takes {told['seconds_a_call']:.2f} s; hours at the config's concurrency)"
