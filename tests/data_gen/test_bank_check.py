"""A team's own bank: reading its file, and what is wrong with it."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import openpyxl
import pytest

from data_gen.bank_check import REASONS, check_bank, chi_squared_p, key_bias
from data_gen.bank_table import Row, read_rows
from data_gen.cli import main
from data_gen.records import Mcq, read_records

DRUGS = ("Velotan", "Maridol", "Sorbex", "Tilazin", "Quenol")
GOOD = {
    "question": "Which drug lowers the pressure of a patient with gout?",
    "A": "Velotan",
    "B": "Maridol",
    "C": "Sorbex",
    "key": "B",
}


def good(number: int, **changes) -> dict:
    """A question unlike the others; a change to None takes the field away."""
    words = f"{DRUGS[number % 5]} after {number} days of fever, {DRUGS[number // 5 % 5]} at night"
    row = {**GOOD, "question": f"Case {number}: {words}. Which drug is to be given?", **changes}
    return {name: value for name, value in row.items() if value is not None}


def check(*rows: dict, **options):
    settings = {"columns": {}, "source": "own", "language": "en", "first_option": 1}
    settings |= {"min_question_chars": 20, "keep": []}
    placed = [Row(f"line {i}", row) for i, row in enumerate(rows, 1)]
    return check_bank(placed, **(settings | options))


def only_reason(*rows: dict, **options) -> str:
    checked = check(*rows, **options)
    assert len(checked.rejected) == 1, checked.rejected
    return checked.rejected[0].reason


# --- reading ----------------------------------------------------------------------------------


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_table(path: Path, rows: list[dict], comma: str) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=comma)
        writer.writeheader()
        writer.writerows(rows)


def write_workbook(path: Path, rows: list[dict]) -> None:
    book = openpyxl.Workbook()
    book.active.append(list(rows[0]))  # type: ignore[union-attr]
    for row in rows:
        book.active.append(list(row.values()))  # type: ignore[union-attr]
    book.create_sheet("empty")
    book.save(path)


WRITERS: dict[str, Callable[[Path, list[dict]], None]] = {
    "a.jsonl": write_jsonl,
    "a.csv": lambda path, rows: write_table(path, rows, ","),
    "b.csv": lambda path, rows: write_table(path, rows, ";"),
    "a.tsv": lambda path, rows: write_table(path, rows, "\t"),
    "a.xlsx": write_workbook,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_bank(tmp_path: Path, name: str):
    rows = [good(1, dose="5 mg; 10 mg"), good(2, C="高血圧, 糖尿病"), good(3, B='a "quoted" word')]
    WRITERS[name](tmp_path / name, [{"dose": "", **row} for row in rows])
    read = read_rows(tmp_path / name)
    checked = check(*(row.values for row in read))
    assert [mcq.question for mcq in checked.mcqs] == [row["question"] for row in rows]
    assert checked.mcqs[0].options == {"A": "Velotan", "B": "Maridol", "C": "Sorbex"}
    assert [mcq.answer for mcq in checked.mcqs] == ["Maridol", "Maridol", 'a "quoted" word']
    assert checked.mcqs[1].options["C"] == "高血圧, 糖尿病"
    assert (checked.mcqs[0].model_extra or {})["dose"] == "5 mg; 10 mg"  # kept as it is


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "b"},
        {"key": "(B)"},
        {"key": "Ｂ．"},
        {"key": 2},
        {"key": 2.0},
        {"key": "Maridol"},
        {"key": None, "answer": "maridol"},
        {"key": None, "answer": "B"},
        {"key": "B", "answer": "Maridol"},
        {"A": None, "B": None, "C": None, "options": {"a": "Velotan", "b": "Maridol"}},
        {"A": None, "B": None, "C": None, "options": '["a. Velotan", "b. Maridol"]'},
        {"A": None, "B": None, "C": None, "options": "A) Velotan\nB) Maridol"},
    ],
)
def test_options_and_keys_are_read_in_many_spellings(changes):
    (mcq,) = check(good(1, **changes)).mcqs
    assert (mcq.answer_idx, mcq.answer) == ("B", "Maridol")


def test_a_key_in_digits_may_count_from_zero():
    (mcq,) = check(good(1, key=1), first_option=0).mcqs
    assert mcq.answer == "Maridol"
    assert only_reason(good(1, key=3), first_option=0) == "key is no option"


def test_columns_are_mapped_by_name():
    row = {"Frage": GOOD["question"], "one": "Velotan", "two": "Maridol", "Lösung": "2"}
    columns = {"question": "Frage", "options.A": "one", "options.B": "two", "answer_idx": "Lösung"}
    (mcq,) = check(row, columns=columns).mcqs
    assert (mcq.options, mcq.answer) == ({"A": "Velotan", "B": "Maridol"}, "Maridol")
    with pytest.raises(ValueError, match=r"no column for question and options .* and answer_idx"):
        check(row)
    with pytest.raises(ValueError, match=r"--column stem: no field; allowed: question, "):
        check(row, columns={"stem": "Frage"})
    with pytest.raises(ValueError, match=r"--column question=frage: no column; the file has"):
        check(row, columns={"question": "frage"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"question": 1}\n{"que', r"line 2: not JSON"),
        ("a.jsonl", b"[1]\n", r"line 1: a question is a JSON object"),
        ("a.jsonl", b"", r"holds no question"),
        ("a.csv", b"question,A,B,key\nx,y\n", r"line 2: not the 4 columns of the first line"),
        ("a.csv", "question,A\nköln,x\n".encode("latin-1"), r"not UTF-8"),
        ("a.xlsx", b"not a zip", r"not an XLSX file"),
        ("a.docx", b"", r"read are \.jsonl, \.csv, \.tsv and \.xlsx"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys, name: str, content: bytes, message: str
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)
    assert main(["check", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_sheet_is_named_or_the_first(tmp_path: Path):
    write_workbook(tmp_path / "a.xlsx", [good(1)])
    assert len(read_rows(tmp_path / "a.xlsx", "Sheet")) == 1
    with pytest.raises(ValueError, match=r"--sheet other: a\.xlsx has the sheets"):
        read_rows(tmp_path / "a.xlsx", "other")


# --- what is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"question": " "}, "no question"),
        ({"key": ""}, "no key"),
        ({"key": "D"}, "key is no option"),
        ({"key": "A, C"}, "several answers"),
        ({"key": "A", "answer": "Maridol"}, "answer is not the option of the key"),
        ({"B": "", "C": ""}, "fewer than two options"),
        ({"A": "Maridol"}, "two options are the same"),
        ({"A": None, "B": None, "C": None, "options": "{broken"}, "options cannot be read"),
        ({"question": "Which drug?"}, "short question"),
        (
            {"question": "All of these lower the pressure EXCEPT which?"},
            "asks for the wrong option",
        ),
        (
            {"question": "次のうち誤っているのはどれか。高血圧の治療について。誤りはどれか"},
            "asks for the wrong option",
        ),
        ({"question": "Select all that apply: drugs that lower pressure"}, "several answers"),
        ({"B": "Both A and C"}, "several answers"),
        ({"B": "All of the above"}, "several answers"),
        (
            {"question": "The smear is shown in the picture. What is the diagnosis?"},
            "needs an image",
        ),
        ({"question": "A radiograph is shown below. Which is the next step?"}, "needs an image"),
        ({"question": "The lesion in Figure 2 belongs to which disease here?"}, "needs an image"),
        (
            {"question": "胸部エックス線写真を別に示す。診断はどれか。患者は発熱している。"},
            "needs an image",
        ),
        ({"question": "患者胸片如图所示，最可能的诊断是什么？请选择一个。"}, "needs an image"),
        ({"image": "ecg.png"}, "needs an image"),
        (
            {"question": "Write to anna.b@clinic.org: which drug is to be given?"},
            "direct identifier: e-mail address",
        ),
        (
            {"question": "See https://clinic.org/p/17 for the patient. Which drug?"},
            "direct identifier: web address",
        ),
        (
            {"question": "A patient logged in from 10.20.30.40. Which drug is given?"},
            "direct identifier: IP address",
        ),
        (
            {"question": "A woman (phone 030-1234-5678) has gout. Which drug is given?"},
            "direct identifier: telephone number",
        ),
        (
            {"question": "A woman, 078-05-1120, has gout since May. Which drug is given?"},
            "direct identifier: social security number",
        ),
        (
            {"question": "Patient ID: 0048812 has had gout since May. Which drug is given?"},
            "direct identifier: record number",
        ),
        (
            {"question": "A man, DOB 03/04/1961, has had gout since May. Which drug?"},
            "direct identifier: date of birth",
        ),
        (
            {"question": "Mrs. Anna Berger has had gout since May. Which drug is given?"},
            "direct identifier: name",
        ),
        (
            {"question": "氏名：山田太郎。痛風の患者に投与する薬剤はどれか。理由も考えよ。"},
            "direct identifier: name",
        ),
    ],
)
def test_what_is_wrong_is_rejected_with_its_reason(changes, reason):
    checked = check(good(1), good(2, **changes))
    assert len(checked.mcqs) == 1
    assert [record.reason for record in checked.rejected] == [reason]


@pytest.mark.parametrize(
    "question",
    [
        "On examination he exhibits a fine tremor in his hands. Which drug is given?",
        "Laboratory results are shown below: Na+ 139 mEq/L, Cl 101 mEq/L. Which drug?",
        "Studies are shown below. Hemoglobin 8.4 g/dL, MCV 70. Which drug is given?",
        "The summary of tests is shown in the following table: Na 139. Which drug?",
        "Blood pressure is 120/80 mmHg, pulse 100-120/min, 2-3 times daily. Which drug?",
        "A study of 10.5 to 20.7 mg in 1,000 patients from 2001-2005. Which drug is given?",
        "The patient presents with Mr. S, her husband, after 12 34 weeks. Which drug?",
        "Dr. Berger of the ward asks: which drug lowers the pressure of a patient?",
        "Which of these is not only a diuretic but lowers the pressure as well, at night?",
    ],
)
def test_what_only_looks_wrong_is_accepted(question: str):
    checked = check(good(1, question=question))
    assert checked.rejected == [] and len(checked.mcqs) == 1


def test_copies_are_rejected_and_contradictions_both():
    copy = {**good(1), "question": good(1)["question"].upper(), "A": "Maridol", "B": "Velotan"}
    checked = check(good(1), {**copy, "key": "A"}, good(2), good(2, key="C"))
    reasons = [(record.reason, record.detail) for record in checked.rejected]
    assert reasons == [
        ("duplicate", "of line 1"),
        ("same question, other key", "line 3, line 4"),
        ("same question, other key", "line 3, line 4"),
    ]
    assert [(mcq.model_extra or {})["place"] for mcq in checked.mcqs] == ["line 1"]
    assert len({record.id for record in checked.rejected}) == 3


def test_a_reason_may_be_kept_and_is_still_counted():
    rows = [good(1), good(2, question="Mrs. Anna Berger has gout since May. Which drug?")]
    checked = check(*rows, keep=["direct identifier: name"])
    assert len(checked.mcqs) == 2 and checked.facts["kept"] == {"direct identifier: name": 1}
    with pytest.raises(ValueError, match=r"--keep names: no reason; allowed: .*; needs an image;"):
        check(*rows, keep=["names"])
    assert len(set(REASONS)) == len(REASONS)


def test_questions_of_one_case_get_one_group():
    note = "A 45-year-old farmer with a long history of gout takes Velotan each morning at home. "
    rows = [good(i, question=note + f"After {i} days he has a fever. Which drug?") for i in (1, 2)]
    checked = check(*rows, good(3))
    groups = [mcq.group for mcq in checked.mcqs]
    assert groups[0] == groups[1] != groups[2]
    assert checked.facts["case_series"] == {"groups": 1, "questions": 2, "largest": 2}


# --- the spread of the keys -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statistic", "freedom", "p"),
    [
        (3.841459, 1, 0.05),
        (5.991465, 2, 0.05),
        (7.814728, 3, 0.05),
        (13.276704, 4, 0.01),
        (15.086272, 5, 0.01),
        (0.0, 3, 1.0),
    ],
)
def test_chi_squared_equals_the_tables(statistic: float, freedom: int, p: float):
    assert chi_squared_p(statistic, freedom) == pytest.approx(p, rel=1e-5)


def test_keys_that_are_mostly_one_letter_or_the_longest_option_are_reported(capsys, tmp_path):
    rows = [good(i, key="C", C="Sorbex, which is longer") for i in range(60)]
    spread = key_bias(check(*rows).mcqs)["3 options"]
    assert spread["by_letter"] == {"A": 0, "B": 0, "C": 60}
    assert spread["p_even"] < 1e-6 and spread["longest"] == 1.0 and spread["chance"] == 0.3333
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert main(["check", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "UNEVEN" in said and "the key is the longest option in 100 %" in said
    even = key_bias(check(*(good(i, key="ABC"[i % 3]) for i in range(60))).mcqs)["3 options"]
    assert even["p_even"] == 1.0 and even["longest"] == 0.0


# --- whole banks ------------------------------------------------------------------------------


def test_the_command_writes_a_bank_that_data_gen_reads(tmp_path: Path, capsys):
    secret = "Mrs. Anna Berger has had gout since May. Which drug is given?"
    write_workbook(tmp_path / "a.xlsx", [good(1), good(2, question=secret), good(3)])
    out = tmp_path / "out"
    assert main(["check", str(tmp_path / "a.xlsx"), "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"] == 3 and facts["accepted"] == 2
    assert facts["rejected"] == {"direct identifier: name": 1}
    assert json.loads((out / "check.json").read_text()) == facts
    assert len(read_records(out / "bank.jsonl", Mcq)) == 2
    assert "Berger" not in (out / "rejected.jsonl").read_text() + (out / "bank.jsonl").read_text()


def test_a_bank_of_which_nothing_is_left_is_exit_code_2(tmp_path: Path, capsys):
    write_jsonl(tmp_path / "a.jsonl", [good(1, key="Z")])
    assert main(["check", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert "no question is left; reasons are in" in capsys.readouterr().err
    assert "key is no option" in (tmp_path / "out/rejected.jsonl").read_text()


@pytest.mark.parametrize(
    ("path", "rows", "accepted"),
    [("medqa-usmle/phrases_no_exclude_test.jsonl", 899, 0.95), ("medmcqa/dev.json", 2913, 0.80)],
)
def test_real_banks_are_read_without_a_map_and_none_is_lost(real_data, path, rows, accepted):
    read = read_rows(real_data / path)
    checked = check(*(row.values for row in read))
    assert len(read) == rows == len(checked.mcqs) + len(checked.rejected)
    assert len(checked.mcqs) >= accepted * rows
