"""What a run says about itself: the models of summary.json, read by the report and the terminal.

Accuracies are shares in 0..1; the plain ones are of answers given at once, those with `_explain` of
answers given after an explanation. A stage that was not evaluated has none.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from medreason_jax.manifest import read_manifest

Interval = tuple[float, float]


class Scores(BaseModel):
    model_config = ConfigDict(extra="allow")

    n: int | None = None
    accuracy: float | None = None
    accuracy_explain: float | None = None
    accuracy_sampled: float | None = None  # explanations drawn at temperature 1
    ci95: Interval | None = None
    ci95_explain: Interval | None = None

    @property
    def evaluated(self) -> bool:
        return self.accuracy is not None or self.accuracy_explain is not None


class Stage(Scores):
    name: str
    seconds: float | None = None
    parts: dict[str, Scores] = {}
    control: bool = False  # run for comparison only


class Difference(BaseModel):
    """Of accuracies on the same n problems, with its paired bootstrap interval."""

    model_config = ConfigDict(extra="allow")

    n: int
    difference: float | None
    ci95: Interval | None

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.ci95 is not None and (self.ci95[0] > 0 or self.ci95[1] < 0)


class Comparison(Difference):
    """The accuracy of `stage` minus that of `against`."""

    stage: str
    against: str
    part: str
    form: str


class Gap(Difference):
    """Accuracy without explanation minus accuracy with it; `change` since the stage before."""

    stage: str
    change: Difference | None = None


class Summary(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str
    not_for_reporting: bool
    seed: int | None = None
    split: str | None = None  # the evaluated problems
    part: str | None = None  # the part of them that the headline is of
    stages: list[Stage]
    comparisons: list[Comparison] = []
    gaps: list[Gap] = []
    facts_recited: dict[str, dict[str, float]] = {}  # by stage, by part: share of the facts
    export: str | None = None
    report: str | None = None


@dataclass(frozen=True)
class ComparisonRow:
    """What a stage changed on one part, by form; `first` where the pair of stages is new."""

    stage: str
    against: str
    part: str
    by_form: dict[str, Comparison]
    first: bool


def comparison_rows(comparisons: Sequence[Comparison]) -> list[ComparisonRow]:
    """In the order in which they were made."""
    groups: dict[tuple[str, str, str], dict[str, Comparison]] = {}
    for each in comparisons:
        groups.setdefault((each.stage, each.against, each.part), {})[each.form] = each
    rows, before = [], None
    for (stage, against, part), by_form in groups.items():
        rows.append(ComparisonRow(stage, against, part, by_form, (stage, against) != before))
        before = stage, against
    return rows


def read_run(folder: Path) -> tuple[Summary, dict[str, Path]]:
    """The summary of a run, or of one stage by itself, and the folder of each stage by name."""
    path = folder / "summary.json"
    if path.exists():
        summary = Summary.model_validate(json.loads(path.read_text(encoding="utf-8")))
        return summary, {stage.name: folder / stage.name for stage in summary.stages}
    if not (folder / "metrics.jsonl").exists():
        raise ValueError(
            f"{folder} holds neither summary.json nor metrics.jsonl: give the folder of a run that "
            "finished, or of a stage"
        )
    name, finished = folder.resolve().name, read_manifest(folder)
    seconds = None if finished is None else finished["seconds"]
    stages = [Stage(name=name, seconds=seconds)]
    return Summary(name=name, not_for_reporting=False, stages=stages), {name: folder}


def format_questions(scores: Scores) -> str:
    return str(scores.n) if scores.evaluated and scores.n is not None else "–"


def format_share(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def format_interval(interval: Interval | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def format_points(share: float) -> str:
    """`+3.2`, in points of a percent."""
    return f"{100 * share:+.1f}"


def format_seconds(seconds: float | None) -> str:
    """`8.4 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
