"""Records of JSON Lines files."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

PUBLISHED = {
    "question": "Open-ended Verifiable Question",
    "answer": "Ground-True Answer",
}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a JSON Lines file (gzip too)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    records = []
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error.msg}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number} is {line[:40]!r}; a record is a JSON object")
            records.append(record)
    return records


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """A JSON Lines file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    os.replace(partial, path)


def field(record: dict[str, Any], name: str, path: Path) -> Any:
    if name not in record:
        raise ValueError(
            f"{path}: record {record.get('id')!r} has no field {name!r}; found {sorted(record)}"
        )
    return record[name]


def read_problems(path: Path) -> list[dict[str, Any]]:
    """Problems with their `id`, `question` and `answer`, the published spelling understood."""
    problems = []
    for record in read_lines(path):
        for name, published in PUBLISHED.items():
            if name not in record and published in record:
                record[name] = record[published]
            field(record, name, path)
        field(record, "id", path)
        problems.append(record)
    if not problems:
        raise ValueError(f"{path} holds no problem")
    return problems


def question_text(problem: dict[str, Any]) -> str:
    """The question as it is asked: followed by its lettered options when it has them."""
    if not problem.get("options"):
        return problem["question"]
    options = "\n".join(f"{letter}. {text}" for letter, text in problem["options"].items())
    return f"{problem['question']}\n{options}"
