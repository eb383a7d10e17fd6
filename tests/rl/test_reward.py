"""Rewards of responses, and rollouts that cannot be judged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medreason_jax.generate.requests import Completion
from medreason_jax.mesh import make_sharder
from medreason_jax.qwen2.heads import ScoreHead, init_score
from medreason_jax.rl.reward import Judged, Rewards, judge_response
from medreason_jax.rl.rollout import leave_out, make_rollout_scorer, rollout_rows
from medreason_jax.train.program import make_policy
from tests.tiny import tiny_model

REWARDS = Rewards(1.0, 0.1, 0.0)
FORM = "## Thinking\n\n{}\n\n## Final Response\n\n{}"


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (FORM.format("Twice.", "The dose is 5 mg."), "5 mg", Judged(1.0, "true")),
        (FORM.format("Twice.", "The dose is 7 mg."), "5 mg", Judged(0.1, "false")),
        (FORM.format("", "The dose is 5 mg."), "5 mg", Judged(0.0, "unformatted")),
        ("The dose is 5 mg.", "5 mg", Judged(0.0, "unformatted")),
        (FORM.format("Twice.", "It is 100 mg/dL."), "5.5 mmol/L", Judged(0.1, "unscored")),
    ],
)
def test_a_response_earns_by_form_and_verdict(text, answer, expected):
    assert judge_response(text, {"answer": answer}, REWARDS) == expected


def test_a_rollout_that_cannot_be_judged_changes_no_advantage_and_no_metric():
    mesh, network, params, _ = tiny_model()
    sizes = network.sizes
    sharder = make_sharder(mesh, sizes.num_attention_heads, sizes.num_key_value_heads)
    policy = make_policy(network, sharder, None, 24)
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 320, 6).tolist() for _ in range(4)]
    done = [Completion(random.integers(3, 320, 9).tolist(), [-5.0] * 9, "stop") for _ in range(4)]
    critic = init_score(network.sizes.hidden_size, ScoreHead(1, bias=True))
    critic = jax.tree.map(lambda x: x + 0.1 * jnp.arange(x.size).reshape(x.shape), critic)
    trainable, frozen = {"policy": params, "critic": critic}, {"reference": params}
    score = make_rollout_scorer(policy, kl_coef=0.05, gamma=1.0, gae_lambda=0.95)

    def scored(places: list[int], unjudged: int | None, reward: float):
        rows = rollout_rows([prompts[i] for i in places], [done[i] for i in places], 16, 0)
        leave_out(rows, [i == unjudged for i in places])
        rewards = jnp.array([reward if i == unjudged else 0.3 * i for i in places])
        return score(trainable, frozen, {k: jnp.asarray(v) for k, v in rows.items()}, rewards)

    for reward in (0.1, 100.0):
        rows, metrics = scored([0, 1, 2, 3], 3, reward)
        expected, plain = scored([0, 1, 2], None, 0.0)
        for name in ("kl", "policy_entropy", "sampler_gap"):
            np.testing.assert_allclose(metrics[name], plain[name], rtol=1e-4, atol=1e-6)
        assert not np.any(np.asarray(rows["weights"])[3])
        for name in ("advantages", "returns", "weights"):
            mask = np.asarray(expected["weights"])
            ours = np.asarray(rows[name])[:3] * mask
            np.testing.assert_allclose(ours, np.asarray(expected[name]) * mask, atol=1e-5)
        assert all(np.isfinite(float(value)) for value in metrics.values())
