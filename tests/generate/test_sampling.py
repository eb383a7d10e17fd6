"""Sampling: what is drawn, and the log-prob that goes with it."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medreason_jax.generate.engine import Engine
from medreason_jax.generate.sampling import Draws, Sampling, next_token
from medreason_jax.rl.rollout import rollout_rows
from tests.tiny import tiny_model


def engine_of(slots=4, seed=0):
    mesh, network, params, scorer = tiny_model(seed=seed)
    return Engine(network, mesh, slots=slots, end_id=2, pad_id=0), params, scorer


def prompts(count=5):
    random = np.random.default_rng(0)
    return [random.integers(3, 320, random.integers(3, 20)).tolist() for _ in range(count)]


def test_sampled_logprobs_equal_the_training_forward():
    engine, params, scorer = engine_of()
    sampling = Sampling(0.7, 0, 1.0, 16)
    done = engine.generate(params, prompts(), sampling, seed=1)
    rows = {name: jnp.asarray(x) for name, x in rollout_rows(prompts(), done, 48, 0).items()}
    scorer = scorer.replace(temperature=0.7)
    logp = scorer.scores(params, rows).logp
    gap = jnp.abs(logp - rows["sampled_logp"]) * rows["weights"]
    assert float(gap.max()) < 1e-4
    assert int(rows["weights"].sum()) == sum(len(c.ids) for c in done)


def test_a_request_draws_the_same_tokens_in_any_batch():
    engine, params, _ = engine_of()
    sampling = Sampling(1.0, 0, 1.0, 12)
    together = engine.generate(params, prompts(5), sampling, seed=3)
    first_only = engine.generate(params, prompts(5)[:1], sampling, seed=3)
    assert first_only[0].ids == together[0].ids
    assert engine.generate(params, prompts(5), sampling, seed=4)[0].ids != together[0].ids


def draws_of(rows: int, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Draws:
    """Rows with the same settings and a stream each."""
    zeros = jnp.zeros(rows, jnp.int32)
    settings = (zeros + temperature, zeros + top_k, zeros + top_p)
    return Draws(*settings, seed_B=zeros, number_B=jnp.arange(rows), drawn_B=zeros)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6), (4, 0.6)])
def test_draws_follow_the_distribution(top_k, top_p):
    logits = jnp.asarray([2.0, 1.5, 0.3, 0.0, -1.0, -3.0])
    draws = 20_000
    tokens, logp, _ = next_token(jnp.tile(logits, (draws, 1)), draws_of(draws, 0.8, top_k, top_p))
    p = np.asarray(jax.nn.softmax(logits / 0.8))
    np.testing.assert_allclose(np.asarray(logp), np.log(p)[np.asarray(tokens)], rtol=1e-4)
    kept = p.copy()
    if top_k:
        kept[top_k:] = 0
    kept /= kept.sum()
    if top_p < 1:
        kept[int(np.searchsorted(np.cumsum(kept), top_p)) + 1 :] = 0
    kept /= kept.sum()
    seen = np.bincount(np.asarray(tokens), minlength=6) / draws
    assert np.abs(seen - kept).max() < 4 * np.sqrt(0.25 / draws)


def test_generation_stops_at_the_end_of_turn():
    engine, params, _ = engine_of()
    params["embed_tokens"]["embedding"] = params["embed_tokens"]["embedding"].at[2].set(0.0)
    done = engine.generate(params, prompts(3), Sampling(0.0, 0, 1.0, 10), seed=0)
    assert all(c.finish_reason in ("stop", "length") and len(c.ids) <= 10 for c in done)
    assert all((c.ids[-1] == 2) == (c.finish_reason == "stop") for c in done)


def chi_squared_p(statistic: float, freedom: int) -> float:
    """P(X >= statistic) by Wilson and Hilferty's cube root; exact enough for many degrees."""
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 0.95), (1.3, 5_000, 0.9)]
)
def test_draws_from_the_whole_vocabulary_follow_the_exact_distribution(temperature, top_k, top_p):
    """200,000 draws of 151,936 tokens; the nucleus is of tens of thousands."""
    V, draws, rows = 151_936, 200_000, 4  # few rows at a time: they fit a processor's cache
    logits_V = 1.5 * jax.random.normal(jax.random.key(0), (V,))

    def some(first):
        own = draws_of(rows, temperature, top_k, top_p)
        own = own.replace(number_B=own.number_B + first)
        return next_token(jnp.tile(logits_V, (rows, 1)), own)[0]

    tokens = np.asarray(jax.jit(partial(jax.lax.map, some))(jnp.arange(0, draws, rows))).ravel()
    assert len(tokens) == draws
    p_V = np.asarray(logits_V, np.float64) / temperature
    p_V = np.exp(p_V - p_V.max())
    order = np.argsort(-p_V)
    if top_k:
        p_V[order[top_k:]] = 0.0
    p_V /= p_V.sum()
    if top_p < 1:
        p_V[order[int(np.searchsorted(np.cumsum(p_V[order]), top_p)) + 1 :]] = 0.0
    p_V /= p_V.sum()
    nucleus = int((p_V > 0).sum())
    expected, seen = draws * p_V[order], np.bincount(tokens, minlength=V)[order]
    assert seen[nucleus:].sum() == 0
    # neighbours in the order of likelihood are pooled to at least 5 expected draws
    bins = np.floor(np.cumsum(expected[:nucleus]) / 5.0 - 1e-9).astype(int)
    pooled = [np.bincount(bins, weights=x[:nucleus]) for x in (expected, seen)]
    whole = pooled[0] >= 5.0
    wanted, found = (np.append(x[whole], x[~whole].sum()) for x in pooled)
    wanted, found = wanted[wanted > 0], found[wanted > 0]
    statistic = float(((found - wanted) ** 2 / wanted).sum())
    p = chi_squared_p(statistic, len(wanted) - 1)
    settings = f"T {temperature}, top-k {top_k}, top-p {top_p}"
    print(f"{settings}: nucleus {nucleus}, {len(wanted)} bins, p {p:.3f}")
    assert nucleus > 1024 and p > 0.001
