"""Rewards and advantages against loops in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from medreason_jax.rl.advantage import gae, token_rewards, whiten
from medreason_jax.rl.loop import problem_numbers
from medreason_jax.rl.reward import Rewards, judge_response

B, T = 5, 12


def example(seed=0):
    random = np.random.default_rng(seed)
    mask = np.zeros((B, T))
    for b in range(B):
        first = random.integers(0, 5)
        mask[b, first : first + random.integers(1, 7)] = 1
    return random.normal(size=(B, T)), random.normal(size=(B, T)), mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (1.0, 0.0)])
def test_gae_equals_a_numpy_loop(gamma, lam):
    rewards, values, mask = example()
    advantages, returns = gae(*map(jnp.asarray, (rewards, values, mask)), gamma, lam)
    for b in range(B):
        later, next_value = 0.0, 0.0
        for t in reversed(np.flatnonzero(mask[b])):
            later = rewards[b, t] + gamma * next_value - values[b, t] + gamma * lam * later
            next_value = values[b, t]
            assert advantages[b, t] == pytest.approx(later, rel=1e-4, abs=1e-5)
            assert returns[b, t] == pytest.approx(later + values[b, t], rel=1e-4, abs=1e-5)
    assert not np.asarray(advantages)[mask == 0].any()


def test_the_score_stands_on_the_last_response_token_and_kl_on_all():
    logp, reference, mask = example(1)
    score = np.arange(B) + 1.0
    rewards = np.asarray(token_rewards(*map(jnp.asarray, (score, logp, reference, mask)), 0.03))
    expected = -0.03 * (logp - reference) * mask
    for b in range(B):
        expected[b, np.flatnonzero(mask[b])[-1]] += score[b]
    np.testing.assert_allclose(rewards, expected, rtol=1e-4, atol=1e-5)


def test_whitened_advantages_have_mean_zero_and_variance_one_over_the_mask():
    x, _, mask = example(2)
    white = np.asarray(whiten(jnp.asarray(x), jnp.asarray(mask)))[mask == 1]
    assert white.mean() == pytest.approx(0, abs=1e-5)
    assert white.std() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("## Thinking\n\n7x2=14.\n\n## Final Response\n\n14 mg", 1.0),
        ("## Thinking\n\n7x2=15.\n\n## Final Response\n\n15 mg", 0.1),
        ("14 mg", 0.0),
        ("## Final Response\n\n14 mg", 0.0),
        ("## Thinking\n\n\n\n## Final Response\n\n14 mg", 0.0),
        ("## Thinking\n\na\n\n## Final Response\n\n## Final Response\n\n14 mg", 0.0),
    ],
)
def test_reward_is_one_a_tenth_or_nothing(text, reward):
    assert judge_response(text, {"answer": "14 mg"}, Rewards(1.0, 0.1, 0.0)).reward == reward


def test_every_epoch_of_problems_is_a_permutation():
    taken = [n for i in range(7) for n in problem_numbers(28, 8, i, seed=3)]
    assert sorted(taken[:28]) == list(range(28)) and sorted(taken[28:56]) == list(range(28))
    assert taken[:28] != taken[28:56]
