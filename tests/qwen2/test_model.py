"""What may not change what the model computes: packing, padding, the cache, remat, the mesh."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medreason_jax.data.chat import Encoded
from medreason_jax.data.packing import make_row
from medreason_jax.qwen2.decode_attention import XLA_DECODE
from medreason_jax.qwen2.model import KEPT, is_joined, unstack
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
    tokens = np.arange(3, 3 + sum(LENGTHS))  # every token once: an embedding row is a place
    parts = np.split(tokens, np.cumsum(LENGTHS)[:-1])
    batch, second = packed(parts), slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    loss = lambda p: jnp.sum(hidden(network, p, batch)[0, second] ** 2)  # noqa: E731
    moved = np.abs(jax.grad(loss)(params)["embed_tokens"]["embedding"]).sum(axis=1) > 0
    assert set(np.flatnonzero(moved)) == set(parts[1])


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


@pytest.mark.parametrize(("layers", "joined"), [(3, False), (3, True), (37, False)])
def test_prefill_and_decode_with_a_cache_equal_whole_rows(layers, joined):
    """Two rows whose prompts end at different places, token by token; 37 layers are scanned."""
    _, network, params, _ = tiny_model(num_hidden_layers=layers)
    whole = params
    params = unstack(params, joined) if network.unrolls else params
    assert not joined or is_joined(params["layers"][0])
    assert network.unrolls == (layers == 3)
    rows, splits = (documents()[3], documents()[1]), (11, 4)
    width, room = max(splits) + 2, max(map(len, rows)) + 3
    tokens = np.stack([np.pad(r[:n], (0, width - n)) for r, n in zip(rows, splits, strict=True)])
    h_BPD, prompts = network.prefill(params, jnp.asarray(tokens), jnp.asarray(splits))
    cache = jax.tree.map(
        lambda whole, prompt: whole.at[..., :width, :].set(prompt),
        network.empty_cache(2, room),
        prompts,
    )
    lengths, outs = np.array(splits), [[], []]
    for row, split in enumerate(splits):
        outs[row].extend(np.asarray(h_BPD)[row, :split])
    while any(lengths[row] < len(rows[row]) for row in (0, 1)):
        ids = [rows[row][min(lengths[row], len(rows[row]) - 1)] for row in (0, 1)]
        h_BD, cache = network.decode(
            params, jnp.asarray(ids), jnp.asarray(lengths), cache, XLA_DECODE
        )
        for row in (0, 1):
            if lengths[row] < len(rows[row]):
                outs[row].append(np.asarray(h_BD)[row])
                lengths[row] += 1
    for row in (0, 1):
        assert_close(np.stack(outs[row]), alone(network, whole, rows[row]))


def eight_rows() -> dict:
    batch = jax.tree.map(lambda x: jnp.tile(x, (8, 1)), packed(documents()))
    random = np.random.default_rng(1)
    for name in ("tokens", "targets"):
        batch[name] = jnp.asarray(random.integers(3, 320, (8, 48)))
    return batch


def results(options=None, mesh_shape=(1, 1, 1), **fields):
    """(hidden states, logits, log-probs of the targets) of eight packed rows, and the gradients
    through the log-probs."""
    _, network, params, scorer = tiny_model(mesh_shape, options=options, **fields)
    params = jax.device_put(params, network.compute.constrain.tree(params))
    batch = eight_rows()

    def loss(params):
        h_BTD = hidden(network, params, batch)
        logits_BTV = jnp.einsum("btd,vd->btv", h_BTD, network.vocabulary_kernel(params))
        logp_BT = scorer.scores(params, batch, h_BTD).logp
        return jnp.sum(jnp.sin(logp_BT)), (h_BTD, logits_BTV, logp_BT)

    gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(params)
    return jax.tree.map(np.asarray, (outputs, gradients))


@cache
def plain_results(tied: bool = True):
    """On one device."""
    return results(**HEADS, tie_word_embeddings=tied)


def assert_same_results(first, second):
    jax.tree.map(assert_close, first[0], second[0])
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), first[1], second[1])


@pytest.mark.parametrize("unroll", [1, 3])
@pytest.mark.parametrize("remat", ["none", *KEPT])
def test_rematerialisation_and_unrolled_layers_change_nothing(remat, unroll):
    assert_same_results(results({"remat": remat, "unroll": unroll}, **HEADS), plain_results())


def test_unrolled_layers_are_computed_again_too():
    """The compiler does not find what they computed before."""

    def products(preset):
        _, network, params, _ = tiny_model(options={"remat": preset, "unroll": 3}, **HEADS)
        batch = packed(documents())
        loss = lambda p: jnp.sum(hidden(network, p, batch))  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params).compile().as_text().count(" dot(")

    assert products("none") < products("full")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mesh_shape", MESHES)
def test_a_mesh_changes_nothing(mesh_shape, tied):
    """With tensor=8 the two key/value heads are replicated."""
    expected = plain_results(tied)
    ours = results(mesh_shape=mesh_shape, **HEADS, tie_word_embeddings=tied)
    assert_same_results(ours, expected)
    assert ("lm_head" in ours[1]) == (not tied)
    (_, logits_BTV, _), (_, _, logp_BT) = expected[0], ours[0]  # the scorer's, by another way
    all_BTV = jax.nn.log_softmax(logits_BTV)
    taken_BT1 = np.take_along_axis(np.asarray(all_BTV), eight_rows()["targets"][..., None], -1)
    assert_close(logp_BT, taken_BT1[..., 0])


@pytest.mark.parametrize("mesh_shape", [shape for shape in MESHES if shape != (8, 1, 1)])
def test_a_head_of_its_own_is_sharded(mesh_shape):
    _, network, params, _ = tiny_model(mesh_shape, tie_word_embeddings=False, **HEADS)
    params = jax.device_put(params, network.compute.constrain.tree(params))
    kernel = params["lm_head"]["kernel"]
    parts = mesh_shape[1] * mesh_shape[2]
    assert kernel.addressable_shards[0].data.size == kernel.size / parts


def test_a_preset_that_keeps_less_computes_more_twice():
    """By counting products in the program: with remat the forward's stand in the backward too."""

    def products(preset):
        _, network, params, _ = tiny_model(options={"remat": preset})
        batch = packed(documents())
        loss = lambda p: jnp.sum(hidden(network, p, batch))  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    once = products("none")
    assert products("products") == once + 1  # the scores, inside plain attention
    assert once + 1 < products("context+qkv") < products("context") < products("full")
