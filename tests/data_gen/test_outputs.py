"""What a run hands over: records, provenance, the published spelling, loadable anywhere."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import yaml

from data_gen.answers import judge
from data_gen.cli import main
from data_gen.mcq_bank import open_form
from data_gen.pipeline import ABLATIONS, FILES
from data_gen.records import (
    Mcq,
    Preference,
    Problem,
    Rejected,
    Sft,
    Trace,
    VerifierSample,
    question_text,
    read_records,
    write_records,
)
from data_gen.search import conclusion_of

PLACES = "Lima Oslo Rome Bern Riga Cairo Kyoto Quito Sofia Delhi Tunis Perth".split()
DRUGS = "aspirin iron zinc codeine heparin insulin lithium digoxin".split()


def questions() -> list[Mcq]:
    """Ninety-six questions in twelve groups, half of them explained by the bank."""
    rows = []
    for i, place in enumerate(PLACES):
        for j, drug in enumerate(DRUGS):
            options = {letter: DRUGS[(j + k) % 8] for k, letter in enumerate("ABCD")}
            row = {"question": f"What did ward {j + 2} of the old {place} hospital give first?"}
            row |= {"options": options, "answer_idx": "A", "answer": drug, "group": place}
            row["split"] = ("search", "rl", "dev", "test")[(0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 3, 3)[i]]
            if j % 2:
                row["explanation"] = f"In {place} they gave {drug}: it was at hand."
            rows.append(Mcq.model_validate({**row, "source": "wards"}))
    return rows


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    bank = questions()
    write_records(folder / "bank.jsonl", bank)
    known = [
        {"kind": "generic", "question": question, "open_question": open_form(mcq.question)}
        | {"answer": mcq.answer, "options": mcq.options}
        for mcq in bank
        for question in (mcq.question, question_text(mcq))
    ]
    write_records(folder / "private.jsonl", known)
    mixed = [
        {"question": mcq.question, "options": mcq.options, "answer_idx": mcq.answer_idx}
        for mcq in bank[:16]
    ]
    write_records(folder / "mixed.jsonl", mixed)
    simulated = {"bank": str(folder / "private.jsonl"), "error_reasoning": 0.7}
    simulated |= {"error_strategy": 0.7, "verifier_false_positive": 0.0}
    config = {
        "bank": str(folder / "bank.jsonl"),
        "out": str(folder / "out"),
        "teacher": {"reasoner": {"simulated": simulated}},
        "search": {"max_depth": 1, "max_restarts": 1, "label_conditioned": True},
        "rewrite": {"direct_share": 0.5, "option_only_share": 0.5, "verifier": "rule_then_teacher"},
        "mix": [{"path": str(folder / "mixed.jsonl"), "source": "wards, with options"}],
        "pairs": {"rejected": ["trace", "sft"], "k": 3},
        "parquet": True,
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    assert main(["run", str(folder / "c.yaml")]) == 0
    return folder / "out"


def test_every_record_names_its_split_its_group_and_its_source(out):
    for name in FILES:
        records = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert records, name
        for record in records:
            assert record["split"] in ("search", "rl", "dev", "test"), (name, record)
            assert record["group"] in PLACES, (name, record)
            assert record["source"] in ("wards", "wards, with options"), (name, record)


def test_no_group_lies_in_two_splits_in_any_file(out):
    split_of: dict[str, str] = {}
    for name in FILES:
        for line in (out / f"{name}.jsonl").read_text().splitlines():
            record = json.loads(line)
            assert split_of.setdefault(record["group"], record["split"]) == record["split"]
    assert set(split_of.values()) == {"search", "rl", "dev", "test"}


def test_held_out_problems_enter_no_training_file(out):
    problems = read_records(out / "problems.jsonl", Problem)
    assert Counter(p.split for p in problems)["test"] >= 10
    for name in set(FILES) - {"problems", "rejected"}:
        for line in (out / f"{name}.jsonl").read_text().splitlines():
            assert json.loads(line)["split"] in ("search", "rl"), name


def test_problems_and_sft_records_carry_the_published_spelling(out):
    for line in (out / "rl.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["Open-ended Verifiable Question"] == record["question"]
        assert record["Ground-True Answer"] == record["answer"]
    for line in (out / "sft.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["Question"] == record["messages"][-1]["content"]
        assert (record["Complex_CoT"], record["Response"]) == (
            record["thinking"],
            record["response"],
        )


def test_mixed_questions_are_asked_searched_and_judged_with_their_options(out):
    problems = read_records(out / "problems.jsonl", Problem)
    own = {p.id: p for p in problems if p.source == "wards, with options"}
    assert len(own) == 16 and all(p.options and p.split == "search" for p in own.values())
    records = [r for r in read_records(out / "sft.jsonl", Sft) if r.problem_id in own]
    assert records
    for record in records:
        problem = own[str(record.problem_id)]
        assert record.messages[0].content == question_text(problem)
        assert "\nA. " in record.messages[0].content
        assert judge(record.response, problem.answer, problem.options).outcome == "true"


def test_a_chain_that_was_told_the_answer_is_tagged_and_verified(out):
    traces = read_records(out / "traces.jsonl", Trace)
    told = [trace for trace in traces if trace.label_conditioned]
    answers = {p.id: p.answer for p in read_records(out / "problems.jsonl", Problem)}
    assert 5 < len(told) < len(traces)
    for trace in told:
        assert trace.strategies[-1] == "label_cot" and trace.verdicts[-1] == "true"
        assert "true" not in trace.verdicts[:-1]
        assert conclusion_of(trace.steps) == answers[trace.problem_id]
    assert all(t.strategies[-1] != "label_cot" for t in traces if not t.label_conditioned)
    tagged = {trace.id for trace in told}
    for line in (out / "sft.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["label_conditioned"] == (record["trace_id"] in tagged)
    report = json.loads((out / "report.json").read_text())
    assert report["rewrite"]["label_conditioned"] == len(told)


def test_verifier_samples_are_the_searchs_verdicts_and_each_conclusion_once(out):
    samples = read_records(out / "verifier.jsonl", VerifierSample)
    assert {sample.label for sample in samples} == {True, False}
    assert len({(s.problem_id, s.conclusion) for s in samples}) == len(samples)
    traces = {t.problem_id: t for t in read_records(out / "traces.jsonl", Trace)}
    rejected = read_records(out / "rejected.jsonl", Rejected)
    lost = {r.problem_id for r in rejected if r.stage == "search"}
    for sample in samples:
        assert sample.label_source == "teacher"
        assert sample.rule == ("true" if sample.conclusion == sample.answer else "false")
        if sample.problem_id in traces:
            trace = traces[sample.problem_id]
            judged = [trace.steps] if sample.label else trace.failed
            assert sample.conclusion in [conclusion_of(steps) for steps in judged]
        else:
            assert sample.problem_id in lost and not sample.label


def test_ablation_sets_are_of_the_same_problems(out):
    sft = read_records(out / "sft.jsonl", Sft)
    reasoning = [record for record in sft if record.kind == "complex_cot"]
    mcqs = {mcq.question: mcq for mcq in questions()}
    for kind in ABLATIONS:
        records = read_records(out / "ablations" / f"{kind}.jsonl", Sft)
        assert {r.problem_id for r in records} == {r.problem_id for r in reasoning}
        assert {record.kind for record in records} == {kind}
        assert all((record.thinking == "") == (kind != "simple_cot") for record in records)
        if kind == "option_only":
            for record in records:
                stem = record.messages[0].content.split("\n")[0]
                assert record.messages[0].content == question_text(mcqs[stem])
                assert record.response == f"A. {mcqs[stem].answer}"
    counts = Counter(record.kind for record in sft)
    assert 0 < counts["direct"] < counts["complex_cot"] > counts["option_only"] > 0
    assert counts["simple_cot"] == 0


def test_the_banks_explanation_stands_above_verified_and_wrong_reasoning(out):
    pairs = read_records(out / "pairs.jsonl", Preference)
    problems = {p.id: p for p in read_records(out / "problems.jsonl", Problem)}
    tiers = Counter((pair.chosen_tier, pair.rejected_tier) for pair in pairs)
    assert set(tiers) == {
        ("ground_truth", "verified"),
        ("ground_truth", "wrong"),
        ("verified", "wrong"),
    }
    for pair in pairs:
        problem = problems[str(pair.problem_id)]
        assert judge(pair.chosen.response, problem.answer, problem.options).outcome == "true"
        if pair.chosen_kind == "ground_truth":
            assert pair.chosen.thinking == (problem.explanation if pair.explain else "")
        if pair.rejected_tier == "wrong":
            rejected = judge(pair.rejected.response, problem.answer, problem.options)
            assert rejected.outcome == "false"
        assert bool(pair.chosen.thinking) == bool(pair.rejected.thinking) == pair.explain
    assert {pair.explain for pair in pairs} == {True, False}


def test_the_report_says_what_both_rules_of_decontamination_found(out):
    report = json.loads((out / "report.json").read_text())
    told = report["decontaminate"]
    assert set(told["dropped_by_rule"]) == {"paper", "coverage"}
    assert told["rule"] == "coverage" and told["evaluation_items"] > 10
    assert report["problems"]["in"] == 96 + 16
    assert report["sources"]["wards, with options"] == 16


# --- other readers ----------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setitem(os.environ, name, "1")
    return {"cache_dir": str(tmp_path / "cache"), "split": "train"}


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_every_file_loads_with_datasets(out, kind, offline):
    from datasets import load_dataset

    suffix = {"json": "jsonl", "parquet": "parquet"}[kind]
    names = [f"{name}.jsonl" for name in FILES] + [f"ablations/{kind}.jsonl" for kind in ABLATIONS]
    for name in names:
        lines = (out / name).read_text().splitlines()
        path = (out / name).with_suffix(f".{suffix}")
        loaded = load_dataset(kind, data_files=str(path), **offline)
        assert len(loaded) == len(lines), name
        assert loaded["id"] == [json.loads(line)["id"] for line in lines]
        assert {"split", "group", "source"} <= set(loaded.column_names)


def test_parquet_holds_what_the_lines_hold(out):
    import pyarrow.parquet

    for name in FILES:
        lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        rows = pyarrow.parquet.read_table(out / f"{name}.parquet").to_pylist()
        for line, row in zip(lines, rows, strict=True):
            if row.get("options") is not None:
                row["options"] = {each["letter"]: each["text"] for each in row["options"]}
            if row.get("difficulty") is not None:
                row["difficulty"] = {each["model"]: each["outcome"] for each in row["difficulty"]}
            assert {key: value for key, value in row.items() if key in line} == line, name


def test_without_pyarrow_parquet_is_refused_before_the_first_call(out, monkeypatch, capsys):
    import sys

    config = out.parent / "c.yaml"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    other = out.parent / "other"
    assert main(["run", str(config), "--set", f"out={other}"]) == 2
    assert "pip install pyarrow" in capsys.readouterr().err
    assert not (other / "journal.sqlite").exists()
