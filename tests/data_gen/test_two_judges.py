"""The teacher's own comparison and ours are two programs; on the same answers they agree."""

import random
from collections import Counter

from data_gen.answers import judge
from data_gen.formulary import FormularySettings, make_bank
from data_gen.simulated_replies import agrees

FORMS = ("{}", "{}.", "The answer is {}.", "It is {}", "**{}**")


def test_both_judges_agree_on_500_answers():
    rng = random.Random(0)
    outcomes = Counter()
    disagreements = []
    for item in rng.sample(make_bank(FormularySettings()), 500):
        right = rng.random() < 0.5
        said = item["answer"] if right else rng.choice(list(item["options"].values()))
        text = rng.choice(FORMS).format(said)
        ours = judge(text, item["answer"]).outcome == "true"
        outcomes[ours] += 1
        if agrees(text, item["answer"]) != ours:
            disagreements.append((text, item["answer"]))
    assert not disagreements
    assert min(outcomes.values()) > 100
