"""Texts of answers: one form of writing, the sentences that answer, and what they assert or deny.

Every pattern here reads a bounded stretch (`{0,40}`, one sentence), so that a hostile text costs
time in proportion to its length. Standard library only.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from data_gen.verdict import Verdict, same_or_other

# --- one form of writing ------------------------------------------------------------------------

_APOSTROPHES = str.maketrans("’‘ʼ‐‑‒–—−〜～", "'''------~~")
_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060\ufeff]")
_FRACTIONS = {mark: unicodedata.numeric(mark) for mark in "½¼¾⅛⅜⅝⅞⅕⅖⅗⅘"}
_FRACTION = re.compile(f"(?<!\\d)(\\d{{0,4}}) ?([{''.join(_FRACTIONS)}])")
_LATEX_TEXT = re.compile(r"\\(?:boxed|text|mathrm|mathbf|textbf|operatorname)\s?\{([^{}]*)\}")
_LATEX_MARKS = {r"\,": " ", r"\;": " ", r"\ ": " ", r"\%": "%", r"\times": "×", r"\cdot": "×"}
_LATEX_MARK = re.compile(r"\\(?:[,; %]|times\b|cdot\b)")
CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_TWO_SCRIPTS = re.compile(  # Valsalva手技, IgAである
    r"(?<=[a-z\u0370-\u03ff])(?=[\u3040-\u30ff\u3400-\u9fff])"
    r"|(?<=[\u3040-\u30ff\u3400-\u9fff])(?=[a-z\u0370-\u03ff])"
)
# "hepatitis A" keeps its A: an article is lower case or starts the text, and a word follows it.
_ARTICLE = re.compile(r"(?:^\W{0,9}A|(?<![\w'-])(?:a|[Aa]n|[Tt]he))(?=\s+\w)")
_SIGNS = "%<>+≤≥±↑↓→←"  # marks that change what is said


@lru_cache(maxsize=512)
def normalise(text: str) -> str:
    """Compatibility form, lower case, no articles: words, numbers and signs, one space between."""
    bare = _ARTICLE.sub(" ", plain(text)).casefold()
    pattern = rf"\d+(?:[.,]\d+)*|[^\W\d_]+|[{_SIGNS}]|(?<!\w)-(?=\d)"
    return " ".join(re.findall(pattern, bare))


@lru_cache(maxsize=512)
def plain(text: str) -> str:
    """Compatibility form without markup; one spelling of dashes, apostrophes and ½."""
    text = _FRACTION.sub(_in_decimals, _UNSEEN.sub("", text))
    text = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES)
    for _ in range(2):  # \boxed{80\,\text{mg}}: the inner braces first
        text = _LATEX_TEXT.sub(lambda match: match[1], text)
    text = _LATEX_MARK.sub(lambda match: _LATEX_MARKS[match[0]], text)
    return re.sub(r"[*_`$#]+", "", text)


def _in_decimals(match: re.Match) -> str:
    whole = int(match[1]) if match[1] else 0
    return f"{whole + _FRACTIONS[match[2]]:g}"


@lru_cache(maxsize=512)
def spaced(text: str) -> str:
    """Lower-case words, numbers and signs with a space between, "|" for any other mark."""
    bare = _TWO_SCRIPTS.sub(" ", _ARTICLE.sub(" ", plain(text)).casefold())
    words = re.findall(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:'[^\W\d_]+)?|[^\w\s'-]", bare)
    return " ".join(word if word[0].isalnum() or word in _SIGNS else "|" for word in words)


_LEAD = re.compile(
    r"^\W{0,9}(?:(?:so|therefore|thus|hence),?\s+)?(?:the\s+)?"
    r"(?:(?:correct|right|final|best|most|likely)\s+){0,4}"
    r"(?:answer|diagnosis|option|choice)(?:\s+is\b|\s{0,4}:)",
    re.IGNORECASE,
)


def is_the_text(response: str, reference: str) -> bool:
    """The reference itself, whatever marks it holds, alone or behind "the answer is"."""
    said = plain(response)
    wanted = normalise(reference)
    return normalise(said) == wanted or normalise(_LEAD.sub("", said, count=1)) == wanted


# --- sentences ----------------------------------------------------------------------------------

_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])|\n+")
_ABBREVIATED = re.compile(r"(?i)\b(?:dr|vs|e\.g|i\.e|approx|no|st)\.$|^\(?[a-z0-9]\.$")
_CUE = re.compile(
    r"\b(?:answer|diagnosis|conclusion|choice|correct (?:option|one|dose)|dose|result)\b"
    r"[^.:;,]{0,40}?"
    r"(?:\bis\b(?! not\b)|\bwould be\b|\bshould be\b|:|=)"
    r"|^\s{0,9}(?:therefore|thus|hence|so)\b,?|\b(?:is|are) (?:therefore|thus|hence)\b"
    r"|(?:答え?|正解|回答|解答|最終診断|診断)は|(?:答案|诊断|診斷)(?:应该?|應該?)?[是为為:]",
    re.IGNORECASE,
)
_MEASURED = re.compile(
    r"(?i)\b(total|score|sum|value|date|clearance|gap|ratio|index|rate|level|age|volume|deficit|risk"
    r"|concentration|percentage|weight|interval|pressure|osmolality|bmi|bsa|area|equivalent)\b"
    r"[^.:;,=]{0,40}?(?:\b(?:is|are|was|equals)\b(?!\s(?:below|above|less|more|under|over|within"
    r"|greater|not))|[=:])"
)
_DIRECT = re.compile(
    r"(?i)^\W{0,9}(?:\d|(?:give|administer|take|use|prescribe|start)\b)|\b(?:needs?|requires?)\b"
)
_CONCESSION = re.compile(
    r"(?i)^\W{0,9}(?:(?:while|although|though|even though|despite)\b"
    r"|if\b[^,]{0,60}\b(?:were|was|had)\b|(?:since|because|given that)\b)"
    r"[^,]{0,200},\s"
)
_HEADING = re.compile(
    r"(?i)(?:(?:final|the|correct|best|my)\s){0,3}(?:answer|conclusion|diagnosis)s?\s?:?"
    r"|【?(?:最終)?(?:答え?|解答|回答|正解|答案)】?\s?:?"
)
_RETRACTION = re.compile(
    r"^\s{0,9}(?:(?:no|wait|actually|correction|sorry)\s?[,.:;-]|(?:alternatively|or)\b"
    r"|または|あるいは|或者|不对)",
    re.IGNORECASE,
)
_REVISION = re.compile(
    r"^\s{0,9}(?:(?:no|wait|actually|or|and|also|alternatively|correction|sorry|rather|instead"
    r"|otherwise|but|maybe|perhaps|possibly)\b|または|あるいは|いや|しかし|或者|或|不对|不對|但)",
    re.IGNORECASE,
)
_REASON = re.compile(
    r"(?i)\b(?:because|since|given that|as (?:it|this)|considering|due to the fact|whereas)\b"
)
_BARE_WORDS = 2
_BARE_CJK = 6  # characters
NEAR = 100  # characters in which a word can deny what follows it


def statements(
    response: str, holds_answer: Callable[[str], bool], *, measured: bool = False
) -> list[str]:
    """The sentences that answer: those with a cue, else (of a number or a date) those that say the
    last thing that is measured, else the first that holds an answer and what revises it later."""
    lines = sentences(response)
    cued = _cued(lines, holds_answer)
    if not cued and measured:
        cued = _measured(lines, holds_answer)
    if cued:
        return cued
    chosen: list[str] = []
    for sentence in lines:
        part = _assertive(sentence)
        if not chosen:
            if holds_answer(part):
                chosen.append(part)
        elif _REVISION.match(sentence) or is_bare(part):
            chosen.append(part)
    return chosen


def _cued(lines: list[str], holds_answer: Callable[[str], bool]) -> list[str]:
    """What follows the cue of each sentence that has one, and the sentences that take it back."""
    cued: list[str] = []
    for line in lines:
        parts = _CUE.split(line)
        if len(parts) > 1 or (cued and _RETRACTION.match(line)):
            part = _assertive(parts[-1])
            cued += [part] if holds_answer(part) else []
    return cued


def _measured(lines: list[str], holds_answer: Callable[[str], bool]) -> list[str]:
    """What follows "the total score is", "the due date is": of the last thing so named."""
    first = next((line for line in lines if holds_answer(_assertive(line))), "")
    if _DIRECT.search(first):
        return []
    found = [(match[1].lower(), line[match.end() :]) for line in lines for match in _last(line)]
    found = [(noun, part) for noun, part in found if holds_answer(_assertive(part))]
    return [_assertive(part) for noun, part in found if noun == found[-1][0]]


def _last(line: str) -> list[re.Match]:
    return list(_MEASURED.finditer(line))[-1:]


SPECIES = (  # behind the first letter of a genus: E. coli
    r"(?:coli|diff\w*|botulinum|tetani|perfringens|albicans|cereus|anthracis|fragilis|pertussis"
    r"|burgdorferi|henselae|abortus|trachomatis|pneumoniae|psittaci|diphtheriae|neoformans|faecalis"
    r"|histolytica|granulosus|jejuni)\b"
)
_GENUS = re.compile(r"(?:^|\W)[A-Z]\.$")
_IS_SPECIES = re.compile(SPECIES)


def sentences(text: str) -> list[str]:
    """The sentences of a text; "approx." and "E. coli" end none, a heading "Answer" goes on."""
    joined: list[str] = []
    for piece in _SENTENCE_END.split(plain(text)):
        if joined and _goes_on(joined[-1], piece):
            joined[-1] += " " + piece
        elif joined and _HEADING.fullmatch(joined[-1]) and piece.strip():
            joined[-1] = f"{joined[-1].rstrip(': ')}: {piece.strip()}"
        elif piece and piece.strip():
            joined.append(piece.strip())
    return joined


def _goes_on(sentence: str, piece: str) -> bool:
    short = sentence[-NEAR:]
    if _GENUS.search(short) and _IS_SPECIES.match(piece):
        return True
    return len(sentence) < NEAR and _ABBREVIATED.search(short) is not None


def _assertive(sentence: str) -> str:
    """The sentence without its reasons, and without brackets unless they hedge or hold it all."""
    reason = _REASON.search(sentence)
    text = sentence[: reason.start()] if reason and reason.start() else sentence
    text = _CONCESSION.sub("", text)
    without = re.sub(r"\((?!\s{0,9}(?:or|not|and)\b)[^()]{0,300}\)", " ", text)
    return without if re.search(r"\w", without) else text


def is_bare(statement: str) -> bool:
    """A sentence that is nothing but an answer: a word or two, or a number with its unit."""
    words = normalise(statement).split()
    if CJK.search(statement):
        return 0 < sum(map(len, words)) <= _BARE_CJK
    return 0 < len(words) <= _BARE_WORDS or _BARE_NUMBER.fullmatch(statement.strip()) is not None


_BARE_NUMBER = re.compile(r"[-+<>≤≥]?\s?\d[\d.,]{0,20}(?:\s?[^\W\d]{1,12}){0,3}[%.]?")


# --- what a statement asserts -------------------------------------------------------------------

NEGATORS = (
    r"(?:not|no|never|non|nor|neither|without|cannot be|isn't|aren't|wasn't|doesn't|don't|didn't"
    r"|\w{1,9}n't be|rather than|other than|instead of|unlike|except|rules? out|ruled out"
    r"|excludes?|excluded|to exclude|mimics?|mimicking|resembles?|resembling"
    r"|against|(?<!no )(?<!without )doubt)"
)
BETWEEN = (
    r"(?:(?:be|a|an|the|due|to|caused|by|likely|probably|really|have|had|has|of|option|answer|either"
    r"|simply|evidence|signs|support|suggest|indicate|mean|think|that|it|is"
    r"|(?:consistent|compatible) with|(?:typical|suggestive|diagnostic|characteristic) of)\s+){0,5}"
)
_NEGATED_AFTER = re.compile(
    r"^\s{0,3}(?:(?:is|was|are|were|does|do|did|can be|has been|seems|would be|looks)\s+)?(?:"
    r"(?:(?:is|was|are|were|does|do|did|has|have|can|could|would)n't|not|n't)\b(?!\s+"
    r"(?:allowed|permitted|safe|recommended|advised|to be|be|with|go|given))|excluded|ruled out"
    r"|unlikely|less likely|wrong|incorrect|false|impossible|absent"
    r"|(?:で)?は?(?:では|じゃ)?な[いく]|ではあり|を?除外|[はを]否定|[はが]考えにく|は誤|の可能性は低"
    r"|可能性(?:不大|很小|较小|小|低)|已?被?排除|不(?:考虑|符合|成立|可能|对|正确))"
)
_NEGATED_BEFORE = re.compile(rf"\b{NEGATORS}\s+{BETWEEN}$")
_NEGATED_BEFORE_CJK = re.compile(
    r"(?:不是|并非|並非|绝非|没有|沒有|非|無|无|不|排除了?|除外|而不是|不考虑|不支持|否定)\s?$"
)
# A mark before a CJK name, or a word before an English one, that makes it another name.
_OTHER_NAME_CJK = re.compile(r"[副亜亚準准擬拟抗偽假類类低高]$")
_OTHER_NAME = re.compile(r"(?<!\S)(?:pseudo|para|anti|pre|semi|quasi|hypo|hyper|sub)\s$")
# A word that may follow an answer; any other makes it a longer name ("diabetes insipidus").
_MAY_FOLLOW = set(
    "is was are were be because since and or with in as due which that who by to for on at from of "
    "must should may can could will would has have had but not so then if when while where after "
    "before per this it its also only given seems appears causes cause explains fits rather than "
    "forbids prevents rules excluded ruled unlikely wrong incorrect most more less x patient "
    "patients remains plus secondary caused associated complicated presenting following "
    "instead over alone first next now here today daily orally intravenously".split()
)
_DOSE = re.compile(r"\s?\d[\d.,]{0,9}\s(?:m?g|mcg|μg|ml|iu|units?|mmol|meq|percent|%)(?!\S)")
# What may follow a CJK name: kana but の, marks, and words of a sentence; else it is a longer name.
_ENDS_CJK = re.compile(
    r"^(?:$|[\s|.,:;!?()%+]|[ぁ-んー](?<!の)|の(?:可能性|診断|疑い|ため)|[是为為引可应應所最因由和与與或及也的了还還並并而等]"
    r"|以|患者|诊断|診断|診斷|不|需|会|會|已|被|更|比|较|較|考虑|可能|除外|否定|\d|[a-z])"
)


def asserts(statement: str, phrase: str) -> bool:
    """Whether a statement names the phrase, not as part of a longer name, and does not deny it."""
    text, wanted = spaced(statement), spaced(phrase)
    whole = _is_whole_name_cjk if CJK.search(wanted) else _is_whole_name
    return any(whole(text, hit) and not _denied(text, hit) for hit in _mentions(text, wanted))


def denies(statement: str, phrase: str) -> bool:
    """Whether a statement names the phrase to deny it."""
    text = spaced(statement)
    return any(_denied(text, hit) for hit in _mentions(text, spaced(phrase)))


def _mentions(text: str, wanted: str) -> Iterator[re.Match]:
    pattern = re.escape(wanted)
    if not CJK.search(wanted):
        return re.finditer(rf"(?<!\S){pattern}(?!\S)", text)
    start = r"(?<!\S)" if wanted[0].isascii() else ""
    if _KATAKANA.match(wanted):
        start = rf"(?<!{_KATAKANA.pattern})"  # no ロイシン in イソロイシン
    return re.finditer(start + pattern + (r"(?!\S)" if wanted[-1].isascii() else ""), text)


def _denied(text: str, match: re.Match) -> bool:
    before, after = text_before(text, match), text[match.end() :][:NEAR]
    return bool(
        _NEGATED_BEFORE.search(before)
        or _NEGATED_AFTER.search(after)
        or (CJK.search(match[0]) and _NEGATED_BEFORE_CJK.search(before))
    )


def _is_whole_name(text: str, match: re.Match) -> bool:
    after = text[match.end() : match.end() + NEAR]
    follower = after.split(maxsplit=1)[0] if after.strip() else "|"
    return not _OTHER_NAME.search(text_before(text, match)) and (
        not follower[0].isalnum()
        or _DOSE.match(after) is not None
        or follower in _MAY_FOLLOW
        or follower.endswith(("n't", "ly"))
        or (CJK.match(follower) is not None and _ENDS_CJK.match(follower) is not None)
    )


def _is_whole_name_cjk(text: str, match: re.Match) -> bool:
    after = text[match.end() : match.end() + NEAR]
    return not _OTHER_NAME_CJK.search(text_before(text, match)) and bool(_ENDS_CJK.match(after))


def text_before(text: str, match: re.Match) -> str:
    """The last characters before a match, in which it can be denied."""
    return text[max(0, match.start() - NEAR) : match.start()]


def judge_text(response: str, names: Sequence[str], other_words: str) -> Verdict:
    """Whether the response gives one of the names of an answer; a text in other words than these
    may be the same answer, so that `other_words` says which outcome it has."""
    response, names = _as_one_piece(plain(response), [plain(name).strip() for name in names])

    def gives(part: str) -> bool:
        return any(asserts(part, name) for name in names) or not _only_denies(part)

    parts = statements(response, lambda part: bool(normalise(part)) and gives(part))
    if not parts:
        parts = statements(response, lambda part: bool(normalise(part)))
    if not parts:
        return Verdict("false", "no answer")
    supported = [any(asserts(part, name) for name in names) for part in parts]
    if not any(supported):
        denied = any(denies(part, name) for part in parts for name in names)
        if other_words == "unscored" and not denied:
            return Verdict("unscored", "other words than the reference answer's")
        return same_or_other(False)
    if not all(supported) or any(_names_others(part, names) for part in parts):
        return Verdict("false", "two different answers")
    return same_or_other(True)


_DENIAL = re.compile(
    r"(?i)\b(?:is|are|was|were|seems)\s(?:wrong|incorrect|unlikely|less likely|excluded|ruled out"
    r"|not\b(?!\s(?:allowed|permitted|safe|recommended|advised|to be|be|with|given)))"
)


def _only_denies(statement: str) -> bool:
    """Says of something that it is not the answer, and nothing else: "vancomycin is wrong"."""
    return bool(_DENIAL.search(statement)) and not re.search(
        r"(?i)\b(?:but|rather)\b|[,;:] ", statement
    )


_PARTING = re.compile(r"[.!?]+(?=\s|$)|[;()。；\n]+")
_QUOTES = re.compile(r"[「」『』“”《》\"]")


def _as_one_piece(response: str, names: list[str]) -> tuple[str, list[str]]:
    """Response and names with commas for the marks inside a name that would part it: "Principal
    cells; aldosterone", "positron emission tomography (PET) of the chest"."""
    response, names = _QUOTES.sub("", response), [_QUOTES.sub("", name) for name in names]
    for name in filter(_PARTING.search, names):
        pattern = re.compile(re.escape(name), re.IGNORECASE)
        whole = _PARTING.sub(",", name).strip(",")
        response = pattern.sub(lambda match, whole=whole: whole, response)
    return response, [_PARTING.sub(",", name).strip(",") for name in names]


def _names_others(statement: str, names: Sequence[str]) -> bool:
    """Whether something else is offered beside the answer: "asthma or gout", "asthma, gout"."""
    text = spaced(statement)
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(spaced(name), "@")
    for piece in re.split(
        r"(?<!\S)(?:or|plus|\+|as well as|followed by)(?!\S)|または|あるいは|もしくは|或者?", text
    ):
        if "@" not in piece and re.search(r"\w", piece) and not _is_denied(piece):
            return True
    if _JOINED.search(text) or _JOINED_CJK.search(text):
        return True
    pieces = [piece.strip() for piece in re.split(r"(?<!\S)(?:and|\|)(?!\S)", text)]
    others = [piece for piece in pieces if piece and "@" not in piece and not _is_denied(piece)]
    given = any(piece == "@" or (CJK.search(piece) and piece.endswith("@")) for piece in pieces)
    return given and any(_is_short(piece) for piece in others)


_JOINED = re.compile(  # "liver and spleen are right", but not "gout and it is painful"
    r"@ and (?!(?:it|this|that|there|he|she|which|not)\b)(?:\S+ ){1,2}(?:is|are)\b"
    r"|^(?:\S+ ){1,2}and @"
)
_JOINED_CJK = re.compile(  # "肺炎と結核", but not "肺炎と考える"
    r"@\s?(?:と(?![いなしさのはもで考診思言判推見疑呼す])|および|及び|ならびに|和|以及)\s?[\u3040-\u9fff]"
)


def _is_short(piece: str) -> bool:
    """A piece that may be an answer by itself; in Japanese also a longer name with a copula."""
    if not CJK.search(piece):
        return len(piece.split()) <= _BARE_WORDS
    bare = _COPULA.sub("", piece)
    noun = bare != piece and not _HIRAGANA.search(bare)
    return len(bare) <= (2 * _BARE_CJK if noun else _BARE_CJK)


_COPULA = re.compile(r"(?:である|です|だ|でした)$")
_HIRAGANA = re.compile(r"[ぁ-ん]")
_KATAKANA = re.compile(r"[ァ-ヴー]")


def _is_denied(piece: str) -> bool:
    return (
        re.match(rf"\s{{0,3}}(?:but\s+|and\s+)?{NEGATORS}(?!\S)", piece) is not None
        or re.match(r"\s{0,3}(?:而?不是|而?非|并非|排除|除外)", piece) is not None
        or re.search(r"(?:ではな[いく]|じゃない|は否定|は除外|不考虑|可能性不大)", piece)
        is not None
    )


# --- refusals -----------------------------------------------------------------------------------

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


def is_refusal(reference: str) -> bool:
    """A reference such as "do not give"."""
    return _REFUSAL_REFERENCE.fullmatch(normalise(reference)) is not None


def refuses(text: str) -> bool:
    """The text says that nothing should be given."""
    lowered = plain(text).casefold()
    return _DENIES_REFUSAL.search(lowered) is None and _REFUSAL.search(lowered) is not None


def without_refusal(text: str) -> str:
    """What a text says beside its refusal."""
    return _REFUSAL.sub(" ", plain(text).casefold())
