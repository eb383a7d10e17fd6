"""Linear heads on hidden states: the value of a state, the classes of a text."""

import jax
import jax.numpy as jnp

Head = dict[str, dict[str, jax.Array]]


def init_score(hidden_size: int, outputs: int) -> Head:
    """A zero head, so that a fresh critic starts from the value 0."""
    return {"score": {"kernel": jnp.zeros((hidden_size, outputs)), "bias": jnp.zeros(outputs)}}


def score(head: Head, h_BTD: jax.Array) -> jax.Array:
    """Scores [B, T, outputs], float32."""
    return h_BTD.astype(jnp.float32) @ head["score"]["kernel"] + head["score"]["bias"]
