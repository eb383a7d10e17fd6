"""What a training stage compiles, from its config: policy, objective, optimizer and step.

Nothing here holds an array, so that the same program can be compiled for devices that are not
there (`plan.py`).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from medreason_jax.checkpoint import abstract_like
from medreason_jax.config import LoraConfig, LoraOverride, OptimizerConfig, TrainConfig
from medreason_jax.mesh import Sharder, TokenShards
from medreason_jax.qwen2.lora import Lora, Target, init_adapter
from medreason_jax.qwen2.model import Network, Params, abstract_params, make_network
from medreason_jax.train.objectives import (
    Objective,
    Policy,
    Scorer,
    language_modelling,
    preference,
)
from medreason_jax.train.optimizer import Rate, make_optimizer, make_schedule
from medreason_jax.train.step import TrainState, init_state, make_train_step


@dataclass(frozen=True)
class Program:
    """One stage's program; `step(state)` compiles for a (possibly abstract) state."""

    policy: Policy
    objective: Objective
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    sharder: Sharder
    accumulation: int
    deterministic: bool

    def init(self, trainable: Params) -> TrainState:
        """The first state, on the mesh; `trainable` is given away."""
        first = lambda tree: init_state(tree, self.optimizer)  # noqa: E731
        shardings = self.sharder.tree(jax.eval_shape(first, trainable))
        return jax.jit(first, donate_argnums=0, out_shardings=shardings)(trainable)

    def step(self, state: TrainState):
        return make_train_step(
            self.objective,
            self.optimizer,
            self.sharder,
            state,
            self.accumulation,
            self.deterministic,
        )


def make_program(config: TrainConfig, network: Network, sharder: Sharder, steps: int) -> Program:
    policy = make_policy(network, sharder, lora_of(config.lora), config.head_chunk)
    if config.preference is None:
        objective = language_modelling(policy, config.z_loss)
    else:
        objective = preference(policy, config.preference.beta, config.preference.alpha)
    optimizer, schedule = optimizer_of(config.optimizer, steps)
    how = config.accumulation, config.deterministic
    return Program(policy, objective, optimizer, schedule, sharder, *how)


def lora_of(config: LoraConfig | None) -> Lora | None:
    if config is None:
        return None
    targets = []
    for name in config.targets:
        own = config.overrides[name] if name in config.overrides else LoraOverride()
        rank = config.rank if own.rank is None else own.rank
        alpha = config.alpha if own.alpha is None else own.alpha
        targets.append(Target(name, rank, alpha))
    return Lora(tuple(targets))


def make_policy(
    network: Network, sharder: Sharder, lora: Lora | None, chunk: int, temperature: float = 1.0
) -> Policy:
    """Of a network without adapters: itself, or with the adapters of `lora`."""
    reference = Scorer(network, TokenShards(sharder.mesh), chunk, temperature)
    if lora is None:
        return Policy(reference, reference, adapted=False)
    adapted, _ = make_network(network.sizes, network.compute, lora)
    return Policy(reference.replace(network=adapted), reference, adapted=True)


def split_params(
    params: Params, network: Network, lora: Lora | None, needs_reference: bool, key: jax.Array
) -> tuple[Params, Params]:
    """(trainable, frozen) at the start of a stage, as `Policy` takes them.

    What is frozen is kept in the type that it is computed in: the result is the same, bit for bit.
    """
    dtype = network.compute.dtype
    if lora is not None:
        adapter = init_adapter(abstract_params(network.sizes, lora), key)
        return adapter, {"base": jax.tree.map(lambda x: x.astype(dtype), params)}
    if needs_reference:  # a copy: the trained one is donated
        return params, {"reference": jax.tree.map(lambda x: jnp.array(x, dtype), params)}
    return params, {}


def place_split(
    params: Params,
    network: Network,
    sharder: Sharder,
    lora: Lora | None,
    needs_reference: bool,
    key: jax.Array,
) -> tuple[Params, Params]:
    """`split_params` of arrays on a mesh; `params` are given away."""
    split = lambda p: split_params(p, network, lora, needs_reference, key)  # noqa: E731
    shardings = tuple(sharder.tree(tree) for tree in jax.eval_shape(split, params))
    return jax.jit(split, donate_argnums=0, out_shardings=shardings)(params)


def abstract_split(
    network: Network, sharder: Sharder, lora: Lora | None, needs_reference: bool
) -> tuple[Params, Params]:
    """Shapes of `place_split`'s trees, with their places on the mesh."""
    split = lambda p: split_params(p, network, lora, needs_reference, jax.random.key(0))  # noqa: E731
    trees = jax.eval_shape(split, abstract_params(network.sizes))
    return tuple(abstract_like(tree, sharder.tree(tree)) for tree in trees)


def optimizer_of(
    config: OptimizerConfig,
    steps: int,
    rates: tuple[Rate, ...] = (),
    first: tuple[Rate, ...] = (),
):
    """(optimizer, schedule); the config's own rate rules go before `rates`, after `first`."""
    warmup = int(config.warmup_ratio * steps)
    schedule = make_schedule(
        config.schedule, config.learning_rate, steps, warmup, config.final_ratio
    )
    own = [Rate(rule.pattern, rule.scale, rule.layers) for rule in config.rates]
    optimizer = make_optimizer(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        mu_dtype=config.mu_dtype,
        nu_dtype=config.nu_dtype,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        rates=[*first, *own, *rates],
    )
    return optimizer, schedule
