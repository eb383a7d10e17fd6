"""The process that judges: as `judge`, and ended when a verdict takes too long."""

import os
import re
import signal
import time

import pytest

from data_gen.answers import LONGEST_RESPONSE, Reference, Verdict, judge
from data_gen.rule_process import RuleProcess

HERE = "tests.data_gen.test_rule_process"
OPTIONS = {
    letter: text
    for letter, text in zip(
        "ABCDEFGHIJ",
        "gout;asthma;80 mg;do not give;10-20 mg;a b c d e;肺炎;yes;1/2/2003;none".split(";"),
        strict=True,
    )
}
PIECES = (
    "1",
    "1 ",
    "1,",
    "1.",
    " ",
    "\n",
    "A ",
    "A, ",
    "not ",
    "the answer is ",
    "not be a ",
    "(",
    "()",
    "1 mg ",
    "1 mg per kg ",
    "gout or ",
    "gout ",
    "$",
    "\\boxed{",
    "01/02/2003 ",
    "january ",
    "<think>",
    "肺炎",
    "ではない",
    "1x10^",
    "-",
    "1-",
    "do not give ",
    "while ",
    "yes and ",
    "a. ",
    "1 week 1 day ",
    "the score is 1. ",
    "½",
    "\u200b",
    "answer:\n",
    "<<<",
)


def runaway(response, reference, options=None, **settings):
    """A regular expression that would take longer than anybody waits, for the response "run"."""
    if response == "run":
        re.fullmatch(r"(a+)+b", "a" * 60)
    return judge(response, reference, options, **settings)


def ends(response, reference, options=None, **settings):
    if response == "end":
        os.kill(os.getpid(), signal.SIGKILL)
    return Verdict("true", "alive")


def test_the_process_judges_as_the_function_does():
    cases = [
        ("80 mg", "80 mg", None),
        ("0.08 g", Reference("80 mg", tolerance=0.05), None),
        ("heart attack", Reference("myocardial infarction", ("heart attack",)), None),
        ("答えはaとcです。", "ac", dict.fromkeys("abcde", "")),
        ("line\nbreaks\n\nand \udc80 half a pair", "gout", None),
        ("gout " * LONGEST_RESPONSE, "gout", None),
    ]
    with RuleProcess(10) as process:
        for response, reference, options in cases:
            assert process.judge(response, reference, options) == judge(
                response, reference, options
            )
        found = process.judge("sarcoid", "sarcoidosis", other_words="unscored")
        assert found.outcome == "unscored"
        assert process.killed == 0


def test_a_runaway_is_killed_in_time_and_the_next_verdict_is_given():
    with RuleProcess(0.5, f"{HERE}:runaway") as process:
        assert process.judge("80 mg", "80 mg").outcome == "true"
        start = time.monotonic()
        verdict = process.judge("run", "80 mg")
        assert time.monotonic() - start < 5
        assert verdict == Verdict("unscored", "no verdict by rule within 0.5 s")
        assert process.judge("80 mg", "80 mg").outcome == "true"
        assert process.killed == 1


def test_a_process_that_ends_gives_no_verdict_and_is_started_again():
    with RuleProcess(5, f"{HERE}:ends") as process:
        verdict = process.judge("end", "x")
        assert verdict == Verdict("unscored", "the process that judges by rule ended")
        assert process.judge("go on", "x") == Verdict("true", "alive")


def test_a_child_ends_itself_where_its_parent_does_not(tmp_path):
    """The alarm of the child, without a parent that watches: it is gone after twice its time."""
    process = RuleProcess(0.3, f"{HERE}:runaway")
    process.judge("80 mg", "80 mg")
    child = process._child
    assert child is not None and child.stdin is not None
    request = '{"response": "run", "reference": {"text": "x", "aliases": []}, '
    child.stdin.write((request + '"options": null, "other_words": "false"}\n').encode())
    child.stdin.flush()
    assert child.wait(timeout=10) == -signal.SIGALRM
    process.close()


def test_a_time_limit_is_above_zero():
    with pytest.raises(ValueError, match="seconds=0; a time limit should be above 0"):
        RuleProcess(0)


@pytest.mark.parametrize("piece", PIECES, ids=repr)
def test_no_text_of_the_longest_kind_takes_long(piece):
    text = (piece * LONGEST_RESPONSE)[: LONGEST_RESPONSE - 1] + "x"
    start = time.process_time()
    for reference in ("80 mg", "gout", "肺炎", "do not give", "01/02/2003", "10-20 mg", "yes"):
        judge(text, reference)
    judge(text, "B", OPTIONS)
    assert time.process_time() - start < 15  # below 3 on a 2 GHz core


def test_a_longer_response_is_unscored_at_once():
    start = time.process_time()
    verdict = judge("gout or " * LONGEST_RESPONSE, "gout")
    assert verdict.outcome == "unscored"
    assert "more than 20000 characters" in verdict.reason
    assert time.process_time() - start < 0.5
