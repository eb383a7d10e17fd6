"""Losses as arithmetic on arrays: elementwise, never averaged here; no model.

B batch, T time, P preference pairs.
"""

import jax
import jax.numpy as jnp


def dpo_loss(chosen_P, rejected_P, reference_chosen_P, reference_rejected_P, beta: float):
    """-log sigmoid(beta * margin) per pair, from summed log-probs (arXiv 2305.18290, eq. 7)."""
    margin_P = (chosen_P - reference_chosen_P) - (rejected_P - reference_rejected_P)
    return -jax.nn.log_sigmoid(beta * margin_P)


def ppo_policy_loss(logp_BT, old_logp_BT, advantages_BT, clip: float):
    """max(-A r, -A clip(r, 1-e, 1+e)) (arXiv 1707.06347, eq. 7), and whether it clipped."""
    ratio_BT = jnp.exp(jnp.clip(logp_BT - old_logp_BT, -20.0, 20.0))
    plain_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * jnp.clip(ratio_BT, 1.0 - clip, 1.0 + clip)
    return jnp.maximum(plain_BT, clipped_BT), clipped_BT > plain_BT


def clipped_value_loss(values_BT, old_values_BT, returns_BT, clip: float):
    """Half of the larger squared error: of the value, and of it kept near the old one."""
    near_BT = old_values_BT + jnp.clip(values_BT - old_values_BT, -clip, clip)
    return 0.5 * jnp.maximum((values_BT - returns_BT) ** 2, (near_BT - returns_BT) ** 2)
