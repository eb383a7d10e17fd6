"""Which training texts hold an evaluation item?

Texts share a window when `window` consecutive characters are equal after normalisation (64, the
rule of Med-PaLM 2). Rule "paper" drops a text for one shared window. Rule "coverage" drops it when
the windows shared with one item cover `coverage` of the shorter of both texts, so that a common
phrase costs nothing. Both look at the squeezed texts and at their letters and digits alone, so
that other spacing or punctuation hides nothing. A text shorter than a window has none, and two
texts shorter than two windows are too easily one template with two names ("coverage" only): such
a text is dropped only if its question and answer are those of an item.

W windows of a text that an item has too, P places of such windows in the items.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from data_gen.text_windows import (
    BREAK,
    Codes,
    WindowIndex,
    bare_codes,
    bare_key,
    squeeze,
    squeezed_codes,
)

Rule = Literal["coverage", "paper"]
BATCH_CHARACTERS = 1 << 18
_MOST_LONGER = 4  # times the longest item, spacing and punctuation included
COMMON = 30  # a window that stands in more places is looked at only where it can decide


class Item(NamedTuple):
    """An evaluation item: its question and its answer ("" where it has none)."""

    question: str
    answer: str = ""


class Hit(NamedTuple):
    """The evaluation item that a text holds, and how."""

    item: int
    how: Literal["equal", "window", "coverage"]
    covered: float


class Finding(NamedTuple):
    """What each rule says of a text; None where it says nothing."""

    equal: Hit | None = None
    window: Hit | None = None
    coverage: Hit | None = None

    def by(self, rule: Rule) -> Hit | None:
        """The reason to drop the text under a rule."""
        found = self.window if rule == "paper" else self.coverage
        return found if self.equal is None else self.equal


CLEAN = Finding()


class Decontaminator:
    """An index of the windows of all evaluation items; it counts what it finds."""

    def __init__(
        self,
        items: Iterable[Item],
        rule: Rule = "coverage",
        window: int = 64,
        coverage: float = 0.3,
    ) -> None:
        self.rule: Rule = rule
        self.items = list(items)
        # `short_items` cannot be found inside a longer text, only as a whole question.
        self.counts = {"texts": 0, "equal": 0, "paper": 0, "coverage": 0}
        texts = [squeeze(item.question) for item in self.items]
        self._longest = max(map(len, texts), default=0)
        self.short_items = sum(len(text) < window for text in texts)
        self._equal: dict[tuple[str, bytes], int] = {}
        for number, (text, item) in enumerate(zip(texts, self.items, strict=True)):
            self._equal.setdefault((_spaceless(item.answer), bare_key(text)), number)
        self._answers = {answer for answer, _ in self._equal}
        readings: list[Callable[[str], Codes]] = [squeezed_codes, bare_codes]
        self._views = [_View(texts, read, window, coverage) for read in readings]

    def find(self, text: str, answer: str = "") -> Hit | None:
        """The evaluation item for which the rule drops a text; None for a clean text."""
        return self.look([Item(text, answer)])[0].by(self.rule)

    def look(self, texts: Iterable[Item]) -> list[Finding]:
        """What both rules say of every text."""
        findings: list[Finding] = []
        for batch in _batches(texts):
            squeezed = [squeeze(text.question) for text in batch]
            joined = BREAK.join(squeezed)
            sizes = np.array([len(text) for text in squeezed])
            first, second = (view.look(joined, sizes) for view in self._views)
            for number, text in enumerate(batch):
                equal = self._find_equal(squeezed[number], text.answer)
                merged = _merge(first.get(number, CLEAN), second.get(number, CLEAN), equal)
                findings.append(merged)
                self._count(merged)
        return findings

    def _find_equal(self, squeezed: str, answer: str) -> Hit | None:
        """The evaluation item with this question and this answer, whatever their spacing."""
        answer = _spaceless(answer)
        if answer not in self._answers or len(squeezed) > _MOST_LONGER * self._longest:
            return None
        same = self._equal.get((answer, bare_key(squeezed)))
        return None if same is None else Hit(same, "equal", 1.0)

    def commonest(self, count: int) -> dict[str, int]:
        """The windows that most of the texts looked at shared with an item, and how many texts;
        overlaps left out."""
        return self._views[0].commonest([item.question for item in self.items], count)

    def _count(self, finding: Finding) -> None:
        self.counts["texts"] += 1
        self.counts["equal"] += finding.equal is not None
        self.counts["paper"] += finding.by("paper") is not None
        self.counts["coverage"] += finding.by("coverage") is not None


class _View:
    """The windows of all items in one reading of the texts."""

    def __init__(
        self, texts: list[str], read: Callable[[str], Codes], window: int, coverage: float
    ) -> None:
        self._read = read
        self._window = window
        self._coverage = coverage
        index = self._index = WindowIndex(BREAK.join(texts), read, window)
        self._sizes = np.array([len(text) for text in texts])  # before reading
        self._starts = np.append(0, index.breaks + 1)
        self._lengths = np.append(index.breaks, index.length) - self._starts
        self._item_P = np.searchsorted(index.breaks, index.positions)
        self._start_P = index.positions - self._starts[self._item_P]
        counts_U = np.diff(index.bounds)
        self._is_common = counts_U > COMMON
        self._texts_with = np.zeros(len(counts_U), np.int64)
        self._marked_U = np.zeros(len(counts_U), bool)  # all false between two uses
        common_P = np.repeat(self._is_common, counts_U)
        self._common_cover = self._cover_by_item(np.flatnonzero(common_P))
        heavy = self._common_cover >= coverage * np.maximum(self._lengths, 1)
        self._decisive = np.flatnonzero(~common_P | heavy[self._item_P])
        kept = np.append(0, np.cumsum(~common_P | heavy[self._item_P]))
        self._decisive_bounds = kept[index.bounds]

    def look(self, joined: str, sizes: np.ndarray) -> dict[int, Finding]:
        """What the rules say, by the number of the text among the joined ones of these sizes."""
        codes_N = self._read(joined)
        starts_W, numbers_W = self._index.find(codes_N)
        if not len(starts_W):
            return {}
        breaks = np.flatnonzero(codes_N == ord(BREAK))
        begins = np.append(0, breaks + 1)
        lengths = np.append(breaks, len(codes_N)) - begins
        text_W = np.searchsorted(breaks, starts_W)
        starts_W = starts_W - begins[text_W]
        self._count(text_W, numbers_W)
        texts, cuts = np.unique(text_W, return_index=True)
        firsts = np.minimum.reduceat(self._item_P[self._index.bounds[numbers_W]], cuts)
        slices = dict(zip(texts.tolist(), _slices(cuts, len(text_W)), strict=True))
        promising: dict[int, list[int]] = {}
        for text, item in self._promising(text_W, starts_W, numbers_W, lengths):
            if max(sizes[text], self._sizes[item]) >= 2 * self._window:
                promising.setdefault(text, []).append(item)
        found = {}
        for (text, part), first in zip(slices.items(), firsts.tolist(), strict=True):
            shared = starts_W[part], numbers_W[part], int(lengths[text])
            finding = self._judge(first, promising.get(text, []), *shared)
            if finding.coverage is None:
                wide = self._widely_shared(*shared)
                wide = [i for i in wide if max(sizes[text], self._sizes[i]) >= 2 * self._window]
                finding = self._judge(first, wide, *shared)
            found[text] = finding
        return found

    def commonest(self, questions: Sequence[str], count: int) -> dict[str, int]:
        """The windows that most texts held, most frequent first."""
        chosen: dict[str, int] = {}
        half = self._window // 2
        order = np.argsort(-self._texts_with, kind="stable")
        for number in order[: 200 * count]:
            if len(chosen) == count or not self._texts_with[number]:
                break
            place = self._index.bounds[number]
            start = self._start_P[place]
            piece = squeeze(questions[int(self._item_P[place])])[start : start + self._window]
            if not any(piece[:half] in other or piece[-half:] in other for other in chosen):
                chosen[piece] = int(self._texts_with[number])
        return chosen

    def _count(self, text_W: np.ndarray, numbers_W: np.ndarray) -> None:
        different = np.unique(text_W * len(self._texts_with) + numbers_W)
        numbers, times = np.unique(different % len(self._texts_with), return_counts=True)
        self._texts_with[numbers] += times

    def _judge(
        self,
        first: int,
        candidates: Iterable[int],
        starts_W: np.ndarray,
        numbers_W: np.ndarray,
        length: int,
    ) -> Finding:
        window = Hit(first, "window", self._covered(first, starts_W, numbers_W, length))
        for item in candidates:
            covered = self._covered(item, starts_W, numbers_W, length)
            if covered >= self._coverage:
                return Finding(window=window, coverage=Hit(item, "coverage", covered))
        return Finding(window=window)

    def _covered(
        self, item: int, starts_W: np.ndarray, numbers_W: np.ndarray, length: int
    ) -> float:
        """The share of the shorter of text and item that their shared windows cover."""
        there = self._lengths[item]
        start = self._starts[item]
        own = self._index.number_at[start : start + there - self._window + 1]
        if length <= there:
            shared = starts_W[self._are_among(numbers_W, own)]
        else:
            shared = np.flatnonzero(self._are_among(own, numbers_W))
        return self._cover(shared) / max(int(min(length, there)), 1)

    def _are_among(self, numbers: np.ndarray, others: np.ndarray) -> np.ndarray:
        """As `np.isin`, which sorts, in time that only the two lengths count for."""
        self._marked_U[others] = True
        found = self._marked_U[numbers]
        self._marked_U[others] = False
        return found

    def _promising(
        self,
        text_W: np.ndarray,
        starts_W: np.ndarray,
        numbers_W: np.ndarray,
        lengths: np.ndarray,
    ) -> list[tuple[int, int]]:
        """(text, item) that may share enough, the likeliest first: by the decisive places and what
        the common windows of text or item could add at most."""
        bounds = self._decisive_bounds
        places = self._decisive[_ranges(bounds, numbers_W)]
        if not len(places):
            return []
        counts_W = bounds[numbers_W + 1] - bounds[numbers_W]
        pair_P = np.repeat(text_W * len(self._lengths), counts_W) + self._item_P[places]
        there_P, here_P = self._start_P[places], np.repeat(starts_W, counts_W)
        pairs, here = _cover_by(pair_P, here_P, self._window)
        _, there = _cover_by(pair_P, there_P, self._window)
        texts, items = np.divmod(pairs, len(self._lengths))
        common_W = self._is_common[numbers_W]
        common = np.zeros(len(lengths))
        numbers, covered = _cover_by(text_W[common_W], starts_W[common_W], self._window)
        common[numbers] = covered
        own, other = lengths[texts], self._lengths[items]
        shared = np.where(own <= other, here + common[texts], there + self._common_cover[items])
        may = shared >= self._coverage * np.minimum(own, other)
        best_first = np.flatnonzero(may)[np.argsort(-shared[may], kind="stable")]
        return list(zip(texts[best_first].tolist(), items[best_first].tolist(), strict=True))

    def _widely_shared(self, starts_W: np.ndarray, numbers_W: np.ndarray, length: int) -> list[int]:
        """For a text that common windows alone cover well, the items no shorter than it that have
        enough of these."""
        common_W = self._is_common[numbers_W]
        starts_W, numbers_W = starts_W[common_W], numbers_W[common_W]
        if self._cover(starts_W) < max(self._coverage * length, 1):
            return []
        bounds = self._index.bounds
        items = self._item_P[_ranges(bounds, numbers_W)]
        starts = np.repeat(starts_W, bounds[numbers_W + 1] - bounds[numbers_W])
        items, covered = _cover_by(items, starts, self._window)
        may = (covered >= self._coverage * length) & (self._lengths[items] >= length)
        return items[may].tolist()

    def _cover_by_item(self, places: np.ndarray) -> np.ndarray:
        """How many characters of every item the windows at these places cover."""
        items, covered = _cover_by(self._item_P[places], self._start_P[places], self._window)
        whole = np.zeros(len(self._lengths), np.int64)
        whole[items] = covered
        return whole

    def _cover(self, starts: np.ndarray) -> int:
        """How many characters windows at these starts, in order, cover."""
        if not len(starts):
            return 0
        return int(np.minimum(np.diff(starts), self._window).sum()) + self._window


def _cover_by(
    keys_P: np.ndarray, starts_P: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """(key, characters that the windows at its starts cover) of every key, in order."""
    if not len(keys_P):
        return keys_P, np.empty(0, np.int64)
    order = np.lexsort((starts_P, keys_P))
    keys_P, starts_P = keys_P[order], starts_P[order]
    added = np.minimum(np.diff(starts_P, prepend=0), window)
    new = np.ones(len(keys_P), bool)
    new[1:] = keys_P[1:] != keys_P[:-1]
    added[new] = window
    begins = np.flatnonzero(new)
    return keys_P[begins], np.add.reduceat(added, begins)


def _ranges(bounds: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The indices bounds[n] … bounds[n + 1] - 1 of every number n, one after the other."""
    counts = bounds[numbers + 1] - bounds[numbers]
    offsets = np.repeat(bounds[numbers] - np.append(0, np.cumsum(counts)[:-1]), counts)
    return offsets + np.arange(len(offsets))


def _slices(cuts: np.ndarray, end: int) -> list[slice]:
    bounds = [*cuts.tolist(), end]
    return [slice(a, b) for a, b in pairwise(bounds)]


def _merge(first: Finding, second: Finding, equal: Hit | None) -> Finding:
    window = first.window if first.window is not None else second.window
    coverage = first.coverage
    if coverage is None or (second.coverage and second.coverage.covered > coverage.covered):
        coverage = second.coverage
    return Finding(equal, window, coverage)


def _batches(texts: Iterable[Item]) -> Iterator[list[Item]]:
    """Stretches of about as many characters as are looked at together."""
    batch: list[Item] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.question)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _spaceless(answer: str) -> str:
    """An answer whatever its spacing; its signs count."""
    return squeeze(answer).replace(" ", "")
