"""The one meaning of correct: does a response give the reference answer?

Data generation, the reward of reinforcement learning and evaluation all ask `judge`. It reads the
final response only, finds the statement that answers (an "answer is …" sentence, else the first
that holds an answer), and compares what it asserts with the reference: an option letter, a number
with its unit, a refusal ("do not give") or a short text. Two different answers are false, whichever
of them is right. Standard library only.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
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
    """Exactly one `## Thinking`, then exactly one `## Final Response` and a blank line."""
    return final_response(text) is not None


# --- judging ----------------------------------------------------------------------------------


def judge(response_text: str, reference: str, options: Mapping[str, str] | None = None) -> Verdict:
    """Whether the final response gives the reference, which may be an option's letter or text."""
    if not normalise(reference):
        return Verdict("unscored", "no reference answer")
    parts = final_response(response_text)
    if parts is None and (THINKING in response_text or FINAL_RESPONSE in response_text):
        return Verdict("false", "broken think format")
    response = response_text if parts is None else parts[1]
    if not normalise(response):
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


def _judge_plain(response: str, reference: str) -> Verdict:
    if _is_the_text(response, reference):
        return Verdict("true", "same text")
    if _is_refusal(reference):
        return _judge_refusal(response)
    wanted = _whole_quantity(reference)
    if wanted is not None:
        return _judge_quantity(response, wanted)
    return _judge_text(response, reference)


_LEAD = re.compile(
    r"^\W*(?:(?:so|therefore|thus|hence),?\s+)?(?:the\s+)?(?:(?:correct|right|final|best|most|likely)\s+)*"
    r"(?:answer|diagnosis|option|choice)(?:\s+is\b|\s*:)",
    re.IGNORECASE,
)


def _is_the_text(response: str, reference: str) -> bool:
    """The reference itself, whatever marks it holds, alone or behind "the answer is"."""
    said = _plain(response)
    wanted = normalise(reference)
    return normalise(said) == wanted or normalise(_LEAD.sub("", said, count=1)) == wanted


def _compare(asserted: set, wanted: object) -> Verdict:
    if len(asserted) > 1:
        return Verdict("false", "two different answers")
    if not asserted:
        return Verdict("false", "no answer of this kind")
    if asserted != {wanted}:
        return Verdict("false", "another answer")
    return Verdict("true", "same answer")


# --- text -------------------------------------------------------------------------------------

_DIGITS = "zero one two three four five six seven eight nine ten eleven twelve"
_NUMBER_WORDS = {word: str(i) for i, word in enumerate(_DIGITS.split())}
_NUMBER_WORDS |= {"once": "1 times", "twice": "2 times", "thrice": "3 times"}
_APOSTROPHES = str.maketrans("’‘ʼ‐‑‒–—−", "'''------")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
# "hepatitis A" keeps its A: an article is lower case or starts the text, and a word follows it.
_ARTICLE = re.compile(r"(?:^\W*A|(?<![\w'-])(?:a|[Aa]n|[Tt]he))(?=\s+\w)")
_SIGNS = "%<>+≤≥±↑↓→←"  # marks that change what is said


def normalise(text: str) -> str:
    """Compatibility form, lower case, no articles: words, numbers and signs, one space between."""
    bare = _ARTICLE.sub(" ", _plain(text)).casefold()
    pattern = rf"\d+(?:[.,]\d+)*|[^\W\d_]+|[{_SIGNS}]|(?<!\w)-(?=\d)"
    return " ".join(re.findall(pattern, bare))


def _plain(text: str) -> str:
    """Compatibility form without markup; one spelling of dashes and apostrophes."""
    text = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES)
    text = re.sub(r"\\boxed\{([^{}]*)\}|\\text\{([^{}]*)\}", lambda m: m[1] or m[2] or "", text)
    return re.sub(r"[*_`$#]+", "", text)


_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？])|\n+")
_ABBREVIATED = re.compile(r"(?i)\b(?:dr|vs|e\.g|i\.e|approx|no|st)\.$|^\(?[a-z0-9]\.$")
_CUE = re.compile(
    r"\b(?:answer|diagnosis|conclusion|choice|correct (?:option|one|dose)|dose|result)\b"
    r"[^.:;,]{0,40}?"
    r"(?:\bis\b(?! not\b)|\bwould be\b|\bshould be\b|:|=)"
    r"|^\s*(?:therefore|thus|hence|so)\b,?|答え?は|答案[是为為:]|正解は",
    re.IGNORECASE,
)
_REVISION = re.compile(
    r"^\s*(?:no|wait|actually|or|and|also|alternatively|correction|sorry|rather|instead|otherwise"
    r"|but|maybe|perhaps|possibly)\b",
    re.IGNORECASE,
)
_REASON = re.compile(
    r"(?i)\b(?:because|since|given that|as (?:it|this)|considering|due to the fact|whereas)\b"
)
_BARE_WORDS = 2
_NEAR = 100  # characters in which a word can deny what follows it


def _statements(response: str, holds_answer: Callable[[str], bool]) -> list[str]:
    """The sentences that answer: those with a cue, else the first that holds an answer and what
    revises it later."""
    sentences = _sentences(response)
    cued = [match[-1] for match in map(_CUE.split, sentences) if len(match) > 1]
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


def _assertive(sentence: str) -> str:
    """The sentence without its reasons, and without brackets unless they hedge or hold it all."""
    reason = _REASON.search(sentence)
    text = sentence[: reason.start()] if reason and reason.start() else sentence
    without = re.sub(r"\((?!\s*(?:or|not|and)\b)[^()]*\)", " ", text)
    return without if re.search(r"\w", without) else text


def _is_bare(statement: str) -> bool:
    """A sentence that is nothing but an answer."""
    short = 0 < len(normalise(statement).split()) <= _BARE_WORDS
    return short or _whole_quantity(statement) is not None


_NEGATORS = (
    r"(?:not|no|never|non|nor|neither|without|cannot be|isn't|aren't|wasn't|\w+n't be|rather than"
    r"|other than|instead of|unlike|except|rules? out|ruled out|excludes?|excluded|against|doubt)"
)
_BETWEEN = (
    r"(?:(?:be|a|an|the|due|to|caused|by|likely|probably|really|have|had|has|of|option|answer|either"
    r"|simply)\s+){0,4}"
)
_NEGATED_AFTER = re.compile(
    r"^\s*(?:(?:is|was|are|were|can be|has been|seems|would be|looks)\s+)?(?:(?:not|n't)\b(?!\s+"
    r"(?:allowed|permitted|safe|recommended|advised|to be|be|with|go|given))|excluded|ruled out"
    r"|unlikely|less likely|wrong|incorrect|false|impossible|absent"
    r"|ではな|じゃな|でな|を除外|は否定)"
)
_NEGATED_BEFORE = re.compile(rf"\b{_NEGATORS}\s+{_BETWEEN}$")
_NEGATED_BEFORE_CJK = re.compile(r"(?:不是|并非|並非|没有|沒有|非|無|无|不)\s*$")
# A word that may follow an answer; any other makes it a longer name ("diabetes insipidus").
_MAY_FOLLOW = set(
    "is was are were be because since and or with in as due which that who by to for on at from of "
    "must should may can could will would has have had but not so then when if while where after "
    "before per this it its also only given seems appears causes cause explains fits "
    "forbids prevents rules excluded ruled unlikely wrong incorrect most more less than x patient "
    "patients".split()
)


def _asserts(statement: str, phrase: str) -> bool:
    """Whether a statement names the phrase, not as part of a longer name, and does not deny it."""
    text, wanted = _spaced(statement), _spaced(phrase)
    cjk = _CJK.search(wanted) is not None
    pattern = re.escape(wanted) if cjk else rf"(?<!\S){re.escape(wanted)}(?!\S)"
    matches = ((_before(text, m), text[m.end() :][:_NEAR]) for m in re.finditer(pattern, text))
    return any(
        not _NEGATED_BEFORE.search(before)
        and not (cjk and _NEGATED_BEFORE_CJK.search(before))
        and not _NEGATED_AFTER.search(after)
        and (cjk or _ends_name(after))
        for before, after in matches
    )


def _before(text: str, match: re.Match) -> str:
    return text[max(0, match.start() - _NEAR) : match.start()]


def _ends_name(after: str) -> bool:
    follower = after.split()[0] if after.split() else "|"
    return not follower[0].isalnum() or follower in _MAY_FOLLOW or follower.endswith(("n't", "ly"))


def _spaced(text: str) -> str:
    """Lower-case words, numbers and signs with a space between, "|" for any other mark."""
    bare = _ARTICLE.sub(" ", _plain(text)).casefold()
    words = re.findall(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:'[^\W\d_]+)?|[^\w\s'-]", bare)
    return " ".join("|" if re.fullmatch(rf"[^\w{_SIGNS}]", word) else word for word in words)


def _judge_text(response: str, reference: str) -> Verdict:
    statements = _statements(response, lambda part: bool(normalise(part)))
    if not statements:
        return Verdict("false", "no answer")
    supported = [_asserts(statement, reference) for statement in statements]
    if not any(supported):
        return Verdict("false", "another answer")
    if not all(supported) or any(_names_others(part, reference) for part in statements):
        return Verdict("false", "two different answers")
    return Verdict("true", "same answer")


def _names_others(statement: str, reference: str) -> bool:
    """Whether something else is offered beside the reference: "asthma or gout", "asthma, gout"."""
    text = _spaced(statement).replace(_spaced(reference), "@")
    for piece in re.split(r"(?<!\S)(?:or|plus|\+|as well as)(?!\S)", text):
        if "@" not in piece and re.search(r"\w", piece) and not _is_denied(piece):
            return True
    pieces = [piece.strip() for piece in re.split(r"(?<!\S)(?:and|\|)(?!\S)", text)]
    others = [piece for piece in pieces if piece and "@" not in piece and not _is_denied(piece)]
    return "@" in pieces and any(len(piece.split()) <= _BARE_WORDS for piece in others)


def _is_denied(piece: str) -> bool:
    return re.match(rf"\s*(?:but\s+|and\s+)?{_NEGATORS}(?!\S)", piece) is not None


# --- refusals ---------------------------------------------------------------------------------

_REFUSAL = re.compile(
    r"(?:\b(?:do|should|must|may|can|shall)\s*(?:not|n't)\s+(?:be\s+)?"
    r"(?:given?|used?|administer(?:ed)?|prescribed?|taken?)\b|\bcannot be (?:given|used)\b"
    r"|\bdon't (?:give|use|administer|prescribe)\b"
    r"|\b(?:mustn't|shouldn't|can't) be (?:given|used)\b"
    r"|\bnot (?:be )?(?:given|allowed|permitted)\b|\b(?<!not )contraindicated\b|\bwithhold\b"
    r"|\bavoid (?:it|this|the drug)\b|\bgive (?:nothing|none|no dose)\b|\bno dose\b)"
    r"(?!\s+(?:more|less|over|above|under|another|additional|extra|with|together|until|than|up)\b)"
)
_DENIES_REFUSAL = re.compile(
    r"\b(?:not|n't|no longer|isn't)\s+(?:true that|contraindicated)|\bno contraindication"
)
_REFUSAL_REFERENCE = re.compile(
    r"(?:do not|must not|should not|don t|never) (?:give|be given|use|be used|administer)"
    r"|contraindicated|withhold|not allowed|give nothing"
)


def _is_refusal(reference: str) -> bool:
    return _REFUSAL_REFERENCE.fullmatch(normalise(reference)) is not None


def _refuses(text: str) -> bool:
    lowered = _plain(text).casefold()
    return _DENIES_REFUSAL.search(lowered) is None and _REFUSAL.search(lowered) is not None


def _judge_refusal(response: str) -> Verdict:
    def holds(part: str) -> bool:
        return _refuses(part) or bool(_quantities(part)) or "give" in part.casefold()

    statements = _statements(response, holds)
    if not statements or not _refuses(statements[0]):
        return Verdict("false", "another answer")
    rests = [_REFUSAL.sub(" ", _plain(statement).casefold()) for statement in statements]
    doses = [q for rest in rests for q in _quantities(rest) if q.unit in _DOSED]
    if doses or any(re.search(r"\bgive\b", rest) and not _refuses(rest) for rest in rests):
        return Verdict("false", "two different answers")
    return Verdict("true", "same answer")


# --- quantities -------------------------------------------------------------------------------

_NUMBER = (
    r"(?<![\w.,])[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?"
    r"|\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?|\d{1,3}(?:\.\d{3})+,\d+"
    r"|\d{1,3}(?: \d{3})+(?!\d)(?:[.,]\d+)?|\d+[.,]\d+|\.\d+|\d+)(?![\d])"
)
# The first name of a line stands for all of them.
_UNIT_LINES = """
mg milligram milligrams mgs ミリグラム 毫克 ; g gram grams gm ; mcg ug μg microgram micrograms
kg kilogram kilograms kgs キログラム 公斤 ; ml milliliter milliliters millilitre millilitres cc
dl ; l liter liters litre litres ; times time doses x 回 次 ; day days d 日 daily
hour hours h hr hrs ; minute minutes min mins ; week weeks weekly ; month months
year years yr yrs ; % percent ; unit units iu ; tablet tablets pill pills
dose administration ; mmol ; meq ; mmhg ; bpm ; mm ; cm ; m ; kcal
"""
_UNIT_WORDS = {
    word: names.split()[0] for names in re.split(r"[;\n]", _UNIT_LINES) for word in names.split()
}
_SCALES = {"g": ("mg", Fraction(1000)), "mcg": ("mg", Fraction(1, 1000))}
_SCALES |= {"l": ("ml", Fraction(1000)), "dl": ("ml", Fraction(100))}
_UNIT = "|".join(sorted((re.escape(word) for word in _UNIT_WORDS), key=len, reverse=True))
_PER = r"(?:\s*/\s*|\s+(?:per|a|an|each|every|for each|for every)\s+(?:1\s+)?|\s+(?=daily|weekly))"
_WORD_END = r"(?![a-zµμ])"
_QUANTITY = re.compile(
    r"(?P<bound>(?:less than|below|under|fewer than|more than|above|over|greater than|[<>≤≥])\s*)?"
    rf"(?P<number>{_NUMBER})(?P<power>\s*(?:x|×)\s*10\^?\d+)?"
    rf"(?:\s*-?\s*(?P<unit>{_UNIT}){_WORD_END}(?P<per>(?:{_PER}(?:{_UNIT}){_WORD_END})*))?"
)
_PER_PART = re.compile(rf"{_PER}({_UNIT}){_WORD_END}")
_NEUTRAL = re.compile(
    r"\b(?:a|per|each|every|for each|at a|in a|in one|as a|for one)\s+(?:single\s+)?"
    r"(?:dose|time|administration|occasion|intake)\b|/\s*dose\b"
    r"|\b(?:at most|up to|a maximum of|maximum|max\.?|about|approximately|around|roughly|exactly"
    r"|only)\b"
)
_MORE = {"more than", "above", "over", "greater than", ">", "≥"}
_DOSED = {"mg", "ml", "unit", "tablet", ""}
_RANGE = re.compile(r"(?<=\d)\s*(?:-|to|~)\s*(?=\d)")
_IN_WORDS = re.compile(r"\b(?:" + "|".join(_NUMBER_WORDS) + r")\b(?! of\b)")


def _quantities(text: str) -> list[Quantity]:
    """Every number of a text with its unit, scaled to mg or ml; "2 times a day" is 2 times."""
    text = _in_digits(text)
    return [
        _quantity(match)
        for match in _QUANTITY.finditer(text)
        if not _is_negated(_before(text, match)) and not _is_part_of_fraction(text, match)
    ]


def _in_digits(text: str) -> str:
    """Lower case, number words as digits, without words that leave an amount as it is."""
    text = _IN_WORDS.sub(lambda m: _NUMBER_WORDS[m[0]], _plain(text).casefold())
    return _RANGE.sub(" to ", _NEUTRAL.sub(" ", text))


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
    bound = (match["bound"] or "").strip()
    sign = bound and (">" if bound in _MORE else "<")
    return Quantity(value, name, sign + (match["power"] or "").replace(" ", ""))


def _number(text: str) -> Fraction:
    text = text.replace(" ", "").lstrip("+")
    if re.fullmatch(r"-?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?", text):
        return Fraction(text.replace(",", ""))
    if re.fullmatch(r"-?\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?|-?\d{1,3}(?:\.\d{3})+,\d+", text):
        return Fraction(text.replace(".", "").replace(",", "."))
    return Fraction(text.replace(",", "."))


_DENIED = re.compile(
    rf"\b(?:not|never|n't|rather than|instead of|other than)\s+{_BETWEEN}(?:give\s+)?$"
)


def _is_negated(before: str) -> bool:
    return _DENIED.search(before) is not None


def _is_part_of_fraction(text: str, match: re.Match) -> bool:
    """120/80, 1/2: no plain number."""
    before, after = _before(text, match), text[match.end("number") :][:_NEAR]
    return bool(re.match(r"\s*[/:]\s*\d", after) or re.search(r"\d\s*[/:]\s*$", before))


def _whole_quantity(text: str) -> Quantity | None:
    """The quantity that is the whole text, if one is."""
    text = text.strip().rstrip(".")
    found = _quantities(text)
    rest = _QUANTITY.sub(" ", _in_digits(text), count=1)
    return found[0] if len(found) == 1 and not re.search(r"\w", rest) else None


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
    """What a statement offers as its answer: behind the last "=", of the wanted kind if any is."""
    offered = _quantities(statement.rpartition("=")[2])
    bare = [quantity for quantity in offered if not quantity.unit]
    same = [quantity for quantity in offered if quantity.unit == wanted.unit]
    if same:
        listed = re.search(r"\d\s*(?:or|to|-|/)\s*\d", _plain(statement).casefold())
        return [*same, *(bare if listed else [])]
    kind = wanted.unit.split("/")[0]
    akin = [quantity for quantity in offered if kind and quantity.unit.split("/")[0] == kind]
    return bare or akin or offered


def _with_unit_of(quantity: Quantity, wanted: Quantity) -> Quantity:
    """A unit that one side leaves out is the other's; a percent sign cannot be left out."""
    if quantity.unit == wanted.unit or "%" in (quantity.unit, wanted.unit):
        return quantity
    return quantity._replace(unit=wanted.unit) if not quantity.unit or not wanted.unit else quantity


# --- options ----------------------------------------------------------------------------------

_CUED_LETTERS = (
    r"(?:\b(?:is|was|would be|should be|chose|choose|choice|option|select|pick|letter)"
    r"|[:=は是选選])\s*(?:the\s+)?(?:option|choice|letter)?\s*[:\-]?\s*"
)
_CUES_LETTERS = re.compile(
    r"\b(?:answer|choice|choose|chose|select|pick|correct|right|option)\b|答|选|選|正解",
    re.IGNORECASE,
)


def _judge_option(response: str, reference: str, options: Mapping[str, str]) -> Verdict:
    wanted = _letter_of(reference, options)
    if wanted is None:
        return Verdict("unscored", f"the reference is no option: {reference[:60]}")
    whole = {letter for letter, text in options.items() if _is_the_text(response, text)}
    if len(whole) == 1:
        return _compare(whole, wanted)
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
    """Letters given as the answer: in cued sentences, else at the start, else as "option B"."""
    text = _plain(response).strip()
    letters = "".join(re.escape(letter) for letter in options)
    lone = re.fullmatch(rf"\W*([{letters}{letters.lower()}])\W*", text)
    if lone:
        return {lone[1] if lone[1] in options else lone[1].upper()}
    cued = {letter for sentence in _sentences(text) for letter in _cued_letters(sentence, letters)}
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


def _cued_letters(sentence: str, letters: str) -> Iterator[str]:
    if not _CUES_LETTERS.search(sentence):
        return
    one = rf"\(?(?P<letter>[{letters}])\)?(?![\w'])"
    joined = r"\s*(?:,|/|&|and|or|または|か|和|或)\s*(?:option\s+)?"
    several = rf"(?P<more>(?:{joined}\(?[{letters}]\)?(?![\w']))*)"
    for match in re.finditer(rf"{_CUED_LETTERS}{one}{several}", sentence, re.IGNORECASE):
        if not _is_article(match, sentence) and not _letter_denied(sentence, match):
            yield from re.findall(rf"[{letters}](?![\w'])", match["letter"] + match["more"])
    for match in re.finditer(rf"{one}\s+is\s+(?:the\s+)?(?:correct|right|best|answer)", sentence):
        yield match["letter"]


def _listed_letters(text: str, letters: str) -> set[str]:
    """Letters in "A or B …", "not A but C", "option B"."""
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
    """The letter is a word of the sentence: "The answer is A dose of …"."""
    word_follows = re.match(r"\s+[a-z]", sentence[match.end() :]) is not None
    return match["letter"] in "AI" and not match["more"] and word_follows and "(" not in match[0]


def _letter_denied(sentence: str, match: re.Match) -> bool:
    before = sentence[: match.start("letter")].casefold().rstrip(" (")
    after = sentence[match.end() :].casefold()
    return bool(
        re.search(r"(?:\bnot|n't)(?:\s+(?:option|choice))?$", before)
        or re.match(r"\s*(?:is|was)\s+(?:not|wrong|incorrect|false)", after)
    )


def _asserted_options(response: str, options: Mapping[str, str]) -> set[str]:
    """Letters of the options whose text is given; of two nested texts the longer counts."""
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
