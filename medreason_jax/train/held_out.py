"""The loss on records that are not trained on, by cadence."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from medreason_jax.config import TrainConfig
from medreason_jax.data.dataset import evaluation_batches
from medreason_jax.mesh import gather_to_host
from medreason_jax.qwen2.load import Loaded
from medreason_jax.train.objectives import Policy
from medreason_jax.train.run import prepare_source


class HeldOut:
    """Mean negative log-likelihood of the targets of each held-out source."""

    metric = "held_out_loss"  # over all sources: what the best checkpoint is chosen by

    def __init__(
        self, policy: Policy, folders: dict[str, Path], every: int, batch_rows: int, mesh: Mesh
    ):
        self.folders, self.every, self.batch_rows, self.mesh = folders, every, batch_rows, mesh

        def sums(trainable, frozen, batch):
            logp_BT = policy.scores(trainable, frozen, batch).logp
            return -jnp.sum(logp_BT * batch["weights"]), jnp.sum(batch["weights"])

        self.sums = jax.jit(sums)

    def is_due(self, unit: int) -> bool:
        return unit % self.every == 0

    def measure(self, trainable, frozen) -> dict[str, float]:
        """`held_out_loss`, and with several sources `held_out_loss/<name>` of each."""
        parts = {name: self._total(trainable, frozen, f) for name, f in self.folders.items()}
        losses = {f"{self.metric}/{name}": nll / w for name, (nll, w) in parts.items()}
        nll, weight = (sum(part[i] for part in parts.values()) for i in (0, 1))
        return {self.metric: nll / weight} | (losses if len(losses) > 1 else {})

    def _total(self, trainable, frozen, folder: Path) -> tuple[float, float]:
        nll = weight = 0.0
        for batch in evaluation_batches(folder, self.batch_rows, self.mesh):
            part = gather_to_host(self.sums(trainable, frozen, batch))
            nll, weight = nll + float(part[0]), weight + float(part[1])
        return nll, weight


def make_held_out(config: TrainConfig, model: Loaded, policy: Policy) -> HeldOut | None:
    """Prepares the held-out sources; None where the config asks for none."""
    if config.held_out is None:
        return None
    folders: dict[str, Path] = {}
    for source in config.held_out.sources:
        folder = config.folder / "prepared" / f"held_out-{source.path.stem}"
        prepare_source(config, source, model.tokenizer, folder)
        folders[source.path.stem] = folder
    settings = config.held_out
    rows = config.batch_rows // config.accumulation  # what a step holds at a time
    return HeldOut(policy, folders, settings.every, rows, model.mesh)
