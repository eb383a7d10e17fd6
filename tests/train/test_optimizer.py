"""Learning rates and freezing by pattern and layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medreason_jax.train.optimizer import Rate, make_optimizer

PARAMS = {
    "embed_tokens": {"embedding": jnp.ones((5, 4))},
    "layers": {"mlp": {"up_proj": {"kernel": jnp.ones((3, 4, 2))}}},
    "norm": {"weight": jnp.ones(4)},
}
KERNEL = ("layers", "mlp", "up_proj", "kernel")


def changes(*rates, clip=1e9, gradients=None):
    """How far each parameter moves in one step."""
    optimizer = make_optimizer(
        optax.constant_schedule(0.1), b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=clip, rates=rates
    )
    gradients = jax.tree.map(jnp.ones_like, PARAMS) if gradients is None else gradients
    state = optimizer.init(PARAMS)
    updates, state = jax.jit(optimizer.update)(gradients, state, PARAMS)
    return jax.tree.map(np.asarray, updates)


def kernel(tree):
    for part in KERNEL:
        tree = tree[part]
    return tree


def test_a_rule_scales_the_layers_that_it_names():
    plain, moved = changes(), changes(Rate("up_proj", 0.5, (1, 3)))
    np.testing.assert_allclose(kernel(moved)[0], kernel(plain)[0])
    np.testing.assert_allclose(kernel(moved)[1:], 0.5 * kernel(plain)[1:])
    np.testing.assert_array_equal(moved["norm"]["weight"], plain["norm"]["weight"])


def test_the_first_rule_that_fits_decides():
    plain = changes()
    moved = changes(Rate("up_proj", 0.0, (0, 1)), Rate("layers", 2.0))
    assert not kernel(moved)[0].any()
    np.testing.assert_allclose(kernel(moved)[1:], 2.0 * kernel(plain)[1:])


def test_what_is_frozen_neither_moves_nor_decays_nor_counts_in_the_clipped_norm():
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    gradients["embed_tokens"]["embedding"] *= 1e6
    moved = changes(Rate("embed_tokens", 0.0), clip=1e3, gradients=gradients)
    assert not moved["embed_tokens"]["embedding"].any()
    np.testing.assert_array_equal(moved["norm"]["weight"], changes()["norm"]["weight"])


def test_a_frozen_parameter_is_bit_for_bit_the_same_after_an_update():
    updates = changes(Rate("embed", 0.0), Rate("up_proj", 0.0, (0, 2)))
    after = optax.apply_updates(PARAMS, updates)
    np.testing.assert_array_equal(after["embed_tokens"]["embedding"], jnp.ones((5, 4)))
    np.testing.assert_array_equal(kernel(after)[:2], np.ones((2, 4, 2)))
    assert (kernel(after)[2] != 1).all()


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (Rate("q_proj", 0.5), "'q_proj' fits no parameter"),
        (Rate("norm", 0.5, (0, 1)), "'norm' fits no parameter"),
        (Rate("up_proj", 0.5, (1, 4)), "layers 0 to 2"),
        (Rate(".", 0.0), "every parameter is frozen"),
    ],
)
def test_a_rule_that_cannot_take_effect_is_refused(rate, words):
    with pytest.raises(ValueError, match=words):
        changes(rate)
