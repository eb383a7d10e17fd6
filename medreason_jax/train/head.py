"""The vocabulary projection, in chunks of tokens: no [batch, time, vocabulary] array exists.

B batch, T time, M tokens of one device, D model, V vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp

from medreason_jax.mesh import TokenShards


def token_logprobs(
    h_BTD: jax.Array,
    W_VD: jax.Array,
    labels_BT: jax.Array,
    *,
    shards: TokenShards,
    chunk: int,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each label and entropy of its distribution, float32 [B, T] each.

    Differentiable in h and W; the backward pass recomputes a chunk's logits. `chunk` is in tokens.
    Logits are divided by `temperature` (the sampler's), so that both sides mean one distribution.
    """
    _, T, D = h_BTD.shape

    def per_shard(h_BTD, W_VD, labels_BT):
        rows = h_BTD.shape[0]
        logp_M, entropy_M = _chunked(
            h_BTD.reshape(rows * T, D), W_VD, labels_BT.reshape(rows * T), chunk, temperature
        )
        return logp_M.reshape(rows, T), entropy_M.reshape(rows, T)

    whole = (True, False, True)
    return shards.map(per_shard, whole, (True, True))(h_BTD, W_VD, labels_BT)


def _chunked(h_MD, W_VD, labels_M, chunk, temperature):
    tokens, D = h_MD.shape
    chunk = min(chunk, tokens)
    padding = -tokens % chunk
    h_CcD = jnp.pad(h_MD, ((0, padding), (0, 0))).reshape(-1, chunk, D)
    labels_Cc = jnp.pad(labels_M, (0, padding)).reshape(-1, chunk)
    W_VD = W_VD.astype(h_MD.dtype)

    @partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(h_cD, labels_c):
        logits_cV = jax.lax.dot_general(
            h_cD, W_VD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        logits_cV = logits_cV / temperature
        norm_c = jax.nn.logsumexp(logits_cV, axis=-1)
        logp_c = jnp.take_along_axis(logits_cV, labels_c[:, None], axis=-1)[:, 0] - norm_c
        mean_c = jnp.sum(jnp.exp(logits_cV - norm_c[:, None]) * logits_cV, axis=-1)
        return logp_c, norm_c - mean_c  # H = log Z - E[logit]

    _, (logp_Cc, entropy_Cc) = jax.lax.scan(
        lambda carry, xs: (carry, one_chunk(*xs)), None, (h_CcD, labels_Cc)
    )
    return logp_Cc.reshape(-1)[:tokens], entropy_Cc.reshape(-1)[:tokens]
