"""The record kinds that cross a disk: JSON Lines, UTF-8, one record a line, unknown fields kept.

`id` is a content hash: a record without one gets the hash of its defining fields. Problems and SFT
records carry the spelling of the published HuatuoGPT-o1 files beside ours and are read from either.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError, model_validator

Split = Literal["search", "rl", "dev", "test"]
Outcome = Literal["true", "false", "unscored"]
Action = Literal["Inner Thinking", "Final Conclusion", "Verification"]
SftKind = Literal["complex_cot", "simple_cot", "direct", "option_only"]

HELD_OUT: tuple[Split, ...] = ("dev", "test")

PROBLEM_SPELLING = {"question": "Open-ended Verifiable Question", "answer": "Ground-True Answer"}
SFT_SPELLING = {"question": "Question", "thinking": "Complex_CoT", "response": "Response"}

Model = TypeVar("Model", bound=BaseModel)


def canonical_json(value: Any) -> str:
    """One spelling of a value: sorted keys, no spaces, characters as they are."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def content_id(content: Mapping[str, Any]) -> str:
    """First 16 hex digits of the sha256 of the content; an `id` among the fields does not count."""
    fields = {name: value for name, value in content.items() if name != "id"}
    return hashlib.sha256(canonical_json(fields).encode()).hexdigest()[:16]


def hash_fraction(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts only, so on no order of work."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


class Mcq(BaseModel, extra="allow"):
    """A multiple-choice question of a bank."""

    id: str
    question: str
    options: dict[str, str]
    answer_idx: str
    answer: str
    source: str = "unnamed"
    language: str = "en"
    group: str | None = None
    split: Split | None = None
    part: str | None = None
    explanation: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _add_id(cls, data: Any) -> Any:
        return _with_id(data, ("question", "options", "answer_idx"))


class Problem(BaseModel, extra="allow"):
    """A question with one short true answer: open, or with the options it is asked with."""

    id: str
    question: str
    answer: str
    options: dict[str, str] | None = None
    mcq_id: str | None = None
    source: str = "unnamed"
    language: str = "en"
    explanation: str | None = None
    group: str | None = None
    split: Split | None = None
    part: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _add_spelling_and_id(cls, data: Any) -> Any:
        return _with_id(
            _with_both_spellings(data, PROBLEM_SPELLING), ("question", "answer", "mcq_id")
        )


def list_options(options: Mapping[str, str]) -> str:
    """Options, one a line, as a question shows them."""
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def question_text(question: Mcq | Problem) -> str:
    """A question as it is asked: followed by its options where it has them."""
    if not question.options:
        return question.question
    return f"{question.question}\n{list_options(question.options)}"


class Step(BaseModel, extra="forbid"):
    """One step of a structured chain of thought; only Inner Thinking has a title."""

    action: Action
    title: str | None = None
    content: str


class Trace(BaseModel, extra="allow"):
    """A reasoning path that ended in a verified conclusion, with what was tried before."""

    id: str
    problem_id: str
    steps: list[Step]
    verdicts: list[Outcome]
    strategies: list[str]
    attempts: int
    label_conditioned: bool = False
    calls: list[str] = []
    failed: list[list[Step]] = []
    unscored: list[list[Step]] = []
    split: Split | None = None
    group: str | None = None
    source: str = "unnamed"

    @model_validator(mode="before")
    @classmethod
    def _add_id(cls, data: Any) -> Any:
        return _with_id(data, ("problem_id", "steps", "strategies"))


class Message(BaseModel, extra="allow"):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Sft(BaseModel, extra="allow"):
    """A training example; the assistant's text is thinking + response and stands in no message."""

    id: str
    messages: list[Message]
    thinking: str
    response: str
    kind: SftKind = "complex_cot"
    problem_id: str | None = None
    part: str | None = None
    split: Split | None = None
    group: str | None = None
    source: str = "unnamed"

    @model_validator(mode="before")
    @classmethod
    def _add_spelling_and_id(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if "messages" not in data and "Question" in data:
            data["messages"] = [{"role": "user", "content": data["Question"]}]
        if isinstance(data.get("messages"), list) and data["messages"]:
            last = data["messages"][-1]
            data.setdefault("Question", last["content"] if isinstance(last, dict) else last.content)
        spelling = {ours: theirs for ours, theirs in SFT_SPELLING.items() if ours != "question"}
        return _with_id(
            _with_both_spellings(data, spelling),
            ("messages", "thinking", "response", "kind", "problem_id"),
        )


class Side(BaseModel, extra="allow"):
    """One side of a preference pair."""

    thinking: str
    response: str


class Preference(BaseModel, extra="allow"):
    """A chosen and a rejected answer to one prompt."""

    id: str
    prompt: list[Message]
    chosen: Side
    rejected: Side
    chosen_kind: str
    rejected_kind: str
    chosen_tier: str | None = None
    rejected_tier: str | None = None
    explain: bool
    problem_id: str | None = None
    split: Split | None = None
    group: str | None = None
    source: str = "unnamed"

    @model_validator(mode="before")
    @classmethod
    def _add_id(cls, data: Any) -> Any:
        return _with_id(data, ("prompt", "chosen", "rejected", "explain", "problem_id"))


class VerifierSample(BaseModel, extra="allow"):
    """One judged conclusion, to train a verifier on; `label_source` says who judged it.

    `rule` is what the rule finds, beside a label that came from a teacher.
    """

    id: str
    question: str
    answer: str
    conclusion: str
    label: bool
    label_source: str
    rule: Outcome
    options: dict[str, str] | None = None
    problem_id: str | None = None
    split: Split | None = None
    group: str | None = None
    source: str = "unnamed"

    @model_validator(mode="before")
    @classmethod
    def _add_id(cls, data: Any) -> Any:
        return _with_id(data, ("question", "answer", "conclusion", "label", "label_source"))


class Candidate(BaseModel, extra="allow"):
    """A model's sample for a problem; `correct` is null where it could not be scored."""

    problem_id: str
    explain: bool
    thinking: str | None = None
    response: str | None = None
    text: str | None = None
    correct: bool | None = None


class Text(BaseModel, extra="allow"):
    """A document of the continued-pretraining corpus."""

    id: str
    text: str
    source: str = "unnamed"

    @model_validator(mode="before")
    @classmethod
    def _add_id(cls, data: Any) -> Any:
        return _with_id(data, ("text", "source"))


class Rejected(BaseModel, extra="allow"):
    """An item that a stage did not let through, and why."""

    id: str
    stage: str
    reason: str
    detail: str = ""
    mcq_id: str | None = None
    problem_id: str | None = None
    split: Split | None = None
    group: str | None = None
    source: str = "unnamed"
    calls: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _add_id(cls, data: Any) -> Any:
        return _with_id(data, ("stage", "reason", "detail", "mcq_id", "problem_id", "occurrence"))


def read_records(path: str | Path, model: type[Model]) -> list[Model]:
    """Every record of a file; a bad line is a ValueError naming file, line, field and value."""
    return list(iterate_records(path, model))


def iterate_records(path: str | Path, model: type[Model]) -> Iterator[Model]:
    """As `read_records`, one at a time, for files that do not fit in memory."""
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield model.model_validate(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path} line {number}: not JSON ({error}), found {_shown(line)}"
                ) from None
            except ValidationError as error:
                raise ValueError(f"{path} line {number}: {describe_error(error)}") from None


def write_records(path: str | Path, records: Iterable[BaseModel | Mapping[str, Any]]) -> int:
    """Write the records in the order given, whole or not at all; returns how many."""
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        for record in records:
            fields = record.model_dump(mode="json") if isinstance(record, BaseModel) else record
            yield json.dumps(fields, ensure_ascii=False) + "\n"
            count += 1

    write_atomically(path, lines())
    return count


def write_atomically(path: str | Path, chunks: Iterable[str]) -> None:
    """Replace a file in one step: a reader or a crash sees the old file or the new one.

    The file is its owner's alone (mkstemp makes it 0600), as a new folder is.
    """
    path = Path(path)
    make_private_folder(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as out:
            out.writelines(chunks)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def make_private_folder(path: Path) -> None:
    """Create a folder and what is missing above it for the owner alone; one that is there stays."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)


def describe_error(error: ValidationError) -> str:
    """The first complaint of a failed validation in one line, with the count of the others."""
    first, *others = error.errors()
    field = ".".join(str(part) for part in first["loc"]) or "record"
    more = f" (and {len(others)} more)" if others else ""
    found = "" if first["type"] == "missing" else f", found {_shown(first['input'])}"
    return f"{field}: {first['msg'].removeprefix('Value error, ')}{found}{more}"


def _with_id(data: Any, defining: tuple[str, ...]) -> Any:
    if not isinstance(data, dict) or data.get("id") is not None:
        return data
    content = {name: _plain(data[name]) for name in defining if name in data}
    return {
        "id": content_id(content),
        **{name: value for name, value in data.items() if name != "id"},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _with_both_spellings(data: Any, spelling: dict[str, str]) -> Any:
    if not isinstance(data, dict):
        return data
    data = dict(data)
    for ours, theirs in spelling.items():
        if ours in data and theirs in data and data[ours] != data[theirs]:
            raise ValueError(f"'{ours}' and '{theirs}' differ")
        if ours in data or theirs in data:
            value = data[ours] if ours in data else data[theirs]
            data[ours] = data[theirs] = value
    return data


def _shown(value: Any) -> str:
    """The value, short, without a password that stands in a URL."""
    text = re.sub(r"(?<=//)[^/@\s]+@", "***@", repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
