"""The headline table of a run as text, for the terminal and the log."""

import io
from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from medreason_jax.report.summary import (
    Interval,
    Summary,
    format_interval,
    format_questions,
    format_seconds,
    format_share,
)


def format_score(share: float | None, interval: Interval | None) -> str:
    return (
        f"{format_share(share)} ({format_interval(interval)})" if interval else format_share(share)
    )


def stage_table(summary: Summary | Mapping[str, object], width: int = 100) -> str:
    """Stage by both accuracies with 95% intervals, number of questions and time, as plain text."""
    summary = Summary.model_validate(summary)
    title = [summary.name]
    if summary.part is not None:
        title.append(f"accuracy on {summary.part!r}")
    table = Table(box=box.SIMPLE_HEAD, title=", ".join(title), title_justify="left")
    table.add_column("stage")
    for heading in ("answer only", "explain, then answer", "sampled", "n", "time"):
        table.add_column(heading, justify="right")
    for stage in summary.stages:
        table.add_row(
            f"{stage.name} (control)" if stage.control else stage.name,
            format_score(stage.accuracy, stage.ci95),
            format_score(stage.accuracy_explain, stage.ci95_explain),
            format_share(stage.accuracy_sampled),
            format_questions(stage),
            format_seconds(stage.seconds),
        )
    if summary.not_for_reporting:
        table.caption = "Not for reporting, by its own recipe."
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"
