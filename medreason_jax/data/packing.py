"""Items into rows of a fixed length: first-fit, segment ids from 1, positions that restart.

T row length. Arrays of a row: tokens, targets (the next token of the same item), weights (1 where
the target counts), segments (0 is padding), positions.
"""

import random
from collections.abc import Sequence

import numpy as np

from medreason_jax.data.chat import Encoded

Row = dict[str, np.ndarray]
OPEN_ROWS = 64  # first-fit looks at this many rows: enough for 99 % filled, and linear time


def first_fit(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Item numbers of each row; items are taken in an order shuffled by `seed`."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    rows: list[list[int]] = []
    open_rows: list[tuple[list[int], int]] = []
    for item in order:
        for index, (row, free) in enumerate(open_rows):
            if lengths[item] <= free:
                row.append(item)
                open_rows[index] = (row, free - lengths[item])
                break
        else:
            row = [item]
            rows.append(row)
            open_rows.append((row, capacity - lengths[item]))
            if len(open_rows) > OPEN_ROWS:
                open_rows.remove(min(open_rows, key=lambda entry: entry[1]))
    return rows


def make_row(items: Sequence[Encoded], length: int, pad_id: int) -> Row:
    """One packed row; an item's last token predicts nothing."""
    row: Row = {
        "tokens": np.full(length, pad_id, np.int32),
        "targets": np.full(length, pad_id, np.int32),
        "weights": np.zeros(length, np.float32),
        "segments": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
    }
    at = 0
    for number, item in enumerate(items, start=1):
        n = len(item.ids)
        row["tokens"][at : at + n] = item.ids
        row["targets"][at : at + n - 1] = item.ids[1:]
        row["weights"][at : at + n - 1] = item.is_target[1:]
        row["segments"][at : at + n] = number
        row["positions"][at : at + n] = np.arange(n)
        at += n
    return row


def pack_items(items: Sequence[Encoded], length: int, pad_id: int, seed: int) -> list[Row]:
    """Rows that hold every item exactly once; each item is at most `length` long."""
    rows = first_fit([len(item.ids) for item in items], length, seed)
    return [make_row([items[i] for i in row], length, pad_id) for row in rows]


def pack_pairs(
    pairs: Sequence[tuple[Encoded, Encoded]], length: int, pad_id: int, per_row: int, seed: int
) -> list[Row]:
    """Rows of whole pairs: segment 2p+1 chosen, 2p+2 rejected; pairs [per_row] is 1 if present."""
    bins = first_fit([len(c.ids) + len(r.ids) for c, r in pairs], length, seed)
    full = [row[i : i + per_row] for row in bins for i in range(0, len(row), per_row)]
    rows = []
    for numbers in full:
        row = make_row([item for n in numbers for item in pairs[n]], length, pad_id)
        row["pairs"] = (np.arange(per_row) < len(numbers)).astype(np.float32)
        rows.append(row)
    return rows


def split_document(item: Encoded, length: int) -> list[Encoded]:
    """A document in pieces of `length`; each repeats the last token of the one before."""
    if len(item.ids) <= length:
        return [item]
    starts = range(0, len(item.ids) - 1, length - 1)
    return [Encoded(item.ids[s : s + length], item.is_target[s : s + length]) for s in starts]
