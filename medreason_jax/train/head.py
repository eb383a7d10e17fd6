"""The vocabulary projection, in chunks of tokens: no [batch, time, vocabulary] array exists.

B batch, T time, M tokens of one device, c tokens of a chunk, D model, V vocabulary (of one device
inside the per-shard functions). z logits, p probabilities.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from medreason_jax.mesh import TokenShards


@struct.dataclass
class TokenScores:
    """Of every token, float32 [B, T]: differentiable but for `correct`."""

    logp: jax.Array  # log-probability of the label
    entropy: jax.Array  # of the distribution
    log_norm: jax.Array  # log Z, what a z-loss keeps small
    correct: jax.Array  # 1 where the label has the largest logit


def token_scores(
    h_BTD: jax.Array,
    W_VD: jax.Array,
    labels_BT: jax.Array,
    *,
    shards: TokenShards,
    chunk: int,
    temperature: float = 1.0,
) -> TokenScores:
    """Scores of each label under the distribution that h and W give.

    Differentiable in h and W; the backward pass recomputes a chunk's logits. `chunk` is in tokens.
    Logits are divided by `temperature` (the sampler's), so that both sides mean one distribution.
    The vocabulary may be split over devices; W is gathered once, before the chunks, and its
    gradient is summed in float32 and reduced once, after them.
    """
    return TokenScores(*_scores(shards, chunk, temperature, h_BTD, W_VD, labels_BT))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scores(shards, chunk, temperature, h_BTD, W_VD, labels_BT):
    return _forward(shards, chunk, temperature, h_BTD, W_VD, labels_BT)[0]


def _forward(shards: TokenShards, chunk, temperature, h_BTD, W_VD, labels_BT):
    axis = shards.vocabulary_axis

    def one_chunk(W_DV, h_cD, labels_c):
        z_cV = _logits(h_cD, W_DV, temperature)
        largest_c = jax.lax.pmax(jnp.max(z_cV, axis=-1), axis)
        is_label_cV = _is_label(labels_c, z_cV.shape, axis)
        z_label_c = jax.lax.psum(jnp.sum(jnp.where(is_label_cV, z_cV, 0.0), axis=-1), axis)
        # All from the largest logit on: log Z - z would cancel where one token is likely.
        below_cV = z_cV - largest_c[:, None]
        e_cV = jnp.exp(below_cV)
        sums_c = jax.lax.psum(jnp.sum(e_cV, axis=-1), axis)
        log_sums_c = jnp.log(sums_c)
        mean_c = jax.lax.psum(jnp.sum(e_cV * below_cV, axis=-1), axis) / sums_c
        logp_c, entropy_c = z_label_c - largest_c - log_sums_c, log_sums_c - mean_c
        correct_c = (z_label_c >= largest_c).astype(jnp.float32)
        return logp_c, entropy_c, largest_c + log_sums_c, correct_c

    def per_shard(h_BTD, W_DV, labels_BT):
        chunks = _chunks(chunk, h_BTD, labels_BT)
        _, outs = jax.lax.scan(lambda _, xs: (None, one_chunk(W_DV, *xs)), None, chunks)
        return tuple(_whole(x_Cc, labels_BT.shape) for x_Cc in outs)

    in_specs = (shards.tokens, shards.vocabulary, shards.tokens)
    mapped = shards.map(per_shard, in_specs, (shards.tokens,) * 4)
    outputs = mapped(h_BTD, W_VD.T.astype(h_BTD.dtype), labels_BT)
    _, entropy_BT, norm_BT, _ = outputs
    return outputs, (h_BTD, W_VD, labels_BT, norm_BT, entropy_BT)


def _backward(shards: TokenShards, chunk, temperature, residuals, cotangents):
    h_BTD, W_VD, labels_BT, norm_BT, entropy_BT = residuals
    axis = shards.vocabulary_axis

    def one_chunk(W_DV, dW_DV, h_cD, labels_c, norm_c, entropy_c, g_logp_c, g_entropy_c, g_norm_c):
        logp_cV = _logits(h_cD, W_DV, temperature) - norm_c[:, None]
        p_cV = jnp.exp(logp_cV)
        is_label_cV = _is_label(labels_c, p_cV.shape, axis)
        # d logp / dz = onehot - p;  dH / dz = -p (log p + H);  d log Z / dz = p
        deviation_cV = logp_cV + entropy_c[:, None]
        dz_cV = jnp.where(is_label_cV, g_logp_c[:, None], 0.0)
        scale_cV = (g_norm_c - g_logp_c)[:, None] - g_entropy_c[:, None] * deviation_cV
        dz_cV = dz_cV + p_cV * scale_cV
        dz_cV = (dz_cV / temperature).astype(h_cD.dtype)
        product = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        dh_cD = jax.lax.psum(product(dz_cV, W_DV, (((1,), (1,)), ((), ()))), axis)
        return dW_DV + product(h_cD, dz_cV, (((0,), (0,)), ((), ()))), dh_cD.astype(h_cD.dtype)

    def per_shard(W_DV, h_BTD, *per_token):
        chunks = _chunks(chunk, h_BTD, *per_token)
        zeros_DV = jnp.zeros(W_DV.shape, jnp.float32)
        dW_DV, dh_CcD = jax.lax.scan(
            lambda dW_DV, xs: one_chunk(W_DV, dW_DV, *xs), zeros_DV, chunks
        )
        return _whole(dh_CcD, h_BTD.shape), shards.reduce_gradient(dW_DV)

    in_specs = (shards.vocabulary, *(shards.tokens,) * 7)
    mapped = shards.map(per_shard, in_specs, (shards.tokens, shards.vocabulary_gradient))
    per_token = (labels_BT, norm_BT, entropy_BT, *cotangents[:3])  # `correct` has no gradient
    # The sum over devices comes before the layers' backward pass, or its operand lives through it.
    dh_BTD, dW_DV = jax.lax.optimization_barrier(
        mapped(W_VD.T.astype(h_BTD.dtype), h_BTD, *per_token)
    )
    return dh_BTD, dW_DV.T.astype(W_VD.dtype), None


_scores.defvjp(_forward, _backward)


def _logits(h_cD, W_DV, temperature):
    z_cV = jax.lax.dot_general(
        h_cD, W_DV, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    return z_cV / temperature


def _is_label(labels_c, shape_cV, axis):
    """True where a column of this device's part of the vocabulary is the token's label."""
    first = shape_cV[1] * jax.lax.axis_index(axis)
    return first + jax.lax.broadcasted_iota(jnp.int32, shape_cV, 1) == labels_c[:, None]


def _chunks(chunk: int, *arrays):
    """[B, T, ...] -> [C, c, ...], padded with zeros: a padded token has no cotangent."""

    def split(x):
        x = x.reshape(-1, *x.shape[2:])
        size = min(chunk, x.shape[0])
        x = jnp.pad(x, ((0, -x.shape[0] % size), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(-1, size, *x.shape[1:])

    return tuple(split(x) for x in arrays)


def _whole(x_Cc, shape):
    """The inverse of `_chunks`."""
    flat = x_Cc.reshape(-1, *x_Cc.shape[2:])
    return flat[: shape[0] * shape[1]].reshape(shape)
