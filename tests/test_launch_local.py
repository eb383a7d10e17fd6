"""launch/local with commands of a few milliseconds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).resolve().parent.parent / "launch" / "local"

PRINT_PLACE = """
import json, os
names = ("MEDREASON_COORDINATOR", "MEDREASON_PROCESS_ID", "MEDREASON_PROCESS_COUNT",
         "JAX_PLATFORMS", "XLA_FLAGS")
print(json.dumps({name: os.environ[name] for name in names}))
"""
FIRST_FAILS = """
import os, sys, time
if os.environ["MEDREASON_PROCESS_ID"] == "1":
    sys.exit(7)
time.sleep(60)
"""
WAIT_FOR_SIGNAL = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("got SIGTERM"), sys.exit(5)))
print("ready")
time.sleep(60)
"""


def launch_command(*options: str, program: str) -> list[str]:
    return [sys.executable, str(LAUNCHER), *options, "--", sys.executable, "-c", program]


def launch(*options: str, program: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_other=1"
    command = launch_command(*options, program=program)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)


def test_each_process_is_told_its_place():
    done = launch("-n", "3", "--devices-per-process", "2", program=PRINT_PLACE)
    assert done.returncode == 0, done.stderr
    places = {}
    for line in done.stdout.splitlines():
        prefix, _, text = line.partition(" ")
        places[prefix] = json.loads(text)
    assert [places[f"[{i}]"]["MEDREASON_PROCESS_ID"] for i in range(3)] == ["0", "1", "2"]
    assert len({place["MEDREASON_COORDINATOR"] for place in places.values()}) == 1
    assert {place["MEDREASON_PROCESS_COUNT"] for place in places.values()} == {"3"}
    assert {place["JAX_PLATFORMS"] for place in places.values()} == {"cpu"}
    flags = {tuple(place["XLA_FLAGS"].split()) for place in places.values()}
    assert flags == {("--xla_other=1", "--xla_force_host_platform_device_count=2")}


def test_one_failure_ends_the_others_and_gives_its_exit_code():
    begun = time.monotonic()
    done = launch("-n", "3", program=FIRST_FAILS)
    assert done.returncode == 7
    assert "process 1 failed (7)" in done.stdout
    assert time.monotonic() - begun < 30


def test_a_signal_reaches_every_process():
    command = launch_command("-n", "2", program=WAIT_FOR_SIGNAL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = sorted(process.stdout.readline().strip() for _ in range(2))
        assert ready == ["[0] ready", "[1] ready"]
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(timeout=20) == 5
    assert sorted(rest.splitlines()) == ["[0] got SIGTERM", "[1] got SIGTERM"]


def test_a_reader_that_leaves_ends_the_command():
    endless = "while True: print('still here')"
    command = launch_command("-n", "2", program=endless)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=30) != 0
        assert b"Thread" not in process.stderr.read()


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_a_count_that_makes_no_sense_is_bad_input(count: str):
    assert launch("-n", count, program="").returncode == 2


def test_an_unknown_command_is_named():
    command = [sys.executable, str(LAUNCHER), "-n", "2", "--", "no-such-command-here"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "no-such-command-here" in done.stderr
