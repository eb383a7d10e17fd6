"""Attention over packed rows: one contract, the kernels that keep it, and a test that shows it.

B batch, T query time, S key time, N query heads, K key/value heads, H head size, G = N / K query
heads a key/value head: query head n reads key/value head n // G, as in `transformers`.

Packing contract: a segment is contiguous in its row, its positions count up from 0, and segment 0
is padding. Inside a segment the order of the row is then the order of the positions, so kernels
that mask by row order (splash), by position (the reference) and by where the segment begins
(mosaic) agree. What comes out at padding is finite and means nothing.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mqa_single_device,
)

from medreason_jax.mesh import HeadShards, largest_over_processes


@struct.dataclass
class Places:
    """Where tokens stand: the segment, 0 being padding, and the position inside it."""

    segments_BT: jax.Array
    positions_BT: jax.Array


# (q_BTNH, k_BSKH, v_BSKH, queries, keys) -> context_BTNH
Attend = Callable[[jax.Array, jax.Array, jax.Array, Places, Places], jax.Array]


@struct.dataclass
class Kernel:
    """An attention function with its name; `note` is what a user should know of it."""

    name: str = struct.field(pytree_node=False)
    attend: Attend = struct.field(pytree_node=False)  # on the rows and heads of one device
    shards: HeadShards | None = struct.field(pytree_node=False, default=None)  # None: unsplit
    note: str | None = struct.field(pytree_node=False, default=None)

    def __call__(self, q_BTNH, k_BSKH, v_BSKH, queries: Places, keys: Places) -> jax.Array:
        if self.shards is None:
            return self.attend(q_BTNH, k_BSKH, v_BSKH, queries, keys)
        mapped = self.shards.map(
            lambda q, k, v, places: self.attend(q, k, v, *places),
            heads=q_BTNH.shape[2],
            kv_heads=k_BSKH.shape[2],
        )
        return mapped(q_BTNH, k_BSKH, v_BSKH, (queries, keys))


def require_segments(queries: Places, keys: Places) -> None:
    if queries.segments_BT is None or keys.segments_BT is None:
        raise ValueError(
            "attention got no segment ids (None), without which packed documents see each other; "
            "pass arrays of int32, all 1 for rows of one document"
        )


def xla_attention(q_BTNH, k_BSKH, v_BSKH, queries: Places, keys: Places) -> jax.Array:
    """The reference: any T and S, softmax in float32, memory O(B N T S).

    A query sees the keys of its own segment whose position is at most its own. The context has the
    checkpoint name "context".
    """
    require_segments(queries, keys)
    same_BTS = queries.segments_BT[:, :, None] == keys.segments_BT[:, None, :]
    before_BTS = queries.positions_BT[:, :, None] >= keys.positions_BT[:, None, :]
    mask_BNTS = (same_BTS & before_BTS)[:, None]
    context_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_BNTS, implementation="xla"
    )
    return checkpoint_name(context_BTNH, "context")


BLOCK = 128  # lanes of a TPU's vector registers; of queries in a GPU kernel


def in_blocks(attend: Attend) -> Attend:
    """The same of whole rows of any length: padded to a multiple of BLOCK, and cut again."""

    def of_any_length(q_BTNH, k_BSKH, v_BSKH, queries: Places, keys: Places) -> jax.Array:
        require_segments(queries, keys)
        T, S = q_BTNH.shape[1], k_BSKH.shape[1]
        if T != S:
            raise ValueError(
                f"attention of whole rows got {T} queries and {S} keys a row; set attention: xla"
            )
        more = -T % BLOCK  # places of segment 0
        pad = lambda x: jnp.pad(x, ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2)))  # noqa: E731
        padded = jax.tree.map(pad, (q_BTNH, k_BSKH, v_BSKH, queries, keys))
        return attend(*padded)[:, :T]

    return of_any_length


def largest_block(length: int, most: int) -> int:
    """The largest divisor of `length` that is a multiple of BLOCK and at most `most`."""
    return max(n for n in range(BLOCK, most + 1, BLOCK) if length % n == 0)


def splash_blocks(T: int, itemsize: int) -> BlockSizes:
    """Blocks as large as 16 MiB of vector memory let them be (v4, v5e; heads of up to 128).

    The fused backward writes one dq for each block of keys, T / block_kv_dkv times the memory of
    q: those blocks are long, and the blocks of queries beside them shorter. Compiled for v4, v5e
    and v6e; 2048 x 2048 overflows a v5e.
    """
    halved = itemsize > 2  # float32 takes twice the room
    forward = largest_block(T, 512 if halved else 1024)
    backward_kv = largest_block(T, 1024 if halved else 2048)
    return BlockSizes(
        block_q=forward,
        block_kv=forward,
        block_kv_compute=largest_block(forward, 512),
        block_q_dkv=largest_block(T, 512),
        block_kv_dkv=backward_kv,
        block_kv_dkv_compute=largest_block(backward_kv, 512),
        use_fused_bwd_kernel=True,
    )


def splash_attention(
    q_BTNH, k_BSKH, v_BSKH, queries: Places, keys: Places, interpret: bool = False
) -> jax.Array:
    """TPU flash attention of whole rows, memory O(B N T), masked by row order and segment.

    `queries` and `keys` are the same places, T a multiple of BLOCK. What the backward needs
    (context and log-sum-exp) has the checkpoint name "context". `interpret` runs the kernel's
    program on any platform.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # Scaled in float32: 128**-0.5 is no bfloat16, rounding it first would bend every logit alike.
    scaled_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    q_BKGTH = scaled_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    kernel = make_splash_mqa_single_device(
        MultiHeadMask([CausalMask((T, T))] * (N // K)),
        block_sizes=splash_blocks(T, q_BTNH.dtype.itemsize),
        residual_checkpoint_name="context",
        interpret=interpret,
    )
    over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    context_BKGTH = jax.vmap(over_heads)(
        q_BKGTH,
        k_BSKH.swapaxes(1, 2),
        v_BSKH.swapaxes(1, 2),
        SegmentIds(queries.segments_BT, keys.segments_BT),
    )
    return context_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def splash_kernel(shards: HeadShards | None, interpret: bool = False) -> Kernel:
    return Kernel("splash", in_blocks(partial(splash_attention, interpret=interpret)), shards)


def triton_attention(
    q_BTNH, k_BSKH, v_BSKH, queries: Places, keys: Places, interpret: bool = False
) -> jax.Array:
    """jax's flash attention for GPUs of whole rows, memory O(B N T), masked as splash is.

    It has no groups: keys and values are repeated for every query head. What the backward needs
    has the checkpoint name "context".
    """
    N, H = q_BTNH.shape[2:]
    repeats = N // k_BSKH.shape[2]
    # Blocks that an H200's shared memory holds; float32 takes twice the room.
    forward, backward = (64, 32) if q_BTNH.dtype.itemsize > 2 else (128, 64)
    settings = (H**-0.5, forward, backward, interpret)
    k_BSNH, v_BSNH = (jnp.repeat(x, repeats, axis=2) for x in (k_BSKH, v_BSKH))
    return _triton(q_BTNH, k_BSNH, v_BSNH, queries.segments_BT, settings)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _triton(q_BTNH, k_BTNH, v_BTNH, segments_BT, settings):
    return _triton_forward(q_BTNH, k_BTNH, v_BTNH, segments_BT, settings)[0]


def _triton_forward(q_BTNH, k_BTNH, v_BTNH, segments_BT, settings):
    """jax's, but with names on what the backward needs."""
    mha, arguments = _mha(settings, return_residuals=True)
    inputs = (q_BTNH, k_BTNH, v_BTNH, segments_BT)
    context_BTNH, lse_BNT = (checkpoint_name(x, "context") for x in mha(*inputs, *arguments))
    return context_BTNH, (*inputs, context_BTNH, lse_BNT)


def _triton_backward(settings, kept, d_context_BTNH):
    mha, arguments = _mha(settings, return_residuals=False)
    return mha.bwd(*arguments, kept, d_context_BTNH)


def _mha(settings, return_residuals: bool):
    """jax's kernel, and its arguments after the arrays, by place as its rules take them."""
    from jax.experimental.pallas.ops.gpu.attention import (  # for GPUs, and deprecated
        BlockSizes,
        mha,
    )

    scale, forward, backward, interpret = settings
    blocks = BlockSizes(forward, forward, backward, backward, backward, backward)
    # scale, causal, blocks, backward, warps, stages, grid, interpret, debug, residuals
    return mha, (scale, True, blocks, "triton", None, 2, None, interpret, False, return_residuals)


_triton.defvjp(_triton_forward, _triton_backward)


def triton_kernel(shards: HeadShards | None, interpret: bool = False) -> Kernel:
    return Kernel("triton", in_blocks(partial(triton_attention, interpret=interpret)), shards)


def mosaic_attention(q_BTNH, k_BSKH, v_BSKH, queries: Places, keys: Places) -> jax.Array:
    """tokamax's flash attention for Hopper GPUs of whole rows, memory O(B N T), in 16 bits.

    Masked by row order and by the place where a token's segment begins. What the backward needs has
    the checkpoint name "context".
    """
    place_T = jnp.arange(q_BTNH.shape[1], dtype=jnp.int32)
    # A token of padding sees itself alone: that is no work.
    starts_BT = jnp.where(queries.segments_BT > 0, place_T - queries.positions_BT, place_T)
    return _mosaic(q_BTNH, k_BSKH, v_BSKH, starts_BT)


@jax.custom_vjp
def _mosaic(q_BTNH, k_BSKH, v_BSKH, starts_BT):
    return _mosaic_forward(q_BTNH, k_BSKH, v_BSKH, starts_BT)[0]


def _mosaic_forward(q_BTNH, k_BSKH, v_BSKH, starts_BT):
    """tokamax's, but with names on what the backward needs: the context, and of each query the
    largest logit and the sum of exponentials."""
    attend, _, mask = _tokamax()
    inputs = (q_BTNH, k_BSKH, v_BSKH)
    outputs = attend(*inputs, mask=mask(starts_BT), return_residuals=True)
    named = jax.tree.map(lambda x: checkpoint_name(x, "context"), outputs)
    context_BTNH, (largest_BNT, sum_BNT) = named
    return context_BTNH, (inputs, starts_BT, context_BTNH, largest_BNT, sum_BNT)


def _mosaic_backward(kept, d_context_BTNH):
    inputs, starts_BT, context_BTNH, largest_BNT, sum_BNT = kept
    attend, pull, mask = _tokamax()
    options = dict(attend.bind(*inputs, mask=mask(starts_BT)).kwargs)
    del options["return_residuals"]  # the rest is what the forward took it to mean
    d = pull((largest_BNT, sum_BNT), context_BTNH, d_context_BTNH, *inputs, **options)
    return d["q"], d["k"], d["v"], None


_mosaic.defvjp(_mosaic_forward, _mosaic_backward)


@cache
def _tokamax():
    """Its forward and backward, and the mask of a [B, T] of first keys.

    Its public function takes none but dense masks. Blocks are what it chooses by itself, named, or
    it warns that it has no measurements of this GPU.
    """
    from tokamax._src.ops.attention import (
        base,  # type: ignore
        pallas_mosaic_gpu,
        pallas_mosaic_gpu_vjp,
    )

    forward = pallas_mosaic_gpu.ConfigSM90(block_q=64, block_kv=128, num_stages=2, persistent=False)
    backward = pallas_mosaic_gpu_vjp.Config(
        block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64, num_stages=2, compute_wgs=2
    )
    attend = pallas_mosaic_gpu.PallasMosaicGpuFlashAttention(config=forward)
    pull = pallas_mosaic_gpu_vjp.PallasMosaicGpuFlashAttentionVjp(config=backward)
    # One head stands for all.
    return attend, pull, lambda starts_BT: base.Mask(k_start=starts_BT[:, None], is_causal=True)


def mosaic_kernel(shards: HeadShards | None) -> Kernel:
    return Kernel("mosaic", in_blocks(mosaic_attention), shards)


KernelName = Literal["xla", "splash", "mosaic", "triton"]
KERNELS: tuple[KernelName, ...] = get_args(KernelName)


@dataclass(frozen=True)
class Row:
    """Of the table that `auto` reads in order, taking the first row that fits (and, where the
    devices are here, passes its self-test)."""

    platform: str
    kernel: KernelName
    largest_head: int | None = None  # any
    bits: int | None = None  # of the type that is computed in; any
    note: str | None = None


RESOLUTION = (
    Row("tpu", "splash", 128),  # 8 to 128 compile; 256 overflows a v5e's vector memory
    Row("tpu", "xla", note="plain attention on TPU: memory O(B N T T)"),
    Row("gpu", "mosaic", 128, bits=16),
    Row("gpu", "triton", 128),
    Row("gpu", "xla", note="plain attention on GPU: memory O(B N T T)"),
    Row("cpu", "xla"),
)


def kernel_names(platform: str, head_dim: int, dtype: Any) -> dict[KernelName, str | None]:
    """The kernels of a platform, the first choice first, with their notes."""
    notes = {
        row.kernel: row.note
        for row in RESOLUTION
        if row.platform == platform
        and (row.largest_head is None or head_dim <= row.largest_head)
        and (row.bits is None or jnp.dtype(dtype).itemsize == row.bits // 8)
    }
    if not notes:
        known = sorted({row.platform for row in RESOLUTION})
        raise ValueError(f"no attention kernel for platform {platform!r}; allowed: {known}")
    if importlib.util.find_spec("tokamax") is None:
        notes.pop("mosaic", None)
    return notes


def choose_kernel(
    requested: Literal["auto"] | KernelName,
    platform: str,
    head_dim: int,
    dtype: Any,
    shards: HeadShards | None,
) -> Kernel:
    """The kernel for the mesh's platform: of the devices compiled for, not of this machine's."""
    notes = kernel_names(platform, head_dim, dtype)
    name = next(iter(notes)) if requested == "auto" else requested
    if name not in notes:
        hint = "; it is tokamax's: install medreason[gpu] on Python 3.12" * (name == "mosaic")
        raise ValueError(
            f"attention: {name} does not run on {platform} with heads of {head_dim} in "
            f"{jnp.dtype(dtype).name}; allowed: {['auto', *notes]}{hint}"
        )
    if name == "xla":
        return Kernel(name, xla_attention, None, notes[name])
    makers = {"splash": splash_kernel, "mosaic": mosaic_kernel, "triton": triton_kernel}
    return makers[name](shards).replace(note=notes[name])


# Largest error that rounding explains, relative to the largest value of the array.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def tolerance(dtype: Any) -> float:
    return TOLERANCE[jnp.dtype(dtype).name]


# Documents of the self-test's two rows, as shares of a row; the rest is padding.
LENGTHS = ((0.4, 0.1, 0.3), (0.2, 0.6))


def pack_test_rows(T: int) -> tuple[Places, list[tuple[int, slice]]]:
    """Places of two packed rows, and (row, its slice of time) of each document."""
    segments_BT, positions_BT = np.zeros((2, len(LENGTHS), T), np.int32)
    documents = []
    for row, shares in enumerate(LENGTHS):
        first = 0
        for segment, share in enumerate(shares, 1):
            last = first + int(share * T)
            segments_BT[row, first:last] = segment
            positions_BT[row, first:last] = np.arange(last - first)
            documents.append((row, slice(first, last)))
            first = last
    return Places(jnp.asarray(segments_BT), jnp.asarray(positions_BT)), documents


def attend_documents(q_BTNH, k_BTKH, v_BTKH, d_context_BTNH, documents):
    """context, dq, dk and dv by a loop over documents and heads in float64; 0 at padding."""
    q, k, v, d = (np.asarray(x, np.float64) for x in (q_BTNH, k_BTKH, v_BTKH, d_context_BTNH))
    context, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    scale = q.shape[-1] ** -0.5
    for row, times in documents:
        for n in range(q.shape[2]):
            at, kv = (row, times, n), (row, times, n // (q.shape[2] // k.shape[2]))
            logits_TT = scale * q[at] @ k[kv].T
            weights_TT = np.tril(np.exp(logits_TT - logits_TT.max(axis=1, keepdims=True)))
            weights_TT /= weights_TT.sum(axis=1, keepdims=True)
            context[at] = weights_TT @ v[kv]
            d_weights_TT = d[at] @ v[kv].T
            mean_T1 = (weights_TT * d_weights_TT).sum(axis=1, keepdims=True)
            d_logits_TT = scale * weights_TT * (d_weights_TT - mean_T1)
            dq[at] = d_logits_TT @ k[kv]
            dk[kv] += d_logits_TT.T @ q[at]
            dv[kv] += weights_TT.T @ d[at]
    return context, dq, dk, dv


def self_test(
    kernel: Kernel,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: Any = jnp.float32,
    T: int = 256,
) -> float:
    """Largest relative error of the context and the gradients of q, k and v on packed rows.

    Runs on one device of this process, whatever the mesh.
    """
    places, documents = pack_test_rows(T)
    inside_BT11 = (places.segments_BT != 0)[:, :, None, None]
    random = np.random.default_rng(0)
    draw = lambda n: jnp.asarray(random.normal(size=(len(LENGTHS), T, n, head_dim)), dtype)  # noqa: E731
    q, k, v, d_context = draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)
    d_context = jnp.where(inside_BT11, d_context, 0)

    @jax.jit
    def run(q, k, v, d_context):
        context, pull = jax.vjp(lambda *qkv: kernel.attend(*qkv, places, places), q, k, v)
        return jnp.where(inside_BT11, context, 0), *pull(d_context)

    wanted = attend_documents(q, k, v, d_context, documents)
    errors = [
        np.max(np.abs(np.asarray(x, np.float64) - y)) / np.max(np.abs(y))
        for x, y in zip(run(q, k, v, d_context), wanted, strict=True)
    ]
    return float(np.max(errors))  # np.max keeps a NaN


def check_kernel(
    kernel: Kernel,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: Any = jnp.float32,
    T: int = 256,
) -> float:
    """The error of `self_test`, the largest of all processes; RuntimeError beyond TOLERANCE."""
    advice, failure = "set attention: xla", None
    try:
        error = self_test(kernel, heads, kv_heads, head_dim, dtype, T)
    except Exception as caught:  # the compiler's own errors name no setting
        error, failure = float("inf"), caught
    worst, allowed = largest_over_processes(error), tolerance(dtype)
    if worst == float("inf"):
        raise RuntimeError(f"attention kernel {kernel.name!r} does not run; {advice}") from failure
    if not worst <= allowed:  # so that NaN fails
        raise RuntimeError(
            f"attention kernel {kernel.name!r} is wrong on packed rows: relative error "
            f"{worst:.2g}, allowed {allowed:.2g} in {jnp.dtype(dtype).name}; {advice}"
        )
    return worst


def choose_checked_kernel(
    requested: Literal["auto"] | KernelName,
    platform: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: Any,
    shards: HeadShards | None,
) -> Kernel:
    """The one requested where it passes `check_kernel` here; of `auto` the first that does."""
    known = kernel_names(platform, head_dim, dtype)
    failed = ""
    names = list(known) if requested == "auto" else [requested]
    for name in names:
        kernel = choose_kernel(name, platform, head_dim, dtype, shards)
        try:
            check_kernel(kernel, heads, kv_heads, head_dim, dtype)
        except RuntimeError as error:
            if name == names[-1]:
                raise
            cause = error if error.__cause__ is None else f"{error.__cause__!s:.200}"
            failed += f"; {name} failed: {cause}"
        else:
            note = (kernel.note or f"{name} is used") + failed
            return kernel.replace(note=note) if failed else kernel
    raise AssertionError(names)
