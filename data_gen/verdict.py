"""A verdict, and what a response is compared with: the words that all judges of answers share."""

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

Outcome = Literal["true", "false", "unscored"]
DateOrder = Literal["mdy", "dmy"]
VerifierKind = Literal["teacher", "rule", "rule_then_teacher", "teacher_then_rule"]


class Verdict(NamedTuple):
    """What a verifier found; `unscored` is neither right nor wrong. `calls` are journal keys."""

    outcome: Outcome
    reason: str
    calls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reference:
    """A reference answer with what else counts as it.

    `aliases` are other names of the same answer (for a question with options, other right choices).
    A number is right from `low` to `high` in its own unit, or within `tolerance` (a share: 0.05 is
    5 %); otherwise only when equal. `date_order` reads dates such as 05/06/2024.
    """

    text: str
    aliases: tuple[str, ...] = ()
    low: str | float | None = None
    high: str | float | None = None
    tolerance: float | None = None
    date_order: DateOrder = "mdy"

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"low={self.low}, high={self.high}; give both limits or neither")
        if self.tolerance is not None and self.low is not None:
            raise ValueError(f"tolerance={self.tolerance} and limits; give one of the two")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance}; it is a share, from 0 to below 1")
        limits = self.limits
        if limits is not None and limits[0] > limits[1]:
            raise ValueError(f"low={self.low} is above high={self.high}; exchange them")

    @property
    def limits(self) -> tuple[Fraction, Fraction] | None:
        """The limits as exact numbers."""
        if self.low is None or self.high is None:
            return None
        return _exact("low", self.low), _exact("high", self.high)


def _exact(name: str, value: str | float) -> Fraction:
    try:
        return Fraction(str(value).strip())
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{name}={value!r}; it should be a number such as 12.5") from None


def compare(asserted: Collection[object], wanted: object) -> Verdict:
    """The verdict on a set of answers that a response gives."""
    if len(asserted) > 1:
        return Verdict("false", "two different answers")
    if not asserted:
        return Verdict("false", "no answer of this kind")
    return same_or_other(set(asserted) == {wanted})


def same_or_other(same: bool) -> Verdict:
    """True for the same answer, false for another."""
    return Verdict("true", "same answer") if same else Verdict("false", "another answer")
