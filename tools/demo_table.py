"""The demo's tables as Markdown, from a run's summary.json: what README.md shows.

python tools/demo_table.py runs/formulary
"""

import json
import sys
from pathlib import Path
from typing import Any

PARTS = {
    "new_combination": "new combinations",
    "new_product": "new products",
    "text_only": "text-only drugs",
    "recall_taught": "recall, taught",
    "recall_text_only": "recall, text-only",
}
FORMS = {
    "explain": "with explanation",
    "sampled": "with explanation, sampled at temperature 1",
    "answer_only": "answer only (an empty thinking part is given)",
}


def points(found: dict[str, Any]) -> str:
    """`+3.2 (1.1 to 5.4)`."""
    low, high = (100 * x for x in found["ci95"])
    return f"{100 * found['difference']:+.1f} ({low:.1f} to {high:.1f})"


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def accuracy_table(summary: dict[str, Any]) -> list[str]:
    stages = [stage for stage in summary["stages"] if stage["parts"]]
    lines = [
        row(["stage", "seconds", *PARTS.values()]),
        "|---|---:" + "|---" * len(PARTS) + "|",
        row(["*problems*", "", *(str(stages[0]["parts"][part]["n"]) for part in PARTS)]),
    ]
    for stage in stages:
        name = f"{stage['name']} (control)" if stage["control"] else stage["name"]
        cells = []
        for part in PARTS:
            scores = stage["parts"][part]
            low, high = (100 * x for x in scores["ci95_explain"])
            cells.append(f"{100 * scores['accuracy_explain']:.1f} ({low:.1f} to {high:.1f})")
        lines.append(row([name, f"{stage['seconds']:.0f}", *cells]))
    return lines


def change_table(summary: dict[str, Any], form: str) -> list[str]:
    found: dict[tuple[str, str], dict[str, str]] = {}
    for each in summary["comparisons"]:
        if each["form"] == form and each["against"] != "cpt":
            pair = found.setdefault((each["stage"], each["against"]), {})
            pair[each["part"]] = points(each)
    lines = [row(["stage", "against", *PARTS.values()]), "|---|---" + "|---" * len(PARTS) + "|"]
    lines += [row([*pair, *(parts[part] for part in PARTS)]) for pair, parts in found.items()]
    return lines


def main(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    print("\n".join(accuracy_table(summary)))
    for form, words in FORMS.items():
        print(f"\nDifferences in points, {words}:\n")
        print("\n".join(change_table(summary, form)))
    print("\nExplanation gap on recall (without minus with explanation), and its change:\n")
    for gap in summary["gaps"]:
        change = "" if gap["change"] is None else f"; change {points(gap['change'])}"
        print(f"- {gap['stage']}: {points(gap)}{change}")
    print("\nFacts recited right, in %:\n")
    for stage, shares in summary["facts_recited"].items():
        listed = ", ".join(f"{PARTS[part]} {100 * share:.1f}" for part, share in shares.items())
        print(f"- {stage}: {listed}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
