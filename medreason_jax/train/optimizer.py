"""AdamW with schedules; decay and learning-rate scale per parameter are ordered path rules."""

import re
from collections.abc import Sequence
from typing import Literal

import jax
import optax

from medreason_jax.mesh import path_name

# Ordered: the first pattern found in the path decides. Biases, norm gains and the critic's head
# are not decayed.
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"bias$", False),
    (r"norm\.weight$", False),
    (r"score\.", False),
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


def make_optimizer(
    schedule: optax.Schedule,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float,
    rate_rules: Sequence[tuple[str, float]] = ((r".", 1.0),),
) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled decay, schedule, each parameter's rate scale."""

    def scale_rates(updates, state, params=None):
        scales = match_rules(updates, rate_rules, "learning-rate")
        return jax.tree.map(lambda update, scale: update * scale, updates, scales), state

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1=b1, b2=b2),
        optax.add_decayed_weights(
            weight_decay, mask=lambda p: match_rules(p, DECAY_RULES, "decay")
        ),
        optax.scale_by_learning_rate(schedule),
        optax.GradientTransformation(lambda params: optax.EmptyState(), scale_rates),
    )
