"""Token rewards, generalised advantage estimation, whitening. B batch, T time."""

import jax
import jax.numpy as jnp


def token_rewards(score_B, logp_BT, reference_logp_BT, mask_BT, kl_coef: float) -> jax.Array:
    """-beta (log pi - log pi_ref) on every response token, plus the score on the last one.

    The k1 estimator, per token, as HuatuoGPT-o1's code has it (arXiv 2412.18925).
    """
    kl_BT = (logp_BT - reference_logp_BT) * mask_BT
    after_BT = jnp.cumsum(mask_BT[:, ::-1], axis=1)[:, ::-1]  # response tokens from here on
    last_BT = (after_BT == 1) & (mask_BT > 0)
    return -kl_coef * kl_BT + jnp.where(last_BT, score_B[:, None], 0.0)


def gae(rewards_BT, values_BT, mask_BT, gamma: float, lam: float):
    """(advantages, returns) [B, T], 0 outside the mask (arXiv 1506.02438, eq. 16).

    The masked tokens of a row stand together; after the last one the value is 0.
    """
    next_values_BT = jnp.pad(values_BT * mask_BT, ((0, 0), (0, 1)))[:, 1:]
    delta_BT = (rewards_BT + gamma * next_values_BT - values_BT) * mask_BT

    def backwards(later_B, inputs):
        delta_B, mask_B = inputs
        advantage_B = (delta_B + gamma * lam * later_B) * mask_B
        return advantage_B, advantage_B

    start_B = jnp.zeros(rewards_BT.shape[0])
    _, advantages_TB = jax.lax.scan(backwards, start_B, (delta_BT.T, mask_BT.T), reverse=True)
    advantages_BT = advantages_TB.T
    return advantages_BT, (advantages_BT + values_BT) * mask_BT


def whiten(x_BT, mask_BT) -> jax.Array:
    """Mean 0 and variance 1 over the masked tokens of the global batch."""
    count = jnp.maximum(jnp.sum(mask_BT), 1.0)
    mean = jnp.sum(x_BT * mask_BT) / count
    variance = jnp.sum((x_BT - mean) ** 2 * mask_BT) / count
    return (x_BT - mean) * jax.lax.rsqrt(variance + 1e-8) * mask_BT
