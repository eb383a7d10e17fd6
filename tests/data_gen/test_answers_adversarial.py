"""Answers that try a judge: words inside words, denials, two answers, injections, units, dates."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen.answers import Reference, judge

LINES = (Path(__file__).parent / "adversarial_answers.jsonl").read_text(encoding="utf-8")
CASES = [json.loads(line) for line in LINES.splitlines()]
SETTINGS = ("low", "high", "tolerance", "date_order")


FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}


def judge_case(case, response):
    chosen = {name: case[name] for name in SETTINGS if name in case}
    names = tuple(case["aliases"]) if "aliases" in case else ()
    options = case["options"] if "options" in case else None
    return judge(response, Reference(case["reference"], names, **chosen), options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["why"])
def test_an_adversarial_answer_is_judged_as_a_person_would(case):
    verdict = judge_case(case, case["response"])
    assert verdict.outcome == case["outcome"], verdict.reason


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.translate(FULL_WIDTH),
        lambda text: f"  {text}\n\n",
        lambda text: text.replace("'", "’"),
        lambda text: (
            f"## Thinking\n\nThe answer is A, 1 mg, gout or no.\n\n## Final Response\n\n{text}"
        ),
        lambda text: f"<think>The answer is A, 1 mg, gout or no.</think>\n{text}",
    ],
    ids=["full width", "white space", "apostrophes", "thinking", "think tags"],
)
def test_a_change_of_form_changes_no_verdict(change):
    plain = [case for case in CASES if not {"<", "#", "\\"} & set(case["response"])]
    changed = [
        case["why"]
        for case in plain
        if judge_case(case, change(case["response"])).outcome != case["outcome"]
    ]
    assert len(plain) > 400
    assert changed == []


PIECES = st.sampled_from(
    [word for case in CASES for word in (*case["response"].split(), case["reference"])]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES | st.text(max_size=5), max_size=30), PIECES | st.text(max_size=20))
def test_no_text_and_no_reference_break_the_judge(words, reference):
    for options in (None, {"A": "gout", "B": reference, "C": "80 mg"}):
        verdict = judge(" ".join(words), reference, options)
        assert verdict.outcome in ("true", "false", "unscored")
        assert verdict.reason


def test_the_table_is_long_and_holds_no_case_twice():
    said = {json.dumps({**case, "why": ""}, sort_keys=True) for case in CASES}
    assert len(said) == len(CASES) >= 150
    assert len({case["why"] for case in CASES}) == len(CASES)
    outcomes = [case["outcome"] for case in CASES]
    assert min(outcomes.count("true"), outcomes.count("false")) >= 60
