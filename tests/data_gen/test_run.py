"""`data-gen run` as a user starts it: faults, kills, concurrency, exit codes."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from data_gen.answers import accuracy_interval, has_think_format, judge
from data_gen.cli import main
from data_gen.config import load_config
from data_gen.endpoints import run_simulated
from data_gen.formulary import FormularySettings, write_formulary
from data_gen.journal import Journal
from data_gen.pipeline import FILES, run_search
from data_gen.records import Mcq, Preference, Problem, Rejected, Sft, Trace, read_records
from data_gen.search import conclusion_of

SIZES = {"search_dose": 16, "search_recall": 4, "rl_dose": 16, "rl_recall": 4, "dev_per_part": 4}
SIZES |= {"test_new_combination": 6, "test_new_product": 6, "test_text_only": 6}
SIZES |= {"test_recall_taught": 6, "test_recall_text_only": 6, "monographs_per_drug": 4}
FAULTS = {"fault_429": 0.1, "fault_500": 0.1, "fault_json": 0.1, "retry_after_seconds": 0.01}
ERRORS = {"error_reasoning": 0.5, "error_filter": 0.05, "error_rewrite": 0.1}


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("formulary")
    write_formulary(FormularySettings(**SIZES), folder)
    return folder


def write_config(path: Path, bank: Path, **fields) -> Path:
    simulated = {"bank": str(bank / "private" / "teacher_bank.jsonl"), **FAULTS, **ERRORS}
    config = {
        "bank": str(bank / "bank.jsonl"),
        "out": str(path.parent / "out"),
        "concurrency": 8,
        "teacher": {"reasoner": {"simulated": simulated}},
        "retries": {"attempts": 10, "first_wait": 0.01, "longest_wait": 0.05},
        "decontamination": {"evaluation": [str(bank / "dev.jsonl"), str(bank / "test.jsonl")]},
    }
    path.write_text(yaml.safe_dump({**config, **fields}))
    return path


def outputs(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in [f"{n}.jsonl" for n in FILES]} | {
        "report.json": (folder / "report.json").read_bytes()
    }


@pytest.fixture(scope="module")
def finished(bank, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert main(["run", str(write_config(folder / "c.yaml", bank))]) == 0
    return folder / "out"


def test_every_question_of_the_bank_is_a_problem_or_rejected(bank, finished):
    ids = [mcq.id for mcq in read_records(bank / "bank.jsonl", Mcq)]
    problems = read_records(finished / "problems.jsonl", Problem)
    rejected = read_records(finished / "rejected.jsonl", Rejected)
    early = [r for r in rejected if r.stage not in ("search", "rewrite")]
    assert len(ids) == 40
    assert sorted(
        [p.mcq_id for p in problems] + [r.model_dump()["mcq_id"] for r in early]
    ) == sorted(ids)


def test_every_searched_problem_is_trained_on_or_rejected(finished):
    problems = read_records(finished / "problems.jsonl", Problem)
    searched = {p.id for p in problems if p.split == "search"}
    traces = read_records(finished / "traces.jsonl", Trace)
    sft = [r for r in read_records(finished / "sft.jsonl", Sft) if r.kind == "complex_cot"]
    rejected = read_records(finished / "rejected.jsonl", Rejected)
    lost = [r.model_dump()["problem_id"] for r in rejected if r.stage in ("search", "rewrite")]
    assert sorted([r.problem_id for r in sft] + lost) == sorted(searched)
    assert {t.problem_id for t in traces} >= {r.problem_id for r in sft}
    assert len(sft) > 10
    assert any(trace.failed for trace in traces)


def test_training_records_carry_right_answers_in_the_think_format(finished):
    answers = {p.id: p.answer for p in read_records(finished / "problems.jsonl", Problem)}
    for record in read_records(finished / "sft.jsonl", Sft):
        text = f"## Thinking\n\n{record.thinking}\n\n## Final Response\n\n{record.response}"
        assert has_think_format(text)
        assert judge(text, answers[record.problem_id]).outcome == "true"
    pairs = read_records(finished / "pairs.jsonl", Preference)
    assert pairs
    for pair in pairs:
        assert judge(pair.chosen.response, answers[pair.problem_id]).outcome == "true"
        assert judge(pair.rejected.response, answers[pair.problem_id]).outcome == "false"


def test_every_file_is_ordered_by_id(finished):
    for name in FILES:
        lines = (finished / f"{name}.jsonl").read_text().splitlines()
        ids = [json.loads(line)["id"] for line in lines]
        assert ids == sorted(ids), name


def test_a_traces_calls_are_all_in_the_journal(finished):
    journal = Journal(finished / "journal.sqlite")
    for trace in read_records(finished / "traces.jsonl", Trace):
        assert trace.calls
        assert all(journal.find(key) is not None for key in trace.calls)
    journal.close()


def test_the_report_counts_what_the_files_hold(finished):
    report = json.loads((finished / "report.json").read_text())
    lines = {n: len((finished / f"{n}.jsonl").read_text().splitlines()) for n in FILES}
    stages = ("problems", "decontaminate", "search", "rewrite")
    assert report["problems"]["in"] == 40
    assert report["decontaminate"]["accepted"] == lines["problems"]
    assert report["search"]["accepted"] == lines["traces"]
    assert sum(report["rewrite"]["records"].values()) == lines["sft"]
    assert report["pairs"]["accepted"] == lines["pairs"]
    assert report["splits"]["rl"] == lines["rl"]
    assert sum(sum(report[s]["rejected"].values()) for s in stages) == lines["rejected"]
    attempts = report["search"]["by_attempt"]
    assert sum(a["accepted"] for a in attempts.values()) == lines["traces"]
    assert report["wrong_accepted"]["of"] == lines["sft"]
    assert report["verifier_accepted_wrong"]["of"] == lines["traces"]


def test_what_the_verifier_let_pass_and_what_is_trained_on_are_counted_apart(bank, tmp_path):
    simulated = {"bank": str(bank / "private" / "teacher_bank.jsonl"), **ERRORS}
    simulated["verifier_false_positive"] = 0.5
    rewrite = {"direct_share": 0.5}
    teacher = {"reasoner": {"simulated": simulated}}
    config = write_config(tmp_path / "c.yaml", bank, teacher=teacher, rewrite=rewrite)
    assert main(["run", str(config)]) == 0
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    keys = {mcq.id: mcq.answer for mcq in read_records(bank / "bank.jsonl", Mcq)}
    problems = {p.id: keys[p.mcq_id] for p in read_records(out / "problems.jsonl", Problem)}
    traces = read_records(out / "traces.jsonl", Trace)
    ends = [(conclusion_of(trace.steps), problems[trace.problem_id]) for trace in traces]
    wrong = sum(judge(end, key).outcome != "true" for end, key in ends)
    assert wrong > 0
    low, high = accuracy_interval(wrong, len(traces))
    verifier = {"wrong": wrong, "of": len(traces), "interval95": [low, high]}
    assert report["verifier_accepted_wrong"] == verifier
    assert report["wrong_accepted_share"] == 0.0  # the last rule check took them out
    records = len((out / "sft.jsonl").read_text().splitlines())
    assert (report["wrong_accepted"]["wrong"], report["wrong_accepted"]["of"]) == (0, records)


def test_a_record_that_the_banks_key_contradicts_is_counted_as_wrong(bank, tmp_path):
    config = str(write_config(tmp_path / "c.yaml", bank))
    assert main(["problems", config]) == 0
    problems = tmp_path / "out" / "problems.jsonl"
    records = [json.loads(line) for line in problems.read_text().splitlines()]
    searched = {record["mcq_id"] for record in records if record["split"] == "search"}
    other = tmp_path / "bank.jsonl"
    with open(other, "w") as lines:
        for mcq in read_records(bank / "bank.jsonl", Mcq):
            key = "999 mg" if mcq.id in searched else mcq.answer
            lines.write(mcq.model_copy(update={"answer": key}).model_dump_json() + "\n")
    found = asyncio.run(run_search(load_config(Path(config), [f"bank={other}"])))
    records = len((tmp_path / "out" / "sft.jsonl").read_text().splitlines())
    assert found["wrong_accepted"]["wrong"] == found["wrong_accepted"]["of"] == records > 0
    assert found["wrong_accepted_share"] == 1.0


@pytest.mark.parametrize("concurrency", [1, 40])
def test_outputs_are_the_same_bytes_whatever_the_concurrency(bank, finished, tmp_path, concurrency):
    config = write_config(tmp_path / "c.yaml", bank)
    assert main(["run", str(config), "--set", f"concurrency={concurrency}"]) == 0
    assert outputs(tmp_path / "out") == outputs(finished)


def test_a_finished_run_is_recognised_and_another_seed_is_not(
    bank, finished, tmp_path, monkeypatch
):
    from data_gen import pipeline

    config = write_config(tmp_path / "c.yaml", bank, out=str(finished))

    async def refuse(*_):
        raise RuntimeError("the run started")

    monkeypatch.setattr(pipeline, "_run", refuse)
    assert main(["run", str(config)]) == 0
    assert main(["run", str(config), "--set", "seed=1"]) == 1


def start(config: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "data_gen", "run", str(config), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def calls_in(path: Path) -> int:
    if not path.exists():
        return 0
    db = sqlite3.connect(path)
    try:
        return db.execute("SELECT COUNT(*) FROM calls").fetchone()[0]
    except sqlite3.OperationalError:
        return 0
    finally:
        db.close()


def wait_for_calls(path: Path, count: int, child: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while calls_in(path) < count:
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_killed_run_resumes_to_the_same_bytes_and_repeats_no_call(bank, finished, tmp_path):
    options = [f"--bank={bank / 'private' / 'teacher_bank.jsonl'}", "--fault-json=0.1"]
    options += [f"--{name.replace('_', '-')}={share}" for name, share in ERRORS.items()]
    journal = tmp_path / "out" / "journal.sqlite"
    with run_simulated(options) as url:
        role = {"base_url": url, "model": "simulated-teacher"}
        config = write_config(tmp_path / "c.yaml", bank, teacher={"reasoner": role})
        for count in (20, 110):  # once among the problems, once in the search
            child = start(config, "--set", "concurrency=2")
            wait_for_calls(journal, count, child)
            child.send_signal(signal.SIGKILL)
            child.communicate()
            assert not (tmp_path / "out" / "report.json").exists()
        assert main(["run", str(config)]) == 0
        with urllib.request.urlopen(f"{url}/stats") as reply:
            sent = json.load(reply)["calls"]
    assert calls_in(journal) <= sent <= calls_in(journal) + 2 * 2  # what was out at each kill
    kept = {name: data for name, data in outputs(tmp_path / "out").items() if name != "report.json"}
    again = tmp_path / "again"
    again.mkdir()
    with run_simulated(options) as url:
        role = {"base_url": url, "model": "simulated-teacher"}
        assert (
            main(["run", str(write_config(again / "c.yaml", bank, teacher={"reasoner": role}))])
            == 0
        )
    assert {n: d for n, d in outputs(again / "out").items() if n != "report.json"} == kept


def test_sigterm_stops_the_run_and_its_teacher_with_one_line(bank, tmp_path):
    child = start(write_config(tmp_path / "c.yaml", bank), "--set", "concurrency=1")
    wait_for_calls(tmp_path / "out" / "journal.sqlite", 5, child)
    teachers = children_of(child.pid)
    assert len(teachers) == 1
    child.terminate()
    _, said = child.communicate(timeout=20)
    assert child.returncode == 1
    assert said.strip().splitlines()[-1] == "data-gen: stopped; run again to go on from here"
    assert not any(Path(f"/proc/{pid}").exists() for pid in teachers)


def test_a_killed_run_leaves_no_teacher_behind(bank, tmp_path):
    child = start(write_config(tmp_path / "c.yaml", bank), "--set", "concurrency=1")
    wait_for_calls(tmp_path / "out" / "journal.sqlite", 5, child)
    [teacher] = children_of(child.pid)
    child.kill()
    child.communicate()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{teacher}/fd").exists() and os.listdir(f"/proc/{teacher}/fd"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_a_teacher_that_is_away_is_one_line_and_exit_code_1(bank, tmp_path, capsys):
    role = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}
    config = write_config(
        tmp_path / "c.yaml", bank, teacher={"reasoner": role}, retries={"attempts": 1}
    )
    assert main(["run", str(config)]) == 1
    [said] = [line for line in capsys.readouterr().err.splitlines() if "teacher for" in line]
    assert "reasoner at http://127.0.0.1:9/v1" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "no-such.yaml"], ["no-such.yaml", "No such file"]),
        (["run"], ["CONFIG"]),
        (["walk"], ["walk"]),
        (["formulary", "--out", "x", "--set", "drugz=3"], ["drugz"]),
        (["formulary", "--out", "x", "--seed", "minus"], ["--seed", "integer"]),
        (["status", "no-such-folder"], ["no-such-folder", "journal.sqlite"]),
        (["pairs", "no-such-folder", "--out", "x", "--set", "kk=1"], ["kk", "did you mean k?"]),
        (["teacher", "--bank", "no-such.jsonl"], ["no-such.jsonl"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    "command",
    [
        *("formulary", "mcq-bank", "filter", "decontaminate", "problems", "search", "pairs", "run"),
        *("status", "verify", "teacher"),
    ],
)
def test_every_command_has_help_with_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"example: data-gen {command}" in capsys.readouterr().out


def test_the_stages_one_by_one_give_the_same_files(bank, finished, tmp_path):
    config = str(write_config(tmp_path / "c.yaml", bank))
    assert main(["problems", config]) == 0
    assert main(["search", config]) == 0
    assert main(["pairs", str(tmp_path / "out"), "--out", str(tmp_path / "out/pairs.jsonl")]) == 0
    for name in FILES:
        made = (tmp_path / "out" / f"{name}.jsonl").read_bytes()
        assert made == (finished / f"{name}.jsonl").read_bytes(), name


def test_status_and_verify_print_json(finished, tmp_path, capsys):
    assert main(["status", str(finished), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finished"] is True
    assert found["calls"]["reasoner"]["calls"] > 20
    responses = tmp_path / "r.jsonl"
    rows = [{"response": "80 mg", "answer": "80 mg"}, {"response": "9 mg", "answer": "80 mg"}]
    responses.write_text("\n".join(json.dumps(row) for row in rows))
    assert main(["verify", str(responses), "--out", str(tmp_path / "v.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 0.5
    verdicts = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [row["verdict"] for row in verdicts] == ["true", "false"]


def test_a_spent_budget_stops_with_one_line_and_a_higher_one_goes_on(bank, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", bank)
    assert main(["run", str(config), "--set", "limits.max_calls=30"]) == 1
    assert "limits.max_calls=30" in capsys.readouterr().err.strip().splitlines()[-1]
    done = calls_in(tmp_path / "out" / "journal.sqlite")
    assert 0 < done <= 30
    assert main(["run", str(config)]) == 0


def test_the_environment_variable_of_the_key_must_be_set(bank, tmp_path, capsys):
    role = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"}
    assert "NO_SUCH_KEY" not in os.environ
    config = write_config(tmp_path / "c.yaml", bank, teacher={"reasoner": role})
    assert main(["run", str(config)]) == 2
    assert "NO_SUCH_KEY" in capsys.readouterr().err
