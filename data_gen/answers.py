"""The one meaning of correct: does a response give the reference answer?

Data generation, the reward of reinforcement learning and evaluation all ask `judge`. It reads the
final response only, finds the statement that answers (an "answer is …" sentence, else the first
that holds an answer), and compares what it asserts with the reference: option letters, a number
with its unit, a range, a date, yes or no, a refusal ("do not give") or a text and its other names.
Two different answers are false, whichever of them is right; what a rule cannot tell is unscored.
Standard library only, and so are the modules that it is made of (`answer_*.py`, `verdict.py`).

No text makes it run away: a longer response than `LONGEST_RESPONSE` is unscored, and every pattern
reads a bounded stretch. `rule_process.RuleProcess` also ends a verdict by its time.
"""

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

from data_gen.answer_dates import judge_date, whole_date
from data_gen.answer_decisions import decision_of, judge_decision
from data_gen.answer_letters import judge_option, same_letters, stated_letter
from data_gen.answer_numbers import (
    Limits,
    Quantity,
    judge_quantity,
    judge_range,
    quantities,
    whole_quantity,
    whole_range,
)
from data_gen.answer_text import (
    is_refusal,
    is_the_text,
    judge_text,
    normalise,
    refuses,
    statements,
    without_refusal,
)
from data_gen.verdict import Reference, Verdict, same_or_other

__all__ = [
    "FINAL_RESPONSE",
    "LONGEST_RESPONSE",
    "THINKING",
    "Reference",
    "Verdict",
    "accuracy_interval",
    "final_response",
    "has_think_format",
    "judge",
    "normalise",
    "same_letters",
    "stated_letter",
]

THINKING = "## Thinking"
FINAL_RESPONSE = "## Final Response"
LONGEST_RESPONSE = 20_000  # characters; about 5,000 tokens of final response
LONGEST_REFERENCE = 2_000

OtherWords = Literal["false", "unscored"]


# --- the think format -------------------------------------------------------------------------


def final_response(text: str) -> tuple[str, str] | None:
    """(thinking, response) of a text in the think format, None of any other."""
    if text.count(THINKING) != 1 or text.count(FINAL_RESPONSE) != 1:
        return None
    before, mark, response = text.partition(FINAL_RESPONSE + "\n\n")
    _, heading, thinking = before.partition(THINKING)
    if not mark or not heading:
        return None
    return thinking.strip(), response.strip()


def has_think_format(text: str) -> bool:
    """Exactly one `## Thinking`, then exactly one `## Final Response` and a blank line."""
    return final_response(text) is not None


def _response_of(text: str) -> str | None:
    """What follows the thinking, in our format or in <think> tags; None if that is broken."""
    parts = final_response(text)
    if parts is not None:
        return parts[1]
    if THINKING in text or FINAL_RESPONSE in text:
        return None
    thinking, tag, response = text.rpartition("</think>")
    if "<think>" in response or (tag and thinking.count("<think>") > 1):
        return None
    return response


# --- judging ----------------------------------------------------------------------------------


def judge(
    response_text: str,
    reference: str | Reference,
    options: Mapping[str, str] | None = None,
    *,
    other_words: OtherWords = "false",
) -> Verdict:
    """Whether the final response gives the reference, which may be options' letters or a text.

    `other_words="unscored"` leaves a free text open that does not hold the reference's words, so
    that another verifier can tell whether it means the same.
    """
    key = reference if isinstance(reference, Reference) else Reference(reference)
    if not normalise(key.text):
        return Verdict("unscored", "no reference answer")
    if len(key.text) > LONGEST_REFERENCE:
        return Verdict("unscored", f"a reference of more than {LONGEST_REFERENCE} characters")
    response = _response_of(response_text)
    if response is None:
        return Verdict("false", "broken think format")
    if len(response) > LONGEST_RESPONSE:
        return Verdict("unscored", f"a response of more than {LONGEST_RESPONSE} characters")
    if not normalise(response):
        return Verdict("false", "no answer")
    if options:
        names = (key.text, *key.aliases)
        return judge_option(response, names, options, _judge_words)
    return _judge_plain(response, key, other_words)


def accuracy_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion; (0, 1) where nothing was counted."""
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} of n={n}; it should be from 0 to n")
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _judge_words(response: str, text: str) -> Verdict:
    return _judge_plain(response, Reference(text), "false")


def _judge_plain(response: str, key: Reference, other_words: OtherWords) -> Verdict:
    names = [name for name in _names(key) if normalise(name)]
    if any(is_the_text(response, name) for name in names):
        return Verdict("true", "same text")
    verdicts = [_judge_kind(response, name, key) for name in names]
    texts = [name for name, verdict in zip(names, verdicts, strict=True) if verdict is None]
    known = [verdict for verdict in verdicts if verdict is not None]
    if texts:
        known.append(judge_text(response, texts, other_words))
    for outcome in ("true", "unscored"):
        if chosen := [verdict for verdict in known if verdict.outcome == outcome]:
            return chosen[0]
    return known[0]


_ABBREVIATION = re.compile(r"(.*\S)\s?\(([A-Z][A-Za-z0-9-]{0,6}[A-Z0-9])\)", re.DOTALL)


def _names(key: Reference) -> list[str]:
    """The names of the answer: "acute kidney injury (AKI)" is also AKI, and the rest alone."""
    names = [key.text, *key.aliases]
    matches = [_ABBREVIATION.fullmatch(name.strip()) for name in names]
    return [*names, *(part for match in matches if match for part in match.groups())]


def _judge_kind(response: str, name: str, key: Reference) -> Verdict | None:
    """The verdict by what kind of answer the reference is; None for a text."""
    decision = decision_of(name)
    if decision is not None:
        return judge_decision(response, *decision)
    if is_refusal(name):
        return _judge_refusal(response)
    day = whole_date(name)
    if day is not None:
        return judge_date(response, day, key.date_order)
    ends = whole_range(name)
    if ends is not None:
        return judge_range(response, ends)
    quantity = whole_quantity(name)
    if quantity is not None:
        return judge_quantity(response, quantity, _limits(quantity, key))
    if key.limits is not None or key.tolerance is not None:
        return Verdict("unscored", f"the reference is no number with limits: {name[:60]}")
    return None


def _limits(quantity: Quantity, key: Reference) -> Limits | None:
    """The limits in the unit that the reference is written in."""
    if key.tolerance is None:
        return key.limits
    value = quantity.value / quantity.factor
    room = abs(value) * Fraction(str(key.tolerance))
    return value - room, value + room


_DOSED = {"mg", "ml", "unit", "tablet", ""}


def _judge_refusal(response: str) -> Verdict:
    def holds(part: str) -> bool:
        return refuses(part) or bool(quantities(part)) or "give" in part.casefold()

    parts = statements(response, holds)
    if not parts or not refuses(parts[0]):
        return same_or_other(False)
    rests = [without_refusal(part) for part in parts]
    doses = [quantity for rest in rests for quantity in quantities(rest) if quantity.kind in _DOSED]
    if doses or any(re.search(r"\bgive\b", rest) and not refuses(rest) for rest in rests):
        return Verdict("false", "two different answers")
    return same_or_other(True)
