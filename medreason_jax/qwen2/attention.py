"""Attention over packed rows, by kernel.

B batch, T query time, S key time, N query heads, K key/value heads, H head size. Segment 0 is
padding.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# (q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, slots_T) -> context_BTNH
Attention = Callable[..., jax.Array]


def attention_mask(segments_BT: jax.Array, segments_BS: jax.Array, slots_T: jax.Array) -> jax.Array:
    """mask_BTS: a query sees the keys of its own segment at its own slot or before.

    `slots_T` is the place of each query among the keys (0..S-1).
    """
    same_BTS = segments_BT[:, :, None] == segments_BS[:, None, :]
    before_TS = slots_T[:, None] >= jnp.arange(segments_BS.shape[1])[None, :]
    return same_BTS & before_TS[None]


def xla_attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, slots_T):
    """The reference: softmax in float32, memory O(B N T S)."""
    mask_BTS = attention_mask(segments_BT, segments_BS, slots_T)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], implementation="xla"
    )


def choose_attention(platform: str) -> tuple[str, Attention]:
    """Name and function of the kernel for the mesh's platform ("cpu", "gpu", "tpu")."""
    kernels = {"cpu": "xla", "gpu": "xla", "tpu": "xla"}
    if platform not in kernels:
        raise ValueError(f"no attention for platform {platform!r}; allowed: {sorted(kernels)}")
    return kernels[platform], xla_attention
