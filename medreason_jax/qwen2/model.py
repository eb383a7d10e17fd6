"""Qwen2.5, all of it, in Flax NNX with `transformers`' parameter names.

B batch, T time, S cache slots, D model, F feed-forward, V vocabulary, L layers, N query heads, K
key/value heads, H head size. Layers are stacked on a leading L axis and scanned.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.ad_checkpoint import checkpoint_name

from medreason_jax.qwen2.attention import Kernel, Places
from medreason_jax.qwen2.decode_attention import DecodeKernel
from medreason_jax.qwen2.heads import Score, ScoreHead
from medreason_jax.qwen2.lora import Lora, Target
from medreason_jax.qwen2.rope import rope_frequencies
from medreason_jax.qwen2.sizes import Sizes

Params = dict[str, Any]
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
Remat = Literal["none", "products", "context", "context+qkv", "full"]

# What a layer keeps for the backward pass beside its input, by checkpoint name (the attention
# kernels give "context"); the rest is computed again.
KEPT: dict[str, tuple[str, ...]] = {
    "context": ("context",),
    "context+qkv": ("context", "qkv"),
    "products": ("context", "qkv", "projected", "gate_up"),
    "full": (),
}


@struct.dataclass
class Cache:
    """Keys and values [B, K, S, H]: one array a layer, or one [L, B, K, S, H] of stacked layers.

    Token i of a row stands at its slot i. Heads go before slots, as attention reads them: otherwise
    every step transposes the cache.
    """

    k: Any
    v: Any


def write_slot(cache_BKSH, new_BKH, slots_B, layer=None):
    """The cache with `new_BKH` at slot slots_B[b] of row b; of one layer where it is stacked."""
    at, new_BKH = () if layer is None else (layer,), new_BKH.astype(cache_BKSH.dtype)

    def one_row(row, new_KH, slot):
        new = new_KH.reshape(*(1,) * len(at), new_KH.shape[0], 1, new_KH.shape[1])
        return jax.lax.dynamic_update_slice(row, new, (*at, 0, slot, 0))

    rows = len(at)
    return jax.vmap(one_row, in_axes=(rows, 0, 0), out_axes=rows)(cache_BKSH, new_BKH, slots_B)


@struct.dataclass
class Compute:
    """How the model runs: not what it computes.

    `unroll` is how many layers one iteration of the scan holds; of all of them there is no loop.
    """

    dtype: Any = struct.field(pytree_node=False)
    attention: Kernel = struct.field(pytree_node=False)  # of whole rows
    constrain: Constrain = struct.field(pytree_node=False)
    remat: Remat = struct.field(pytree_node=False, default="none")
    unroll: int = struct.field(pytree_node=False, default=1)


class Linear(nnx.Module):
    """x W + b, and where a target is given its low-rank adapter (`lora.py`)."""

    def __init__(self, n_in, n_out, scale: float, bias: bool, rngs, lora: Target | None = None):
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), (n_in, n_out)))
        self.bias = nnx.Param(jnp.zeros(n_out)) if bias else None
        self.lora_A = None if lora is None else nnx.Param(jnp.zeros((n_in, lora.rank)))
        self.lora_B = None if lora is None else nnx.Param(jnp.zeros((lora.rank, n_out)))
        self.lora_scale = None if lora is None else lora.scale

    def __call__(self, x):
        y = jnp.dot(x, self.kernel[...].astype(x.dtype))
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora_A is not None:
            low = jnp.dot(x, self.lora_A[...].astype(x.dtype))
            y = y + self.lora_scale * jnp.dot(low, self.lora_B[...].astype(x.dtype))
        return y


class RMSNorm(nnx.Module):
    def __init__(self, size: int, eps: float):
        self.weight = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x):
        return rms_norm(x, self.weight[...], self.eps)


def rms_norm(x, weight, eps: float):
    x32 = x.astype(jnp.float32)  # bfloat16 loses the mean square
    normal = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return normal.astype(x.dtype) * weight.astype(x.dtype)


class Embedding(nnx.Module):
    def __init__(self, size: int, width: int, scale: float, rngs: nnx.Rngs):
        self.embedding = nnx.Param(scale * jax.random.normal(rngs.params(), (size, width)))


class SelfAttention(nnx.Module):
    """Queries, keys and values have kernels of their own, or (decoding) a joined one."""

    def __init__(self, sizes: Sizes, lora: Lora | None, rngs: nnx.Rngs, joined: bool = False):
        D, H, scale = sizes.hidden_size, sizes.head_dim, sizes.initializer_range
        N, K = sizes.num_attention_heads, sizes.num_key_value_heads
        self.joined = joined
        if joined:
            self.qkv_proj = Linear(D, (N + 2 * K) * H, scale, True, rngs)
        else:
            self.q_proj = Linear(D, N * H, scale, True, rngs, _target(lora, "q_proj"))
            self.k_proj = Linear(D, K * H, scale, True, rngs, _target(lora, "k_proj"))
            self.v_proj = Linear(D, K * H, scale, True, rngs, _target(lora, "v_proj"))
        self.o_proj = Linear(N * H, D, scale, False, rngs, _target(lora, "o_proj"))
        self.head_dim, self.splits = H, (N * H, (N + K) * H)

    def project(self, x_BTD, rotation_BTH, constrain: Constrain):
        """Rotated queries and keys, and values, split into heads."""

        def heads(y, name: str):
            y = y.reshape(*y.shape[:2], -1, self.head_dim)
            return constrain(y, ("batch", "time", name, None))

        if self.joined:
            q, k, v = jnp.split(self.qkv_proj(x_BTD), self.splits, axis=-1)
        else:
            q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        q_BTNH = rotate(heads(q, "heads"), rotation_BTH)
        k_BTKH = rotate(heads(k, "kv_heads"), rotation_BTH)
        v_BTKH = heads(v, "kv_heads")
        return tuple(checkpoint_name(y, "qkv") for y in (q_BTNH, k_BTKH, v_BTKH))


class MLP(nnx.Module):
    def __init__(self, sizes: Sizes, lora: Lora | None, rngs: nnx.Rngs, joined: bool = False):
        D, F, scale = sizes.hidden_size, sizes.intermediate_size, sizes.initializer_range
        self.joined = joined
        if joined:
            self.gate_up_proj = Linear(D, 2 * F, scale, False, rngs)
        else:
            self.gate_proj = Linear(D, F, scale, False, rngs, _target(lora, "gate_proj"))
            self.up_proj = Linear(D, F, scale, False, rngs, _target(lora, "up_proj"))
        self.down_proj = Linear(F, D, scale, False, rngs, _target(lora, "down_proj"))

    def __call__(self, x, constrain: Constrain):
        if self.joined:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        gate, up = (checkpoint_name(y, "gate_up") for y in (gate, up))
        inner = jax.nn.silu(gate) * up
        return self.down_proj(constrain(inner, ("batch", "time", "mlp")))


def _target(lora: Lora | None, projection: str) -> Target | None:
    return None if lora is None else lora.of(projection)


class DecoderLayer(nnx.Module):
    def __init__(self, sizes: Sizes, lora: Lora | None, rngs: nnx.Rngs, joined: bool = False):
        self.input_layernorm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.self_attn = SelfAttention(sizes, lora, rngs, joined)
        self.post_attention_layernorm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.mlp = MLP(sizes, lora, rngs, joined)

    def __call__(self, x_BTD, rotation_BTH, attend: Callable, constrain: Constrain):
        """`attend(q_BTNH, k_BTKH, v_BTKH) -> context_BTNH, kept`; `kept` is handed back."""
        normal_BTD = self.input_layernorm(x_BTD)
        context_BTNH, kept = attend(*self.self_attn.project(normal_BTD, rotation_BTH, constrain))
        context_BTD = context_BTNH.reshape(*x_BTD.shape[:2], -1)
        x_BTD = x_BTD + checkpoint_name(self.self_attn.o_proj(context_BTD), "projected")
        x_BTD = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD), constrain)
        return constrain(x_BTD, ("batch", "time", "model")), kept


class Qwen2(nnx.Module):
    """The decoder; `train/head.py` and the sampler apply the vocabulary projection.

    With a `score` head the vocabulary projection is absent, as in `transformers`' classifiers.
    """

    def __init__(self, sizes: Sizes, lora: Lora | None, score: ScoreHead | None, rngs: nnx.Rngs):
        scale = sizes.initializer_range
        self.embed_tokens = Embedding(sizes.vocab_size, sizes.hidden_size, scale, rngs)
        stack = nnx.split_rngs(splits=sizes.num_hidden_layers)(
            nnx.vmap(lambda r: DecoderLayer(sizes, lora, r), in_axes=(0,), out_axes=0)
        )
        self.layers = stack(rngs)
        self.norm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        if score is not None:
            self.score = Score(sizes.hidden_size, score)
        elif not sizes.tie_word_embeddings:
            self.lm_head = Linear(sizes.hidden_size, sizes.vocab_size, scale, False, rngs)
        self.sizes = sizes

    def hidden(self, tokens_BT, positions_BT, segments_BT, compute: Compute, layers=None):
        """hidden_BTD after the last norm, of whole rows; `layers` are as in `decode`."""
        places = Places(segments_BT, positions_BT)
        x_BTD = self._embed(tokens_BT, compute)
        if layers is None:
            definition, stacked = nnx.split(self.layers)
            return self.norm(run_layers(definition, stacked, x_BTD, places, self.sizes, compute))
        attend, rotation_BTH = attend_rows(places, compute), rotation(self.sizes, positions_BT)
        for layer in layers:
            x_BTD, _ = layer(x_BTD, rotation_BTH, attend, compute.constrain)
        return self.norm(x_BTD)

    def prefill(self, tokens_BT, lengths_B, compute: Compute, layers=None):
        """hidden_BTD of rows that hold their tokens first, and the keys and values of each.

        `layers` are as in `decode`, and the cache is as theirs.
        """
        B, T = tokens_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        places = Places((positions_BT < lengths_B[:, None]).astype(jnp.int32), positions_BT)
        definition, stacked = nnx.split(self.layers)
        rotation_BTH = rotation(self.sizes, positions_BT)

        def attend(q, k, v):
            context = compute.attention(q, k, v, places, places)
            return context, Cache(k.swapaxes(1, 2), v.swapaxes(1, 2))

        def body(x_BTD, layer):
            return nnx.merge(definition, layer)(x_BTD, rotation_BTH, attend, compute.constrain)

        x_BTD = self._embed(tokens_BT, compute)
        if layers is None:
            x_BTD, kept = jax.lax.scan(body, x_BTD, stacked, unroll=compute.unroll)
            return self.norm(x_BTD), kept
        kept = []
        for layer in layers:
            x_BTD, own = layer(x_BTD, rotation_BTH, attend, compute.constrain)
            kept.append(own)
        return self.norm(x_BTD), Cache(tuple(c.k for c in kept), tuple(c.v for c in kept))

    def decode(
        self,
        tokens_B,
        lengths_B,
        cache: Cache,
        kernel: DecodeKernel,
        compute: Compute,
        layers=None,
    ):
        """hidden_BD of one more token a row, written at slot lengths_B, and the cache with it.

        `layers` are modules, one after the other; without them the stacked ones are scanned.
        """
        definition, stacked = nnx.split(self.layers)
        rotation_B1H = rotation(self.sizes, lengths_B[:, None])

        def one_layer(layer: DecoderLayer, x_B1D, cache: Cache, index=None):
            def attend(q_B1NH, k_B1KH, v_B1KH):
                written = Cache(
                    write_slot(cache.k, k_B1KH[:, 0], lengths_B, index),
                    write_slot(cache.v, v_B1KH[:, 0], lengths_B, index),
                )
                k_BKSH, v_BKSH = (x if index is None else x[index] for x in (written.k, written.v))
                context_BNH = kernel(q_B1NH[:, 0], k_BKSH, v_BKSH, lengths_B)
                return context_BNH[:, None], written

            return layer(x_B1D, rotation_B1H, attend, compute.constrain)

        # The cache is a carry, updated in place: as a scanned input it would be copied every step.
        def body(carry, layer_and_index):
            layer, index = layer_and_index
            return one_layer(nnx.merge(definition, layer), *carry, index), None

        x_B1D = self._embed(tokens_B[:, None], compute)
        if layers is None:
            indices_L = jnp.arange(self.sizes.num_hidden_layers)
            carry = (x_B1D, cache)
            (x_B1D, cache), _ = jax.lax.scan(
                body, carry, (stacked, indices_L), unroll=compute.unroll
            )
            return self.norm(x_B1D)[:, 0], cache
        written = []
        for layer, *own in zip(layers, cache.k, cache.v, strict=True):
            x_B1D, new = one_layer(layer, x_B1D, Cache(*own))
            written.append(new)
        cache = Cache(tuple(c.k for c in written), tuple(c.v for c in written))
        return self.norm(x_B1D)[:, 0], cache

    def _embed(self, tokens_BT, compute: Compute):
        x_BTD = self.embed_tokens.embedding[...][tokens_BT].astype(compute.dtype)
        return compute.constrain(x_BTD, ("batch", "time", "model"))


def attend_rows(places: Places, compute: Compute) -> Callable:
    """What a layer calls (`DecoderLayer`), of whole rows."""
    return lambda q, k, v: (compute.attention(q, k, v, places, places), None)


def run_layers(definition, stacked, x_BTD, places: Places, sizes: Sizes, compute: Compute):
    """x_BTD through stacked decoder layers (however many) of one `definition`, whole rows."""
    attend, rotation_BTH = attend_rows(places, compute), rotation(sizes, places.positions_BT)

    def body(x_BTD, layer):
        x_BTD, _ = nnx.merge(definition, layer)(x_BTD, rotation_BTH, attend, compute.constrain)
        return x_BTD, None

    loops = compute.unroll < len(jax.tree.leaves(stacked)[0])
    if compute.remat != "none":
        policy = jax.checkpoint_policies.save_only_these_names(*KEPT[compute.remat])
        # Without a loop the compiler would find what is computed again in the forward pass.
        body = jax.checkpoint(body, policy=policy, prevent_cse=not loops)
    if not loops:  # both passes read one cast of the weights; a loop would stack it
        stacked = jax.tree.map(lambda w: w.astype(compute.dtype), stacked)
    return jax.lax.scan(body, x_BTD, stacked, unroll=compute.unroll)[0]


def layer_definition(sizes: Sizes, lora: Lora | None = None, joined: bool = False):
    """The definition of one decoder layer."""
    return nnx.split(nnx.eval_shape(lambda: DecoderLayer(sizes, lora, nnx.Rngs(0), joined)))[0]


def rotation(sizes: Sizes, positions_BT):
    """Cosines and sines of the rotary embedding [B, T, 1, H/2], float32."""
    frequency, factor = rope_frequencies(sizes.head_dim, sizes.rope_theta, sizes.rope_scaling)
    angle = positions_BT[..., None].astype(jnp.float32) * frequency
    return factor * jnp.cos(angle)[:, :, None], factor * jnp.sin(angle)[:, :, None]


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
    lora: Lora | None = struct.field(pytree_node=False, default=None)

    def hidden(self, params: Params, tokens_BT, positions_BT, segments_BT) -> jax.Array:
        model, layers = self._merge(params)
        return model.hidden(tokens_BT, positions_BT, segments_BT, self.compute, layers)

    def prefill(self, params: Params, tokens_BT, lengths_B):
        model, layers = self._merge(params)
        return model.prefill(tokens_BT, lengths_B, self.compute, layers)

    def decode(self, params: Params, tokens_B, lengths_B, cache: Cache, kernel: DecodeKernel):
        model, layers = self._merge(params)
        return model.decode(tokens_B, lengths_B, cache, kernel, self.compute, layers)

    def _merge(self, params: Params):
        """The model, and beside it, of unstacked parameters, its layers as modules."""
        layers = params["layers"]
        if not isinstance(layers, tuple):
            return nnx.merge(self.definition, params), None
        shapes = abstract_params(self.sizes, self.lora)["layers"]  # stand for all in the model
        model = nnx.merge(self.definition, {**params, "layers": shapes})
        definition = layer_definition(self.sizes, self.lora, is_joined(layers[0]))
        return model, [nnx.merge(definition, layer) for layer in layers]

    @property
    def unrolls(self) -> bool:
        """Whether decoding goes through the layers one by one, each with arrays of its own.

        A stacked array's layers are copied out of it at every step.
        """
        return self.sizes.num_hidden_layers <= UNROLLED

    def vocabulary_kernel(self, params: Params) -> jax.Array:
        """W_VD, one row a token: the embedding itself when heads are tied."""
        if self.sizes.tie_word_embeddings:
            return params["embed_tokens"]["embedding"]
        return params["lm_head"]["kernel"].T

    def logits(self, params: Params, h: jax.Array) -> jax.Array:
        """float32 [..., V] of hidden states [..., D]; whoever has many of them takes chunks."""
        tied = self.sizes.tie_word_embeddings
        W = params["embed_tokens"]["embedding"] if tied else params["lm_head"]["kernel"]
        products = ((h.ndim - 1,), (1 if tied else 0,))
        return jax.lax.dot_general(
            h, W.astype(h.dtype), (products, ((), ())), preferred_element_type=jnp.float32
        )

    def empty_cache(self, rows: int, slots: int) -> Cache:
        s, dtype = self.sizes, self.compute.dtype
        shape = (rows, s.num_key_value_heads, slots, s.head_dim)
        if self.unrolls:
            layers = range(s.num_hidden_layers)
            return Cache(*(tuple(jnp.zeros(shape, dtype) for _ in layers) for _ in "kv"))
        shape = (s.num_hidden_layers, *shape)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


UNROLLED = 36  # layers: of more a program without a loop over them is too long to compile


# Of one input, and so one product: block -> (joined kernel, its parts in order).
JOINED = {
    "self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("gate_up_proj", ("gate_proj", "up_proj")),
}


def unstack(params: Params, joined: bool) -> Params:
    """The parameters with a tuple of layers, their kernels joined or as they are."""
    count = len(jax.tree.leaves(params["layers"])[0])
    layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(count)]
    return {**params, "layers": tuple(map(join, layers) if joined else layers)}


def join(layer: Params, put: Callable = lambda *parts: jnp.concatenate(parts, axis=-1)) -> Params:
    """A layer's tree with joined kernels and biases; `put` joins its leaves."""
    joined = dict(layer)
    for block, (name, parts) in JOINED.items():
        others = {key: value for key, value in layer[block].items() if key not in parts}
        joined[block] = others | {name: jax.tree.map(put, *(layer[block][key] for key in parts))}
    return joined


def is_joined(layer: Params) -> bool:
    return JOINED["self_attn"][0] in layer["self_attn"]


def make_network(
    sizes: Sizes, compute: Compute, lora: Lora | None = None, score: ScoreHead | None = None
) -> tuple[Network, Params]:
    """The network, and its parameter tree as shapes (`abstract_params`).

    With `lora` the tree holds base and adapter; the network without it computes with the base.
    """
    model = nnx.eval_shape(lambda: Qwen2(sizes, lora, score, nnx.Rngs(0)))
    definition, state = nnx.split(model)
    return Network(definition, sizes, compute, lora), nnx.to_pure_dict(state)


def abstract_params(
    sizes: Sizes, lora: Lora | None = None, score: ScoreHead | None = None
) -> Params:
    """The parameter tree as shapes (`jax.ShapeDtypeStruct`)."""
    model = nnx.eval_shape(lambda: Qwen2(sizes, lora, score, nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.split(model)[1])


def init_params(sizes: Sizes, key: jax.Array) -> Params:
    """Random weights N(0, initializer_range), biases 0, norm gains 1, float32."""
    return nnx.to_pure_dict(nnx.split(Qwen2(sizes, None, None, nnx.Rngs(params=key)))[1])
