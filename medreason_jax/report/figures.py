"""Figures of the report, as SVG that follows the page's light or dark colours.

matplotlib knows no CSS variables: figures are drawn in stand-in colours, replaced afterwards.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from medreason_jax.report.summary import Stage

INK, GRID = "#010101", "#020202"
SERIES = ("#030301", "#030302", "#030303", "#030304", "#030305", "#030306")
CSS = {INK: "currentColor", GRID: "var(--grid)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(SERIES, 1)
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be searched
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    **{name: INK for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")},
    "axes.edgecolor": GRID,
}
MOST_POINTS = 500


@dataclass(frozen=True)
class Panel:
    """A curve to draw: the columns whose name holds all `words` and none of `without`."""

    title: str
    unit: str
    words: frozenset[str]
    without: frozenset[str] = frozenset()
    percent: bool = False
    perplexity: bool = False  # of a column that holds a loss


PANELS = (
    Panel("Loss", "loss (nats)", frozenset({"loss"}), frozenset({"held"})),
    Panel("Held-out perplexity", "perplexity", frozenset({"held", "loss"}), perplexity=True),
    Panel("Reward", "mean reward (0 to 1)", frozenset({"reward"})),
    Panel(
        "KL",
        "KL to the reference (nats a reply)",
        frozenset({"kl"}),
        frozenset({"coef", "target", "approx"}),
    ),
    Panel("KL of the update", "approximate KL (nats a token)", frozenset({"approx", "kl"})),
    Panel("Dev accuracy", "correct (%)", frozenset({"dev", "accuracy"}), percent=True),
)

Row = dict[str, object]
Curve = tuple[list[float], list[float]]


def read_column(rows: Sequence[Row], column: str) -> Curve:
    steps, values = [], []
    for row in rows:
        step, value = row["step"], row[column] if column in row else None
        if isinstance(step, int | float) and isinstance(value, int | float):
            if math.isfinite(value):
                steps.append(float(step))
                values.append(float(value))
    return steps, values


def matching_columns(panel: Panel, rows: Sequence[Row]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    words = {column: set(re.split(r"[^a-z0-9]+", column.lower())) for column in columns}
    return [c for c in columns if panel.words <= words[c] and not panel.without & words[c]]


def read_panel(panel: Panel, rows: Sequence[Row]) -> dict[str, Curve]:
    """The panel's curves by column, without those that have no point."""
    curves = {c: read_column(rows, c) for c in matching_columns(panel, rows)[: len(SERIES)]}
    curves = {column: curve for column, curve in curves.items() if curve[0]}
    if panel.perplexity:
        curves = {c: (steps, [math.exp(v) for v in loss]) for c, (steps, loss) in curves.items()}
    return curves


def thin_out(curve: Curve) -> Curve:
    """Means over equal runs of points, at most MOST_POINTS of them."""
    steps, values = curve
    width = math.ceil(len(steps) / MOST_POINTS)
    starts = range(0, len(steps), max(width, 1))
    return (
        [sum(steps[s : s + width]) / len(steps[s : s + width]) for s in starts],
        [sum(values[s : s + width]) / len(values[s : s + width]) for s in starts],
    )


def moving_mean(values: Sequence[float], half: int) -> list[float]:
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def render(figure: Figure, label: str) -> str:
    """SVG to put into HTML: no prologue, no metadata, ids of its own, the page's colours."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.05)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for colour, css in CSS.items():
        svg = svg.replace(colour, css)
    # matplotlib numbers its groups anew in every figure; nothing refers to them
    svg = re.sub(r'<g id="[A-Za-z][\w.]*_\d+">', "<g>", svg)
    return re.sub(r"font: ?([\d.]+)px [^;\"]*", r"font-size: \1px", svg)


def draw_curve(axes: Axes, curve: Curve, colour: str, label: str) -> None:
    steps, values = thin_out(curve)
    if len(steps) < 40:
        axes.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=3, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
    mean = moving_mean(values, half=max(2, len(values) // 50))
    axes.plot(steps, mean, color=colour, linewidth=1.8, label=label)


def draw_panel(stage: str, panel: Panel, rows: Sequence[Row]) -> str | None:
    """SVG of the panel's columns over the steps of a stage; None where it has none of them."""
    curves = read_panel(panel, rows)
    if not curves:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.7))
        axes = figure.add_subplot()
        for colour, (column, curve) in zip(SERIES, curves.items(), strict=False):
            draw_curve(axes, curve, colour, column)
        if panel.perplexity:
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(panel.unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        first, last = axes.dataLim.intervalx
        if first == last:  # one point: a step on either side, not a hundredth
            axes.set_xlim(first - 1, last + 1)
        if panel.percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=9)
        return render(figure, f"{stage} {panel.title}")


def label_shares(axes: Axes, rows: Sequence[str], label: str, most: float) -> None:
    """Named rows from the top down, shares to the right in percent, the legend above."""
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, most)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
    axes.set_xlabel(label)
    axes.grid(visible=False, axis="y")
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def draw_accuracies(stages: Sequence[Stage]) -> str | None:
    """SVG of both accuracies of every evaluated stage with their 95% intervals."""
    stages = [stage for stage in stages if stage.evaluated]
    if not stages:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.9 + 0.5 * len(stages)))
        axes = figure.add_subplot()
        forms = (
            ("answer only", -0.12, [(s.accuracy, s.ci95) for s in stages]),
            ("explain, then answer", 0.12, [(s.accuracy_explain, s.ci95_explain) for s in stages]),
        )
        for colour, (label, shift, scores) in zip(SERIES, forms, strict=False):
            known = [(y + shift, v, ci) for y, (v, ci) in enumerate(scores) if v is not None]
            axes.plot(
                [v for _, v, _ in known], [y for y, _, _ in known], "o", color=colour, label=label
            )
            for y, _, interval in known:
                if interval is not None:
                    axes.plot(interval, [y, y], color=colour, linewidth=1.6)
        label_shares(axes, [stage.name for stage in stages], "correct (%), with 95% intervals", 1.0)
        return render(figure, "accuracies")


def draw_facts(recited: dict[str, dict[str, float]]) -> str | None:
    """SVG: the share of facts that each stage's explanations recite right, a bar a part."""
    if not recited:
        return None
    parts = list(dict.fromkeys(part for shares in recited.values() for part in shares))
    height = 0.8 / max(len(parts), 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.9 + 0.6 * len(recited)))
        axes = figure.add_subplot()
        for number, (colour, part) in enumerate(zip(SERIES, parts, strict=False)):
            rows = [(y, s[part]) for y, s in enumerate(recited.values()) if part in s]
            shift = (number + 0.5) * height - 0.4
            places, shares = [y + shift for y, _ in rows], [share for _, share in rows]
            axes.barh(places, shares, height * 0.9, color=colour, label=part.replace("_", " "))
            for y, share in zip(places, shares, strict=True):
                axes.text(share + 0.01, y, f"{100 * share:.0f}", va="center", fontsize=8)
        label_shares(axes, list(recited), "facts recited right (%)", 1.08)
        return render(figure, "facts recited")
