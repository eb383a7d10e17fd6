"""The loss and its gradients do not depend on accumulation, packing or the mesh.

What is compared are the gradients that the optimizer is given.
"""

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medreason_jax.data.chat import Encoded
from medreason_jax.data.packing import make_row
from medreason_jax.mesh import path_name, put_batch, training_options
from medreason_jax.qwen2.lora import Lora, Target, with_adapter
from medreason_jax.train.objectives import Policy, language_modelling, preference
from medreason_jax.train.program import make_policy, split_params
from medreason_jax.train.step import init_state, make_train_step
from tests.tiny import FIELDS, tiny_model

LENGTH = 48
LORA = Lora((Target("q_proj", 4, 8.0), Target("v_proj", 2, 8.0), Target("down_proj", 4, 4.0)))
ONE = (1, 1, 1)
KINDS = ("tied", "untied", "lora")


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


def keep_gradients() -> optax.GradientTransformation:
    """Changes nothing; its state is the gradients of the last step."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, _, params=None: (jax.tree.map(jnp.zeros_like, gradients), gradients),
    )


def rough_adapter(adapter):
    """With a B that is not zero, or A would have no gradient."""
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    rough = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, rough)


@dataclass(frozen=True)
class Stage:
    """A tiny model's policy on a mesh, and what is trained and frozen of it."""

    mesh: Any
    policy: Policy
    sharder: Any
    trainable: Any
    frozen: Any


def stage(mesh_shape, kind: str, dtype=jnp.float32) -> Stage:
    mesh, network, params, scorer = tiny_model(mesh_shape, tie_word_embeddings=kind == "tied")
    network = network.replace(compute=network.compute.replace(dtype=dtype))
    lora = LORA if kind == "lora" else None
    sharder = network.compute.constrain
    trainable, frozen = split_params(params, network, lora, False, jax.random.key(0))
    place = lambda tree: jax.device_put(tree, sharder.tree(tree))  # noqa: E731
    policy = make_policy(network, sharder, lora, scorer.chunk)
    return Stage(mesh, policy, sharder, place(trainable), place(frozen))


DOCUMENTS = items(8)
BATCHES = {
    "alone": rows_of([[item] for item in DOCUMENTS]),
    "packed": rows_of([*(DOCUMENTS[i : i + 2] for i in range(0, 8, 2)), *[[]] * 4]),
}


@cache
def compiled(mesh_shape, kind: str, accumulation: int):
    """A tiny stage and its step."""
    given, optimizer = stage(mesh_shape, kind), keep_gradients()
    state = init_state(given.trainable, optimizer)
    objective = language_modelling(given.policy)
    return given, make_train_step(objective, optimizer, given.sharder, state, accumulation)


@cache
def gradients(mesh_shape, kind: str, batch: str = "alone", accumulation: int = 1):
    """(loss, {parameter: gradient}) of one step."""
    given, step = compiled(mesh_shape, kind, accumulation)
    trainable = rough_adapter(given.trainable) if kind == "lora" else given.trainable
    trainable = jax.device_put(trainable, given.sharder.tree(trainable))
    state = init_state(jax.tree.map(jnp.copy, trainable), keep_gradients())
    state, metrics = step(state, given.frozen, put_batch(given.mesh, BATCHES[batch]))
    found = jax.tree_util.tree_leaves_with_path(state.optimizer)
    return float(metrics["loss"]), {path_name(path): np.asarray(x) for path, x in found}


def assert_same(first, second):
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    assert first[1].keys() == second[1].keys()
    for name, a in first[1].items():
        b = second[1][name]
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), name


@pytest.mark.parametrize(
    ("mesh_shape", "kind"),
    [
        *((shape, "tied") for shape in ((8, 1, 1), (4, 2, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4))),
        *(((2, 2, 2), kind) for kind in ("untied", "lora")),
    ],
)
def test_a_mesh_cannot_move_the_loss(mesh_shape, kind):
    assert_same(gradients(mesh_shape, kind), gradients(ONE, kind))


@pytest.mark.parametrize(
    ("mesh_shape", "kind"), [*((ONE, kind) for kind in KINDS), ((2, 1, 1), "tied")]
)
def test_accumulation_cannot_move_the_loss(mesh_shape, kind):
    assert_same(gradients(mesh_shape, kind, accumulation=4), gradients(ONE, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_equal_documents_alone(kind):
    assert_same(gradients(ONE, kind, "packed"), gradients(ONE, kind))


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


def test_a_frozen_base_has_no_optimizer_state_and_outlives_the_step():
    given = stage((1, 2, 1), "lora")
    before = jax.tree.map(np.asarray, given.frozen)
    optimizer = optax.adam(0.1)
    state = init_state(given.trainable, optimizer)
    names = [path_name(path) for path, x in jax.tree_util.tree_leaves_with_path(state) if x.ndim]
    assert len(names) == 3 * 2 * len(LORA.targets)  # A and B, each with two moments
    assert all(name.endswith(("lora_A", "lora_B")) for name in names)
    objective = language_modelling(given.policy)
    step = make_train_step(objective, optimizer, given.sharder, state, 2)
    batch = put_batch(given.mesh, rows_of([[item] for item in items(4)]))
    (_, frozen, _), _ = step.lower(state, given.frozen, batch).args_info
    assert not any(argument.donated for argument in jax.tree.leaves(frozen))
    after, _ = step(state, given.frozen, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))  # that is donated
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, given.frozen), before)
    assert all(np.any(x) for x in jax.tree.leaves(after.params))


def test_a_base_kept_in_bfloat16_computes_the_bits_of_one_in_float32():
    """`split_params` keeps what is frozen in the type that it is computed in."""
    given = stage(ONE, "lora", jnp.bfloat16)
    _, _, params, _ = tiny_model(tie_word_embeddings=False)
    base = given.frozen["base"]
    assert {x.dtype for x in jax.tree.leaves(base)} == {jnp.dtype(jnp.bfloat16)}
    batch = put_batch(given.mesh, rows_of([[item] for item in items(4)]))
    adapter, scorer = rough_adapter(given.trainable), given.policy.scorer
    hidden = jax.jit(lambda base: scorer.hidden(with_adapter(base, adapter), batch))
    scores = jax.jit(lambda base: scorer.scores(with_adapter(base, adapter), batch))
    np.testing.assert_array_equal(hidden(base), hidden(params))
    jax.tree.map(np.testing.assert_array_equal, scores(base), scores(params))


def pair_batch(answers: list[Encoded], slots: int) -> dict[str, np.ndarray]:
    """One row of pairs; the last of its `slots` may be empty."""
    row = make_row(answers, 160, 0)
    row["pairs"] = (np.arange(slots) < len(answers) // 2).astype(np.float32)
    return {name: x[None] for name, x in row.items()}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_fresh_adapter_is_its_own_reference(dtype):
    """The base without the adapter: the first DPO loss is log 2, to the bit."""
    given = stage(ONE, "lora", dtype)
    batch = jax.tree.map(jnp.asarray, pair_batch(items(8, seed=3), 4))
    objective = preference(given.policy, beta=0.1, alpha=0.0)
    losses, scales = jax.jit(objective.losses), {"dpo": 1.0, "nll": 0.0}
    loss, _, metrics = losses(given.trainable, given.frozen, batch, scales)
    assert np.float32(loss / objective.weights(batch)["dpo"]) == np.float32(np.log(2.0))
    assert float(metrics["margin"][0]) == 0.0
    moved, _, metrics = losses(rough_adapter(given.trainable), given.frozen, batch, scales)
    assert float(moved) != float(loss) and float(metrics["margin"][0]) != 0.0


def test_preference_loss_equals_a_loop_over_pairs():
    _, _, params, scorer = tiny_model()
    _, _, reference, _ = tiny_model(seed=7)
    answers = items(6, seed=3)
    batch = jax.tree.map(jnp.asarray, pair_batch(answers, 4))
    objective = preference(Policy(scorer, scorer, adapted=False), beta=0.1, alpha=1.0)
    scales = objective.scales(batch)
    ours, parts, _ = jax.jit(objective.losses)(params, {"reference": reference}, batch, scales)
    assert float(ours) == pytest.approx(float(parts["dpo"] + parts["nll"]))

    scores = jax.jit(lambda params, row: scorer.scores(params, row))

    def answer_logp(p, item):
        row = {name: jnp.asarray(x[None]) for name, x in make_row([item], 40, 0).items()}
        return float(jnp.sum(scores(p, row).logp * row["weights"])), sum(item.is_target[1:])

    losses = []
    for chosen, rejected in zip(answers[::2], answers[1::2], strict=True):
        (w, n), (l_, _) = answer_logp(params, chosen), answer_logp(params, rejected)
        margin = w - answer_logp(reference, chosen)[0] - l_ + answer_logp(reference, rejected)[0]
        losses.append(-float(jax.nn.log_sigmoid(0.1 * margin)) - w / max(n, 1))
    assert float(ours) == pytest.approx(np.mean(losses), rel=1e-5)


def test_compiler_options_of_training_are_a_gpus_alone(monkeypatch):
    """XLA_FLAGS goes before ours; determinism is asked for where the device is."""
    of = lambda device: SimpleNamespace(devices=np.array([device], object))  # noqa: E731
    gpu, absent = (SimpleNamespace(platform="gpu", id=n) for n in (0, 1))
    monkeypatch.setattr(jax, "devices", lambda *_: [gpu])
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    plain = {"xla_gpu_memory_limit_slop_factor": 1000}
    assert training_options(of(SimpleNamespace(platform="tpu")), True) == {}
    assert training_options(of(gpu), False) == training_options(of(absent), True) == plain
    assert training_options(of(gpu), True) == {"xla_gpu_deterministic_ops": True} | plain
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_memory_limit_slop_factor=95")
    assert training_options(of(gpu), False) == {}
