"""Dates as answers: ISO, 05/06/2024, June 5th 2024, 2024年6月5日, 令和6年6月5日.

Standard library only.
"""

import re
from collections.abc import Iterator
from datetime import date

from data_gen.answer_numbers import is_negated
from data_gen.answer_text import plain, statements, text_before
from data_gen.verdict import DateOrder, Verdict, compare, same_or_other

_MONTHS = "january february march april may june july august september october november december"
_MONTH_NAMES = {name: i for i, name in enumerate(_MONTHS.split(), 1)}
_MONTH_NAMES |= {name[:3]: i for name, i in list(_MONTH_NAMES.items())} | {"sept": 9}
_MONTH = "(?P<month>" + "|".join(sorted(_MONTH_NAMES, key=len, reverse=True)) + r")\b\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?P<year>\d{4})"
_ERAS = {"令和": 2018, "平成": 1988, "昭和": 1925, "大正": 1911, "明治": 1867}
_PATTERNS = [
    re.compile(pattern)
    for pattern in (
        rf"(?<!\d){_YEAR}\s?[-/.年]\s?(?P<month>\d{{1,2}})\s?[-/.月]\s?(?P<day>\d{{1,2}})(?!\d)\s?日?",
        r"(?<![\d/.-])(?P<first>\d{1,2})(?P<mark>[-/.])(?P<second>\d{1,2})(?P=mark)"
        r"(?P<year>\d{4}|\d{2})(?![\d/])",
        rf"\b{_MONTH}\s?-?{_DAY}(?!\d),?\s?(?:of\s)?-?{_YEAR}(?!\d)",
        rf"(?<!\d){_DAY}\s?-?(?:day\s)?(?:of\s)?{_MONTH},?\s?-?{_YEAR}(?!\d)",
        rf"(?P<era>{'|'.join(_ERAS)})\s?(?P<era_year>\d{{1,2}}|元)\s?年\s?(?P<month>\d{{1,2}})\s?月"
        r"\s?(?P<day>\d{1,2})\s?日",
    )
]


def judge_date(response: str, wanted: re.Match, order: DateOrder) -> Verdict:
    """Whether the response gives the wanted date. A date such as 05/06/2024 is read in `order`; one
    that is right only in the other order is unscored, unless the reference is written so too."""
    day = _read(wanted, order)
    parts = statements(response, lambda part: bool(_said(part)), measured=True)
    said = [match for part in parts for match in _said(part.rpartition("=")[2])]
    asserted = {_read(match, order) for match in said} - {None}
    if asserted == {day}:
        return same_or_other(True)
    if len(asserted) == 1 and not _is_ambiguous(wanted):
        other = {_read(match, _OTHER[order]) for match in said if _is_ambiguous(match)}
        if other == {day}:
            return Verdict("unscored", f"a date that is right only if read as {_OTHER[order]}")
    return compare(asserted, day)


_OTHER: dict[DateOrder, DateOrder] = {"mdy": "dmy", "dmy": "mdy"}


def whole_date(text: str) -> re.Match | None:
    """The date that is the whole text, if one is."""
    found = list(_matches(plain(text).casefold().strip().rstrip(".")))
    if len(found) != 1 or re.search(r"\w", found[0].string.replace(found[0][0], "", 1)):
        return None
    return found[0] if _read(found[0], "mdy") is not None else None


def _said(text: str) -> list[re.Match]:
    text = plain(text).casefold()
    return [match for match in _matches(text) if not is_negated(text_before(text, match))]


def _matches(text: str) -> Iterator[re.Match]:
    """The dates of a text; of two patterns that read the same place the first counts."""
    taken: set[int] = set()
    for pattern in _PATTERNS:
        for match in pattern.finditer(text):
            place = set(range(*match.span()))
            if not place & taken:
                taken |= place
                yield match


def _read(match: re.Match, order: DateOrder) -> date | None:
    """The day that a match names; a number above 12 shows which is the month."""
    groups = match.groupdict()
    if "first" in groups:
        first, second = int(match["first"]), int(match["second"])
        month, day = (first, second) if order == "mdy" else (second, first)
        if month > 12:
            month, day = day, month
    else:
        month, day = _month(match["month"]), int(match["day"])
    try:
        return date(_year(groups), month, day)
    except ValueError:
        return None


def _year(groups: dict[str, str]) -> int:
    if "era" in groups:
        return _ERAS[groups["era"]] + (1 if groups["era_year"] == "元" else int(groups["era_year"]))
    year = int(groups["year"])
    return year if year > 99 else year + (2000 if year < 50 else 1900)


def _month(text: str) -> int:
    return int(text) if text.isdecimal() else _MONTH_NAMES[text]


def _is_ambiguous(match: re.Match) -> bool:
    return "first" in match.groupdict() and max(int(match["first"]), int(match["second"])) <= 12
