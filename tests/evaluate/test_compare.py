"""Paired differences beside a plain bootstrap, and explanation gaps by hand."""

import numpy as np
import pytest

from medreason_jax.evaluate.compare import (
    bootstrap_mean,
    compare,
    gap,
    gap_change,
    right_answers,
)


def predictions(outcomes: dict[tuple[str, str], str]) -> list[dict]:
    return [
        {"id": id_, "form": form, "outcome": outcome} for (id_, form), outcome in outcomes.items()
    ]


@pytest.mark.parametrize("shares", [(0.1, 0.7, 0.2), (0.0, 0.95, 0.05), (0.3, 0.4, 0.3)])
def test_the_interval_is_that_of_resampling_problems(shares):
    random = np.random.default_rng(1)
    values = random.choice([-1, 0, 1], 400, p=shares)
    found = bootstrap_mean(values.tolist())
    means = [random.choice(values, 400).mean() for _ in range(4000)]
    assert found["n"] == 400 and found["difference"] == pytest.approx(values.mean(), abs=5e-5)
    np.testing.assert_allclose(found["ci95"], np.percentile(means, [2.5, 97.5]), atol=0.006)


def test_the_interval_leaves_out_zero_only_where_the_difference_is_no_chance():
    assert bootstrap_mean([1] * 30 + [0] * 970)["ci95"][0] > 0
    low, high = bootstrap_mean([1] * 30 + [-1] * 25 + [0] * 945)["ci95"]
    assert low < 0 < high


def test_only_problems_that_both_answered_are_compared():
    this = right_answers(predictions({("a", "explain"): "true", ("b", "explain"): "unscored"}))
    other = right_answers(predictions({("a", "explain"): "false", ("c", "explain"): "true"}))
    assert compare(this, other, ["a", "b", "c"], "explain") == {
        "n": 1,
        "difference": 1.0,
        "ci95": [1.0, 1.0],
    }
    assert compare(this, other, ["a"], "sampled") == {"n": 0, "difference": None, "ci95": None}


def test_the_gap_is_accuracy_without_minus_accuracy_with_explanation():
    before = right_answers(
        predictions(
            {
                ("a", "answer_only"): "true",
                ("a", "explain"): "false",
                ("b", "answer_only"): "true",
                ("b", "explain"): "true",
            }
        )
    )
    after = right_answers(
        predictions(
            {
                ("a", "answer_only"): "true",
                ("a", "explain"): "true",
                ("b", "answer_only"): "true",
                ("b", "explain"): "true",
            }
        )
    )
    assert gap(before, ["a", "b"])["difference"] == 0.5
    assert gap(after, ["a", "b"])["difference"] == 0.0
    assert gap_change(after, before, ["a", "b"])["difference"] == -0.5
