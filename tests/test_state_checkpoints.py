"""Train states on disk: what is kept, that damage and kills cost no more than the last save, and
what a save costs the steps beside it."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from medreason_jax import checkpoint
from medreason_jax.checkpoint import StateCheckpoints, abstract_like
from medreason_jax.checksums import find_damage
from medreason_jax.mesh import make_mesh


def restore_latest(folder: Path, like):
    checkpoints = StateCheckpoints(folder)
    restored = checkpoints.restore_latest(
        abstract_like(like, jax.tree.map(lambda x: x.sharding, like))
    )
    checkpoints.close()
    return restored


def rows_sharding() -> NamedSharding:
    return NamedSharding(make_mesh(1, 8, 1), P("fsdp"))


def small_state(value: float):
    return {"params": {"norm": jnp.full((64,), value)}, "step": jnp.int32(value)}


def save_steps(folder: Path, steps, losses: dict[int, float] | None = None, **keep) -> set[str]:
    """Save each step in turn; the step folders that are left."""
    checkpoints = StateCheckpoints(folder, **keep)
    for step in steps:
        metrics = None if losses is None or step not in losses else {"loss": losses[step]}
        checkpoints.save(step, small_state(step), {"step": step}, metrics)
    checkpoints.close()
    return {path.name for path in folder.iterdir()}


LOSSES = {1: float("nan"), 2: 1.0, 3: 3.0, 4: 9.0, 5: 5.0, 7: 4.0}


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({}, {"7", "8"}),
        ({"keep_last": 1}, {"8"}),
        ({"keep_last": 3, "keep_every": 3}, {"3", "6", "7", "8"}),
        ({"keep_last": 1, "keep_best": ("loss", "min")}, {"2", "8"}),
        ({"keep_last": 1, "keep_best": ("loss", "max")}, {"4", "8"}),
        ({"keep_every": 4, "keep_best": ("loss", "min")}, {"2", "4", "7", "8"}),
    ],
)
def test_the_last_the_best_and_every_nth_are_kept(keep: dict, left: set[str], tmp_path: Path):
    assert save_steps(tmp_path, range(1, 9), LOSSES, **keep) == left


def test_the_best_is_known_to_the_next_process(tmp_path: Path):
    keep = {"keep_last": 1, "keep_best": ("loss", "min")}
    save_steps(tmp_path, range(1, 4), LOSSES, **keep)
    assert save_steps(tmp_path, [4, 5], LOSSES, **keep) == {"2", "5"}
    assert save_steps(tmp_path, [6, 7], {6: 0.5}, **keep) == {"6", "7"}


def test_retention_that_cannot_take_effect_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="keep_last=0"):
        StateCheckpoints(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match="keep_every=0"):
        StateCheckpoints(tmp_path, keep_every=0)
    with pytest.raises(ValueError, match="'least'; give 'min' or 'max'"):
        StateCheckpoints(tmp_path, keep_best=("loss", "least"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="asks for 'accuracy', the 1 metrics given are loss"):
        save_steps(tmp_path, [1], LOSSES, keep_best=("accuracy", "max"))


def test_a_step_that_is_not_the_last_is_refused(tmp_path: Path):
    save_steps(tmp_path, [4])
    with pytest.raises(ValueError, match="holds step 4; a state of step 4 cannot follow"):
        save_steps(tmp_path, [4])


def test_no_saved_state_is_none_and_not_an_error(tmp_path: Path):
    assert restore_latest(tmp_path, small_state(0)) is None


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def needed_files(folder: Path) -> list[Path]:
    """Every file of a checkpoint that is not rewritten with the commit itself."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(
        path
        for path in files
        if path.relative_to(folder).as_posix() not in checkpoint.WRITTEN_WITH_THE_COMMIT
    )


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (lambda path: flip(path, 77), "checksum|cannot be read"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes|cannot be read"),
    "empty": (lambda path: os.truncate(path, 0), "has 0 bytes|cannot be read"),
    "removed": (lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found(damage: str, tmp_path: Path):
    save_steps(tmp_path, [1])
    files = needed_files(tmp_path / "1")
    assert {"checksums.json", "manifest.ocdbt", "_METADATA"} <= {path.name for path in files}
    apply, message = DAMAGES[damage]
    for path in files:
        assert find_damage(tmp_path / "1") is None
        before = path.read_bytes()
        apply(path)
        found = find_damage(tmp_path / "1")
        assert found is not None
        assert found.startswith(path.relative_to(tmp_path / "1").as_posix())
        assert any(words in found for words in message.split("|")), found
        path.write_bytes(before)


def test_processes_that_share_the_check_look_at_every_file(tmp_path: Path):
    save_steps(tmp_path, [1])
    for path in needed_files(tmp_path / "1"):
        if path.name != "checksums.json":
            before = path.read_bytes()
            path.unlink()
            found = [find_damage(tmp_path / "1", part, 3) for part in range(3)]
            assert sum(damage is not None for damage in found) == 1
            path.write_bytes(before)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_gives_way_to_the_one_before(damage: str, tmp_path: Path, capfd):
    save_steps(tmp_path, [1, 2, 3], keep_last=3)
    largest = max(needed_files(tmp_path / "3" / "state"), key=lambda path: path.stat().st_size)
    DAMAGES[damage][0](largest)
    (tmp_path / "2" / "checksums.json").unlink()
    restored = restore_latest(tmp_path, small_state(0))
    assert restored is not None
    step, state, facts = restored
    assert (step, int(state["step"]), facts) == (1, 1, {"step": 1})
    lines = [line for line in capfd.readouterr().err.splitlines() if "DAMAGED" in line]
    assert len(lines) == 2
    assert "3.damaged" in lines[0] and largest.name in lines[0] and "step 1" in lines[0]
    assert "2.damaged: checksums.json is missing" in lines[1]
    assert save_steps(tmp_path, [2, 3]) == {"2", "3", "2.damaged", "3.damaged"}


def test_the_files_completed_by_the_commit_are_not_needed(tmp_path: Path):
    save_steps(tmp_path, [1])
    for name in checkpoint.WRITTEN_WITH_THE_COMMIT:
        (tmp_path / "1" / name).write_bytes(b"\xff{")
    restored = restore_latest(tmp_path, small_state(0))
    assert restored is not None and restored[2] == {"step": 1}


def test_nothing_whole_left_is_an_error_that_names_every_state(tmp_path: Path):
    save_steps(tmp_path, [1, 2])
    (tmp_path / "1" / "facts" / "metadata").unlink()
    (tmp_path / "2" / "checksums.json").unlink()
    message = "step 2: checksums.json is missing; step 1: facts/metadata is missing"
    with pytest.raises(RuntimeError, match=message):
        restore_latest(tmp_path, small_state(0))
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_a_failed_save_leaves_the_state_before_and_is_raised(tmp_path: Path, monkeypatch):
    save_steps(tmp_path, [1], keep_last=1)

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "write_checksums", full)
    with pytest.raises(OSError, match="no space left"):
        save_steps(tmp_path, [2], keep_last=1)
    restored = restore_latest(tmp_path, small_state(0))
    assert restored is not None and restored[0] == 1


def test_a_state_may_be_donated_while_it_is_saved(tmp_path: Path):
    advance = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    state = {"layers": jax.device_put(jnp.zeros((8, 1 << 18)), rows_sharding())}
    checkpoints = StateCheckpoints(tmp_path)
    checkpoints.save(1, state, {})
    for _ in range(20):
        state = advance(state)
    jax.block_until_ready(state)
    checkpoints.close()
    restored = restore_latest(tmp_path, state)
    assert restored is not None
    np.testing.assert_array_equal(restored[1]["layers"], np.zeros((8, 1 << 18)))


def environment(devices: int, **more: str) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **more}


SAVED_BY_TWO_PROCESSES = """
import json, sys
from pathlib import Path
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from medreason_jax.checkpoint import StateCheckpoints, abstract_like
from medreason_jax.checksums import find_damage
from medreason_jax.mesh import make_mesh, start_processes

def array(value):
    return jax.make_array_from_callback((8, 4096), rows, lambda i: np.full((8, 4096), value)[i])

start_processes()
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
rows = NamedSharding(make_mesh(1, 8, 1), P("fsdp"))
like = abstract_like({"layers": array(0.0)}, {"layers": rows})
first = StateCheckpoints(folder)
found = [first.restore_latest(like)]
first.save(2, {"layers": array(2.0)}, {"step": 2})
first.save(3, {"layers": array(3.0)}, {"step": 3})
first.close()
multihost_utils.sync_global_devices("saved")
if jax.process_index() == 1:  # damages a file that the other process leaves to it
    for path in (folder / "3" / "state").rglob("d/*"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        if find_damage(folder / "3", 0, 2) is None:
            break
        path.write_bytes(data)
    else:
        sys.exit("process 0 looks at every file")
multihost_utils.sync_global_devices("damaged")
second = StateCheckpoints(folder)
found.append(second.restore_latest(like))
second.save(3, {"layers": array(3.5)}, {"step": 3.5})
second.close()
values = [[s, f, sorted({float(np.unique(d.data)[0]) for d in x["layers"].addressable_shards})]
          for s, x, f in found]
out.with_suffix(f".{jax.process_index()}").write_text(json.dumps(values))
"""


def test_two_processes_agree_on_the_last_whole_state(tmp_path: Path):
    folder, out = tmp_path / "states", tmp_path / "out"
    like = {"layers": jax.device_put(jnp.ones((8, 4096)), rows_sharding())}
    alone = StateCheckpoints(folder)
    alone.save(1, like, {"step": 1})
    alone.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", SAVED_BY_TWO_PROCESSES, str(folder), str(out)]
    names = {"MEDREASON_COORDINATOR": place, "MEDREASON_PROCESS_COUNT": "2"}
    processes = [
        subprocess.Popen(
            command,
            env=environment(4, **names, MEDREASON_PROCESS_ID=str(index)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    expected = [[1, {"step": 1}, [1.0]], [2, {"step": 2}, [2.0]]]
    assert [json.loads(out.with_suffix(f".{i}").read_text()) for i in range(2)] == [expected] * 2
    assert [error.count("DAMAGED CHECKPOINT") for error in errors] == [1, 0]
    restored = restore_latest(folder, like)
    assert restored is not None and restored[0] == 3 and restored[2] == {"step": 3.5}
    np.testing.assert_array_equal(restored[1]["layers"], np.full((8, 4096), 3.5))


SAVES_UNTIL_KILLED = """
import sys, time
from pathlib import Path
import jax, jax.numpy as jnp
from medreason_jax import checkpoint

def slowly(*args, write=checkpoint.write_checksums, **named):
    time.sleep(0.1)
    write(*args, **named)
    time.sleep(0.1)

def state(value):
    return {"layers": jnp.full((8, 1 << 19), value), "norm": jnp.full((7,), value)}

checkpoint.write_checksums = slowly  # gives the killer time to see each moment
checkpoints = checkpoint.StateCheckpoints(Path(sys.argv[1]), keep_last=1)
place = jax.tree.map(lambda x: x.sharding, state(0.0))
found = checkpoints.restore_latest(checkpoint.abstract_like(state(0.0), place))
step = 0 if found is None else found[0]
while True:
    step += 1
    checkpoints.save(step, state(float(step)), {"step": step})
    print(step - 1, flush=True)  # whole, since the save after it has begun
"""

TEMPORARY = "{}.orbax-checkpoint-tmp"
MOMENTS = {
    "begun": TEMPORARY,
    "written": TEMPORARY + "/state/manifest.ocdbt",
    "checked": TEMPORARY + "/checksums.json",
    "committed": "{}/checksums.json",
}


def kill_while_it_saves(folder: Path, after: int, moment: str, delay: float) -> int:
    """The last step that a process which goes on from `after`, and is killed, called whole."""
    awaited = folder / MOMENTS[moment].format(after + 2)
    command = [sys.executable, "-c", SAVES_UNTIL_KILLED, str(folder)]
    with subprocess.Popen(command, env=environment(1), stdout=subprocess.PIPE, text=True) as child:
        end = time.monotonic() + 120
        while not awaited.exists():
            assert child.poll() is None and time.monotonic() < end, f"{awaited} never came"
            time.sleep(0.001)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        assert child.stdout is not None
        lines = child.stdout.read().splitlines()
    return max(int(lines[-1]), after)


def check_kills(folder: Path, rounds: list[tuple[str, float]]) -> None:
    like = {"layers": jnp.zeros((8, 1 << 19)), "norm": jnp.zeros((7,))}
    step = 0
    for moment, delay in rounds:
        whole = kill_while_it_saves(folder, step, moment, delay)
        restored = restore_latest(folder, like)
        assert restored is not None
        step, state, facts = restored
        assert whole <= step and facts == {"step": step}
        jax.tree.map(lambda x, s=step: np.testing.assert_array_equal(x, s), state)
    assert list(folder.glob("*.damaged")) == []


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_state(tmp_path: Path):
    check_kills(tmp_path, [(moment, 0.0) for moment in MOMENTS])


@pytest.mark.kill
def test_twenty_kills_in_a_row_leave_a_whole_state(tmp_path: Path):
    seeded = random.Random(0)
    rounds = [(seeded.choice(list(MOMENTS)), seeded.uniform(0, 0.3)) for _ in range(20)]
    check_kills(tmp_path, rounds)


STEPS_BESIDE_SAVES = """
import json, sys, time
from pathlib import Path
import jax, jax.numpy as jnp
from medreason_jax.checkpoint import StateCheckpoints
from medreason_jax.mesh import make_mesh, make_sharder
from medreason_jax.qwen2.load import make_compute
from medreason_jax.qwen2.model import init_params, make_network
from medreason_jax.qwen2.sizes import read_sizes
from medreason_jax.train.objectives import language_modelling
from medreason_jax.train.optimizer import make_optimizer, make_schedule
from medreason_jax.train.program import make_policy
from medreason_jax.train.step import init_state, make_train_step

sizes = read_sizes(json.loads(Path(sys.argv[2]).read_text()))
sharder = make_sharder(make_mesh(1, 1, 1), sizes.num_attention_heads, sizes.num_key_value_heads)
network, _ = make_network(sizes, make_compute(sharder, sizes, "float32"))
schedule = make_schedule("constant", 1e-5, steps=1, warmup_steps=0, final_ratio=1.0)
optimizer = make_optimizer(schedule, b1=0.9, b2=0.999, weight_decay=0.0, clip_norm=1.0)
objective = language_modelling(make_policy(network, sharder, None, chunk=64))
first = lambda key: init_state(init_params(sizes, key), optimizer)
state = jax.jit(first)(jax.random.key(0))
ones = jnp.ones((1, TOKENS), jnp.int32)
batch = {"tokens": ones, "targets": ones, "segments": ones, "weights": ones.astype(jnp.float32),
         "positions": jnp.arange(TOKENS)[None]}
step = make_train_step(objective, optimizer, sharder, state, accumulation=1)

def steps_per_second(done):
    global state
    count, start = 0, time.perf_counter()
    while not done(count):
        state, _ = jax.block_until_ready(step(state, {}, batch))
        count += 1
    return count / (time.perf_counter() - start)

checkpoints = StateCheckpoints(Path(sys.argv[1]), keep_last=1)
steps_per_second(lambda count: count == 2)
for number in (1, 2, 3):
    alone = steps_per_second(lambda count: count == 4)
    start = time.perf_counter()
    checkpoints.save(number, state, {})
    blocked = time.perf_counter() - start
    beside = steps_per_second(lambda _: not checkpoints.manager.is_saving_in_progress())
    checkpoints.manager.wait_until_finished()
    took = time.perf_counter() - start
    alone = (alone + steps_per_second(lambda count: count == 4)) / 2
    print(blocked / took, beside / alone, took, alone, beside)
checkpoints.close()
""".replace("TOKENS", "256")


@pytest.mark.slow
def test_steps_go_on_while_the_state_of_a_half_billion_parameters_is_saved(tmp_path: Path):
    sizes = Path(__file__).parents[1] / "configs/models/qwen2.5-0.5b.json"
    command = [sys.executable, "-c", STEPS_BESIDE_SAVES, str(tmp_path), str(sizes)]
    done = subprocess.run(command, env=environment(1), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    saves = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert max(blocked for blocked, *_ in saves) <= 0.05
    assert sorted(share for _, share, *_ in saves)[1] >= 0.7  # the median of three
