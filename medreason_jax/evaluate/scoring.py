"""Verdicts to accuracies with intervals, by part of the test set."""

from typing import Any

from data_gen.answers import accuracy_interval


def score_parts(predictions: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{part: {form: {n, correct, accuracy, ci95, unscored, truncated}}}; right is true only."""
    parts: dict[str, dict[str, Any]] = {}
    for part in sorted({p["part"] for p in predictions}):
        forms = {}
        for form in sorted({p["form"] for p in predictions}):
            chosen = [p for p in predictions if p["part"] == part and p["form"] == form]
            correct = sum(p["outcome"] == "true" for p in chosen)
            low, high = accuracy_interval(correct, len(chosen))
            forms[form] = {
                "n": len(chosen),
                "correct": correct,
                "accuracy": correct / max(len(chosen), 1),
                "ci95": [round(low, 4), round(high, 4)],
                "unscored": sum(p["outcome"] == "unscored" for p in chosen),
                "truncated": sum(p["finish_reason"] == "length" for p in chosen),
            }
        parts[part] = forms
    return parts
