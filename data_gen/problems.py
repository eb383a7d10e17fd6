"""Multiple-choice questions → open problems with one short true answer, or rejected with a reason.

First rules that cost nothing, then the small models that a question may not be too easy for, then
the teacher's four-label filter, then its reformat, whose answer must be the bank's. Held-out
questions (dev, test) go through the rules and the reformat only: no filter chooses them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_gen.answers import judge
from data_gen.difficulty import DifficultyFilter
from data_gen.prompting import render
from data_gen.records import (
    HELD_OUT,
    PROBLEM_SPELLING,
    Mcq,
    Problem,
    Rejected,
    list_options,
)
from data_gen.schemas import REFORMAT
from data_gen.teacher import Teacher, Unreadable

LABELS = ("Pass", "Too Simple", "Ambiguous Answer", "Not Reformulatable")

_NEGATIVE = re.compile(
    r"\bexcept\b|\bleast likely\b"
    r"|\b(?:incorrect|false|wrong|untrue) (?:option|statement|answer|one)\b"
    r"|\bwhich\b[^.?]{0,60}\b(?:is|are) (?:not(?! only)|incorrect|false|wrong|untrue)\b"
    r"|\bnot true\b"
    r"|誤ってい|誤りは|適切でない|正しくない|ない(?:の|もの)は|(?:低い|少ない)[^。、]{0,8}はどれ"
    r"|不正确|错误的|不包括|不属于|不符合|除外的?是|哪一?[项个](?:是|有)?(?:不|错|没)",
    re.IGNORECASE,
)
_SHORT_SENTENCE = 25  # bytes: eight Japanese or Chinese characters
_SEVERAL = re.compile(
    r"\b(?:select|choose|mark) (?:all|two|three|every)\b|\bwhich (?:two|three)\b|\ball that apply\b"
    r"|[2-5２-５二三]つ選べ|多选",
    re.IGNORECASE,
)
_COMBINED = re.compile(
    r"^(?:all|none|both|neither|any) (?:of|are)\b"
    r"|^(?:both )?\(?[a-e]\)?,? (?:and|&) \(?[a-e]\)?\.?$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Passed:
    """A question that no filter rejected: the calls this took, the small models' outcomes."""

    mcq: Mcq
    calls: list[str] = field(default_factory=list)
    difficulty: dict[str, str] = field(default_factory=dict)

    def as_mcq(self) -> Mcq:
        """The question's record with what the filters found."""
        return self.mcq.model_copy(update={"difficulty": self.difficulty, "calls": self.calls})


@dataclass(frozen=True)
class ProblemMaker:
    """Makes problems with small models and a teacher for filtering, one for rewriting questions;
    without `difficulty` or `filterer` that filter is off."""

    filterer: Teacher | None
    reformatter: Teacher
    prompts: Mapping[str, str]
    min_question_chars: int
    difficulty: DifficultyFilter | None = None

    async def make(self, mcq: Mcq) -> Problem | Rejected:
        """One question through every filter and the reformat."""
        passed = await self.filter(mcq)
        return passed if isinstance(passed, Rejected) else await self.reformat(passed)

    async def filter(self, mcq: Mcq) -> Passed | Rejected:
        """One question through the filters, the cheapest first."""
        reason = reject_by_rule(mcq, self.min_question_chars)
        if reason is not None:
            return rejected(mcq, "rules", reason)
        if mcq.split in HELD_OUT:
            return Passed(mcq)
        calls: list[str] = []
        outcomes: dict[str, str] = {}
        if self.difficulty is not None:
            attempts = await self.difficulty.attempt(mcq)
            calls += attempts.calls
            outcomes = attempts.outcomes
            if attempts.too_easy:
                detail = f"right: {', '.join(outcomes)}"
                return rejected(mcq, "difficulty", "all models are right", detail, calls)
        if self.filterer is not None:
            prompt = render(self.prompts["filter"], _texts(mcq))
            label = await self.filterer.ask_parsed(prompt, parse_label, self.prompts["repair"])
            calls += label.calls
            if label.value is None:
                return rejected(mcq, "filter", "unreadable", label.error, calls)
            if label.value != "Pass":
                return rejected(mcq, "filter", label.value, calls=calls)
        return Passed(mcq, calls, outcomes)

    async def reformat(self, passed: Passed) -> Problem | Rejected:
        """The open problem of a question; its answer must be the bank's."""
        mcq, calls = passed.mcq, list(passed.calls)
        prompt = render(self.prompts["reformat"], _texts(mcq))
        parsed = await self.reformatter.ask_parsed(
            prompt, parse_reformat, self.prompts["repair"], schema=REFORMAT
        )
        calls += parsed.calls
        if parsed.value is None:
            return rejected(mcq, "reformat", "unreadable", parsed.error, calls)
        question, answer = parsed.value
        if judge(answer, mcq.answer).outcome != "true":
            return rejected(mcq, "reformat", "answer changed", f"{mcq.answer} → {answer}", calls)
        return _problem(passed, question, answer, calls)


def _texts(mcq: Mcq) -> dict[str, str]:
    return {"question": mcq.question, "options": list_options(mcq.options), "answer": mcq.answer}


def reject_by_rule(mcq: Mcq, min_question_chars: int) -> str | None:
    """Why a question cannot become a problem, by rules; None if it may."""
    if mcq.answer_idx not in mcq.options:
        return "answer_idx is no option"
    if judge(mcq.answer, mcq.answer_idx, mcq.options).outcome != "true":
        return "answer is not the option of answer_idx"
    if len(mcq.question.strip()) < min_question_chars:
        return "short question"
    if _NEGATIVE.search(_asked(mcq.question)):
        return "asks for the wrong option"
    if _SEVERAL.search(mcq.question) or _COMBINED.search(mcq.answer.strip()):
        return "several answers"
    return None


def _asked(question: str) -> str:
    """The last sentence, with the one before it where it is short ("Which one?")."""
    pieces = re.split(r"(?<=[.?!。？])\s+|(?<=[。？])|\n", question.strip())
    *before, last = [piece for piece in pieces if piece] or [""]
    return f"{before[-1]} {last}" if before and len(last.encode()) < _SHORT_SENTENCE else last


def parse_label(text: str) -> str:
    """One of the four labels and nothing else."""
    label = text.strip().removesuffix(".")
    if label not in LABELS:
        raise Unreadable(f"it should be exactly one of: {', '.join(LABELS)}")
    return label


def parse_reformat(text: str) -> tuple[str, str]:
    """(open question, true answer) of a JSON object with exactly these two keys."""
    value = parse_json_object(text)
    keys = (PROBLEM_SPELLING["question"], PROBLEM_SPELLING["answer"])
    if set(value) != set(keys):
        raise Unreadable(
            f"the JSON object should have exactly the keys {keys[0]!r} and {keys[1]!r}"
        )
    question, answer = (value[key] for key in keys)
    if not isinstance(question, str) or not isinstance(answer, str):
        raise Unreadable("both values should be texts")
    if not question.strip() or not answer.strip():
        raise Unreadable("neither value may be empty")
    return question.strip(), answer.strip()


def parse_json_object(text: str) -> dict[str, Any]:
    """The JSON object that a reply is, in a code fence or not; line breaks in texts are kept."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", text, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text, strict=False)
    except json.JSONDecodeError as error:
        raise Unreadable(f"not JSON ({error})") from None
    except RecursionError:
        raise Unreadable("not JSON of a sensible depth") from None
    if not isinstance(value, dict):
        raise Unreadable("it should be one JSON object")
    return value


def rejected(
    mcq: Mcq, stage: str, reason: str, detail: str = "", calls: list[str] | None = None
) -> Rejected:
    """The record of a question that did not become a problem."""
    return Rejected.model_validate(
        {
            "stage": stage,
            "reason": reason,
            "detail": detail,
            "mcq_id": mcq.id,
            "split": mcq.split,
            "group": mcq.group,
            "source": mcq.source,
            "calls": [] if calls is None else calls,
        }
    )


def _problem(passed: Passed, question: str, answer: str, calls: list[str]) -> Problem:
    mcq = passed.mcq
    return Problem.model_validate(
        {
            "question": question,
            "answer": answer,
            "mcq_id": mcq.id,
            "language": mcq.language,
            "group": mcq.group,
            "split": mcq.split,
            "part": mcq.part,
            "source": mcq.source,
            "explanation": mcq.explanation,
            "difficulty": passed.difficulty,
            "calls": calls,
        }
    )
