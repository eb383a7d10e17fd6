"""What is asked: the bank's questions and those mixed in, each once, with its group and its split.

Questions that are mixed in keep their form (their options, where they have some) and carry the name
of their source. They are training questions only: one whose group is held out is rejected.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from data_gen.config import Config, Mixed, Shares
from data_gen.near_duplicates import find_groups
from data_gen.records import (
    HELD_OUT,
    Mcq,
    Problem,
    Rejected,
    Split,
    hash_fraction,
    iterate_records,
    read_records,
)
from data_gen.shards import read_shard
from data_gen.split import assign_splits, draw_split

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Questions:
    """The bank's questions, the problems mixed in, what was rejected, notes on the splits."""

    mcqs: list[Mcq]
    mixed: list[Problem]
    rejected: list[Rejected]
    notes: list[str]


def read_questions(config: Config) -> Questions:
    """Every question that the configuration names, those of its shard only."""
    bank, twice = _distinct(read_records(config.bank, Mcq))
    mixed, unusable = read_mixed(config.mix, config.seed)
    groups = name_groups([*bank, *mixed], config.split.similarity)
    twice = [each.model_copy(update={"group": groups[str(each.mcq_id)]}) for each in twice]
    bank = [mcq.model_copy(update={"group": groups[mcq.id]}) for mcq in bank]
    shares = shares_of(config.split)
    least: dict[Split, int] = {"dev": config.split.min_dev, "test": config.split.min_test}
    assigned = assign_splits(bank, shares, config.seed, least)
    kept, held = _apart(assigned.questions)
    split_of: dict[str | None, Split | None] = {mcq.group: mcq.split for mcq in kept}
    placed = [_place(each, groups[each.id], split_of, shares, config.seed) for each in mixed]
    training = [problem for problem in placed if problem.split not in HELD_OUT]
    held += [problem for problem in placed if problem.split in HELD_OUT]
    leaks = [_reject(question, "split", "group is held out") for question in held]
    rejected = [*twice, *unusable, *leaks]
    found = Questions(kept, training, rejected, assigned.notes)
    return found if config.shard is None else _part(found, config.shard)


def shares_of(shares: Shares) -> dict[Split, float]:
    """The shares by split."""
    return {"search": shares.search, "rl": shares.rl, "dev": shares.dev, "test": shares.test}


def name_groups(questions: Sequence[Mcq | Problem], similarity: float | None) -> dict[str, str]:
    """A group for every question, by its id: the bank's, joined with those of close questions."""
    if similarity is None:
        return {q.id: q.id if q.group is None else q.group for q in questions}
    texts = [question.question for question in questions]
    groups = find_groups(texts, [question.group for question in questions], similarity)
    return {question.id: group for question, group in zip(questions, groups, strict=True)}


def _distinct(bank: Iterable[Mcq]) -> tuple[list[Mcq], list[Rejected]]:
    first: dict[str, Mcq] = {}
    seen: Counter[str] = Counter()
    rejected = []
    for mcq in bank:
        seen[mcq.id] += 1
        if first.setdefault(mcq.id, mcq) is not mcq:
            reason = "id is in the bank already"
            rejected.append(_reject(mcq, "duplicate", reason, occurrence=seen[mcq.id]))
    return list(first.values()), rejected


def _apart(questions: Sequence[Mcq]) -> tuple[list[Mcq], list[Mcq | Problem]]:
    """The questions, and the training questions whose group the bank itself holds out."""
    held_out = {question.group for question in questions if question.split in HELD_OUT}
    kept: list[Mcq] = []
    held: list[Mcq | Problem] = []
    for question in questions:
        leaks = question.split not in HELD_OUT and question.group in held_out
        (held if leaks else kept).append(question)
    return kept, held


def _place(
    problem: Problem,
    group: str,
    split_of: Mapping[str | None, Split | None],
    shares: Mapping[Split, float],
    seed: int,
) -> Problem:
    """A mixed problem where its group is, else where its source is sent, else by the shares."""
    split = split_of.get(group)
    if split is None:
        split = problem.split
    if split is None:
        training: dict[Split, float] = {"search": shares["search"], "rl": shares["rl"]}
        split = draw_split(group, training, seed) if sum(training.values()) > 0 else "rl"
    return problem.model_copy(update={"group": group, "split": split})


def _part(questions: Questions, shard: str) -> Questions:
    """The questions of the groups that belong to a shard."""
    own = read_shard(shard)

    def mine(records: Iterable[Any]) -> list[Any]:
        return [record for record in records if own.holds(str(record.group or record.id))]

    return Questions(
        mine(questions.mcqs), mine(questions.mixed), mine(questions.rejected), questions.notes
    )


def _reject(question: Mcq | Problem, stage: str, reason: str, **more: Any) -> Rejected:
    of_bank = isinstance(question, Mcq)
    return Rejected.model_validate(
        {
            "stage": stage,
            "reason": reason,
            "mcq_id": question.id if of_bank else None,
            "problem_id": None if of_bank else question.id,
            "split": question.split,
            "group": question.group,
            "source": question.source,
            **more,
        }
    )


# --- mixing in --------------------------------------------------------------------------------


class _Row(BaseModel, extra="allow"):
    """A record of any verifiable set; what it holds is looked at below."""


class Answer(NamedTuple):
    """A true answer and, for a question with options, its letter."""

    text: str
    letter: str | None


def read_mixed(sources: Sequence[Mixed], seed: int) -> tuple[list[Problem], list[Rejected]]:
    """The problems of the named sources, as many of each as it asks for; the others' reasons."""
    problems: dict[str, Problem] = {}
    rejected: list[Rejected] = []
    for source in sources:
        own: list[Problem] = []
        for row, record in enumerate(iterate_records(source.path, _Row), 1):
            problem = read_row(record.model_dump(), source, row)
            if isinstance(problem, Problem):
                own.append(problem)
            else:
                rejected.append(problem)
        for problem in _drawn(own, source, seed):
            if problems.setdefault(problem.id, problem) is not problem:
                reason = "mixed in already"
                rejected.append(_reject(problem, "duplicate", reason, detail=problem.source))
    return list(problems.values()), rejected


def _drawn(problems: list[Problem], source: Mixed, seed: int) -> list[Problem]:
    """At most `count`, drawn by hash, so the same ones in any order of the file."""
    if source.count is None or len(problems) <= source.count:
        return problems
    ordered = sorted(problems, key=lambda each: hash_fraction(seed, "mix", source.source, each.id))
    return ordered[: source.count]


def read_row(data: dict[str, Any], source: Mixed, row: int) -> Problem | Rejected:
    """A problem with or without options; options may be a mapping or a list."""
    options = lettered(data.get("options"))
    question = data.get("question", data.get("Open-ended Verifiable Question"))
    answer = read_answer(data, options)
    if not isinstance(question, str) or not question.strip():
        return _unusable(source, row, "no question")
    if answer is None:
        return _unusable(source, row, "answer is no option" if options else "no answer")
    fields = {"question": question, "answer": answer.text, "source": source.source}
    fields |= {"split": source.to, "group": data.get("group"), "mixed": True}
    fields |= {name: data[name] for name in ("language", "explanation") if data.get(name)}
    if options:
        fields |= {"options": options, "answer_idx": answer.letter}
    return Problem.model_validate(fields)


def lettered(options: Any) -> dict[str, str]:
    """Options by letter, from a mapping or a list; none from anything else."""
    if isinstance(options, dict):
        return {str(letter): str(text) for letter, text in options.items() if text is not None}
    if isinstance(options, list):
        return dict(zip(LETTERS, map(str, options), strict=False))
    return {}


def read_answer(data: Mapping[str, Any], options: Mapping[str, str]) -> Answer | None:
    """The answer of a record: a text, or one of its options by letter or text; None without one."""
    said = data.get("answer_idx", data.get("answer", data.get("Ground-True Answer")))
    if not isinstance(said, str) or not said.strip():
        return None
    if not options:
        text = data.get("answer", data.get("Ground-True Answer"))
        return Answer(text, None) if isinstance(text, str) and text.strip() else None
    if said in options:
        return Answer(options[said], said)
    same = [letter for letter, text in options.items() if text == said]
    return Answer(said, same[0]) if len(same) == 1 else None


def _unusable(source: Mixed, row: int, reason: str) -> Rejected:
    detail = f"{Path(source.path).name} line {row}"
    record = {"stage": "mix", "reason": reason, "detail": detail, "source": source.source}
    return Rejected.model_validate(record)
