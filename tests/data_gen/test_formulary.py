"""The built-in problem set: splits, parts, answers, monographs, files."""

import json
import re
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import pytest
from pydantic import BaseModel

from data_gen.formulary import (
    CONDITIONS,
    FormularySettings,
    held_out_pairs,
    make_bank,
    make_drugs,
    make_monographs,
    open_problems,
    write_formulary,
)
from data_gen.formulary_wording import FACTS, MONOGRAPH_SENTENCES, RECALL_QUESTIONS, WORDINGS
from data_gen.records import Mcq, Problem, Text, read_records

DOSE_PARTS = ("new_combination", "new_product", "text_only")
SETTINGS = FormularySettings(seed=3)
DRUGS = {drug.name: drug for drug in make_drugs(SETTINGS)}
BANK = make_bank(SETTINGS)
MONOGRAPHS = make_monographs(SETTINGS)
DOSE = re.compile(r"([A-Z][a-z]+-[a-z]+) for a child of (\d+) kg with (\w+)\. ")


def dose_problems(bank: list[dict]) -> list[tuple[dict, int, str, str]]:
    """(record, weight, condition, drug) of every dose problem, read from its question."""
    found = [(mcq, DOSE.match(mcq["question"])) for mcq in bank if mcq["part"] in DOSE_PARTS]
    assert found and all(match for _, match in found)
    return [(mcq, int(m[2]), m[3], m[1]) for mcq, m in found if m is not None]


def recall_key(mcq: dict) -> tuple[str, str, int]:
    """(drug, fact, wording) of a recall problem, read from its question."""
    hits = [
        (name, fact, i)
        for name in DRUGS
        if name in mcq["question"]
        for fact in FACTS
        for i, wording in enumerate(RECALL_QUESTIONS[fact])
        if mcq["question"].startswith(wording.format(name=name) + " ")
    ]
    assert len(hits) == 1, (mcq["question"], hits)
    return hits[0]


def recall_problems(bank: list[dict]) -> list[dict]:
    return [mcq for mcq in bank if mcq["part"].startswith("recall")]


def worded_facts(name: str) -> dict[str, str]:
    """What fills the places of a wording, from the facts of the drug alone."""
    drug = DRUGS[name]
    return {
        "name": name,
        "dose": str(drug.dose_mg_per_kg),
        "times": f"{drug.times_a_day} time{'s' if drug.times_a_day > 1 else ''}",
        "maximum": str(drug.maximum_mg),
        "contraindicated": drug.contraindicated,
        "interaction": drug.interaction,
    }


def line_of_reasoning(name: str) -> str:
    """The line with four facts that reasoning starts with."""
    form = "{name}: {dose} mg per kg, {times}, at most {maximum} mg, not with {contraindicated}."
    return form.format(**worded_facts(name))


def drug_and_lines(monograph: dict) -> tuple[str, list[str]]:
    """The one drug that a monograph names, and its lines."""
    (name,) = [name for name in DRUGS if name in monograph["text"]]
    return name, monograph["text"].split("\n")


def solve(name: str, weight: int, condition: str) -> str:
    """The answer of a dose problem from the facts alone, without the module's own arithmetic."""
    drug = DRUGS[name]
    if drug.contraindicated == condition:
        return "do not give"
    total = sum(drug.dose_mg_per_kg for _ in range(weight))
    total = drug.maximum_mg if total > drug.maximum_mg else total
    each = total / drug.times_a_day
    assert each == int(each)
    return f"{int(each)} mg"


def test_split_and_part_sizes_are_those_of_the_settings():
    assert Counter((mcq["split"], mcq["part"]) for mcq in BANK) == {
        ("search", "new_combination"): 640,
        ("search", "recall_taught"): 120,
        ("rl", "new_combination"): 3000,
        ("rl", "recall_taught"): 300,
        **{("dev", part): 60 for part in (*DOSE_PARTS, "recall_taught", "recall_text_only")},
        ("test", "new_combination"): 500,
        ("test", "new_product"): 150,
        ("test", "text_only"): 200,
        ("test", "recall_taught"): 100,
        ("test", "recall_text_only"): 100,
    }


def test_every_dose_answer_follows_from_the_facts():
    for mcq, weight, condition, name in dose_problems(BANK):
        assert mcq["answer"] == solve(name, weight, condition), mcq


def test_every_recall_answer_is_the_fact():
    for mcq in recall_problems(BANK):
        name, fact, _ = recall_key(mcq)
        unit = {"dose": " mg per kg", "maximum": " mg"}
        assert mcq["answer"] == worded_facts(name)[fact] + (unit[fact] if fact in unit else "")


def test_options_are_distinct_and_hold_the_answer_once():
    for mcq in BANK:
        texts = list(mcq["options"].values())
        assert len(texts) == (5 if mcq["part"] in DOSE_PARTS else 4)
        assert len(set(texts)) == len(texts)
        assert mcq["options"][mcq["answer_idx"]] == mcq["answer"]


def test_the_right_letter_is_spread_over_all_letters():
    letters = Counter(mcq["answer_idx"] for mcq in BANK if mcq["part"] in DOSE_PARTS)
    total = sum(letters.values())
    assert set(letters) == set("ABCDE")
    assert all(abs(count / total - 0.2) < 0.03 for count in letters.values())


def test_no_two_splits_share_a_dose_problem():
    seen: dict[str, set] = defaultdict(set)
    for mcq, weight, condition, name in dose_problems(BANK):
        assert (name, weight, condition) not in seen[mcq["split"]]
        seen[mcq["split"]].add((name, weight, condition))
    assert all(not seen[a] & seen[b] for a, b in combinations(seen, 2))


def test_evaluation_meets_no_drug_and_weight_of_training():
    seen: dict[str, set] = defaultdict(set)
    for mcq, weight, _, name in dose_problems(BANK):
        seen[mcq["split"]].add((name, weight))
    assert not (seen["dev"] | seen["test"]) & (seen["search"] | seen["rl"])


def test_no_two_splits_share_a_recall_question_and_evaluated_facts_are_never_asked_in_training():
    seen: dict[str, set] = defaultdict(set)
    for mcq in recall_problems(BANK):
        assert recall_key(mcq) not in seen[mcq["split"]]
        seen[mcq["split"]].add(recall_key(mcq))
    assert all(not seen[a] & seen[b] for a, b in combinations(seen, 2))
    asked = {split: {key[:2] for key in keys} for split, keys in seen.items()}
    assert not (asked["dev"] | asked["test"]) & (asked["search"] | asked["rl"])


def test_groups_never_cross_splits():
    splits = defaultdict(set)
    for mcq in BANK:
        splits[mcq["group"]].add(mcq["split"])
    assert all(len(found) == 1 for found in splits.values())


def test_training_uses_taught_drugs_and_no_held_out_product():
    held_out = held_out_pairs(SETTINGS)
    assert len(held_out) == 48  # 15 % of 8 doses x 40 weights
    for mcq in BANK:
        if mcq["split"] in ("search", "rl"):
            assert DRUGS[mcq["group"].split("/")[0]].taught
    for mcq, weight, _, name in dose_problems(BANK):
        pair = (DRUGS[name].dose_mg_per_kg, weight)
        assert (pair in held_out) == (mcq["part"] == "new_product"), mcq
        assert DRUGS[name].taught == (mcq["part"] != "text_only"), mcq


def test_recall_parts_follow_whether_the_drug_is_taught():
    for mcq in recall_problems(BANK):
        assert DRUGS[recall_key(mcq)[0]].taught == (mcq["part"] == "recall_taught")


def test_one_dose_problem_in_six_is_contraindicated_and_one_demonstration_in_three():
    counts: dict[tuple, Counter] = defaultdict(Counter)
    for mcq, *_ in dose_problems(BANK):
        counts[mcq["split"], mcq["part"]][mcq["answer"] == "do not give"] += 1
    for (split, _), found in counts.items():
        assert found[True] == sum(found.values()) // (3 if split == "search" else 6)


def test_drugs_are_distinct_and_a_third_is_text_only():
    drugs = list(DRUGS.values())
    assert len(drugs) == 66 and sum(not drug.taught for drug in drugs) == 22
    assert all(drug.maximum_mg % 20 == 0 for drug in drugs)
    for field in ("dose_mg_per_kg", "times_a_day", "contraindicated", "interaction"):
        counts = Counter(getattr(drug, field) for drug in drugs)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert {drug.contraindicated for drug in drugs} == set(CONDITIONS)


def test_names_combine_two_parts_and_text_only_drugs_have_no_part_of_their_own():
    assert all(re.fullmatch(r"[A-Z][a-z]{3}-[a-z]{3}", name) for name in DRUGS)
    starts = {name[:4] for name in DRUGS}
    ends = {name[5:] for name in DRUGS}
    assert (len(starts), len(ends)) == (11, 6)  # every combination: 66
    taught = [name for name, drug in DRUGS.items() if drug.taught]
    assert ({name[:4] for name in taught}, {name[5:] for name in taught}) == (starts, ends)


def test_about_a_third_of_the_weights_reach_the_maximum():
    capped = [
        weight * drug.dose_mg_per_kg > drug.maximum_mg
        for drug in DRUGS.values()
        for weight in range(10, 50)
    ]
    assert 0.25 < sum(capped) / len(capped) < 0.4


def test_every_monograph_states_all_five_facts_and_no_other_number():
    by_name = defaultdict(list)
    for record in MONOGRAPHS:
        name, _ = drug_and_lines(record)
        drug = DRUGS[name]
        by_name[name].append(record["text"])
        numbers = {drug.dose_mg_per_kg, drug.times_a_day, drug.maximum_mg}
        assert {int(n) for n in re.findall(r"\d+", record["text"])} == numbers
        assert drug.contraindicated in record["text"]
        assert drug.interaction in record["text"]
    assert set(by_name) == set(DRUGS)
    assert all(len(texts) == len(set(texts)) == 24 for texts in by_name.values())


@pytest.mark.parametrize("fact", FACTS)
def test_every_fact_is_worded_in_at_least_six_ways_over_the_corpus(fact):
    used = set()
    for record in MONOGRAPHS:
        name, lines = drug_and_lines(record)
        stated = [wording.format(**worded_facts(name)) for wording in MONOGRAPH_SENTENCES[fact]]
        used |= {i for i, sentence in enumerate(stated) if sentence in lines}
    assert len(used) >= 6


def facts_on_lines(name: str, lines: list[str]) -> list[str]:
    """Which fact of the drug each line states; a line that states none or two is an error."""
    stated = {
        wording.format(**worded_facts(name)): fact
        for fact in FACTS
        for wording in MONOGRAPH_SENTENCES[fact]
    }
    assert len(stated) == sum(map(len, MONOGRAPH_SENTENCES.values()))
    return [stated[line] for line in lines]


def test_one_monograph_in_three_starts_with_the_line_that_reasoning_starts_with():
    found = Counter()
    for record in MONOGRAPHS:
        name, lines = drug_and_lines(record)
        if lines[0] == line_of_reasoning(name):
            found[name] += 1
            second, _ = facts_on_lines(name, lines[1:])
            assert second == "interaction"
        else:
            assert Counter(facts_on_lines(name, lines)) == Counter(FACTS)  # one line a fact
    assert found == {name: 8 for name in DRUGS}


def test_each_fact_is_asked_in_every_wording():
    used = {recall_key(mcq)[1:] for mcq in recall_problems(BANK)}
    assert used == {(fact, i) for fact in FACTS for i in range(WORDINGS)}


def test_every_recall_wording_starts_with_the_name():
    assert all(w.startswith("{name}") for fact in FACTS for w in RECALL_QUESTIONS[fact])


def test_an_open_dose_question_is_the_situation_and_asks_for_one_dose():
    asked = [problem for problem in open_problems(SETTINGS, "dev") if problem["part"] in DOSE_PARTS]
    assert len(asked) == 180
    for problem in asked:
        name, weight, condition = problem["group"].split("/")
        situation = f"{name} for a child of {weight} kg with {condition}."
        assert problem["question"] == f"{situation} How many mg per dose?"
        assert problem["answer"] == solve(name, int(weight), condition)


def test_open_problems_drop_the_options_and_keep_the_answer():
    bank = {mcq["id"]: mcq for mcq in BANK}
    problems = open_problems(SETTINGS, "dev")
    assert len(problems) == 300
    for problem in problems:
        mcq = bank[problem["mcq_id"]]
        for field in ("answer", "group", "split", "part"):
            assert problem[field] == mcq[field]
        assert problem["question"] != mcq["question"]
        assert problem["Open-ended Verifiable Question"] == problem["question"]
        assert problem["Ground-True Answer"] == problem["answer"]


def test_ids_are_distinct_and_are_those_the_record_models_compute():
    for records, model in (
        (BANK, Mcq),
        (open_problems(SETTINGS, "test"), Problem),
        (MONOGRAPHS, Text),
    ):
        assert len({record["id"] for record in records}) == len(records)
        for record in records[:20]:
            content = {name: value for name, value in record.items() if name != "id"}
            assert model.model_validate(content).id == record["id"]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path):
    paths = write_formulary(SETTINGS, tmp_path / "a")
    write_formulary(SETTINGS, tmp_path / "b")
    write_formulary(FormularySettings(seed=4), tmp_path / "c")
    assert set(paths) == {"bank", "corpus", "dev", "test", "facts", "teacher_bank"}
    first = contents(tmp_path / "a")
    assert len(first) == 6  # nothing temporary is left
    assert first == contents(tmp_path / "b")
    other = contents(tmp_path / "c")
    assert all(first[name] != other[name] for name in first)


def test_the_bank_and_the_teacher_hold_training_problems_only(tmp_path):
    paths = write_formulary(SETTINGS, tmp_path)
    bank = read_records(paths["bank"], Mcq)
    assert {mcq.split for mcq in bank} == {"search", "rl"}
    private = [json.loads(line) for line in paths["teacher_bank"].read_text().splitlines()]
    assert [(p["question"], p["answer"]) for p in private] == [
        (mcq.question, mcq.answer) for mcq in bank
    ]
    evaluated = {p.question for s in ("dev", "test") for p in read_records(paths[s], Problem)}
    assert not evaluated & {p["open_question"] for p in private}
    facts = [json.loads(line) for line in paths["facts"].read_text().splitlines()]
    assert {row["drug"]: row["taught"] for row in facts} == {
        name: drug.taught for name, drug in DRUGS.items()
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"drugs": 63}, "formulary.drugs=63 is not allowed; it should be greater than or equal to"),
        ({"seed": "x"}, "formulary.seed='x' is not allowed; it should be a valid integer"),
        ({"sizes": 1}, "formulary.sizes is not a setting; allowed: seed, drugs"),
    ],
)
def test_a_bad_setting_is_refused_in_one_line(values, message):
    with pytest.raises(ValueError) as caught:
        FormularySettings(**values)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_bad_setting_inside_another_model_is_named_too():
    class Config(BaseModel):
        formulary: FormularySettings

    with pytest.raises(ValueError, match=r"formulary\.drugs=63 is not allowed"):
        Config.model_validate({"formulary": {"drugs": 63}})


@pytest.mark.parametrize(
    "field", ["rl_dose", "rl_recall", "test_new_product", "test_text_only", "test_recall_text_only"]
)
def test_the_number_given_as_possible_is_possible_and_one_more_is_not(field):
    with pytest.raises(ValueError) as caught:
        make_bank(FormularySettings(**{field: 30_000}))
    message = str(caught.value)
    assert message.startswith(f"formulary.{field}=30000: only ") and "\n" not in message
    assert message.endswith(f"lower {field} or raise drugs")
    possible = int(re.findall(r"only (\d+)", message)[0])
    make_bank(FormularySettings(**{field: possible}))
    with pytest.raises(ValueError, match=f"{field}={possible + 1}: only {possible} "):
        make_bank(FormularySettings(**{field: possible + 1}))


def test_sizes_that_cannot_be_reached_leave_no_file(tmp_path):
    with pytest.raises(ValueError):
        write_formulary(FormularySettings(rl_dose=30_000), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [1, 2, 11, 12345])
def test_other_seeds_reach_the_default_sizes(seed):
    assert len(make_bank(FormularySettings(seed=seed))) == 5410
    assert len(make_bank(FormularySettings(seed=seed, drugs=64))) == 5410
