"""Frequencies of the rotary embedding, and YaRN, which stretches them for longer rows.

H head size; h the H/2 pairs of one head, each of which turns with a frequency of its own.
"""

import dataclasses
import math
import sys

import numpy as np


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN's parameters (arXiv 2309.00071, 3.2 and 3.4) under the names of `config.json`.

    A pair that turns more than `beta_fast` times within `original_max_position_embeddings` keeps
    its frequency, one that turns less than `beta_slow` times is slowed by `factor`.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None  # None: from factor and the two mscales
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"YaRN's {field.name}={value!r} should be true or false")
            if field.type is int and type(value) is not int:
                raise ValueError(f"YaRN's {field.name}={value!r} should be a whole number")
            optional = field.type == float | None
            if field.type is float or (optional and value is not None):
                _check_number(field.name, value)
        for name in ("original_max_position_embeddings", "beta_fast", "beta_slow"):
            if getattr(self, name) <= 0:
                raise ValueError(f"YaRN's {name}={getattr(self, name)} should be above 0")
        if self.factor < 1:
            raise ValueError(f"YaRN's factor={self.factor} should be 1 or more")
        if self.attention_factor is not None and self.attention_factor <= 0:
            raise ValueError(f"YaRN's attention_factor={self.attention_factor} should be above 0")
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"YaRN's {name}={getattr(self, name)} should be 0 (unset) or more")
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"YaRN's beta_fast={self.beta_fast} is below its beta_slow={self.beta_slow}"
            )


def rope_frequencies(head_dim: int, theta: float, scaling: Yarn | None) -> tuple[np.ndarray, float]:
    """(frequency_h, attention_factor): radians per position, float32, and what to multiply
    the cosines and sines by (arXiv 2104.09864; with `scaling`, arXiv 2309.00071).

    Within two units in the last place of `transformers`, whose order of operations this is.
    """
    exponent_h = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    # numpy's float32 power is a unit off torch's in up to a quarter of the pairs, float64's rarely
    period_h = np.power(float(theta), exponent_h.astype(np.float64)).astype(np.float32)
    if scaling is None:
        return 1.0 / period_h, 1.0
    kept_h = _kept_share(head_dim, theta, scaling)
    slowed_h = 1.0 / (scaling.factor * period_h)
    return slowed_h * (1 - kept_h) + (1.0 / period_h) * kept_h, _attention_factor(scaling)


def _kept_share(head_dim: int, theta: float, yarn: Yarn) -> np.ndarray:
    """gamma_h, 1 where the frequency stays and 0 where it is slowed.

    The ramp between is linear in the pair, as everybody's code has it; the paper's is linear in
    the number of turns.
    """

    def pair_that_turns(times: float) -> float:
        period = yarn.original_max_position_embeddings / (times * 2 * math.pi)
        return head_dim * math.log(period) / (2 * math.log(theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    ramp_h = (np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low)
    return 1 - np.clip(ramp_h, 0, 1)


def _attention_factor(yarn: Yarn) -> float:
    """sqrt(1/t) of section 3.4; DeepSeek's pair of mscales takes its place where both are set."""
    if yarn.attention_factor is not None:
        return float(yarn.attention_factor)
    unset = (None, 0)  # published files write an unset mscale as 0
    if yarn.mscale in unset or yarn.mscale_all_dim in unset:
        return 0.1 * math.log(yarn.factor) + 1.0
    log_factor = 0.1 * math.log(yarn.factor)
    return (yarn.mscale * log_factor + 1.0) / (yarn.mscale_all_dim * log_factor + 1.0)


def _check_number(name: str, value) -> None:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"YaRN's {name}={value!r} should be a number")
