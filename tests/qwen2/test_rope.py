"""Rotary frequencies: the numbers of `transformers`, and what YaRN means by them."""

import math

import numpy as np
import pytest

from medreason_jax.qwen2.rope import Yarn, rope_frequencies

NO_EXPORT = "the export extra (torch, transformers) is not installed"
SCALINGS = [
    None,
    {"factor": 1.0},
    {"factor": 2.0},
    {"factor": 4.0},
    {"factor": 4.0, "attention_factor": 1.25},
    {"factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0},
    {"factor": 4.0, "beta_fast": 8, "beta_slow": 8, "truncate": False},
    {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    {"factor": 40.0, "mscale": 0.5, "mscale_all_dim": 0},
    {"factor": 2.0, "mscale": 0.5},
    {"factor": 4.0, "truncate": False},
    {"factor": 8.0, "original_max_position_embeddings": 512},
    {"factor": 2.5, "original_max_position_embeddings": 3},
    {"factor": 4.0, "original_max_position_embeddings": 2**30, "beta_fast": 1e7},
]


def of_transformers(head_dim, theta, scaling):
    qwen2 = pytest.importorskip("transformers.models.qwen2.modeling_qwen2", reason=NO_EXPORT)
    rope = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        rope = {**rope, "rope_type": "yarn", **scaling}
    sizes = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "num_key_value_heads": 2}
    embedding = qwen2.Qwen2RotaryEmbedding(qwen2.Qwen2Config(**sizes, rope_parameters=rope))
    return embedding.inv_freq.numpy(), embedding.attention_scaling


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_are_those_of_transformers(head_dim, theta, scaling):
    if scaling is not None:
        scaling = {"original_max_position_embeddings": 32768, **scaling}
    frequency_h, attention_factor = rope_frequencies(
        head_dim, theta, None if scaling is None else Yarn(**scaling)
    )
    expected_h, expected_factor = of_transformers(head_dim, theta, scaling)
    assert frequency_h.dtype == np.float32 and frequency_h.shape == (head_dim // 2,)
    np.testing.assert_array_max_ulp(frequency_h, expected_h, maxulp=2)
    assert attention_factor == pytest.approx(expected_factor, rel=1e-12)


def test_yarn_keeps_fast_pairs_and_slows_slow_ones_by_the_factor():
    plain_h, _ = rope_frequencies(128, 1e6, None)
    yarn_h, _ = rope_frequencies(128, 1e6, Yarn(4.0, 32768))
    turns_h = 32768 * plain_h / (2 * math.pi)
    fast, slow = turns_h > 64, turns_h < 0.5  # a factor of 2 beyond the ramp's two ends
    assert fast.any() and slow.any()
    np.testing.assert_array_equal(yarn_h[fast], plain_h[fast])
    np.testing.assert_allclose(yarn_h[slow], plain_h[slow] / 4, rtol=1e-6)
    assert (np.diff(yarn_h) < 0).all()


def test_equal_scalings_hash_alike():
    assert hash(Yarn(4, 32768)) == hash(Yarn(4.0, 32768)) and Yarn(4, 32768) == Yarn(4.0, 32768)
    assert Yarn(4.0, 32768) != Yarn(2.0, 32768)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factor": 0.5}, "factor=0.5"),
        ({"factor": "4"}, "factor='4'"),
        ({"factor": True}, "factor=True"),
        ({"factor": math.inf}, "factor=inf"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings=0"),
        ({"attention_factor": -1.0}, "attention_factor=-1.0"),
        ({"beta_fast": 0}, "beta_fast=0"),
        ({"beta_slow": 40.0}, "beta_fast=32.0 is below its beta_slow=40.0"),
        ({"factor": math.nan}, "factor=nan"),
        ({"factor": 10**400}, "should be a number"),
        ({"original_max_position_embeddings": 128.0}, "128.0 should be a whole number"),
        ({"original_max_position_embeddings": None}, "None should be a whole number"),
        ({"beta_slow": None}, "beta_slow=None should be a number"),
        ({"mscale": "1"}, "mscale='1'"),
        ({"mscale_all_dim": -10.0, "mscale": 1.0}, "mscale_all_dim=-10.0 should be 0"),
        ({"truncate": None}, "truncate=None"),
    ],
)
def test_values_that_yarn_cannot_mean_are_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words):
        Yarn(**{"factor": 4.0, "original_max_position_embeddings": 32768, **changes})
