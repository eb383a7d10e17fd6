"""The device mesh and who holds what on it: the only file that names a mesh axis."""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import struct
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# Ordered: the first pattern that matches the end of a parameter's path decides; none is an error.
# Stacked layers have a leading axis, which is never sharded. "kv" is `Sharder.kv_axis`.
PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed_tokens\.embedding", ("tensor", "fsdp")),
    (r"layers\..*\.(q|gate|up)_proj\.kernel", (None, "fsdp", "tensor")),
    (r"layers\..*\.(k|v)_proj\.kernel", (None, "fsdp", "kv")),
    (r"layers\..*\.(o|down)_proj\.kernel", (None, "tensor", "fsdp")),
    (r"layers\..*\.q_proj\.bias", (None, "tensor")),
    (r"layers\..*\.(k|v)_proj\.bias", (None, "kv")),
    (r"layers\..*\.(q|k|v|gate|up)_proj\.lora_A", (None, "fsdp", None)),
    (r"layers\..*\.(o|down)_proj\.lora_A", (None, "tensor", None)),
    (r"layers\..*\.(q|gate|up)_proj\.lora_B", (None, None, "tensor")),
    (r"layers\..*\.(k|v)_proj\.lora_B", (None, None, "kv")),
    (r"layers\..*\.(o|down)_proj\.lora_B", (None, None, "fsdp")),
    (r"layers\..*layernorm\.weight", ()),
    (r"norm\.weight", ()),
    (r"lm_head\.kernel", ("fsdp", "tensor")),
    (r"score\.(kernel|bias)", ()),
)

# Logical axes of activations.
ACTIVATION_AXES = {
    "batch": BATCH,
    "time": None,
    "model": None,
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "kv",
    None: None,
}


def start_processes(folder: Path | None = None) -> None:
    """Join the other processes of this program, when the launcher says there are any.

    Compiled programs are kept in `folder`/compile_cache, unless a place for them was set before or
    no folder is given.
    """
    if folder is not None and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((folder / "compile_cache").absolute()))
        # Also what compiles in less than the default second: decoding has many such programs.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if "MEDREASON_COORDINATOR" in os.environ:
        jax.distributed.initialize(
            coordinator_address=os.environ["MEDREASON_COORDINATOR"],
            num_processes=int(os.environ["MEDREASON_PROCESS_COUNT"]),
            process_id=int(os.environ["MEDREASON_PROCESS_ID"]),
        )


def make_mesh(data: int, fsdp: int, tensor: int, devices: list | None = None) -> Mesh:
    """A data x fsdp x tensor mesh over `devices`, all of all processes where none are given.

    data=-1 takes the rest.
    """
    found = jax.device_count() if devices is None else len(devices)
    if data == -1:
        data = max(found // (fsdp * tensor), 1)
    if data * fsdp * tensor != found:
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} needs {data * fsdp * tensor} "
            f"devices, found {found}; set the three so that their product is {found}"
        )
    shape, types = (data, fsdp, tensor), (AxisType.Auto,) * 3
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


# XLA's own rematerialization begins at a share of a GPU's memory and then makes whole products
# again, to save next to nothing: what is kept for the backward pass is `remat`'s to say.
REMATERIALIZATION = "xla_gpu_memory_limit_slop_factor"


def training_options(mesh: Mesh, deterministic: bool) -> dict[str, bool | int]:
    """Compiler options of training programs on the mesh's platform; XLA_FLAGS goes before ours.

    GPUs add with atomics, so that runs differ in their last bits, unless `deterministic`; for a GPU
    that is not here XLA cannot compile that.
    """
    device = mesh.devices.flat[0]
    if device.platform != "gpu":
        return {}
    here = device in jax.devices()
    options = {"xla_gpu_deterministic_ops": True} if deterministic and here else {}
    ours = REMATERIALIZATION not in os.environ.get("XLA_FLAGS", "")
    return options | ({REMATERIALIZATION: 1000} if ours else {})


def batch_shards(mesh: Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def tensor_parts(mesh: Mesh) -> int:
    return mesh.shape["tensor"]


def check_rows(mesh: Mesh, name: str, rows: int, accumulation: int) -> None:
    """Rows of one optimizer step must split evenly over micro-batches and devices."""
    parts = accumulation * batch_shards(mesh)
    if rows % parts:
        raise ValueError(
            f"{name}={rows} is not a multiple of accumulation={accumulation} x "
            f"{batch_shards(mesh)} batch shards of the mesh = {parts}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def path_name(path) -> str:
    """`layers.self_attn.q_proj.kernel` for a key path of a tree."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def is_stacked(path: str) -> bool:
    """Whether a parameter holds all layers on its leading axis."""
    return "layers" in path.split(".")


def param_axes(path: str) -> tuple[str | None, ...]:
    for pattern, axes in PARAM_RULES:
        if re.search(rf"(^|\.){pattern}$", path):
            return axes
    raise ValueError(f"no sharding rule matches parameter {path!r}; add one to PARAM_RULES")


@struct.dataclass
class Sharder:
    """Where one model's parameters and activations live on the mesh; calling it constrains."""

    mesh: Mesh = struct.field(pytree_node=False)
    kv_axis: str | None = struct.field(pytree_node=False)  # None: key/value heads are replicated

    def __call__(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """`x` laid out by the logical names of its axes."""
        return jax.lax.with_sharding_constraint(x, self.place(axes))

    def place(self, axes: tuple[str | None, ...]) -> NamedSharding:
        """Where an array lies whose axes have these logical names."""
        return NamedSharding(self.mesh, self._spec(tuple(ACTIVATION_AXES[axis] for axis in axes)))

    def tree(self, tree):
        """NamedSharding of every leaf: parameters, and optimizer state whose paths end alike."""

        def sharding(path, leaf):
            name = path_name(path)
            spec = self._spec(param_axes(name)) if leaf.shape else PartitionSpec()
            for size, axis in zip(leaf.shape, spec, strict=False):
                parts = 1 if axis is None else self.mesh.shape[axis]
                if size % parts:
                    raise ValueError(
                        f"{name} has a dimension of {size}, not a multiple of axis {axis}={parts}; "
                        f"choose {axis} among the divisors of {size}"
                    )
            return NamedSharding(self.mesh, spec)

        return jax.tree_util.tree_map_with_path(sharding, tree)

    def decode_tree(self, tree):
        """As `tree`, whole over the fsdp axis: decoding would gather every kernel at every step."""

        def whole(place: NamedSharding) -> NamedSharding:
            spec = (None if axis == "fsdp" else axis for axis in place.spec)
            return NamedSharding(self.mesh, PartitionSpec(*spec))

        return jax.tree.map(whole, self.tree(tree))

    def unstacked(self, places):
        """The places of one layer's parameters, of those of the stacked ones."""
        return jax.tree.map(
            lambda place: NamedSharding(self.mesh, PartitionSpec(*place.spec[1:])), places
        )

    def _spec(self, axes) -> PartitionSpec:
        return PartitionSpec(*(self.kv_axis if axis == "kv" else axis for axis in axes))


def make_sharder(mesh: Mesh, heads: int, kv_heads: int) -> Sharder:
    """A tensor axis splits whole heads; key/value heads that it does not divide are replicated."""
    tensor = mesh.shape["tensor"]
    if heads % tensor:
        allowed = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"mesh tensor={tensor} does not divide num_attention_heads={heads}; allowed: {allowed}"
        )
    return Sharder(mesh, "tensor" if kv_heads % tensor == 0 else None)


@struct.dataclass
class TokenShards:
    """How the vocabulary projection is split: tokens over the batch axes, the vocabulary rows."""

    mesh: Mesh = struct.field(pytree_node=False)

    vocabulary_axis = "tensor"
    tokens = PartitionSpec(BATCH)
    vocabulary = PartitionSpec(None, "tensor")  # of [D, V]: gathered over fsdp
    vocabulary_gradient = PartitionSpec("fsdp", "tensor")

    def map(self, function: Callable, in_specs, out_specs) -> Callable:
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def reduce_gradient(self, dW_DV: jax.Array) -> jax.Array:
        """Sum over all tokens of a device's [D, V] part, left as `vocabulary_gradient` says."""
        dW_DV = jax.lax.psum_scatter(dW_DV, "fsdp", scatter_dimension=0, tiled=True)
        return jax.lax.psum(dW_DV, "data")


@struct.dataclass
class HeadShards:
    """How attention is split: rows over the batch axes, heads over the tensor axis."""

    mesh: Mesh = struct.field(pytree_node=False)

    def held(self, heads: int, kv_heads: int) -> tuple[int, int]:
        """Query and key/value heads that the mapped function gets on one device."""
        own = heads // self.mesh.shape["tensor"]
        if kv_heads % self.mesh.shape["tensor"] == 0:
            return own, kv_heads // self.mesh.shape["tensor"]
        return own, own // math.gcd(own, heads // kv_heads)

    def map(self, function: Callable, heads: int, kv_heads: int, kv_head_axis: int = 2) -> Callable:
        """shard_map of `function(q_BTNH, k_BSKH, v_BSKH, rows) -> context_BTNH`, `rows` [B, ...].

        With kv_head_axis=1 keys and values are [B, K, S, H].
        Key/value heads that the tensor axis does not divide are held by every device; `function`
        gets the ones that the device's query heads read.
        """
        tensor = self.mesh.shape["tensor"]
        if heads % tensor or heads % kv_heads:
            allowed = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"mesh tensor={tensor} or {kv_heads} key/value heads do not divide {heads} query "
                f"heads; allowed: {allowed}"
            )
        split = PartitionSpec(BATCH, None, "tensor", None)
        whole = kv_heads % tensor != 0
        kv_axes = [None] * kv_head_axis if whole else [*[None] * (kv_head_axis - 1), "tensor"]
        kv_split = PartitionSpec(BATCH, *kv_axes)

        def local(q_BTNH, k, v, rows):
            if whole:
                device = jax.lax.axis_index("tensor")
                heads_J = read_heads(device, heads // tensor, heads // kv_heads)
                k, v = (jax.numpy.take(x, heads_J, axis=kv_head_axis) for x in (k, v))
            return function(q_BTNH, k, v, rows)

        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(split, kv_split, kv_split, PartitionSpec(BATCH)),
            out_specs=split,
            check_vma=False,
        )


def read_heads(device, held: int, group: int) -> jax.Array:
    """The key/value heads of a device that holds `held` query heads, `group` of which share one.

    One for each run of gcd(held, group) query heads: on every device such runs share one.
    """
    run = math.gcd(held, group)
    return (device * held + jax.numpy.arange(0, held, run)) // group


def row_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The leading axis over as many devices as divide it: contiguous in a file, read once."""
    for axes in (AXES, ("data", "fsdp"), ("fsdp", "tensor"), ("fsdp",), ("data",), ("tensor",)):
        if shape[0] % int(np.prod([mesh.shape[axis] for axis in axes])) == 0:
            return NamedSharding(mesh, PartitionSpec(axes))
    return NamedSharding(mesh, PartitionSpec())


def put_rows(
    mesh: Mesh, rows_of: Callable[[slice], np.ndarray], shape: tuple[int, ...]
) -> jax.Array:
    """A global [B, ...] array of which each process reads only the rows that its devices hold."""

    def read(index) -> np.ndarray:
        return rows_of(index[0])[(slice(None), *index[1:])]

    return jax.make_array_from_callback(shape, batch_sharding(mesh), read)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch that every process holds whole, spread over the mesh by rows."""
    if jax.process_count() == 1:
        return jax.device_put(batch, batch_sharding(mesh))
    return {
        name: put_rows(mesh, lambda rows, a=array: a[rows], array.shape)
        for name, array in batch.items()
    }


def gather_to_host(tree):
    """Every process gets the whole of each array, as numpy."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


def largest_over_processes(value: float) -> float:
    """The largest of the processes' values; NaN if one of them is."""
    return float(np.max(gather_to_host(np.array([value]))))
