"""Sampling: what is drawn, and the log-prob that goes with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medreason_jax.generate.engine import Engine
from medreason_jax.generate.sampling import Sampling, next_token
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


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6)])
def test_draws_follow_the_distribution(top_k, top_p):
    logits = jnp.asarray([2.0, 1.5, 0.3, 0.0, -1.0, -3.0])
    draws = 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    tokens, logp = next_token(jnp.tile(logits, (draws, 1)), keys, Sampling(0.8, top_k, top_p, 1))
    p = np.asarray(jax.nn.softmax(logits / 0.8))
    np.testing.assert_allclose(np.asarray(logp), np.log(p)[np.asarray(tokens)], rtol=1e-4)
    kept = p.copy()
    if top_k:
        kept[top_k:] = 0
    if top_p < 1:
        kept[int(np.searchsorted(np.cumsum(p), top_p)) + 1 :] = 0
    kept /= kept.sum()
    seen = np.bincount(np.asarray(tokens), minlength=6) / draws
    assert np.abs(seen - kept).max() < 4 * np.sqrt(0.25 / draws)


def test_generation_stops_at_the_end_of_turn():
    engine, params, _ = engine_of()
    params["embed_tokens"]["embedding"] = params["embed_tokens"]["embedding"].at[2].set(0.0)
    done = engine.generate(params, prompts(3), Sampling(0.0, 0, 1.0, 10), seed=0)
    assert all(c.finish_reason in ("stop", "length") and len(c.ids) <= 10 for c in done)
    assert all((c.ids[-1] == 2) == (c.finish_reason == "stop") for c in done)
