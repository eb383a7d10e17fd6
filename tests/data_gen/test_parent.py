"""data-gen ends with the program that started it, however that program ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_gen.cli import main
from data_gen.formulary import FormularySettings, write_formulary
from data_gen.parent import ASKED_FOR

SECONDS = 20  # for a child to end; it takes a fraction of one

# Starts data-gen's server as `medreason run` would start a command, and stays.
PARENT = f"""
import os, subprocess, sys
child = subprocess.Popen(
    [sys.executable, *sys.argv[1:]], env={{**os.environ, {ASKED_FOR!r}: str(os.getpid())}}
)
print(child.pid, flush=True)
child.wait()
"""

# A data-gen that gets to its first line only after its parent has ended.
LATE = """
import os, sys, time
while os.getppid() == int(os.environ[sys.argv[1]]):
    time.sleep(0.01)
from data_gen.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("formulary")
    write_formulary(FormularySettings(), folder)
    return ["teacher", f"--bank={folder / 'private' / 'teacher_bank.jsonl'}", "--port=0"]


def start_parent(*arguments: str) -> tuple[subprocess.Popen, int]:
    command = [sys.executable, "-c", PARENT, *arguments]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def read_until_all_have_ended(parent: subprocess.Popen, child: int) -> str:
    """What was still said: the pipe closes when the last process that holds it is gone."""
    try:
        said, _ = parent.communicate(timeout=SECONDS)
        return said
    except subprocess.TimeoutExpired:
        os.kill(child, signal.SIGKILL)
        parent.communicate()
        raise


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child of its parent's end")
def test_a_command_ends_when_its_parent_is_killed(teacher):
    parent, child = start_parent("-m", "data_gen", *teacher)
    assert parent.stdout is not None
    assert "base_url" in parent.stdout.readline()
    parent.kill()
    assert read_until_all_have_ended(parent, child) == ""


def test_a_command_whose_parent_was_killed_before_it_began_ends_at_once(teacher):
    parent, child = start_parent("-c", LATE, ASKED_FOR, *teacher)
    parent.kill()
    assert read_until_all_have_ended(parent, child) == ""


def test_a_parent_that_is_no_number_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setenv(ASKED_FOR, "yes")
    assert main(["status", str(Path("no-such-folder"))]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert ASKED_FOR in said and "'yes'" in said
