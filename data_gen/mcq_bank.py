"""A MedQA-style file of examination questions → a bank, evaluation, a simulated teacher's bank.

Questions of one case series share most of their stem; they get one group and so one split.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data_gen.near_duplicates import find_groups
from data_gen.records import Mcq, Split, read_records, write_records
from data_gen.split import assign_splits

SIMILARITY = 0.7  # Jaccard, of 5-character windows, from which two questions are one group


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
    texts = [record["question"] for record in read]
    groups = find_groups(texts, [None] * len(texts), SIMILARITY)
    fields = {"source": source, "language": language}
    mcqs = [
        Mcq.model_validate({**record, **fields, "group": f"{source}/{group}"})
        for record, group in zip(read, groups, strict=True)
    ]
    mcqs = assign_splits(list({mcq.id: mcq for mcq in mcqs}.values()), shares, seed).questions
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
