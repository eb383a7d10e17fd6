"""Decontamination against a brute-force search, on planted copies of real questions, in files."""

import gzip
import json
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest

from data_gen.cli import main
from data_gen.decontaminate import COMMON, Decontaminator, Item
from data_gen.decontaminate_files import decontaminate_problems, read_evaluation
from data_gen.records import Mcq, Problem, Rejected, read_records
from data_gen.text_windows import (
    WindowIndex,
    all_window_hashes,
    bare_codes,
    squeeze,
    squeezed_codes,
)

WINDOW = 12


def covered_by_brute_force(text: str, item: str, window: int) -> float:
    """The definition, letter by letter."""
    if len(text) < window or len(item) < window or max(len(text), len(item)) < 2 * window:
        return 0.0
    shorter, longer = sorted((text, item), key=len) if len(text) != len(item) else (text, item)
    marked = [False] * len(shorter)
    for start in range(len(shorter) - window + 1):
        if shorter[start : start + window] in longer:
            marked[start : start + window] = [True] * window
    return sum(marked) / len(shorter)


def random_texts(rng: random.Random, count: int) -> list[str]:
    """Texts of a few stock phrases, so that some windows are far more common than COMMON."""
    phrases = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(5, 40))) for _ in range(6)]
    rare = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(5, 60))) for _ in range(40)]
    texts = []
    for _ in range(count):
        parts = rng.choices(phrases * 8 + rare, k=rng.randint(1, 2))
        parts.append("".join(rng.choice("ijklmnop") for _ in range(rng.choice([60, 250, 600]))))
        rng.shuffle(parts)
        texts.append("".join(parts))
    return texts


@pytest.mark.parametrize("seed", range(3))
def test_both_rules_are_those_of_a_brute_force_search_with_common_windows(seed):
    rng = random.Random(seed)
    texts = random_texts(rng, 240)
    items, asked = texts[:200], texts[200:]
    index = Decontaminator([Item(text, str(i)) for i, text in enumerate(items)], window=WINDOW)
    assert any(view._is_common.any() for view in index._views), COMMON
    found = index.look([Item(text) for text in asked])
    for text, finding in zip(asked, found, strict=True):
        shares = [covered_by_brute_force(text, item, WINDOW) for item in items]
        windows = {text[i : i + WINDOW] for i in range(len(text) - WINDOW + 1)}
        assert (finding.window is not None) == any(w in item for w in windows for item in items)
        assert (finding.coverage is not None) == (max(shares) >= 0.3), (text, max(shares))
        if finding.coverage is not None:
            assert finding.coverage.covered == pytest.approx(shares[finding.coverage.item])
    assert 0 < index.counts["coverage"] < index.counts["paper"] <= len(asked)


def test_the_index_finds_the_windows_that_are_there_and_no_others():
    rng = random.Random(3)
    texts = ["".join(rng.choice("abc") for _ in range(300)) for _ in range(4)]
    index = WindowIndex("\n".join(texts[:2]), squeezed_codes, 7)
    starts, numbers = index.find(squeezed_codes(texts[2] + texts[0][:50]))
    other = texts[2] + texts[0][:50]
    there = {text[i : i + 7] for text in texts[:2] for i in range(294)}
    assert starts.tolist() == [i for i in range(344) if other[i : i + 7] in there]
    joined = "\n".join(texts[:2])
    for start, number in zip(starts.tolist(), numbers.tolist(), strict=True):
        place = index.positions[index.bounds[number]]
        assert joined[place : place + 7] == other[start : start + 7]


def test_equal_windows_have_equal_hashes_wherever_they_stand():
    text = "abcdefghij" * 20_000  # more than one stretch of windows
    hashes = all_window_hashes(squeezed_codes(text), 64)
    assert len(hashes) == len(text) - 63
    assert len(np.unique(hashes)) == 10
    assert (hashes[:-10] == hashes[10:]).all()


def test_squeezing_keeps_the_compatibility_form_of_mixed_texts():
    import unicodedata

    for text in (
        "Ｆｅｖｅｒ ３９",
        "e\u0301 naïve café ½ " + "x" * 200,
        "ｶﾞﾝ検診 ①",
        "A\u00a0 b\u3000c",
    ):
        wanted = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        assert squeeze(text) == wanted


# --- planted copies ---------------------------------------------------------------------------

OTHER_NAMES = {"man": "lady", "woman": "gentleman", "boy": "girl", "girl": "boy", "physician": "GP"}


@pytest.fixture(scope="module")
def medqa(real_data) -> list[Item]:
    path = real_data / "medqa-usmle" / "phrases_no_exclude_test.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Item(record["question"], record["answer"]) for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def index(medqa) -> Decontaminator:
    return Decontaminator(medqa)


def respaced(text: str, rng: random.Random) -> str:
    """Other white space between the words, none after some, and breaks inside long words."""
    out = []
    for word in text.split():
        cut = rng.randrange(1, len(word)) if len(word) > 9 else 0
        out.append(f"{word[:cut]}-\n{word[cut:]}" if cut else word)
        out.append(rng.choice([" ", "  ", "\n", "\t", "\u00a0", ""]))
    return "".join(out)


def renamed(text: str, rng: random.Random) -> str:
    """Other people, of another age."""
    pattern = rf"\b(?:{'|'.join(OTHER_NAMES)})\b"
    text = re.sub(pattern, lambda m: OTHER_NAMES[m[0]], text)
    return re.sub(r"\b\d+(?=-year|-month|-week|-day)", lambda m: str(int(m[0]) + 3), text)


COPIES = {
    "verbatim": lambda text, rng: text,
    "re-spaced": respaced,
    "in capitals": lambda text, rng: text.upper(),
    "names changed": renamed,
}


@pytest.mark.parametrize("kind", COPIES)
def test_every_planted_copy_of_a_real_question_is_found(medqa, index, kind):
    rng = random.Random(0)
    copies = [Item(COPIES[kind](item.question, rng)) for item in medqa]
    missed = [
        item.question
        for item, found in zip(medqa, index.look(copies), strict=True)
        if (found.window is None or found.coverage is None) and len(item.question) >= 128
    ]
    assert missed == []
    assert sum(len(item.question) >= 128 for item in medqa) >= 0.99 * len(medqa)


def test_a_copy_inside_a_long_document_is_found(medqa, index, real_data):
    source = real_data / "openstax-medical" / "nutrition.jsonl.gz"
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line, _ in zip(lines, range(60), strict=False)]
    assert not any(found.coverage for found in index.look([Item(text) for text in documents]))
    planted = [
        Item(f"{text[:2000]} {item.question} {text[2000:]}")
        for text, item in zip(documents, medqa, strict=False)
    ]
    found = [finding.coverage for finding in index.look(planted)]
    assert [hit.item if hit else None for hit in found] == list(range(len(planted)))


def test_half_of_a_real_bank_against_the_other_loses_two_percent_at_most(medqa):
    middle = len(medqa) // 2
    index = Decontaminator(medqa[: middle + 1])
    index.look(medqa[middle + 1 :])
    counts = index.counts
    assert counts["texts"] == 449
    assert counts["coverage"] <= 0.02 * counts["texts"]
    assert counts["paper"] > 10 * counts["coverage"]  # the same texts, by the paper's rule
    commonest = index.commonest(5)
    assert "most appropriate next step" in next(iter(commonest))
    assert list(commonest.values()) == sorted(commonest.values(), reverse=True)
    assert all(len(window) == 64 for window in commonest)


# --- problems and files -----------------------------------------------------------------------

TAIL = (
    "He takes no medicine, drinks two glasses of wine with his supper, has never smoked, and says "
    "that his brother was given a new joint last year. Which is the most likely diagnosis?"
)
STEM = (
    "A farmer of 61 years has had pain in his left knee since the harvest, worse in the evening, "
    "with stiffness for a quarter of an hour after rest and a crackling sound on every bend. "
)


def test_a_problem_that_was_reworded_is_dropped_for_the_question_it_was_made_from():
    mcq = Mcq.model_validate(
        {"question": STEM + "Which is the diagnosis?", "options": {"A": "arthrosis", "B": "gout"}}
        | {"answer_idx": "A", "answer": "arthrosis"}
    )
    short = {"question": "What ails an old farmer's knee?", "answer": "arthrosis", "split": "rl"}
    problem = Problem.model_validate({**short, "mcq_id": mcq.id})
    settings = {"rule": "coverage", "window": 64, "coverage": 0.3}
    evaluation = [Item(STEM + "What is to be done?", "rest")]
    kept, dropped, told = decontaminate_problems([problem], {mcq.id: mcq}, evaluation, **settings)
    assert (kept, len(dropped)) == ([], 1)
    assert told["dropped_by_rule"] == {"paper": 1, "coverage": 1}
    kept, dropped, _ = decontaminate_problems([problem], {}, evaluation, **settings)
    assert (kept, dropped) == ([problem], [])


def test_a_banks_own_held_out_problems_clean_its_training_problems():
    held = Problem.model_validate({"question": STEM, "answer": "arthrosis", "split": "test"})
    near = STEM.replace("farmer", "fisherman")
    training = Problem.model_validate({"question": near, "answer": "arthrosis", "split": "search"})
    kept, [dropped], _ = decontaminate_problems(
        [training, held], {}, [], rule="coverage", window=64, coverage=0.3
    )
    assert kept == [held]
    assert dropped.model_dump()["problem_id"] == training.id


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_command_writes_what_is_kept_and_what_is_dropped_and_says_both_counts(tmp_path, capsys):
    evaluation = write_lines(tmp_path / "e.jsonl", [{"question": STEM + TAIL}])
    closing = STEM[-70:] + "Quite another story follows here, which is long enough. " * 5
    records = [{"id": "a", "text": "x " * 200 + STEM}, {"text": closing}, {"text": "Short."}]
    texts = tmp_path / "t.jsonl.gz"
    with gzip.open(texts, "wt") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)
    out = tmp_path / "kept.jsonl"
    command = ["decontaminate", str(texts), "--evaluation", str(evaluation), "--out", str(out)]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["dropped_by_rule"] == {"paper": 2, "coverage": 1}
    assert (told["texts"], told["kept"], told["rule"]) == (3, 2, "coverage")
    assert (told["evaluation_items"], told["items_shorter_than_a_window"]) == (1, 0)
    assert next(iter(told["commonest_windows"].values())) == 2
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert kept == records[1:]
    [dropped] = read_records(f"{out}.rejected.jsonl", Rejected)
    assert (dropped.reason, dropped.model_dump()["record_id"]) == ("coverage", "a")
    assert main([*command, "--set", "rule=paper"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 1


def test_evaluation_files_of_other_kinds_are_read(tmp_path):
    rows = [
        {"question": "Which is it?", "options": ["gout", "flu"], "answer": "B"},
        {"QUESTION": "Does it help?", "answer": "yes"},
        {"Open-ended Verifiable Question": "What is it?", "Ground-True Answer": "flu"},
        {"problem_text": "どれか。", "choices": ["x"]},
    ]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "b.csv").write_text("id,question,answer\n1,Why?,since\n")
    (tmp_path / "empty.jsonl").write_text("")
    names = ("a.jsonl.gz", "b.csv", "empty.jsonl")
    assert read_evaluation(tmp_path / name for name in names) == [
        Item("Which is it?", "flu"),
        Item("Does it help?", "yes"),
        Item("What is it?", "flu"),
        Item("どれか。", ""),
        Item("Why?", "since"),
    ]
    write_lines(tmp_path / "bad.jsonl", [{"stem": "x"}])
    with pytest.raises(ValueError, match=r"bad.jsonl line 1: an item needs one of question, "):
        read_evaluation([tmp_path / "bad.jsonl"])


@pytest.mark.parametrize(
    ("record", "options", "words"),
    [
        ({"body": "x"}, [], ["t.jsonl line 1", "text, question"]),
        ({"text": "x"}, ["--set", "rul=paper"], ["rul", "did you mean rule?"]),
        ({"text": "x"}, ["--set", "window=4"], ["window", "found 4"]),
        ({"text": "x"}, ["--set", "evaluation=[x]"], ["--evaluation"]),
    ],
)
def test_bad_input_is_one_line(record, options, words, tmp_path, capsys):
    texts = write_lines(tmp_path / "t.jsonl", [record])
    evaluation = write_lines(tmp_path / "e.jsonl", [{"question": STEM}])
    command = ["decontaminate", str(texts), "--evaluation", str(evaluation)]
    assert main([*command, "--out", str(tmp_path / "o.jsonl"), *options]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and all(word in said for word in words), said


# --- speed ------------------------------------------------------------------------------------


def sentences(real_data: Path) -> list[str]:
    texts = []
    for path in sorted((real_data / "openstax-medical").glob("*.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    return texts


@pytest.mark.slow
def test_forty_thousand_problems_against_ten_thousand_items_take_less_than_a_minute(
    medqa, real_data
):
    rng = random.Random(0)
    stock = [s for text in sentences(real_data) for s in re.split(r"(?<=\.)\s+", text)]
    rng.shuffle(stock)
    endings = [item.question.rsplit(". ", 1)[-1] for item in medqa]

    def cases(count: int, own: list[str]) -> list[Item]:
        texts = (" ".join(rng.choices(own, k=rng.randint(3, 8))) for _ in range(count))
        return [Item(f"{text} {rng.choice(endings)}") for text in texts]

    half = len(stock) // 2
    items = [*medqa, *cases(10_000 - len(medqa), stock[:half])]
    problems = cases(40_000, stock[half:])
    start = time.process_time()
    index = Decontaminator(items)
    index.look(problems)
    seconds = time.process_time() - start
    print(f"40,000 x 10,000: {seconds:.1f} s of processor time, {index.counts}")
    assert seconds < 60


@pytest.mark.slow
def test_a_hundred_megabytes_of_text_pass_at_twenty_a_second(medqa, real_data):
    texts = [Item(text) for text in sentences(real_data)]
    size = sum(len(item.question.encode()) for item in texts)
    index = Decontaminator(medqa)
    start, done = time.process_time(), 0
    while done < 100e6:
        index.look(texts)
        done += size
    rate = done / 1e6 / (time.process_time() - start)
    print(f"{rate:.1f} MB of text a second of processor time")
    assert rate >= 20


def test_the_letters_of_a_text_are_the_same_however_it_is_set():
    assert bytes(bare_codes(squeeze("Non-small\u00a0cell (NSCLC)"))) == b"nonsmallcellnsclc"
