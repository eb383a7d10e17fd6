"""A team's own bank, read from JSON Lines, CSV or XLSX with a map of its columns.

A row becomes a question with lettered options and a key, or a rejected record that says what it
lacks. Columns are found by the names in `KNOWN_COLUMNS`, in any case, or by the map that is given.
"""

import csv
import gzip
import json
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from data_gen.records import Mcq, Rejected, describe_error

LETTERS = string.ascii_uppercase[:10]
KNOWN_COLUMNS: dict[str, tuple[str, ...]] = {
    "question": ("question", "stem", "question_text", "問題", "问题", "题目"),
    "options": ("options", "choices", "選択肢", "选项"),
    "answer_idx": ("answer_idx", "key", "correct_option", "correct", "cop", "answer_letter"),
    "answer": ("answer", "correct_answer", "解答", "答案"),
    "id": ("id", "question_id", "number"),
    "language": ("language", "lang"),
    "group": ("group", "case", "case_id", "series"),
    "source": ("source",),
    **{
        f"options.{letter}": (letter, f"option_{letter}", f"option {letter}", f"op{letter}")
        for letter in LETTERS
    },
}


class Row(NamedTuple):
    """One question as it stands in the file; `place` says where."""

    place: str
    values: dict[str, Any]


def read_rows(path: Path, sheet: str | None = None) -> list[Row]:
    """The rows of a .jsonl (or .jsonl.gz), .csv, .tsv or .xlsx file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a .jsonl, .csv, .tsv or .xlsx file")
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    readers = {"jsonl": _json_lines, "json": _json_lines, "csv": _table, "tsv": _table}
    if kind == "xlsx":
        rows = list(_workbook(path, sheet))
    elif kind in readers and sheet is None:
        rows = list(readers[kind](path))
    elif kind in readers:
        raise ValueError(f"--sheet {sheet}: {path.name} has no sheets; leave it out")
    else:
        raise ValueError(f"{path}: read are .jsonl, .csv, .tsv and .xlsx; save it as one of them")
    if not rows:
        raise ValueError(f"{path} holds no question")
    return rows


def _open(path: Path):
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig", newline="")


def _json_lines(path: Path) -> Iterator[Row]:
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number}: not JSON ({error})") from None
            if not isinstance(value, dict):
                raise ValueError(f"{path} line {number}: a question is a JSON object")
            yield Row(f"line {number}", value)


def _table(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        try:
            head = file.read(64_000)
            file.seek(0)
            comma = csv.Sniffer().sniff(head.partition("\n")[0], ",;\t").delimiter
        except csv.Error:
            comma = ","
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from None
        reader = csv.DictReader(file, delimiter=comma, strict=True)
        try:
            for values in reader:
                if None in values or None in values.values():
                    columns = len(reader.fieldnames or ())
                    raise ValueError(
                        f"{path} line {reader.line_num}: not the {columns} columns of the first "
                        "line; quote cells that hold the separator"
                    )
                yield Row(f"line {reader.line_num}", dict(values))
        except csv.Error as error:
            raise ValueError(f"{path} line {reader.line_num}: {error}") from None


def _workbook(path: Path, sheet: str | None) -> Iterator[Row]:
    import openpyxl

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # whatever a broken zip or XML raises
        raise ValueError(f"{path}: not an XLSX file ({error})") from None
    if sheet is not None and sheet not in book.sheetnames:
        raise ValueError(f"--sheet {sheet}: {path.name} has the sheets {book.sheetnames}")
    rows = (book[sheet] if sheet is not None else book.worksheets[0]).iter_rows(values_only=True)
    names = [str(name) if name is not None else "" for name in next(rows, ())]
    for number, cells in enumerate(rows, 2):
        values = {n: c for n, c in zip(names, cells, strict=False) if n and c is not None}
        if values:
            yield Row(f"row {number}", values)
    book.close()


# --- columns ----------------------------------------------------------------------------------


def find_columns(rows: Sequence[Row], given: Mapping[str, str]) -> dict[str, str]:
    """Field → column, from the map that is given and the known names.

    ValueError for a field or column that does not exist, or where one that is needed is missing.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    for field, column in given.items():
        if field not in KNOWN_COLUMNS:
            raise ValueError(f"--column {field}: no field; allowed: {', '.join(KNOWN_COLUMNS)}")
        if column not in names:
            raise ValueError(f"--column {field}={column}: no column; the file has {names[:20]}")
    taken, found = set(given.values()), dict(given)
    spelled = {name.strip().casefold(): name for name in reversed(names)}
    for field, known in KNOWN_COLUMNS.items():
        if field in found:
            continue
        columns = (spelled[k.casefold()] for k in known if k.casefold() in spelled)
        column = next((column for column in columns if column not in taken), None)
        if column is not None:
            found[field] = column
            taken.add(column)
    _require(found, names)
    return found


def _require(found: Mapping[str, str], names: Sequence[str]) -> None:
    has_options = "options" in found or {"options.A", "options.B"} <= set(found)
    lacking = [
        what
        for what, is_there in (
            ("question", "question" in found),
            ("options (or options.A, options.B, …)", has_options),
            ("answer_idx or answer", "answer_idx" in found or "answer" in found),
        )
        if not is_there
    ]
    if lacking:
        raise ValueError(
            f"no column for {' and '.join(lacking)}; name it by --column FIELD=COLUMN, the file "
            f"has {list(names)[:20]}"
        )


# --- questions --------------------------------------------------------------------------------


class Unusable(ValueError):
    """A row that is no question: (reason, detail)."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def read_question(
    row: Row, columns: Mapping[str, str], defaults: Mapping[str, str], first_option: int
) -> Mcq | Rejected:
    """The row's question; columns without a meaning are kept as they are.

    `first_option` is the number that a key in digits gives the first option.
    """
    cells = {field: row.values.get(column) for field, column in columns.items()}
    try:
        question = _text(cells["question"])
        if not question:
            raise Unusable("no question")
        options = _options(cells)
        letter = _key(cells, options, first_option)
        others = {
            name: value
            for name, value in row.values.items()
            if name not in columns.values() and name not in Mcq.model_fields
        }
        named = {f: _text(cells[f]) for f in ("language", "group", "source") if cells.get(f)}
        return Mcq.model_validate(
            {
                **others,
                "question": question,
                "options": options,
                "answer_idx": letter,
                "answer": options[letter],
                **defaults,
                **named,
                "place": row.place,
            }
        )
    except ValidationError as error:
        return reject(row, "cannot be read", describe_error(error))
    except Unusable as unusable:
        return reject(row, unusable.reason, unusable.detail)


def reject(row: Row, reason: str, detail: str = "") -> Rejected:
    """The record of a row that is no question."""
    fields = {"stage": "check", "reason": reason, "detail": detail, "occurrence": row.place}
    content = {name: str(value) for name, value in row.values.items()}
    return Rejected.model_validate({**fields, "row": content})


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a workbook has no whole numbers
    return unicodedata.normalize("NFC", str(value)).strip()


def _options(cells: Mapping[str, Any]) -> dict[str, str]:
    whole = cells.get("options")
    if isinstance(whole, str) and whole.strip().startswith(("{", "[")):
        try:
            whole = json.loads(whole)
        except json.JSONDecodeError:
            raise Unusable("options cannot be read", f"not JSON: {whole[:80]}") from None
    if isinstance(whole, str):
        whole = [line for line in whole.splitlines() if line.strip()]
    if isinstance(whole, dict):
        options = {_text(letter).upper(): _text(text) for letter, text in whole.items()}
    elif isinstance(whole, list):
        texts = [_text(x["value"] if isinstance(x, dict) and "value" in x else x) for x in whole]
        options = dict(zip(LETTERS, map(_without_letter, texts), strict=False))
    else:
        options = {letter: _text(cells.get(f"options.{letter}")) for letter in LETTERS}
    options = {letter: text for letter, text in options.items() if text}
    if len(options) < 2:
        raise Unusable("fewer than two options", f"found {len(options)}")
    same = [text for text in options.values() if list(options.values()).count(text) > 1]
    if same:
        raise Unusable("two options are the same", same[0][:80])
    return options


def _without_letter(text: str) -> str:
    """`a. Aspirin` → `Aspirin`."""
    head, mark, rest = text[:1], text[1:2], text[2:].strip()
    return rest if head.isascii() and head.isalpha() and mark in ".):" and mark and rest else text


def _key(cells: Mapping[str, Any], options: Mapping[str, str], first_option: int) -> str:
    given = _text(cells.get("answer_idx")) or _text(cells.get("answer"))
    if not given:
        raise Unusable("no key")
    plain = unicodedata.normalize("NFKC", given).strip(" .()[]").upper()
    if plain in options:
        letter = plain
    elif plain.isdecimal():
        letters, place = list(options), int(plain) - first_option
        if not 0 <= place < len(letters):
            raise Unusable("key is no option", f"{given} of {len(letters)} options")
        letter = letters[place]
    else:
        letter = _letter_of_text(given, options)
    _check_answer(_text(cells.get("answer")), letter, options)
    return letter


def _letter_of_text(given: str, options: Mapping[str, str]) -> str:
    same = [letter for letter, text in options.items() if text.casefold() == given.casefold()]
    if same:
        return same[0]
    parts = [part for part in unicodedata.normalize("NFKC", given).upper() if part.isalnum()]
    if len(parts) > 1 and all(part in options for part in parts):
        raise Unusable("several answers", given)
    raise Unusable("key is no option", given[:80])


def _check_answer(answer: str, letter: str, options: Mapping[str, str]) -> None:
    """Where both a key and an answer's text are given, they agree."""
    texts = {text.casefold(): each for each, text in options.items()}
    if answer.casefold() in texts and texts[answer.casefold()] != letter:
        raise Unusable("answer is not the option of the key", f"{letter} is not {answer[:80]}")
