"""What may change when a stopped run goes on: mesh, processes, weights, a damaged state."""

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from medreason_jax.config import TrainConfig, load_yaml, validate
from medreason_jax.data.dataset import Batches, read_facts
from medreason_jax.data.schedule import Schedule
from medreason_jax.train.run import Run, Stopped
from medreason_jax.train.stage import train_stage
from tests.train.small_runs import (
    assert_same_bits,
    facts_of_state,
    metrics,
    saved_steps,
    stage,
    write_base,
    write_config,
)

ROOT = Path(__file__).parents[2]
ROWS, STEPS = 16, 14
STOP = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), texts=12, conversations=40)


@pytest.fixture
def rows(monkeypatch) -> dict[int, tuple[int, str]]:
    """{number: (source, digest)} of the rows that a run of this process takes."""
    taken: dict[int, tuple[int, str]] = {}
    read = Batches.row

    def watched(self, number):
        row = read(self, number)
        digest = hashlib.sha256(row["tokens"].tobytes()).hexdigest()
        taken[number] = self.schedule.locate(number)[0], digest
        return row

    monkeypatch.setattr(Batches, "row", watched)
    return taken


def config(base: Path, folder: Path, **changes: Any) -> Path:
    settings = {"steps": STEPS, "batch_rows": ROWS, "checkpoint_every": 2, **changes}
    return write_config(stage(base, "cpt", folder, **settings))


def train(path: Path, *overrides: str) -> None:
    train_stage(validate(TrainConfig, load_yaml(path, list(overrides)), str(path)))


def train_until_stop(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"at {STOP} of {STEPS}"):
        patch.setattr(Run, "stop_agreed", lambda self, unit: unit == STOP)
        train(path)


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory) -> Path:
    """On a mesh of 8 x 1."""
    folder = tmp_path_factory.mktemp("undisturbed") / "cpt"
    train(config(base, folder))
    return folder


def assert_close(folder: Path, other: Path) -> None:
    """Equal before the stop, to 1e-5 in the three steps after it; held-out loss to 0.5 %."""
    found, wanted = (metrics(run, "loss") for run in (folder, other))
    assert list(found) == list(wanted) == list(range(1, STEPS + 1))
    for step in range(1, STOP + 4):
        assert found[step] == pytest.approx(wanted[step], rel=1e-5 if step > STOP else 0), step
    held_out = [metrics(run, "held_out_loss")[STEPS] for run in (folder, other)]
    assert held_out[0] == pytest.approx(held_out[1], rel=5e-3)


def test_a_run_goes_on_with_the_same_rows_on_another_mesh(base, rows, monkeypatch, tmp_path):
    train(config(base, tmp_path / "whole"))
    wanted = dict(rows)
    rows.clear()
    path = config(base, tmp_path / "parts")
    train_until_stop(path, monkeypatch)
    train(path, "mesh.fsdp=2")
    assert rows == wanted and sorted(wanted) == list(range(STEPS * ROWS))
    assert_close(tmp_path / "parts", tmp_path / "whole")


def launch(path: Path) -> list[str]:
    """As a command of two processes, of two devices each."""
    medreason = [sys.executable, "-m", "medreason_jax.cli", "cpt", str(path)]
    launcher = [sys.executable, str(ROOT / "launch/local"), "-n", "2", "--devices-per-process", "2"]
    return [*launcher, "--", *medreason]


def run_two_processes(path: Path) -> None:
    done = subprocess.run(launch(path), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_run_of_one_process_goes_on_with_two(base, undisturbed, monkeypatch, tmp_path):
    path = config(base, tmp_path / "cpt")
    train_until_stop(path, monkeypatch)
    run_two_processes(path)
    assert_close(tmp_path / "cpt", undisturbed)


def test_two_processes_agree_on_the_step_to_stop_at(base, tmp_path):
    path, whole = (config(base, tmp_path / name, steps=40) for name in ("parts", "whole"))
    with subprocess.Popen(launch(path), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (tmp_path / "parts/metrics.jsonl").is_file():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)  # heard within about a second: while they compile
        told, _ = process.communicate()
    assert process.returncode == 1, told
    (step,) = saved_steps(tmp_path / "parts")
    for number in (0, 1):
        assert f"[{number}] failed: stopped at {step} of 40, saved in" in told, told
    run_two_processes(path)
    run_two_processes(whole)
    assert_same_bits(tmp_path / "parts", tmp_path / "whole")


def test_weights_changed_on_the_way_repeat_no_row_within_an_epoch(
    base, rows, monkeypatch, tmp_path
):
    folder, before = tmp_path / "cpt", stage(base, "cpt", tmp_path / "cpt")["sources"]
    train_until_stop(config(base, folder), monkeypatch)
    after = [{**source, "weight": weight} for source, weight in zip(before, (1, 3), strict=True)]
    train(config(base, folder, sources=after))
    schedule = Schedule.model_validate(facts_of_state(folder)["schedule"])
    assert [segment.from_row for segment in schedule.segments] == [0, STOP * ROWS]
    assert [segment.weights for segment in schedule.segments] == [(1.0, 0.5), (1.0, 3.0)]
    for number, prepared in enumerate(sorted(folder.glob("prepared/[0-9]-*"))):
        taken = [digest for _, (source, digest) in sorted(rows.items()) if source == number]
        epoch = read_facts(prepared)["rows"]
        for first in range(0, len(taken), epoch):
            part = taken[first : first + epoch]
            assert len(set(part)) == len(part)
        assert number == 0 or len(taken) > epoch  # the conversations are seen more than once


def test_a_damaged_state_is_passed_over_with_a_loud_line(
    base, undisturbed, monkeypatch, tmp_path, capfd
):
    folder = tmp_path / "cpt"
    path = config(base, folder)
    train_until_stop(path, monkeypatch)
    flip_byte(folder / "states" / str(STOP))
    train(path)
    said = capfd.readouterr().err
    assert f"DAMAGED CHECKPOINT {folder}/states/{STOP}.damaged" in said
    assert f"going back to step {STOP - 2}" in said
    assert_same_bits(folder, undisturbed)


def flip_byte(folder: Path) -> None:
    """In the middle of the largest file of a state: of its arrays."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
