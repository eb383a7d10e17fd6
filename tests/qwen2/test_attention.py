"""The attention kernels against a float64 loop over documents and heads, and against each other.

The splash and triton kernels run in Pallas' interpreter here; test_attention_aot.py compiles them.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medreason_jax.mesh import HeadShards, make_mesh
from medreason_jax.qwen2 import attention
from medreason_jax.qwen2.attention import (
    Kernel,
    Places,
    attend_documents,
    check_kernel,
    choose_checked_kernel,
    choose_kernel,
    largest_block,
    pack_test_rows,
    self_test,
    splash_blocks,
    splash_kernel,
    triton_kernel,
    xla_attention,
)

FLOAT32_ERROR = 1e-5
XLA = Kernel("xla", xla_attention)
SPLASH = splash_kernel(None, interpret=True)
TRITON = triton_kernel(None, interpret=True)
every_kernel = pytest.mark.parametrize(
    "kernel", [XLA, SPLASH, TRITON], ids=lambda kernel: kernel.name
)
flash_kernels = pytest.mark.parametrize("kernel", [SPLASH, TRITON], ids=lambda kernel: kernel.name)
make_flash = pytest.mark.parametrize("make", [splash_kernel, triton_kernel])


def draw_inputs(B: int, T: int, N: int, K: int, H: int):
    """q_BTNH, k_BTKH, v_BTKH and a cotangent of the context."""
    random = np.random.default_rng(1)
    return [jnp.asarray(random.normal(size=(B, T, n, H)), jnp.float32) for n in (N, K, K, N)]


def packed_places(B: int, T: int) -> Places:
    """The self-test's two rows, over and over."""
    places, _ = pack_test_rows(T)
    return jax.tree.map(lambda x: jnp.tile(x, (B // 2, 1)), places)


def context_and_gradients(kernel, q, k, v, d_context, places):
    """At tokens: padding is masked out."""
    inside = (places.segments_BT != 0)[:, :, None, None]

    @jax.jit
    def run(q, k, v, d_context, places):
        context, pull = jax.vjp(lambda *qkv: kernel(*qkv, places, places), q, k, v)
        return jnp.where(inside, context, 0), *pull(jnp.where(inside, d_context, 0))

    return run(q, k, v, d_context, places)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_the_reference_equals_a_loop_over_documents_and_heads(heads, kv_heads):
    assert self_test(XLA, heads, kv_heads, 16) < FLOAT32_ERROR


def test_the_gradients_of_the_loop_are_finite_differences():
    q, k, v, d_context = (np.asarray(x, np.float64) for x in draw_inputs(2, 10, 4, 2, 3))
    _, documents = pack_test_rows(10)
    arrays, step = [q, k, v], 1e-5
    gradients = attend_documents(q, k, v, d_context, documents)[1:]
    random = np.random.default_rng(2)
    for index, gradient in enumerate(gradients):
        direction = random.normal(size=gradient.shape)

        def value(by, index=index, direction=direction):
            moved = [*arrays]
            moved[index] = moved[index] + by * direction
            return np.sum(attend_documents(*moved, d_context, documents)[0] * d_context)

        slope = (value(step) - value(-step)) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-6)


def test_one_query_over_a_cache_equals_the_whole_row():
    T = 40
    q, k, v, _ = draw_inputs(2, T, 4, 2, 16)
    places = packed_places(2, T)
    whole = xla_attention(q, k, v, places, places)
    for t in (0, 7, 16, 23):
        query = jax.tree.map(lambda x, t=t: x[:, t : t + 1], places)
        written = jnp.arange(T) <= t
        cached = jax.tree.map(lambda x, w=written: jnp.where(w, x, 0), places)
        one = xla_attention(q[:, t : t + 1], k, v, query, cached)
        np.testing.assert_allclose(one[:, 0], whole[:, t], atol=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(14, 2, 64), (7, 1, 128), (4, 2, 32)])
@flash_kernels
def test_flash_equals_the_loop_forward_and_backward(kernel, heads, kv_heads, head_dim):
    assert self_test(kernel, heads, kv_heads, head_dim) < FLOAT32_ERROR


@pytest.mark.parametrize("T", [16, 136, 512])
@flash_kernels
def test_flash_takes_rows_of_any_length(kernel, T):
    assert self_test(kernel, 4, 2, 32, T=T) < FLOAT32_ERROR


def test_splash_equals_the_loop_over_several_blocks(monkeypatch):
    blocks = splash_blocks(128, 4)
    monkeypatch.setattr(attention, "splash_blocks", lambda T, itemsize: blocks)
    assert self_test(SPLASH, 4, 2, 64, T=512) < FLOAT32_ERROR


@every_kernel
def test_bfloat16_stays_in_tolerance_and_padding_finite(kernel):
    check_kernel(kernel, 4, 2, 64, jnp.bfloat16)
    q, k, v, _ = draw_inputs(2, 128, 4, 2, 64)
    places = packed_places(2, 128)
    assert np.isfinite(kernel(q, k, v, places, places)).all()


@pytest.mark.parametrize(
    ("mesh_shape", "heads", "kv_heads"),
    [((2, 2, 2), 4, 2), ((1, 2, 4), 8, 2)],
    ids=["heads split", "tensor above kv heads"],
)
@make_flash
def test_flash_on_a_mesh_equals_the_reference_on_one_device(make, mesh_shape, heads, kv_heads):
    inputs, places = draw_inputs(4, 128, heads, kv_heads, 64), packed_places(4, 128)
    kernel = make(HeadShards(make_mesh(*mesh_shape)), interpret=True)
    found = context_and_gradients(kernel, *inputs, places)
    wanted = context_and_gradients(XLA, *inputs, places)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=FLOAT32_ERROR * np.abs(y).max())


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 4), (16, 2), (12, 3), (24, 6)])
def test_every_device_reads_the_kv_heads_of_its_query_heads(heads, kv_heads):
    """Query heads of a device need not fill a group, nor a group a device: 12 / 3 over 4."""
    inputs, places = draw_inputs(2, 20, heads, kv_heads, 8), packed_places(2, 20)
    sharded = Kernel("xla", xla_attention, HeadShards(make_mesh(1, 2, 4)))
    found = context_and_gradients(sharded, *inputs, places)
    wanted = context_and_gradients(XLA, *inputs, places)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=FLOAT32_ERROR * np.abs(y).max())


def test_heads_that_the_tensor_axis_does_not_divide_are_refused():
    q, k, v, _ = draw_inputs(2, 128, 14, 2, 8)
    places = packed_places(2, 128)
    kernel = splash_kernel(HeadShards(make_mesh(1, 2, 4)), interpret=True)
    with pytest.raises(ValueError, match=r"tensor=4 .* 14 query heads; allowed: \[1, 2, 7, 14\]"):
        kernel(q, k, v, places, places)


@every_kernel
@pytest.mark.parametrize("shards", [False, True])
def test_missing_segment_ids_are_refused(kernel, shards):
    q, k, v, _ = draw_inputs(4, 128, 4, 2, 8)
    places = packed_places(4, 128).replace(segments_BT=None)
    kernel = kernel.replace(shards=HeadShards(make_mesh(2, 2, 2)) if shards else None)
    with pytest.raises(ValueError, match="no segment ids"):
        kernel(q, k, v, places, places)


@flash_kernels
def test_flash_refuses_what_is_no_whole_row(kernel):
    (q, *_), (_, k, v, _) = draw_inputs(2, 128, 4, 2, 64), draw_inputs(2, 256, 4, 2, 64)
    with pytest.raises(ValueError, match=r"128 queries and 256 keys.*attention: xla"):
        kernel(q, k, v, packed_places(2, 128), packed_places(2, 256))


@pytest.mark.parametrize(
    ("T", "most", "block"), [(4096, 2048, 2048), (1280, 1024, 640), (128, 512, 128)]
)
def test_blocks_divide_the_row(T, most, block):
    assert largest_block(T, most) == block


@pytest.mark.parametrize(("kept", "again"), [((), 1), (("context",), 0)])
@pytest.mark.parametrize(
    ("make", "platform", "call", "calls"),
    [  # splash: forward and backward have one name
        (splash_kernel, "tpu", " call @_splash_attention", 2),
        (triton_kernel, "cuda", 'name = "mha_forward"', 1),
    ],
)
def test_the_forward_kernel_is_not_run_again_where_context_is_kept(
    make, platform, call, calls, kept, again
):
    """Counted in the program lowered for an accelerator, which needs none."""
    inputs, places = draw_inputs(2, 128, 4, 2, 64)[:3], packed_places(2, 128)
    kernel = make(None)

    def attend(*qkv):
        return jnp.sum(kernel(*qkv, places, places) ** 2)

    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    step = jax.value_and_grad(jax.checkpoint(attend, policy=policy), argnums=(0, 1, 2))
    lowered = jax.jit(step).trace(*inputs).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count(call) == calls + again


def drop_segments(q, k, v, queries, keys):
    """Causal over the row: documents see each other."""
    ones = jnp.ones_like(queries.segments_BT)
    rows = Places(ones, jnp.cumsum(ones, axis=1))
    return xla_attention(q, k, v, rows, rows)


def regroup_heads(q, k, v, queries, keys):
    """Query head n reads key/value head n % K."""
    repeats = (1, 1, q.shape[2] // k.shape[2], 1)
    return xla_attention(q, jnp.tile(k, repeats), jnp.tile(v, repeats), queries, keys)


def see_the_future(q, k, v, queries, keys):
    return xla_attention(q, k, v, queries, keys.replace(positions_BT=0 * keys.positions_BT))


def stop_key_gradients(q, k, v, queries, keys):
    return xla_attention(q, jax.lax.stop_gradient(k), v, queries, keys)


def give_nan(q, k, v, queries, keys):
    return q * jnp.nan


WRONG = (drop_segments, regroup_heads, see_the_future, stop_key_gradients, give_nan)


@pytest.mark.parametrize("attend", WRONG, ids=lambda attend: attend.__name__)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_wrong_kernel_is_caught_and_the_way_out_named(attend, dtype):
    with pytest.raises(RuntimeError, match=r"'broken' is wrong on packed rows.*attention: xla"):
        check_kernel(Kernel("broken", attend), 4, 2, 16, dtype)


def test_a_kernel_that_does_not_run_is_named():
    with pytest.raises(RuntimeError, match=r"'splash' does not run; set attention: xla"):
        check_kernel(splash_kernel(None), 4, 2, 64)  # compiled for a TPU, on a CPU


def test_the_worst_process_decides(monkeypatch):
    monkeypatch.setattr(attention, "largest_over_processes", lambda error: error + 1)
    with pytest.raises(RuntimeError, match="relative error 1"):
        check_kernel(XLA, 4, 2, 16)


@pytest.mark.parametrize(
    ("platform", "head_dim", "name"),
    [
        ("tpu", 64, "splash"),
        ("tpu", 128, "splash"),
        ("tpu", 256, "xla"),
        ("gpu", 64, "triton"),
        ("gpu", 256, "xla"),
        ("cpu", 64, "xla"),
    ],
)
def test_auto_names_one_kernel(platform, head_dim, name):
    kernel = choose_kernel("auto", platform, head_dim, jnp.float32, None)
    assert kernel.name == name
    assert (kernel.note is None) == (name != "xla" or platform == "cpu")
    assert choose_kernel("xla", platform, head_dim, jnp.float32, None).name == "xla"


def test_tokamax_is_taken_in_bfloat16_where_it_is_installed(monkeypatch):
    choose = lambda name, dtype: choose_kernel(name, "gpu", 128, dtype, None)  # noqa: E731
    found = importlib.util.find_spec
    with monkeypatch.context() as here:
        here.setattr(importlib.util, "find_spec", lambda name: found("jax"))
        assert choose("auto", jnp.bfloat16).name == "mosaic"
        assert choose("auto", jnp.float32).name == "triton"
        with pytest.raises(ValueError, match=r"mosaic does not .* in float32; allowed: .*triton"):
            choose("mosaic", jnp.float32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    kernel = choose("auto", jnp.bfloat16)
    assert kernel.name == "triton" and kernel.note is None
    with pytest.raises(ValueError, match="install medreason"):
        choose("mosaic", jnp.bfloat16)


@pytest.mark.parametrize(
    ("requested", "platform", "head_dim", "match"),
    [
        ("splash", "cpu", 64, r"splash does not run on cpu.*allowed: \['auto', 'xla'\]"),
        ("splash", "gpu", 64, "splash does not run on gpu"),
        ("triton", "tpu", 64, "triton does not run on tpu"),
        ("triton", "gpu", 256, r"triton does not run on gpu with heads of 256 .*'xla'"),
        ("splash", "tpu", 256, "splash does not run on tpu with heads of 256"),
        ("auto", "npu", 64, r"no attention kernel for platform 'npu'; allowed: \['cpu', 'gpu'"),
    ],
)
def test_a_kernel_that_a_platform_has_not_is_refused(requested, platform, head_dim, match):
    with pytest.raises(ValueError, match=match):
        choose_kernel(requested, platform, head_dim, jnp.float32, None)


def test_auto_takes_the_plain_kernel_where_the_first_choice_fails(monkeypatch):
    """The GPU's kernel does not run on a CPU."""
    kernel = choose_checked_kernel("auto", "gpu", 4, 2, 64, jnp.float32, None)
    assert kernel.name == "xla"
    assert "memory O(B N T T); triton failed: Only interpret mode" in kernel.note
    with pytest.raises(RuntimeError, match="'triton' does not run; set attention: xla"):
        choose_checked_kernel("triton", "gpu", 4, 2, 64, jnp.float32, None)
    monkeypatch.setattr(attention, "xla_attention", drop_segments)
    with pytest.raises(RuntimeError, match="'xla' is wrong on packed rows"):
        choose_checked_kernel("auto", "gpu", 4, 2, 64, jnp.float32, None)


def test_a_model_with_the_plain_kernel_says_so(capsys, monkeypatch, tmp_path):
    from medreason_jax.config import MeshConfig
    from medreason_jax.data.chat import ChatTokenizer
    from medreason_jax.data.tokenizer_training import train_tokenizer
    from medreason_jax.qwen2 import load
    from medreason_jax.qwen2.folder import Description, ModelFolder, save_model
    from tests.tiny import tiny_model

    train_tokenizer(["a b c"] * 20, 320, "", tmp_path / "tokenizer")
    _, network, params, _ = tiny_model()
    tokenizer = ChatTokenizer(tmp_path / "tokenizer")
    save_model(tmp_path / "model", params, Description(network.sizes), tokenizer)
    as_on_gpu = lambda name, platform, *rest: choose_checked_kernel(name, "gpu", *rest)  # noqa: E731
    monkeypatch.setattr(load, "choose_checked_kernel", as_on_gpu)
    loaded = load.open_model(ModelFolder(tmp_path / "model"), MeshConfig(), "float32")
    assert loaded.network.compute.attention.name == "xla"
    assert "attention: plain attention on GPU" in capsys.readouterr().err
