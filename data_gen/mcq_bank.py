"""A MedQA-style file of examination questions → a bank, evaluation, a simulated teacher's bank.

Questions of one case series share most of their stem; they get one group and so one split.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data_gen.decontaminate import squeeze
from data_gen.records import Mcq, Split, hash_fraction, read_records, write_records
from data_gen.split import assign_splits

SAME_START = 64  # characters
SAME_WINDOW = 128  # characters; longer than any common closing question
SAMPLED = 16  # one window in so many is looked at, chosen by its content


class _Source(BaseModel, extra="ignore"):
    question: str
    options: dict[str, str]
    answer: str
    answer_idx: str


def write_mcq_bank(
    path: Path,
    folder: Path,
    *,
    source: str,
    language: str,
    shares: Mapping[Split, float],
    seed: int,
) -> dict[str, Path]:
    """Write bank.jsonl (search and rl), evaluation.jsonl (dev and test),
    private/teacher_bank.jsonl.

    Returns the path of each file by its name without suffix.
    """
    read = [record.model_dump() for record in read_records(path, _Source)]
    groups = find_series([record["question"] for record in read])
    fields = {"source": source, "language": language}
    mcqs = [
        Mcq.model_validate({**record, **fields, "group": f"{source}/{group}"})
        for record, group in zip(read, groups, strict=True)
    ]
    mcqs = assign_splits(list({mcq.id: mcq for mcq in mcqs}.values()), shares, seed)
    mcqs.sort(key=lambda mcq: mcq.id)
    training = [mcq for mcq in mcqs if mcq.split in ("search", "rl")]
    files: dict[str, Iterable[Any]] = {
        "bank.jsonl": training,
        "evaluation.jsonl": [mcq for mcq in mcqs if mcq.split in ("dev", "test")],
        "private/teacher_bank.jsonl": [_private_record(mcq) for mcq in training],
    }
    for name, records in files.items():
        write_records(folder / name, records)
    return {Path(name).stem: folder / name for name in files}


def find_series(questions: Sequence[str]) -> list[str]:
    """A group name for every question: one for all that share their start or a long window."""
    parent = list(range(len(questions)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, question in enumerate(questions):
        for mark in _marks(squeeze(question)):
            other = first.setdefault(mark, i)
            parent[max(root(i), root(other))] = min(root(i), root(other))
    return [f"{hash_fraction(squeeze(questions[root(i)])):.12f}"[2:] for i in range(len(questions))]


def _marks(text: str) -> set[str]:
    windows = (text[i : i + SAME_WINDOW] for i in range(len(text) - SAME_WINDOW + 1))
    return {text[:SAME_START], *(w for w in windows if sum(w[::8].encode()) % SAMPLED == 0)}


def _private_record(mcq: Mcq) -> dict[str, Any]:
    return {
        "kind": "generic",
        "question": mcq.question,
        "open_question": open_form(mcq.question),
        "answer": mcq.answer,
        "options": mcq.options,
    }


def open_form(question: str) -> str:
    """A question without the reference to its options, as far as wording alone can do it."""
    opened = re.sub(r"\bwhich (?:one )?of the following\b", "what", question, flags=re.IGNORECASE)
    return re.sub(r"(^|[.?!]\s+)what\b", lambda m: f"{m[1]}What", opened)
