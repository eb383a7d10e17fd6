"""AdamW with schedules; decay and learning-rate scale per parameter are ordered path rules."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from medreason_jax.mesh import is_stacked, path_name

# Ordered: the first pattern found in the path decides. Biases, norm gains and the critic's head
# are not decayed.
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"bias$", False),
    (r"norm\.weight$", False),
    (r"score\.", False),
    (r"lora_[AB]$", True),
    (r"kernel$", True),
    (r"embedding$", True),
)


def match_rules(tree, rules: Sequence[tuple[str, object]], what: str):
    """A tree of the values of the first rule whose pattern is found in each leaf's path."""

    def value(path, _leaf):
        name = path_name(path)
        for pattern, result in rules:
            if re.search(pattern, name):
                return result
        raise ValueError(f"no {what} rule matches parameter {name!r}")

    return jax.tree_util.tree_map_with_path(value, tree)


def make_schedule(
    kind: Literal["constant", "cosine", "linear", "wsd"],
    peak: float,
    steps: int,
    warmup_steps: int,
    final_ratio: float,
    decay_share: float = 0.2,
) -> optax.Schedule:
    """Learning rate by step; `wsd` holds the peak and decays over the last `decay_share`."""
    warmup = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
    rest = max(steps - warmup_steps, 1)
    end = peak * final_ratio
    if kind == "constant":
        body = optax.constant_schedule(peak)
    elif kind == "cosine":
        body = optax.cosine_decay_schedule(peak, rest, final_ratio)
    elif kind == "linear":
        body = optax.linear_schedule(peak, end, rest)
    else:
        decay = max(int(rest * decay_share), 1)
        falling = optax.linear_schedule(peak, end, decay)
        body = optax.join_schedules([optax.constant_schedule(peak), falling], [rest - decay])
    if warmup_steps == 0:
        return body
    return optax.join_schedules([warmup, body], [warmup_steps])


@dataclass(frozen=True)
class Rate:
    """Parameters whose path holds `pattern` learn at `scale` x the rate, in `layers` [first, end).

    Scale 0 freezes: no update, no decay, no share in the clipped norm.
    """

    pattern: str
    scale: float
    layers: tuple[int, int] | None = None


def rate_scales(params, rates: Sequence[Rate]):
    """A tree of each leaf's scale, [L, 1, ...] where layers differ; the first rule that fits wins.

    ValueError for a rule that fits no parameter, names layers that are not there, or freezes all.
    """
    used: set[Rate] = set()

    def scales(path, leaf):
        name = path_name(path)
        fitting = [rate for rate in rates if re.search(rate.pattern, name)]
        if not is_stacked(name):
            plain = [rate for rate in fitting if rate.layers is None]
            used.update(plain)
            return plain[0].scale if plain else 1.0
        used.update(fitting)
        scale_L = np.ones(leaf.shape[0], np.float32)
        for rate in reversed(fitting):
            first, end = (0, leaf.shape[0]) if rate.layers is None else rate.layers
            if end > leaf.shape[0]:
                raise ValueError(
                    f"rates: layers={[first, end]} of pattern {rate.pattern!r}; the model has "
                    f"layers 0 to {leaf.shape[0] - 1}"
                )
            scale_L[first:end] = rate.scale
        if np.all(scale_L == scale_L[0]):
            return float(scale_L[0])
        return scale_L.reshape(-1, *(1,) * (len(leaf.shape) - 1))

    tree = jax.tree_util.tree_map_with_path(scales, params)
    unused = [rate.pattern for rate in rates if rate not in used]
    if unused:
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise ValueError(f"rates: pattern {unused[0]!r} fits no parameter; found {names[:3]} ...")
    if all(np.all(scale == 0) for scale in jax.tree.leaves(tree)):
        raise ValueError("rates: every parameter is frozen; leave one with a scale above 0")
    return tree


def adam(b1: float, b2: float, eps: float, mu_dtype, nu_dtype) -> optax.GradientTransformation:
    """optax's, with the second moment too kept in a type of its own between the steps."""
    inner = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)

    def stored(state, dtype):
        return state._replace(nu=jax.tree.map(lambda x: x.astype(dtype), state.nu))

    def update(gradients, state, params=None):
        updates, state = inner.update(gradients, stored(state, jnp.float32), params)
        return updates, stored(state, nu_dtype)

    return optax.GradientTransformation(lambda p: stored(inner.init(p), nu_dtype), update)


def make_optimizer(
    schedule: optax.Schedule,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float,
    eps: float = 1e-8,
    mu_dtype=jnp.float32,
    nu_dtype=jnp.float32,
    rates: Sequence[Rate] = (),
) -> optax.GradientTransformation:
    """Freeze, clip by global norm, Adam, decoupled decay, schedule, each parameter's rate scale."""

    def init(params):
        rate_scales(params, rates)  # says what is wrong before anything is trained
        return optax.EmptyState()

    def freeze(gradients, state, params=None):
        keep = lambda g, s: g if np.all(s > 0) else g * (np.asarray(s) > 0)  # noqa: E731
        return jax.tree.map(keep, gradients, rate_scales(gradients, rates)), state

    def scale(updates, state, params=None):
        return jax.tree.map(lambda u, s: u * s, updates, rate_scales(updates, rates)), state

    return optax.chain(
        optax.GradientTransformation(init, freeze),
        optax.clip_by_global_norm(clip_norm),
        adam(b1, b2, eps, mu_dtype, nu_dtype),
        optax.add_decayed_weights(
            weight_decay, mask=lambda p: match_rules(p, DECAY_RULES, "decay")
        ),
        optax.scale_by_learning_rate(schedule),
        optax.GradientTransformation(lambda params: optax.EmptyState(), scale),
    )
