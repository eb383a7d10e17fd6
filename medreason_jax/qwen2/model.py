"""Qwen2.5, all of it, in Flax NNX with `transformers`' parameter names.

B batch, T time, S cache slots, D model, F feed-forward, V vocabulary, L layers, N query heads, K
key/value heads, H head size. Layers are stacked on a leading L axis and scanned.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct

from medreason_jax.qwen2.attention import Attention
from medreason_jax.qwen2.sizes import Sizes

Params = dict[str, Any]
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]


@struct.dataclass
class Cache:
    """Keys and values of all layers; every row writes at the same slot."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    segments_BS: jax.Array  # 0 where a row has no token


@struct.dataclass
class Compute:
    """How the model runs: not what it computes."""

    dtype: Any = struct.field(pytree_node=False)
    attention: Attention = struct.field(pytree_node=False)
    constrain: Constrain = struct.field(pytree_node=False)
    remat: bool = struct.field(pytree_node=False)


class Linear(nnx.Module):
    def __init__(self, n_in: int, n_out: int, scale: float, bias: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), (n_in, n_out)))
        self.bias = nnx.Param(jnp.zeros(n_out)) if bias else None

    def __call__(self, x):
        y = jnp.dot(x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, size: int, eps: float):
        self.weight = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x):
        x32 = x.astype(jnp.float32)  # bfloat16 loses the mean square
        normal = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return normal.astype(x.dtype) * self.weight[...].astype(x.dtype)


class Embedding(nnx.Module):
    def __init__(self, size: int, width: int, scale: float, rngs: nnx.Rngs):
        self.embedding = nnx.Param(scale * jax.random.normal(rngs.params(), (size, width)))


class SelfAttention(nnx.Module):
    def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
        D, H, scale = sizes.hidden_size, sizes.head_dim, sizes.initializer_range
        N, K = sizes.num_attention_heads, sizes.num_key_value_heads
        self.q_proj = Linear(D, N * H, scale, True, rngs)
        self.k_proj = Linear(D, K * H, scale, True, rngs)
        self.v_proj = Linear(D, K * H, scale, True, rngs)
        self.o_proj = Linear(N * H, D, scale, False, rngs)
        self.head_dim = H

    def project(self, x_BTD, rotation_BTH):
        """Rotated queries and keys, and values, split into heads."""
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)  # noqa: E731
        q_BTNH, k_BTKH = heads(self.q_proj(x_BTD)), heads(self.k_proj(x_BTD))
        return rotate(q_BTNH, rotation_BTH), rotate(k_BTKH, rotation_BTH), heads(self.v_proj(x_BTD))


class MLP(nnx.Module):
    def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
        D, F, scale = sizes.hidden_size, sizes.intermediate_size, sizes.initializer_range
        self.gate_proj = Linear(D, F, scale, False, rngs)
        self.up_proj = Linear(D, F, scale, False, rngs)
        self.down_proj = Linear(F, D, scale, False, rngs)

    def __call__(self, x, constrain: Constrain):
        inner = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(constrain(inner, ("batch", "time", "mlp")))


class DecoderLayer(nnx.Module):
    def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.self_attn = SelfAttention(sizes, rngs)
        self.post_attention_layernorm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.mlp = MLP(sizes, rngs)

    def __call__(self, x_BTD, rotation_BTH, attend: Callable, constrain: Constrain):
        """`attend(q_BTNH, k_BTKH, v_BTKH) -> context_BTNH, kept`; `kept` is handed back."""
        q_BTNH, k_BTKH, v_BTKH = self.self_attn.project(self.input_layernorm(x_BTD), rotation_BTH)
        context_BTNH, kept = attend(
            constrain(q_BTNH, ("batch", "time", "heads", None)), k_BTKH, v_BTKH
        )
        x_BTD = x_BTD + self.self_attn.o_proj(context_BTNH.reshape(*x_BTD.shape[:2], -1))
        x_BTD = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD), constrain)
        return constrain(x_BTD, ("batch", "time", "model")), kept


class Qwen2(nnx.Module):
    """The decoder; `train/head.py` and the sampler apply the vocabulary projection."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
        scale = sizes.initializer_range
        self.embed_tokens = Embedding(sizes.vocab_size, sizes.hidden_size, scale, rngs)
        stack = nnx.split_rngs(splits=sizes.num_hidden_layers)(
            nnx.vmap(lambda r: DecoderLayer(sizes, r), in_axes=(0,), out_axes=0)
        )
        self.layers = stack(rngs)
        self.norm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        if not sizes.tie_word_embeddings:
            self.lm_head = Linear(sizes.hidden_size, sizes.vocab_size, scale, False, rngs)
        self.sizes = sizes

    def hidden(self, tokens_BT, positions_BT, segments_BT, compute: Compute):
        """hidden_BTD after the last norm, of whole rows."""
        slots_T = jnp.arange(tokens_BT.shape[1])

        def attend(q, k, v):
            return compute.attention(q, k, v, segments_BT, segments_BT, slots_T), None

        definition, stacked = nnx.split(self.layers)
        rotation_BTH = self._rotation(positions_BT)

        def body(x_BTD, layer):
            x_BTD, _ = nnx.merge(definition, layer)(x_BTD, rotation_BTH, attend, compute.constrain)
            return x_BTD, None

        body = jax.checkpoint(body) if compute.remat else body
        x_BTD, _ = jax.lax.scan(body, self._embed(tokens_BT, compute), stacked)
        return self.norm(x_BTD)

    def hidden_cached(self, tokens_BT, positions_BT, segments_BT, cache: Cache, slot, compute):
        """hidden_BTD of T new tokens at slots slot..slot+T-1, and the cache with them."""
        slots_T = slot + jnp.arange(tokens_BT.shape[1])
        segments_BS = jax.lax.dynamic_update_slice(cache.segments_BS, segments_BT, (0, slot))
        definition, stacked = nnx.split(self.layers)
        rotation_BTH = self._rotation(positions_BT)

        # The cache is a carry, updated in place: as a scanned input it would be copied every step.
        def body(carry, layer_and_index):
            x_BTD, k_LBSKH, v_LBSKH = carry
            layer, index = layer_and_index

            def attend(q, k, v):
                at = (index, 0, slot, 0, 0)
                k_new = jax.lax.dynamic_update_slice(k_LBSKH, k[None].astype(k_LBSKH.dtype), at)
                v_new = jax.lax.dynamic_update_slice(v_LBSKH, v[None].astype(v_LBSKH.dtype), at)
                context = compute.attention(
                    q, k_new[index], v_new[index], segments_BT, segments_BS, slots_T
                )
                return context, (k_new, v_new)

            x_BTD, kept = nnx.merge(definition, layer)(
                x_BTD, rotation_BTH, attend, compute.constrain
            )
            return (x_BTD, *kept), None

        indices_L = jnp.arange(self.sizes.num_hidden_layers)
        carry = (self._embed(tokens_BT, compute), cache.k_LBSKH, cache.v_LBSKH)
        (x_BTD, k_LBSKH, v_LBSKH), _ = jax.lax.scan(body, carry, (stacked, indices_L))
        return self.norm(x_BTD), Cache(k_LBSKH, v_LBSKH, segments_BS)

    def _embed(self, tokens_BT, compute: Compute):
        x_BTD = self.embed_tokens.embedding[...][tokens_BT].astype(compute.dtype)
        return compute.constrain(x_BTD, ("batch", "time", "model"))

    def _rotation(self, positions_BT):
        H, theta = self.sizes.head_dim, self.sizes.rope_theta
        frequency = theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
        angle = positions_BT[..., None].astype(jnp.float32) * frequency
        return jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]


def rotate(x_BTNH, rotation):
    """Rotary embedding, halves as `transformers` pairs them (arXiv 2104.09864), in float32."""
    cos, sin = rotation
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


@struct.dataclass
class Network:
    """The model split once: pure functions of a plain parameter tree."""

    definition: Any = struct.field(pytree_node=False)
    sizes: Sizes = struct.field(pytree_node=False)
    compute: Compute = struct.field(pytree_node=False)

    def hidden(self, params: Params, tokens_BT, positions_BT, segments_BT) -> jax.Array:
        model = nnx.merge(self.definition, params)
        return model.hidden(tokens_BT, positions_BT, segments_BT, self.compute)

    def hidden_cached(self, params: Params, tokens_BT, positions_BT, segments_BT, cache, slot):
        model = nnx.merge(self.definition, params)
        return model.hidden_cached(tokens_BT, positions_BT, segments_BT, cache, slot, self.compute)

    def vocabulary_kernel(self, params: Params) -> jax.Array:
        """W_VD, one row a token: the embedding itself when heads are tied."""
        if self.sizes.tie_word_embeddings:
            return params["embed_tokens"]["embedding"]
        return params["lm_head"]["kernel"].T

    def empty_cache(self, batch: int, slots: int) -> Cache:
        s = self.sizes
        shape = (s.num_hidden_layers, batch, slots, s.num_key_value_heads, s.head_dim)
        zeros = jnp.zeros(shape, self.compute.dtype)
        return Cache(zeros, zeros, jnp.zeros((batch, slots), jnp.int32))


def make_network(sizes: Sizes, compute: Compute) -> tuple[Network, Params]:
    """The network, and its parameter tree as shapes (`jax.ShapeDtypeStruct`)."""
    abstract = nnx.eval_shape(lambda: Qwen2(sizes, nnx.Rngs(0)))
    definition, state = nnx.split(abstract)
    return Network(definition, sizes, compute), nnx.to_pure_dict(state)


def init_params(sizes: Sizes, key: jax.Array) -> Params:
    """Random weights N(0, initializer_range), biases 0, norm gains 1, float32."""
    return nnx.to_pure_dict(nnx.split(Qwen2(sizes, nnx.Rngs(params=key)))[1])
