"""What may not change what the model computes: packing, padding, the cache, remat, the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medreason_jax.data.chat import Encoded
from medreason_jax.data.packing import make_row
from medreason_jax.qwen2.model import KEPT
from tests.tiny import tiny_model

LENGTHS = (7, 12, 3, 18)
MESHES = [(8, 1, 1), (4, 2, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]
HEADS = {"num_attention_heads": 8, "hidden_size": 64}


def documents(seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(3, 320, n) for n in LENGTHS]


def batch_of(rows) -> dict:
    return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}


def packed(items, length: int = 48) -> dict:
    encoded = [Encoded(list(map(int, ids)), [True] * len(ids)) for ids in items]
    return batch_of([make_row(encoded, length, 0)])


def hidden(network, params, batch):
    return network.hidden(params, batch["tokens"], batch["positions"], batch["segments"])


def assert_close(ours, theirs, tolerance: float = 1e-5):
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


def alone(network, params, ids):
    return np.asarray(hidden(network, params, packed([ids], len(ids))))[0]


def test_a_packed_row_equals_its_documents_alone():
    _, network, params, _ = tiny_model()
    row = np.asarray(hidden(network, params, packed(documents())))[0]
    for document, end in zip(documents(), np.cumsum(LENGTHS), strict=True):
        assert_close(row[end - len(document) : end], alone(network, params, document))


def test_a_document_cannot_see_its_neighbours():
    """By the gradient: of one document's output with respect to the others' embeddings."""
    _, network, params, _ = tiny_model()
    items = documents()
    tokens = np.arange(3, 3 + sum(LENGTHS))  # every token once: an embedding row is a place
    parts = np.split(tokens, np.cumsum(LENGTHS)[:-1])
    batch, second = packed(parts), slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    loss = lambda p: jnp.sum(hidden(network, p, batch)[0, second] ** 2)  # noqa: E731
    moved = np.abs(jax.grad(loss)(params)["embed_tokens"]["embedding"]).sum(axis=1) > 0
    assert set(np.flatnonzero(moved)) == set(parts[1]), len(items)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    _, network, params, _ = tiny_model()
    for ids in documents():
        pad = 24 - len(ids)
        before, after = (pad, 0) if side == "left" else (0, pad)
        batch = {
            "tokens": np.pad(ids, (before, after)),
            "positions": np.pad(np.arange(len(ids)), (before, after)),
            "segments": np.pad(np.ones(len(ids), np.int32), (before, after)),
        }
        out = hidden(network, params, {k: jnp.asarray(v)[None] for k, v in batch.items()})[0]
        assert_close(np.asarray(out)[before : before + len(ids)], alone(network, params, ids))


def test_prefill_and_decode_with_a_cache_equal_whole_rows():
    _, network, params, _ = tiny_model()
    ids, split, pad = documents()[3], 11, 5
    width = split + pad  # left-padded prompt, then one token at a time
    cache = network.empty_cache(1, pad + len(ids))
    prompt = jnp.asarray(np.pad(ids[:split], (pad, 0)))[None]
    segments = jnp.asarray(np.pad(np.ones(split, np.int32), (pad, 0)))[None]
    positions = jnp.asarray(np.pad(np.arange(split), (pad, 0)))[None]
    out, cache = network.hidden_cached(params, prompt, positions, segments, cache, 0)
    steps = [np.asarray(out)[0, pad:]]
    for place in range(split, len(ids)):
        one = jnp.ones((1, 1), jnp.int32)
        token, at = one * int(ids[place]), width + place - split
        out, cache = network.hidden_cached(params, token, one * place, one, cache, at)
        steps.append(np.asarray(out)[0])
    assert_close(np.concatenate(steps), alone(network, params, ids))


def loss_and_gradients(options=None, mesh_shape=(1, 1, 1), **fields):
    """(hidden states, gradients) of a batch of eight packed rows."""
    _, network, params, _ = tiny_model(mesh_shape, options=options, **fields)
    params = jax.device_put(params, network.compute.constrain.tree(params))
    one = packed(documents())
    batch = jax.tree.map(lambda x: jnp.tile(x, (8, 1)), one)
    batch["tokens"] = jnp.asarray(np.random.default_rng(1).integers(3, 320, (8, 48)))

    def loss(params):
        h_BTD = hidden(network, params, batch)
        return jnp.sum(jnp.sin(h_BTD)), h_BTD

    gradients, h_BTD = jax.jit(jax.grad(loss, has_aux=True))(params)
    return np.asarray(h_BTD), jax.tree.map(np.asarray, gradients)


def assert_same_results(first, second):
    assert_close(first[0], second[0])
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), first[1], second[1])


@pytest.mark.parametrize("remat", KEPT)
def test_rematerialisation_changes_nothing(remat):
    assert_same_results(loss_and_gradients({"remat": remat}), loss_and_gradients())


def test_unrolled_layers_equal_scanned_ones():
    assert_same_results(loss_and_gradients({"unroll": 3}), loss_and_gradients())


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_a_mesh_changes_nothing(mesh_shape):
    """With tensor=8 the two key/value heads are replicated."""
    expected = loss_and_gradients(**HEADS)
    assert_same_results(loss_and_gradients(mesh_shape=mesh_shape, **HEADS), expected)


@pytest.mark.parametrize(("remat", "kept"), [("none", True), ("context", False), ("full", False)])
def test_a_preset_decides_whether_the_mlp_is_computed_twice(remat, kept):
    """By counting products in the program: with remat the forward's stand in the backward too."""

    def products(preset):
        _, network, params, _ = tiny_model(options={"remat": preset})
        batch = packed(documents())
        loss = lambda p: jnp.sum(hidden(network, p, batch))  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    assert (products(remat) == products("none")) == kept
    if remat == "context":
        assert products("context") < products("full")
