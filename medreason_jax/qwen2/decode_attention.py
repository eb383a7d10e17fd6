"""Attention of one new query a row over the cached slots: a platform's kernel, or the plain twin.

B batch, S cache slots, N query heads, K key/value heads, H head size, G = N / K query heads a
key/value head. Row b's query stands at slot lengths_B[b] and sees the slots up to its own.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

from medreason_jax.mesh import HeadShards, largest_over_processes
from medreason_jax.qwen2.attention import tolerance

log = logging.getLogger(__name__)

# (q_BNH, k_BKSH, v_BKSH, lengths_B) -> context_BNH
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@struct.dataclass
class DecodeKernel:
    """A decode attention with its name.

    With `by_length` it reads no more of a row than its length; otherwise all slots it is given, so
    that whoever decodes gives no more than are in use.
    """

    name: str = struct.field(pytree_node=False)
    attend: Attend = struct.field(pytree_node=False)  # on the rows and heads of one device
    shards: HeadShards | None = struct.field(pytree_node=False, default=None)  # None: unsplit
    by_length: bool = struct.field(pytree_node=False, default=False)

    def __call__(self, q_BNH, k_BKSH, v_BKSH, lengths_B) -> jax.Array:
        if self.shards is None:
            return self.attend(q_BNH, k_BKSH, v_BKSH, lengths_B)
        mapped = self.shards.map(
            lambda q_B1NH, k, v, lengths_B: self.attend(q_B1NH[:, 0], k, v, lengths_B)[:, None],
            heads=q_BNH.shape[1],
            kv_heads=k_BKSH.shape[1],
            kv_head_axis=1,
        )
        return mapped(q_BNH[:, None], k_BKSH, v_BKSH, lengths_B)[:, 0]


def xla_decode(q_BNH, k_BKSH, v_BKSH, lengths_B) -> jax.Array:
    """The plain twin: reads all S slots; softmax in float32, context in the type of the values."""
    B, N, H = q_BNH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKGH = q_BNH.reshape(B, K, N // K, H)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits_BKGS = product("bkgh,bksh->bkgs", q_BKGH, k_BKSH) * H**-0.5
    seen_BS = jnp.arange(S) <= lengths_B[:, None]
    p_BKGS = jax.nn.softmax(jnp.where(seen_BS[:, None, None], logits_BKGS, -jnp.inf), axis=-1)
    context_BKGH = jnp.einsum("bkgs,bksh->bkgh", p_BKGS.astype(v_BKSH.dtype), v_BKSH)
    return context_BKGH.reshape(B, N, H)


def largest_power(number: int, most: int) -> int:
    """The largest power of two that divides `number`, at most `most` (one itself)."""
    return min(number & -number, most)


def pallas_decode(q_BNH, k_BKSH, v_BKSH, lengths_B, interpret: bool = False) -> jax.Array:
    """jax's flash decoding for GPUs: the slots of a row in blocks, side by side."""
    from jax.experimental.pallas.ops.gpu.decode_attention import gqa  # for GPUs, and deprecated

    S = k_BKSH.shape[2]
    block = largest_power(S, 128)
    context_BNH = gqa(
        q_BNH,
        k_BKSH.swapaxes(1, 2),  # gqa swaps them back
        v_BKSH.swapaxes(1, 2),
        kv_seq_len=lengths_B + 1,
        block_k=block,
        k_splits=S // block,
        interpret=interpret,
    )
    return context_BNH.astype(v_BKSH.dtype)


def paged_decode(q_BNH, k_BKSH, v_BKSH, lengths_B) -> jax.Array:
    """jax's paged attention for TPUs, every row and key/value head on pages of its own.

    The cache as it lies is then the pages of one head: nothing is transposed.
    """
    B, N, H = q_BNH.shape
    K, S = k_BKSH.shape[1:3]
    page = largest_power(S, 128)
    pages = S // page
    # Scaled in float32: 128**-0.5 is no bfloat16, rounding it first would bend every logit alike.
    scaled_BNH = (q_BNH.astype(jnp.float32) * H**-0.5).astype(q_BNH.dtype)
    context_bGH = paged_attention(
        scaled_BNH.reshape(B * K, N // K, H),
        k_BKSH.reshape(1, B * K * pages, page, H),
        v_BKSH.reshape(1, B * K * pages, page, H),
        jnp.repeat(jnp.minimum(lengths_B + 1, S), K).astype(jnp.int32),  # a full row that ended
        jnp.arange(B * K * pages, dtype=jnp.int32).reshape(B * K, pages),
        pages_per_compute_block=max(n for n in range(1, 5) if pages % n == 0),
    )
    return context_bGH.reshape(B, N, H)


XLA_DECODE = DecodeKernel("xla", xla_decode)


def decode_kernel(platform: str, head_dim: int, shards: HeadShards) -> DecodeKernel:
    """The first choice for a platform."""
    if platform == "gpu":
        return DecodeKernel("pallas", pallas_decode, shards, by_length=True)
    if platform == "tpu" and head_dim % 128 == 0:  # others do not compile
        return DecodeKernel("paged", paged_decode, shards, by_length=True)
    return XLA_DECODE


def choose_decode_kernel(
    platform: str, heads: int, kv_heads: int, head_dim: int, dtype: Any, shards: HeadShards
) -> DecodeKernel:
    """The platform's kernel where it passes the self-test, told and replaced where it does not."""
    kernel = decode_kernel(platform, head_dim, shards)
    if kernel is XLA_DECODE:
        return kernel
    held = shards.held(heads, kv_heads)  # by one device, as the kernel is called
    try:
        error, why = max(self_test(kernel, *held, head_dim, dtype, S) for S in TEST_SIZES), ""
    except Exception as failure:  # the compiler's own errors name no setting
        error, why = float("inf"), f": {failure!s:.200}"
    error = largest_over_processes(error)
    if error <= tolerance(dtype):
        return kernel
    log.warning("decode attention %r is not used: relative error %.2g%s", kernel.name, error, why)
    return XLA_DECODE


TEST_SIZES = (16, 48, 384)  # of caches: blocks of 16 and of 128


def self_test(
    kernel: DecodeKernel, heads: int, kv_heads: int, head_dim: int, dtype: Any, S: int
) -> float:
    """Largest relative error of the context, of rows of several lengths, beside numpy in float64.

    Runs on one device of this process, whatever the mesh. What lies beyond a row's length is large.
    """
    random = np.random.default_rng(0)
    lengths_B = np.array([0, 1, S // 3 - 1, S // 3, S // 2, S - 1])
    B = len(lengths_B)
    q = jnp.asarray(random.normal(size=(B, heads, head_dim)), dtype)
    beyond_B1S1 = (np.arange(S) > lengths_B[:, None])[:, None, :, None]
    k, v = (
        jnp.asarray(random.normal(size=(B, kv_heads, S, head_dim)) + 50 * beyond_B1S1, dtype)
        for _ in range(2)
    )
    found = np.asarray(jax.jit(kernel.attend)(q, k, v, jnp.asarray(lengths_B)), np.float64)
    wanted = np.zeros_like(found)
    q64, k64, v64 = (np.asarray(x, np.float64) for x in (q, k, v))
    for b, length in enumerate(lengths_B):
        for n in range(heads):
            head = n // (heads // kv_heads)
            logits_s = k64[b, head, : length + 1] @ q64[b, n] * head_dim**-0.5
            weights_s = np.exp(logits_s - logits_s.max())
            wanted[b, n] = weights_s @ v64[b, head, : length + 1] / weights_s.sum()
    return float(np.max(np.abs(found - wanted)) / np.max(np.abs(wanted)))  # np.max keeps a NaN
