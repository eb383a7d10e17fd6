"""Sampled responses as rows for scoring and training. B rollouts, T row length."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from medreason_jax.generate.requests import Completion
from medreason_jax.qwen2.heads import score
from medreason_jax.qwen2.model import Params
from medreason_jax.rl.advantage import gae, token_rewards, whiten
from medreason_jax.train.objectives import Policy


def rollout_rows(
    prompts: Sequence[Sequence[int]], completions: Sequence[Completion], length: int, pad_id: int
) -> dict[str, np.ndarray]:
    """One rollout a row, arrays [B, T]; weights are 1 on the response's targets."""
    B = len(prompts)
    rows = {name: np.zeros((B, length), np.int32) for name in ("segments", "positions")}
    rows |= {name: np.full((B, length), pad_id, np.int32) for name in ("tokens", "targets")}
    rows |= {name: np.zeros((B, length), np.float32) for name in ("weights", "sampled_logp")}
    for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = [*prompt, *completion.ids]
        n, first = len(ids), len(prompt) - 1  # position `first` predicts the first response token
        rows["tokens"][b, :n] = ids
        rows["targets"][b, : n - 1] = ids[1:]
        rows["weights"][b, first : n - 1] = 1.0
        rows["sampled_logp"][b, first : n - 1] = completion.logprobs
        rows["segments"][b, :n] = 1
        rows["positions"][b, :n] = np.arange(n)
    return rows


def leave_out(rows: dict[str, np.ndarray], out: Sequence[bool]) -> None:
    """Rollouts whose answer could not be judged teach nothing: none of their tokens counts."""
    rows["weights"][np.array(out)] = 0.0


def make_rollout_scorer(policy: Policy, kl_coef: float, gamma: float, gae_lambda: float):
    """`(trainable, frozen, rows, score_B) -> (training rows, metrics)`, jitted."""

    def score_rollouts(trainable: Params, frozen: Params, rows, score_B):
        mask_BT = rows["weights"]
        params = policy.params(trainable["policy"], frozen)
        h_BTD = policy.scorer.hidden(params, rows)
        scores = policy.scorer.scores(params, rows, h_BTD)
        logp_BT, entropy_BT = scores.logp, scores.entropy
        reference_BT = policy.reference_logp(frozen, rows)
        values_BT = score(trainable["critic"], h_BTD)[..., 0] * mask_BT
        rewards_BT = token_rewards(score_B, logp_BT, reference_BT, mask_BT, kl_coef)
        advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma, gae_lambda)
        tokens = jnp.maximum(jnp.sum(mask_BT), 1.0)
        replies = jnp.sum(jnp.any(mask_BT > 0, axis=1))
        gap_BT = jnp.abs(logp_BT - rows["sampled_logp"]) * mask_BT
        error_BT = (returns_BT - values_BT) ** 2 * mask_BT
        spread_BT = (returns_BT - jnp.sum(returns_BT) / tokens) ** 2 * mask_BT
        metrics = {
            "kl": jnp.sum((logp_BT - reference_BT) * mask_BT) / jnp.maximum(replies, 1.0),
            "sampler_gap": jnp.max(gap_BT),
            "policy_entropy": jnp.sum(entropy_BT * mask_BT) / tokens,
            "value_explained": 1.0 - jnp.sum(error_BT) / jnp.maximum(jnp.sum(spread_BT), 1e-8),
        }
        kept = {
            name: rows[name] for name in ("tokens", "targets", "weights", "segments", "positions")
        }
        kept |= {
            "old_logp": logp_BT,
            "old_values": values_BT,
            "advantages": whiten(advantages_BT, mask_BT),
            "returns": returns_BT,
        }
        return kept, metrics

    return jax.jit(score_rollouts)
