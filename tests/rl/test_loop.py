"""The PPO stage on a tiny model."""

import json

import pytest

from medreason_jax.config import PPOConfig
from medreason_jax.rl.loop import ppo_stage
from tests.generate.serve_command import write_model


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def stage(chat_tokenizer, tmp_path):
    """A config with changes; rewards differ between rollouts, so that there is what to learn."""
    model = write_model(tmp_path / "model", chat_tokenizer)
    problems = tmp_path / "problems.jsonl"
    records = [{"id": f"p{n}", "question": f"drug {n}?", "answer": f"{n} mg"} for n in range(12)]
    problems.write_text("".join(json.dumps(record) + "\n" for record in records))

    def make(name: str, **changes) -> PPOConfig:
        values = {
            "kind": "ppo",
            "folder": tmp_path / name,
            "model": model,
            "problems": problems,
            "length": 64,
            "iterations": 4,
            "rollouts": 8,
            "max_new_tokens": 16,
            "temperature": 1.0,
            "kl_coef": 0.1,
            "reward_unformatted": 1.0,
            "ppo_epochs": 1,
            "critic_rate": 0.1,
            "optimizer": {"learning_rate": 1e-2, "warmup_ratio": 0.0, "weight_decay": 0.1},
        }
        return PPOConfig(**{**values, **changes})

    return make


def test_the_warm_up_trains_the_critic_and_leaves_the_policy(stage):
    config = stage("warm", critic_warmup=2)
    ppo_stage(config)
    found = lines(config.folder / "metrics.jsonl")
    # Measured before an iteration's update: the first update of the policy is the third.
    assert [abs(m["kl"]) < 1e-4 for m in found] == [True, True, True, False]
    values = [m["loss_value"] for m in found]
    assert len(set(values)) == 4
    plain = stage("plain")
    ppo_stage(plain)
    moved = [abs(m["kl"]) > 1e-4 for m in lines(plain.folder / "metrics.jsonl")]
    assert moved == [False, True, True, True]


def test_a_warm_up_of_every_iteration_is_refused(stage):
    with pytest.raises(ValueError, match="critic_warmup=4 leaves none of iterations=4"):
        stage("all", critic_warmup=4)


def test_the_seconds_of_an_iteration_are_those_of_its_phases(stage):
    config = stage("timed", iterations=2)
    ppo_stage(config)
    for number, line in enumerate(lines(config.folder / "speed.jsonl"), 1):
        phases = [line[f"{name}_seconds"] for name in ("generate", "score", "update")]
        assert line["step"] == number
        assert min(phases) > 0
        assert 0.9 * line["iteration_seconds"] < sum(phases) <= line["iteration_seconds"]
        assert line["samples_per_second"] == pytest.approx(8 / line["iteration_seconds"])
