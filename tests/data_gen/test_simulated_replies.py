"""How the simulated teacher reads prompts and traces."""

import re
from pathlib import Path

import pytest
import yaml

from data_gen.simulated_replies import kind_of, last_attempt, outcome

PROMPTS = yaml.safe_load(
    (Path(__file__).parents[2] / "data_gen" / "prompts" / "en.yaml").read_text(encoding="utf-8")
)


def test_every_prompt_kind_is_recognised_from_its_text():
    for kind, template in PROMPTS.items():
        wanted = "verify" if kind == "verify_with_question" else kind
        assert kind_of(re.sub(r"\{[a-z_]+\}", "x", template)) == wanted
    assert kind_of("What is the time?") == "other"


def test_the_last_attempt_is_what_follows_the_last_judgement_with_thinking_behind_it():
    trace = "### A\n1\n### Conclusion\n2\n### Verification\nno\n### B\n3\n\n4\n### Conclusion\n5"
    assert last_attempt(trace) == (["3", "4"], True)
    assert last_attempt(f"{trace}\n### Verification\nyes") == (["3", "4"], True)
    assert last_attempt("### A\n1\n### Conclusion\n2\n### Verification\nyes") == (["1"], False)


@pytest.mark.parametrize(
    ("last_line", "answer"),
    [
        ("Limit 140: 140.", "140 mg"),
        ("Limit 140: 96.", "96 mg"),
        ("160/2=80.", "80 mg"),
        ("160/2=80, 80/2=40.", "40 mg"),
        ("With asthma: not allowed.", "do not give"),
        ("Not with milk.", "milk"),
        ("7 mg per kg.", "7 mg per kg"),
        ("2 times.", "2 times"),
        ("So it is Aspirin (325 mg).", "Aspirin (325 mg)"),
    ],
)
def test_the_answer_is_read_from_every_line_that_reasoning_ends_with(last_line, answer):
    assert outcome(f"With gout: fine.\n20x7=140, 3x7=21, sum 161.\n{last_line}\n") == answer
