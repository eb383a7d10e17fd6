"""The engine under load, faults and kills: the whole pipeline against the simulated teacher."""

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from data_gen.budget import Budget, BudgetSpent, Caps
from data_gen.cli import main
from data_gen.endpoints import run_simulated
from data_gen.formulary import FormularySettings, write_formulary
from data_gen.journal import Journal, read_cost
from data_gen.progress import map_concurrently
from data_gen.records import Mcq, Problem, Rejected, Sft, read_records
from data_gen.teacher import Endpoint, Patience, Teacher
from data_gen.transport import open_wire

SMALL = {"search_dose": 40, "search_recall": 8, "rl_dose": 12, "rl_recall": 4}
HELD_OUT = {"dev_per_part": 4, "test_new_combination": 4, "test_new_product": 4}
HELD_OUT |= {"test_text_only": 4, "test_recall_taught": 4, "test_recall_text_only": 4}
HELD_OUT |= {"monographs_per_drug": 4}
ERRORS = ["--error-reasoning=0.5", "--error-filter=0.05", "--error-rewrite=0.1"]
PATIENCE = {"attempts": 12, "first_wait": 0.01, "longest_wait": 0.1}


def make_bank(folder: Path, **sizes: int) -> Path:
    write_formulary(FormularySettings(**{**HELD_OUT, **sizes}), folder)
    return folder


def options(bank: Path, *more: str) -> list[str]:
    return [f"--bank={bank / 'private' / 'teacher_bank.jsonl'}", *ERRORS, *more]


def write_config(path: Path, bank: Path, url: str, **fields: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    role = {"base_url": url, "model": "simulated-teacher", "max_tokens": 512, "timeout": 20}
    config = {
        "bank": str(bank / "bank.jsonl"),
        "out": str(path.parent / "out"),
        "concurrency": 16,
        "teacher": {"reasoner": {**role, **fields.pop("role", {})}},  # type: ignore[dict-item]
        "retries": PATIENCE,
        "decontamination": {"evaluation": [str(bank / "dev.jsonl"), str(bank / "test.jsonl")]},
    }
    path.write_text(yaml.safe_dump({**config, **fields}))
    return path


def stats(url: str) -> dict:
    with urllib.request.urlopen(f"{url}/stats") as reply:
        return json.load(reply)


def count(journal: Path, query: str = "SELECT COUNT(*) FROM calls") -> int:
    if not journal.exists():
        return 0
    db = sqlite3.connect(journal)
    try:
        return db.execute(query).fetchone()[0] or 0
    except sqlite3.OperationalError:
        return 0
    finally:
        db.close()


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.jsonl"))}


def check_none_lost(bank: Path, out: Path) -> int:
    """Every question is a problem or rejected, every searched problem trained on or rejected."""
    questions = [mcq.id for mcq in read_records(bank / "bank.jsonl", Mcq)]
    problems = read_records(out / "problems.jsonl", Problem)
    rejected = read_records(out / "rejected.jsonl", Rejected)
    late = [r for r in rejected if r.stage in ("search", "rewrite")]
    early = [
        str(r.model_dump()["mcq_id"]) for r in rejected if r.stage not in ("search", "rewrite")
    ]
    assert sorted([str(p.mcq_id) for p in problems] + early) == sorted(questions)
    sft = [r for r in read_records(out / "sft.jsonl", Sft) if r.kind == "complex_cot"]
    searched = [problem.id for problem in problems if problem.split == "search"]
    ended = [str(r.problem_id) for r in sft] + [r.model_dump()["problem_id"] for r in late]
    assert sorted(ended) == sorted(searched)
    assert all(record.reason for record in rejected)
    return len(questions)


@pytest.mark.parametrize(
    "problems", [60, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_every_problem_is_accepted_or_rejected_with_a_reason_through_all_faults(
    tmp_path: Path, problems: int
):
    rl = problems // 4
    sizes = {"search_dose": problems - rl, "search_recall": 0, "rl_dose": rl, "rl_recall": 0}
    bank = make_bank(tmp_path / "bank", **sizes)
    faults = ["--fault-429=0.05", "--fault-500=0.03", "--fault-timeout=0.02", "--fault-json=0.03"]
    faults += ["--fault-cut=0.01", "--stall-seconds=1.5", "--retry-after-seconds=0.02"]
    with run_simulated(options(bank, *faults)) as url:
        config = write_config(
            tmp_path / "c.yaml", bank, url, concurrency=64, role={"timeout": 0.75}
        )
        assert main(["run", str(config)]) == 0
        told = stats(url)
    assert check_none_lost(bank, tmp_path / "out") == problems
    assert set(told["faults"]) == {"429", "500", "timeout", "malformed_json", "cut"}
    cost = read_cost(tmp_path / "out" / "journal.sqlite")
    lost = cost["possibly_paid"]["timed out or cut"]
    slow = lost["requests"] - told["faults"]["cut"] - told["faults"]["timeout"]
    assert slow >= 0  # a busy machine may make others too late
    # Every transmission is ours and counted; one that was too late may not have been read.
    assert 0 <= cost["requests"] - told["calls"] <= slow
    print(json.dumps({"calls": told["calls"], "faults": told["faults"], "possibly paid": lost}))


class Killer:
    """Starts a run and kills it when so many calls are in its journal, and a little later."""

    def __init__(self, config: Path, journal: Path, draw: random.Random) -> None:
        self._config, self._journal, self._draw = config, journal, draw

    def kill_at(self, calls: int) -> bool:
        """False if the run ended before."""
        command = [sys.executable, "-m", "data_gen", "run", str(self._config)]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while count(self._journal) < calls and child.poll() is None:
            time.sleep(0.005)
        time.sleep(self._draw.random() * 0.1)
        child.send_signal(signal.SIGKILL)
        return child.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    "kills", [3, pytest.param(20, marks=[pytest.mark.kill, pytest.mark.timeout(1200)])]
)
def test_killed_runs_end_in_the_same_bytes_and_pay_at_most_what_was_out(tmp_path: Path, kills: int):
    at_once, draw = 8, random.Random(kills)
    sizes = SMALL if kills < 10 else {**SMALL, "search_dose": 160}
    bank = make_bank(tmp_path / "bank", **sizes)
    # Not malformed JSON: that fault depends on how often a request came, so on the kills.
    faults = options(bank, "--fault-429=0.03", "--fault-500=0.03", "--latency-seconds=0.02")
    faults.append("--retry-after-seconds=0.01")
    with run_simulated(faults) as url:
        whole = write_config(tmp_path / "whole" / "c.yaml", bank, url, concurrency=at_once)
        assert main(["run", str(whole)]) == 0
        calls = count(tmp_path / "whole" / "out" / "journal.sqlite")
    with run_simulated(faults) as url:
        config = write_config(tmp_path / "cut" / "c.yaml", bank, url, concurrency=at_once)
        journal = tmp_path / "cut" / "out" / "journal.sqlite"
        killer = Killer(config, journal, draw)
        # Not in the last quarter: on a busy machine the run would end before the kill.
        moments = sorted(draw.sample(range(1, 3 * calls // 4), kills))
        killed = sum(killer.kill_at(moment) for moment in moments)
        assert main(["run", str(config)]) == 0
        completed = stats(url)["completed"]
    assert killed == kills
    assert files(tmp_path / "cut" / "out") == files(tmp_path / "whole" / "out")
    recorded = count(journal)
    print(json.dumps({"killed": killed, "completed": completed, "recorded": recorded}))
    assert recorded == calls <= completed <= recorded + killed * at_once
    assert read_cost(journal)["possibly_paid"]["out when a run was killed"]["requests"] > 0


# --- one teacher, asked directly --------------------------------------------------------------


def ask_many(
    url: str,
    folder: Path,
    calls: int,
    budget: Callable[[Journal], Budget],
    after: Callable[[int], None] = lambda _: None,
) -> Budget:
    """Ask the teacher `calls` different questions through journal and budget."""

    async def run() -> Budget:
        journal = Journal(folder / "journal.sqlite")
        spent = budget(journal)
        place = Endpoint("reasoner", (url,), "m", "m", 0.7, 64, 30.0, 0)
        try:
            async with open_wire() as wire:
                teacher = Teacher(place, wire, journal, spent, Patience(6, 0.01, 0.1))

                async def ask(number: int) -> None:
                    await teacher.ask([{"role": "user", "content": f"Question {number}?"}])
                    after(number)

                workers = spent.concurrency + spent.concurrency // 4
                await map_concurrently(range(calls), ask, workers, "calls")
        except BudgetSpent:
            pass
        finally:
            await journal.drain()
            journal.close()
        return spent

    return asyncio.run(run())


@pytest.fixture
def no_bank(tmp_path: Path) -> str:
    path = tmp_path / "bank.jsonl"
    path.write_text("")
    return f"--bank={path}"


def test_a_cap_of_a_thousand_tokens_holds_at_concurrency_64_whatever_fails(tmp_path, no_bank):
    faults = ["--fault-500=0.1", "--fault-cut=0.2", "--latency-seconds=0.02"]
    with run_simulated([no_bank, *faults]) as url:
        caps = Caps(tokens=1000)
        for number in range(3):  # a resumed run starts from what was spent
            spent = ask_many(url, tmp_path, 500, lambda j: Budget(64, caps, j.spent(), j)).spent
            paid = stats(url)["tokens"]["total_tokens"]
            assert 0 < paid <= spent.tokens + spent.possibly_paid_tokens <= 1000, number
    assert spent.possibly_paid_tokens > 0


def rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_latency_is_hidden_and_memory_flat_over_20_000_calls(tmp_path, no_bank):
    calls, at_once, latency = 20_000, 64, 0.2
    sizes: dict[int, float] = {}

    def look(number: int) -> None:
        if number % 1000 == 0:
            sizes[number] = rss_mb()

    with run_simulated([no_bank, f"--latency-seconds={latency}"]) as url:
        start = time.monotonic()
        ask_many(url, tmp_path, calls, lambda j: Budget(at_once, ledger=j), look)
        wall = time.monotonic() - start
    ideal = calls * latency / at_once
    print(json.dumps({"wall": wall, "ideal": ideal, "ratio": wall / ideal, "rss": sizes}))
    assert wall <= 1.15 * ideal
    assert max(sizes.values()) - sizes[2000] < 10  # MB; 2,000 calls in, everything is in place


# --- no other connection ----------------------------------------------------------------------

KEY = "sk-known-to-the-teacher-alone"
GUARD = """
import socket, sys
real = socket.socket.connect

def connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
        print("CONNECTED", address, file=sys.stderr, flush=True)
        raise OSError("the guard refuses")
    return real(self, address)

def resolve(host, *rest, **more):
    if host not in ("127.0.0.1", "::1", "localhost", None):
        print("RESOLVED", host, file=sys.stderr, flush=True)
        raise OSError("the guard refuses")
    return real_resolve(host, *rest, **more)

socket.socket.connect = connect
real_resolve, socket.getaddrinfo = socket.getaddrinfo, resolve
import asyncio
loop_connect = asyncio.selector_events.BaseSelectorEventLoop.sock_connect

async def sock_connect(self, sock, address):
    if sock.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
        print("CONNECTED", address, file=sys.stderr, flush=True)
        raise OSError("the guard refuses")
    return await loop_connect(self, sock, address)

asyncio.selector_events.BaseSelectorEventLoop.sock_connect = sock_connect
"""
RUN = GUARD + "\nfrom data_gen.cli import main\nsys.exit(main(sys.argv[1:]))"
REACH = (
    GUARD
    + """
import aiohttp

async def reach():
    async with aiohttp.ClientSession() as session:
        await session.get(sys.argv[1])

asyncio.run(reach())
"""
)


def guarded(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HTTP_PROXY": "http://proxy.invalid:1"}
    environment |= {"HTTPS_PROXY": "http://proxy.invalid:1", "OPENAI_BASE_URL": "http://x.invalid"}
    environment["TEACHER_KEY"] = KEY
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_run_with_a_loopback_teacher_opens_no_other_connection(tmp_path: Path):
    bank = make_bank(tmp_path / "bank", **SMALL)
    with run_simulated(options(bank)) as url:
        network, role = {"allow": ["127.0.0.1"]}, {"api_key_env": "TEACHER_KEY"}
        config = write_config(tmp_path / "c.yaml", bank, url, network=network, role=role)
        done = guarded(RUN, "run", str(config), "--offline")
    assert done.returncode == 0, done.stderr
    assert "CONNECTED" not in done.stderr and "RESOLVED" not in done.stderr
    check_none_lost(bank, tmp_path / "out")
    check_private(tmp_path / "out", done.stdout + done.stderr)


def check_private(out: Path, said: str) -> None:
    """What a run leaves is its owner's alone and holds no key."""
    assert KEY not in said
    written = [path for path in out.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in written} == {0o600}
    folders = [out, *(path for path in out.rglob("*") if path.is_dir())]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize("url", ["http://192.0.2.1/", "http://teacher.invalid/"])
def test_the_guard_sees_a_connection_to_elsewhere(url: str):
    done = guarded(REACH, url)
    assert done.returncode != 0
    assert "CONNECTED" in done.stderr or "RESOLVED" in done.stderr
