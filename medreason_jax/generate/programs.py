"""What runs on the devices when tokens are generated: programs of fixed shapes over slots.

B slots, R prefill rows, P prompt size, S cache slots, C steps of a round, M stop ids, V vocabulary.
"""

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from medreason_jax.generate.requests import MOST_STOPS, MOST_TOP
from medreason_jax.generate.sampling import Draws, next_token
from medreason_jax.mesh import HeadShards, Sharder, put_batch, replicated, tensor_parts
from medreason_jax.qwen2.decode_attention import choose_decode_kernel
from medreason_jax.qwen2.model import Cache, Network, Params, join, unstack

log = logging.getLogger(__name__)


@struct.dataclass
class Slots:
    """What the device holds of B requests."""

    cache: Cache
    first_BD: jax.Array  # the prompt's last hidden state, for requests with the same prompt
    h_BD: jax.Array  # the last token's hidden state: the next token's logits come from it
    lengths_B: jax.Array  # tokens in the cache
    left_B: jax.Array  # tokens that may still be drawn; 0: the slot is free
    stops_BM: jax.Array  # -1 where there is none
    draws: Draws

    @property
    def count(self) -> int:
        """B"""
        return self.lengths_B.shape[0]

    @property
    def length(self) -> int:
        """S: the tokens that a slot has room for."""
        return jax.tree.leaves(self.cache)[0].shape[-2]


class Programs:
    """The compiled programs of one network and mesh."""

    def __init__(self, network: Network, mesh: Mesh, pad_id: int):
        self.network, self.mesh, self.pad_id = network, mesh, pad_id
        self.sharder: Sharder = network.compute.constrain  # type: ignore[assignment]
        sizes = network.sizes
        self.attention = choose_decode_kernel(
            mesh.devices.flat[0].platform,
            sizes.num_attention_heads,
            sizes.num_key_value_heads,
            sizes.head_dim,
            network.compute.dtype,
            HeadShards(mesh),
        )
        self._compiled: dict[tuple, Any] = {}

    def __len__(self) -> int:
        return len(self._compiled)

    def load(self, params: Params) -> Params:
        """The parameters in the type and layout of decoding, on the device."""
        dtype = self.network.compute.dtype
        # A tensor axis splits each kernel by heads; an adapter has parts of its own.
        joined = tensor_parts(self.mesh) == 1 and self.network.lora is None

        def cast(params: Params) -> Params:
            params = jax.tree.map(lambda x: x.astype(dtype), params)
            return unstack(params, joined) if self.network.unrolls else params

        def make():
            places = self.sharder.decode_tree(params)
            if self.network.unrolls:
                one = self.sharder.unstacked(places["layers"])
                one = join(one, lambda first, *rest: first) if joined else one
                places = {**places, "layers": (one,) * self.network.sizes.num_hidden_layers}
            return jax.jit(cast, out_shardings=places)

        return self.program(("load",), make)(params)

    def program(self, key: tuple, make: Callable[[], Any]) -> Any:
        """The compiled program of a key; made, and told, where it is the first time."""
        if key not in self._compiled:
            log.info("compiles %s", key)
            self._compiled[key] = make()
        return self._compiled[key]

    def empty(self, slots: int, length: int) -> Slots:
        """No request in any slot."""

        def make() -> Slots:
            width, dtype = self.network.sizes.hidden_size, self.network.compute.dtype
            zeros, floats = jnp.zeros(slots, jnp.int32), jnp.zeros(slots, jnp.float32)
            return Slots(
                cache=self.network.empty_cache(slots, length),
                first_BD=jnp.zeros((slots, width), dtype),
                h_BD=jnp.zeros((slots, width), dtype),
                lengths_B=zeros,
                left_B=zeros,
                stops_BM=jnp.full((slots, MOST_STOPS + 1), -1, jnp.int32),
                draws=Draws(floats, zeros, jnp.ones_like(floats), zeros, zeros, zeros),
            )

        return self.program(("empty", slots, length), lambda: self._jit(make))()

    def _jit(self, function: Callable, donate: tuple[int, ...] = (), beside: bool = False):
        """Compiled with the state on its places, so that every program takes any other's state.

        `beside` is for functions that return more than the state.
        """
        rows = self.sharder.place(("batch",))
        stack = () if self.network.unrolls else (None,)
        cache = self.sharder.place((*stack, "batch", "kv_heads", None, None))
        names = (field for field in Slots.__dataclass_fields__ if field != "cache")
        state = Slots(cache=cache, **dict.fromkeys(names, rows))
        out = (state, replicated(self.mesh)) if beside else state
        return jax.jit(function, donate_argnums=donate, out_shardings=out)

    def admit(self, params: Params, state: Slots, batch: dict[str, np.ndarray]) -> Slots:
        """New requests in the slots with row_B >= 0: row row_B of the prefilled tokens_RP."""
        key = ("admit", state.count, state.length, batch["tokens_RP"].shape)
        program = self.program(key, lambda: self._jit(self._admit, donate=(1,)))
        return program(params, state, put_batch(self.mesh, batch))

    def _admit(self, params: Params, state: Slots, batch) -> Slots:
        h_RPD, prompts = self.network.prefill(params, batch["tokens_RP"], batch["lengths_R"])
        last_R = jnp.maximum(batch["lengths_R"] - 1, 0)
        last_RD = jnp.take_along_axis(h_RPD, last_R[:, None, None], axis=1)[:, 0]
        return self._fill(state, prompts, last_RD, batch)

    def copy(self, state: Slots, batch: dict[str, np.ndarray]) -> Slots:
        """As `admit`, row_B being slots whose prompts, of at most P tokens, are the same."""
        P = batch.pop("prompt_size").item()
        key = ("copy", state.count, state.length, P)

        def run(state: Slots, batch) -> Slots:
            prompts = jax.tree.map(lambda x: x[..., :P, :], state.cache)
            return self._fill(state, prompts, state.first_BD, batch)

        return self.program(key, lambda: self._jit(run, donate=(0,)))(
            state, put_batch(self.mesh, batch)
        )

    def _fill(self, state: Slots, prompts: Cache, last_RD, batch) -> Slots:
        row_B = batch["row_B"]
        taken_B, row_B = row_B >= 0, jnp.maximum(row_B, 0)

        def put(cache, prompts_RKPH):
            new = jnp.take(prompts_RKPH, row_B, axis=cache.ndim - 4).astype(cache.dtype)
            old = cache[..., : new.shape[-2], :]
            kept = jnp.where(taken_B[:, None, None, None], new, old)
            return _put_first(cache, kept)

        def choose(new, old):
            return jnp.where(taken_B.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        last_BD = choose(last_RD[row_B], state.first_BD)
        given = {name: batch[name] for name in ("lengths_B", "left_B", "stops_BM")}
        draws = Draws(
            **{name: batch[name] for name in _DRAWN}, drawn_B=jnp.zeros_like(state.lengths_B)
        )
        return Slots(
            cache=jax.tree.map(put, state.cache, prompts),
            first_BD=last_BD,
            h_BD=choose(last_BD, state.h_BD),
            **{name: choose(given[name], getattr(state, name)) for name in given},
            draws=jax.tree.map(choose, draws, state.draws),
        )

    def resize(self, state: Slots, rows_b: np.ndarray) -> Slots:
        """The state of other slots: slot i is the one that was rows_b[i]; -1 makes a free one."""
        key = ("resize", state.count, state.length, len(rows_b))

        def run(state: Slots, rows_b) -> Slots:
            at = jnp.maximum(rows_b, 0)
            cache = jax.tree.map(lambda x: jnp.take(x, at, axis=x.ndim - 4), state.cache)
            rows = jax.tree.map(lambda x: x[at], state.replace(cache=None))
            return rows.replace(cache=cache, left_B=jnp.where(rows_b >= 0, rows.left_B, 0))

        return self.program(key, lambda: self._jit(run))(state, jnp.asarray(rows_b, jnp.int32))

    def decode(
        self, params: Params, state: Slots, held_B: np.ndarray, seen: int, steps: int, top: bool
    ):
        """`steps` tokens in every slot that is held; returns the state and what was drawn.

        After them no row is longer than `seen`: the cache is cut to that, once, for the steps of a
        kernel that reads all it is given.
        """
        seen = state.length if self.attention.by_length else seen
        key = ("decode", state.count, state.length, seen, steps, top)

        def run(params: Params, state: Slots, held_B):
            cache = state.cache
            state = state.replace(
                left_B=jnp.where(held_B, state.left_B, 0),  # cancelled ones end
                cache=jax.tree.map(lambda x: x[..., :seen, :], cache),
            )
            state, out = self._decode(params, state, steps, top)
            return state.replace(cache=jax.tree.map(_put_first, cache, state.cache)), out

        program = self.program(key, lambda: self._jit(run, donate=(1,), beside=True))
        return program(params, state, put_batch(self.mesh, {"held_B": held_B})["held_B"])

    def _decode(self, params: Params, state: Slots, steps: int, top: bool):
        B = state.count
        out = {
            "tokens_CB": jnp.zeros((steps, B), jnp.int32),
            "logp_CB": jnp.zeros((steps, B), jnp.float32),
        }
        if top:
            out["top_ids_CBK"] = jnp.zeros((steps, B, MOST_TOP), jnp.int32)
            out["top_logp_CBK"] = jnp.zeros((steps, B, MOST_TOP), jnp.float32)

        def step(carry):
            c, state, out = carry
            alive_B = state.left_B > 0
            logits_BV = self.network.logits(params, state.h_BD)
            token_B, logp_B, logp_BV = next_token(logits_BV, state.draws)
            drawn = {"tokens_CB": jnp.where(alive_B, token_B, -1), "logp_CB": logp_B}
            if top:
                drawn["top_logp_CBK"], drawn["top_ids_CBK"] = jax.lax.top_k(logp_BV, MOST_TOP)
            out = {name: out[name].at[c].set(value) for name, value in drawn.items()}
            token_B = jnp.where(alive_B, token_B, self.pad_id)
            h_BD, cache = self.network.decode(
                params, token_B, state.lengths_B, state.cache, self.attention
            )
            stopped_B = jnp.any(token_B[:, None] == state.stops_BM, axis=1)
            new = Slots(
                cache=cache,
                first_BD=state.first_BD,
                h_BD=jnp.where(alive_B[:, None], h_BD, state.h_BD),
                lengths_B=state.lengths_B + alive_B,
                left_B=jnp.where(stopped_B, 0, jnp.maximum(state.left_B - 1, 0)),
                stops_BM=state.stops_BM,
                draws=state.draws.replace(drawn_B=state.draws.drawn_B + alive_B),
            )
            return c + 1, new, out

        def goes_on(carry):
            c, state, _ = carry
            return (c < steps) & jnp.any(state.left_B > 0)

        steps_done, state, out = jax.lax.while_loop(goes_on, step, (jnp.int32(0), state, out))
        return state, {**out, "steps": steps_done}


_DRAWN = ("temperature_B", "top_k_B", "top_p_B", "seed_B", "number_B")


def _put_first(cache, slots):
    """The cache with these in place of its first slots."""
    return jax.lax.dynamic_update_slice(cache, slots, (0,) * cache.ndim)
