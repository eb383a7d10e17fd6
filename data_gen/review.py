"""People judge a sample of the verifier's verdicts, without seeing them.

`write_review` draws conclusions that the search judged, half accepted and half refused, spread over
the attempts, and writes them in random order for a reader to fill (CSV, or an HTML page that saves
the CSV); which verdict each had stays in `key.jsonl`. `read_review` compares the filled file with
it: agreement and Cohen's kappa, weighted back to all verdicts of the run, the share of accepted
conclusions that are wrong (false true) and of refused ones that are right (false false).
"""

import csv
import html
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from data_gen.answers import accuracy_interval
from data_gen.records import (
    Problem,
    Rejected,
    Step,
    Trace,
    content_id,
    hash_fraction,
    read_records,
    write_atomically,
    write_records,
)
from data_gen.rewrite import render_trace
from data_gen.search import conclusion_of

COLUMNS: tuple[str, ...] = (
    "item",
    "question",
    "reference",
    "conclusion",
    "right",
    "note",
    "reasoning",
)
Verdict = Literal["true", "false"]
YES = {"yes", "y", "1", "true", "right", "はい", "○", "是"}
NO = {"no", "n", "0", "false", "wrong", "いいえ", "×", "否"}
UNSURE = {"unsure", "?", "unclear", "skip"}
MOST_ATTEMPTS = 4  # this many and more are one stratum
_DRAWS = 2000


@dataclass(frozen=True)
class Judged:
    """A conclusion that the search judged."""

    id: str
    problem: Problem
    steps: list[Step]
    verdict: Verdict
    attempt: int  # from 1


class Key(BaseModel):
    """What the reader is not shown, and how many conclusions of the run the verdict had."""

    item: str
    problem_id: str
    verdict: Verdict
    attempt: int
    of_verdict: int


# --- the sample -------------------------------------------------------------------------------


def write_review(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Write review/ in a run's folder; returns the counts of what was drawn."""
    place = folder / "review"
    if (place / "key.jsonl").exists():
        raise ValueError(f"{place} holds a sample already; fill that one, or remove the folder")
    judged = list(judged_conclusions(folder))
    if not judged:
        raise ValueError(f"{folder}: no judged conclusion; run data-gen search first")
    sample = draw(judged, count, seed)
    sizes = {verdict: sum(j.verdict == verdict for j in judged) for verdict in ("true", "false")}
    rows = [_row(each) for each in sample]
    write_atomically(place / "sample.csv", _csv_lines(rows))
    write_atomically(place / "sample.html", [_page(rows)])
    keys = [
        Key(
            item=each.id,
            problem_id=each.problem.id,
            verdict=each.verdict,
            attempt=each.attempt,
            of_verdict=sizes[each.verdict],
        )
        for each in sample
    ]
    write_records(place / "key.jsonl", keys)
    drawn = {verdict: sum(key.verdict == verdict for key in keys) for verdict in sizes}
    return {"drawn": drawn, "of": sizes, "csv": str(place / "sample.csv")}


def judged_conclusions(folder: Path) -> Iterable[Judged]:
    """Every conclusion of the search with a verdict, each once; unscored ones have none."""
    problems = {p.id: p for p in read_records(folder / "problems.jsonl", Problem)}
    seen: set[str] = set()
    for problem_id, steps, verdict, attempt in _all_verdicts(folder):
        problem = problems[problem_id]
        texts = {"problem": problem_id, "conclusion": conclusion_of(steps), "verdict": verdict}
        item = content_id(texts)
        if item not in seen:
            seen.add(item)
            yield Judged(item, problem, steps, verdict, attempt)


def _all_verdicts(folder: Path) -> Iterable[tuple[str, list[Step], Verdict, int]]:
    for trace in read_records(folder / "traces.jsonl", Trace):
        for attempt, steps in enumerate(trace.failed, 1):
            yield trace.problem_id, steps, "false", attempt
        yield trace.problem_id, trace.steps, "true", len(trace.failed) + 1
    for record in read_records(folder / "rejected.jsonl", Rejected):
        if record.stage == "search" and record.problem_id is not None:
            failed = (record.model_extra or {}).get("failed") or []
            for attempt, steps in enumerate(failed, 1):
                typed = [Step.model_validate(step) for step in steps]
                yield record.problem_id, typed, "false", attempt


def draw(judged: Sequence[Judged], count: int, seed: int) -> list[Judged]:
    """`count` of them: half of each verdict while there are enough, spread over the attempts."""
    by_verdict: dict[str, list[Judged]] = {"true": [], "false": []}
    for each in judged:
        by_verdict[each.verdict].append(each)
    few = min(by_verdict, key=lambda verdict: len(by_verdict[verdict]))
    many = "false" if few == "true" else "true"
    first = min(count // 2, len(by_verdict[few]))
    chosen = _spread(by_verdict[few], first, seed) + _spread(by_verdict[many], count - first, seed)
    return sorted(chosen, key=lambda each: hash_fraction(seed, "order", each.id))


def _spread(judged: Sequence[Judged], count: int, seed: int) -> list[Judged]:
    """`count` drawn from the attempts in proportion, at random within one (largest remainders)."""
    strata: dict[int, list[Judged]] = defaultdict(list)
    for each in sorted(judged, key=lambda each: hash_fraction(seed, "draw", each.id)):
        strata[min(each.attempt, MOST_ATTEMPTS)].append(each)
    count = min(count, len(judged))
    wanted = {s: count * len(members) / len(judged) for s, members in strata.items()}
    sizes = {s: int(share) for s, share in wanted.items()}
    for s in sorted(wanted, key=lambda s: (sizes[s] - wanted[s], s))[: count - sum(sizes.values())]:
        sizes[s] += 1
    return [each for s, members in strata.items() for each in members[: sizes[s]]]


def _row(judged: Judged) -> dict[str, str]:
    return {
        "item": judged.id,
        "question": judged.problem.question,
        "reference": judged.problem.answer,
        "conclusion": conclusion_of(judged.steps),
        "right": "",
        "note": "",
        "reasoning": render_trace(judged.steps),
    }


class _Lines:
    """A file that keeps what a csv writer writes."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, text: str) -> None:
        self.written.append(text)


def _csv_lines(rows: Sequence[Mapping[str, str]]) -> list[str]:
    lines = _Lines()
    writer = csv.DictWriter(lines, list(COLUMNS))
    writer.writeheader()
    writer.writerows({name: escape(text) for name, text in row.items()} for row in rows)
    return ["\ufeff", *lines.written]  # by the mark a spreadsheet knows UTF-8


def escape(text: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _page(rows: Sequence[Mapping[str, str]]) -> str:
    """One page, nothing loaded from elsewhere; it saves the answers as a CSV file."""
    items = "\n".join(_article(number, row) for number, row in enumerate(rows, 1))
    page = Path(__file__).with_name("review.html").read_text(encoding="utf-8")
    return page.replace("{{ items }}", items).replace("{{ count }}", str(len(rows)))


def _article(number: int, row: Mapping[str, str]) -> str:
    text = {name: html.escape(value) for name, value in row.items()}
    choices = "".join(
        f'<label><input type="radio" name="{text["item"]}" value="{value}"> {value}</label>'
        for value in ("yes", "no", "unsure")
    )
    return (
        f'<article data-item="{text["item"]}"><h2>{number}</h2><p>{text["question"]}</p>'
        f"<dl><dt>Reference answer</dt><dd>{text['reference']}</dd>"
        f"<dt>Conclusion</dt><dd>{text['conclusion']}</dd></dl>"
        f"<details><summary>Reasoning</summary><pre>{text['reasoning']}</pre></details>"
        f'<p class="choices">Does the conclusion give the reference answer? {choices}'
        f' <input class="note" placeholder="note" aria-label="note"></p></article>'
    )


# --- the filled sample ------------------------------------------------------------------------


def read_review(folder: Path, filled: Path) -> dict[str, Any]:
    """Compare a filled sample with the verdicts; writes review/result.json and returns it."""
    place = folder / "review"
    if not (place / "key.jsonl").exists():
        raise ValueError(f"{place}: no sample was written; run data-gen review {folder} first")
    keys = {key.item: key for key in read_records(place / "key.jsonl", Key)}
    answers = _read_filled(filled, keys)
    result = compare(keys, answers)
    write_atomically(place / "result.json", [json.dumps(result, indent=2) + "\n"])
    return result


def _read_filled(path: Path, keys: Mapping[str, Key]) -> dict[str, bool | None]:
    """Item → whether the reader found the conclusion right; None where not sure or not filled."""
    answers: dict[str, bool | None] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        head = file.readline()
        file.seek(0)
        separator = max(",;\t", key=head.count)
        reader = csv.DictReader(file, delimiter=separator)
        missing = {"item", "right"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: no column {sorted(missing)}; keep the sample's columns")
        for row in reader:
            item, said = (row["item"] or "").strip(), (row["right"] or "").strip().casefold()
            where = f"{path} line {reader.line_num}"
            if item not in keys:
                raise ValueError(f"{where}: item {item!r} is not of this sample")
            if item in answers:
                raise ValueError(f"{where}: item {item} is there twice")
            if said not in YES | NO | UNSURE | {""}:
                raise ValueError(f"{where}: right={said!r}; allowed: yes, no, unsure")
            answers[item] = None if said in UNSURE | {""} else said in YES
    return answers


def compare(keys: Mapping[str, Key], answers: Mapping[str, bool | None]) -> dict[str, Any]:
    """The figures of a filled sample, shares with their 95 % intervals."""
    counts = {verdict: [0, 0] for verdict in ("true", "false")}  # [found wrong, found right]
    for item, right in answers.items():
        if right is not None:
            counts[keys[item].verdict][right] += 1
    (true_wrong, true_right), (false_wrong, false_right) = counts["true"], counts["false"]
    reviewed_true, reviewed_false = true_wrong + true_right, false_wrong + false_right
    if not reviewed_true or not reviewed_false:
        raise ValueError(
            f"{reviewed_true} accepted and {reviewed_false} refused conclusions are filled in; "
            "both are needed: fill more of the sample"
        )
    sizes = {key.verdict: key.of_verdict for key in keys.values()}
    share = sizes["true"] / (sizes["true"] + sizes["false"])
    right = true_right / reviewed_true, false_right / reviewed_false
    agreement, kappa = agree(share, *right)
    low, high = _combine(share, (true_right, reviewed_true), (false_wrong, reviewed_false))
    return {
        "reviewed": {"accepted": reviewed_true, "refused": reviewed_false},
        "not_sure_or_empty": len(keys) - reviewed_true - reviewed_false,
        "accepted_share_of_all_verdicts": share,
        "agreement_rate": agreement,
        "agreement_interval95": [low, high],
        "kappa": kappa,
        "kappa_interval95": _kappa_interval(share, counts),
        "false_true": _share(true_wrong, reviewed_true),
        "false_false": _share(false_right, reviewed_false),
    }


def _share(wrong: int, of: int) -> dict[str, Any]:
    interval = list(accuracy_interval(wrong, of))
    return {"wrong": wrong, "of": of, "rate": wrong / of, "interval95": interval}


def agree(share: float, right_if_true: float, right_if_false: float) -> tuple[float, float | None]:
    """(agreement, Cohen's kappa) of verifier and reader over all verdicts of a run.

    `share` of the verdicts are true; of those, and of the false ones, the given shares are right
    by the reader. Kappa is None where chance alone would always agree.
    """
    agreement = share * right_if_true + (1 - share) * (1 - right_if_false)
    reader = share * right_if_true + (1 - share) * right_if_false
    chance = share * reader + (1 - share) * (1 - reader)
    return agreement, None if chance == 1 else (agreement - chance) / (1 - chance)


def _combine(share: float, *agreed: tuple[int, int]) -> tuple[float, float]:
    """Interval of a weighted sum of two shares from Wilson's of each (Zou and Donner 2008)."""
    weights = (share, 1 - share)
    found = [good / of for good, of in agreed]
    lows, highs = zip(*(accuracy_interval(good, of) for good, of in agreed), strict=True)
    parts = list(zip(weights, found, lows, highs, strict=True))
    middle = sum(weight * p for weight, p, _, _ in parts)
    below = math.hypot(*(weight * (p - low) for weight, p, low, _ in parts))
    above = math.hypot(*(weight * (high - p) for weight, p, _, high in parts))
    return max(middle - below, 0.0), min(middle + above, 1.0)


def _kappa_interval(share: float, counts: Mapping[str, Sequence[int]]) -> list[float] | None:
    """95 % of kappa, the shares drawn from their posteriors with Jeffreys' prior."""
    drawn = random.Random(0)

    def right(verdict: str) -> float:
        wrong, good = counts[verdict]
        return drawn.betavariate(good + 0.5, wrong + 0.5)

    draws = (agree(share, right("true"), right("false"))[1] for _ in range(_DRAWS))
    kappas = sorted(kappa for kappa in draws if kappa is not None)
    if not kappas:
        return None
    return [kappas[round(0.025 * (len(kappas) - 1))], kappas[round(0.975 * (len(kappas) - 1))]]
