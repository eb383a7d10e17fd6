"""What is wrong with a team's own bank, before anything is paid for.

Rejected with a reason: rows without question, options or key, questions for the wrong option or
with several answers, those that need an image, duplicates, contradictions, and texts that hold a
person's direct identifiers. Reported: case series, and how the keys are spread over the letters.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_gen.bank_table import Row, find_columns, read_question
from data_gen.near_duplicates import find_groups
from data_gen.problems import reject_by_rule
from data_gen.records import Mcq, Rejected
from data_gen.text_windows import squeeze

IMAGE = re.compile(
    r"\b(?:see|refer to|in|on|from) the (?:attached |following |adjacent |accompanying )?"
    r"(?:figure|image|picture|photo(?:graph|micrograph)?|diagram|exhibit)\b"
    r"|\b(?:figure|image|picture|photograph|exhibit|diagram)s? "
    r"(?:\d|(?-i:[A-F])\b|below|above|shown)"
    # not "are shown below: Na+ 139" and "are shown below. Serum: Na+ 139": those are in the text
    r"|\b(?:shown|depicted|pictured|illustrated) (?:below|above|here)\b"
    r"(?!\s*:)(?!\.\s[\w ,]{1,40}:)(?!\.\s[\w ]{1,40}\d)"
    r"|\b(?:is|are|as) (?:shown|depicted|pictured|illustrated) in the (?!following table|table)"
    r"|<img\b|!\[[^\]]*\]\("
    r"|[図写画]像?[にを](?:示|別)|別冊|図\s?[0-9０-９]|写真を(?:示|別)|如图|见图|下图|图示",
    re.IGNORECASE,
)
IMAGE_COLUMNS = ("image", "images", "figure", "figures", "image_url", "media")
IDENTIFIERS: dict[str, re.Pattern[str]] = {
    "e-mail address": re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]*[a-z]", re.IGNORECASE),
    "web address": re.compile(r"\bhttps?://\S+|\bwww\.\S+\.\S+", re.IGNORECASE),
    "IP address": re.compile(r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}\d{1,3}(?!\.?\d)"),
    "telephone number": re.compile(
        r"(?<![\w.-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\)|\d{2,4})[ .-]\d{3,4}[ -]\d{4}(?![\w-])"
        r"|(?:電話|电话|tel(?:ephone)?|phone|fax)(?:番号|号码| no\.?| number)?[:： ]+"
        r"\+?[\d() .-]{7,}",
        re.IGNORECASE,
    ),
    "social security number": re.compile(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])"),
    "record number": re.compile(
        r"\b(?:MRN|medical record|patient (?:id|no|number)|hospital (?:id|no|number)|chart no)\b"
        r"[ .:#no]*[A-Z]{0,3}\d{4,}"
        r"|(?:患者|診察券|カルテ|病历|住院)(?:番号|ID|号)[:：]?\s*\w*\d{3,}",
        re.IGNORECASE,
    ),
    "date of birth": re.compile(
        r"\b(?:DOB|date of birth|born on)\b[ :]*(?:\d{1,4}[./-]\d{1,2}[./-]\d{1,4}"
        r"|\w+ \d{1,2},? \d{4}|\d{1,2} \w+ \d{4})|(?:生年月日|出生日期)[:：]?\s*\S*\d",
        re.IGNORECASE,
    ),
    "name": re.compile(
        r"\b(?:Mr|Mrs|Ms|Miss)\.? [A-Z][a-z]+ [A-Z][a-z]{2,}\b"
        r"|\b(?:[Pp]atient(?:'s)?|[Ff]ull) name[ :]+(?:is )?[A-Z][a-z]+|(?:氏名|姓名)[:：]\s*\S+"
    ),
}


@dataclass(frozen=True)
class Checked:
    """What is left of a bank, what was rejected, and the counts."""

    mcqs: list[Mcq]
    rejected: list[Rejected]
    facts: dict[str, Any]


def check_bank(
    rows: Sequence[Row],
    *,
    columns: Mapping[str, str],
    source: str,
    language: str,
    first_option: int,
    min_question_chars: int,
    keep: Iterable[str],
) -> Checked:
    """Every row as a question or rejected; reasons named in `keep` are counted, not rejected."""
    columns = find_columns(rows, columns)
    defaults = {"source": source, "language": language}
    read = [read_question(row, columns, defaults, first_option) for row in rows]
    refused = [record for record in read if isinstance(record, Rejected)]
    mcqs = [record for record in read if isinstance(record, Mcq)]
    reasons: dict[int, tuple[str, str]] = dict(_contradictions(mcqs))
    for i, mcq in enumerate(mcqs):
        found = _fault(mcq, min_question_chars)
        if found is not None:
            reasons[i] = found
    kept, tolerated = set(keep), Counter[str]()
    _check_kept(kept, reasons)
    good: list[Mcq] = []
    for i, mcq in enumerate(mcqs):
        if i in reasons and reasons[i][0] not in kept:
            refused.append(_reject(mcq, *reasons[i]))
            continue
        tolerated.update([reasons[i][0]] if i in reasons else [])
        good.append(mcq)
    good = _with_groups(good)
    facts = {
        "rows": len(rows),
        "accepted": len(good),
        "rejected": dict(sorted(Counter(record.reason for record in refused).items())),
        "kept": dict(sorted(tolerated.items())),
        "columns": columns,
        "case_series": _series(good),
        "keys": key_bias(good),
    }
    return Checked(good, refused, facts)


REASONS = (
    "answer_idx is no option",
    "answer is not the option of answer_idx",
    "short question",
    "asks for the wrong option",
    "several answers",
    "needs an image",
    "duplicate",
    "same question, other key",
    *(f"direct identifier: {name}" for name in IDENTIFIERS),
)


def _check_kept(kept: set[str], reasons: Mapping[int, tuple[str, str]]) -> None:
    unknown = sorted(kept - {*REASONS, *(reason for reason, _ in reasons.values())})
    if unknown:
        raise ValueError(f"--keep {unknown[0]}: no reason; allowed: {'; '.join(REASONS)}")


def _fault(mcq: Mcq, min_question_chars: int) -> tuple[str, str] | None:
    reason = reject_by_rule(mcq, min_question_chars)
    if reason is not None:
        return reason, ""
    text = "\n".join([mcq.question, *mcq.options.values()])
    extra = mcq.model_extra or {}
    image = IMAGE.search(text)
    if image is not None or any(extra.get(name) for name in IMAGE_COLUMNS):
        return "needs an image", "" if image is None else _around(text, image)
    for name, pattern in IDENTIFIERS.items():
        if pattern.search(text):  # the text itself is the person's: it is not repeated
            return f"direct identifier: {name}", ""
    return None


def _contradictions(mcqs: Sequence[Mcq]) -> Iterable[tuple[int, tuple[str, str]]]:
    """Later copies of a question, and every copy where their keys differ."""
    copies: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(list)
    for i, mcq in enumerate(mcqs):
        texts = tuple(sorted(squeeze(text) for text in mcq.options.values()))
        copies[squeeze(mcq.question), texts].append(i)
    for same in copies.values():
        if len({squeeze(mcqs[i].answer) for i in same}) > 1:
            places = ", ".join(_place(mcqs[i]) for i in same[:5])
            yield from ((i, ("same question, other key", places)) for i in same)
        else:
            of = f"of {_place(mcqs[same[0]])}"
            yield from ((i, ("duplicate", of)) for i in same[1:])


def _around(text: str, found: re.Match[str]) -> str:
    return " ".join(text[max(found.start() - 20, 0) : found.end() + 20].split())


def _reject(mcq: Mcq, reason: str, detail: str) -> Rejected:
    fields = {"stage": "check", "reason": reason, "detail": detail, "mcq_id": mcq.id}
    return Rejected.model_validate({**fields, "occurrence": _place(mcq)})


def _place(mcq: Mcq) -> str:
    return (mcq.model_extra or {})["place"]


def _with_groups(mcqs: Sequence[Mcq]) -> list[Mcq]:
    names = find_groups([mcq.question for mcq in mcqs], [mcq.group for mcq in mcqs], 0.7)
    return [mcq.model_copy(update={"group": name}) for mcq, name in zip(mcqs, names, strict=True)]


def _series(mcqs: Sequence[Mcq]) -> dict[str, int]:
    sizes = [size for size in Counter(mcq.group for mcq in mcqs).values() if size > 1]
    return {"groups": len(sizes), "questions": sum(sizes), "largest": max(sizes, default=1)}


def describe(facts: Mapping[str, Any]) -> list[str]:
    """The counts as lines for a terminal."""
    lines = [f"{facts['accepted']} of {facts['rows']} questions accepted"]
    lines += [f"  rejected: {count} {reason}" for reason, count in facts["rejected"].items()]
    lines += [f"  kept: {count} {reason}" for reason, count in facts["kept"].items()]
    series = facts["case_series"]
    lines.append(
        f"case series and near duplicates: {series['questions']} questions in {series['groups']} "
        f"groups, the largest of {series['largest']}; a group is never in two splits"
    )
    for size, spread in facts["keys"].items():
        letters = ", ".join(f"{letter} {count}" for letter, count in spread["by_letter"].items())
        lines.append(f"keys of {spread['questions']} questions with {size}: {letters}")
        if spread["p_even"] < 0.001:
            lines.append(f"  UNEVEN: p {spread['p_even']:.2g}; a model may learn the letter")
        excess = spread["longest"] - spread["chance"]
        if excess > 3 * math.sqrt(spread["chance"] / spread["questions"]):
            share = f"{100 * spread['longest']:.0f} %"
            lines.append(
                f"  the key is the longest option in {share} (by chance below "
                f"{100 * spread['chance']:.0f} %)"
            )
    return lines


# --- how the keys are spread ------------------------------------------------------------------


def key_bias(mcqs: Sequence[Mcq]) -> dict[str, Any]:
    """Counts of the keys' letters, by number of options, and p of an even spread (chi-squared).

    `longest` is the share of questions whose longest option is the key, `chance` what it would be
    by chance: a model may learn either in place of medicine.
    """
    by_size: dict[int, list[Mcq]] = defaultdict(list)
    for mcq in mcqs:
        by_size[len(mcq.options)].append(mcq)
    return {f"{size} options": _spread(size, group) for size, group in sorted(by_size.items())}


def _spread(size: int, mcqs: Sequence[Mcq]) -> dict[str, Any]:
    places = Counter(list(mcq.options).index(mcq.answer_idx) for mcq in mcqs)
    expected = len(mcqs) / size
    statistic = sum((places[i] - expected) ** 2 / expected for i in range(size))
    longest = sum(
        len(mcq.answer) == max(map(len, mcq.options.values()))
        and list(map(len, mcq.options.values())).count(len(mcq.answer)) == 1
        for mcq in mcqs
    )
    return {
        "questions": len(mcqs),
        "by_letter": {chr(ord("A") + i): places[i] for i in range(size)},
        "p_even": round(chi_squared_p(statistic, size - 1), 6),
        "longest": round(longest / len(mcqs), 4),
        "chance": round(1 / size, 4),
    }


def chi_squared_p(statistic: float, freedom: int) -> float:
    """P(X >= statistic), X chi-squared: the finite sums for even and for odd degrees of freedom."""
    half = statistic / 2
    if freedom % 2 == 0:
        terms = (half**k / math.factorial(k) for k in range(freedom // 2))
        return math.exp(-half) * sum(terms)
    terms = (half ** (k + 0.5) / math.gamma(k + 1.5) for k in range((freedom - 1) // 2))
    return math.erfc(math.sqrt(half)) + math.exp(-half) * sum(terms)
