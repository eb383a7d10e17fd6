"""The loss and its gradients do not depend on accumulation, packing or the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medreason_jax.data.chat import Encoded
from medreason_jax.data.packing import make_row
from medreason_jax.mesh import put_batch
from medreason_jax.train.head import token_scores
from medreason_jax.train.objectives import Policy, language_modelling, preference
from medreason_jax.train.step import init_state, make_train_step
from tests.tiny import FIELDS, tiny_model

LENGTH = 48


def items(count: int, seed: int = 0) -> list[Encoded]:
    random = np.random.default_rng(seed)
    lengths = random.integers(4, 24, count)
    return [
        Encoded(
            random.integers(3, FIELDS["vocab_size"], n).tolist(), (random.random(n) < 0.7).tolist()
        )
        for n in lengths
    ]


def rows_of(groups) -> dict[str, np.ndarray]:
    rows = [make_row(group, LENGTH, 0) for group in groups]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def gradients(mesh_shape, batch, accumulation):
    """Loss, and minus the gradient as the parameter change under SGD with rate 1."""
    mesh, network, params, scorer = tiny_model(mesh_shape)
    sharder = network.compute.constrain
    params = jax.device_put(params, sharder.tree(params))
    before = jax.tree.map(np.asarray, params)
    optimizer = optax.sgd(1.0)
    state = init_state(params, optimizer)
    step = make_train_step(
        language_modelling(Policy(scorer, scorer, adapted=False)),
        optimizer,
        sharder,
        state,
        accumulation,
    )
    state, metrics = step(state, {}, put_batch(mesh, batch))
    change = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, before)
    return float(metrics["loss"]), change


def assert_same(first, second):
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    for a, b in zip(jax.tree.leaves(first[1]), jax.tree.leaves(second[1]), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * max(np.linalg.norm(b), 1e-6)


@pytest.mark.parametrize("mesh_shape", [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 8, 1)])
def test_a_mesh_cannot_move_the_loss(mesh_shape):
    batch = rows_of([[item] for item in items(8)])
    assert_same(gradients(mesh_shape, batch, 1), gradients((1, 1, 1), batch, 1))


def test_accumulation_cannot_move_the_loss():
    batch = rows_of([[item] for item in items(8)])
    assert_same(gradients((1, 1, 1), batch, 4), gradients((1, 1, 1), batch, 1))
    assert_same(gradients((2, 1, 1), batch, 4), gradients((1, 1, 1), batch, 1))


def test_packed_rows_equal_documents_alone():
    documents = items(8)
    alone = rows_of([[item] for item in documents])
    packed = rows_of([documents[i : i + 2] for i in range(0, 8, 2)])
    assert_same(gradients((1, 1, 1), packed, 1), gradients((1, 1, 1), alone, 1))


def test_a_loss_that_is_not_finite_keeps_the_last_good_state():
    mesh, network, params, scorer = tiny_model()
    sharder = network.compute.constrain
    params["norm"]["weight"] = params["norm"]["weight"].at[0].set(jnp.nan)
    optimizer = optax.sgd(1.0)
    state = init_state(params, optimizer)
    before = jax.tree.map(np.asarray, params)
    step = make_train_step(
        language_modelling(Policy(scorer, scorer, adapted=False)), optimizer, sharder, state, 1
    )
    state, metrics = step(state, {}, put_batch(mesh, rows_of([[i] for i in items(2)])))
    assert bool(metrics["halted"]) and bool(state.halted) and int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state.params))


@pytest.mark.parametrize("chunk", [7, 16, 1000])
def test_chunked_head_equals_full_softmax(chunk):
    _, _, _, scorer = tiny_model()
    keys = jax.random.split(jax.random.key(0), 3)
    h = jax.random.normal(keys[0], (2, 9, 32))
    W = jax.random.normal(keys[1], (50, 32))
    labels = jax.random.randint(keys[2], (2, 9), 0, 50)

    def chunked(h, W):
        scores = token_scores(h, W, labels, shards=scorer.shards, chunk=chunk, temperature=0.7)
        return jnp.sum(scores.logp + 0.3 * scores.entropy + 0.1 * scores.log_norm**2)

    def full(h, W):
        logp = jax.nn.log_softmax(h @ W.T / 0.7)
        picked = jnp.take_along_axis(logp, labels[..., None], -1)
        norm = jax.nn.logsumexp(h @ W.T / 0.7, axis=-1)
        entropy = -jnp.sum(jnp.exp(logp) * logp)
        return jnp.sum(picked) + 0.3 * entropy + 0.1 * jnp.sum(norm**2)

    np.testing.assert_allclose(chunked(h, W), full(h, W), rtol=1e-5)
    for a, b in zip(jax.grad(chunked, (0, 1))(h, W), jax.grad(full, (0, 1))(h, W), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_preference_loss_equals_a_loop_over_pairs():
    _, _, params, scorer = tiny_model()
    _, _, reference, _ = tiny_model(seed=7)
    answers = items(6, seed=3)
    row = make_row(answers, 160, 0)
    batch = {name: jnp.asarray(x[None]) for name, x in row.items()}
    batch["pairs"] = jnp.asarray([[1.0, 1.0, 1.0, 0.0]])
    objective = preference(Policy(scorer, scorer, adapted=False), beta=0.1, alpha=1.0)
    sums, _ = objective.sums(params, {"reference": reference}, batch)
    weights = objective.weights(batch)
    ours = sum(float(sums[name] / weights[name]) for name in sums)

    def answer_logp(p, item):
        row = {name: jnp.asarray(x[None]) for name, x in make_row([item], 40, 0).items()}
        return float(jnp.sum(scorer.scores(p, row).logp * row["weights"])), sum(item.is_target[1:])

    losses = []
    for chosen, rejected in zip(answers[::2], answers[1::2], strict=True):
        (w, n), (l_, _) = answer_logp(params, chosen), answer_logp(params, rejected)
        margin = w - answer_logp(reference, chosen)[0] - l_ + answer_logp(reference, rejected)[0]
        losses.append(-float(jax.nn.log_sigmoid(0.1 * margin)) - w / max(n, 1))
    assert ours == pytest.approx(np.mean(losses), rel=1e-5)
