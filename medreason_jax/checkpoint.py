"""Train states and parameters on disk, through Orbax; a folder appears whole or not at all.

Arrays are stored in small chunks, none of which spans two layers, so that one layer can be read
without the rest.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from medreason_jax.mesh import is_stacked, path_name

CHUNK_BYTES = 64_000_000


def save_args(tree: Any) -> Any:
    """At most CHUNK_BYTES in a chunk; Orbax splits an axis of `shard_axes` down to length 1."""

    def args(path, _):
        axes = (0,) if is_stacked(path_name(path)) else ()
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=axes)

    return jax.tree_util.tree_map_with_path(args, tree)


def abstract_like(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs that say where each leaf is to be restored."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


class StateCheckpoints:
    """The last two train states of a stage, saved while training goes on."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state, save_args=save_args(state)),
            facts=ocp.args.JsonSave(facts),
        )
        self.manager.save(step, args=args)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), facts=ocp.args.JsonRestore()
        )
        restored = self.manager.restore(step, args=args)
        return restored["state"], restored["facts"]

    def close(self) -> None:
        self.manager.wait_until_finished()
        self.manager.close()


def save_params(folder: Path, params: Any) -> None:
    """Parameters alone, for the stages that follow."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), params, save_args=save_args(params), force=True)


def load_params(folder: Path, abstract_params: Any, shardings: Any) -> Any:
    """Parameters of `save_params`, each placed by its leaf of `shardings`."""
    require_folder(folder)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute(), abstract_like(abstract_params, shardings))


def require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; a checkpoint folder holds params/")


class ParamReader:
    """Reads a folder of `save_params` on the host, at most one layer of one leaf at a time.

    `leaves` is {dotted path: (shape, dtype)}; stacked leaves keep their leading [L]. No mesh, no
    device and no cache: what a `read` held besides its result is freed when it returns.
    """

    def __init__(self, folder: Path):
        require_folder(folder)
        self.folder = folder
        self.stores = open_stores(folder)
        self.leaves = {
            path: (tuple(store.shape), store.dtype.numpy_dtype)
            for path, store in self.stores.items()
        }

    def read(self, path: str, layer: int | None = None, rows: slice | None = None) -> np.ndarray:
        """A whole leaf, or one layer of a stacked one; of that, `rows` of its leading axis."""
        if path not in self.stores:
            known = ", ".join(sorted(self.stores)[:3])
            raise ValueError(
                f"{self.folder} has no leaf {path!r}; it has {len(self.stores)}: {known}, ..."
            )
        store = self.stores[path]
        if is_stacked(path):
            if layer is None or not 0 <= layer < store.shape[0]:
                raise ValueError(f"{path} has layers 0 to {store.shape[0] - 1}, not layer={layer}")
            store = store[layer]
        elif layer is not None:
            raise ValueError(f"{path} is not stacked; read it without layer={layer}")
        if rows is not None:
            first, end, step = rows.indices(store.shape[0])
            if step != 1:
                raise ValueError(f"rows={rows} of {path}: the step can only be 1")
            store = store[first : max(first, end)]
        return store.read().result()


def open_stores(folder: Path) -> dict[str, ts.TensorStore]:
    """Every array of an Orbax folder: a zarr array under its dotted path in one OCDBT database."""
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.absolute()}/"}}
    keys = ts.KvStore.open(database, context=context).result().list().result()
    paths = [
        name.removesuffix("/.zarray") for key in keys if (name := key.decode()).endswith("/.zarray")
    ]
    if not paths:
        raise FileNotFoundError(f"{folder} holds no arrays; give a params/ folder of a checkpoint")
    opened = {
        path: ts.open(
            {"driver": "zarr", "kvstore": {**database, "path": f"{path}/"}},
            context=context,
            read=True,
        )
        for path in paths
    }
    return {path: store.result() for path, store in opened.items()}


def remove_states(folder: Path) -> None:
    """Forget the train states of a finished stage."""
    shutil.rmtree(folder, ignore_errors=True)
