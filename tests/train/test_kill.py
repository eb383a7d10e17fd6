"""A run that is killed, or asked to stop, goes on to the bits of one that was left alone."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from orbax.checkpoint.utils import TMP_DIR_SUFFIX

from tests.train.small_runs import (
    assert_same_bits,
    metrics,
    saved_steps,
    stage,
    write_base,
    write_config,
)

ROOT = Path(__file__).parents[2]
DEVICES = 2
EVERY = 3  # steps between two saves
ENVIRONMENT = {
    **os.environ,
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
    "JAX_PLATFORMS": "cpu",
    "NPROC": str(4 * DEVICES),
}
KINDS = pytest.mark.parametrize("kind", ["cpt", "sft"])


@dataclass(frozen=True)
class Kill:
    """`delay` seconds after an attempt's n-th shard, save or step, or its first file of a model."""

    event: Literal["shard", "save", "step", "model"]
    n: int
    delay: float

    def is_near(self, folder: Path, resumed: int, started_ns: int) -> bool:
        """Whether the attempt that began at `started_ns`, from step `resumed`, came to the event.

        The attempt before left files too: this one has its own log first.
        """
        log = folder / "metrics.jsonl"
        if self.event == "shard":
            return len(shards(folder)) >= self.n
        if not log.is_file() or log.stat().st_mtime_ns < started_ns:
            return False
        if self.event == "save":
            step = (resumed // EVERY + self.n) * EVERY
            return (folder / "states" / f"{step}{TMP_DIR_SUFFIX}").is_dir()
        if self.event == "model":
            return (folder / "model").is_dir()
        return max(metrics(folder, "loss"), default=0) >= resumed + self.n


def shards(folder: Path) -> list[Path]:
    return list(folder.glob("prepared/*.partial/shards/*.arrow"))


def place(folder: Path) -> str:
    """What a dead run was doing, by what it left."""
    if any(folder.glob("prepared/*.partial")):
        return "preparation"
    return "save" if any(folder.glob(f"states/*{TMP_DIR_SUFFIX}*")) else "between"


def begin(config: Path, kind: str) -> subprocess.Popen:
    with config.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "medreason_jax.cli", kind, str(config)],
            cwd=ROOT,
            env=ENVIRONMENT,
            start_new_session=True,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(config: Path, kind: str) -> None:
    assert begin(config, kind).wait() == 0, config.with_suffix(".log").read_text()[-3000:]


def run_until(config: Path, kind: str, kill: Kill, number: int) -> int:
    """Start a run, send it (its process group) a signal at the event; its exit code."""
    folder, started = config.with_suffix(""), time.time_ns()
    resumed = max(saved_steps(folder), default=0)
    process = begin(config, kind)
    try:
        while process.poll() is None and not kill.is_near(folder, resumed, started):
            time.sleep(0.003)
        time.sleep(kill.delay)
        assert process.poll() is None, f"{kill}: the run ended before, {process.returncode}"
        os.killpg(process.pid, number)
        return process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def kill_and_finish(config: Path, kind: str, kills: list[Kill]) -> Counter[str]:
    """How many of the kills fell into what."""
    places: Counter[str] = Counter()
    for kill in kills:
        assert run_until(config, kind, kill, signal.SIGKILL) == -signal.SIGKILL
        places[place(config.with_suffix(""))] += 1
    finish(config, kind)
    print(f"{kind}: of {len(kills)} kills {dict(places)}")
    return places


def draw_kills(seed: int) -> list[Kill]:
    """Ten: a save takes about 0.1 s here, so that a kill has to come sooner after its begin."""
    random = np.random.default_rng(seed)
    events = random.permutation(["save"] * 4 + ["step"] * 3)
    late = [Kill(event, int(random.integers(1, 4)), delay_after(event, random)) for event in events]
    return [
        Kill("shard", 1, delay_after("shard", random)),
        Kill("shard", 2, delay_after("shard", random)),
        *late,
        Kill("model", 1, 0.0),
    ]


def delay_after(event: str, random: np.random.Generator) -> float:
    return float(random.uniform(0.0, 0.03 if event == "save" else 0.5))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """With text for four shards: seconds of preparation."""
    return write_base(tmp_path_factory.mktemp("base"), texts=1400, conversations=300)


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    """{kind, steps}'s run that nobody touched."""
    runs: dict[tuple[str, int], Path] = {}

    def run(kind: str, steps: int) -> Path:
        if (kind, steps) not in runs:
            folder = tmp_path_factory.mktemp("undisturbed") / kind
            finish(small_stage(base, kind, folder, steps), kind)
            runs[kind, steps] = folder
        return runs[kind, steps]

    return run


def small_stage(base: Path, kind: str, folder: Path, steps: int) -> Path:
    settings: dict[str, Any] = {"steps": steps, "checkpoint_every": EVERY}
    return write_config(stage(base, kind, folder, mesh={"fsdp": DEVICES}, **settings))


@KINDS
def test_a_run_killed_in_preparation_and_in_a_save_ends_in_the_same_bits(
    base, undisturbed, tmp_path, kind
):
    kills = [Kill("shard", 1, 0.2), Kill("save", 2, 0.01)]
    config = small_stage(base, kind, tmp_path / kind, 15)
    assert kill_and_finish(config, kind, kills)["preparation"] == 1
    assert_same_bits(tmp_path / kind, undisturbed(kind, 15))


def test_a_run_asked_to_stop_says_so_and_ends_in_the_same_bits(base, undisturbed, tmp_path):
    config = small_stage(base, "sft", tmp_path / "sft", 15)
    assert run_until(config, "sft", Kill("step", 4, 0.0), signal.SIGTERM) == 1
    (step,) = saved_steps(tmp_path / "sft")[-1:]
    told = f"stopped at {step} of 15, saved in {tmp_path / 'sft'}; run it again to go on"
    assert told in config.with_suffix(".log").read_text()
    assert 4 <= step <= 7
    finish(config, "sft")
    assert_same_bits(tmp_path / "sft", undisturbed("sft", 15))


@pytest.mark.kill
@pytest.mark.timeout(3000)
def test_twenty_kills_end_in_the_same_bits(base, undisturbed, tmp_path):
    places: Counter[str] = Counter()
    for seed, kind in enumerate(["cpt", "sft"]):
        config = small_stage(base, kind, tmp_path / kind, 100)
        places += kill_and_finish(config, kind, draw_kills(seed))
        assert_same_bits(tmp_path / kind, undisturbed(kind, 100))
    assert places["save"] >= 5 and places["preparation"] >= 3 and places.total() == 20
