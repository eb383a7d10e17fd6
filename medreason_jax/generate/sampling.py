"""The next token from logits, every row by its own settings. B batch, V vocabulary."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; temperature 0 is greedy."""

    temperature: float
    top_k: int  # 0: off
    top_p: float  # 1: off
    max_new_tokens: int


@struct.dataclass
class Draws:
    """A row's settings and its place in its own random stream."""

    temperature_B: jax.Array  # 0 is greedy
    top_k_B: jax.Array  # 0: off
    top_p_B: jax.Array  # 1: off
    seed_B: jax.Array
    number_B: jax.Array  # tells apart the samples of one seed
    drawn_B: jax.Array  # tokens drawn so far

    def keys_B(self) -> jax.Array:
        """The key of each row's next token: a function of (seed, number, drawn)."""

        def key(seed, number, drawn):
            return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), drawn)

        return jax.vmap(key)(self.seed_B, self.number_B, self.drawn_B)


def next_token(logits_BV: jax.Array, draws: Draws):
    """Token and log-prob [B], and log softmax(logits / temperature) [B, V]; 1 stands for 0 there.

    Log-probs are those of the whole distribution, as the trainer computes them, not of what top-k
    and top-p leave. A draw is the largest of logit + Gumbel noise.
    """
    temperature_B1 = draws.temperature_B[:, None]
    scaled = lambda z_BV: z_BV / jnp.where(temperature_B1 > 0, temperature_B1, 1.0)  # noqa: E731

    def likely(logits_BV, _):
        kept_BV = keep_likely(scaled(logits_BV), draws.top_k_B, draws.top_p_B)
        return draw(kept_BV, draws)

    def any_token(logits_BV, _):
        return draw(scaled(logits_BV), draws)

    # What no row asks for is not done. The branches give tokens, no logits: those would be copied.
    limited = jnp.any((draws.top_k_B > 0) | (draws.top_p_B < 1.0))
    kind = jnp.where(limited, 2, jnp.any(temperature_B1 > 0).astype(jnp.int32))
    logits_BV = logits_BV.astype(jnp.float32)
    z_BV = scaled(logits_BV)
    largest_B1 = jnp.max(z_BV, axis=-1, keepdims=True)
    token_B = jax.lax.switch(kind, (first_equal, any_token, likely), logits_BV, largest_B1)
    below_BV = z_BV - largest_B1
    logp_BV = below_BV - jnp.log(jnp.sum(jnp.exp(below_BV), axis=-1, keepdims=True))
    chosen_B = jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, chosen_B, logp_BV


def draw(z_BV: jax.Array, draws: Draws) -> jax.Array:
    """The token with the largest z + Gumbel noise, in rows of temperature 0 with the largest z."""
    noise_BV = jax.vmap(lambda key: gumbel_noise(key, z_BV.shape[1]))(draws.keys_B())
    return first_largest(z_BV + jnp.where(draws.temperature_B[:, None] > 0, noise_BV, 0.0))


def gumbel_noise(key: jax.Array, count: int) -> jax.Array:
    """`count` standard Gumbel variates, -log(-log(1 - v)), with v in steps of 2**-32.

    A token of probability p is drawn where v is near p: jax.random.gumbel's steps of 2**-23 give
    one of 2e-6 three in a hundred draws too few, and its finer mode takes twice the time.
    """
    bits = jax.random.bits(key, (count,), jnp.uint32)
    v = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-v))


def first_largest(scores_BV) -> jax.Array:
    """As argmax, whose reduction of pairs takes XLA's CPU compiler six times as long."""
    return first_equal(scores_BV, jnp.max(scores_BV, axis=-1, keepdims=True))


def first_equal(scores_BV, largest_B1) -> jax.Array:
    places_BV = jax.lax.broadcasted_iota(jnp.int32, scores_BV.shape, 1)
    return jnp.min(jnp.where(scores_BV >= largest_B1, places_BV, scores_BV.shape[1]), axis=-1)


def keep_likely(z_BV, top_k_B, top_p_B):
    """-inf outside the top-k tokens, then outside the smallest set of share top_p among those.

    No sort: the least kept logit is found bit by bit, in 32 passes over the vocabulary for each of
    the two that any row asks for. Tokens that tie with it are kept too. 0 and 1 are off.
    """
    order_BV = _order(z_BV)
    nothing_B = jnp.zeros(z_BV.shape[0], jnp.uint32)

    def by_count() -> jax.Array:
        wanted_B = jnp.where(top_k_B > 0, top_k_B, z_BV.shape[1]).astype(jnp.float32)
        return _largest_threshold(order_BV, jnp.ones_like(z_BV), wanted_B)

    least_B = jax.lax.cond(jnp.any(top_k_B > 0), by_count, lambda: nothing_B)

    def by_share() -> jax.Array:
        p_BV = jnp.where(order_BV >= least_B[:, None], jax.nn.softmax(z_BV, axis=-1), 0.0)
        share_B = jnp.where(top_p_B < 1.0, top_p_B * jnp.sum(p_BV, axis=-1), 0.0)
        likely_B = _largest_threshold(order_BV, p_BV, share_B)
        return jnp.where(top_p_B < 1.0, likely_B, nothing_B)

    likely_B = jax.lax.cond(jnp.any(top_p_B < 1.0), by_share, lambda: nothing_B)
    return jnp.where(order_BV >= jnp.maximum(least_B, likely_B)[:, None], z_BV, -jnp.inf)


def _order(x):
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _largest_threshold(order_BV, weights_BV, wanted_B):
    """The largest t for which the weights at order >= t sum to at least wanted_B."""

    def try_bit(i, t_B):
        higher_B = t_B | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        there_BV = order_BV >= higher_B[:, None]
        sum_B = jnp.sum(jnp.where(there_BV, weights_BV, 0.0), axis=-1)
        return jnp.where(sum_B >= wanted_B, higher_B, t_B)

    start_B = jnp.zeros(order_BV.shape[0], jnp.uint32)
    return jax.lax.fori_loop(0, 32, try_bit, start_B)
