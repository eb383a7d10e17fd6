"""Questions to problems: rules, label, reformat; splits; decontamination."""

import asyncio
import json

import pytest

from data_gen.decontaminate import Decontaminator, Item
from data_gen.mcq_bank import open_form, write_mcq_bank
from data_gen.near_duplicates import find_groups
from data_gen.problems import ProblemMaker, parse_json_object, parse_label, reject_by_rule
from data_gen.prompting import load_prompts
from data_gen.records import Mcq, Problem, Rejected, read_records
from data_gen.split import assign_splits
from data_gen.teacher import Unreadable

OPTIONS = {"A": "aspirin", "B": "iron", "C": "ibuprofen"}


def mcq(question="Which drug lowers a child's fever best?", answer_idx="C", **fields):
    record = {"question": question, "options": OPTIONS, "answer_idx": answer_idx}
    answer = OPTIONS[answer_idx] if answer_idx in OPTIONS else "?"
    return Mcq.model_validate({**record, "answer": answer, **fields})


@pytest.mark.parametrize(
    ("question", "fields", "reason"),
    [
        ("Which drug lowers a child's fever best?", {}, None),
        ("With which condition must Velotan not be given?", {}, None),
        ("What must not be taken with Velotan? Pick one of these.", {}, None),
        ("Which drug?", {}, "short question"),
        ("His lungs are normal except for a wheeze. What is the best treatment?", {}, None),
        ("These drugs lower a fever, except one. Which?", {}, "asks for the wrong option"),
        ("All of these lower a fever EXCEPT one: which?", {}, "asks for the wrong option"),
        ("Which of the following is not a drug for fever?", {}, "asks for the wrong option"),
        ("Which statement on fever is incorrect?", {}, "asks for the wrong option"),
        ("Which two drugs lower a child's fever?", {}, "several answers"),
        ("小脳機能の評価に用いる診察はどれか。発熱のない患者である。", {}, None),
        ("小脳機能の評価に用いないのはどれか。次の中から選べ。", {}, "asks for the wrong option"),
        ("この患者の診断に必要性が低い検査はどれか。", {}, "asks for the wrong option"),
        ("痛みのない患者で最初に行う検査として適切な検査はどれか。", {}, None),
        ("小脳の機能を調べる診察として正しいものを2つ選べ。", {}, "several answers"),
        ("下列药物中，最适合给发热儿童服用的药物是哪一种药物？", {}, None),
        ("下列药物中，哪项不能给发热的儿童服用而且没有例外？", {}, "asks for the wrong option"),
        ("下列关于儿童发热用药的说法中，不正确的一项是什么？", {}, "asks for the wrong option"),
        ("Select all drugs that lower a fever.", {}, "several answers"),
        ("Which drug lowers a child's fever best?", {"answer_idx": "E"}, "answer_idx is no option"),
        (
            "Which drug lowers a child's fever best?",
            {"answer": "iron"},
            "answer is not the option of answer_idx",
        ),
        (
            "Which drug lowers a child's fever best?",
            {"options": {**OPTIONS, "C": "All of the above"}, "answer": "All of the above"},
            "several answers",
        ),
    ],
)
def test_rules_reject_what_cannot_have_one_answer(question, fields, reason):
    assert reject_by_rule(mcq(question, **fields), 20) == reason


def make(scripted, reply_filter, reply_reformat, item=None):
    def script(prompt, sample):
        return reply_filter if prompt.startswith("You screen") else reply_reformat

    teacher = scripted(script)
    maker = ProblemMaker(teacher, teacher, load_prompts("en"), 20)
    return asyncio.run(maker.make(item if item is not None else mcq(split="rl", part="x"))), teacher


def reformatted(question="What lowers a child's fever best?", answer="Ibuprofen", **more):
    return json.dumps(
        {"Open-ended Verifiable Question": question, "Ground-True Answer": answer, **more}
    )


def test_a_question_that_passes_is_a_problem_with_its_provenance(scripted):
    problem, teacher = make(scripted, "Pass", reformatted())
    assert isinstance(problem, Problem)
    assert problem.question == "What lowers a child's fever best?"
    assert (problem.answer, problem.split, problem.part) == ("Ibuprofen", "rl", "x")
    assert problem.mcq_id == mcq().id
    assert "A. aspirin\nB. iron\nC. ibuprofen" in teacher.prompts[0]
    assert len(problem.model_dump()["calls"]) == 2


@pytest.mark.parametrize(
    ("label", "reply", "stage", "reason"),
    [
        ("Too Simple", reformatted(), "filter", "Too Simple"),
        (["It does not pass", "bypass"], reformatted(), "filter", "unreadable"),
        ("Pass", ["no JSON", "{"], "reformat", "unreadable"),
        ("Pass", reformatted(more="x"), "reformat", "unreadable"),
        ("Pass", reformatted(answer="aspirin"), "reformat", "answer changed"),
        ("Pass", reformatted(answer=""), "reformat", "unreadable"),
    ],
)
def test_a_question_that_fails_is_rejected_with_stage_and_reason(
    scripted, label, reply, stage, reason
):
    record, _ = make(scripted, label, reply)
    assert isinstance(record, Rejected)
    assert (record.stage, record.reason) == (stage, reason)
    assert record.model_dump()["mcq_id"] == mcq().id


def test_a_repaired_reply_counts(scripted):
    problem, _ = make(scripted, ["Hmm: Pass", "Pass."], ["{", reformatted()])
    assert isinstance(problem, Problem)
    assert len(problem.model_dump()["calls"]) == 4


def test_labels_are_read_whole_and_json_keeps_its_line_breaks():
    assert parse_label(" Pass.\n") == "Pass"
    for text in ("pass", "Pass, since", "does not Pass", ""):
        with pytest.raises(Unreadable):
            parse_label(text)
    assert parse_json_object('```json\n{"a": "x\ny"}\n```') == {"a": "x\ny"}
    for text in ("[1]", '{"a": 1} and more', "[" * 100000):
        with pytest.raises(Unreadable):
            parse_json_object(text)


# --- splits -----------------------------------------------------------------------------------


def test_splits_follow_groups_and_shares_and_not_the_order():
    items = [
        mcq(f"Which drug lowers fever number {i} best?", group=f"g{i // 2}") for i in range(2000)
    ]
    shares = {"search": 0.5, "rl": 0.3, "dev": 0.0, "test": 0.2}
    split = {m.id: m.split for m in assign_splits(items, shares, 0).questions}
    assert split == {m.id: m.split for m in assign_splits(items[::-1], shares, 0).questions}
    assert all(split[a.id] == split[b.id] for a, b in zip(items[::2], items[1::2], strict=True))
    counts = {name: list(split.values()).count(name) / 2000 for name in shares}
    assert all(abs(counts[name] - share) < 0.05 for name, share in shares.items())
    assert counts["dev"] == 0
    assert split != {m.id: m.split for m in assign_splits(items, shares, 1).questions}


def test_a_given_split_stands_and_draws_its_group_along():
    items = [mcq(group="g"), mcq("Which drug thins the blood best?", group="g", split="test")]
    shares = {"search": 1.0, "rl": 0.0, "dev": 0.0, "test": 0.0}
    assert [m.split for m in assign_splits(items, shares, 0).questions] == ["test", "test"]


# --- decontamination --------------------------------------------------------------------------

STEM = (
    "A 34-year-old woman comes to the clinic with two weeks of fever, a dry cough and a rash that "
    "began on her face. She has a cat, drinks well water and came back from the coast a month ago. "
)
TAIL = "Which of the following is the most appropriate next step in the management of this patient?"


@pytest.mark.parametrize("rule", ["coverage", "paper"])
def test_a_stem_that_evaluation_holds_is_found_in_other_dress(rule):
    index = Decontaminator([Item(STEM + TAIL, "x")], rule)
    assert index.find("Here: " + STEM.upper().replace(" ", "\n") + "What next?") is not None
    assert (
        index.find("Another text altogether, long enough to have a good many windows. " * 3) is None
    )


def test_a_common_closing_question_counts_for_the_papers_rule_only():
    other = (
        "A man of 60 has had chest pain since this morning; it rises to the jaw and he sweats. "
        "His father died young and he takes no drugs apart from one for his blood pressure, and "
        "he smokes twenty cigarettes a day, as he has since he left school at the age of sixteen. "
    )
    items = [Item(STEM * 2 + TAIL, "x")]
    assert Decontaminator(items, "paper").find(other + TAIL) is not None
    assert Decontaminator(items, "coverage").find(other + TAIL) is None


def test_short_questions_are_dropped_only_when_question_and_answer_are_equal():
    index = Decontaminator([Item("How many mg per dose of Velotan?", "80 mg")], "paper")
    assert index.find("how many MG per dose of  Velotan?", "80 mg") is not None
    assert index.find("How many mg per dose of Velotan?", "90 mg") is None
    assert index.find("How many mg per dose of Zolutan?", "80 mg") is None


def test_a_short_template_with_another_name_is_kept_and_its_copy_in_a_long_text_is_not():
    rest = "for a child of 39 kg with diabetes. How many mg of it are given per dose?"
    one, other = f"Hiro-tan {rest}", f"Laro-tan {rest}"
    assert Decontaminator([Item(one, "50 mg")], "coverage").find(other, "50 mg") is None
    assert Decontaminator([Item(one, "50 mg")], "coverage").find(one, "50 mg") is not None
    assert Decontaminator([Item(one, "50 mg")], "coverage").find(STEM + one) is not None
    assert Decontaminator([Item(one, "50 mg")], "paper").find(other, "50 mg") is not None


def test_shared_windows_are_those_of_a_brute_force_search():
    import random

    rng = random.Random(0)
    texts = ["".join(rng.choice("ab") for _ in range(60)) for _ in range(40)]
    index = Decontaminator([Item(t) for t in texts[:20]], "paper", window=9)
    for text in texts[20:]:
        shared = [
            i
            for i, item in enumerate(texts[:20])
            if any(text[s : s + 9] in item for s in range(len(text) - 8))
        ]
        hit = index.find(text)
        assert (hit.item if hit else None) == (shared[0] if shared else None)


# --- banks from examination files -------------------------------------------------------------


def test_a_case_series_is_one_group():
    series = [STEM + "What is the diagnosis?", STEM + TAIL, "Quite another question. " + TAIL]
    first, second, third = find_groups(series, [None] * 3, 0.7)
    assert first == second != third
    start = "Mr Brown, a farmer of 50 with gout, comes back to your practice today. "
    third, fourth = find_groups([start + "What now?", start + "Which drug?"], [None] * 2, 0.7)
    assert third == fourth


def test_real_questions_become_disjoint_splits_and_a_teachers_bank(real_data, tmp_path):
    path = real_data / "medqa-usmle" / "phrases_no_exclude_test.jsonl"
    shares = {"search": 0.4, "rl": 0.4, "dev": 0.05, "test": 0.15}
    named = {"source": "medqa", "language": "en", "seed": 0}
    files = write_mcq_bank(path, tmp_path, shares=shares, **named)
    bank = read_records(files["bank"], Mcq)
    evaluation = read_records(files["evaluation"], Mcq)
    assert len(bank) + len(evaluation) == 899
    assert {m.split for m in bank} == {"search", "rl"}
    assert not {m.group for m in bank} & {m.group for m in evaluation}
    assert len({m.group for m in bank + evaluation}) > 800
    known = [json.loads(line) for line in files["teacher_bank"].read_text().splitlines()]
    assert [k["question"] for k in known] == [m.question for m in bank]
    assert sum(reject_by_rule(m, 20) is None for m in bank) > 0.9 * len(bank)


def test_the_open_form_names_no_options():
    assert open_form("He coughs. Which of the following is best?") == "He coughs. What is best?"
