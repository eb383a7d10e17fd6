"""Batches: collected, tagged, sent once whatever is killed, recorded as calls."""

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest

from data_gen import batch
from data_gen.asking import BatchSettings
from data_gen.budget import Budget, BudgetSpent, Caps
from data_gen.cli import main
from data_gen.endpoints import run_simulated
from data_gen.journal import Batch, Journal, read_cost, summarise
from data_gen.simulated_batches import read_form
from data_gen.teacher import Endpoint, Patience, Teacher, TeacherFailed
from data_gen.transport import open_wire
from tests.data_gen.test_engine import (
    SMALL,
    check_none_lost,
    count,
    files,
    make_bank,
    options,
    stats,
    write_config,
)

QUICK = {"count": 16, "seconds": 0.1, "poll_seconds": 0.02, "list_lag_seconds": 0.2}
SETTINGS = BatchSettings(window="24h", **QUICK)  # type: ignore[arg-type]


@pytest.fixture
def no_bank(tmp_path: Path) -> str:
    path = tmp_path / "bank.jsonl"
    path.write_text("")
    return f"--bank={path}"


def ask(url: str, folder: Path, questions: int, caps: Caps | None = None, attempts: int = 4):
    """Ask so many questions in batches; the answers and the budget."""

    async def run():
        journal = Journal(folder / "journal.sqlite")
        place = Endpoint("reasoner", (url,), "m", "m", 0.7, 64, 10.0, 0, batch=SETTINGS)
        budget = Budget(4, Caps() if caps is None else caps, journal.spent(), journal)
        try:
            async with open_wire() as wire:
                teacher = Teacher(place, wire, journal, budget, Patience(attempts, 0.01, 0.05))
                asked = ([{"role": "user", "content": f"Q {n}"}] for n in range(questions))
                try:
                    return await asyncio.gather(*map(teacher.ask, asked)), budget
                finally:
                    await teacher.close()
        finally:
            await journal.drain()
            journal.close()

    return asyncio.run(run())


def test_calls_that_are_ready_go_out_together_and_are_recorded_as_calls(tmp_path, no_bank):
    with run_simulated([no_bank]) as url:
        calls, budget = ask(url, tmp_path, 40)
        told = stats(url)
    assert (told["batches"], told["completed"]) == (3, 40)  # 16, 16 and what is left after 0.1 s
    assert {call.answer for call in calls} == {"I do not know."}
    assert all(call.batch.startswith("batch_") and call.request_id for call in calls)
    assert count(tmp_path / "journal.sqlite") == 40
    assert budget.spent.tokens == told["tokens"]["total_tokens"]
    assert read_cost(tmp_path / "journal.sqlite")["batches"] == {"done": 3}


def test_a_request_of_a_batch_that_failed_goes_into_the_next_one(tmp_path, no_bank):
    with run_simulated([no_bank, "--fault-500=0.3"]) as url:
        calls, _ = ask(url, tmp_path, 16, attempts=12)
        told = stats(url)
    assert told["batches"] > 1 and told["completed"] == 16
    assert max(call.attempts for call in calls) > 1


def test_a_batch_that_the_provider_refuses_is_one_line(tmp_path, no_bank):
    with run_simulated([no_bank, "--fault-500=1"]) as url:
        with pytest.raises(TeacherFailed, match=r"teacher for reasoner at .*HTTP 500.*\(2 batches"):
            ask(url, tmp_path, 3, attempts=2)


def test_a_cap_holds_for_batches_too(tmp_path, no_bank):
    with run_simulated([no_bank]) as url:
        with pytest.raises(BudgetSpent, match="max_tokens"):
            ask(url, tmp_path, 40, Caps(tokens=260))  # a reservation is of about 200
        assert 0 < stats(url)["tokens"]["total_tokens"] <= 260


def test_a_line_of_a_result_that_cannot_be_read_is_asked_again_and_possibly_paid(
    tmp_path, no_bank, monkeypatch
):
    real, torn = batch.read_results, []

    def tear(content: bytes) -> dict:
        lines = content.split(b"\n")
        if not torn:
            torn.append(lines[0])
            lines[0] = lines[0][: len(lines[0]) // 2]
        return real(b"\n".join(lines))

    monkeypatch.setattr(batch, "read_results", tear)
    with run_simulated([no_bank]) as url:
        calls, _ = ask(url, tmp_path, 5)
        assert stats(url)["completed"] == 6
    assert len({call.key for call in calls}) == 5
    told = read_cost(tmp_path / "journal.sqlite")["possibly_paid"]
    assert told["timed out or cut"]["requests"] == 1


PIPELINE = [sys.executable, "-m", "data_gen", "run"]


def wait_until(what, child: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert child.poll() is None, "the run ended early"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_kill_between_submit_and_answer_leaves_one_batch_at_the_teacher(tmp_path):
    bank = make_bank(tmp_path / "bank", **SMALL)
    batched = {"count": 500, "seconds": 0.05, "poll_seconds": 0.02, "list_lag_seconds": 0.5}
    with run_simulated(options(bank, "--batch-seconds=0.15")) as url:
        config = write_config(tmp_path / "c.yaml", bank, url, role={"batch": batched})
        child = subprocess.Popen([*PIPELINE, str(config)], stdout=subprocess.DEVNULL)
        wait_until(lambda: stats(url)["batches"] == 1, child)
        child.send_signal(signal.SIGKILL)
        child.wait()
        journal = tmp_path / "out" / "journal.sqlite"
        assert count(journal) == 0
        assert read_cost(journal)["possibly_paid"]["in a batch"]["requests"] > 0
        assert main(["run", str(config)]) == 0
        told = stats(url)
        tags = [one["metadata"]["data_gen_tag"] for one in read_batches(url)]
    check_none_lost(bank, tmp_path / "out")
    assert len(set(tags)) == len(tags) == told["batches"]
    assert told["completed"] == count(journal)  # not one call was paid twice
    assert read_cost(journal)["batches"] == {"done": told["batches"]}
    with run_simulated(options(bank)) as url:
        direct = write_config(tmp_path / "direct" / "c.yaml", bank, url)
        assert main(["run", str(direct)]) == 0
    assert files(tmp_path / "out") == files(tmp_path / "direct" / "out")


def read_batches(url: str) -> list[dict]:
    with urllib.request.urlopen(f"{url}/batches?limit=1000") as reply:
        return json.load(reply)["data"]


@pytest.mark.parametrize("uploaded", [False, True])
def test_a_planned_batch_is_looked_for_by_its_tag_before_it_is_sent(tmp_path, no_bank, uploaded):
    """The kill may fall on either side of the provider taking the batch, unknown to the journal."""
    with run_simulated([no_bank]) as url:
        ask(url, tmp_path / "first", 5)
        [planned] = read_rows(tmp_path / "first" / "journal.sqlite")

        async def plant() -> None:
            journal = Journal(tmp_path / "second" / "journal.sqlite")
            await journal.plan_batch(planned._replace(state="planned", provider_id=""))
            journal.close()

        asyncio.run(plant())
        if not uploaded:
            with run_simulated([no_bank]) as fresh:  # a provider that never saw it
                move(tmp_path / "second" / "journal.sqlite", url, fresh)
                calls, _ = ask(fresh, tmp_path / "second", 5)
                assert stats(fresh)["batches"] == 1
        else:
            calls, _ = ask(url, tmp_path / "second", 5)
            assert stats(url)["batches"] == 1
            assert stats(url)["completed"] == 5
    assert len(calls) == 5 == summarise(tmp_path / "second" / "journal.sqlite")["reasoner"]["calls"]


def read_rows(journal: Path) -> list[Batch]:
    with closing(sqlite3.connect(journal)) as db:
        return [Batch(*row) for row in db.execute("SELECT * FROM batches")]


def move(journal: Path, old: str, new: str) -> None:
    with closing(sqlite3.connect(journal)) as db, db:
        db.execute("UPDATE batches SET place = replace(place, ?, ?)", (old, new))


def test_the_form_of_an_upload_is_read_back():
    body = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    body += b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n'
    body += b'Content-Type: application/jsonl\r\n\r\n{"a": "\xc3\xa9"}\n\r\n--x--\r\n'
    parts = read_form("multipart/form-data; boundary=x", body)
    assert parts == {"purpose": b"batch", "file": '{"a": "é"}\n'.encode()}
