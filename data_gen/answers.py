"""The one meaning of correct: does a response give the reference answer?

Data generation, the reward of reinforcement learning and evaluation all ask `judge`. It reads the final response only,
finds the statement that answers (an "answer is …" sentence, else the first one that holds an answer), and compares what
is asserted there, after normalisation, with the reference: an option letter, a number with its unit, a refusal ("do not
give") or a short text. Naming two different answers is false, whichever of them is right. Standard library only.
"""

import math
import re
import unicodedata
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal, NamedTuple

THINKING = "## Thinking"
FINAL_RESPONSE = "## Final Response"


class Verdict(NamedTuple):
    """What a verifier found; `unscored` is neither right nor wrong. `calls` are journal keys."""

    outcome: Literal["true", "false", "unscored"]
    reason: str
    calls: tuple[str, ...] = ()


class Quantity(NamedTuple):
    """A number, its unit ("" for none) and "<" or ">" where the text only bounds it."""

    value: Fraction
    unit: str
    bound: str = ""


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
    """Exactly one `## Thinking`, then exactly one `## Final Response` with a blank line behind it."""
    return final_response(text) is not None


# --- judging ----------------------------------------------------------------------------------


def judge(response_text: str, reference: str, options: Mapping[str, str] | None = None) -> Verdict:
    """Whether the final response gives the reference; with `options`, that may be letter or text."""
    if not normalise(reference):
        return Verdict("unscored", "no reference answer")
    response = _judged_part(response_text)
    if response is None:
        return Verdict("false", "broken think format")
    if not re.search(r"\w", response):
        return Verdict("false", "no answer")
    if options:
        return _judge_option(response, reference, options)
    return _judge_plain(response, reference)


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


def _judged_part(text: str) -> str | None:
    parts = final_response(text)
    if parts is not None:
        return parts[1]
    return None if THINKING in text or FINAL_RESPONSE in text else text


def _judge_plain(response: str, reference: str) -> Verdict:
    if normalise(response) == normalise(reference):
        return Verdict("true", "same text")
    if _is_refusal(reference):
        return _judge_refusal(response)
    wanted = _whole_quantity(reference)
    if wanted is not None:
        return _judge_quantity(response, wanted)
    return _judge_text(response, reference)


def _compare(asserted: set, wanted: object) -> Verdict:
    if len(asserted) > 1:
        return Verdict("false", "two different answers")
    if not asserted:
        return Verdict("false", "no answer of this kind")
    return (
        Verdict("true", "same answer")
        if asserted == {wanted}
        else Verdict("false", "another answer")
    )


# --- text -------------------------------------------------------------------------------------

_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = {
    **{word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())},
    "once": "1 times", "twice": "2 times", "thrice": "3 times",
}  # fmt: skip
_APOSTROPHES = str.maketrans("’‘ʼ‐‑‒–—−", "'''------")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def normalise(text: str) -> str:
    """Compatibility form, lower case, words and numbers with one space between, no articles."""
    words = re.findall(r"\d+(?:[.,]\d+)*|[^\W\d_]+|[%<>+]|(?<!\w)-(?=\d)", _plain(text).casefold())
    kept = [word for word in words if word not in _ARTICLES]
    return " ".join(kept or words)


def _plain(text: str) -> str:
    """Compatibility form without markup; one spelling of dashes and apostrophes."""
    text = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES)
    text = re.sub(r"\\boxed\{([^{}]*)\}|\\text\{([^{}]*)\}", lambda m: m[1] or m[2] or "", text)
    return re.sub(r"[*_`$#]+", "", text)


_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？])|\n+")
_ABBREVIATED = re.compile(
    r"\b(?:dr|vs|e\.g|i\.e|approx|no|st)\.$|^\(?[A-Za-z0-9]\.$", re.IGNORECASE
)
_CUE = re.compile(
    r"\b(?:answer|diagnosis|conclusion|choice|option chosen|correct (?:option|one|dose)|dose|result)\b[^.:;,]{0,40}?"
    r"(?:\bis\b(?! not\b)|\bwould be\b|\bshould be\b|:|=)|^\s*(?:therefore|thus|hence|so)\b,?|答え?は|答案[是为為:]|正解は",
    re.IGNORECASE,
)
_REVISION = re.compile(
    r"^\s*(?:no|wait|actually|or|and|also|alternatively|correction|sorry|rather|instead|otherwise|but|maybe|perhaps|possibly)\b",
    re.IGNORECASE,
)
_REASON = re.compile(
    r"\b(?:because|since|given that|as it|as this|considering|due to the fact|whereas|so that)\b",
    re.IGNORECASE,
)
_BARE_WORDS = 2


def _statements(response: str, holds_answer) -> list[str]:
    """The sentences that answer: those with a cue, else the first that holds an answer; and what revises it later."""
    sentences = _sentences(response)
    cued = [
        sentence[match.end() :]
        for sentence in sentences
        for match in [_last_cue(sentence)]
        if match
    ]
    cued = [part for part in map(_assertive, cued) if holds_answer(part)]
    if cued:
        return cued
    chosen: list[str] = []
    for sentence in sentences:
        part = _assertive(sentence)
        if not chosen:
            if holds_answer(part):
                chosen.append(part)
        elif _REVISION.match(sentence) or _is_bare(part):
            chosen.append(part)
    return chosen


def _sentences(text: str) -> list[str]:
    joined: list[str] = []
    for piece in _SENTENCE_END.split(_plain(text)):
        if joined and _ABBREVIATED.search(joined[-1]):
            joined[-1] += " " + piece
        elif piece and piece.strip():
            joined.append(piece.strip())
    return joined


def _last_cue(sentence: str) -> re.Match | None:
    matches = list(_CUE.finditer(sentence))
    return matches[-1] if matches else None


def _assertive(sentence: str) -> str:
    """The sentence without its reasons and without brackets, unless they hedge or hold everything."""
    reason = _REASON.search(sentence)
    text = sentence[: reason.start()] if reason and reason.start() else sentence
    without = re.sub(r"\((?!\s*(?:or|not|and)\b)[^()]*\)", " ", text)
    return without if re.search(r"\w", without) else text


def _is_bare(statement: str) -> bool:
    """A sentence that is nothing but an answer."""
    return (
        0 < len(normalise(statement).split()) <= _BARE_WORDS
        or _whole_quantity(statement) is not None
    )


_NEGATORS = r"(?:not|no|never|non|nor|neither|without|cannot be|isn't|aren't|wasn't|\w+n't be|rather than|other than|instead of|unlike|except|rules? out|ruled out|excludes?|excluded|against|doubt)"
_BETWEEN = r"(?:(?:be|a|an|the|due|to|caused|by|likely|probably|really|have|had|has|of|option|answer|either|simply)\s+){0,4}"
_NEGATED_AFTER = re.compile(
    r"^\s*(?:(?:is|was|are|were|can be|has been|seems|would be|looks)\s+)?"
    r"(?:(?:not|n't)\b(?!\s+(?:allowed|permitted|safe|recommended|advised|to be|be|with|go|given))|excluded|ruled out|unlikely|less likely|"
    r"wrong|incorrect|false|impossible|absent|ではな|じゃな|でない|でな|を除外|は否定)"
)
_NEGATED_BEFORE = re.compile(rf"\b{_NEGATORS}\s+{_BETWEEN}$")
_NEGATED_BEFORE_CJK = re.compile(r"(?:不是|并非|並非|没有|沒有|非|無|无|不)\s*$")
_LONGER_NAME_ENDS = set(
    "is was are were be because since and or with in as due which that who by to for on at from of must should may can could will would has have"
    " had but not so then when if while where after before per a an the this it its would also only given seems appears causes cause explains fits"
    " forbids prevents rules excluded ruled unlikely wrong incorrect most more less than x patient patients".split()
)


def _asserts(statement: str, phrase: str) -> bool:
    """Whether a statement names the phrase, not as part of a longer name, and does not deny it."""
    text, wanted = _spaced(statement), _spaced(phrase)
    cjk = _CJK.search(wanted) is not None
    pattern = re.escape(wanted) if cjk else rf"(?<!\S){re.escape(wanted)}(?!\S)"
    found = False
    for match in re.finditer(pattern, text):
        before, after = text[: match.start()], text[match.end() :]
        if _NEGATED_BEFORE.search(before) or (cjk and _NEGATED_BEFORE_CJK.search(before)):
            continue
        if _NEGATED_AFTER.search(after):
            continue
        follower = after.split()[0] if after.split() else "|"
        if (
            not cjk
            and follower[0].isalnum()
            and follower not in _LONGER_NAME_ENDS
            and not follower.endswith(("n't", "ly"))
        ):
            continue
        found = True
    return found


def _spaced(text: str) -> str:
    """Lower-case words, numbers and marks of a text, a space around each; articles are kept out."""
    words = re.findall(
        r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:'[^\W\d_]+)?|[^\w\s']", _plain(text).casefold()
    )
    kept = [("|" if re.fullmatch(r"[^\w%<>+]", word) and word != "-" else word) for word in words]
    return " ".join(word for word in kept if word not in _ARTICLES and word != "-")


def _judge_text(response: str, reference: str) -> Verdict:
    statements = _statements(response, lambda part: bool(normalise(part)))
    if not statements:
        return Verdict("false", "no answer")
    supported = [_asserts(statement, reference) for statement in statements]
    if not any(supported):
        return Verdict("false", "another answer")
    if not all(supported) or any(
        _names_alternatives(statement, reference) for statement in statements
    ):
        return Verdict("false", "two different answers")
    return Verdict("true", "same answer")


def _names_alternatives(statement: str, reference: str) -> bool:
    """Whether the statement offers something else beside the reference: "asthma or gout", "asthma, gout"."""
    text = re.sub(re.escape(_spaced(reference)), "@", _spaced(statement))
    for piece in re.split(r"(?<!\S)(?:or|/)(?!\S)|(?<=\S) \| or ", text)[0:]:
        if "@" not in piece and re.search(r"\w", piece) and not _is_denied(piece):
            return True
    pieces = [
        piece.strip() for piece in re.split(r"(?<!\S)(?:and|&|\|)(?!\S)", text) if piece.strip()
    ]
    if "@" not in pieces:
        return False
    return any(
        "@" not in piece and len(piece.split()) <= _BARE_WORDS and not _is_denied(piece)
        for piece in pieces
    )


def _is_denied(piece: str) -> bool:
    return re.match(rf"\s*(?:but\s+|and\s+)?{_NEGATORS}(?!\S)", piece) is not None


# --- refusals ---------------------------------------------------------------------------------

_REFUSAL = re.compile(
    r"(?:\b(?:do|should|must|may|can|shall)\s*(?:not|n't)\s+(?:be\s+)?(?:given?|used?|administer(?:ed)?|prescribed?|taken?)\b|\bcannot be (?:given|used)\b"
    r"|\bdon't (?:give|use|administer|prescribe)\b|\b(?:mustn't|shouldn't|can't) be (?:given|used)\b|\bnot (?:be )?(?:given|allowed|permitted)\b"
    r"|\b(?<!not )contraindicated\b|\bwithhold\b|\bavoid (?:it|this|the drug)\b|\bgive (?:nothing|none|no dose)\b|\bno dose\b)"
    r"(?!\s+(?:more|less|over|above|under|another|additional|extra|with|together|until|than|up)\b)"
)
_DENIES_REFUSAL = re.compile(
    r"\b(?:not|n't|no longer|isn't)\s+(?:true that|contraindicated)|\bno contraindication",
    re.IGNORECASE,
)
_REFUSAL_REFERENCE = re.compile(
    r"(?:do not|must not|should not|don t|never) (?:give|be given|use|be used|administer)|contraindicated|withhold|not allowed|give nothing"
)


def _is_refusal(reference: str) -> bool:
    return _REFUSAL_REFERENCE.fullmatch(normalise(reference)) is not None


def _refuses(text: str) -> bool:
    lowered = _plain(text).casefold()
    return _DENIES_REFUSAL.search(lowered) is None and _REFUSAL.search(lowered) is not None


def _judge_refusal(response: str) -> Verdict:
    statements = _statements(
        response,
        lambda part: _refuses(part) or bool(_quantities(part)) or "give" in part.casefold(),
    )
    if not statements:
        return Verdict("false", "another answer")
    amounts = [
        q
        for statement in statements
        for q in _quantities(_REFUSAL.sub(" ", statement.casefold()))
        if q.unit in _DOSED
    ]
    if not _refuses(statements[0]):
        return Verdict("false", "another answer")
    if amounts or not all(
        _refuses(s) or not re.search(r"\bgive\b", s.casefold()) for s in statements
    ):
        return Verdict("false", "two different answers")
    return Verdict("true", "same answer")


# --- quantities -------------------------------------------------------------------------------

_NUMBER = (
    r"(?<![\w.,])[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?|\d{1,3}(?:\.\d{3})+,\d+"
    r"|\d{1,3}(?: \d{3})+(?!\d)(?:[.,]\d+)?|\d+[.,]\d+|\.\d+|\d+)(?![\d])"
)
_UNIT_WORDS = {
    **dict.fromkeys(("mg", "milligram", "milligrams", "mgs", "ミリグラム", "毫克"), "mg"),
    **dict.fromkeys(("g", "gram", "grams", "gm"), "g"),
    **dict.fromkeys(("mcg", "ug", "μg", "microgram", "micrograms"), "mcg"),
    **dict.fromkeys(("kg", "kilogram", "kilograms", "kgs", "キログラム", "公斤"), "kg"),
    **dict.fromkeys(("ml", "milliliter", "milliliters", "millilitre", "millilitres", "cc"), "ml"),
    **dict.fromkeys(("l", "liter", "liters", "litre", "litres"), "l"),
    **dict.fromkeys(("time", "times", "doses", "x", "回", "次"), "times"),
    **dict.fromkeys(("day", "days", "d", "日", "daily"), "day"),
    **dict.fromkeys(("hour", "hours", "h", "hr", "hrs"), "hour"),
    **dict.fromkeys(("minute", "minutes", "min", "mins"), "minute"),
    **dict.fromkeys(("week", "weeks", "weekly"), "week"),
    **dict.fromkeys(("month", "months"), "month"),
    **dict.fromkeys(("year", "years", "yr", "yrs"), "year"),
    **dict.fromkeys(("%", "percent"), "%"),
    **dict.fromkeys(("unit", "units", "iu"), "unit"),
    **dict.fromkeys(("tablet", "tablets", "pill", "pills"), "tablet"),
    **dict.fromkeys(("dose", "administration"), "dose"),
    **dict.fromkeys(("mmol", "meq", "mmhg", "bpm", "mm", "cm", "m", "kcal"), ""),
}  # fmt: skip
_UNIT_WORDS.update(
    {name: name for name in ("mmol", "meq", "mmhg", "bpm", "mm", "cm", "m", "kcal", "dl")}
)
_SCALES = {
    "g": ("mg", Fraction(1000)),
    "mcg": ("mg", Fraction(1, 1000)),
    "l": ("ml", Fraction(1000)),
    "dl": ("ml", Fraction(100)),
}
_UNIT = "|".join(sorted((re.escape(word) for word in _UNIT_WORDS), key=len, reverse=True))
_PER = r"(?:\s*/\s*|\s+(?:per|a|an|each|every|for each|for every)\s+(?:1\s+)?|\s+(?=daily|weekly))"
_WORD_END = r"(?![a-zµμ])"
_QUANTITY = re.compile(
    rf"(?P<bound>(?:less than|below|under|fewer than|more than|above|over|greater than|[<>≤≥])\s*)?"
    rf"(?P<number>{_NUMBER})(?P<power>\s*(?:x|×)\s*10\^?\d+)?"
    rf"(?:\s*-?\s*(?P<unit>{_UNIT}){_WORD_END}(?P<per>(?:{_PER}(?:{_UNIT}){_WORD_END})*))?"
)
_PER_PART = re.compile(rf"{_PER}({_UNIT}){_WORD_END}")
_NEUTRAL = re.compile(
    r"\b(?:a|per|each|every|for each|at a|in a|in one|as a|for one)\s+(?:single\s+)?(?:dose|time|administration|occasion|intake)\b|/\s*dose\b|\b(?:at most|up to|a maximum of|maximum|max\.?|about|approximately|around|roughly|exactly|only)\b|(?<=\d)\s*(?:回分)"
)
_DOSED = {"mg", "ml", "unit", "tablet", ""}
_RANGE = re.compile(rf"(?<=\d)\s*(?:-|to|~)\s*(?=\d)")


def _quantities(text: str) -> list[Quantity]:
    """Every number of a text with its unit, scaled to mg or ml; counts of "a day" are the same as counts."""
    lowered = _plain(text).casefold()
    lowered = re.sub(
        r"\b(?:" + "|".join(_NUMBER_WORDS) + r")\b(?! of\b)", lambda m: _NUMBER_WORDS[m[0]], lowered
    )
    lowered = _NEUTRAL.sub(" ", lowered)
    lowered = _RANGE.sub(" to ", lowered)
    found = []
    for match in _QUANTITY.finditer(lowered):
        if _is_negated(lowered[: match.start()]) or _is_part_of_fraction(lowered, match):
            continue
        found.append(_quantity(match))
    return found


def _quantity(match: re.Match) -> Quantity:
    value = _number(match["number"])
    unit = _UNIT_WORDS[match["unit"]] if match["unit"] else ""
    if unit in _SCALES:
        unit, scale = _SCALES[unit]
        value *= scale
    pers = [_UNIT_WORDS[word] for word in _PER_PART.findall(match["per"] or "")]
    if unit == "times":
        pers = [per for per in pers if per != "day"]
    name = "/".join([unit, *sorted(pers)])
    return Quantity(value, name, _bound(match["bound"]) + (match["power"] or "").replace(" ", ""))


def _bound(words: str | None) -> str:
    if not words:
        return ""
    return ">" if words.strip() in ("more than", "above", "over", "greater than", ">", "≥") else "<"


def _number(text: str) -> Fraction:
    text = text.replace(" ", "").lstrip("+")
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text) and not text.lstrip("-").startswith(
        "0"
    ):
        return Fraction(text.replace(",", ""))
    if re.fullmatch(r"-?\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?|-?\d{1,3}(?:\.\d{3})+,\d+", text):
        return Fraction(text.replace(".", "").replace(",", "."))
    return Fraction(text.replace(",", "."))


def _is_negated(before: str) -> bool:
    return (
        re.search(
            rf"\b(?:not|never|n't|rather than|instead of|other than)\s+{_BETWEEN}(?:give\s+)?$",
            before,
        )
        is not None
    )


def _is_part_of_fraction(text: str, match: re.Match) -> bool:
    """120/80, 1/2: no plain number."""
    after = text[match.end("number") :]
    return (
        re.match(r"\s*[/:]\s*\d", after) is not None
        or re.search(r"\d\s*[/:]\s*$", text[: match.start()]) is not None
    )


def _whole_quantity(text: str) -> Quantity | None:
    """The quantity that is the whole text, if one is."""
    stripped = text.strip().rstrip(".")
    found = _quantities(stripped)
    if len(found) != 1:
        return None
    lowered = _NEUTRAL.sub(
        " ",
        re.sub(
            r"\b(?:" + "|".join(_NUMBER_WORDS) + r")\b",
            lambda m: _NUMBER_WORDS[m[0]],
            _plain(stripped).casefold(),
        ),
    )
    return found[0] if not re.search(r"\w", _QUANTITY.sub(" ", lowered, count=1)) else None


def _judge_quantity(response: str, wanted: Quantity) -> Verdict:
    def holds(part: str) -> bool:
        return bool(_candidates(part, wanted)) or _refuses(part)

    statements = _statements(response, holds)
    if any(_refuses(statement) for statement in statements):
        asserted = any(_candidates(_REFUSAL.sub(" ", s.casefold()), wanted) for s in statements)
        return Verdict("false", "two different answers" if asserted else "another answer")
    asserted = {quantity for statement in statements for quantity in _candidates(statement, wanted)}
    return _compare({_with_unit_of(quantity, wanted) for quantity in asserted}, wanted)


def _candidates(statement: str, wanted: Quantity) -> list[Quantity]:
    """The quantities a statement offers as its answer: behind the last "=", and of the wanted kind if any is."""
    offered = _quantities(statement.rpartition("=")[2])
    same = [quantity for quantity in offered if quantity.unit == wanted.unit]
    if same:
        rivals = [q for q in offered if not q.unit and _follows_or(statement)]
        return same + rivals
    bare = [quantity for quantity in offered if not quantity.unit]
    if not wanted.unit:
        return bare or offered
    return (
        bare or [q for q in offered if q.unit.split("/")[0] == wanted.unit.split("/")[0]] or offered
    )


def _follows_or(statement: str) -> bool:
    return re.search(r"\d\s*(?:or|to|-|/)\s*\d", _plain(statement).casefold()) is not None


def _with_unit_of(quantity: Quantity, wanted: Quantity) -> Quantity:
    """A unit that one side leaves out is the other's; a percent sign cannot be left out."""
    if quantity.unit == wanted.unit or "%" in (quantity.unit, wanted.unit):
        return quantity
    return quantity._replace(unit=wanted.unit) if not quantity.unit or not wanted.unit else quantity


# --- options ----------------------------------------------------------------------------------

_CUED_LETTERS = r"(?:is|was|would be|should be|:|=|chose|choose|choice|option|select|pick|letter|はは?|是|选|選)\s*(?:the\s+)?(?:option|choice|letter)?\s*[:\-]?\s*"


def _judge_option(response: str, reference: str, options: Mapping[str, str]) -> Verdict:
    wanted = _letter_of(reference, options)
    if wanted is None:
        return Verdict("unscored", f"the reference is no option: {reference[:60]}")
    named = _named_letters(response, options)
    texts = _asserted_options(response, options)
    if named and texts and not (texts & named):
        named |= texts
    chosen = named or texts
    if not chosen:
        return Verdict("false", "no answer")
    return _compare(chosen, wanted)


def _letter_of(reference: str, options: Mapping[str, str]) -> str | None:
    stripped = reference.strip().strip("().").strip()
    if stripped in options:
        return stripped
    same = [letter for letter, text in options.items() if normalise(text) == normalise(reference)]
    return same[0] if len(same) == 1 else None


def _named_letters(response: str, options: Mapping[str, str]) -> set[str]:
    """Letters given as the answer: in cued sentences, else at the start of a line, else as "option B"."""
    text = _plain(response).strip()
    letters = "".join(re.escape(letter) for letter in options)
    one = rf"\(?(?P<letter>[{letters}])\)?(?![\w'])"
    several = rf"(?P<more>(?:\s*(?:,|/|&|and|or|または|か|和|或)\s*(?:option\s+)?\(?[{letters}]\)?(?![\w']))*)"
    lone = re.fullmatch(rf"\W*(?P<letter>[{letters}{letters.lower()}])\W*", text)
    if lone:
        return {lone["letter"].upper() if lone["letter"] not in options else lone["letter"]}
    cued: set[str] = set()
    for sentence in _sentences(text):
        cue = re.search(
            r"\b(?:answer|choice|choose|chose|select|pick|correct|right|option)\b|答|选|選|正解",
            sentence,
            re.IGNORECASE,
        )
        if not cue:
            continue
        for match in re.finditer(rf"{_CUED_LETTERS}{one}{several}", sentence, re.IGNORECASE):
            given = [
                letter
                for letter in re.findall(rf"[{letters}](?![\w'])", match["letter"] + match["more"])
            ]
            if not given or _is_article(match, sentence) or _letter_denied(sentence, match):
                continue
            cued.update(given)
        for match in re.finditer(
            rf"{one}\s+is\s+(?:the\s+)?(?:correct|right|best|answer)", sentence
        ):
            cued.add(match["letter"])
    if cued:
        return cued
    leading = re.match(
        rf"(?:\(\s*([{letters}])\s*\)|([{letters}])\s*[.):,:\-](?!\w)|([{letters}])(?=\s*\n))", text
    )
    if leading is None:
        return _listed_letters(text, letters)
    rest = text[leading.end() :]
    also = re.match(rf"\s*(?:,|/|&|and|or)\s*\(?([{letters}])\)?(?![\w'])", rest)
    lines = re.findall(rf"^\s*\(?([{letters}])\)?[.):](?!\w)", rest, re.MULTILINE)
    return {letter for letter in (*leading.groups(), also and also[1], *lines) if letter}


def _listed_letters(text: str, letters: str) -> set[str]:
    """ "A or B", "not A but C", "B aspirin" without further words around."""
    found = set()
    start = re.match(
        rf"\(?([{letters}])\)?\s*(?:,|/|&|and|or)\s*\(?([{letters}])\)?(?![\w'])", text
    )
    if start:
        return set(start.groups())
    for match in re.finditer(rf"\b(?:but|option|choice)\s+\(?([{letters}])\)?(?![\w'])", text):
        if match[0].startswith("but") or not _is_negated(text[: match.start()].casefold()):
            found.add(match[1])
    return found


def _is_article(match: re.Match, sentence: str) -> bool:
    """ "The answer is A dose of …", "is a dose": the letter is a word of the sentence."""
    letter, after = match["letter"], sentence[match.end() :]
    return (
        letter in "AI"
        and match["more"] == ""
        and re.match(r"\s+[a-z]", after) is not None
        and "(" not in match[0]
    )


def _letter_denied(sentence: str, match: re.Match) -> bool:
    before = sentence[: match.start("letter")].casefold().rstrip(" (")
    after = sentence[match.end() :].casefold()
    return re.search(
        r"\bnot(?:\s+(?:option|choice))?$|n't(?:\s+(?:option|choice))?$", before
    ) is not None or (re.match(r"\s*(?:is|was)\s+(?:not|wrong|incorrect|false)", after) is not None)


def _asserted_options(response: str, options: Mapping[str, str]) -> set[str]:
    """Letters of the options whose text the response gives; the longer of two nested texts counts."""
    right = {
        letter
        for letter, text in options.items()
        if _judge_plain(_without_letter(response, options), text).outcome == "true"
    }
    return {
        letter
        for letter in right
        if not any(
            other != letter and _contains(options[other], options[letter]) for other in right
        )
    }


def _without_letter(response: str, options: Mapping[str, str]) -> str:
    letters = "".join(re.escape(letter) for letter in options)
    return re.sub(rf"^\W*[{letters}]\s*[.):,\-]\s*(?=\S)|^\([{letters}]\)\s*", "", response.strip())


def _contains(longer: str, shorter: str) -> bool:
    a, b = normalise(longer), normalise(shorter)
    return a != b and f" {b} " in f" {a} "
