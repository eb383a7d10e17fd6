"""Options of real questions in the words that models wrap them in: right ones true, others false.

Wrong among all questions of the three sets: 13 of 71,920 verdicts on MedQA (none of them true), 118
of 231,520 on MedMCQA (49) and 8 of 59,092 on JMMLU (1); most are texts that read as sentences of
their own ("It is a diagnosis of exclusion is the most likely answer").
"""

import csv
import json

import pytest

from data_gen.answers import judge, normalise

WORDS = (
    "The most likely answer is {text}.",
    "{text} is the most likely answer.",
    "This is most consistent with {text}.",
    "Therefore, the correct answer is {text}, because of the findings described.",
    "**{text}**\n\nThe patient's findings point to it.",
    "The history points to one thing. The best choice would be: {text}",
)
LETTERS = (
    "The correct answer is option {letter}: {text}.",
    "{letter}) {text}",
    "After reviewing all options, I choose {letter}.",
    "Option {letter} ({text}) is correct, the others are not.",
    "**Answer: {letter}. {text}**",
    "{text} ({letter})",
    "So the answer must be ({letter}).",
    "The answer is {letter} because the other options do not explain the findings.",
)
JAPANESE_WORDS = (
    "答えは{text}です。",
    "最も考えられるのは{text}である。",
    "したがって、{text}が正解です。",
    "{text}\n\n理由: 所見から考えられる。",
    "正解は「{text}」です。",
)
JAPANESE_LETTERS = (
    "正解は{letter}です。",
    "{letter}（{text}）が正しい。",
    "答え：{letter}",
    "選択肢{letter}が適切である。",
    "以上より、{letter}が正解である。",
    "【解答】{letter}",
    "他の選択肢は所見に合わないため、{letter}が最も適切です。",
)


def medqa(folder):
    lines = (folder / "medqa-usmle" / "phrases_no_exclude_test.jsonl").read_text().splitlines()
    return [(row["options"], row["answer_idx"]) for row in map(json.loads, lines)]


def medmcqa(folder):
    rows = map(json.loads, (folder / "medmcqa" / "dev.json").read_text().splitlines())
    texts = [([row[f"op{letter}"] for letter in "abcd"], int(row["cop"]) - 1) for row in rows]
    return [(dict(zip("ABCD", each, strict=True)), "ABCD"[right]) for each, right in texts]


def jmmlu(folder):
    rows = []
    for path in sorted((folder / "jmmlu-medical").glob("*.csv")):
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows += [row for row in csv.reader(file) if len(row) == 6 and row[5] in "ABCD"]
    return [(dict(zip("ABCD", row[1:5], strict=True)), row[5]) for row in rows]


def is_usable(options):
    """Each option has a text of its own."""
    texts = {normalise(text) for text in options.values()}
    return "" not in texts and len(texts) == len(options)


def verdicts(questions, words, letters):
    """(response, key, options or None, outcome wanted, outcome) of every wording and option."""
    for options, key in questions:
        for letter, text in options.items():
            wanted = "true" if letter == key else "false"
            asked = [(form.format(text=text), options[key], None) for form in words]
            asked += [(said, key, options) for said, _, _ in asked]
            asked += [(form.format(letter=letter, text=text), key, options) for form in letters]
            for said, reference, shown in asked:
                yield said, reference, shown, wanted, judge(said, reference, shown).outcome


@pytest.mark.parametrize(
    ("read", "every", "words", "letters"),
    [
        (medqa, 24, WORDS, LETTERS),
        (medmcqa, 72, WORDS, LETTERS),
        (jmmlu, 20, JAPANESE_WORDS, JAPANESE_LETTERS),
    ],
)
def test_options_in_a_models_words_are_told_apart(real_data, read, every, words, letters):
    questions = [row for row in read(real_data)[::every] if is_usable(row[0])]
    found = list(verdicts(questions, words, letters))
    wrong = [row for row in found if row[3] != row[4]]
    assert len(found) > 2_500
    assert len(wrong) <= len(found) / 500, wrong[:5]
    assert sum(row[4] == "true" for row in wrong) <= len(found) / 2_000, wrong[:5]
