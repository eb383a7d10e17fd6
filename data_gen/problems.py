"""Multiple-choice questions → open problems with one short true answer, or rejected with a reason.

First rules that cost nothing, then the teacher's four-label filter, then its reformat, whose answer
must be the bank's.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from data_gen.answers import judge
from data_gen.prompting import render
from data_gen.records import PROBLEM_SPELLING, Mcq, Problem, Rejected
from data_gen.teacher import Teacher, Unreadable

LABELS = ("Pass", "Too Simple", "Ambiguous Answer", "Not Reformulatable")

_NEGATIVE = re.compile(
    r"\bexcept\b|\bleast likely\b"
    r"|\b(?:incorrect|false|wrong|untrue) (?:option|statement|answer|one)\b"
    r"|\bwhich\b[^.?]{0,60}\b(?:is|are) (?:not|incorrect|false|wrong|untrue)\b|\bnot true\b"
    r"|不正确|错误的|不包括|誤って|誤りは|適切でない|正しくない|でないのは",
    re.IGNORECASE,
)
_SHORT_SENTENCE = 25  # characters
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
class ProblemMaker:
    """Makes problems with a teacher for filtering and one for rewriting questions."""

    filterer: Teacher | None
    reformatter: Teacher
    prompts: dict[str, str]
    min_question_chars: int

    async def make(self, mcq: Mcq) -> Problem | Rejected:
        """One question through every filter and the reformat."""
        reason = reject_by_rule(mcq, self.min_question_chars)
        if reason is not None:
            return rejected(mcq, "rules", reason)
        calls: list[str] = []
        texts = {"question": mcq.question, "options": list_options(mcq), "answer": mcq.answer}
        if self.filterer is not None:
            prompt = render(self.prompts["filter"], texts)
            label = await self.filterer.ask_parsed(prompt, parse_label, self.prompts["repair"])
            calls += label.calls
            if label.value is None:
                return rejected(mcq, "filter", "unreadable", label.error, calls)
            if label.value != "Pass":
                return rejected(mcq, "filter", label.value, calls=calls)
        prompt = render(self.prompts["reformat"], texts)
        parsed = await self.reformatter.ask_parsed(prompt, parse_reformat, self.prompts["repair"])
        calls += parsed.calls
        if parsed.value is None:
            return rejected(mcq, "reformat", "unreadable", parsed.error, calls)
        question, answer = parsed.value
        if judge(answer, mcq.answer).outcome != "true":
            return rejected(mcq, "reformat", "answer changed", f"{mcq.answer} → {answer}", calls)
        return _problem(mcq, question, answer, calls)


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
    *before, last = re.split(r"(?<=[.?!。？])\s+|(?<=[。？])|\n", question.strip())
    return f"{before[-1]} {last}" if before and len(last) < _SHORT_SENTENCE else last


def list_options(mcq: Mcq) -> str:
    """The options, one a line, as prompts show them."""
    return "\n".join(f"{letter}. {text}" for letter, text in mcq.options.items())


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
            "calls": [] if calls is None else calls,
        }
    )


def _problem(mcq: Mcq, question: str, answer: str, calls: list[str]) -> Problem:
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
            "calls": calls,
        }
    )
