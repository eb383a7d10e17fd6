"""Devices that a program can be compiled for without being there: names, memory, topologies."""

import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any, Literal

Platform = Literal["tpu", "gpu", "cpu"]
GIB = 1024**3

# Of each kind: platform, dimensions of a topology, usable bytes of memory of one device. A TPU's
# is what its compiler says it has ("exceeds available HBM (15.75G)"), a GPU's what its driver
# reports, a CPU's an equal share of this machine's.
KINDS: dict[str, tuple[Platform, int, int | None]] = {
    "v5e": ("tpu", 2, int(15.75 * GIB)),
    "v6e": ("tpu", 2, int(31.25 * GIB)),
    "v5p": ("tpu", 3, int(95.74 * GIB)),
    "h100": ("gpu", 1, 84_942_979_072),
    "h200": ("gpu", 1, 151_397_597_184),
    "cpu": ("cpu", 1, None),
}

# What XLA's GPU compiler asks of a device that it does not have (GpuTargetConfigProto); the two
# differ in their memory. Numbers of the SXM boards, cuDNN's version that of the plugin.
GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132  fpus_per_core: 128
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth}  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9  minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9  minor: 10 }}
runtime_version {{ major: 13  minor: 0 }}
device_description_str: "{name}"
"""
GPU_BANDWIDTH = {"h100": 3_352_000_000_000, "h200": 4_800_000_000_000}


@dataclass(frozen=True)
class Target:
    """So many devices of a kind; `shape` is a TPU's topology, else their number."""

    kind: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def platform(self) -> Platform:
        return KINDS[self.kind][0]

    @property
    def count(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product

    @property
    def memory(self) -> int:
        """Usable bytes of one device."""
        known = KINDS[self.kind][2]
        if known is not None:
            return known
        import psutil

        return psutil.virtual_memory().total // self.count


def parse_target(text: str) -> Target:
    """`v5e:4x4`, `v5p:4x4x4`, `h200:8`, `cpu:8`."""
    kind, _, shape = text.partition(":")
    if kind not in KINDS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        allowed = ", ".join(f"{name}:{'x'.join('N' * KINDS[name][1])}" for name in KINDS)
        raise ValueError(f"--target {text!r} is not known; allowed: {allowed}")
    sizes = tuple(int(size) for size in shape.split("x"))
    dimensions = KINDS[kind][1]
    if len(sizes) != dimensions:
        wanted = f"{kind}:{'x'.join('N' * dimensions)}"
        raise ValueError(f"--target {text!r} has {len(sizes)} dimensions; write {wanted}")
    return Target(kind, sizes)


def set_environment(target: Target) -> None:
    """What has to be said before jax is imported; whatever else is attached stays unused."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if target.platform == "tpu":
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no metadata server to wait for
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"  # nothing is locked: no chip is opened
        for name in ("TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL"):
            os.environ.setdefault(name, "3")
        # Else libtpu complains of a machine that names neither.
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "none")
    if target.platform == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
        count = f"--xla_force_host_platform_device_count={target.count}"
        os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()


PLUGINS = {"tpu": ("libtpu", "plan"), "gpu": ("jax_cuda13_plugin", "plan-gpu")}


def open_devices(target: Target) -> list[Any]:
    """The target's devices; all but CPUs can be compiled for and nothing else.

    ValueError where the compiler is not installed or does not know the topology.
    """
    import jax
    from jax.experimental import topologies

    if target.platform == "cpu":
        found = jax.devices("cpu")
        if len(found) < target.count:
            raise ValueError(f"--target {target}: jax was started with {len(found)} CPU devices")
        return found[: target.count]
    module, extra = PLUGINS[target.platform]
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"--target {target} needs the compiler in {module}, which is not installed; install "
            f"medreason with its extra {extra}"
        )
    try:
        if target.platform == "tpu":
            found = topologies.get_topology_desc(platform="tpu", topology_name=str(target))
        else:
            config = GPU_CONFIG.format(
                bandwidth=GPU_BANDWIDTH[target.kind],
                memory=target.memory,
                name=f"NVIDIA {target.kind.upper()}",
            )
            found = topologies.get_topology_desc(
                platform="cuda", target_config=config, topology=f"1x1x{target.count}"
            )
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"--target {target} is refused by its compiler: {said}") from None
    return list(found.devices)
