"""Preference pairs: a better and a worse answer to the same problem, with and without reasoning.

An answer has a tier: the bank's own explanation, reasoning that was verified, reasoning that nobody
could judge, reasoning that was found false. A pair's chosen side is of a higher tier than its
rejected side (Preferred-MedLLM, arXiv 2504.18080: explanations of the ground truth are preferred
over other reasoning). Both lists of a problem, ordered by tier, are walked in parallel, wrapping
round, until there are k pairs (iterative RPO, arXiv 2404.19733, Appendix A). Held-out problems give
none.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

from data_gen.answers import final_response, judge
from data_gen.records import (
    HELD_OUT,
    Candidate,
    Preference,
    Problem,
    Sft,
    Side,
    Trace,
    hash_fraction,
    question_text,
)
from data_gen.rewrite import render_simply
from data_gen.search import conclusion_of


class Tier(IntEnum):
    """How far an answer is to be trusted."""

    WRONG = 0
    UNVERIFIED = 1
    VERIFIED = 2
    GROUND_TRUTH = 3


class _Answer(NamedTuple):
    thinking: str
    response: str
    kind: str
    tier: Tier


class _Sides(NamedTuple):
    better: list[_Answer]
    worse: list[_Answer]


_Forms = dict[tuple[str, bool], _Sides]  # by problem and whether an explanation is given


class Paired(NamedTuple):
    """The pairs, and what was left out and why."""

    pairs: list[Preference]
    left_out: dict[str, int]


def make_pairs(
    problems: Iterable[Problem],
    sft: Iterable[Sft],
    traces: Iterable[Trace],
    candidates: Iterable[Candidate],
    *,
    chosen: Collection[str],
    rejected: Collection[str],
    explain: Collection[bool],
    k: int,
    cap: int | None,
    seed: int,
) -> Paired:
    """At most k pairs a problem and form, at most `cap` in all (the same ones in any order)."""
    by_id = {problem.id: problem for problem in problems if problem.split not in HELD_OUT}
    left_out: Counter[str] = Counter()
    sides: _Forms = defaultdict(lambda: _Sides([], []))
    sft, traces = list(sft), list(traces)
    for form in explain:
        if "ground_truth" in chosen:
            _add_explanations(sides, by_id.values(), form)
        _add_sft(sides, sft, form, by_id, chosen, rejected)
        if "trace" in rejected:
            _add_failed(sides, traces, form, by_id, left_out)
        if "unverified" in rejected:
            _add_unscored(sides, traces, form, by_id)
    for candidate in candidates:
        if candidate.explain in explain:
            _add_candidate(sides, candidate, by_id, chosen, rejected, left_out)
    pairs = []
    for (problem_id, form), (better, worse) in sides.items():
        made = _pair(by_id[problem_id], form, _once(better, -1), _once(worse, 1), k)
        if not made:
            left_out["no right answer" if not better else "no wrong answer"] += 1
        pairs += made
    pairs.sort(key=lambda pair: pair.id)
    return Paired(_capped(pairs, cap, seed, left_out), dict(sorted(left_out.items())))


def _add_explanations(sides: _Forms, problems: Iterable[Problem], form: bool) -> None:
    """The bank's own explanation; without the request to explain, its answer alone."""
    for problem in problems:
        if problem.explanation is None or not problem.explanation.strip():
            continue
        thinking = problem.explanation.strip() if form else ""
        answer = _Answer(thinking, problem.answer, "ground_truth", Tier.GROUND_TRUTH)
        sides[problem.id, form].better.append(answer)


def _add_sft(
    sides: _Forms,
    sft: Iterable[Sft],
    form: bool,
    by_id: dict[str, Problem],
    chosen: Collection[str],
    rejected: Collection[str],
) -> None:
    """Without an explanation every record's response counts; with one, those that think do."""
    for record in sft:
        if record.problem_id not in by_id or (form and not record.thinking):
            continue
        if record.kind == "option_only":  # an answer to another prompt
            continue
        thinking = record.thinking if form else ""
        answer = _Answer(thinking, record.response, record.kind, Tier.VERIFIED)
        if "sft" in chosen:
            sides[record.problem_id, form].better.append(answer)
        if "sft" in rejected:
            sides[record.problem_id, form].worse.append(answer)


def _add_failed(
    sides: _Forms,
    traces: Iterable[Trace],
    form: bool,
    by_id: dict[str, Problem],
    left_out: Counter[str],
) -> None:
    """Attempts that the verifier found false and the rule does not find true."""
    for trace in traces:
        if trace.problem_id not in by_id:
            continue
        problem = by_id[trace.problem_id]
        for steps in trace.failed:
            response = conclusion_of(steps)
            if judge(response, problem.answer, problem.options).outcome != "false":
                left_out["attempt is right by the rule"] += 1
                continue
            thinking = render_simply(steps) if form else ""
            answer = _Answer(thinking, response, "trace", Tier.WRONG)
            sides[trace.problem_id, form].worse.append(answer)


def _add_unscored(
    sides: _Forms, traces: Iterable[Trace], form: bool, by_id: dict[str, Problem]
) -> None:
    """Attempts that the verifier could not judge."""
    for trace in traces:
        for steps in trace.unscored if trace.problem_id in by_id else ():
            thinking = render_simply(steps) if form else ""
            answer = _Answer(thinking, conclusion_of(steps), "unverified", Tier.UNVERIFIED)
            sides[trace.problem_id, form].worse.append(answer)


def _add_candidate(
    sides: _Forms,
    candidate: Candidate,
    by_id: dict[str, Problem],
    chosen: Collection[str],
    rejected: Collection[str],
    left_out: Counter[str],
) -> None:
    if candidate.problem_id not in by_id:
        left_out["sample of an unknown problem"] += 1
        return
    parts = _parts(candidate)
    here = candidate.problem_id, candidate.explain
    if candidate.correct is None and "unverified" not in rejected:
        left_out["sample unscored"] += 1
    elif parts is None:
        left_out["sample without the think format"] += 1
    elif bool(parts[0]) != candidate.explain:  # its prompt would not be the other side's
        left_out["sample's thinking does not fit its form"] += 1
    elif candidate.correct is None:
        sides[here].worse.append(_Answer(*parts, "unverified", Tier.UNVERIFIED))
    elif candidate.correct and "sample" in chosen:
        sides[here].better.append(_Answer(*parts, "sample", Tier.VERIFIED))
    elif not candidate.correct and "sample" in rejected:
        sides[here].worse.append(_Answer(*parts, "sample", Tier.WRONG))


def _parts(candidate: Candidate) -> tuple[str, str] | None:
    if candidate.response is not None and candidate.response.strip():
        thinking = candidate.thinking if candidate.thinking is not None else ""
        return thinking.strip(), candidate.response.strip()
    return None if candidate.text is None else final_response(candidate.text)


def _once(answers: Sequence[_Answer], sign: int) -> list[_Answer]:
    """Each text once, with the first kind it came with; from the lowest tier up, or down."""
    first: dict[tuple[str, str], _Answer] = {}
    for answer in sorted(answers, key=lambda answer: sign * answer.tier):
        first.setdefault((answer.thinking, answer.response), answer)
    return list(first.values())


def _pair(
    problem: Problem, form: bool, better: list[_Answer], worse: list[_Answer], k: int
) -> list[Preference]:
    """At most k pairs; where the walk meets two sides of one tier, it goes on without them."""
    if not better or not worse:
        return []
    walked = max(k, len(better) * len(worse))
    indices = dict.fromkeys((i % len(better), i % len(worse)) for i in range(walked))
    ranked = [(better[i], worse[j]) for i, j in indices if better[i].tier > worse[j].tier]
    return [_preference(problem, form, chosen, rejected) for chosen, rejected in ranked[:k]]


def _preference(problem: Problem, form: bool, better: _Answer, worse: _Answer) -> Preference:
    return Preference.model_validate(
        {
            "prompt": [{"role": "user", "content": question_text(problem)}],
            "chosen": Side(thinking=better.thinking, response=better.response),
            "rejected": Side(thinking=worse.thinking, response=worse.response),
            "chosen_kind": better.kind,
            "rejected_kind": worse.kind,
            "chosen_tier": better.tier.name.lower(),
            "rejected_tier": worse.tier.name.lower(),
            "explain": form,
            "problem_id": problem.id,
            "split": problem.split,
            "group": problem.group,
            "source": problem.source,
        }
    )


def _capped(
    pairs: list[Preference], cap: int | None, seed: int, left_out: Counter[str]
) -> list[Preference]:
    if cap is None or len(pairs) <= cap:
        return pairs
    left_out["over the cap"] = len(pairs) - cap
    drawn = sorted(pairs, key=lambda pair: hash_fraction(seed, "cap", pair.id))[:cap]
    return sorted(drawn, key=lambda pair: pair.id)
