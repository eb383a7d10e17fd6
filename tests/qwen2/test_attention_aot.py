"""The splash kernel compiled for TPUs that are not here: needs libtpu, no device."""

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
kernel = choose_kernel("auto", target.devices[0].platform, head_dim, HeadShards(mesh))

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


@pytest.mark.aot
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(14, 2, 64), (28, 4, 128)])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_splash_compiles_for_tpu_without_the_square_of_scores(topology, heads, kv_heads, head_dim):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; make test-aot installs it")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to wait for
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # compiles of other tests at the same time
    }
    sizes = map(str, (heads, kv_heads, head_dim, B, T))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, topology, *sizes],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))
    _, name, calls, temporary = found.split()
    assert (name, int(calls)) == ("splash", 2)  # forward, and the fused backward
    scores = 4 * B * (heads // 2) * T * T  # bytes of one float32 [B, N, T, T] on a device
    assert int(temporary) < scores / 8
