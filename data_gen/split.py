"""Splits by hash of the group: items of one group stay together, whatever the order of the bank."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from data_gen.records import Mcq, Problem, Split, hash_fraction

Question = TypeVar("Question", Mcq, Problem)

# Reformatting and decontamination lose some of the questions that a split is given.
_SPARE = 1.1


class Assigned(NamedTuple):
    """The questions with group and split, and what should be said about the sizes."""

    questions: list[Any]
    notes: list[str]


def assign_splits(
    questions: Sequence[Question],
    shares: Mapping[Split, float],
    seed: int,
    at_least: Mapping[Split, int] | None = None,
) -> Assigned:
    """Give every question a group (its id, where it has none) and a split.

    A split that the bank gives stands, and draws the rest of its group along. Splits of `at_least`
    whose share is above 0 are topped up to so many questions and a tenth, where that leaves half of
    the questions without a given split for training; else the shares stand, and a note says so.
    """
    given: dict[str, Split] = {}
    for question in questions:
        if question.split is not None:
            given.setdefault(_group(question), question.split)
    sizes = Counter(_group(q) for q in questions if q.split is None and _group(q) not in given)
    drawn: dict[str, Split] = {group: draw_split(group, shares, seed) for group in sizes}
    wanted: dict[Split, int] = {
        name: count
        for name, count in ({} if at_least is None else at_least).items()
        if shares.get(name, 0) > 0 and count > 0
    }
    notes = _top_up(drawn, sizes, wanted, seed)
    split_of = {**drawn, **given}
    placed = [
        question.model_copy(
            update={
                "group": _group(question),
                "split": question.split
                if question.split is not None
                else split_of[_group(question)],
            }
        )
        for question in questions
    ]
    return Assigned(placed, [*notes, *_spanning(placed)])


def draw_split(group: str, shares: Mapping[Split, float], seed: int) -> Split:
    """The split of a group: a function of seed and group only."""
    point = hash_fraction(seed, "split", group) * sum(shares.values())
    for split, share in shares.items():
        point -= share
        if point < 0:
            return split
    return next(split for split in reversed(list(shares)) if shares[split] > 0)


def _top_up(
    drawn: dict[str, Split], sizes: Mapping[str, int], wanted: Mapping[Split, int], seed: int
) -> list[str]:
    """Move training groups, in the order of a hash, until the wanted splits are large enough."""
    targets: dict[Split, int] = {name: math.ceil(_SPARE * count) for name, count in wanted.items()}
    total = sum(sizes.values())
    if not total or not targets:
        return []
    if 2 * sum(targets.values()) > total:
        asked = " and ".join(f"{count} {name}" for name, count in wanted.items())
        return [f"{total} questions are too few for {asked} questions: the shares stand"]
    counts: Counter[Split] = Counter()
    for group, split in drawn.items():
        counts[split] += sizes[group]
    training = sorted(
        (group for group, split in drawn.items() if split in ("search", "rl")),
        key=lambda group: hash_fraction(seed, "top up", group),
    )
    for name, target in targets.items():
        while counts[name] < target and training:
            group = training.pop()
            drawn[group] = name
            counts[name] += sizes[group]
    return []


def _spanning(questions: Sequence[Any]) -> list[str]:
    """A note on groups that the bank itself puts into two splits."""
    splits: dict[str, set[str]] = {}
    for question in questions:
        splits.setdefault(question.group, set()).add(question.split)
    spanning = sorted(group for group, found in splits.items() if len(found) > 1)
    if not spanning:
        return []
    named = ", ".join(spanning[:3])
    return [f"{len(spanning)} groups lie in two splits that the bank gives: {named}"]


def _group(question: Mcq | Problem) -> str:
    return question.group if question.group is not None else question.id
