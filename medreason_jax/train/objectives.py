"""Every objective of the stack, behind one contract (`Objective`).

B batch, T time, D model, P preference pairs a row, S segments a row (0 is padding).
Batches hold tokens, targets (the next token), weights (1 where the target counts), segments,
positions: all [B, T].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from medreason_jax.mesh import TokenShards
from medreason_jax.qwen2.heads import score
from medreason_jax.qwen2.lora import with_adapter
from medreason_jax.qwen2.model import Network, Params
from medreason_jax.train.head import LossOf, TokenScores, token_loss, token_scores
from medreason_jax.train.losses import clipped_value_loss, dpo_loss, ppo_policy_loss

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


@struct.dataclass
class Objective:
    """loss = sum over names of coefficient * sum / weight.

    `weights(batch)` depends on masks only, so the step takes `scales` over the global batch before
    it splits the batch; accumulation, packing and sharding then cannot move the loss.
    `losses(trainable, frozen, batch, scales)` gives the loss, to be differentiated; its parts, the
    sums times their scales; and metrics as {name: (sum, weight)}.
    """

    weights: Callable[[Batch], Sums] = struct.field(pytree_node=False)
    losses: Callable[[Params, Params, Batch, Sums], tuple[jax.Array, Sums, dict[str, Any]]] = (
        struct.field(pytree_node=False)
    )
    coefficients: dict[str, float] = struct.field(pytree_node=False)

    def scales(self, batch: Batch) -> Sums:
        """coefficient / weight of every name; a weight of nothing counts as 1."""
        weights = self.weights(batch).items()
        return {name: self.coefficients[name] / jnp.maximum(w, 1.0) for name, w in weights}


@struct.dataclass
class Scorer:
    """Log-probs of a batch's targets under some parameters."""

    network: Network = struct.field(pytree_node=False)
    shards: TokenShards = struct.field(pytree_node=False)
    chunk: int = struct.field(pytree_node=False)
    temperature: float = struct.field(pytree_node=False, default=1.0)

    def hidden(self, params: Params, batch: Batch) -> jax.Array:
        return self.network.hidden(params, batch["tokens"], batch["positions"], batch["segments"])

    def scores(self, params: Params, batch: Batch, h_BTD=None) -> TokenScores:
        """Of the targets, [B, T] float32."""
        h_BTD = self.hidden(params, batch) if h_BTD is None else h_BTD
        return token_scores(*self._head(params, batch, h_BTD), **self._settings)

    def loss(
        self, params: Params, batch: Batch, h_BTD, loss_of: LossOf, fields
    ) -> tuple[jax.Array, TokenScores]:
        """`token_loss` of the targets, and their scores."""
        head = self._head(params, batch, h_BTD)
        return token_loss(*head, loss_of, fields, **self._settings)

    def _head(self, params: Params, batch: Batch, h_BTD):
        return h_BTD, self.network.vocabulary_kernel(params), batch["targets"]

    @property
    def _settings(self) -> dict[str, Any]:
        return {"shards": self.shards, "chunk": self.chunk, "temperature": self.temperature}


@struct.dataclass
class Policy:
    """The trained model and the one before training, from what is trained and what is frozen.

    Whole models are trained themselves and `frozen["reference"]` is their copy; an adapter is
    trained over `frozen["base"]`, which without it is the reference.
    """

    scorer: Scorer = struct.field(pytree_node=False)
    reference: Scorer = struct.field(pytree_node=False)
    adapted: bool = struct.field(pytree_node=False)

    def params(self, trainable: Params, frozen: Params) -> Params:
        return with_adapter(frozen["base"], trainable) if self.adapted else trainable

    def scores(self, trainable: Params, frozen: Params, batch: Batch) -> TokenScores:
        return self.scorer.scores(self.params(trainable, frozen), batch)

    def reference_logp(self, frozen: Params, batch: Batch) -> jax.Array:
        params = frozen["base"] if self.adapted else frozen["reference"]
        return self.reference.scores(params, batch).logp


def language_modelling(policy: Policy, z_loss: float = 0.0) -> Objective:
    """CPT and SFT: mean negative log-likelihood over the targets of the global batch.

    `z_loss` x the mean of (log Z)^2 is added (arXiv 2204.02311, 5).
    """

    def weights(batch):
        tokens = jnp.sum(batch["weights"])
        return {"nll": tokens, "z": tokens} if z_loss > 0 else {"nll": tokens}

    def loss_of(scores: TokenScores, scaled: Sums) -> jax.Array:
        loss = -scores.logp * scaled["nll"]
        return loss + scores.log_norm**2 * scaled["z"] if z_loss > 0 else loss

    def losses(trainable, frozen, batch, scales):
        params, mask_BT = policy.params(trainable, frozen), batch["weights"]
        scaled = {name: scale * mask_BT for name, scale in scales.items()}
        h_BTD = policy.scorer.hidden(params, batch)
        loss, scores = policy.scorer.loss(params, batch, h_BTD, loss_of, scaled)
        parts = {"nll": -jnp.sum(scores.logp * scaled["nll"])}
        if z_loss > 0:
            parts["z"] = jnp.sum(scores.log_norm**2 * scaled["z"])
        correct = jnp.sum(scores.correct * mask_BT)
        return loss, parts, {"token_accuracy": (correct, jnp.sum(mask_BT))}

    return Objective(weights, losses, {"nll": 1.0, "z": z_loss})


def preference(policy: Policy, beta: float, alpha: float) -> Objective:
    """RPO: DPO plus alpha x the length-normalised NLL of the chosen answer (arXiv 2404.19733, eq.
    1).

    A row packs whole pairs: segment 2p+1 is the chosen and 2p+2 the rejected answer of pair p, and
    `pairs` [B, P] is 1 where the pair exists. alpha 0 is DPO.
    """

    def weights(batch):
        pairs = jnp.sum(batch["pairs"])
        return {"dpo": pairs, "nll": pairs}

    def per_segment(logp_BT, batch):
        segments = 2 * batch["pairs"].shape[1] + 1
        member_BTS = jax.nn.one_hot(batch["segments"], segments) * batch["weights"][..., None]
        sums_BS = jnp.einsum("bt,bts->bs", logp_BT, member_BTS)
        return sums_BS[:, 1::2], sums_BS[:, 2::2], jnp.sum(member_BTS, axis=1)[:, 1::2]

    def losses(trainable, frozen, batch, scales):
        logp_BT = policy.scores(trainable, frozen, batch).logp
        reference_BT = policy.reference_logp(frozen, batch)
        chosen_BP, rejected_BP, length_BP = per_segment(logp_BT, batch)
        ref_chosen_BP, ref_rejected_BP, _ = per_segment(reference_BT, batch)
        pairs_BP = batch["pairs"]
        count = jnp.sum(pairs_BP)
        losses_BP = dpo_loss(chosen_BP, rejected_BP, ref_chosen_BP, ref_rejected_BP, beta)
        nll_BP = -chosen_BP / jnp.maximum(length_BP, 1.0)
        margin_BP = beta * (chosen_BP - ref_chosen_BP - rejected_BP + ref_rejected_BP)
        metrics = {
            "margin": (jnp.sum(margin_BP * pairs_BP), count),
            "preferred": (jnp.sum((margin_BP > 0) * pairs_BP), count),
            "chosen_logp": (jnp.sum(chosen_BP * pairs_BP), count),
            "rejected_logp": (jnp.sum(rejected_BP * pairs_BP), count),
        }
        sums = {"dpo": jnp.sum(losses_BP * pairs_BP), "nll": jnp.sum(nll_BP * pairs_BP)}
        parts = {name: scales[name] * total for name, total in sums.items()}
        return sum(parts.values()), parts, metrics

    return Objective(weights, losses, {"dpo": 1.0, "nll": alpha})


def proximal_policy(policy: Policy, clip: float, value_clip: float, value_coef: float) -> Objective:
    """PPO (arXiv 1707.06347): clipped policy loss and clipped value loss over response tokens.

    trainable = {"policy", "critic"}; the critic is a linear score of the policy's hidden states,
    whose gradient stops there. Batches also hold old_logp, old_values, advantages, returns: [B, T].
    """

    def weights(batch):
        tokens = jnp.sum(batch["weights"])
        return {"policy": tokens, "value": tokens}

    def clipped_loss(scores: TokenScores, fields: Batch):
        return ppo_policy_loss(scores.logp, fields["old_logp"], fields["advantages"], clip)

    def loss_of(scores: TokenScores, fields: Batch) -> jax.Array:
        return clipped_loss(scores, fields)[0] * fields["weights"]

    def losses(trainable, frozen, batch, scales):
        mask_BT = batch["weights"]
        params = policy.params(trainable["policy"], frozen)
        h_BTD = policy.scorer.hidden(params, batch)
        fields = {name: batch[name] for name in ("old_logp", "advantages")}
        fields["weights"] = scales["policy"] * mask_BT
        policy_loss, scores = policy.scorer.loss(params, batch, h_BTD, loss_of, fields)
        values_BT = score(trainable["critic"], jax.lax.stop_gradient(h_BTD))[..., 0]
        value_BT = clipped_value_loss(values_BT, batch["old_values"], batch["returns"], value_clip)
        value_loss = scales["value"] * jnp.sum(value_BT * mask_BT)
        _, clipped_BT = clipped_loss(scores, fields)
        tokens = jnp.sum(mask_BT)
        log_ratio_BT = scores.logp - batch["old_logp"]
        metrics = {
            "entropy": (jnp.sum(scores.entropy * mask_BT), tokens),
            "clip_fraction": (jnp.sum(clipped_BT * mask_BT), tokens),
            "approx_kl": (jnp.sum(0.5 * log_ratio_BT**2 * mask_BT), tokens),
        }
        parts = {"policy": policy_loss, "value": value_loss}
        return policy_loss + value_loss, parts, metrics

    return Objective(weights, losses, {"policy": 1.0, "value": value_coef})
