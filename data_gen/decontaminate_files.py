"""Decontamination of what lies in files: evaluation items, problems, texts of the corpus."""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_gen.bank_table import read_rows
from data_gen.decontaminate import Decontaminator, Finding, Item, Rule
from data_gen.questions import lettered, read_answer
from data_gen.records import Mcq, Problem, Rejected, content_id, write_records

COMMONEST = 10
_AT_ONCE = 1 << 23  # characters
_QUESTION_FIELDS = (
    *("question", "Question", "QUESTION", "problem_text", "Open-ended Verifiable Question"),
)
_TEXT_FIELDS = ("text", *_QUESTION_FIELDS)


def read_evaluation(paths: Iterable[Path]) -> list[Item]:
    """The items of evaluation files: JSON Lines (.gz too), CSV, TSV or XLSX with a header.

    An item is a question with its answer, open or with options; a letter stands for its option.
    """
    return [_read_item(where, record) for path in paths for where, record in _read_table(path)]


def _read_table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        yield from _read_lines(path)
    else:
        yield from ((f"{path} {row.place}", row.values) for row in read_rows(path))


def _read_item(where: str, record: Mapping[str, Any]) -> Item:
    name = next((name for name in _QUESTION_FIELDS if isinstance(record.get(name), str)), None)
    if name is None:
        raise ValueError(f"{where}: an item needs one of {', '.join(_QUESTION_FIELDS)}")
    answer = read_answer(record, lettered(record.get("options")))
    return Item(record[name], "" if answer is None else answer.text)


# --- problems ---------------------------------------------------------------------------------


def decontaminate_problems(
    problems: Sequence[Problem],
    questions: Mapping[str, Mcq],
    evaluation: Sequence[Item],
    *,
    rule: Rule,
    window: int,
    coverage: float,
) -> tuple[list[Problem], list[Rejected], dict[str, Any]]:
    """Drop training problems that an evaluation file or the bank's own dev or test split holds.

    A problem is looked at as it is and as the question it was made from. Returns what is kept, what
    is dropped, and what both rules found.
    """
    held_out = [p for p in problems if p.split in ("dev", "test")]
    training = [p for p in problems if p.split not in ("dev", "test")]
    items = [*evaluation, *(Item(problem.question, problem.answer) for problem in held_out)]
    index = Decontaminator(items, rule, window, coverage)
    found = index.look([Item(problem.question, problem.answer) for problem in training])
    commonest = index.commonest(COMMONEST)
    before = index.look([_question(problem, questions) for problem in training])
    kept, dropped = held_out, []
    for problem, *findings in zip(training, found, before, strict=True):
        hits = [finding.by(rule) for finding in findings]
        hit = hits[0] if hits[0] is not None else hits[1]
        if hit is None:
            kept.append(problem)
            continue
        detail = f"{hit.covered:.2f} of it in: {items[hit.item].question[:80]}"
        record = {"stage": "decontaminate", "reason": hit.how, "detail": detail}
        record |= {"problem_id": problem.id, "mcq_id": problem.mcq_id}
        record |= {"split": problem.split, "group": problem.group, "source": problem.source}
        dropped.append(Rejected.model_validate(record))
    told = {"rule": rule, "evaluation_items": len(items), "texts": len(training)}
    told["items_shorter_than_a_window"] = index.short_items
    told |= {"dropped_by_rule": _dropped_by_rule(found, before), "commonest_windows": commonest}
    return kept, dropped, told


def _question(problem: Problem, questions: Mapping[str, Mcq]) -> Item:
    mcq = None if problem.mcq_id is None else questions.get(problem.mcq_id)
    return Item(problem.question, problem.answer) if mcq is None else Item(mcq.question, mcq.answer)


def _dropped_by_rule(found: Sequence[Finding], before: Sequence[Finding]) -> dict[str, int]:
    """How many problems each rule drops, by their own text or by that of their question."""
    rules: tuple[Rule, ...] = ("paper", "coverage")
    pairs = list(zip(found, before, strict=True))
    return {
        rule: sum(any(each.by(rule) is not None for each in pair) for pair in pairs)
        for rule in rules
    }


# --- text files -------------------------------------------------------------------------------


def decontaminate_file(source: Path, out: Path, index: Decontaminator) -> dict[str, Any]:
    """Copy the records (JSON Lines, .gz too) that the rule keeps; write those it drops beside them.

    A record is looked at by its `text`, else by its question and answer. The dropped ones go to
    `<out>.rejected.jsonl`, with the rule's reason; returns what both rules found.
    """
    if source.resolve() == out.resolve():
        raise ValueError(f"--out {out}: it is the file that is read; name another")
    dropped: list[Rejected] = []

    def kept() -> Iterator[dict[str, Any]]:
        for records in _in_batches(_read_texts(source)):
            findings = index.look(item for item, _ in records)
            for (item, record), finding in zip(records, findings, strict=True):
                hit = finding.by(index.rule)
                if hit is None:
                    yield record
                    continue
                other = index.items[hit.item].question[:80]
                fields = {"stage": "decontaminate", "reason": hit.how}
                fields |= {"detail": f"{hit.covered:.2f} of it in: {other}"}
                number = record["id"] if "id" in record else content_id({"text": item.question})
                dropped.append(Rejected.model_validate({**fields, "record_id": number}))

    count = write_records(out, kept())
    write_records(out.with_name(f"{out.name}.rejected.jsonl"), dropped)
    found = index.counts
    return {
        "rule": index.rule,
        "evaluation_items": len(index.items),
        "items_shorter_than_a_window": index.short_items,
        "texts": found["texts"],
        "kept": count,
        "dropped_by_rule": {"paper": found["paper"], "coverage": found["coverage"]},
        "commonest_windows": index.commonest(COMMONEST),
    }


def _in_batches(
    records: Iterable[tuple[Item, dict[str, Any]]],
) -> Iterator[list[tuple[Item, dict[str, Any]]]]:
    batch: list[tuple[Item, dict[str, Any]]] = []
    size = 0
    for item, record in records:
        batch.append((item, record))
        size += len(item.question)
        if size >= _AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read_texts(path: Path) -> Iterator[tuple[Item, dict[str, Any]]]:
    for where, record in _read_lines(path):
        if isinstance(record.get("text"), str):
            yield Item(record["text"]), record
        elif any(isinstance(record.get(name), str) for name in _QUESTION_FIELDS):
            yield _read_item(where, record), record
        else:
            raise ValueError(f"{where}: a record needs one of {', '.join(_TEXT_FIELDS)}")


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    read = gzip.open if path.suffix == ".gz" else open
    with read(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: a record is a JSON object, found {line[:60]!r}")
            yield where, record
