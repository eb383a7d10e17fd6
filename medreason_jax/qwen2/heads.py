"""Linear heads on hidden states: the value of a state, the classes of a text.

B batch, T time, S segments of a row, D model, C outputs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct


@struct.dataclass
class ScoreHead:
    """A linear head in place of the vocabulary projection, as one of `transformers`' classes has it

    Qwen2ForSequenceClassification has no bias; Qwen2ForTokenClassification, which scores every
    token, has one: with one output it is a value model.
    """

    outputs: int = struct.field(pytree_node=False)
    bias: bool = struct.field(pytree_node=False)


class Score(nnx.Module):
    """A zero head, so that a fresh critic starts from the value 0."""

    def __init__(self, hidden_size: int, head: ScoreHead):
        self.kernel = nnx.Param(jnp.zeros((hidden_size, head.outputs)))
        if head.bias:
            self.bias = nnx.Param(jnp.zeros(head.outputs))


def init_score(hidden_size: int, head: ScoreHead) -> dict[str, Any]:
    """Parameters of a fresh head beside a model that has none of its own."""
    return {"score": nnx.to_pure_dict(nnx.split(Score(hidden_size, head))[1])}


def score(params: dict[str, Any], h_BTD: jax.Array) -> jax.Array:
    """Scores [B, T, C] of every token, float32."""
    head = params["score"]
    scores_BTC = h_BTD.astype(jnp.float32) @ head["kernel"]
    return scores_BTC + head["bias"] if "bias" in head else scores_BTC


def last_of_segments(x_BTC: jax.Array, segments_BT: jax.Array, count: int) -> jax.Array:
    """x at the last token of segments 1..count of every row: [B, S, C]; 0 where there is none.

    With one text a row this is the token that Qwen2ForSequenceClassification looks at, the last
    one that is not padding, on whichever side the padding stands.
    """
    T = segments_BT.shape[1]
    numbers_S = jnp.arange(1, count + 1)
    inside_BST = segments_BT[:, None, :] == numbers_S[None, :, None]
    last_BS = jnp.max(jnp.where(inside_BST, jnp.arange(T), -1), axis=-1)
    picked_BSC = jnp.take_along_axis(x_BTC, jnp.maximum(last_BS, 0)[..., None], axis=1)
    return jnp.where(last_BS[..., None] >= 0, picked_BSC, 0.0)
