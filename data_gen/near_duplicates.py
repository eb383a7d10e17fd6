"""Which questions belong together: one case series, one patient's note, one question twice?

Three marks bind questions to one group: the same first 64 characters; a shared stretch of at least
159 characters (some of 128 are found too), by winnowing (Schleimer et al. 2003); and sets of
5-character windows whose Jaccard similarity is `similarity` or more, found by MinHash with bands
(Broder 1997). Groups do not depend on the order of the questions.

W windows of joined texts, T texts.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from data_gen.records import content_id, hash_fraction
from data_gen.text_windows import (
    BREAK,
    all_window_hashes,
    bare_codes,
    crosses_break,
    squeeze,
    squeezed_codes,
)

SAME_START = 64  # characters
SAME_WINDOW = 128  # characters; longer than any common closing question
_SAMPLED_OF = 32  # of so many neighbouring windows at least one is a fingerprint; a power of 2
_SHINGLE = 5  # characters
_BANDS, _ROWS = 20, 4  # of similarity 0.7, one pair in 240 is missed; of 0.8, one in 30,000
_ALL_PAIRS = 32  # texts of one bucket; in a larger one each is compared with the first
_AT_ONCE = 1 << 21  # characters
_NONE = np.uint64(0xFFFFFFFFFFFFFFFF)


class Groups:
    """Sets of items that are joined one pair at a time; the smallest number stands for a set."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def of(self, item: int) -> int:
        """The smallest item of the set."""
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def join(self, one: int, other: int) -> None:
        """Make one set of two."""
        one, other = self.of(one), self.of(other)
        self._parent[max(one, other)] = min(one, other)


def find_groups(
    questions: Sequence[str], named: Sequence[str | None], similarity: float
) -> list[str]:
    """A group name for every question; `named` are the groups that the bank gives.

    Two questions of named groups are not compared, since the bank says that they are apart.
    """
    squeezed = [squeeze(question) for question in questions]
    order = sorted(range(len(squeezed)), key=lambda i: (squeezed[i], str(named[i])))
    texts, names = [squeezed[i] for i in order], [named[i] for i in order]
    groups = Groups(len(texts))
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        if name is not None:
            groups.join(first.setdefault(name, i), i)
    if None in names:
        _join_close(groups, texts, names, similarity)
    name_of = _name_sets(groups, texts, names)
    found = dict(zip(order, (name_of[groups.of(i)] for i in range(len(texts))), strict=True))
    return [found[i] for i in range(len(questions))]


def _join_close(
    groups: Groups, texts: Sequence[str], names: Sequence[str | None], similarity: float
) -> None:
    for bucket in [*_same_starts(texts), *_same_stretches(texts)]:
        free = [i for i in bucket if names[i] is None]
        for i in bucket if free else ():
            groups.join(free[0], i)
    shingles = _Shingles(texts)
    for one, other in _alike(texts):
        if names[one] is not None and names[other] is not None:
            continue
        if groups.of(one) != groups.of(other) and shingles.jaccard(one, other) >= similarity:
            groups.join(one, other)


def _name_sets(groups: Groups, texts: Sequence[str], names: Sequence[str | None]) -> dict[int, str]:
    """The first name in a set, else the hash of its first text."""
    found: dict[int, str] = {}
    for i, name in enumerate(names):
        root = groups.of(i)
        if name is not None:
            found[root] = min(found.get(root, name), name)
    for root in {groups.of(i) for i in range(len(texts))} - found.keys():
        found[root] = content_id({"question": texts[root]})
    return found


# --- shared stretches -------------------------------------------------------------------------


def _same_starts(texts: Sequence[str]) -> Iterator[list[int]]:
    buckets: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        buckets[text[:SAME_START]].append(i)
    return (bucket for bucket in buckets.values() if len(bucket) > 1)


def _same_stretches(texts: Sequence[str]) -> Iterator[list[int]]:
    """The texts that share a fingerprint."""
    prints, owners = [], []
    for start, batch in _batches(texts):
        hashes_W, text_W = _fingerprints(batch)
        prints.append(hashes_W)
        owners.append(text_W + start)
    if prints:
        yield from _buckets(np.concatenate(prints), np.concatenate(owners))


def _fingerprints(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hash, text) of the smallest hash of any 32 neighbouring windows."""
    codes_N = squeezed_codes(BREAK.join(texts))
    hashes_W = all_window_hashes(codes_N, SAME_WINDOW)
    if not len(hashes_W):
        return hashes_W, np.empty(0, np.int64)
    crossing_W = crosses_break(codes_N, SAME_WINDOW)
    hashes_W[crossing_W] = _NONE
    step = 1
    while step < _SAMPLED_OF:
        later = np.concatenate([hashes_W[step:], np.full(step, _NONE)])[: len(hashes_W)]
        hashes_W = np.minimum(hashes_W, later)
        step *= 2
    inside = np.flatnonzero(~crossing_W)
    text_W = np.searchsorted(np.flatnonzero(codes_N == ord(BREAK)), inside)
    return _once(hashes_W[inside], text_W)


def _once(keys: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each (key, text) once, by key and text."""
    order = np.lexsort((texts, keys))
    keys, texts = keys[order], texts[order]
    new = np.ones(len(keys), bool)
    new[1:] = (keys[1:] != keys[:-1]) | (texts[1:] != texts[:-1])
    return keys[new], texts[new]


def _buckets(keys: np.ndarray, texts: np.ndarray) -> Iterator[list[int]]:
    """The texts of every key that several have."""
    keys, texts = _once(keys, texts)
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)])
    ends = np.append(starts[1:], len(keys))
    several = ends - starts > 1
    for start, end in zip(starts[several], ends[several], strict=True):
        yield texts[start:end].tolist()


# --- similar sets of windows ------------------------------------------------------------------


class _Shingles:
    """The sets of short windows of texts, made when they are first compared."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._sets: dict[int, np.ndarray] = {}

    def jaccard(self, one: int, other: int) -> float:
        """Shared windows as a share of all."""
        first, second = self._of(one), self._of(other)
        shared = len(np.intersect1d(first, second, assume_unique=True))
        return shared / max(len(first) + len(second) - shared, 1)

    def _of(self, number: int) -> np.ndarray:
        if number not in self._sets:
            codes = bare_codes(self._texts[number])
            self._sets[number] = np.unique(all_window_hashes(codes, _SHINGLE))
        return self._sets[number]


def _alike(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of texts that share a band of their MinHash signatures."""
    numbers, signatures = [], []
    for start, batch in _batches(texts):
        kept, signature_TH = _signatures(batch)
        numbers.append(kept + start)
        signatures.append(signature_TH)
    if not numbers:
        return
    texts_T, signature_TH = np.concatenate(numbers), np.concatenate(signatures)
    factors = _odd_numbers("bands", _ROWS)
    for band in range(_BANDS):
        rows = signature_TH[:, band * _ROWS : (band + 1) * _ROWS]
        for bucket in _buckets((rows * factors).sum(axis=1, dtype=np.uint64), texts_T):
            if len(bucket) <= _ALL_PAIRS:
                yield from combinations(bucket, 2)
            else:
                yield from ((bucket[0], other) for other in bucket[1:])


def _signatures(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(number, MinHash signature) of the texts that have a window."""
    codes_N = bare_codes(BREAK.join(texts))
    hashes_W = all_window_hashes(codes_N, _SHINGLE)
    if not len(hashes_W):
        return np.empty(0, np.int64), np.empty((0, _BANDS * _ROWS), np.uint64)
    inside = np.flatnonzero(~crosses_break(codes_N, _SHINGLE))
    hashes_W = hashes_W[inside]
    text_W = np.searchsorted(np.flatnonzero(codes_N == ord(BREAK)), inside)
    kept, starts = np.unique(text_W, return_index=True)
    factors, terms = (_odd_numbers(name, _BANDS * _ROWS) for name in ("factors", "terms"))
    columns = [
        np.minimum.reduceat(hashes_W * factor + term, starts)
        for factor, term in zip(factors, terms, strict=True)
    ]
    return kept, np.stack(columns, axis=1)


def _odd_numbers(name: str, count: int) -> np.ndarray:
    """Numbers of 64 bits that stay the same with every version of numpy."""
    fractions = (hash_fraction("near duplicates", name, i) for i in range(count))
    return np.array([int(fraction * 2**64) | 1 for fraction in fractions], np.uint64)


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    """(number of the first, texts) of stretches of bounded length."""
    start, size = 0, 0
    for end, text in enumerate(texts, 1):
        size += len(text)
        if size >= _AT_ONCE or end == len(texts):
            yield start, texts[start:end]
            start, size = end, 0
