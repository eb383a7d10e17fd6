"""The vocabulary projection, in chunks of tokens: no [batch, time, vocabulary] array exists.

B batch, T time, M tokens of one device, c tokens of a chunk, D model, V vocabulary (of one device
inside the per-shard functions). z logits, p probabilities.
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
    The vocabulary may be split over devices; W is gathered once, before the chunks, and its
    gradient is summed in float32 and reduced once, after them.
    """
    return _token_logprobs(shards, chunk, temperature, h_BTD, W_VD, labels_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _token_logprobs(shards, chunk, temperature, h_BTD, W_VD, labels_BT):
    return _forward(shards, chunk, temperature, h_BTD, W_VD, labels_BT)[0]


def _forward(shards: TokenShards, chunk, temperature, h_BTD, W_VD, labels_BT):
    axis = shards.vocabulary_axis

    def one_chunk(W_VD, h_cD, labels_c):
        z_cV = _logits(h_cD, W_VD, temperature)
        largest_c = jax.lax.pmax(jnp.max(z_cV, axis=-1), axis)
        sums_c = jax.lax.psum(jnp.sum(jnp.exp(z_cV - largest_c[:, None]), axis=-1), axis)
        norm_c = largest_c + jnp.log(sums_c)
        is_label_cV = _is_label(labels_c, z_cV.shape, axis)
        logp_c = jax.lax.psum(jnp.sum(jnp.where(is_label_cV, z_cV, 0.0), axis=-1), axis) - norm_c
        mean_c = jax.lax.psum(jnp.sum(jnp.exp(z_cV - norm_c[:, None]) * z_cV, axis=-1), axis)
        return logp_c, norm_c, mean_c

    def per_shard(h_BTD, W_VD, labels_BT):
        chunks = _chunks(chunk, h_BTD, labels_BT)
        _, outs = jax.lax.scan(lambda _, xs: (None, one_chunk(W_VD, *xs)), None, chunks)
        return tuple(_whole(x_Cc, labels_BT.shape) for x_Cc in outs)

    in_specs = (shards.tokens, shards.vocabulary, shards.tokens)
    mapped = shards.map(per_shard, in_specs, (shards.tokens,) * 3)
    logp_BT, norm_BT, mean_BT = mapped(h_BTD, W_VD.astype(h_BTD.dtype), labels_BT)
    outputs = logp_BT, norm_BT - mean_BT  # H = log Z - E[z]
    return outputs, (h_BTD, W_VD, labels_BT, norm_BT, mean_BT)


def _backward(shards: TokenShards, chunk, temperature, residuals, cotangents):
    h_BTD, W_VD, labels_BT, norm_BT, mean_BT = residuals
    axis = shards.vocabulary_axis

    def one_chunk(W_VD, dW_VD, h_cD, labels_c, norm_c, mean_c, g_logp_c, g_entropy_c):
        z_cV = _logits(h_cD, W_VD, temperature)
        p_cV = jnp.exp(z_cV - norm_c[:, None])
        is_label_cV = _is_label(labels_c, z_cV.shape, axis)
        # d logp / dz = onehot - p;  dH / dz = -p (z - E[z])
        g_logp_c1, deviation_cV = g_logp_c[:, None], z_cV - mean_c[:, None]
        dz_cV = jnp.where(is_label_cV, g_logp_c1, 0.0)
        dz_cV = dz_cV - p_cV * (g_logp_c1 + g_entropy_c[:, None] * deviation_cV)
        dz_cV = (dz_cV / temperature).astype(h_cD.dtype)
        product = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        dh_cD = jax.lax.psum(product(dz_cV, W_VD, (((1,), (0,)), ((), ()))), axis)
        return dW_VD + product(dz_cV, h_cD, (((0,), (0,)), ((), ()))), dh_cD.astype(h_cD.dtype)

    def per_shard(W_VD, h_BTD, *per_token):
        chunks = _chunks(chunk, h_BTD, *per_token)
        zeros_VD = jnp.zeros(W_VD.shape, jnp.float32)
        dW_VD, dh_CcD = jax.lax.scan(
            lambda dW_VD, xs: one_chunk(W_VD, dW_VD, *xs), zeros_VD, chunks
        )
        return _whole(dh_CcD, h_BTD.shape), shards.reduce_gradient(dW_VD)

    in_specs = (shards.vocabulary, *(shards.tokens,) * 6)
    mapped = shards.map(per_shard, in_specs, (shards.tokens, shards.vocabulary_gradient))
    per_token = (labels_BT, norm_BT, mean_BT, *cotangents)
    dh_BTD, dW_VD = mapped(W_VD.astype(h_BTD.dtype), h_BTD, *per_token)
    return dh_BTD, dW_VD.astype(W_VD.dtype), None


_token_logprobs.defvjp(_forward, _backward)


def _logits(h_cD, W_VD, temperature):
    z_cV = jax.lax.dot_general(
        h_cD, W_VD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
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
