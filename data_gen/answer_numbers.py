"""Numbers with units: what a response offers, and whether that is the reference or in its limits.

Values are exact fractions in the first unit of their kind ("0.08 g" is 80 of kind "mg"). A unit
that one side leaves out is the other's. Standard library only.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from data_gen.answer_text import BETWEEN, plain, refuses, statements, text_before, without_refusal
from data_gen.answer_units import UNITS, is_compound, measure, needs_substance
from data_gen.verdict import Verdict, compare, same_or_other

Limits = tuple[Fraction, Fraction]


class Quantity(NamedTuple):
    """A number in its kind's first unit, the size of the unit it was written in, and "<" or ">"
    where the text only bounds it; kind "" is a bare number."""

    value: Fraction
    kind: str
    factor: Fraction = Fraction(1)
    bound: str = ""


class Range(NamedTuple):
    low: Quantity
    high: Quantity


# --- reading ------------------------------------------------------------------------------------

_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
_SMALL += " fifteen sixteen seventeen eighteen nineteen twenty"
_NUMBER_WORDS = {word: str(i) for i, word in enumerate(_SMALL.split())}
_TENS = "thirty forty fifty sixty seventy eighty ninety hundred".split()
_NUMBER_WORDS |= {word: str(10 * i) for i, word in enumerate(_TENS, 3)}
_NUMBER_WORDS |= {"once": "1 times", "twice": "2 times", "thrice": "3 times"}
_IN_WORDS = re.compile(r"\b(?:" + "|".join(_NUMBER_WORDS) + r")\b(?! of\b)")
_CJK_DIGITS = {digit: str(i) for i, digit in enumerate("零一二三四五六七八九十")} | {
    "两": "2",
    "兩": "2",
}
_IN_CJK = re.compile(
    r"(?<![零一二三四五六七八九十百千])([一二三四五六七八九十两兩])"
    r"(?=\s?(?:毫克|毫升|片|粒|錠|回|次|天|日間|週|周|か月|ヶ月|个月|小时|小時|時間|分钟|分間|度))"
)
_NUMBER = (
    r"(?<![A-Za-z\u0370-\u03ff\d_])(?<![A-Za-z]-)(?<!\d[.,])[-+]?(?:\d{1,3}(?:,\d{3}){1,9}(?:\.\d{1,20})?"
    r"|\d{1,3}(?:\.\d{3}){2,9}(?:,\d{1,20})?|\d{1,3}(?:\.\d{3}){1,9},\d{1,20}"
    r"|\d{1,3}(?: \d{3}){1,9}(?!\d)(?:[.,]\d{1,20})?"
    r"|\d{1,20}[.,]\d{1,20}|\.\d{1,20}|\d{1,20})(?!\d)"
)
_LONGEST_FIRST = sorted(UNITS, key=len, reverse=True)
_UNIT = "|".join(map(re.escape, _LONGEST_FIRST))
_BELOW = "|".join(re.escape(name) for name in _LONGEST_FIRST if UNITS[name].kind != "person")
_PER = (
    r"(?:\s?/\s?|\s+(?:per|a|an|each|every|for each|for every)\s+(?:1\s+)?|\s+(?=daily|weekly)"
    r"|\s?[每毎]\s?)"
)
_WORD_END = r"(?![a-zμ])"
_QUANTITY = re.compile(
    r"(?P<bound>(?:less than|below|under|fewer than|more than|above|over|greater than|[<>≤≥])\s?)?"
    rf"(?P<number>{_NUMBER})(?:\s?[x×]\s?10\s?\^?\s?(?P<power>-?\d{{1,2}})|e(?P<exp>[-+]?\d{{1,2}})\b)?"
    rf"(?:\s?-?\s?(?P<unit>{_UNIT}){_WORD_END})?(?P<per>(?:{_PER}(?:{_BELOW}){_WORD_END}){{0,3}})"
    r"(?P<beyond>以上|以下|未満|超|以内|以内)?"
)
_PER_PART = re.compile(rf"{_PER}({_BELOW}){_WORD_END}")
_SPELLINGS = (
    (re.compile(r"(?<![x×])(?<![x×] )(?<!\d)10\s?\^\s?(?=-?\d)"), "1e"),
    (re.compile(r"mm\s?hg\b"), "mmhg"),
    (re.compile(r"cm\s?h2o\b"), "cmh2o"),
    (
        re.compile(
            r"\b(?:m|meters?|metres?)\s?\^\s?2\b|\bsquare (?:meters?|metres?)\b|\bsq\.? ?m\b"
        ),
        "m2",
    ),
    (re.compile(r"\s?/\s?1\.73\s?m2?\b"), ""),
    (re.compile(r"(?<=\d)\s?(?:degrees?|deg\.?|°|度)\s?(?=c\b|celsius|f\b|fahrenheit)"), " °"),
    (re.compile(r"°\s?(?:celsius|c\b)"), "°c"),
    (re.compile(r"°\s?(?:fahrenheit|f\b)"), "°f"),
    (re.compile(r"\binternational units?\b|\bi\.u\."), "iu"),
    (re.compile(r"\bper cent\b"), "percent"),
    (re.compile(r"\bhalf (?:a |an )?(?=tablet|pill|dose)"), "0.5 "),
)
_NEUTRAL = re.compile(
    r"\b(?:a|per|each|every|for each|at a|in a|in one|as a|for one)\s+(?:single\s+)?"
    r"(?:dose|time|administration|occasion|intake)\b|/\s?dose\b"
    r"|\b(?:at most|up to|a maximum of|maximum|max\.?|about|approximately|approx\.?|around|roughly"
    r"|exactly|only)(?=\W)"
)
_MORE = {"more than", "above", "over", "greater than", ">", "≥"}
_RANGE = re.compile(r"(?<=\d)\s{0,3}(?:-|to|~|から)\s{0,3}(?=\d)")


def quantities(text: str) -> list[Quantity]:
    """Every number of a text with its unit; "2 times a day" is 2 times, 3 weeks 4 days 25 days."""
    text = _in_digits(text)
    found: list[Quantity] = []
    end = 0
    for match in _QUANTITY.finditer(text):
        if is_negated(text_before(text, match)) or _is_part_of_fraction(text, match):
            continue
        quantity = _quantity(match)
        gap = text[end : match.start()] if found else "-"
        if found and _goes_on(found[-1], quantity, gap):
            found[-1] = found[-1]._replace(value=found[-1].value + quantity.value)
        else:
            found.append(quantity)
        end = match.end()
    return found


def _in_digits(text: str) -> str:
    """Lower case, number words as digits, without words that leave an amount as it is."""
    text = _IN_WORDS.sub(lambda m: _NUMBER_WORDS[m[0]], plain(text).casefold())
    text = _IN_CJK.sub(lambda m: _CJK_DIGITS[m[1]], text)
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    return _RANGE.sub(" to ", _NEUTRAL.sub(" ", text))


def _quantity(match: re.Match) -> Quantity:
    value = _number(match["number"])
    power = match["power"] or match["exp"]
    if power:
        value *= Fraction(10) ** int(power)
    unit = measure(match["unit"] or "", tuple(_PER_PART.findall(match["per"])))
    bound = (match["bound"] or "").strip()
    sign = bound and (">" if bound in _MORE else "<")
    if match["beyond"]:
        sign = ">" if match["beyond"] in ("以上", "超") else "<"
    return Quantity(value * unit.factor, unit.kind, unit.factor, sign)


def _number(text: str) -> Fraction:
    text = text.replace(" ", "").lstrip("+")
    if re.fullmatch(r"-?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?", text):
        return Fraction(text.replace(",", ""))
    if re.fullmatch(r"-?\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?|-?\d{1,3}(?:\.\d{3})+,\d+", text):
        return Fraction(text.replace(".", "").replace(",", "."))
    return Fraction(text.replace(",", "."))


def _goes_on(first: Quantity, then: Quantity, gap: str) -> bool:
    """The second is the rest of the first in a smaller unit: 3 weeks, 4 days."""
    return (
        is_compound(first.kind)
        and first.kind == then.kind
        and not first.bound
        and not then.bound
        and 0 <= then.value < first.factor
        and then.factor < first.factor
        and re.fullmatch(r"[\s,'\"]{0,6}(?:and|と|零|又)?[\s'\"]{0,3}", gap) is not None
    )


_DENIED = re.compile(
    rf"\b(?:not|never|n't|rather than|instead of|other than)\s+{BETWEEN}(?:give\s+)?$"
    r"|(?:不是|非)\s?$"
)


def is_negated(before: str) -> bool:
    return _DENIED.search(before) is not None


def _is_part_of_fraction(text: str, match: re.Match) -> bool:
    """120/80, 1/2, 3:1, a date: no plain number."""
    before, after = text_before(text, match), text[match.end("number") :][:9]
    return bool(re.match(r"\s?[/:]\s?\d", after) or re.search(r"\d\s?[/:]\s?$", before))


def whole_quantity(text: str) -> Quantity | None:
    """The quantity that is the whole text, if one is."""
    text = text.strip().rstrip(".")
    found = quantities(text)
    rest = re.sub(r"\b(?:and|と)\b", " ", _QUANTITY.sub(" ", _in_digits(text)))
    return found[0] if len(found) == 1 and not re.search(r"\w", rest) else None


_TO = re.compile(r"^\s{0,3}(?:to|and|~)\s{0,3}$")


def whole_range(text: str) -> Range | None:
    """The range that is the whole text: 10-20 mg, between 10 and 20 mg."""
    written = re.sub(r"\b(?:between|from)\b", " ", _in_digits(text.strip().rstrip(".")))
    found = list(_ranges(written))
    rest = re.sub(r"\b(?:to|and)\b|~", " ", _QUANTITY.sub(" ", written))
    if len(found) != 1 or len(list(_QUANTITY.finditer(written))) != 2:
        return None
    return found[0] if not re.search(r"\w", rest) else None


def _ranges(written: str) -> Iterator[Range]:
    """Two numbers with "to" or "and" between; the unit of the second is the first's too."""
    matches = list(_QUANTITY.finditer(written))
    for first, second in pairwise(matches):
        if not _TO.match(written[first.end() : second.start()]):
            continue
        low, high = _quantity(first), _quantity(second)
        if not low.kind and high.kind:
            low = low._replace(value=low.value * high.factor, kind=high.kind, factor=high.factor)
        if low.kind == high.kind and low.value < high.value:
            yield Range(low, high)


# --- judging ------------------------------------------------------------------------------------


def judge_quantity(response: str, wanted: Quantity, limits: Limits | None) -> Verdict:
    """Whether the response gives the wanted number, or one within the limits."""

    def holds(part: str) -> bool:
        return bool(_candidates(part, wanted)) or refuses(part)

    parts = statements(response, holds, measured=True)
    if any(refuses(part) for part in parts):
        asserted = any(_candidates(without_refusal(part), wanted) for part in parts)
        return Verdict("false", "two different answers" if asserted else "another answer")
    offered = {quantity for part in parts for quantity in _candidates(part, wanted)}
    asserted = {_as_wanted(quantity, wanted, limits is not None) for quantity in offered}
    if any(needs_substance(quantity.kind, wanted.kind) for quantity in asserted):
        return Verdict("unscored", "units that convert only for a known substance")
    right = {quantity for quantity in asserted if _is_right(quantity, wanted, limits)}
    if right and right == asserted:
        return same_or_other(True)
    return Verdict("false", "two different answers") if right else compare(asserted, None)


def judge_range(response: str, wanted: Range) -> Verdict:
    """Whether the response gives the wanted range, both of its ends."""

    def ends(given: Range) -> list[tuple[Fraction, str]]:
        converted = [_as_wanted(end, wanted.low, False) for end in given]
        return [(end.value, end.kind) for end in converted]

    parts = statements(response, lambda part: bool(quantities(part)))
    given = [ends(found) for part in parts for found in _ranges(_in_digits(part))]
    return compare({tuple(each) for each in given}, tuple(ends(wanted)))


def _candidates(statement: str, wanted: Quantity) -> list[Quantity]:
    """What a statement offers as its answer: behind the last "=", of the wanted kind if any is."""
    offered = quantities(statement.rpartition("=")[2])
    bare = [quantity for quantity in offered if not quantity.kind]
    same = [quantity for quantity in offered if _converts(quantity, wanted)]
    if same:
        listed = re.search(r"\d\s?(?:or|to|-|/|~|または|或)\s?\d", plain(statement).casefold())
        return [*same, *(bare if listed and wanted.kind else [])]
    kind = wanted.kind.split("/")[0]
    akin = [quantity for quantity in offered if kind and quantity.kind.split("/")[0] == kind]
    return bare or akin or offered


_TEMPERATURE = {"celsius", "fahrenheit"}
_MASS = {"kg", "mg"}
_KG = Fraction(1_000_000)


def _converts(quantity: Quantity, wanted: Quantity) -> bool:
    return quantity.kind == wanted.kind or {quantity.kind, wanted.kind} == _TEMPERATURE


def _as_wanted(quantity: Quantity, wanted: Quantity, within_limits: bool) -> Quantity:
    """The quantity in the kind of the wanted one, where it can be; one without a unit has its."""
    kinds = (quantity.kind, wanted.kind)
    if kinds[0] == kinds[1]:
        return quantity
    if kinds == ("", "%"):
        return quantity._replace(value=quantity.value * 100, kind="%")
    if kinds == ("%", "") and not within_limits:
        return quantity._replace(value=quantity.value / 100, kind="")
    if not kinds[0]:
        return Quantity(quantity.value * wanted.factor, wanted.kind, wanted.factor, quantity.bound)
    if not kinds[1]:
        return Quantity(quantity.value / quantity.factor, "", Fraction(1), quantity.bound)
    if set(kinds) == _TEMPERATURE:
        celsius = kinds[1] == "celsius"
        value = (
            (quantity.value - 32) / Fraction("1.8")
            if celsius
            else quantity.value * Fraction("1.8") + 32
        )
        return quantity._replace(value=value, kind=kinds[1], factor=Fraction(-1))
    if set(kinds) == _MASS:
        scale = _KG if kinds[1] == "mg" else 1 / _KG
        return quantity._replace(value=quantity.value * scale, kind=kinds[1])
    return quantity


_ROUNDED = Fraction(5, 1000)  # of a value in a unit that has no round factor, such as pounds
_UNROUND = {UNITS[name].factor for name in ("lb", "inch", "ft", "kpa", "cmh2o", "kj")} | {
    Fraction(-1)
}


def _is_right(quantity: Quantity, wanted: Quantity, limits: Limits | None) -> bool:
    if quantity.kind != wanted.kind or quantity.bound != wanted.bound:
        return False
    if limits is not None:
        return limits[0] * wanted.factor <= quantity.value <= limits[1] * wanted.factor
    if quantity.value == wanted.value:
        return True
    rounded = (quantity.factor in _UNROUND) != (wanted.factor in _UNROUND)
    return rounded and abs(quantity.value - wanted.value) <= _ROUNDED * abs(wanted.value)
