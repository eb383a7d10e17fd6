"""Log-probs of the tokens of given texts, by the trainer's own scorer, in programs of fixed shape.

B rows, T time, D model, V vocabulary, k alternatives, t time of a chunk, C chunks.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medreason_jax.generate.engine_thread import PromptScores, PromptText
from medreason_jax.mesh import batch_shards, gather_to_host, put_batch
from medreason_jax.qwen2.model import Params
from medreason_jax.train.objectives import Scorer

SHORTEST = 64  # rows are padded to this times a power of two
TOKENS = 4096  # of one program, where a row is not longer itself
MOST_ROWS = 8
TOP_SIZES = (0, 1, 20)  # alternatives are computed in these numbers: one program for each


class PromptScorer:
    """Scores texts of up to `length` tokens; as many at once as one program takes.

    `params` may be those that a session decodes with: no second copy is held.
    """

    def __init__(self, scorer: Scorer, mesh: Mesh, params: Params, length: int, pad_id: int):
        self._scorer, self._mesh, self._params, self._pad_id = scorer, mesh, params, pad_id
        self._length = length
        self._program = jax.jit(partial(_scores, scorer), static_argnames="top")

    def fitting(self, texts: Sequence[PromptText]) -> int:
        """How many of the first texts are scored by one run of a program."""
        shape = self._shape(texts[0])
        rows, count = self._rows(shape[0]), 0
        while count < min(rows, len(texts)) and self._shape(texts[count]) == shape:
            count += 1
        return count

    def score(self, texts: Sequence[PromptText]) -> list[PromptScores]:
        """Texts that `fitting` has counted."""
        width, top = self._shape(texts[0])
        B, T = self._rows(width), width
        tokens = np.full((B, T), self._pad_id, np.int32)
        targets = np.zeros((B, T), np.int32)
        segments = np.zeros((B, T), np.int32)
        for row, text in enumerate(texts):
            n = len(text.ids)
            tokens[row, :n], segments[row, :n] = text.ids, 1
            targets[row, : n - 1] = text.ids[1:]
        positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
        batch = {
            "tokens": tokens,
            "targets": targets,
            "segments": segments,
            "positions": positions,
        }
        out = gather_to_host(self._program(self._params, put_batch(self._mesh, batch), top=top))
        return [_prompt_scores(out, row, text) for row, text in enumerate(texts)]

    def _shape(self, text: PromptText) -> tuple[int, int]:
        """(padded length, alternatives) of the program that a text needs."""
        assert 0 < len(text.ids) <= self._length
        width = SHORTEST
        while width < len(text.ids):
            width *= 2
        return width, next(size for size in TOP_SIZES if size >= text.top)

    def _rows(self, width: int) -> int:
        shards = batch_shards(self._mesh)
        return -(-max(1, min(MOST_ROWS, TOKENS // width)) // shards) * shards


def _scores(scorer: Scorer, params: Params, batch, top: int):
    """logp [B, T] of the targets; ids and log-probs [B, T, k] of the likeliest tokens."""
    h_BTD = scorer.hidden(params, batch)
    scores = scorer.scores(params, batch, h_BTD)
    out = {"logp": scores.logp}
    if top == 0:
        return out
    B, T, D = h_BTD.shape
    k, t = min(top, scorer.network.sizes.vocab_size), min(SHORTEST, T)  # T is a multiple of it

    def likeliest(h_BtD):
        return jax.lax.top_k(scorer.network.logits(params, h_BtD), k)

    h_CBtD = jnp.moveaxis(h_BTD.reshape(B, T // t, t, D), 1, 0)
    z_CBtk, ids_CBtk = jax.lax.map(likeliest, h_CBtD)
    z_BTk, ids_BTk = (jnp.moveaxis(x, 0, 1).reshape(B, T, k) for x in (z_CBtk, ids_CBtk))
    return out | {"top": z_BTk - scores.log_norm[..., None], "ids": ids_BTk}


def _prompt_scores(out, row: int, text: PromptText) -> PromptScores:
    count = len(text.ids) - 1
    logprobs = out["logp"][row, :count].tolist()
    if text.top == 0:
        return PromptScores(logprobs, [[] for _ in logprobs])
    ids = out["ids"][row, :count, : text.top].tolist()
    top = out["top"][row, :count, : text.top].tolist()
    return PromptScores(
        logprobs, [list(zip(*pair, strict=True)) for pair in zip(ids, top, strict=True)]
    )
