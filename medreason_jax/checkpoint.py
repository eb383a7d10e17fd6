"""Train states and parameters on disk, through Orbax; a folder appears whole or not at all."""

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from medreason_jax.mesh import tree_shardings


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
            state=ocp.args.StandardSave(state), facts=ocp.args.JsonSave(facts)
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
        checkpointer.save(folder.absolute(), params, force=True)


def load_params(folder: Path, abstract_params: Any, mesh) -> Any:
    """Parameters of `save_params`, placed on the mesh."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; a checkpoint folder holds params/")
    target = abstract_like(abstract_params, tree_shardings(mesh, abstract_params))
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute(), target)


def remove_states(folder: Path) -> None:
    """Forget the train states of a finished stage."""
    shutil.rmtree(folder, ignore_errors=True)
