"""The chunked vocabulary projection against a full softmax, value and gradients.

B batch, T time, D model, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medreason_jax.mesh import TokenShards, path_name
from medreason_jax.train.head import TokenScores, token_loss, token_scores
from medreason_jax.train.objectives import Policy, language_modelling
from tests.tiny import some_mesh, tiny_model

OUTPUTS = ("logp", "entropy", "log_norm")  # `correct` has no gradient
TEMPERATURE = 0.7


def full_scores(h_BTD, W_VD, labels_BT, temperature: float = 1.0) -> TokenScores:
    """The same with all logits at once."""
    z_BTV = h_BTD @ W_VD.T / temperature
    logp_BTV = jax.nn.log_softmax(z_BTV)
    return TokenScores(
        jnp.take_along_axis(logp_BTV, labels_BT[..., None], -1)[..., 0],
        -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1),
        jax.nn.logsumexp(z_BTV, axis=-1),
        (jnp.argmax(z_BTV, axis=-1) == labels_BT).astype(jnp.float32),
    )


def drawn_inputs():
    """h, W and labels, a third of which have the largest logit."""
    keys = jax.random.split(jax.random.key(0), 4)
    h_BTD = jax.random.normal(keys[0], (4, 9, 32))
    W_VD = jax.random.normal(keys[1], (48, 32))
    others_BT = jax.random.randint(keys[2], (4, 9), 0, 48)
    likely_BT = jnp.argmax(h_BTD @ W_VD.T, axis=-1)
    return h_BTD, W_VD, jnp.where(jax.random.uniform(keys[3], (4, 9)) < 0.3, likely_BT, others_BT)


def assert_near(ours, theirs, tolerance: float = 1e-5):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("mesh_shape", "chunk"),
    [
        *(((1, 1, 1), chunk) for chunk in (7, 16, 1000)),
        *((shape, 7) for shape in ((1, 2, 1), (1, 1, 2), (1, 1, 8), (1, 2, 4), (2, 2, 2))),
    ],
)
def test_chunked_head_equals_full_softmax(mesh_shape, chunk):
    h_BTD, W_VD, labels_BT = drawn_inputs()
    shards = TokenShards(some_mesh(mesh_shape))

    def chunked(h_BTD, W_VD):
        options = {"shards": shards, "chunk": chunk, "temperature": TEMPERATURE}
        return token_scores(h_BTD, W_VD, labels_BT, **options)

    ours, pull_ours = jax.vjp(jax.jit(chunked), h_BTD, W_VD)
    theirs, pull_theirs = jax.vjp(
        lambda h, W: full_scores(h, W, labels_BT, TEMPERATURE), h_BTD, W_VD
    )
    np.testing.assert_array_equal(ours.correct, theirs.correct)
    assert 0 < np.mean(ours.correct) < 1
    zeros = jax.tree.map(jnp.zeros_like, theirs)
    for number, name in enumerate(OUTPUTS):
        assert_near(getattr(ours, name), getattr(theirs, name))
        g_BT = jax.random.normal(jax.random.key(number), (4, 9))
        cotangents = zeros.replace(**{name: g_BT})
        for a, b in zip(pull_ours(cotangents), pull_theirs(cotangents), strict=True):
            assert_near(a, b)


@pytest.mark.parametrize(
    ("mesh_shape", "chunk"),
    [*(((1, 1, 1), chunk) for chunk in (7, 1000)), ((1, 2, 4), 7), ((2, 2, 2), 7)],
)
def test_a_loss_by_token_has_the_gradient_of_a_full_softmax(mesh_shape, chunk):
    """The gradient that the forward pass took, of everything that a loss can be made of."""
    h_BTD, W_VD, labels_BT = drawn_inputs()
    keys = jax.random.split(jax.random.key(5), 2)
    fields = {name: jax.random.normal(key, (4, 9)) for name, key in zip("ab", keys, strict=True)}
    options = {"shards": TokenShards(some_mesh(mesh_shape)), "chunk": chunk}
    options["temperature"] = TEMPERATURE

    def loss_of(scores: TokenScores, fields):
        likelihood = jnp.exp(scores.logp - 0.1 * fields["b"]) + 0.2 * scores.entropy
        return fields["a"] * (likelihood + 0.3 * scores.log_norm**2)

    def ours(h_BTD, W_VD):
        loss, scores = token_loss(h_BTD, W_VD, labels_BT, loss_of, fields, **options)
        return 3 * loss, scores

    def theirs(h_BTD, W_VD):
        scores = full_scores(h_BTD, W_VD, labels_BT, TEMPERATURE)
        return 3 * jnp.sum(loss_of(scores, fields)), scores

    (ours_out, gradients), (theirs_out, wanted) = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(h_BTD, W_VD)
        for f in (ours, theirs)
    )
    for a, b in zip(
        jax.tree.leaves((ours_out, gradients)), jax.tree.leaves((theirs_out, wanted)), strict=True
    ):
        assert_near(a, b)
    assert_near(jax.jit(ours)(h_BTD, W_VD)[0], theirs_out[0])  # without a gradient


def drawn_batch(rows: int = 2, length: int = 30) -> dict[str, jax.Array]:
    random = np.random.default_rng(3)
    batch = {
        "tokens": random.integers(3, 320, (rows, length)),
        "targets": random.integers(3, 320, (rows, length)),
        "positions": np.tile(np.arange(length), (rows, 1)),
        "segments": np.ones((rows, length), np.int32),
        "weights": (random.random((rows, length)) < 0.7).astype(np.float32),
    }
    return jax.tree.map(jnp.asarray, batch)


def assert_same_value_and_gradients(ours, theirs, params):
    (value, gradients), (full_value, full_gradients) = (
        jax.jit(jax.value_and_grad(loss))(params) for loss in (ours, theirs)
    )
    assert float(value) == pytest.approx(float(full_value), rel=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradients),
        jax.tree.leaves(full_gradients),
        strict=True,
    ):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), path_name(path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mesh_shape", [(1, 2, 2), (1, 1, 8)])
def test_tied_and_untied_models_have_the_gradients_of_a_full_softmax(mesh_shape, tied):
    _, network, params, scorer = tiny_model(
        mesh_shape, tie_word_embeddings=tied, num_attention_heads=8
    )
    params = jax.device_put(params, network.compute.constrain.tree(params))
    batch = drawn_batch()

    def chunked(params):
        scores = scorer.scores(params, batch)
        return jnp.sum((scores.logp + 0.3 * scores.entropy) * batch["weights"])

    def full(params):
        matrix = params["embed_tokens"]["embedding"] if tied else params["lm_head"]["kernel"].T
        scores = full_scores(scorer.hidden(params, batch), matrix, batch["targets"])
        return jnp.sum((scores.logp + 0.3 * scores.entropy) * batch["weights"])

    assert_same_value_and_gradients(chunked, full, params)


def test_z_loss_is_the_mean_square_of_log_z_over_the_targets():
    _, _, params, scorer = tiny_model()
    batch = drawn_batch()
    objective = language_modelling(Policy(scorer, scorer, adapted=False), z_loss=0.02)

    def ours(params):
        return objective.losses(params, {}, batch, objective.scales(batch))[0]

    def plain(params):
        z_BTV = scorer.hidden(params, batch) @ params["embed_tokens"]["embedding"].T
        log_norm_BT = jnp.log(jnp.sum(jnp.exp(z_BTV), axis=-1))
        label_BT = jnp.take_along_axis(z_BTV, batch["targets"][..., None], -1)[..., 0]
        loss_BT = log_norm_BT - label_BT + 0.02 * log_norm_BT**2
        return jnp.sum(loss_BT * batch["weights"]) / jnp.sum(batch["weights"])

    assert_same_value_and_gradients(ours, plain, params)
