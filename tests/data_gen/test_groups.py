"""Groups of questions that belong together, and the splits that keep them together."""

import json
import random
import re

import pytest

from data_gen.near_duplicates import SAME_WINDOW, find_groups
from data_gen.records import Mcq
from data_gen.split import assign_splits
from data_gen.text_windows import bare_codes, squeeze

SHARES = {"search": 0.45, "rl": 0.45, "dev": 0.05, "test": 0.05}
WORDS = (
    "fever cough rash pain heart liver blood dose child woman man week month pressure culture "
    "biopsy lesion nausea weight loss history smoke clinic doctor night left right arm chest "
    "sugar water sodium sleep walk fall joint knee nerve brain colon kidney lung skin eye"
).split()


def story(rng: random.Random, words: int = 60) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def groups_of(questions, named=None, similarity=0.7):
    return find_groups(questions, named or [None] * len(questions), similarity)


def reworded(text: str, rng: random.Random, share: float) -> str:
    return " ".join(rng.choice(WORDS) if rng.random() < share else w for w in text.split())


def jaccard(one: str, other: str) -> float:
    """The definition, without hashes."""
    sets = []
    for text in (one, other):
        codes = bytes(bare_codes(squeeze(text)))
        sets.append({codes[i : i + 5] for i in range(len(codes) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_near_duplicates_are_those_of_a_brute_force_comparison():
    rng = random.Random(0)
    originals = [story(rng) for _ in range(60)]
    questions = [*originals, *(reworded(text, rng, 0.08) for text in originals)]
    groups = groups_of(questions)
    close = 0
    for i, one in enumerate(questions):
        for j in range(i):
            alike = jaccard(one, questions[j])
            if alike >= 0.75:
                close += 1
                assert groups[i] == groups[j], alike
            elif alike < 0.6:
                assert groups[i] != groups[j], alike
    assert close >= 20
    assert 60 <= len(set(groups)) < 120


def test_a_shared_stretch_makes_one_group_wherever_it_stands():
    rng = random.Random(1)
    for _ in range(30):
        note = story(rng, 40)[: SAME_WINDOW + 40]
        one = f"{story(rng, 100)} {note} {story(rng, 80)}"
        other = f"{story(rng, 90)} {note} {story(rng, 120)}"
        first, second, third = groups_of([one, other, story(rng, 100)])
        assert first == second != third


def test_groups_do_not_depend_on_the_order_of_the_bank():
    rng = random.Random(2)
    originals = [story(rng) for _ in range(80)]
    questions = [*originals, *(reworded(text, rng, 0.05) for text in originals[:40])]
    named = [f"case {i % 7}" if i % 5 == 0 else None for i in range(len(questions))]
    found = dict(zip(questions, groups_of(questions, named), strict=True))
    for seed in range(3):
        order = list(range(len(questions)))
        random.Random(seed).shuffle(order)
        again = groups_of([questions[i] for i in order], [named[i] for i in order])
        assert dict(zip((questions[i] for i in order), again, strict=True)) == found


def test_questions_of_two_named_groups_are_left_apart_and_a_free_one_joins():
    text = story(random.Random(3))
    assert groups_of([text, text + " x"], ["a", "b"]) == ["a", "b"]
    other = story(random.Random(5))
    assert groups_of([text, f"x y {text}", other], ["a", "b", None])[:2] == ["a", "b"]
    assert groups_of([text, text + " x"], ["a", None]) == ["a", "a"]
    assert len(set(groups_of([text, text + " x"]))) == 1


def test_a_stricter_similarity_joins_less():
    rng = random.Random(4)
    text = story(rng)
    other = reworded(text, rng, 0.12)
    assert 0.5 < jaccard(text, other) < 0.85
    assert len(set(groups_of([text, other], similarity=0.45))) == 1
    assert len(set(groups_of([text, other], similarity=0.95))) == 2


def test_real_questions_form_small_groups(real_data):
    path = real_data / "medqa-usmle" / "phrases_no_exclude_test.jsonl"
    questions = [json.loads(line)["question"] for line in path.read_text().splitlines()]
    groups = groups_of(questions)
    sizes = sorted((groups.count(group) for group in set(groups)), reverse=True)
    assert len(sizes) > 850 and sizes[0] <= 5
    aged = [re.sub(r"\b(\d+)-year", lambda m: f"{int(m[1]) + 2}-year", q) for q in questions[:60]]
    both = groups_of([*questions, *aged])
    assert both[len(questions) :] == both[:60]


# --- splits -----------------------------------------------------------------------------------


def bank(count: int, size: int = 2) -> list[Mcq]:
    rows = ({"question": f"q{i}", "group": f"g{i // size}"} for i in range(count))
    return [
        Mcq.model_validate({"options": {"A": "x"}, "answer_idx": "A", "answer": "x", **row})
        for row in rows
    ]


def counts_of(questions) -> dict[str, int]:
    splits = [question.split for question in questions]
    return {name: splits.count(name) for name in SHARES}


def test_dev_and_test_reach_their_least_size_and_training_keeps_its_proportion():
    questions, notes = assign_splits(bank(2000), SHARES, 0, {"dev": 200, "test": 200})
    counts = counts_of(questions)
    assert notes == []
    assert counts["dev"] >= 220 and counts["test"] >= 220  # a tenth to spare
    assert counts["dev"] <= 225 and counts["test"] <= 225
    assert abs(counts["search"] - counts["rl"]) < 0.1 * 2000
    again = assign_splits(bank(2000)[::-1], SHARES, 0, {"dev": 200, "test": 200}).questions
    assert {q.id: q.split for q in again} == {q.id: q.split for q in questions}
    of_group = {}
    assert all(of_group.setdefault(q.group, q.split) == q.split for q in questions)


def test_a_large_bank_keeps_the_shares_and_a_small_one_says_that_it_is_too_small():
    counts = counts_of(assign_splits(bank(20_000), SHARES, 0, {"dev": 200, "test": 200}).questions)
    assert all(abs(counts[name] / 20_000 - share) < 0.01 for name, share in SHARES.items())
    small = assign_splits(bank(600), SHARES, 0, {"dev": 200, "test": 200})
    assert small.notes == [
        "600 questions are too few for 200 dev and 200 test questions: the shares stand"
    ]
    assert counts_of(small.questions)["test"] < 60


@pytest.mark.parametrize("least", [None, {"dev": 0, "test": 0}, {"dev": 200}])
def test_a_split_with_no_share_gets_nothing(least):
    shares = {"search": 0.5, "rl": 0.5, "dev": 0.0, "test": 0.0}
    counts = counts_of(assign_splits(bank(2000), shares, 0, least).questions)
    assert counts["dev"] == counts["test"] == 0
