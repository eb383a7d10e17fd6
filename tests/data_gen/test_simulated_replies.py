"""How the simulated teacher reads prompts and traces."""

import re
from pathlib import Path

import yaml

from data_gen.simulated_replies import kind_of, last_attempt

PROMPTS = yaml.safe_load(
    (Path(__file__).parents[2] / "data_gen" / "prompts" / "en.yaml").read_text(encoding="utf-8")
)


def test_every_prompt_kind_is_recognised_from_its_text():
    for kind, template in PROMPTS.items():
        assert kind_of(re.sub(r"\{[a-z_]+\}", "x", template)) == kind
    assert kind_of("What is the time?") == "other"


def test_the_last_attempt_is_what_follows_the_last_judgement_with_thinking_behind_it():
    trace = "### A\n1\n### Conclusion\n2\n### Verification\nno\n### B\n3\n\n4\n### Conclusion\n5"
    assert last_attempt(trace) == (["3", "4"], True)
    assert last_attempt(f"{trace}\n### Verification\nyes") == (["3", "4"], True)
    assert last_attempt("### A\n1\n### Conclusion\n2\n### Verification\nyes") == (["1"], False)
