"""Every window of a text as one number, so that texts can be searched for shared windows.

A window is `window` consecutive characters. Its hash is a polynomial in 64 bits, rolled over the
whole text by a running sum. Two readings of a text are hashed: squeezed (`squeeze`) and bare (its
letters and digits only), which no change of spacing or punctuation alters.

N characters of the text, W windows (W = N - window + 1), U different windows of an index.
"""

import sys
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np

BREAK = "\n"  # between two texts; in none of them, since squeezing leaves no line break
_AT_ONCE = 1 << 16  # windows hashed at once: the arrays stay in the processor's cache
_BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)
_FEWEST_BITS, _MOST_BITS = 10, 28  # of the number of a place in the sieve
_PLACES_PER_WINDOW = 8
_SECOND_MIX = np.uint64(0xD6E8FEB86659FD93)
_MOSTLY_ASCII = 16  # of so many characters one at most is not

Codes = np.ndarray  # N characters as numbers


def squeeze(text: str) -> str:
    """Compatibility form, lower case, every run of white space one space."""
    return " ".join(_compatible(text).casefold().split())


def _compatible(text: str) -> str:
    """The NFKC form: of a text that is nearly all ASCII, only the rest is worked on."""
    if text.isascii():
        return text
    other = np.flatnonzero(squeezed_codes(text) > 127)
    if len(other) * _MOSTLY_ASCII > len(text):
        return unicodedata.normalize("NFKC", text)
    cuts = np.flatnonzero(np.diff(other) > 1)
    starts = other[np.append(0, cuts + 1)].tolist()
    ends = (other[np.append(cuts, len(other) - 1)] + 1).tolist()
    pieces, done = [], 0
    for start, end in zip(starts, ends, strict=True):
        start = max(start - 1, done)  # with what a mark would combine with
        pieces += [text[done:start], unicodedata.normalize("NFKC", text[start:end])]
        done = end
    return "".join([*pieces, text[done:]])


def squeezed_codes(text: str) -> Codes:
    """The characters of a text that has been squeezed."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def bare_codes(text: str) -> Codes:
    """The letters and digits of a text that has been squeezed, and the breaks between texts."""
    codes_N = squeezed_codes(text)
    return codes_N[_kept()[codes_N]]


def bare_key(text: str) -> bytes:
    """The same for squeezed texts with the same letters and digits in the same order."""
    return bare_codes(text).astype(np.uint32).tobytes()


@cache
def _kept() -> np.ndarray:
    characters = (chr(code).isalnum() for code in range(sys.maxunicode + 1))
    kept = np.fromiter(characters, bool, sys.maxunicode + 1)
    kept[ord(BREAK)] = True
    return kept


def window_hashes(codes_N: Codes, window: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first window, hashes) of stretches of at most 65,536 windows, in order."""
    powers, inverses = _powers(window)
    for start in range(0, len(codes_N) - window + 1, _AT_ONCE):
        sums = codes_N[start : start + _AT_ONCE + window - 1].astype(np.uint64)
        sums *= powers[: len(sums)]
        np.cumsum(sums, out=sums)
        hashes = sums[window - 1 :].copy()
        hashes[1:] -= sums[:-window]
        hashes *= inverses[: len(hashes)]
        yield start, hashes


@cache
def _powers(window: int) -> tuple[np.ndarray, np.ndarray]:
    count = _AT_ONCE + window - 1
    rows = []
    for factor in (_BASE, _INVERSE):
        row = np.full(count, factor, np.uint64)
        row[0] = 1
        rows.append(np.cumprod(row))
    return rows[0], rows[1]


def all_window_hashes(codes_N: Codes, window: int) -> np.ndarray:
    """The hash of every window, in order."""
    stretches = [hashes for _, hashes in window_hashes(codes_N, window)]
    return np.concatenate(stretches) if stretches else np.empty(0, np.uint64)


def crosses_break(codes_N: Codes, window: int) -> np.ndarray:
    """Of every window, whether it holds a break."""
    breaks_N = np.concatenate([[0], np.cumsum(codes_N == ord(BREAK))])
    return breaks_N[window:] != breaks_N[:-window]


class WindowIndex:
    """The different windows of joined texts, numbered, and where each of them stands."""

    def __init__(self, text: str, read: Callable[[str], Codes], window: int) -> None:
        codes_N = read(text)
        self.window = window
        self.breaks = np.flatnonzero(codes_N == ord(BREAK))
        self.length = len(codes_N)
        hashes_W = all_window_hashes(codes_N, window)
        if len(hashes_W):
            inside = np.flatnonzero(~crosses_break(codes_N, window))
        else:
            inside = np.empty(0, np.int64)
        hashes_W = hashes_W[inside]
        order = np.argsort(hashes_W, kind="stable")
        ordered = hashes_W[order]
        first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(order)])
        self._hashes_U = ordered[first]
        self.positions = inside[order]  # of every window, those of window number u together
        self.bounds = np.append(first, len(order))  # number u is at bounds[u]:bounds[u + 1]
        self.number_at = np.full(self.length, -1, np.int64)  # of the window that starts there
        counts_U = np.diff(self.bounds)
        self.number_at[self.positions] = np.repeat(np.arange(len(first)), counts_U)
        bits = (len(self._hashes_U) * _PLACES_PER_WINDOW).bit_length()
        self._bits = min(max(bits, _FEWEST_BITS), _MOST_BITS)
        self._sieves = [self._make_sieve(0), self._make_sieve(1)]

    def find(self, codes_N: Codes) -> tuple[np.ndarray, np.ndarray]:
        """(start in the text, number) of every window of a text that the index holds."""
        starts, numbers = [], []
        if not len(self._hashes_U):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        for start, hashes in window_hashes(codes_N, self.window):
            maybe = np.flatnonzero(self._may_hold(hashes, 0))
            maybe = maybe[self._may_hold(hashes[maybe], 1)]
            if not len(maybe):
                continue
            wanted = hashes[maybe]
            places = np.searchsorted(self._hashes_U, wanted)
            places[places == len(self._hashes_U)] = 0
            held = self._hashes_U[places] == wanted
            starts.append(maybe[held] + start)
            numbers.append(places[held])
        if not starts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return np.concatenate(starts), np.concatenate(numbers)

    def _may_hold(self, hashes: np.ndarray, which: int) -> np.ndarray:
        """Whether each hash may be in the index: no is sure, yes is wrong for one in eight."""
        places = self._places(hashes, which)
        octets = self._sieves[which].take((places >> np.uint64(3)).view(np.int64), mode="clip")
        return ((octets >> (places & np.uint64(7)).astype(np.uint8)) & np.uint8(1)).view(bool)

    def _places(self, hashes: np.ndarray, which: int) -> np.ndarray:
        mixed = hashes * _SECOND_MIX if which else hashes
        return mixed >> np.uint64(64 - self._bits)

    def _make_sieve(self, which: int) -> np.ndarray:
        sieve = np.zeros(1 << self._bits, bool)
        sieve[self._places(self._hashes_U, which)] = True
        return np.packbits(sieve, bitorder="little")
