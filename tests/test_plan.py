"""`medreason plan` for CPU devices: its arithmetic, its answers, and what running really takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from medreason_jax import plan as planning
from medreason_jax import targets
from medreason_jax.cli import exit_code_of, run_arguments
from medreason_jax.collectives import find_collectives
from medreason_jax.config import TrainConfig
from medreason_jax.plan import make_plan, needed_bytes, tiled_size
from medreason_jax.targets import parse_target
from tests.tiny import FIELDS, some_mesh

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    fields = {**FIELDS, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def values(model: Path, **changes) -> dict:
    return {
        "kind": "sft",
        "folder": "run",
        "model": str(model),
        "length": 64,
        "batch_rows": 16,
        "steps": 10,
        "head_chunk": 16,
        "mesh": {"fsdp": 4, "tensor": 2},
        "optimizer": {"learning_rate": 1e-4},
        "sources": [{"path": "a.jsonl", "kind": "sft"}],
        **changes,
    }


def config(model: Path, **changes) -> TrainConfig:
    return TrainConfig.model_validate(values(model, **changes))


CASES = {
    "plain": {},
    "bfloat16 moments, accumulated": {
        "accumulation": 4,
        "dtype": "bfloat16",
        "remat": "full",
        "optimizer": {"learning_rate": 1e-4, "mu_dtype": "bfloat16", "nu_dtype": "bfloat16"},
    },
    "adapter": {"lora": {"rank": 4}, "dtype": "bfloat16"},
    "preference": {"kind": "prefer", "preference": {"pairs_per_row": 3}},
    "data parallel": {"mesh": {}},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_arithmetic_of_the_arguments_is_the_compilers(model, changes):
    plan = make_plan(config(model, **changes), parse_target("cpu:8"))
    assert plan.memory is not None
    assert plan.arithmetic.arguments == pytest.approx(plan.memory.argument, rel=1e-3)
    assert plan.needs == plan.memory.total
    assert plan.attention == "xla" and plan.fits


def test_arithmetic_by_kind_counts_what_each_setting_costs(model):
    def of(**changes):
        return make_plan(config(model, **changes), parse_target("cpu:8")).arithmetic

    plain, halved = of(), of(optimizer={"learning_rate": 1e-4, "mu_dtype": "bfloat16"})
    # first and second moments of every parameter, and a few scalars
    assert plain.optimizer == pytest.approx(2 * plain.parameters, abs=64)
    assert halved.optimizer == pytest.approx(1.5 * plain.parameters, abs=64)
    assert plain.gradients == plain.parameters
    assert of(accumulation=2).gradients == 2 * plain.parameters
    assert of(accumulation=2).activations == plain.activations / 2
    assert of(remat="full").activations < of(remat="context").activations < plain.activations
    adapter = of(lora={"rank": 2})
    assert adapter.parameters < adapter.frozen == plain.parameters


def test_a_tpu_fills_its_tiles():
    assert tiled_size((80, 16, 7392)) == 80 * 16 * 7424
    assert tiled_size((80, 7392, 16)) == 80 * 16 * 7424  # the shorter axis becomes the rows
    assert tiled_size((28, 512)) == 32 * 512
    assert tiled_size((1, 4096)) == 4096
    assert tiled_size((3, 100)) == 4 * 128
    assert tiled_size((8192,)) == 8192
    assert tiled_size(()) == 1


def test_the_collectives_of_a_program_are_counted_with_their_loops():
    mesh = some_mesh((8, 1, 1))

    def inside(x_8):
        def body(total, _):
            return total + jax.lax.psum(x_8 * total, "data"), None

        total, _ = jax.lax.scan(body, x_8, length=5)
        return jax.lax.all_gather(total, "data", tiled=True)

    spec = jax.P("data")
    mapped = jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=jax.P(), check_vma=False)
    text = jax.jit(mapped).lower(jnp.zeros(8 * 100)).compile().as_text()
    gather, reduce = find_collectives(text)
    assert (gather.kind, gather.in_loop, gather.count, gather.runs) == ("all-gather", False, 1, 1)
    assert gather.bytes == 800 * 4
    assert (reduce.kind, reduce.in_loop, reduce.count, reduce.runs) == ("all-reduce", True, 1, 5)
    assert (reduce.largest, reduce.bytes) == (100 * 4, 5 * 100 * 4)


def test_programs_beside_the_step_are_counted_with_what_stays(model):
    held_out = {"sources": [{"path": "b.jsonl", "kind": "sft"}]}
    parts = {"accumulation": 4, "mesh": {"fsdp": 4}, "batch_rows": 32, "remat": "full"}
    plain = make_plan(config(model, **parts), parse_target("cpu:4"))
    measured = make_plan(config(model, held_out=held_out, **parts), parse_target("cpu:4"))
    assert set(plain.others) == {"start"} and plain.most == plain.needs == measured.needs
    # a whole batch at once, without a gradient but beside the optimizer's moments
    arithmetic = measured.arithmetic
    assert measured.others["held_out"] > arithmetic.arguments
    assert measured.most == max(measured.others["held_out"], measured.needs)

    adapter = make_plan(config(model, lora={"rank": 2}, dtype="bfloat16"), parse_target("cpu:8"))
    loaded = 2 * adapter.arithmetic.frozen  # float32 weights, of which a bfloat16 copy is made
    wanted = loaded + adapter.arithmetic.frozen + adapter.arithmetic.parameters
    assert adapter.others["start"] == wanted


def run(model: Path, tmp_path: Path, *arguments: str, **changes) -> int:
    path = tmp_path / "stage.yaml"
    path.write_text(json.dumps(values(model, **changes)))
    try:
        return exit_code_of(lambda: run_arguments(["plan", str(path), *arguments]))
    except SystemExit as stop:
        return int(str(stop.code))


def test_the_command_says_whether_it_fits(model, tmp_path, capsys, monkeypatch):
    assert run(model, tmp_path, "--target", "cpu:8", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["fits"] and record["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert record["needs"] == sum(record["memory"].values()) - 2 * record["memory"]["alias"]
    assert {c["kind"] for c in record["collectives"]} >= {"all-reduce"}

    room = int(record["needs"] / 0.93)  # 92 % of it is less than what is needed
    monkeypatch.setitem(targets.KINDS, "cpu", ("cpu", 1, room))
    assert run(model, tmp_path, "--target", "cpu:8") == 1
    assert "does not fit: needs" in capsys.readouterr().out


TPU_TEMPORARIES = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(79.70G) exceeds available HBM (15.75G)."
)
TPU_ALL = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G."
)
VECTOR_MEMORY = (
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack for a "
    "kernel. It should not be possible to run out of scoped vmem."
)


def test_only_device_memory_that_ran_out_is_an_answer():
    assert needed_bytes(TPU_TEMPORARIES) == int(79.70 * 2**30)
    assert needed_bytes(TPU_ALL) == int(17.5 * 2**30)
    assert needed_bytes(VECTOR_MEMORY) is None
    assert needed_bytes("INTERNAL: hbm") is None


@pytest.mark.parametrize(("message", "code"), [(TPU_ALL, 1), (VECTOR_MEMORY, 1)])
def test_a_compiler_that_gives_up_is_no_crash(model, tmp_path, capsys, monkeypatch, message, code):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(planning.Stage, "lower", lambda self: Lowered())
    assert run(model, tmp_path, "--target", "cpu:8") == code
    found = capsys.readouterr()
    if message is TPU_ALL:
        assert "does not fit: needs 17.500 GiB" in found.out
    else:
        assert found.err.startswith("failed: RESOURCE_EXHAUSTED")


@pytest.mark.parametrize(
    ("arguments", "changes", "said"),
    [
        (["--target", "v5x:4x4"], {}, "allowed: v5e:NxN"),
        (["--target", "v5p:4x4"], {}, "write v5p:NxNxN"),
        (["--target", "h200"], {}, "allowed"),
        (["--target", "cpu:8", "--model", "qwen2.5-7"], {}, "did you mean 'qwen2.5-7b'"),
        (["--target", "cpu:8"], {"mesh": {"fsdp": 3}}, "found 8"),
        (["--target", "cpu:8"], {"batch_rows": 6}, "batch_rows=6 is not a multiple"),
        (["--target", "cpu:8"], {"length": 4096}, "length=4096"),
        (["--target", "cpu:9"], {}, "started with 8 CPU devices"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    model, tmp_path, capsys, monkeypatch, arguments, changes, said
):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # restored: the command sets it
    assert run(model, tmp_path, *arguments, **changes) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_compiler_that_is_missing_is_named_with_its_extra(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    assert run(model, tmp_path, "--target", "h200:8") == 2
    assert "its extra plan-gpu" in capsys.readouterr().err


# Its own process: what it measures is the whole process's memory.
MEASURE = """
import sys, threading, time
from pathlib import Path
import jax
import jax.numpy as jnp
from medreason_jax.config import TrainConfig, load_yaml
from medreason_jax.plan import make_stage, memory_of, read_model_sizes

config = TrainConfig.model_validate(load_yaml(Path(sys.argv[1]), []))
stage = make_stage(config, read_model_sizes(config.model)[1], jax.devices())
compiled = stage.lower().compile()
memory = memory_of(compiled)

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
trees = (stage.state, stage.frozen, stage.batch)
fill = lambda: jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), trees)
arguments = jax.jit(fill, out_shardings=jax.tree.map(lambda x: x.sharding, trees))()
jax.block_until_ready(compiled(*arguments))
done = True
watcher.join()
total = memory.argument + memory.output + memory.temporary - memory.alias
print("FOUND", peak - before, len(jax.devices()) * total)
"""


@pytest.mark.slow
def test_a_step_takes_the_memory_that_was_planned(model, tmp_path):
    fields = json.loads((model / "config.json").read_text())
    fields |= {"vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 4096}
    fields |= {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4}
    (model / "config.json").write_text(json.dumps(fields))
    path = tmp_path / "stage.yaml"
    mesh = {"data": 2, "fsdp": 4, "tensor": 1}
    path.write_text(json.dumps(values(model, mesh=mesh, batch_rows=8, head_chunk=64)))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        cwd=ROOT,
        env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))
    grown, planned = (int(number) for number in line.split()[1:])
    assert planned >= 4e9
    assert grown == pytest.approx(planned, rel=0.15), (grown, planned)
