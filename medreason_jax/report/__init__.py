"""The report of a run, or of one stage: a static HTML file without external resources.

Read from the run's folder, everything optional except the first (a stage's own folder has none):

    summary.json                      stages with accuracies, intervals and times (summary.py)
    <stage>/metrics.jsonl             {"step", "loss", "learning_rate", … any number}
    <stage>/eval-<split>/predictions.jsonl   replies to the evaluation's questions (samples.py)
    data/report.json                  nested counts of data generation (acceptance.py)
    data/generated/review/result.json how far people agree with its verifier
    recipe.resolved.yaml              shown as it is; of a stage its config.yaml
"""

import json
import os
from pathlib import Path

import jinja2

from medreason_jax.report.acceptance import find_tiles, tabulate_counts
from medreason_jax.report.figures import PANELS, draw_accuracies, draw_facts, draw_panel
from medreason_jax.report.jsonl import read_rows
from medreason_jax.report.samples import FORMS, collect_samples, read_predictions
from medreason_jax.report.summary import (
    comparison_rows,
    format_interval,
    format_points,
    format_questions,
    format_seconds,
    format_share,
    read_run,
)

__all__ = ["render_report", "write_report"]


def render_report(run_dir: Path) -> str:
    """HTML of the run's report."""
    summary, folders = read_run(run_dir)
    evaluation = "eval" if summary.split is None else f"eval-{summary.split}"
    curves = {}
    for name, folder in folders.items():
        rows = read_rows(folder / "metrics.jsonl")
        drawn = {panel.title: draw_panel(name, panel, rows) for panel in PANELS}
        curves[name] = {title: svg for title, svg in drawn.items() if svg is not None}
    data_path = run_dir / "data" / "report.json"
    counts = json.loads(data_path.read_text(encoding="utf-8")) if data_path.exists() else {}
    review_path = run_dir / "data" / "generated" / "review" / "result.json"
    if review_path.exists():
        counts["review"] = json.loads(review_path.read_text(encoding="utf-8"))
    texts = (run_dir / name for name in ("recipe.resolved.yaml", "config.yaml"))
    recipe = next((path.read_text(encoding="utf-8") for path in texts if path.exists()), None)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "share": format_share,
        "interval": format_interval,
        "points": format_points,
        "seconds": format_seconds,
        "questions": format_questions,
    }
    return environment.get_template("report.html.j2").render(
        summary=summary,
        parts=list(dict.fromkeys(part for stage in summary.stages for part in stage.parts)),
        accuracies=draw_accuracies(summary.stages),
        comparisons=comparison_rows(summary.comparisons),
        facts=draw_facts(summary.facts_recited),
        forms=FORMS,
        curves={name: drawn for name, drawn in curves.items() if drawn},
        tiles=list(find_tiles(counts)),
        tables=tabulate_counts(counts),
        samples=collect_samples(
            {
                name: read_predictions(folder / evaluation / "predictions.jsonl")
                for name, folder in folders.items()
            }
        ),
        recipe=recipe,
    )


def write_report(run_dir: Path) -> Path:
    """Write report/index.html in the run's folder, whole or not at all; returns its path."""
    html = render_report(run_dir)
    path = run_dir / "report" / "index.html"
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_name(f".index.html.{os.getpid()}")
    unfinished.write_text(html, encoding="utf-8")
    unfinished.replace(path)
    return path
