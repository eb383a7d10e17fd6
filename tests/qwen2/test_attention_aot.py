"""The attention kernels compiled for TPUs that are not here: needs libtpu, no device."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
B, T = 2, 4096  # rows of one device

# Its own process: libtpu reads its environment once, when it is loaded.
PROGRAM = """
import sys
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from medreason_jax.mesh import AXES, HeadShards
from medreason_jax.qwen2.attention import Places, choose_kernel

topology, heads, kv_heads, head_dim, B, T = sys.argv[1], *map(int, sys.argv[2:])
target = topologies.get_topology_desc(platform="tpu", topology_name=topology)
mesh = topologies.make_mesh(target, (1, 2, 2), AXES)
kernel = choose_kernel(
    "auto", target.devices[0].platform, head_dim, jnp.bfloat16, HeadShards(mesh)
)

def loss(q, k, v, places):
    return jnp.sum(kernel(q, k, v, places, places).astype(jnp.float32) ** 2)

rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
split = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
shaped = lambda n: jax.ShapeDtypeStruct((2 * B, T, n, head_dim), jnp.bfloat16, sharding=split)
ids = jax.ShapeDtypeStruct((2 * B, T), jnp.int32, sharding=rows)
step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
compiled = step.lower(
    shaped(heads), shaped(kv_heads), shaped(kv_heads), Places(ids, ids)
).compile()
print("FOUND", kernel.name, compiled.as_text().count('"tpu_custom_call"'),
      compiled.memory_analysis().temp_size_in_bytes)
"""


DECODE = """
import sys
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from medreason_jax.mesh import AXES, HeadShards
from medreason_jax.qwen2.decode_attention import decode_kernel

topology, heads, kv_heads, head_dim, B, S = sys.argv[1], *map(int, sys.argv[2:])
target = topologies.get_topology_desc(platform="tpu", topology_name=topology)
mesh = topologies.make_mesh(target, (1, 2, 2), AXES)
kernel = decode_kernel(target.devices[0].platform, head_dim, HeadShards(mesh))

def steps(q, k, v, lengths):
    def step(c, carry):
        q, lengths = carry
        return kernel(q, k, v, lengths), lengths + 1
    return jax.lax.fori_loop(0, 16, step, (q, lengths))

rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
split = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "tensor"))
shaped = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split)
kv = shaped(2 * B, kv_heads, S, head_dim)
lengths = jax.ShapeDtypeStruct((2 * B,), jnp.int32, sharding=rows)
compiled = jax.jit(steps).lower(shaped(2 * B, heads, head_dim), kv, kv, lengths).compile()
print("FOUND", kernel.name, compiled.as_text().count('"tpu_custom_call"'),
      compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.aot
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(14, 2, 64), (28, 4, 128)])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_splash_compiles_for_tpu_without_the_square_of_scores(topology, heads, kv_heads, head_dim):
    name, calls, temporary = compile_for_tpu(PROGRAM, topology, heads, kv_heads, head_dim, B, T)
    assert (name, calls) == ("splash", 2)  # forward, and the fused backward
    scores = 4 * B * (heads // 2) * T * T  # bytes of one float32 [B, N, T, T] on a device
    assert temporary < scores / 8


@pytest.mark.aot
@pytest.mark.parametrize("S", [64, 768, 4096])
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 2), (28, 4)])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_paged_decoding_compiles_for_tpu_without_a_copy_of_the_cache(topology, heads, kv_heads, S):
    rows = 64
    name, calls, temporary = compile_for_tpu(DECODE, topology, heads, kv_heads, 128, rows, S)
    assert (name, calls) == ("paged", 1)
    cache = 2 * rows * (kv_heads // 2) * S * 128 * 2  # bytes on a device, in bfloat16
    assert temporary < max(cache / 8, 2**20)


def compile_for_tpu(program: str, topology: str, *sizes: int) -> tuple[str, int, int]:
    """What the program found: the kernel's name, its calls, bytes of temporaries."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; make test-aot installs it")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to wait for
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # compiles of other tests at the same time
    }
    done = subprocess.run(
        [sys.executable, "-c", program, topology, *map(str, sizes)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))
    _, name, calls, temporary = found.split()
    return name, int(calls), int(temporary)
