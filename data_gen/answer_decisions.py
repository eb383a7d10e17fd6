"""Yes, no and maybe; true and false: what a response decides. Standard library only."""

import re
from collections.abc import Mapping

from data_gen.answer_text import normalise, plain, sentences
from data_gen.verdict import Verdict, compare

# Names of each decision; the word alone as a reference, the pattern in a response.
_YES_NO = {
    "yes": ({"yes", "はい", "是", "是的"}, r"\byes\b|はい|^是的?(?=$|[。.,])"),
    "no": (
        {"no", "いいえ", "否", "不是"},
        r"\bno\b(?=\s?(?:$|[.,;:!)]))|いいえ|^(?:否|不是)(?=$|[。.,])",
    ),
    "maybe": (
        {
            "maybe",
            "uncertain",
            "unclear",
            "inconclusive",
            "どちらとも言えない",
            "不确定",
            "不确定的",
        },
        r"\bmaybe\b|\buncertain\b|\bunclear\b|\binconclusive\b|どちらとも言えない|不确定",
    ),
}
_TRUE_FALSE = {
    "true": ({"true"}, r"\btrue\b"),
    "false": ({"false"}, r"\b(?:false|untrue)\b"),
}
_VOCABULARIES = (_YES_NO, _TRUE_FALSE)
_OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
_CUED = re.compile(
    r"(?:\b(?:answer|decision|conclusion|verdict|response)\b[^.:;,]{0,40}?(?:\bis\b|:|=)"
    r"|(?:答え?|回答|結論)は|答案[是为為:])\s{0,3}[\"'(]?$"
)
_NOT = re.compile(
    r"(?:\b(?:not|never|rather than|instead of)|n't|不是)\s(?:be\s|a\s|an\s)?[\"'(]?$"
)


def decision_of(reference: str) -> tuple[str, Mapping[str, tuple[set[str], str]]] | None:
    """The decision that a reference is, with its vocabulary; None of any other text."""
    said = normalise(reference)
    for vocabulary in _VOCABULARIES:
        for name, (words, _) in vocabulary.items():
            if said in words:
                return name, vocabulary
    return None


def judge_decision(
    response: str, wanted: str, vocabulary: Mapping[str, tuple[set[str], str]]
) -> Verdict:
    """Whether the response decides as wanted: by a cue ("the answer is no"), else by the word that
    it starts with, else by all such words in it. Without such a word a rule cannot tell."""
    names = {word: name for name, (words, _) in vocabulary.items() for word in words}
    said = set(normalise(response).split())
    if said and said <= set(names):
        return compare({names[word] for word in said}, wanted)
    found = [hit for line in sentences(response) for hit in _decisions(line, vocabulary)]
    if not found:
        return Verdict("unscored", f"neither {' nor '.join(vocabulary)} is said")
    cued = {name for name, place in found if place == "cued"}
    leading = {found[0][0]} if found[0][1] == "leading" else set()
    bare = {name for name, place in found if place == "alone"}
    chosen = cued | bare if cued else leading | bare if leading else {name for name, _ in found}
    return compare(chosen, wanted)


def _decisions(line: str, vocabulary: Mapping[str, tuple[set[str], str]]) -> list[tuple[str, str]]:
    """(decision, where it stands) for each word of a sentence, in order."""
    text = plain(line).casefold()
    found = []
    for name, (_, pattern) in vocabulary.items():
        for match in re.finditer(pattern, text):
            before = text[max(0, match.start() - 60) : match.start()]
            said = _OPPOSITE[name] if _NOT.search(before) and name in _OPPOSITE else name
            found.append((match.start(), said, _place(before, text[match.end() :])))
    return [(said, place) for _, said, place in sorted(found)]


def _place(before: str, after: str) -> str:
    if _CUED.search(before):
        return "cued"
    if re.search(r"(?:\b(?:and|or|but)|/)\s?$", before):
        return "alone"  # "yes and no"
    if re.search(r"\w", before):
        return "inside"
    return "leading" if re.search(r"\w", after) else "alone"
