"""The next token from logits. B batch, V vocabulary."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Sampling:
    """Static sampling settings; temperature 0 is greedy."""

    temperature: float = struct.field(pytree_node=False)
    top_k: int = struct.field(pytree_node=False)  # 0: off
    top_p: float = struct.field(pytree_node=False)  # 1: off
    max_new_tokens: int = struct.field(pytree_node=False)


def next_token(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling):
    """Token and log-prob [B] under softmax(logits / temperature); 1 stands for 0 there."""
    scale = sampling.temperature if sampling.temperature > 0 else 1.0
    logits_BV = logits_BV.astype(jnp.float32) / scale
    if sampling.temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1)
    else:
        kept_BV = _keep_likely(logits_BV, sampling)
        token_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B.astype(jnp.int32), chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def _keep_likely(logits_BV, sampling: Sampling):
    """-inf outside the top-k tokens and outside the smallest set of probability top_p."""
    if sampling.top_k > 0:
        least_B = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B, -jnp.inf, logits_BV)
    if sampling.top_p < 1.0:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV), axis=-1) - jax.nn.softmax(sorted_BV)
        least_B = jnp.min(
            jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True
        )
        logits_BV = jnp.where(logits_BV < least_B, -jnp.inf, logits_BV)
    return logits_BV
