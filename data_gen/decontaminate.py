"""Which training texts hold an evaluation item?

Texts share a window when `window` consecutive characters are equal after normalisation (64, the
rule of Med-PaLM 2). Rule "paper" drops a text for one shared window. Rule "coverage" drops it when
the windows shared with one item cover `coverage` of the shorter of both texts, so that a common
phrase costs nothing. A text shorter than a window has none, and two texts shorter than two windows
are too easily one template with two names ("coverage" only): such a text is dropped only if its
question and answer are those of an item.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal, NamedTuple


class Item(NamedTuple):
    """An evaluation item: its question and its answer ("" where it has none)."""

    question: str
    answer: str = ""


class Hit(NamedTuple):
    """The evaluation item that a text holds, and how."""

    item: int
    how: Literal["equal", "window", "coverage"]
    covered: float


class Decontaminator:
    """An index of the windows of all evaluation items."""

    def __init__(
        self,
        items: Iterable[Item],
        rule: Literal["coverage", "paper"] = "coverage",
        window: int = 64,
        coverage: float = 0.3,
    ) -> None:
        self._rule = rule
        self._window = window
        self._coverage = coverage
        self._texts: list[str] = []
        self._equal: dict[tuple[str, str], int] = {}
        self._places: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for item in items:
            self._add(item)

    def find(self, text: str, answer: str = "") -> Hit | None:
        """The first evaluation item that the text holds; None for a clean text."""
        equal = self.find_equal(text, answer)
        if equal is not None:
            return equal
        text = squeeze(text)
        shared = self._shared_windows(text)
        if self._rule == "paper":
            return Hit(min(shared), "window", self._covered(text, shared)) if shared else None
        for item, places in sorted(shared.items()):
            if max(len(text), len(self._texts[item])) < 2 * self._window:
                continue
            covered = self._covered(text, {item: places})
            if covered >= self._coverage:
                return Hit(item, "coverage", covered)
        return None

    def find_equal(self, text: str, answer: str) -> Hit | None:
        """The evaluation item with this question and this answer."""
        same = self._equal.get((squeeze(text), squeeze(answer)))
        return None if same is None else Hit(same, "equal", 1.0)

    def _add(self, item: Item) -> None:
        text = squeeze(item.question)
        number = len(self._texts)
        self._texts.append(text)
        self._equal.setdefault((text, squeeze(item.answer)), number)
        for start in range(len(text) - self._window + 1):
            self._places[hash(text[start : start + self._window])].append((number, start))

    def _shared_windows(self, text: str) -> dict[int, list[tuple[int, int]]]:
        """Item → (start in the text, start in the item) of every window that both have."""
        shared: dict[int, list[tuple[int, int]]] = defaultdict(list)
        window, places = self._window, self._places
        for start in range(len(text) - window + 1):
            piece = text[start : start + window]
            for item, there in places.get(hash(piece), ()):
                if self._texts[item].startswith(piece, there):
                    shared[item].append((start, there))
        return shared

    def _covered(self, text: str, shared: dict[int, list[tuple[int, int]]]) -> float:
        """The largest share of the shorter text that the windows shared with one item cover."""
        best = 0.0
        for item, places in shared.items():
            own = len(text) <= len(self._texts[item])
            length = min(len(text), len(self._texts[item]))
            starts = sorted({here if own else there for here, there in places})
            best = max(best, self._union(starts) / length)
        return best

    def _union(self, starts: list[int]) -> int:
        total, end = 0, 0
        for start in starts:
            total += start + self._window - max(start, end)
            end = start + self._window
        return total


def squeeze(text: str) -> str:
    """Compatibility form, lower case, every run of white space one space."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
