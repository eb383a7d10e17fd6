"""The one train step: every stage differs only in its objective."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from medreason_jax.mesh import Sharder, batch_sharding, replicated, training_options
from medreason_jax.train.objectives import Objective


@struct.dataclass
class TrainState:
    step: jax.Array
    params: Any  # what is trained, float32
    optimizer: Any
    halted: jax.Array  # a loss or gradient was not finite: later steps change nothing


def init_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.bool_(False))


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    sharder: Sharder,
    state: TrainState,
    accumulation: int,
    deterministic: bool = False,
):
    """`step(state, frozen, batch) -> (state, metrics)`, jitted; the state is donated.

    Metrics: loss, grad_norm, the objective's own, tokens (that are not padding), and attended, the
    sum of the squared lengths of what attention sees (`speed.training_flops`).

    `batch` holds arrays [B, ...] with B a multiple of accumulation x batch shards. `frozen` takes
    no gradient. The update is skipped, and `halted` set, when loss or gradient are not finite.
    `deterministic` asks GPUs for the same bits in every run, which CPUs and TPUs always give.
    """

    def split(x):
        """[B, ...] -> [A, B/A, ...] without moving a row to another device."""
        x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)
        return sharder(x, (None, "batch") + (None,) * (x.ndim - 2))

    def step(state: TrainState, frozen, batch):
        scales = objective.scales(batch)

        def loss_and_metrics(params, part):
            loss, *others = objective.losses(params, frozen, part, scales)
            return loss, others

        gradient = jax.grad(loss_and_metrics, has_aux=True)

        def accumulate(total, part):
            return jax.tree.map(jnp.add, total, gradient(state.params, part)), None

        if accumulation == 1:
            grads, (losses, sums) = gradient(state.params, batch)
        else:
            parts = jax.tree.map(split, batch)
            first = jax.tree.map(lambda x: x[0], parts)
            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, state.params, first)
            )
            (grads, (losses, sums)), _ = jax.lax.scan(accumulate, zeros, parts)

        loss, norm = sum(losses.values()), optax.global_norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & ~state.halted
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = lambda new, old: jnp.where(good, new, old)  # noqa: E731
        new_state = TrainState(
            step=state.step + good,
            params=jax.tree.map(keep, params, state.params),
            optimizer=jax.tree.map(keep, opt_state, state.optimizer),
            halted=~good,
        )
        metrics = {"loss": loss, "grad_norm": norm, "halted": ~good}
        metrics |= {f"loss_{name}": value for name, value in losses.items() if len(losses) > 1}
        metrics |= {name: s / jnp.maximum(w, 1.0) for name, (s, w) in sums.items()}
        real_BT = batch["segments"] > 0
        metrics["tokens"] = jnp.sum(real_BT)
        metrics["attended"] = jnp.sum(jnp.where(real_BT, 2.0 * batch["positions"] + 1.0, 0.0))
        return new_state, metrics

    shardings = sharder.tree(state)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, None, batch_sharding(sharder.mesh)),
        out_shardings=(shardings, replicated(sharder.mesh)),
        compiler_options=training_options(sharder.mesh, deterministic),
    )
