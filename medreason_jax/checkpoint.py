"""Train states and parameters on disk, through Orbax; a folder appears whole or not at all.

Arrays are stored in small chunks, none of which spans two layers, so that one layer can be read
without the rest.
"""

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from medreason_jax.checksums import find_damage, write_checksums
from medreason_jax.mesh import gather_to_host, is_stacked, path_name

CHUNK_BYTES = 16_000_000
DATA_FILE_BYTES, MOST_DATA_FILES = 16_000_000, 1000  # of one process
# Orbax completes these after the checksums; a restore does without them.
WRITTEN_WITH_THE_COMMIT = ("_CHECKPOINT_METADATA", "commit_success.txt")
MESSAGE_BYTES = 500


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


class Best:
    """The state to keep by a metric: an Orbax preservation policy."""

    def __init__(self, folder: Path, metric: str, mode: Literal["min", "max"]):
        if mode not in ("min", "max"):
            raise ValueError(f"keep_best of {metric} is {mode!r}; give 'min' or 'max'")
        self.metric, self.choose = metric, {"min": min, "max": max}[mode]
        self.scores: dict[int, float] = {}  # of finite metrics, by step
        for path in folder.glob("[0-9]*/scores/metadata"):
            try:
                self.score(int(path.parts[-3]), json.loads(path.read_bytes()))
            except ValueError:
                continue  # a state that is damaged or was scored by another metric: never best

    def score(self, step: int, metrics: dict[str, float]) -> None:
        """A state without metrics, or with one that is not finite, is never best."""
        self.scores.pop(step, None)
        if not metrics:
            return
        if self.metric not in metrics:
            known = ", ".join(sorted(metrics)[:3])
            raise ValueError(
                f"step {step}: keep_best asks for {self.metric!r}, the {len(metrics)} metrics "
                f"given are {known}"
            )
        if math.isfinite(metrics[self.metric]):
            self.scores[step] = metrics[self.metric]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [info.step for info in checkpoints]
        best = self.step(steps)
        return [step == best for step in steps]

    def step(self, steps: Sequence[int]) -> int | None:
        """The best of the steps; None where none of them has a score."""
        scored = [step for step in steps if step in self.scores]
        return self.choose(scored, key=self.scores.__getitem__) if scored else None


class StateCheckpoints:
    """Train states of a stage, saved while training goes on; only a whole one is restored.

    Kept are the last `keep_last`, those of steps that `keep_every` divides, and the best by
    `keep_best`, (name of a metric that `save` is given, "min" or "max"). An older state goes when
    the next has been committed, which its checksums are a part of: they are written into the
    temporary folder, before the rename that makes it a checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int = 2,
        keep_every: int | None = None,
        keep_best: tuple[str, Literal["min", "max"]] | None = None,
    ):
        self.folder = folder.resolve()
        self.best = None if keep_best is None else Best(self.folder, *keep_best)
        self.saving: int | None = None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation(keep_last, keep_every, self.best),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
            cleanup_tmp_directories=True,
            single_host_load_and_broadcast=True,
        )
        # Uncompressed: zstd takes 8 % off float32 states, for 1.6 times the processor time of a
        # save, which the steps that run meanwhile lack where the host computes.
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(use_compression=False),
            "facts": ocp.JsonCheckpointHandler(),
            "scores": ocp.JsonCheckpointHandler(),
        }
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def save(
        self,
        step: int,
        state: Any,
        facts: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Returns when `state` may be donated; the next `save`, or `close`, waits for the disk."""
        self.manager.wait_until_finished()
        self.saving = step
        scores = {} if metrics is None else metrics
        if self.best is not None:
            self.best.score(step, scores)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state, save_args=save_args(state)),
            facts=ocp.args.JsonSave(facts),
            scores=ocp.args.JsonSave(scores),
        )
        if not self.manager.save(step, args=args):
            raise ValueError(
                f"{self.folder} holds step {self.manager.latest_step()}; a state of step {step} "
                "cannot follow it"
            )

    def _seal(self) -> None:
        """Called by process 0 in the thread that commits, when all processes have written."""
        temporary = self.folder / f"{self.saving}{ocp.utils.TMP_DIR_SUFFIX}"
        write_checksums(temporary, except_for=WRITTEN_WITH_THE_COMMIT)

    def restore_latest(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, facts) of the last whole state; None if there never was one.

        `abstract_state` says shapes, types and places (`abstract_like`), which may differ from
        those of the save. A damaged state is named and set aside; RuntimeError if no other is left.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            damage = self._damage(step)
            if damage is None:
                self._set_aside(damaged, step)
                return step, *self._read(step, abstract_state)
            damaged[step] = damage
        if damaged:
            states = "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())
            raise RuntimeError(
                f"{self.folder} holds no whole train state ({states}); mend the files, or remove "
                "the folder to start anew"
            )
        return None

    def restore_best(self, abstract_state: Any) -> tuple[int, Any]:
        """(step, state) of the best state by `keep_best`; RuntimeError if it is damaged."""
        assert self.best is not None
        self.manager.wait_until_finished()
        step = self.best.step(self.steps())
        if step is None:
            raise RuntimeError(f"{self.folder} holds no state with a finite {self.best.metric}")
        damage = self._damage(step)
        if damage is not None:
            raise RuntimeError(f"{self.folder}: the best state, of step {step}: {damage}")
        return step, self._read(step, abstract_state)[0]

    def _damage(self, step: int) -> str | None:
        """What any process finds wrong with a state."""
        folder = self.folder / str(step)
        return first_message(find_damage(folder, jax.process_index(), jax.process_count()))

    def _set_aside(self, damaged: dict[int, str], whole: int) -> None:
        """Rename damaged states, so that their steps can be saved anew."""
        if not damaged:
            return
        if jax.process_index() == 0:
            for step, damage in damaged.items():
                aside = self.folder / f"{step}.damaged"
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(step)).rename(aside)
                print(
                    f"DAMAGED CHECKPOINT {aside}: {damage}; going back to step {whole}",
                    file=sys.stderr,
                )
        first_message(None)  # the others wait for the renames
        self.manager.reload()

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        places = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(abstract_state, restore_args=places),
            facts=ocp.args.JsonRestore(),
        )
        restored = self.manager.restore(step, args=args)
        return restored["state"], restored["facts"]

    def steps(self) -> list[int]:
        """Of the states that are whole, in order."""
        return sorted(map(int, self.manager.all_steps()))

    def close(self) -> None:
        """Waits until the last save is whole."""
        self.manager.wait_until_finished()
        self.manager.close()


def preservation(keep_last: int, keep_every: int | None, best: Best | None) -> Any:
    """What to keep, as Orbax takes it: a state goes when no policy keeps it."""
    for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} keeps nothing; give 1 or more")
    policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep_last)]
    if keep_every is not None:
        policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
    if best is not None:
        policies.append(best)
    return ocp.checkpoint_managers.AnyPreservationPolicy(policies)


def first_message(message: str | None) -> str | None:
    """The first message that any process has, cut to MESSAGE_BYTES; all processes call it."""
    text = b"" if message is None else message.encode()[:MESSAGE_BYTES]
    padded = np.frombuffer(text.ljust(MESSAGE_BYTES, b"\0"), np.uint8)
    texts = gather_to_host(padded).reshape(-1, MESSAGE_BYTES)
    messages = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in texts]
    return next(filter(None, messages), None)


def save_params(folder: Path, params: Any) -> None:
    """Parameters alone, for the stages that follow; holds one leaf beside them while it writes.

    zarr3 because only with it Orbax takes a size for its data files, which are kept in memory until
    they are full, several at a time: 2 GB each by default.
    """
    sizes = [local_bytes(x) for x in jax.tree.leaves(params)]
    in_flight = 1 + max(sizes) // 10**9  # GB: Orbax refuses an array that is not smaller
    file_bytes = max(DATA_FILE_BYTES, sum(sizes) // MOST_DATA_FILES)
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, save_concurrent_gb=in_flight)
    args = ocp.args.PyTreeSave(
        params, save_args=save_args(params), ocdbt_target_data_file_size=file_bytes
    )
    with ocp.AsyncCheckpointer(handler) as checkpointer:
        checkpointer.save(folder.resolve(), args=args, force=True)


def local_bytes(x: jax.Array | np.ndarray) -> int:
    """What this process's devices hold of an array."""
    if isinstance(x, jax.Array):
        return sum(shard.data.nbytes for shard in x.addressable_shards)
    return x.nbytes


def load_params(folder: Path, abstract_params: Any, shardings: Any) -> Any:
    """Parameters of `save_params`, each placed by its leaf of `shardings`."""
    require_folder(folder)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.resolve(), abstract_like(abstract_params, shardings))


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
    """Every array of an Orbax folder: a zarr array under its dotted path in one OCDBT database.

    Parameters are written as zarr 3, train states as zarr 2.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}}
    keys = ts.KvStore.open(database, context=context).result().list().result()
    drivers = {".zarray": "zarr", "zarr.json": "zarr3"}
    places = (key.decode().rpartition("/") for key in keys)
    paths = {path: drivers[name] for path, _, name in places if name in drivers}
    if not paths:
        raise FileNotFoundError(f"{folder} holds no arrays; give a params/ folder of a checkpoint")
    opened = {
        path: ts.open(
            {"driver": driver, "kvstore": {**database, "path": f"{path}/"}},
            context=context,
            read=True,
        )
        for path, driver in paths.items()
    }
    return {path: store.result() for path, store in opened.items()}


def remove_states(folder: Path) -> None:
    """Forget the train states of a finished stage."""
    shutil.rmtree(folder, ignore_errors=True)
