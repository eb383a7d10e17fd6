"""The device mesh and who holds what on it: the only file that names a mesh axis."""

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
# Stacked layers have a leading axis, which is never sharded.
PARAM_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed_tokens\.embedding", PartitionSpec("tensor", "fsdp")),
    (r"layers\..*\.(q|k|v|gate|up)_proj\.kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"layers\..*\.(q|k|v)_proj\.bias", PartitionSpec(None, "tensor")),
    (r"layers\..*\.(o|down)_proj\.kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"layers\..*layernorm\.weight", PartitionSpec()),
    (r"norm\.weight", PartitionSpec()),
    (r"lm_head\.kernel", PartitionSpec("fsdp", "tensor")),
    (r"score\.(kernel|bias)", PartitionSpec()),
)

# Logical axes of activations.
ACTIVATION_AXES = {
    "batch": BATCH,
    "time": None,
    "model": None,
    "mlp": "tensor",
    "heads": "tensor",
    None: None,
}


def start_processes(folder: Path) -> None:
    """Join the other processes of this program, when the launcher says there are any.

    Compiled programs are kept in `folder`/compile_cache, unless a place for them was set before.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((folder / "compile_cache").absolute()))
    if "MEDREASON_COORDINATOR" in os.environ:
        jax.distributed.initialize(
            coordinator_address=os.environ["MEDREASON_COORDINATOR"],
            num_processes=int(os.environ["MEDREASON_PROCESS_COUNT"]),
            process_id=int(os.environ["MEDREASON_PROCESS_ID"]),
        )


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """A data x fsdp x tensor mesh over all devices of all processes; data=-1 takes the rest."""
    found = jax.device_count()
    if data == -1:
        data = max(found // (fsdp * tensor), 1)
    if data * fsdp * tensor != found:
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} needs {data * fsdp * tensor} "
            f"devices, found {found}; set the three so that their product is {found}"
        )
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def batch_shards(mesh: Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


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
    return ".".join(
        str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part))))
        for part in path
    )


def param_spec(path: str, shape: tuple[int, ...]) -> PartitionSpec:
    if not shape:
        return PartitionSpec()
    for pattern, spec in PARAM_RULES:
        if re.search(rf"(^|\.){pattern}$", path):
            return spec
    raise ValueError(f"no sharding rule matches parameter {path!r}; add one to PARAM_RULES")


def tree_shardings(mesh: Mesh, tree):
    """NamedSharding of every leaf: parameters, and optimizer state whose paths end like theirs."""

    def sharding(path, leaf):
        name = path_name(path)
        spec = param_spec(name, leaf.shape)
        for size, axis in zip(leaf.shape, spec, strict=False):
            parts = 1 if axis is None else mesh.shape[axis]
            if size % parts:
                raise ValueError(
                    f"{name} has a dimension of {size}, not a multiple of axis {axis}={parts}; "
                    f"choose {axis} among the divisors of {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


@struct.dataclass
class Sharder:
    """Constrains an activation by the names of its axes."""

    mesh: Mesh = struct.field(pytree_node=False)

    def __call__(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        spec = PartitionSpec(*(ACTIVATION_AXES[axis] for axis in axes))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


@struct.dataclass
class TokenShards:
    """How per-shard kernels split [tokens] arrays: what `train/head.py` needs of a mesh."""

    mesh: Mesh = struct.field(pytree_node=False)

    def map(self, function: Callable, in_tokens: tuple[bool, ...], out_tokens) -> Callable:
        """shard_map of `function`; True marks an array whose leading axis is tokens, else whole."""
        spec = lambda is_tokens: PartitionSpec(BATCH) if is_tokens else PartitionSpec()  # noqa: E731
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(spec(flag) for flag in in_tokens),
            out_specs=jax.tree.map(spec, out_tokens),
            check_vma=False,
        )


def put_rows(
    mesh: Mesh, rows_of: Callable[[slice], np.ndarray], shape: tuple[int, ...]
) -> jax.Array:
    """A global [B, ...] array of which each process reads only the rows that its devices hold."""

    def read(index) -> np.ndarray:
        return rows_of(index[0])[(slice(None), *index[1:])]

    return jax.make_array_from_callback(shape, batch_sharding(mesh), read)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch that every process holds whole, spread over the mesh by rows."""
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
