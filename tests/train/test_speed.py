"""FLOPs by the counting rule, and where the time goes."""

import json

import numpy as np
import pytest

from medreason_jax.qwen2.lora import Lora, Target
from medreason_jax.qwen2.sizes import read_sizes
from medreason_jax.train import speed as module
from medreason_jax.train.speed import Speed, training_flops
from tests.tiny import model_fields


def test_flops_of_7b_are_those_of_the_published_rule():
    """42.4 GFLOP a token of products, 2.47 of causal attention at 4,096 (performance tables)."""
    sizes = read_sizes(model_fields("qwen2.5-7b"))
    tokens = 4096.0
    products = training_flops(sizes, None, tokens, 0.0) / tokens
    attention = training_flops(sizes, None, 0.0, tokens**2) / tokens
    assert products == pytest.approx(42.4e9, rel=2e-3)
    assert attention == pytest.approx(2.47e9, rel=2e-3)
    lora = Lora((Target("q_proj", 8, 16.0),))
    assert training_flops(sizes, lora, tokens, 0.0) == pytest.approx(products * tokens * 4 / 6)


def test_packed_documents_cost_the_sum_of_their_squares():
    positions = np.concatenate([np.arange(n) for n in (3, 5, 8)])
    assert np.sum(2 * positions + 1) == 3**2 + 5**2 + 8**2


def test_what_is_spent_apart_lowers_goodput_and_no_step(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    speed = Speed(tmp_path, read_sizes(model_fields("qwen2.5-0.5b")), None, active=True)
    with speed.apart("compile"):
        now[0] += 10.0
    now[0] += 2.0
    first = speed.step(1, tokens=900.0, attended=1.0, slots=1000)
    with speed.apart("save"):
        now[0] += 4.0
    now[0] += 4.0
    second = speed.step(2, tokens=1000.0, attended=1.0, slots=1000)
    assert first["step_seconds"] == 2.0 and first["tokens_per_second"] == 450.0
    assert first["padding_share"] == pytest.approx(0.1)
    assert second["step_seconds"] == 4.0 and second["goodput"] == pytest.approx(6 / 20)
    facts = speed.close()
    assert facts == {"goodput": 0.3, "compile_seconds": 10.0, "save_seconds": 4.0}
    assert len((tmp_path / "speed.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "speed.jsonl").read_text().splitlines()[0])["step"] == 1
