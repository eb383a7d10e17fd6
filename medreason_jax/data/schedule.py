"""Which row of which source is row i of a run: arithmetic, so that any row is found at once.

A schedule is a list of segments. In a segment, sources are interleaved by their weights (shares of
rows); changing the weights appends a segment in which each source goes on where it stopped, which
`grain.MapDataset.mix` alone cannot do. Row n of a source is row n of its epochs, end to end: each
of its rows is seen once an epoch, whatever happens to the weights.
"""

import bisect
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property

from pydantic import BaseModel, ConfigDict


def interleave(shares: Sequence[int], row: int) -> tuple[int, int]:
    """(source, row of the source) of row `row` of a mixture by `shares`.

    The sources are split off one after another: of the first k of the rows that are left over,
    source s takes k - ⌊k · rest / (share + rest)⌋.
    """
    rest, before, after = sum(shares), row, row + 1
    for source, share in enumerate(shares):
        left_before = before * (rest - share) // rest
        left_after = after * (rest - share) // rest
        if after - left_after > before - left_before:
            return source, before - left_before
        rest, before, after = rest - share, left_before, left_after
    raise AssertionError("the shares add up to nothing")


def taken(shares: Sequence[int], rows: int) -> list[int]:
    """How many of the first `rows` of a mixture are each source's."""
    rest, counts = sum(shares), []
    for share in shares:
        left = rows * (rest - share) // rest if rest else 0
        counts.append(rows - left)
        rest, rows = rest - share, left
    return counts


def whole_shares(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the proportions of the weights, as they are written."""
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    shares = [int(fraction * scale) for fraction in fractions]
    return [share // math.gcd(*shares) for share in shares]


class Segment(BaseModel):
    """From row `from_row` on: sources by `weights`, each starting at its row of `offsets`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    from_row: int
    weights: tuple[float, ...]
    offsets: tuple[int, ...]

    @cached_property
    def shares(self) -> list[int]:
        return whole_shares(self.weights)


class Schedule(BaseModel):
    """Segments by their first row; goes through JSON with `model_dump` and `model_validate`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    segments: tuple[Segment, ...]

    @cached_property
    def _starts(self) -> list[int]:
        return [segment.from_row for segment in self.segments]

    def locate(self, row: int) -> tuple[int, int]:
        """(source, row of the source) of row `row` of the run."""
        segment = self.segments[bisect.bisect_right(self._starts, row) - 1]
        source, number = interleave(segment.shares, row - segment.from_row)
        return source, segment.offsets[source] + number

    def offsets_at(self, row: int) -> list[int]:
        """The next row of each source, when `row` rows of the run are behind."""
        segment = self.segments[bisect.bisect_right(self._starts, row) - 1]
        counts = taken(segment.shares, row - segment.from_row)
        return [first + count for first, count in zip(segment.offsets, counts, strict=True)]


def start_schedule(weights: Sequence[float]) -> Schedule:
    _check(weights)
    first = Segment(from_row=0, weights=tuple(weights), offsets=(0,) * len(weights))
    return Schedule(segments=(first,))


def extend_schedule(schedule: Schedule, weights: Sequence[float], row: int) -> Schedule:
    """The schedule of a run that goes on at `row` with `weights`; the same one if they are its own.

    Segments that `row` lies before never took place and are dropped. New sources stand last.
    """
    _check(weights)
    kept = tuple(s for s in schedule.segments if s.from_row < row or s.from_row == 0)
    added = len(weights) - len(kept[-1].weights)
    if added < 0:
        raise ValueError(
            f"the run has {len(kept[-1].weights)} sources, now {len(weights)}; a source that is no "
            "longer wanted keeps its place"
        )
    if added == 0 and whole_shares(weights) == kept[-1].shares:
        return Schedule(segments=kept)
    offsets = (*Schedule(segments=kept).offsets_at(row), *(0,) * added)
    last = Segment(from_row=row, weights=tuple(weights), offsets=offsets)
    return Schedule(segments=(*kept, last) if row > 0 else (last,))


def _check(weights: Sequence[float]) -> None:
    if not weights or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(
            f"weights={list(weights)}: give each source 0 or more, and one more than 0"
        )
