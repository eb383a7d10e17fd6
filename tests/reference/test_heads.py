"""Classifier and value heads against their `transformers` classes."""

import jax.numpy as jnp
import numpy as np
import pytest

from medreason_jax.qwen2.heads import ScoreHead, last_of_segments, score

torch = pytest.importorskip("torch", reason="the export extra (torch, transformers) is missing")

from tests.reference.models import (  # noqa: E402
    our_network,
    our_params,
    relative_error,
    rough_reference,
)

PAD = 0


def padded(side: str):
    """(tokens, real) of rows of different lengths, padded on one side."""
    random = np.random.default_rng(0)
    lengths, width = [5, 12, 9], 12
    tokens, real = np.full((3, width), PAD), np.zeros((3, width), np.int32)
    for row, n in enumerate(lengths):
        where = slice(0, n) if side == "right" else slice(width - n, width)
        tokens[row, where], real[row, where] = random.integers(3, 320, n), 1
    return tokens, real


def our_scores(reference, head: ScoreHead, tokens, real):
    network, _ = our_network(reference, score=head)
    params = our_params(reference)
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    h_BTD = network.hidden(params, jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(real))
    return score(params, h_BTD)


@pytest.mark.parametrize("side", ["left", "right"])
def test_classifier_logits_equal_transformers(side):
    names = {0: "wrong", 1: "right", 2: "unscored"}
    fields = {"id2label": names, "pad_token_id": PAD}
    reference = rough_reference(fields, architecture="Qwen2ForSequenceClassification")
    tokens, real = padded(side)
    ours = last_of_segments(
        our_scores(reference, ScoreHead(3, bias=False), tokens, real), jnp.asarray(real), 1
    )[:, 0]
    with torch.inference_mode():
        theirs = reference(torch.tensor(tokens), attention_mask=torch.tensor(real)).logits.numpy()
    assert relative_error(ours, theirs) <= 1e-5


def test_values_of_every_token_equal_transformers():
    reference = rough_reference({"num_labels": 1}, architecture="Qwen2ForTokenClassification")
    tokens, real = padded("right")
    ours = our_scores(reference, ScoreHead(1, bias=True), tokens, real)
    with torch.inference_mode():
        theirs = reference(torch.tensor(tokens), attention_mask=torch.tensor(real)).logits.numpy()
    assert relative_error(ours[real > 0], theirs[real > 0]) <= 1e-5


def test_the_last_token_of_every_packed_segment_is_found():
    x_BTC = jnp.arange(8.0).reshape(1, 8, 1)
    segments_BT = jnp.asarray([[1, 1, 2, 3, 3, 3, 0, 0]])
    assert last_of_segments(x_BTC, segments_BT, 4)[0, :, 0].tolist() == [1.0, 2.0, 5.0, 0.0]
