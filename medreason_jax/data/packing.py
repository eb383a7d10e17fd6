"""Items into rows of a fixed length: first-fit, segment ids from 1, positions that restart.

Items are taken in the order of `random.Random(seed).shuffle`. Each goes into the first of the open
rows that has room for it, or into a new row; of more than OPEN_ROWS the fullest is closed. Rows
stand in the order in which they were opened.

T row length. Arrays of a row: tokens, targets (the next token of the same item), weights (1 where
the target counts), segments (0 is padding), positions. An item's first token is never a target.
"""

import random
from collections.abc import Iterator, Sequence

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


def make_row(items: Sequence[Encoded], length: int, pad_id: int, *, reset: bool = True) -> Row:
    """One packed row; without `reset` its items are one segment, with the same targets."""
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
        row["segments"][at : at + n] = number if reset else 1
        row["positions"][at : at + n] = np.arange(n) if reset else np.arange(at, at + n)
        at += n
    return row


def pack_items(
    items: Sequence[Encoded], length: int, pad_id: int, seed: int, *, reset: bool = True
) -> Iterator[Row]:
    """Rows that hold every item exactly once; each item is at most `length` long."""
    for row in first_fit([len(item.ids) for item in items], length, seed):
        yield make_row([items[i] for i in row], length, pad_id, reset=reset)


def pack_pairs(
    items: Sequence[Encoded], length: int, pad_id: int, per_row: int, seed: int
) -> Iterator[Row]:
    """Rows of whole pairs, items 2p (chosen) and 2p+1 (rejected).

    In a row, segment 2p+1 is chosen and 2p+2 rejected; pairs [per_row] is 1 if present.
    """
    sizes = [len(item.ids) for item in items]
    bins = first_fit([c + r for c, r in zip(sizes[::2], sizes[1::2], strict=True)], length, seed)
    full = [row[i : i + per_row] for row in bins for i in range(0, len(row), per_row)]
    for numbers in full:
        pairs = [items[i] for n in numbers for i in (2 * n, 2 * n + 1)]
        row = make_row(pairs, length, pad_id)
        row["pairs"] = (np.arange(per_row) < len(numbers)).astype(np.float32)
        yield row


def split_document(item: Encoded, length: int) -> list[Encoded]:
    """A document in pieces of `length`; each repeats the last token of the one before.

    The repeated token is the first of its piece, which is no target: every token counts once.
    """
    if len(item.ids) <= length:
        return [item]
    starts = range(0, len(item.ids) - 1, length - 1)
    return [Encoded(item.ids[s : s + length], item.is_target[s : s + length]) for s in starts]
