"""Option letters: which options a response chooses, one or several, in three languages.

A letter counts where it stands alone ("B", "(B)", "答えはBです"), never inside a word. Every letter
of a sentence is taken with what stands before and behind it: asserted ("the answer is B"), denied
("not B", "B is wrong", "Bではない") or only mentioned. Standard library only.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from data_gen.answer_text import (
    CJK,
    NEAR,
    SPECIES,
    asserts,
    is_the_text,
    normalise,
    plain,
    sentences,
)
from data_gen.verdict import Verdict, compare, same_or_other

Options = Mapping[str, str]
JudgeText = Callable[[str, str], Verdict]


class Mention(NamedTuple):
    """Letters named together: "B", "A and C", "ac"; `hedged` by an "or", `marked` by a bracket or
    the word option."""

    letters: tuple[str, ...]
    hedged: bool
    marked: bool
    before: str
    after: str
    place: tuple[int, int]


class Chosen(NamedTuple):
    """The letters that a response chooses, and whether it only hedges between them."""

    letters: frozenset[str]
    hedged: bool


# --- judging ------------------------------------------------------------------------------------


def judge_option(
    response: str, references: Sequence[str], options: Options, judge_text: JudgeText
) -> Verdict:
    """Whether the response chooses the option or options of a reference (letters, or the text of
    one); `judge_text` compares a response with the text of an option."""
    keys = [letters_of(reference, options) for reference in references]
    for reference, key in zip(references, keys, strict=True):
        if key is None:
            return Verdict("unscored", f"the reference is no option: {reference[:60]}")
    chosen = choose(response, options, judge_text)
    if not chosen.letters and any(key is not None and len(key) > 1 for key in keys):
        chosen = _several_in_words(plain(response), options)
    if not chosen.letters:
        return Verdict("false", "no answer")
    if chosen.letters in keys and (len(chosen.letters) == 1 or not chosen.hedged):
        return same_or_other(True)
    several = not chosen.hedged and any(key is not None and len(key) > 1 for key in keys)
    return same_or_other(False) if several else compare(chosen.letters, None)


def choose(response: str, options: Options, judge_text: JudgeText) -> Chosen:
    """What a response chooses: an option's whole text, stated letters, options in words, or else
    the letters that it marks."""
    whole = [letter for letter, text in options.items() if text and is_the_text(response, text)]
    if len(whole) == 1:
        return Chosen(frozenset(whole), False)
    text = plain(response).strip()
    stated, lines = _stated(text, options)
    words = _options_in_words("\n".join(lines), options, judge_text)
    if stated.letters and words and not words & stated.letters:
        return Chosen(stated.letters | words, True)
    if stated.letters:
        return stated
    marked = _mentioned(text, options)
    if words and len(marked.letters) == 1:  # "naproxen (B)"
        return Chosen(words | marked.letters, True)
    return Chosen(words, False) if words else marked


def letters_of(reference: str, options: Options) -> frozenset[str] | None:
    """The options that a key names: "B", "a,c", "ac", "A and C", or the text of one of them."""
    stripped = plain(reference).strip().strip("()[]【】.。").strip()
    if stripped in options:
        return frozenset([stripped])
    same = [letter for letter, text in options.items() if normalise(text) == normalise(reference)]
    if len(same) == 1:
        return frozenset(same)
    parts = [part for part in re.split(r"[,、;/&・\s]|\band\b|と|和|及び", stripped) if part]
    if len(parts) == 1:
        parts = list(parts[0])
    keys = {_key(part, options) for part in parts}
    if None in keys or len(keys) < len(parts) or not parts or not _is_one_case("".join(parts)):
        return None
    return frozenset(key for key in keys if key is not None)


def same_letters(answer: str, key: str, alternatives: Sequence[str] = ()) -> bool:
    """The published grading of IgakuQA119: the sorted lower-case letters are equal, commas, spaces
    and brackets removed; a question may accept alternatives instead. No other mark is forgiven."""
    keys = alternatives if alternatives else (key,)
    return _bare_letters(answer) in {_bare_letters(each) for each in keys}


def _bare_letters(text: str) -> str:
    bare = re.sub(r"[,、\s()\[\]（）]", "", text).lower()
    return bare if bare.isdigit() else "".join(sorted(bare))


def stated_letter(text: str, options: Options) -> str | None:
    """The letter that a text first states as its answer, as leaderboards of multiple choice read
    it: of "(B) or (C)" it is B, and a later "(B) is wrong" takes nothing back. `judge` is stricter.
    """
    mentions = [mention for line in sentences(text) for mention in _mentions(line, options)]
    said = [mention for mention in mentions if _ANSWER_IS.search(mention.before)]
    stated = said if said else [mention for mention in mentions if _is_stated(mention)]
    return stated[0].letters[0] if stated else None


def _key(part: str, options: Options) -> str | None:
    return next((key for key in (part, part.swapcase()) if key in options), None)


def _is_one_case(text: str) -> bool:
    """ "BE" and "be" are letters, "Be" is a word."""
    return text in (text.upper(), text.lower())


# --- finding letters ----------------------------------------------------------------------------

_EDGE = r"A-Za-z0-9_'-"  # marks that make a letter part of a word, in any script
_OPEN = r"[(\[「『【\"']{0,2}(?:(?:options?|choices?)\s|選択肢\s?|选项\s?)?[(\[]?"
_CLOSE = r"[)\]」』】\"']{0,2}"
_JOIN = (
    r"(?:,\s?(?:and|or|及び|または)?|/|&|\+|・|、|;|\band/or\b|\band\b|\bor\b"
    r"|または|及び|と|か|和|或者?)"
)
_HEDGE = re.compile(r"\bor\b|または|か|或")
_MARKED = re.compile(r"[(\[「『【\"']|options?|choices?|選択肢|选项", re.IGNORECASE)


@lru_cache(maxsize=256)
def _pattern(keys: str) -> re.Pattern:
    """One letter or several joined, or ("ac") several in one word, that stand alone."""
    letter = f"[{re.escape(keys + keys.swapcase())}]"
    first = rf"(?<![{_EDGE}]){_OPEN}(?P<first>{letter}){_CLOSE}(?![{_EDGE}])"
    more = rf"(?P<more>(?:\s?{_JOIN}\s?{_OPEN}{letter}{_CLOSE}(?![{_EDGE}])){{0,9}})"
    word = rf"(?<![{_EDGE}])(?P<word>[{re.escape(keys)}]{{2,6}})(?![{_EDGE}])"
    return re.compile(f"{first}{more}|{word}", re.IGNORECASE)


def _mentions(sentence: str, options: Options) -> Iterator[Mention]:
    """The letters of a sentence that stand alone, those that are joined together as one."""
    keys = "".join(key for key in options if len(key) == 1)
    if not keys:
        return
    taken = _texts_with_letters(sentence, options, keys)
    for match in _pattern(keys).finditer(sentence):
        before = sentence[max(0, match.start() - NEAR) : match.start()]
        after = sentence[match.end() : match.end() + NEAR]
        letters = list(match["word"] or [match["first"], *_LONE_LETTER.findall(match["more"])])
        found = [_key(letter, options) for letter in letters]
        if None in found or _is_word(match, before, after, options):
            continue
        start, end = match.span("word" if match["word"] else "first")
        if any(first <= start and end <= last for first, last in taken):
            continue
        named = tuple(dict.fromkeys(key for key in found if key is not None))
        marked = _MARKED.search(match[0]) is not None or match[0].endswith(")")
        yield Mention(
            named,
            _HEDGE.search(match["more"] or "") is not None,
            marked,
            before,
            after,
            match.span(),
        )


def _texts_with_letters(sentence: str, options: Options, keys: str) -> list[tuple[int, int]]:
    """Where options are named whose text holds letters: arylsulfatase A, de Quervain症候群."""
    return [
        match.span()
        for text in (plain(text) for text in options.values() if len(text) > 1)
        if _pattern(keys).search(text)
        for match in re.finditer(re.escape(text), sentence, re.IGNORECASE)
    ]


_LONE_LETTER = re.compile(r"(?<![A-Za-z0-9])[A-Za-z0-9](?![A-Za-z0-9])")
_CLAUSE = re.compile(
    r"\s+(?:is|was|are|were|and|or|as|for|because|since|but|if|not|given|due|which|rather|instead"
    r"|with|in)\b"
)
_NAMES_A_LETTER = re.compile(
    r"(?i)\b(?:vitamin|hepatitis|type|group|class|grade|stage|factor|protein|influenza|phase|part"
    r"|apolipoprotein|immunoglobulin|child-pugh)\s$"
)
_SPECIES = re.compile(rf"\.?\s{SPECIES}|\s(?:cells?|lymphocytes?)\b")
_FORMULA = re.compile(r"\s?[+×=*^/]\s?\(?[A-Za-z0-9]")
_IN_FORMULA = re.compile(r"[+×*^/]\s?\(?$")


def _is_word(match: re.Match, before: str, after: str, options: Options) -> bool:
    """A letter that is a word of the sentence: "a dose", "I think", "vitamin A", "E. coli"."""
    follows = re.match(r"\s+[a-z]", after) is not None and _CLAUSE.match(after) is None
    if match["word"]:
        several = len(set(match["word"])) == len(match["word"])
        as_written = all(letter in options for letter in match["word"])
        return not (several and as_written) or (match["word"].islower() and follows)
    if _FORMULA.match(after) or _IN_FORMULA.search(before):
        return True
    if match["more"] or _MARKED.search(match[0]):
        return False
    if _NAMES_A_LETTER.search(before) or _SPECIES.match(after):
        return True
    if match[0].endswith((")", "]")):
        return False
    if match["first"] not in options:  # a small letter for "B": "answer: b.", not "a drug b"
        return follows or (bool(re.search(r"\w\s?$", before)) and not _is_cued(before))
    return match["first"] in "AIai" and follows


# --- asserted or denied -------------------------------------------------------------------------

_NOUN = r"(?:answer|choice|option|selection|one|letter|diagnosis|conclusion|response)s?"
_FILL = (
    r"(?:\s?\b(?:therefore|thus|then|clearly|most likely|probably|likely|indeed|both|the|options?"
    r"|choices?|letters?|answer|choose|select)\b){0,3}\s?[:\-]?\s?[(\[\"']?\s?$"
)
_ANSWER_IS = re.compile(rf"(?i)\banswer\s?(?:is|:)\s?:?{_FILL}")
_CUE_BEFORE = re.compile(
    rf"(?i)(?:\b{_NOUN}\b[^.;:,]{{0,40}}?"
    r"(?:\b(?:is|was|are|were|would be|should be|must be)\b|[:=→>-])"
    r"|\b(?:i|we|i'd|i'll|would|to|must|should|will|therefore|thus|and|so),?\s"
    r"(?:choose|chose|select|selected|pick|picked|go with|opt for|went with)|\bgoing with"
    r"|(?:^|[,;])\W{0,3}(?:then\s)?(?:choose|select|pick|use)\b|^\W{0,3}(?:no|rather|actually)\b,?"
    r"|\b(?:therefore|thus|hence|so),?(?:\s(?:it is|it's))?|[✅✓✔☑]|\bit(?:'s| is)|\banswer|\bbut"
    r"|\bboth)"
    rf"{_FILL}"
)
_CUE_BEFORE_CJK = re.compile(
    r"(?:(?:答え?|正解|回答|解答|正答)[】\]]?\s?(?:は|:|=|としては)?|(?:もの|の)は|答案(?:应该?|應該?)?[是为為:选選]?"
    r"|[应應]该?[选選][择擇]?|故[选選]|[选選][择擇]?|ではなく|でなく|じゃなく|而是|正[确確]的?(?:选项|答案)?[是为為:])"
    r"\s?[「『【(:]?\s?$"
)
_CUE_AFTER = re.compile(
    r"(?i)^\s{0,2}(?:[✅✓✔☑]|(?:is|was|are|were)\s(?:therefore\s|thus\s|indeed\s|both\s)?(?:the\s)?"
    r"(?:only\s|most\s)?(?:correct|right|best|answer|likely|appropriate|true)\b"
    r"|(?:is|are)\s?[.!]?\s?$"
    rf"|,?\s?(?:as\s)?the\s(?:correct|right|best)\s{_NOUN}\b"
    r"|(?:选项|項|项)?(?:が|は|是|为)?(?:最も)?(?:正解|正しい|正[确確]|对的?(?:$|[。.,])|最(?:合适|适当|佳)|適切|答え|答案)"
    r"|を選(?:ぶ|択|び)|です|だ(?:と|[。.]?$)|である|でしょう)"
)
_DENIED_BEFORE = re.compile(
    r"(?i)(?:\b(?:not|never|neither|nor|except|rather than|instead of|other than|unlike|excluding"
    r"|(?:anything|everything|all|any)(?:\s(?:option|choice))?\sbut|exclude[sd]?|rule[sd]? out"
    r"|ruling out|eliminate[sd]?|reject(?:s|ed)?|cannot be"
    r"|(?:incorrect|wrong|false|worst)(?:\s(?:answer|option|choice)s?(?:\s(?:is|are)|\s?:)?)?)"
    r"|n't(?:\sbe)?|不是|并非|並非|不[选選]|排除|除外)"
    r"(?:\s?\b(?:option|choice|answer|the|either|simply|be)\b){0,3}\s?[:(\[\"'「]?\s?$"
)
_DENIED_AFTER = re.compile(
    r"(?i)^\s{0,2}(?:[❌✗✘✖?]|(?:is|was|are|were|seems|looks|would be|can be|cannot be"
    r"|can't be)?\s?"
    r"(?:(?:therefore|thus|clearly|also|definitely|partially|partly|obviously|simply|both)\s){0,2}"
    r"(?:(?:not|isn't|wasn't|aren't)\b(?!\sonly|\s\(?[A-J]\b)|wrong|incorrect|false|excluded"
    r"|ruled out|eliminated|unlikely|impossible)"
    r"|(?:选项|項|项|选)?\s?[はがも是都为]?\s?(?:(?:正解|正答|正しく|適切)?(?:では|じゃ|で|とは)?(?:な|ありま|言え)"
    r"|不(?:对|正|是|适|符|合|選|选)|错|錯|誤|間違|違|除外|否定|排除|不適|不正|考えにく))"
)


_LISTS_OPTIONS = re.compile(
    r"(?i)(?<!correct )(?<!right )(?<!best )\b(?:options|choices|alternatives)"
    r"\s?(?:are|were|include|:)\s?$"
)


def _is_cued(before: str) -> bool:
    return bool(_CUE_BEFORE.search(before) or _CUE_BEFORE_CJK.search(before))


def _is_stated(mention: Mention) -> bool:
    """Given as the answer, by what stands before or behind."""
    if _LISTS_OPTIONS.search(mention.before):
        return False
    nothing_else = not re.search(r"\w", mention.before + mention.after)
    return nothing_else or _is_cued(mention.before) or bool(_CUE_AFTER.match(mention.after))


def _is_denied(mention: Mention) -> bool:
    return bool(_DENIED_BEFORE.search(mention.before) or _DENIED_AFTER.match(mention.after))


def _stated(text: str, options: Options) -> tuple[Chosen, list[str]]:
    """Letters given as the answer, in sentences that say so, else at the start; with the lines
    whose words should agree: those, and what is nothing but an option's text. Else all lines."""
    lines = sentences(text)
    stated = [[m for m in _mentions(line, options) if _is_stated(m)] for line in lines]
    found = _union([mention for mentions in stated for mention in mentions])
    if not any(stated):
        found, said = _leading(text, options)
        return found, said if found.letters else [text]
    if not found.letters:
        return found, [text]
    texts = {normalise(words) for words in options.values()}
    pairs = zip(lines, stated, strict=True)
    kept = [(line, mentions) for line, mentions in pairs if mentions or normalise(line) in texts]
    return found, [_without(line, mentions) for line, mentions in kept]


def _without(line: str, mentions: Sequence[Mention]) -> str:
    """The line without its letters: of "the answer is B, naproxen" the words alone."""
    for mention in reversed(mentions):
        start, end = mention.place
        line = f"{line[:start]} {line[end:].lstrip(' .,:)-')}"
    return line


def _leading(text: str, options: Options) -> tuple[Chosen, list[str]]:
    """Letters at the start of the text ("B", "B) ibuprofen", "A, C"), and of lines like it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    keys = [_key(word, options) for word in re.findall(r"\w+", text)]
    if keys and None not in keys:
        return Chosen(
            frozenset(key for key in keys if key is not None), bool(_HEDGE.search(text))
        ), lines
    first = next(_mentions(lines[0], options), None) if lines else None
    if first is None or re.search(r"\w", first.before) or not _ends_letter(first):
        return Chosen(frozenset(), False), lines
    listed = first.after.lstrip().startswith(":")  # "B: 70 %, C: 30 %"
    others = [m for m in _mentions(lines[0], options) if listed and m.after[:2].lstrip()[:1] == ":"]
    others += [mention for line in lines[1:] for mention in _bare_line(line, options)]
    return _union([first, *others]), lines


def _ends_letter(mention: Mention) -> bool:
    after = re.match(
        r"\s?(?:$|[.:,。、\-](?!\w)|[.:](?=[A-Z\u3040-\u9fff])|\(|(?:as|because|since|given"
        r"|(?:and )?not|rather than|instead of|over|is (?:a )?better)\b)",
        mention.after,
    )
    return mention.marked or len(mention.letters) > 1 or after is not None


def _bare_line(line: str, options: Options) -> Iterator[Mention]:
    """The letter of a line that holds nothing but it and its option's text."""
    for mention in _mentions(line, options):
        said = normalise(mention.after)
        if not re.search(r"\w", mention.before) and said in (
            "",
            normalise(options[mention.letters[0]]),
        ):
            yield mention
        return


def _mentioned(text: str, options: Options) -> Chosen:
    """Letters in brackets or behind "option", where nothing in the text says more."""
    mentions = [mention for line in sentences(text) for mention in _mentions(line, options)]
    return _union([mention for mention in mentions if mention.marked])


def _union(mentions: Sequence[Mention]) -> Chosen:
    kept = [mention for mention in mentions if not _is_denied(mention)]
    letters = frozenset(letter for mention in kept for letter in mention.letters)
    return Chosen(letters, any(mention.hedged for mention in kept))


def _options_in_words(text: str, options: Options, judge_text: JudgeText) -> frozenset[str]:
    """Letters of the options whose text is given; of two nested texts the longer counts."""
    said = _without_letter(text, options)
    right = {
        letter
        for letter, words in options.items()
        if normalise(words) and judge_text(said, words).outcome == "true"
    }
    return frozenset(
        letter
        for letter in right
        if not any(
            other != letter and _contains(options[other], options[letter]) for other in right
        )
    )


def _several_in_words(text: str, options: Options) -> Chosen:
    """All options whose text is asserted, where a key has several."""
    named = {
        letter for letter, words in options.items() if normalise(words) and asserts(text, words)
    }
    longest = {
        letter
        for letter in named
        if not any(_contains(options[other], options[letter]) for other in named - {letter})
    }
    return Chosen(frozenset(longest), bool(_HEDGE.search(text)))


def _without_letter(response: str, options: Options) -> str:
    letters = re.escape("".join(key for key in options if len(key) == 1))
    pattern = (
        rf"^\W{{0,9}}[{letters}]\s?[.):,\-](?!{_SPECIES.pattern})\s*(?=\S)|^\([{letters}]\)\s*"
    )
    return re.sub(pattern, "", response)


def _contains(longer: str, shorter: str) -> bool:
    a, b = normalise(longer), normalise(shorter)
    return a != b and (b in a if CJK.search(b) else f" {b} " in f" {a} ")
