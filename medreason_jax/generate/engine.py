"""Sampling with the trainer's own model and parameters: batches of slots over a KV cache.

B slots, P prompt length, S cache slots (prompt + new tokens), D model, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medreason_jax.generate.sampling import Sampling, next_token
from medreason_jax.mesh import batch_shards, gather_to_host, put_batch
from medreason_jax.qwen2.model import Network, Params

BUCKET = 16  # prompts are padded to a multiple of this, so that few programs are compiled


@dataclass(frozen=True)
class Completion:
    """Sampled ids (the end of turn included when it came) with the log-prob of each."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop" or "length"


class Engine:
    """Generates for many prompts; a request's tokens depend on its prompt, seed and parameters."""

    def __init__(self, network: Network, mesh: Mesh, *, slots: int, end_id: int, pad_id: int):
        shards = batch_shards(mesh)
        self.slots = -(-slots // shards) * shards
        self.network, self.mesh, self.end_id, self.pad_id = network, mesh, end_id, pad_id
        self._program = jax.jit(self._generate, static_argnames="sampling")

    def generate(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        progress: Callable[[int], Any] = lambda done: None,
    ) -> list[Completion]:
        """Completions in the order of `prompts`; request r draws from (seed, r)."""
        order = sorted(range(len(prompts)), key=lambda r: (len(prompts[r]), r))
        done: dict[int, Completion] = {}
        for start in range(0, len(order), self.slots):
            requests = order[start : start + self.slots]
            done |= self._one_batch(params, prompts, requests, sampling, seed)
            progress(len(requests))
        return [done[r] for r in range(len(prompts))]

    def _one_batch(self, params, prompts, requests, sampling, seed) -> dict[int, Completion]:
        longest = max(len(prompts[r]) for r in requests)
        width = -(-longest // BUCKET) * BUCKET
        tokens = np.full((self.slots, width), self.pad_id, np.int32)
        segments = np.zeros((self.slots, width), np.int32)
        for slot, r in enumerate(requests):  # left-padded: all rows write at one cache slot
            tokens[slot, width - len(prompts[r]) :] = prompts[r]
            segments[slot, width - len(prompts[r]) :] = 1
        numbers = np.zeros(self.slots, np.int32)
        numbers[: len(requests)] = requests
        batch = put_batch(self.mesh, {"tokens": tokens, "segments": segments, "numbers": numbers})
        out = gather_to_host(self._program(params, batch, jnp.int32(seed), sampling=sampling))
        return {r: self._completion(out, slot) for slot, r in enumerate(requests)}

    def _completion(self, out, slot: int) -> Completion:
        length = int(out["length"][slot])
        ids = [int(i) for i in out["tokens"][slot, :length]]
        stopped = bool(ids) and ids[-1] == self.end_id
        return Completion(
            ids, [float(x) for x in out["logp"][slot, :length]], "stop" if stopped else "length"
        )

    def _generate(self, params: Params, batch, seed, sampling: Sampling):
        """tokens, logp [B, new] and length [B]; stops when every row has ended its turn."""
        tokens_BP, segments_BP = batch["tokens"], batch["segments"]
        B, P = tokens_BP.shape
        new = sampling.max_new_tokens
        W_VD = self.network.vocabulary_kernel(params).astype(self.network.compute.dtype)
        positions_BP = jnp.maximum(jnp.cumsum(segments_BP, axis=1) - 1, 0)
        lengths_B = jnp.sum(segments_BP, axis=1)
        row_keys_B = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(
            batch["numbers"]
        )
        cache = self.network.empty_cache(B, P + new)
        h_BPD, cache = self.network.hidden_cached(
            params, tokens_BP, positions_BP, segments_BP, cache, 0
        )

        def sample(h_BD, step):
            logits_BV = jax.lax.dot_general(
                h_BD, W_VD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            keys_B = jax.vmap(lambda k: jax.random.fold_in(k, step))(row_keys_B)
            return next_token(logits_BV, keys_B, sampling)

        def body(carry):
            step, h_BD, cache, tokens, logp, alive_B = carry
            token_B, logp_B = sample(h_BD, step)
            token_B = jnp.where(alive_B, token_B, self.pad_id)
            tokens = jax.lax.dynamic_update_slice(tokens, token_B[:, None], (0, step))
            logp = jax.lax.dynamic_update_slice(
                logp, jnp.where(alive_B, logp_B, 0.0)[:, None], (0, step)
            )
            h_B1D, cache = self.network.hidden_cached(
                params,
                token_B[:, None],
                (lengths_B + step)[:, None],
                jnp.ones((B, 1), jnp.int32),
                cache,
                P + step,
            )
            return step + 1, h_B1D[:, 0], cache, tokens, logp, alive_B & (token_B != self.end_id)

        start = (
            jnp.int32(0),
            h_BPD[:, -1],
            cache,
            jnp.full((B, new), self.pad_id, jnp.int32),
            jnp.zeros((B, new), jnp.float32),
            lengths_B > 0,
        )
        last = jax.lax.while_loop(lambda c: (c[0] < new) & jnp.any(c[-1]), body, start)
        steps, tokens, logp = last[0], last[3], last[4]
        ended_BT = tokens == self.end_id
        first_end_B = jnp.where(jnp.any(ended_BT, 1), jnp.argmax(ended_BT, 1) + 1, steps)
        return {"tokens": tokens, "logp": logp, "length": jnp.where(lengths_B > 0, first_end_B, 0)}
