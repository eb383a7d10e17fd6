"""Decode attention: the plain twin beside numpy, and the platforms' kernels beside both.

The kernels run in Pallas' interpreters here; tests/qwen2/test_attention_aot.py compiles them.
"""

import logging
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from medreason_jax.generate import programs
from medreason_jax.generate.engine import Engine, size_for
from medreason_jax.generate.sampling import Sampling
from medreason_jax.mesh import HeadShards, make_mesh
from medreason_jax.qwen2 import decode_attention
from medreason_jax.qwen2.attention import tolerance
from medreason_jax.qwen2.decode_attention import (
    TEST_SIZES,
    XLA_DECODE,
    DecodeKernel,
    choose_decode_kernel,
    decode_kernel,
    paged_decode,
    pallas_decode,
    self_test,
)
from tests.tiny import tiny_model

HEADS = [(14, 2, 64), (28, 4, 128), (4, 4, 32), (5, 1, 64)]
PALLAS = DecodeKernel("pallas", partial(pallas_decode, interpret=True), by_length=True)
SIZES = sorted({size_for(n) for n in range(1, 1500)})


def draw_inputs(B: int, N: int, K: int, S: int, H: int):
    random = np.random.default_rng(3)
    shapes = (B, N, H), (B, K, S, H), (B, K, S, H)
    lengths_B = jnp.asarray(random.integers(0, S, B), jnp.int32)
    return *(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes), lengths_B


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_the_twin_and_the_gpu_kernel_equal_numpy(heads, kv_heads, head_dim, dtype):
    for kernel in (XLA_DECODE, PALLAS):
        error = max(self_test(kernel, heads, kv_heads, head_dim, dtype, S) for S in TEST_SIZES)
        assert error < (1e-6 if dtype == jnp.float32 else tolerance(dtype))


@pytest.mark.parametrize(("heads", "kv_heads"), [(28, 4), (12, 2), (8, 1)])
def test_the_tpu_kernel_equals_numpy(heads, kv_heads):
    """In bfloat16: its products are of bfloat16 whatever the inputs are."""
    with pltpu.force_tpu_interpret_mode():
        kernel = DecodeKernel("paged", paged_decode)
        error = max(self_test(kernel, heads, kv_heads, 128, jnp.bfloat16, S) for S in TEST_SIZES)
    assert error < tolerance(jnp.bfloat16)


@pytest.mark.parametrize("S", SIZES)
def test_kernels_take_every_size_of_cache(S):
    q, k, v, lengths_B = draw_inputs(3, 4, 2, S, 128)
    wanted = XLA_DECODE(q, k, v, lengths_B)
    np.testing.assert_allclose(PALLAS(q, k, v, lengths_B), wanted, atol=1e-5)
    with pltpu.force_tpu_interpret_mode():
        np.testing.assert_allclose(paged_decode(q, k, v, lengths_B), wanted, atol=2e-2)


def test_a_row_that_has_ended_with_its_slot_full_changes_no_other():
    q, k, v, _ = draw_inputs(3, 4, 2, 128, 128)
    ended = jnp.asarray([5, 100, 128], jnp.int32)
    alone = XLA_DECODE(q, k, v, ended)[:2]
    np.testing.assert_allclose(PALLAS(q, k, v, ended)[:2], alone, atol=1e-5)
    with pltpu.force_tpu_interpret_mode():
        np.testing.assert_allclose(paged_decode(q, k, v, ended)[:2], alone, atol=2e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_context_has_the_type_of_the_values(dtype):
    *qkv, lengths_B = draw_inputs(2, 4, 2, 32, 32)
    inputs = *(x.astype(dtype) for x in qkv), lengths_B
    kernels = XLA_DECODE, PALLAS, DecodeKernel("paged", paged_decode)
    assert {jax.eval_shape(kernel, *inputs).dtype for kernel in kernels} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    ("mesh_shape", "heads", "kv_heads"),
    [((2, 2, 2), 4, 2), ((1, 2, 4), 8, 2), ((1, 2, 4), 12, 3)],
    ids=["heads split", "tensor above kv heads", "kv heads not divided"],
)
def test_a_kernel_on_a_mesh_equals_the_twin_on_one_device(mesh_shape, heads, kv_heads):
    inputs = draw_inputs(4, heads, kv_heads, 64, 32)
    kernel = PALLAS.replace(shards=HeadShards(make_mesh(*mesh_shape)))
    np.testing.assert_allclose(jax.jit(kernel)(*inputs), XLA_DECODE(*inputs), atol=1e-5)


def test_platforms_take_their_own_kernel():
    shards = HeadShards(make_mesh(8, 1, 1))
    names = {
        (platform, head_dim): decode_kernel(platform, head_dim, shards).name
        for platform in ("cpu", "gpu", "tpu")
        for head_dim in (64, 128)
    }
    assert names == {
        ("cpu", 64): "xla",
        ("cpu", 128): "xla",
        ("gpu", 64): "pallas",
        ("gpu", 128): "pallas",
        ("tpu", 64): "xla",
        ("tpu", 128): "paged",
    }


def wrong(q_BNH, k_BKSH, v_BKSH, lengths_B):
    """As if every row were full."""
    return XLA_DECODE(q_BNH, k_BKSH, v_BKSH, jnp.full_like(lengths_B, k_BKSH.shape[2] - 1))


@pytest.mark.parametrize(
    ("attend", "message"),
    [(wrong, r"'broken' is not used: relative error \d"), (pallas_decode, "relative error inf: ")],
    ids=["wrong", "does not run"],
)
def test_a_kernel_that_fails_its_test_is_told_and_replaced(attend, message, monkeypatch, caplog):
    broken = DecodeKernel("broken", attend, by_length=True)
    monkeypatch.setattr(decode_attention, "decode_kernel", lambda *arguments: broken)
    with caplog.at_level(logging.WARNING):
        shards = HeadShards(make_mesh(8, 1, 1))
        chosen = choose_decode_kernel("gpu", 4, 2, 32, jnp.float32, shards)
    assert chosen is XLA_DECODE
    assert re.search(message, caplog.text)


def test_an_engine_with_a_kernel_answers_as_with_the_twin(monkeypatch):
    mesh, network, params, _ = tiny_model((1, 1, 1))
    prompts = np.random.default_rng(0).integers(3, 320, (5, 20)).tolist()

    def answers():
        engine = Engine(network, mesh, slots=4, end_id=2, pad_id=0)
        return engine.generate(params, prompts, Sampling(1.0, 0, 1.0, 24), seed=5)

    plain = answers()
    monkeypatch.setattr(programs, "choose_decode_kernel", lambda *arguments: PALLAS)
    for one, other in zip(plain, answers(), strict=True):
        assert one.ids == other.ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "held"),
    [(8, 4, (2, 1)), (8, 2, (2, 1)), (12, 3, (3, 3)), (12, 2, (3, 1))],
)
def test_the_self_test_has_the_heads_of_one_device(heads, kv_heads, held):
    shards = HeadShards(make_mesh(1, 2, 4))
    seen = []
    mapped = shards.map(
        lambda q, k, v, rows: seen.append((q.shape[2], k.shape[1])) or q, heads, kv_heads, 1
    )
    jax.eval_shape(
        mapped,
        jnp.zeros((2, 1, heads, 8)),
        jnp.zeros((2, kv_heads, 16, 8)),
        jnp.zeros((2, kv_heads, 16, 8)),
        jnp.zeros(2, jnp.int32),
    )
    assert set(seen) == {held} == {shards.held(heads, kv_heads)}
