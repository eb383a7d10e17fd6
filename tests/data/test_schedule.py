"""Any row of a run is found by arithmetic; no source repeats or skips a row when weights change."""

import json
from collections import Counter

import grain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medreason_jax.data.schedule import Schedule, extend_schedule, start_schedule, whole_shares

SHARES = st.integers(1, 12)
WEIGHTS = st.sampled_from([0.0, 0.05, 0.25, 0.3, 0.7, 1.0, 2.5])


@st.composite
def changing_schedules(draw) -> tuple[Schedule, int]:
    """A schedule of up to four segments over two to four sources, and how many rows were read."""
    count = draw(st.integers(2, 4))
    weights = st.lists(WEIGHTS, min_size=count, max_size=count).filter(any)
    schedule, row = start_schedule(draw(weights)), 0
    for _ in range(draw(st.integers(0, 3))):
        row += draw(st.integers(0, 60))
        schedule = extend_schedule(schedule, draw(weights), row)
    return schedule, row + draw(st.integers(1, 60))


@given(changing_schedules())
@settings(max_examples=200, deadline=None)
def test_every_source_is_read_row_after_row_across_weight_changes(drawn):
    schedule, rows = drawn
    read: Counter[int] = Counter()
    for row in range(rows):
        assert schedule.offsets_at(row) == [read[s] for s in range(len(schedule.offsets_at(row)))]
        source, index = schedule.locate(row)
        assert index == read[source]
        read[source] += 1


@given(st.lists(SHARES, min_size=1, max_size=4), st.integers(0, 300))
@settings(max_examples=100, deadline=None)
def test_a_constant_mixture_is_that_of_grain(shares, rows):
    shares = [1, *shares]  # grain rounds shares to hundredths of the smallest
    streams = [
        grain.MapDataset.range(1).repeat().map_with_index(lambda i, _, s=s: (s, i))
        for s in range(len(shares))
    ]
    mixed = grain.MapDataset.mix(streams, weights=shares)
    schedule = start_schedule(shares)
    assert [schedule.locate(row) for row in range(rows)] == [mixed[row] for row in range(rows)]


@given(st.lists(WEIGHTS.filter(bool), min_size=2, max_size=4), st.integers(1, 10**12))
@settings(max_examples=100, deadline=None)
def test_weights_are_shares_of_rows_however_far_the_run_is(weights, rows):
    counts = start_schedule(weights).offsets_at(rows)
    assert sum(counts) == rows
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - rows * weight / sum(weights)) < len(weights)


def test_weights_count_as_they_are_written():
    assert whole_shares([0.1, 0.2]) == [1, 2]
    assert whole_shares([0.7, 0.3]) == [7, 3]
    assert whole_shares([0.0, 5.0]) == [0, 1]


def test_a_schedule_goes_through_json_unchanged():
    schedule = extend_schedule(start_schedule([0.3, 0.7]), [1, 1], 100)
    read = Schedule.model_validate(json.loads(json.dumps(schedule.model_dump())))
    assert read == schedule
    assert [read.locate(row) for row in range(200)] == [schedule.locate(row) for row in range(200)]


def test_going_on_with_the_same_weights_changes_nothing():
    schedule = start_schedule([3, 1])
    assert extend_schedule(schedule, [0.75, 0.25], 17) == schedule


def test_a_run_resumed_before_a_change_forgets_it():
    first = start_schedule([1, 1])
    changed = extend_schedule(first, [1, 3], 40)
    assert extend_schedule(changed, [1, 3], 60) == changed
    assert extend_schedule(changed, [1, 1], 24) == first
    again = extend_schedule(changed, [2, 1], 24)
    assert [segment.from_row for segment in again.segments] == [0, 24]
    assert again.segments[1].offsets == (12, 12)


def test_a_change_before_the_first_row_replaces_the_weights():
    changed = extend_schedule(start_schedule([1, 1]), [1, 3], 0)
    assert changed == start_schedule([1, 3])


def test_a_new_source_starts_at_its_first_row_and_none_may_vanish():
    grown = extend_schedule(start_schedule([1]), [1, 1], 10)
    assert grown.segments[1].offsets == (10, 0)
    with pytest.raises(ValueError, match="has 2 sources, now 1"):
        extend_schedule(grown, [1], 20)


@pytest.mark.parametrize("weights", [[], [0, 0], [3, -1], [float("inf"), 1], [float("nan")]])
def test_weights_that_share_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="weights="):
        start_schedule(weights)
