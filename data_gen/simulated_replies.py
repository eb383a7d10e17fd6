"""What the simulated teacher answers: pure functions of a prompt, the private bank and a draw.

The teacher recognises a prompt by the constant sentences at its start, finds the problem by the
text after `Question:`, and makes the mistakes a person makes at rates that are set one by one. It
knows nothing of the pipeline: its knowledge is the bank it was given and the prompt before it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

DO_NOT_GIVE = "do not give"
WAIT = "Wait, check again."
LABELS = ("Pass", "Too Simple", "Ambiguous Answer", "Not Reformulatable")
JSON_KINDS = frozenset(
    {
        "reformat",
        "initial_cot",
        "explore",
        "backtrack",
        "verify_again",
        "correct",
        "label_cot",
        "natural_reasoning",
    }
)
_KIND_BY_START = (
    ("You screen examination questions for a reasoning data set.", "filter"),
    ("You turn a multiple-choice question into an open question", "reformat"),
    ("Answer the following multiple-choice question.", "answer_options"),
    ("You solve a problem by reasoning step by step.", "initial_cot"),
    ("You compare a model's conclusion with a reference answer.", "verify"),
    ("You rewrite structured reasoning as one natural inner monologue", "natural_reasoning"),
    ("You write the answer that a user will read, from your own reasoning.", "final_response"),
    ("Your last reply could not be read:", "repair"),
)
_RETHINK_START = "You continue a piece of reasoning whose last conclusion a reviewer found"
_STRATEGIES = {
    "Exploring New Paths": "explore",
    "Backtracking": "backtrack",
    "Verification": "verify_again",
    "Correction": "correct",
    "Reaching the Answer": "label_cot",
}
# What follows the question in each kind of prompt.
_QUESTION_ENDS = {
    "filter": "\nOptions:",
    "reformat": "\nOptions:",
    "answer_options": "\nA. ",
    "explore": "\nPrevious reasoning:",
    "backtrack": "\nPrevious reasoning:",
    "verify_again": "\nPrevious reasoning:",
    "correct": "\nPrevious reasoning:",
    "label_cot": "\nTrue answer:",
    "natural_reasoning": "\nReasoning:",
    "final_response": "\nReasoning:",
}


@dataclass(frozen=True)
class Rates:
    """How often each kind of reply is wrong, as shares of one."""

    reasoning: float = 0.3
    strategy: float = 0.2
    rewrite: float = 0.01
    filter: float = 0.02
    reformat: float = 0.005
    verifier_false_positive: float = 0.03
    verifier_false_negative: float = 0.05


@dataclass(frozen=True)
class Draw:
    """Random numbers that depend on the seed, the content and a purpose, and on nothing else."""

    seed: int
    content: str

    def number(self, purpose: str) -> float:
        """A number in [0, 1)."""
        text = f"{self.seed}|{purpose}|{self.content}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56

    def below(self, rate: float, purpose: str) -> bool:
        return self.number(purpose) < rate

    def one_of(self, values: Sequence[Any], purpose: str) -> Any:
        return values[int(self.number(purpose) * len(values))]


@dataclass(frozen=True)
class Facts:
    """The five facts of one drug."""

    name: str
    dose_mg_per_kg: int
    times_a_day: int
    maximum_mg: int
    contraindicated: str
    interaction: str

    def having(self, **changes: Any) -> Facts:
        return Facts(**{**vars(self), **changes})


@dataclass(frozen=True)
class Thought:
    """One attempt at a problem: short lines of reasoning, their titles, and the conclusion."""

    titles: list[str]
    lines: list[str]
    conclusion: str


# --- the bank ---------------------------------------------------------------------------------


class Bank:
    """The problems the teacher knows, found by the text of the question."""

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.by_question: dict[str, Mapping[str, Any]] = {}
        for record in records:
            for field in ("question", "open_question"):
                self.by_question.setdefault(squeeze(record[field]), record)

    def find(self, question: str) -> Mapping[str, Any] | None:
        """The record whose question or open question has this text, whatever its white space."""
        return self.by_question.get(squeeze(question))


def squeeze(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


# --- reading a prompt -------------------------------------------------------------------------


def kind_of(prompt: str) -> str:
    """The kind of a prompt by its constant first sentence; `other` if it is unknown."""
    text = prompt.lstrip()
    if text.startswith(_RETHINK_START):
        named = re.search(r"Strategy: ([^.]+)\.", text)
        return _STRATEGIES.get(named[1], "other") if named else "other"
    return next((kind for start, kind in _KIND_BY_START if text.startswith(start)), "other")


def question_in(prompt: str, kind: str) -> str:
    """The text after `Question:` up to the part that follows it in this kind of prompt."""
    _, _, rest = prompt.partition("\nQuestion:")
    end = _QUESTION_ENDS.get(kind)
    return rest.strip() if end is None else rest.partition(end)[0].strip()


def _after(prompt: str, mark: str) -> str:
    return prompt.partition(mark)[2].strip()


# --- reasoning about the invented drugs -------------------------------------------------------


def times_text(times: int) -> str:
    return "1 time" if times == 1 else f"{times} times"


def recital(facts: Facts) -> str:
    """`Velo-tan: 7 mg per kg, 2 times, at most 240 mg, not with asthma.`"""
    return (
        f"{facts.name}: {facts.dose_mg_per_kg} mg per kg, {times_text(facts.times_a_day)}, "
        f"at most {facts.maximum_mg} mg, not with {facts.contraindicated}."
    )


def think_dose(
    facts: Facts,
    weight: int,
    condition: str,
    *,
    total_off_by: int = 0,
    wrong_limit: bool = False,
    whole_day: bool = False,
    overlooked: bool = False,
) -> Thought:
    """Reason about one dose; a keyword is one slip, and what follows it is consistent with it."""
    lines, titles = [recital(facts)], ["Facts", "Condition", "Amount", "Limit", "Share"]
    if condition == facts.contraindicated and not overlooked:
        return Thought(titles[:2], [*lines, f"With {condition}: not allowed."], DO_NOT_GIVE)
    dose, most, times = facts.dose_mg_per_kg, facts.maximum_mg, facts.times_a_day
    ones = weight % 10
    tens = weight - ones
    total = weight * dose + total_off_by
    lines += [
        f"With {condition}: fine.",
        f"{tens}x{dose}={tens * dose}, {ones}x{dose}={ones * dose}, sum {total}.",
    ]
    if (total > most) != wrong_limit:
        total = most
    lines.append(f"Limit {most}: {total}.")
    if times > 1 and not whole_day:
        halves = [total // 2**n for n in range(times.bit_length())]
        lines.append(", ".join(f"{a}/2={b}" for a, b in pairwise(halves)) + ".")
        total //= times
    return Thought(titles[: len(lines)], lines, f"{total} mg")


def think_recall(facts: Facts, fact: str) -> Thought:
    """State the facts, then the one that is asked for."""
    stated, conclusion = {
        "dose": (f"{facts.dose_mg_per_kg} mg per kg.",) * 2,
        "times": (f"{times_text(facts.times_a_day)}.",) * 2,
        "maximum": (f"{facts.maximum_mg} mg.",) * 2,
        "contraindicated": (f"Not with {facts.contraindicated}.", facts.contraindicated),
        "interaction": (f"Not with {facts.interaction}.", facts.interaction),
    }[fact]
    return Thought(["Facts", "Asked"], [recital(facts), stated], conclusion.rstrip("."))


def slip_dose(facts: Facts, weight: int, condition: str, draw: Draw) -> Thought:
    """A wrong solution: one of the slips that change the answer of this problem."""
    right = think_dose(facts, weight, condition)
    slips: dict[str, list[Thought]] = {
        "contraindication": [think_dose(facts, weight, condition, overlooked=True)],
        "limit": [think_dose(facts, weight, condition, wrong_limit=True)],
        "division": [think_dose(facts, weight, condition, whole_day=True)],
        "addition": [
            think_dose(facts, weight, condition, total_off_by=by)
            for by in (10, -10, 1, -1, 20, -20, 2, -2)
            if (weight * facts.dose_mg_per_kg + by) % facts.times_a_day == 0
        ],
        "fact": [think_dose(wrong, weight, condition) for wrong in _wrong_facts(facts, condition)],
    }
    wrong = {
        name: kept
        for name, thoughts in slips.items()
        if (kept := [thought for thought in thoughts if thought.conclusion != right.conclusion])
    }
    kind = draw.one_of(list(wrong), "slip")
    return draw.one_of(wrong[kind], f"slip {kind}")


def _wrong_facts(facts: Facts, condition: str) -> list[Facts]:
    """One fact remembered wrongly; never the dose, which could state a held-out product."""
    other_times = [times for times in (1, 2, 4) if times != facts.times_a_day]
    other_maxima = [facts.maximum_mg + by for by in (40, -40) if facts.maximum_mg + by > 0]
    return [
        *(facts.having(times_a_day=times) for times in other_times),
        *(facts.having(maximum_mg=most) for most in other_maxima),
        facts.having(contraindicated=condition),
    ]


def slip_recall(facts: Facts, record: Mapping[str, Any], draw: Draw) -> Thought:
    """A wrong fact: another option's."""
    wrong = draw.one_of(_other_options(record), "slip")
    number = int(wrong.split()[0]) if wrong[:1].isdigit() else 0
    change: dict[str, Any] = {
        "dose": {"dose_mg_per_kg": number},
        "times": {"times_a_day": number},
        "maximum": {"maximum_mg": number},
        "contraindicated": {"contraindicated": wrong},
        "interaction": {"interaction": wrong},
    }[record["fact"]]
    return think_recall(facts.having(**change), record["fact"])


def _other_options(record: Mapping[str, Any]) -> list[str]:
    others = [text for text in record["options"].values() if text != record["answer"]]
    return others or ["none of these"]


# --- reasoning about other questions ----------------------------------------------------------


def think_generic(answer: str) -> Thought:
    """Three short steps that name the answer."""
    said = squeeze(answer)
    lines = [
        f"Hmm, the findings point to {said}.",
        "Other explanations fit less well.",
        f"So it is {said}.",
    ]
    return Thought(["Findings", "Alternatives", "Choice"], lines, said)


def think(record: Mapping[str, Any], wrong: bool, draw: Draw) -> Thought:
    """Solve a problem of the bank, or slip."""
    if record["kind"] == "generic":
        return think_generic(
            draw.one_of(_other_options(record), "slip") if wrong else record["answer"]
        )
    facts = Facts(**record["drug"])
    if record["kind"] == "recall":
        if not wrong:
            return think_recall(facts, record["fact"])
        return slip_recall(facts, record, draw)
    if wrong:
        return slip_dose(facts, record["weight"], record["condition"], draw)
    return think_dose(facts, record["weight"], record["condition"])


def think_unknown(question: str) -> Thought:
    """A plausible answer to an unknown problem; a wrong one, as no drug has these facts."""
    asked = re.search(r"^(\S+) for a child of (\d+) kg with (\w+)\.", question)
    if asked is None:
        return think_generic("none of the usual causes")
    facts = Facts(asked[1], 10, 1, 990, "fever", "salt")
    return think_dose(facts, int(asked[2]), asked[3])


# --- replies ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One prompt, read: its kind, text, problem (None if unknown) and draw."""

    kind: str
    prompt: str
    question: str
    record: Mapping[str, Any] | None
    draw: Draw
    rates: Rates


def reply_filter(request: Request) -> str:
    if request.draw.below(request.rates.filter, "filter"):
        return request.draw.one_of(LABELS[1:], "label")
    return "Pass"


def reply_reformat(request: Request) -> str:
    """The open question and its answer; an unknown problem is handed back as it came."""
    question, answer = request.question, _after(request.prompt, "\nCorrect answer:")
    if request.record is not None:
        question, answer = request.record["open_question"], request.record["answer"]
        if request.draw.below(request.rates.reformat, "reformat"):
            answer = request.draw.one_of(_other_options(request.record), "wrong answer")
    return _json({"Open-ended Verifiable Question": question, "Ground-True Answer": answer})


def reply_answer_options(request: Request) -> str:
    """The letter of the right option, or of another as often as reasoning goes wrong."""
    if request.record is None:
        return "I do not know."
    wrong = request.draw.below(request.rates.reasoning, "answer")
    fits = [
        letter
        for letter, text in request.record["options"].items()
        if (text == request.record["answer"]) != wrong
    ]
    return request.draw.one_of(fits, "letter") if fits else "I do not know."


def reply_initial_cot(request: Request) -> str:
    return _json({"CoT": _steps(_think(request, request.rates.reasoning))})


def reply_rethink(request: Request) -> str:
    """Any of the four strategies: agree with the reviewer, then solve the problem anew."""
    agreed = {"action": "Verification", "content": "The reviewer is right: this is false."}
    return _json({"CoT": [agreed, *_steps(_think(request, request.rates.strategy))]})


def reply_label_cot(request: Request) -> str:
    """Told the answer, the teacher makes no slip."""
    agreed = {"action": "Verification", "content": "The reviewer is right: this is false."}
    return _json({"CoT": [agreed, *_steps(_think(request, 0.0))]})


def _think(request: Request, error_rate: float) -> Thought:
    if request.record is None:
        return think_unknown(request.question)
    return think(request.record, request.draw.below(error_rate, "reasoning"), request.draw)


def _steps(thought: Thought) -> list[dict[str, str]]:
    thinking = [
        {"action": "Inner Thinking", "title": title, "content": line}
        for title, line in zip(thought.titles, thought.lines, strict=True)
    ]
    return [
        *thinking,
        {"action": "Final Conclusion", "content": thought.conclusion},
        {"action": "Verification", "content": "Each step holds."},
    ]


def reply_verify(request: Request) -> str:
    shown, _, reference = request.prompt.rpartition("\nReference answer:")
    same = agrees(_unquoted(_after(shown, "\nConclusion:")), reference)
    rates = request.rates
    rate = rates.verifier_false_negative if same else rates.verifier_false_positive
    return str(same != request.draw.below(rate, "verify"))


def _unquoted(text: str) -> str:
    """The text between its marks, if it has them."""
    found = re.fullmatch(r"<<<(\w+)\n(.*)\n\1>>>", text, re.DOTALL)
    return found[2] if found else text


_FILLER = frozenset(
    "a an the it is so then thus answer final correct conclusion most likely dose single each "
    "per should be given give child of time therefore diagnosis".split()
)


def agrees(conclusion: str, reference: str) -> bool:
    """Whether the conclusion is the reference, give or take case, punctuation and filler words."""
    if squeeze(conclusion).lower() == squeeze(reference).lower():
        return True
    said, wanted = _words(conclusion), _words(reference)
    if not wanted:
        return False
    for start in range(len(said) - len(wanted) + 1):
        rest = said[:start] + said[start + len(wanted) :]
        if said[start : start + len(wanted)] == wanted and _FILLER.issuperset(rest):
            return True
    return False


def _words(text: str) -> list[str]:
    """Words, numbers with their sign, and signs such as < or ↑ that change what is said."""
    return re.findall(r"-?\d+(?:[.,]\d+)*|[^\W\d]\w*|[^\w\s.,;:!?'\"()*-]", text.lower())


def reply_natural_reasoning(request: Request) -> str:
    """The last attempt's lines of the reasoning in the prompt, its mistakes included."""
    lines, rethought = last_attempt(_after(request.prompt, "\nReasoning:"))
    if request.draw.below(request.rates.rewrite, "rewrite"):
        lines = _changed(lines, request)
    lines = [WAIT, *lines] if rethought else lines
    lines = lines if len(lines) > 1 else ["Hmm.", *lines]
    return _json({"NaturalReasoning": "\n".join(lines)})


def last_attempt(trace: str) -> tuple[list[str], bool]:
    """The lines after the last Verification that has thinking behind it, and whether one has."""
    lines: list[str] = []
    judged = rethought = False
    for section in re.split(r"^### ", trace, flags=re.MULTILINE)[1:]:
        title, _, content = section.partition("\n")
        if title.strip() == "Verification":
            judged = True
        elif title.strip() != "Conclusion":
            if judged:
                lines, judged, rethought = [], False, True
            lines += [line.strip() for line in content.splitlines() if line.strip()]
    return lines, rethought


def _changed(lines: list[str], request: Request) -> list[str]:
    """The same lines with another outcome at the end."""
    if not lines:
        return lines
    *kept, last = lines
    number = re.search(r"(\d+)(\D*)$", last)
    if number is not None and not last.startswith("So it is "):
        return [*kept, f"{last[: number.start()]}{int(number[1]) + 10}{number[2]}"]
    if last.endswith(": not allowed."):
        return _overlooked(lines, request)
    start = re.match(r"So it is |Not with ", last)
    if request.record is None or start is None:
        return lines
    changed = [f"{start[0]}{squeeze(text)}." for text in _other_options(request.record)]
    others = [line for line in changed if line != last] or [f"{start[0]}none of these."]
    return [*kept, request.draw.one_of(others, "outcome")]


def _overlooked(lines: list[str], request: Request) -> list[str]:
    """The lines when the contraindication, which the reasoning saw, is lost in rewriting."""
    if request.record is None or request.record["kind"] != "dose":
        return lines
    facts, weight = Facts(**request.record["drug"]), request.record["weight"]
    return think_dose(facts, weight, request.record["condition"], overlooked=True).lines


def reply_final_response(request: Request) -> str:
    return outcome(_after(request.prompt, "\nReasoning:"))


def outcome(reasoning: str) -> str:
    """The answer that the last line of a piece of reasoning states."""
    lines = [line.strip() for line in reasoning.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if (named := re.match(r"(?:So it is|Not with) (.+?)\.?$", last)) is not None:
        return named[1]
    if last.endswith(": not allowed."):
        return DO_NOT_GIVE
    if (computed := re.search(r"(?:=|: )(\d+)\.$", last)) is not None:
        return f"{computed[1]} mg"
    return last.removesuffix(".") or "none of these"


def reply_other(request: Request) -> str:
    """A prompt of no known kind: the answer, if its whole text is a question of the bank."""
    return "I do not know." if request.record is None else request.record["answer"]


REPLIES: dict[str, Callable[[Request], str]] = {
    "filter": reply_filter,
    "reformat": reply_reformat,
    "answer_options": reply_answer_options,
    "initial_cot": reply_initial_cot,
    "explore": reply_rethink,
    "backtrack": reply_rethink,
    "verify_again": reply_rethink,
    "correct": reply_rethink,
    "label_cot": reply_label_cot,
    "verify": reply_verify,
    "natural_reasoning": reply_natural_reasoning,
    "final_response": reply_final_response,
    "other": reply_other,
}


def read_request(prompt: str, kind: str, bank: Bank, draw: Draw, rates: Rates) -> Request:
    """Find the problem that a prompt is about."""
    question = prompt.strip() if kind == "other" else question_in(prompt, kind)
    return Request(kind, prompt, question, bank.find(question), draw, rates)


def malformed(text: str, draw: Draw) -> str:
    """A reply whose JSON cannot be read: cut short, or with a quotation mark missing."""
    return draw.one_of([text[: len(text) * 2 // 3], text.replace('": ', ": ", 1)], "malformed")


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)
