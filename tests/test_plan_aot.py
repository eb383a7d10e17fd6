"""Stages of the size that this project is for, compiled for accelerators that are not here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLASH = "triton" if importlib.util.find_spec("tokamax") is None else "mosaic"
COMPILER = {"v": "libtpu", "h": "jax_cuda13_plugin"}

SFT_7B, CPT_72B = "huatuogpt_sft_7b", "preferred_medllm_cpt_72b"
WHOLE = ["lora=null", "optimizer.mu_dtype=bfloat16", "optimizer.nu_dtype=bfloat16"]
WHOLE_ON_64 = [*WHOLE, "mesh.tensor=1", "batch_rows=256"]
EIGHT_GPUS = ["mesh.fsdp=8", "mesh.tensor=1", "accumulation=16"]
ONE_GPU = ["mesh.fsdp=1", "mesh.tensor=1", "accumulation=128"]


def run_for(target: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in its own process: libtpu reads its environment once."""
    module = COMPILER[target[0]]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed; extras plan and plan-gpu bring the compilers")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def found(target: str, program: str, *arguments: str) -> list[int]:
    """The numbers of the line FOUND that a program prints."""
    done = run_for(target, "-c", program, target, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))
    return [int(number) for number in line.split()[1:]]


def planned(stage: str, target: str, *changes: str) -> tuple[int, dict]:
    """Exit code and record of `medreason plan`."""
    sets = [part for change in changes for part in ("--set", change)]
    done = run_for(
        target,
        *("-m", "medreason_jax.cli", "plan"),
        *(f"configs/stages/{stage}.yaml", "--target", target, "--json", *sets),
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout)


@pytest.mark.aot
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("stage", "target", "changes", "kernel"),
    [
        (SFT_7B, "v5e:4x4", [], "splash"),
        (SFT_7B, "h200:8", EIGHT_GPUS, FLASH),
        (SFT_7B, "h200:1", ONE_GPU, FLASH),
        (CPT_72B, "v5e:16x16", [], "splash"),
        (CPT_72B, "v5e:16x16", WHOLE, "splash"),
        (CPT_72B, "v5p:4x4x4", WHOLE_ON_64, "splash"),
    ],
)
def test_a_stage_fits_the_slice_that_it_is_written_for(stage, target, changes, kernel):
    code, plan = planned(stage, target, *changes)
    facts = {name: plan[name] for name in ("target", "needs", "has", "compile_seconds")}
    assert (code, plan["fits"], plan["attention"]) == (0, True, kernel), facts
    assert plan["needs"] <= 0.92 * plan["has"]
    assert plan["processor_seconds"] <= 240, facts  # two cores for two minutes
    arithmetic, memory = plan["arithmetic"], plan["memory"]
    arguments = sum(arithmetic[name] for name in ("parameters", "optimizer", "frozen", "batch"))
    assert arguments == pytest.approx(memory["argument"], rel=1e-3)


@pytest.mark.aot
@pytest.mark.timeout(900)
def test_memory_that_does_not_suffice_is_an_answer():
    code, plan = planned(CPT_72B, "v5e:4x4", "mesh.fsdp=16", "mesh.tensor=1", "batch_rows=16")
    assert (code, plan["fits"], plan["memory"]) == (1, False, None)
    assert plan["needs"] > plan["has"]


# A step that needs most of a GPU's memory, from where on XLA would make products again.
STEP = """
import sys
from pathlib import Path
from medreason_jax.targets import open_devices, parse_target, set_environment
target = parse_target(sys.argv[1])
set_environment(target)
from medreason_jax.config import TrainConfig, load_yaml, validate
from medreason_jax.plan import make_stage, read_model_sizes

changes = ["mesh.fsdp=1", "mesh.tensor=1", "batch_rows=2", "accumulation=1", "length=4096"]
changes += ["remat=products", "unroll=1", "optimizer.nu_dtype=float32"]
path = Path(sys.argv[2])
config = validate(TrainConfig, load_yaml(path, changes), str(path))
stage = make_stage(config, read_model_sizes(Path("qwen2.5-7b"))[1], open_devices(target))
text = stage.lower().compile().as_text()
print("FOUND", text.count("bf16[2,4096,3584]"), text.count(".remat"))
"""


@pytest.mark.aot
@pytest.mark.timeout(900)
def test_the_gpu_compiler_makes_no_product_again():
    states, again = found("h200:1", STEP, f"configs/stages/{SFT_7B}.yaml")
    assert states > 0 and again == 0


# The head alone, with its gradient: a whole step has the layers' collectives in its loops.
HEAD = """
import sys
from medreason_jax.targets import parse_target, set_environment
target = parse_target(sys.argv[1])
set_environment(target)
import jax
import jax.numpy as jnp
from medreason_jax.collectives import collective_sizes, loops_of
from medreason_jax.mesh import TokenShards, batch_sharding, make_mesh
from medreason_jax.targets import open_devices
from medreason_jax.train.head import token_loss, token_scores

V, D, T, chunk = 151_936, 896, 4_160, 416
mesh = make_mesh(1, 4, 4, open_devices(target))
W = jax.NamedSharding(mesh, jax.P("tensor", "fsdp"))

def loss(h, W, labels):
    options = {"shards": TokenShards(mesh), "chunk": chunk}
    nll, _ = token_loss(h, W, labels, lambda scores, _: -scores.logp, (), **options)
    return nll + jnp.mean(token_scores(h, W, labels, **options).logp)

shaped = lambda shape, dtype, place: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
text = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=(None, W)).lower(
    shaped((4, T, D), jnp.bfloat16, batch_sharding(mesh)),
    shaped((V, D), jnp.float32, W),
    shaped((4, T), jnp.int32, batch_sharding(mesh)),
).compile().as_text()
loops = loops_of(text)
sizes = [n for i, _, n in collective_sizes(text) if loops[i.computation][1]]
print("FOUND", len(sizes), max(sizes), chunk * D * 4)
"""


@pytest.mark.aot
@pytest.mark.timeout(900)
def test_a_loop_of_the_head_moves_at_most_one_chunk_on_a_tpu():
    count, largest, one_chunk = found("v5e:4x4", HEAD)
    assert count > 0 and largest <= one_chunk
