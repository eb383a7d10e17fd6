"""Packing loses and doubles nothing."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from medreason_jax.data.chat import Encoded
from medreason_jax.data.packing import first_fit, pack_items, pack_pairs, split_document


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_first_fit_places_every_item_once_within_capacity(lengths, seed):
    rows = first_fit(lengths, 50, seed)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= 50 for row in rows)


@given(st.lists(st.integers(2, 20), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_packed_rows_hold_each_token_once(lengths):
    items, start = [], 1
    for n in lengths:
        items.append(Encoded(list(range(start, start + n)), [True] * n))
        start += n
    rows = pack_items(items, 32, 0, seed=0)
    tokens = np.concatenate([row["tokens"][row["segments"] > 0] for row in rows])
    assert sorted(tokens) == list(range(1, start))
    assert sum(row["weights"].sum() for row in rows) == sum(n - 1 for n in lengths)
    for row in rows:  # a target is the next token of the same item
        counted = np.flatnonzero(row["weights"])
        assert (row["targets"][counted] == row["tokens"][counted + 1]).all()
        assert (row["segments"][counted] == row["segments"][counted + 1]).all()


def test_pairs_stand_as_neighbouring_segments():
    item = lambda n: Encoded([5] * n, [True] * n)  # noqa: E731
    rows = pack_pairs([(item(3), item(4))] * 5, 20, 0, per_row=2, seed=0)
    assert sum(row["pairs"].sum() for row in rows) == 5
    first = rows[0]
    assert [int((first["segments"] == s).sum()) for s in (1, 2, 3, 4)] == [3, 4, 3, 4]


def test_a_split_document_predicts_every_token_once():
    pieces = split_document(Encoded(list(range(100)), [True] * 100), 33)
    predicted = [token for piece in pieces for token in piece.ids[1:]]
    assert predicted == list(range(1, 100))
