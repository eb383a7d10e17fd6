"""A pilot of a few questions, and what it foretells of the whole bank."""

import json
from pathlib import Path

import pytest
import yaml

from data_gen.cli import main
from data_gen.formulary import FormularySettings, write_formulary
from data_gen.records import Mcq, read_records, write_records

QUESTIONS, PILOT = 240, 60


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pilot")
    write_formulary(FormularySettings(), root / "formulary")
    bank = read_records(root / "formulary/bank.jsonl", Mcq)[:QUESTIONS]
    write_records(root / "bank.jsonl", [mcq.model_copy(update={"split": None}) for mcq in bank])
    simulated = {"bank": str(root / "formulary/private/teacher_bank.jsonl")}
    simulated |= {"error_reasoning": 0.3, "error_filter": 0.1}
    values = {
        "bank": str(root / "bank.jsonl"),
        "out": str(root / "out"),
        "teacher": {"reasoner": {"simulated": simulated}},
        "prices": {"models": {"simulated-teacher": {"input": 2.0, "output": 10.0}}},
        "split": {"search": 0.5, "rl": 0.5, "dev": 0.0, "test": 0.0},
        "concurrency": 16,
    }
    path = root / "data.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def told(config: Path, tmp_path_factory) -> dict:
    """The pilot's result; afterwards the whole run is made, whose calls are in `run`."""
    from data_gen.config import load_config
    from data_gen.pilot import run_pilot
    from data_gen.pipeline import run

    pilot = run_pilot(load_config(config), PILOT)
    return {**pilot, "run": run(load_config(config))["calls"]}


def test_every_question_of_a_pilot_is_searched_or_rejected(told):
    accepted = told["acceptance"]
    assert told["questions"] == PILOT and told["of"] == QUESTIONS
    assert accepted["problems"]["of_questions"] >= accepted["verified"]["of_questions"] > 0
    assert accepted["written"]["of_questions"] + sum(told["rejected"].values()) == PILOT
    low, high = accepted["written"]["interval95"]
    assert 0 < low < accepted["written"]["rate"] < high < 1


@pytest.mark.parametrize("name", ["calls", "prompt_tokens", "completion_tokens"])
def test_the_interval_holds_what_the_whole_run_then_takes(told, name: str):
    actual = sum(role[name] for role in told["run"].values())
    low, high = told["whole_bank"][name]["interval95"]
    assert low < told["whole_bank"][name]["expected"] < high
    assert low <= actual <= high, (low, actual, high)
    assert high < 2 * low  # it says something


def test_cost_and_hours_follow_from_tokens_and_calls(told):
    whole = told["whole_bank"]
    prompt, said = (whole[f"{name}_tokens"]["expected"] for name in ("prompt", "completion"))
    assert whole["cost"]["expected"] == pytest.approx((2.0 * prompt + 10.0 * said) / 1e6)
    hours = whole["calls"]["expected"] * told["seconds_a_call"] / 16 / 3600
    assert whole["hours"]["expected"] == pytest.approx(hours)


def test_the_run_does_not_pay_for_the_calls_of_its_pilot_again(told, config: Path, capsys):
    out = yaml.safe_load(config.read_text())["out"]
    pilot_calls = {line["id"] for line in read_lines(Path(out) / "pilot/problems.jsonl")}
    whole = {line["id"]: line["calls"] for line in read_lines(Path(out) / "problems.jsonl")}
    lines = read_lines(Path(out) / "pilot/problems.jsonl")
    same = [line for line in lines if line["id"] in whole]
    assert pilot_calls and same
    assert all(line["calls"] == whole[line["id"]] for line in same)  # the same keys
    assert (
        main(["pilot", str(config), "-n", str(PILOT), "--json"]) == 0
    )  # a second pilot asks nothing
    told_again = json.loads(capsys.readouterr().out)
    assert told_again == {name: value for name, value in told.items() if name != "run"}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_pilot_is_printed_for_people(told, config: Path, capsys):
    assert main(["pilot", str(config), "-n", str(PILOT)]) == 0
    said = capsys.readouterr().out
    assert (
        f"{PILOT} of {QUESTIONS} questions, every step" in said
        and "hours:" in said
        and " USD (" in said
    )
