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
from medreason_jax.train.head import TokenScores, token_scores
from medreason_jax.train.losses import clipped_value_loss, dpo_loss, ppo_policy_loss

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


@struct.dataclass
class Objective:
    """loss = sum over names of coefficient * sum / weight.

    `weights(batch)` depends on masks only, so the step takes them over the global batch before it
    splits the batch; accumulation, packing and sharding then cannot move the loss.
    `sums(trainable, frozen, batch)` gives a loss sum for every weight, and metrics as {name: (sum,
    weight)}.
    """

    weights: Callable[[Batch], Sums] = struct.field(pytree_node=False)
    sums: Callable[[Params, Params, Batch], tuple[Sums, dict[str, Any]]] = struct.field(
        pytree_node=False
    )
    coefficients: dict[str, float] = struct.field(pytree_node=False)


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
        return token_scores(
            h_BTD,
            self.network.vocabulary_kernel(params),
            batch["targets"],
            shards=self.shards,
            chunk=self.chunk,
            temperature=self.temperature,
        )


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

    def sums(trainable, frozen, batch):
        scores, mask_BT = policy.scores(trainable, frozen, batch), batch["weights"]
        losses = {"nll": -jnp.sum(scores.logp * mask_BT)}
        if z_loss > 0:
            losses["z"] = jnp.sum(scores.log_norm**2 * mask_BT)
        correct = jnp.sum(scores.correct * mask_BT)
        return losses, {"token_accuracy": (correct, jnp.sum(mask_BT))}

    return Objective(weights, sums, {"nll": 1.0, "z": z_loss})


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

    def sums(trainable, frozen, batch):
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
        return {"dpo": jnp.sum(losses_BP * pairs_BP), "nll": jnp.sum(nll_BP * pairs_BP)}, metrics

    return Objective(weights, sums, {"dpo": 1.0, "nll": alpha})


def proximal_policy(policy: Policy, clip: float, value_clip: float, value_coef: float) -> Objective:
    """PPO (arXiv 1707.06347): clipped policy loss and clipped value loss over response tokens.

    trainable = {"policy", "critic"}; the critic is a linear score of the policy's hidden states,
    whose gradient stops there. Batches also hold old_logp, old_values, advantages, returns: [B, T].
    """

    def weights(batch):
        tokens = jnp.sum(batch["weights"])
        return {"policy": tokens, "value": tokens}

    def sums(trainable, frozen, batch):
        mask_BT = batch["weights"]
        params = policy.params(trainable["policy"], frozen)
        h_BTD = policy.scorer.hidden(params, batch)
        scores = policy.scorer.scores(params, batch, h_BTD)
        logp_BT, entropy_BT = scores.logp, scores.entropy
        values_BT = score(trainable["critic"], jax.lax.stop_gradient(h_BTD))[..., 0]
        policy_BT, clipped_BT = ppo_policy_loss(
            logp_BT, batch["old_logp"], batch["advantages"], clip
        )
        value_BT = clipped_value_loss(values_BT, batch["old_values"], batch["returns"], value_clip)
        tokens = jnp.sum(mask_BT)
        log_ratio_BT = logp_BT - batch["old_logp"]
        metrics = {
            "entropy": (jnp.sum(entropy_BT * mask_BT), tokens),
            "clip_fraction": (jnp.sum(clipped_BT * mask_BT), tokens),
            "approx_kl": (jnp.sum(0.5 * log_ratio_BT**2 * mask_BT), tokens),
        }
        losses = {"policy": jnp.sum(policy_BT * mask_BT), "value": jnp.sum(value_BT * mask_BT)}
        return losses, metrics

    return Objective(weights, sums, {"policy": 1.0, "value": value_coef})
