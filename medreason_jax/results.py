"""summary.json: what every stage of a run reached, and what was compared on the same problems."""

import json
from pathlib import Path
from typing import Any

from data_gen.formulary_recital import recited_by_part
from medreason_jax.data.sources import read_lines
from medreason_jax.evaluate.compare import compare, gap, gap_change, right_answers
from medreason_jax.manifest import read_manifest
from medreason_jax.recipe import ControlConfig, RecipeConfig, StageConfig


def summarise(recipe: RecipeConfig, root: Path) -> dict[str, Any]:
    """The table: a row a stage, headline from the recipe's part, all parts beside it.

    Beside it what was compared: every stage with the one it started from, every control with the
    stage that it stands against, on the same problems.
    """
    data, exported = read_manifest(root / "data"), read_manifest(root / "export")
    assert data is not None and exported is not None
    rows = [empty_row("data", data["seconds"])]
    controls = [c for c in recipe.controls if read_manifest(evaluation_folder(recipe, c, root))]
    for stage in [*recipe.stages, *controls]:
        manifest = read_manifest(root / stage.name)
        scores = read_manifest(evaluation_folder(recipe, stage, root))
        assert manifest is not None and scores is not None
        parts = {part: part_scores(forms) for part, forms in scores["parts"].items()}
        clock = root / stage.name / "candidates.seconds.json"
        sampling = json.loads(clock.read_text())["seconds"] if clock.is_file() else 0.0
        row = {"name": stage.name, "seconds": round(manifest["seconds"] + sampling, 1)}
        row |= {**parts[recipe.evaluation.part], "parts": parts}
        row |= {"evaluation_seconds": scores["seconds"], "control": stage in controls}
        rows.append(row)
    rows.append(empty_row("export", exported["seconds"]))
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "not_for_reporting": recipe.not_for_reporting,
        "split": recipe.evaluation.split,
        "part": recipe.evaluation.part,
        "stages": rows,
        **comparisons(recipe, controls, root),
        "export": exported["model"],
        "parity": exported["parity"],
        "report": str(root / "report" / "index.html"),
    }


def comparisons(recipe: RecipeConfig, controls: list[ControlConfig], root: Path) -> dict[str, Any]:
    """Paired differences of accuracy, explanation gaps, and with a formulary the facts recited."""
    stages = [*recipe.stages, *controls]
    predictions = {
        stage.name: read_lines(evaluation_folder(recipe, stage, root) / "predictions.jsonl")
        for stage in stages
    }
    right = {name: right_answers(rows) for name, rows in predictions.items()}
    first = next(iter(predictions.values()))
    part_of = {p["id"]: p["part"] for p in first}
    ids = {part: [i for i in part_of if part_of[i] == part] for part in set(part_of.values())}
    names = [stage.name for stage in recipe.stages]
    starts = zip(["base", *names], recipe.stages, strict=False)
    pairs = [(stage.name, stage.start or before) for before, stage in starts]
    pairs = [(name, start) for name, start in pairs if start != "base"]
    start_of = dict(pairs)
    pairs += [(control.against, control.name) for control in controls]
    forms = sorted({p["form"] for p in first})
    found: dict[str, Any] = {
        "comparisons": [
            {"stage": this, "against": other, "part": part, "form": form}
            | compare(right[this], right[other], own, form)
            for this, other in pairs
            for part, own in sorted(ids.items())
            for form in forms
        ]
    }
    gap_ids = [i for part in recipe.evaluation.gap_parts for i in ids[part]]
    if gap_ids:
        found["gaps"] = [
            {
                "stage": name,
                **gap(right[name], gap_ids),
                "change": gap_change(right[name], right[start_of[name]], gap_ids)
                if name in start_of
                else None,
            }
            for name in names
        ]
    if recipe.formulary is not None:
        found["facts_recited"] = {
            name: recited_by_part(root / "data" / "bank" / "facts.jsonl", rows)
            for name, rows in predictions.items()
        }
    return found


def empty_row(name: str, seconds: float) -> dict[str, Any]:
    nothing = dict.fromkeys(("accuracy", "accuracy_explain", "ci95", "ci95_explain"))
    return {"name": name, "seconds": seconds, **nothing, "n": 0, "parts": {}}


def part_scores(forms: dict[str, Any]) -> dict[str, Any]:
    plain, explained = forms["answer_only"], forms["explain"]
    sampled = forms["sampled"]["accuracy"] if "sampled" in forms else None
    return {
        "accuracy_sampled": sampled,
        "n": plain["n"],
        "accuracy": plain["accuracy"],
        "accuracy_explain": explained["accuracy"],
        "ci95": plain["ci95"],
        "ci95_explain": explained["ci95"],
    }


def evaluation_folder(recipe: RecipeConfig, stage: StageConfig, root: Path) -> Path:
    return root / stage.name / f"eval-{recipe.evaluation.split}"
