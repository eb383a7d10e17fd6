"""Differences between models on the same problems, with paired bootstrap intervals."""

from collections.abc import Iterable
from typing import Any

import numpy as np

RESAMPLES = 20_000

Prediction = dict[str, Any]
# Whether the answer to a problem is right, by (problem id, form).
Right = dict[tuple[str, str], bool]


def right_answers(predictions: Iterable[Prediction]) -> Right:
    return {(p["id"], p["form"]): p["outcome"] == "true" for p in predictions}


def bootstrap_mean(values: list[int]) -> dict[str, Any]:
    """{n, difference, ci95}: the mean and the percentile interval of its bootstrap distribution.

    Resampling problems with replacement is drawing how often each distinct value occurs from a
    multinomial distribution. Empty values have neither mean nor interval.
    """
    if not values:
        return {"n": 0, "difference": None, "ci95": None}
    distinct, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    n = len(values)
    draws = np.random.default_rng(0).multinomial(n, counts / n, RESAMPLES)
    low, high = np.percentile(draws @ distinct / n, [2.5, 97.5])
    return {
        "n": n,
        "difference": round(float(np.mean(values)), 4),
        "ci95": [round(float(low), 4), round(float(high), 4)],
    }


def compare(this: Right, other: Right, ids: Iterable[str], form: str) -> dict[str, Any]:
    """Accuracy of this model minus that of another, on problems that both answered."""
    keys = [(i, form) for i in ids if (i, form) in this and (i, form) in other]
    return bootstrap_mean([int(this[key]) - int(other[key]) for key in keys])


def gaps(right: Right, ids: Iterable[str]) -> dict[str, int]:
    """Of every problem: right without explanation minus right with it."""
    both = (i for i in ids if (i, "answer_only") in right and (i, "explain") in right)
    return {i: int(right[i, "answer_only"]) - int(right[i, "explain"]) for i in both}


def gap(right: Right, ids: Iterable[str]) -> dict[str, Any]:
    """The explanation gap: accuracy without explanation minus accuracy with it."""
    return bootstrap_mean(list(gaps(right, ids).values()))


def gap_change(this: Right, other: Right, ids: list[str]) -> dict[str, Any]:
    """This model's explanation gap minus another's."""
    own, others = gaps(this, ids), gaps(other, ids)
    return bootstrap_mean([own[i] - others[i] for i in own if i in others])
