"""Splits by hash of the group: items of one group stay together, whatever the order of the bank."""

from collections.abc import Mapping, Sequence

from data_gen.records import Mcq, Split, hash_fraction


def assign_splits(mcqs: Sequence[Mcq], shares: Mapping[Split, float], seed: int) -> list[Mcq]:
    """Give every question a group (its id, where the bank names none) and a split.

    A split that the bank gives stands, and draws the rest of its group along.
    """
    given: dict[str, Split] = {}
    for mcq in mcqs:
        if mcq.split is not None:
            given.setdefault(_group(mcq), mcq.split)
    return [_with_split(mcq, given, shares, seed) for mcq in mcqs]


def draw_split(group: str, shares: Mapping[Split, float], seed: int) -> Split:
    """The split of a group: a function of seed and group only."""
    point = hash_fraction(seed, "split", group) * sum(shares.values())
    for split, share in shares.items():
        point -= share
        if point < 0:
            return split
    return next(split for split in reversed(list(shares)) if shares[split] > 0)


def _with_split(
    mcq: Mcq, given: Mapping[str, Split], shares: Mapping[Split, float], seed: int
) -> Mcq:
    group = _group(mcq)
    if mcq.split is not None:
        split = mcq.split
    elif group in given:
        split = given[group]
    else:
        split = draw_split(group, shares, seed)
    return mcq.model_copy(update={"group": group, "split": split})


def _group(mcq: Mcq) -> str:
    return mcq.group if mcq.group is not None else mcq.id
