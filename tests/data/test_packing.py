"""Packing loses and doubles nothing."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from medreason_jax.data.chat import Encoded
from medreason_jax.data.packing import first_fit, make_row, pack_items, pack_pairs, split_document

PAD = 0


def documents(lengths: list[int]) -> list[Encoded]:
    """Documents in which no token stands twice, each ending with the separator."""
    starts = np.cumsum([1, *lengths[:-1]])
    texts = [[*range(s, s + n - 1), PAD] for s, n in zip(starts, lengths, strict=True)]
    return [Encoded(text, [True] * len(text)) for text in texts]


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_first_fit_places_every_item_once_within_capacity(lengths, seed):
    rows = first_fit(lengths, 50, seed)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= 50 for row in rows)


@given(st.lists(st.integers(2, 100), min_size=1, max_size=40), st.booleans(), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_every_token_of_every_document_is_predicted_once(lengths, reset, seed):
    """Also of documents longer than a row; only a document's first token is never predicted."""
    whole = documents(lengths)
    pieces = [piece for item in whole for piece in split_document(item, 32)]
    rows = list(pack_items(pieces, 32, PAD, seed, reset=reset))
    predicted = np.concatenate([row["targets"][row["weights"] > 0] for row in rows])
    assert sorted(predicted) == sorted(token for item in whole for token in item.ids[1:])
    used = sum((row["segments"] > 0).sum() for row in rows)
    assert used == sum(len(piece.ids) for piece in pieces)
    assert used == sum(lengths) + len(pieces) - len(whole)  # a cut repeats one token, uncounted
    for row in rows:  # a target is the next token of the same document
        at = np.flatnonzero(row["weights"])
        assert (row["targets"][at] == row["tokens"][at + 1]).all()
        assert (row["segments"][at] == row["segments"][at + 1]).all()


@given(st.lists(st.integers(2, 20), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_rows_without_a_reset_differ_in_segments_and_positions_only(lengths):
    items = documents(lengths)
    alone = pack_items(items, 32, PAD, seed=1)
    joined = pack_items(items, 32, PAD, seed=1, reset=False)
    for restarting, going_on in zip(alone, joined, strict=True):
        for name in ("tokens", "targets", "weights"):
            assert (restarting[name] == going_on[name]).all()
        used = int((restarting["segments"] > 0).sum())
        assert (going_on["segments"] == [1] * used + [0] * (32 - used)).all()
        assert (going_on["positions"] == [*range(used)] + [0] * (32 - used)).all()
        starts = restarting["positions"][:used] == 0
        assert starts.sum() == restarting["segments"].max()
        assert (restarting["segments"][:used] == np.cumsum(starts)).all()


def test_an_item_counts_only_what_it_marks():
    row = make_row([Encoded([7, 8, 9], [False, False, True])], 5, PAD)
    assert row["weights"].tolist() == [0, 1, 0, 0, 0]
    assert row["targets"].tolist() == [8, 9, PAD, PAD, PAD]


def test_pairs_stand_as_neighbouring_segments():
    item = lambda n: Encoded([5] * n, [True] * n)  # noqa: E731
    rows = list(pack_pairs([item(3), item(4)] * 5, 20, PAD, per_row=2, seed=0))
    assert sum(row["pairs"].sum() for row in rows) == 5
    first = rows[0]
    assert [int((first["segments"] == s).sum()) for s in (1, 2, 3, 4)] == [3, 4, 3, 4]


def test_a_split_document_predicts_every_token_once():
    pieces = split_document(Encoded(list(range(100)), [True] * 100), 33)
    predicted = [token for piece in pieces for token in piece.ids[1:]]
    assert predicted == list(range(1, 100))
