"""The vocabulary projection, in chunks of tokens: no [batch, time, vocabulary] array exists.

B batch, T time, M tokens of one device, c tokens of a chunk, D model, V vocabulary (of one device
inside the per-shard functions). z logits, p probabilities.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

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
    return _scores(Pass(shards, chunk, temperature), h_BTD, W_VD, labels_BT)


# Of each token from its scores and what else it needs, elementwise: its part of the loss.
LossOf = Callable[[TokenScores, Any], jax.Array]


def token_loss(
    h_BTD: jax.Array,
    W_VD: jax.Array,
    labels_BT: jax.Array,
    loss_of: LossOf,
    fields: Any,
    *,
    shards: TokenShards,
    chunk: int,
    temperature: float = 1.0,
) -> tuple[jax.Array, TokenScores]:
    """The sum over tokens of `loss_of(scores, fields)`, and the scores, as `token_scores` has them.

    Differentiable in h and W through the sum alone, and for less: each token's loss depends on its
    own scores only, so that its gradient is taken while a chunk's logits are there, in the forward
    pass. That is 6 M V D of products in place of 8. `fields` are arrays [B, T] that take no
    gradient; where all are 0 `loss_of` has to be finite.
    """
    one = Pass(shards, chunk, temperature)
    return _loss(one, loss_of, h_BTD, W_VD, labels_BT, jax.lax.stop_gradient(fields))


@dataclass(frozen=True)
class Pass:
    """One over the tokens, in chunks."""

    shards: TokenShards
    chunk: int
    temperature: float

    def scores(self, h_BTD, W_VD, labels_BT) -> TokenScores:
        def per_shard(W_DV, h_BTD, labels_BT):
            chunks = _chunks(self.chunk, h_BTD, labels_BT)
            one_chunk = lambda _, xs: (None, self._logits(W_DV, *xs).scores())  # noqa: E731
            _, scores_Cc = jax.lax.scan(one_chunk, None, chunks)
            return _whole(scores_Cc, labels_BT.shape)

        tokens = self.shards.tokens
        mapped = self.shards.map(per_shard, (self.shards.vocabulary, tokens, tokens), tokens)
        return mapped(W_VD.T.astype(h_BTD.dtype), h_BTD, labels_BT)

    def gradient(self, differentiate, h_BTD, W_VD, labels_BT, fields):
        """(scores, dh_BTD, dW_VD): of a chunk's logits and fields, `differentiate` gives the scores
        and the loss's gradient in them."""

        def one_chunk(W_DV, dW_DV, h_cD, labels_c, fields_c):
            logits = self._logits(W_DV, h_cD, labels_c)
            scores_c, g_c = differentiate(logits, fields_c)
            dz_cV = logits.gradient(scores_c, g_c)
            product = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
            dh_cD = jax.lax.psum(product(dz_cV, W_DV, (((1,), (1,)), ((), ()))), logits.axis)
            dW_DV = dW_DV + product(h_cD, dz_cV, (((0,), (0,)), ((), ())))
            return dW_DV, (scores_c, dh_cD.astype(h_cD.dtype))

        def per_shard(W_DV, h_BTD, labels_BT, fields):
            chunks = _chunks(self.chunk, h_BTD, labels_BT, fields)
            zeros_DV = jnp.zeros(W_DV.shape, jnp.float32)
            dW_DV, outs_Cc = jax.lax.scan(
                lambda dW_DV, xs: one_chunk(W_DV, dW_DV, *xs), zeros_DV, chunks
            )
            scores, dh_BTD = _whole(outs_Cc, labels_BT.shape)
            return scores, dh_BTD, self.shards.reduce_gradient(dW_DV)

        tokens = self.shards.tokens
        in_specs = (self.shards.vocabulary, tokens, tokens, tokens)
        out_specs = (tokens, tokens, self.shards.vocabulary_gradient)
        mapped = self.shards.map(per_shard, in_specs, out_specs)
        # The sum over devices comes before the layers' backward pass, or its operand lives through
        # it.
        scores, dh_BTD, dW_DV = jax.lax.optimization_barrier(
            mapped(W_VD.T.astype(h_BTD.dtype), h_BTD, labels_BT, fields)
        )
        return scores, dh_BTD, dW_DV.T.astype(W_VD.dtype)

    def _logits(self, W_DV, h_cD, labels_c) -> "Logits":
        z_cV = jax.lax.dot_general(
            h_cD, W_DV, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return Logits(
            z_cV / self.temperature,
            labels_c,
            self.temperature,
            h_cD.dtype,
            self.shards.vocabulary_axis,
        )


@dataclass(frozen=True)
class Logits:
    """Of a chunk, float32; the vocabulary is one device's part."""

    z_cV: jax.Array
    labels_c: jax.Array
    temperature: float
    dtype: Any  # of the gradient
    axis: str

    def is_label(self) -> jax.Array:
        """True where a column is the token's label."""
        first = self.z_cV.shape[1] * jax.lax.axis_index(self.axis)
        column_cV = jax.lax.broadcasted_iota(jnp.int32, self.z_cV.shape, 1)
        return first + column_cV == self.labels_c[:, None]

    def scores(self) -> TokenScores:
        largest_c = jax.lax.pmax(jnp.max(self.z_cV, axis=-1), self.axis)
        z_label_cV = jnp.where(self.is_label(), self.z_cV, 0.0)
        z_label_c = jax.lax.psum(jnp.sum(z_label_cV, axis=-1), self.axis)
        # All from the largest logit on: log Z - z would cancel where one token is likely.
        below_cV = self.z_cV - largest_c[:, None]
        e_cV = jnp.exp(below_cV)
        sums_c = jax.lax.psum(jnp.sum(e_cV, axis=-1), self.axis)
        log_sums_c = jnp.log(sums_c)
        mean_c = jax.lax.psum(jnp.sum(e_cV * below_cV, axis=-1), self.axis) / sums_c
        return TokenScores(
            logp=z_label_c - largest_c - log_sums_c,
            entropy=log_sums_c - mean_c,
            log_norm=largest_c + log_sums_c,
            correct=(z_label_c >= largest_c).astype(jnp.float32),
        )

    def gradient(self, scores: TokenScores, g: TokenScores) -> jax.Array:
        """dz before the temperature, from the gradient in the scores."""
        logp_cV = self.z_cV - scores.log_norm[:, None]
        p_cV = jnp.exp(logp_cV)
        # d logp / dz = onehot - p;  dH / dz = -p (log p + H);  d log Z / dz = p
        deviation_cV = logp_cV + scores.entropy[:, None]
        dz_cV = jnp.where(self.is_label(), g.logp[:, None], 0.0)
        scale_cV = (g.log_norm - g.logp)[:, None] - g.entropy[:, None] * deviation_cV
        dz_cV = dz_cV + p_cV * scale_cV
        return (dz_cV / self.temperature).astype(self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(one: Pass, h_BTD, W_VD, labels_BT):
    return one.scores(h_BTD, W_VD, labels_BT)


def _scores_forward(one: Pass, h_BTD, W_VD, labels_BT):
    scores = one.scores(h_BTD, W_VD, labels_BT)
    return scores, (h_BTD, W_VD, labels_BT, scores)


def _scores_backward(one: Pass, residuals, g: TokenScores):
    *inputs, scores = residuals
    known = lambda _, fields: fields  # noqa: E731
    _, dh_BTD, dW_VD = one.gradient(known, *inputs, (scores, g))
    return dh_BTD, dW_VD, None


_scores.defvjp(_scores_forward, _scores_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(one: Pass, loss_of: LossOf, h_BTD, W_VD, labels_BT, fields):
    scores = one.scores(h_BTD, W_VD, labels_BT)
    return jnp.sum(loss_of(scores, fields)), scores


def _loss_forward(one: Pass, loss_of: LossOf, h_BTD, W_VD, labels_BT, fields):
    gradient = jax.grad(lambda scores, fields: jnp.sum(loss_of(scores, fields)))

    def differentiate(logits: Logits, fields_c):
        scores_c = logits.scores()
        return scores_c, gradient(scores_c, fields_c)

    scores, dh_BTD, dW_VD = one.gradient(differentiate, h_BTD, W_VD, labels_BT, fields)
    return (jnp.sum(loss_of(scores, fields)), scores), (dh_BTD, dW_VD)


def _loss_backward(one: Pass, loss_of: LossOf, gradients, cotangents):
    g = cotangents[0]  # the scores come without a gradient
    return *((g * x).astype(x.dtype) for x in gradients), None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _chunks(chunk: int, *trees):
    """[B, T, ...] -> [C, c, ...] of every array, padded with zeros: nothing comes of a padded
    token."""

    def split(x):
        x = x.reshape(-1, *x.shape[2:])
        size = min(chunk, x.shape[0])
        x = jnp.pad(x, ((0, -x.shape[0] % size), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(-1, size, *x.shape[1:])

    return jax.tree.map(split, trees)


def _whole(tree_Cc, shape):
    """The inverse of `_chunks`."""

    def join(x_Cc):
        flat = x_Cc.reshape(-1, *x_Cc.shape[2:])
        return flat[: shape[0] * shape[1]].reshape(*shape, *flat.shape[1:])

    return jax.tree.map(join, tree_Cc)
