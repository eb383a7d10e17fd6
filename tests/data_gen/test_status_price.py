"""What a run will cost, what it has cost and how far it is."""

import json
import signal
import subprocess
import sys

import pytest

from data_gen.cli import main
from data_gen.config import load_config
from data_gen.endpoints import run_simulated
from data_gen.estimate import estimate, expect_walk, measure
from data_gen.status import describe, read_acceptance, read_status
from tests.data_gen.test_batch import wait_until
from tests.data_gen.test_engine import SMALL, count, make_bank, options, write_config

PRICES = {"currency": "EUR", "models": {"simulated-teacher": {"input": 2.0, "output": 8.0}}}


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("accepted", [0.0, 0.3, 0.8, 1.0])
def test_the_expected_steps_are_those_of_simulated_searches(accepted, fresh):
    from random import Random

    draw, runs, depth, restarts = Random(1), 20_000, 3, 3
    first = rethought = verified = 0
    for _ in range(runs):
        for restart in range(restarts):
            if restart == 0 or fresh:
                first += 1
                good = draw.random() < accepted
            else:
                good = False  # the reused first conclusion was found false
            for _ in range(depth):
                if good:
                    break
                rethought += 1
                good = draw.random() < accepted
            if good:
                verified += 1
                break
    walk = expect_walk(accepted, depth, restarts, fresh)
    assert walk.first == pytest.approx(first / runs, abs=0.03)
    assert walk.rethought == pytest.approx(rethought / runs, abs=0.08)
    assert walk.verified == pytest.approx(verified / runs, abs=0.02)
    assert walk.judged == pytest.approx(walk.first + walk.rethought)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("priced")
    bank = make_bank(folder / "bank", **SMALL)
    with run_simulated(options(bank)) as url:
        config = write_config(folder / "c.yaml", bank, url, prices=PRICES)
        before = estimate(load_config(config))
        assert main(["run", str(config)]) == 0
    return config, folder / "out", before


def test_an_estimate_grows_from_low_to_high_and_a_pilot_brings_it_near(finished, capsys):
    config, out, before = finished
    assert main(["price", str(config), "--json"]) == 0
    after = json.loads(capsys.readouterr().out)
    for told in (before, after):
        costs = [told[name]["cost"] for name in ("low", "expected", "high")]
        assert costs == sorted(costs) and costs[0] < costs[2]
        assert told["expected"]["calls"] == sum(
            part["calls"] for part in told["expected"]["parts"].values()
        )
    calls = count(out / "journal.sqlite")
    assert after["low"]["calls"] < calls < after["high"]["calls"]
    assert after["expected"]["calls"] == pytest.approx(calls, rel=0.3)
    cost = read_status(out, prices_of(config))["cost"]["cost"]
    assert after["low"]["cost"] <= cost + 0.005 and cost <= after["high"]["cost"] + 0.005
    assert "verify" in after["measured"] and before["measured"] == []
    assert main(["price", str(config)]) == 0
    assert "expected: " in capsys.readouterr().out


def test_difficulty_models_label_conditioning_and_verified_responses_are_counted(finished):
    config, _, _ = finished
    short = ["search.max_depth=1", "search.max_restarts=1"]
    plain = estimate(load_config(config, short))["expected"]["parts"]
    models = "{base_url: 'http://127.0.0.1:9/v1', model: small}"
    more = [*short, f"problems.difficulty_models=[{models}, {models}, {models}]"]
    more += ["search.label_conditioned=true", "rewrite.verifier=teacher"]
    told = estimate(load_config(config, more))
    parts = told["expected"]["parts"]
    assert told["models_without_price"] == ["small"]
    difficulty = [parts[f"difficulty {number}, small"]["calls"] for number in (1, 2, 3)]
    assert difficulty == sorted(difficulty, reverse=True) and difficulty[0] == 64
    assert parts["explore"]["calls"] > plain["explore"]["calls"]
    assert parts["verify"]["calls"] > plain["verify"]["calls"] + parts["final_response"]["calls"]
    rules = estimate(load_config(config, ["search.verifier=rule"]))["expected"]["parts"]
    assert "verify" not in rules


def prices_of(config):
    from data_gen.endpoints import price_list

    return price_list(load_config(config).prices)


def test_measured_tokens_are_those_of_the_calls(finished):
    config, out, _ = finished
    measured = measure(load_config(config), out / "journal.sqlite")
    assert set(measured.tokens) >= {"filter", "reformat", "initial_cot", "verify", "explore"}
    assert measured.tokens["filter"].completion <= 3
    assert measured.accepted is not None and 0.3 < measured.accepted < 0.9


def test_status_tells_cost_acceptance_and_rejects_as_the_report_does(finished, capsys):
    config, out, _ = finished
    report = json.loads((out / "report.json").read_text())
    found = read_status(out, prices_of(config))
    assert found["finished"] and found["progress"] is None
    assert found["by_strategy"] == report["search"]["by_strategy"]
    assert found["by_attempt"] == report["search"]["by_attempt"]
    told = count(out / "journal.sqlite", "SELECT SUM(prompt_tokens) FROM calls")
    made = count(out / "journal.sqlite", "SELECT SUM(completion_tokens) FROM calls")
    assert found["cost"]["cost"] == pytest.approx((2 * told + 8 * made) / 1e6)
    assert main(["status", str(out), "--config", str(config)]) == 0
    said = capsys.readouterr().out
    for words in ("finished", "EUR", "strategy initial_cot: ", "attempt 1: ", "rejected, "):
        assert words in said, said


def test_without_a_report_the_records_tell_the_same(finished, tmp_path):
    _, out, _ = finished
    for name in ("traces.jsonl", "rejected.jsonl"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    told, counted = read_acceptance(out), read_acceptance(tmp_path)
    assert counted["by_strategy"] == told["by_strategy"]
    assert counted["by_attempt"] == told["by_attempt"]
    assert counted["rejected"] == dict(sorted(told["rejected"].items()))


def test_status_shows_how_far_a_run_is_and_what_a_killed_one_may_have_paid(tmp_path):
    bank = make_bank(tmp_path / "bank", **SMALL)
    with run_simulated(options(bank, "--latency-seconds=0.1")) as url:
        config = write_config(tmp_path / "c.yaml", bank, url)
        out = tmp_path / "out"
        command = [sys.executable, "-m", "data_gen", "run", str(config)]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: count(out / "journal.sqlite") > 20, child)
        running = read_status(out)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not running["finished"] and running["progress"]["total"] == 64
    assert "out now, at most" in running["cost"]["possibly_paid"]
    said = "\n".join(describe(read_status(out)))
    assert "possibly paid (out when a run was killed): " in said
    assert "problems: " in said


def test_a_cap_in_money_needs_a_price_for_every_model(tmp_path, capsys):
    bank = make_bank(tmp_path / "bank", **SMALL)
    config = str(write_config(tmp_path / "c.yaml", bank, "http://127.0.0.1:9/v1"))
    assert main(["run", config, "--set", "limits.max_cost=5"]) == 2
    assert "prices.models lacks simulated-teacher" in capsys.readouterr().err
    assert main(["price", config, "--pilot", str(tmp_path / "none")]) == 2
    assert "journal.sqlite is missing" in capsys.readouterr().err
