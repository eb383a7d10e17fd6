"""Preference pairs: a right answer and a wrong one to the same problem, with and without reasoning.

Right answers are verified SFT records and correct samples of a model; wrong ones are the attempts
that the search found false and a model's wrong samples. Both lists of a problem are walked in
parallel, wrapping round, until there are k pairs (iterative RPO, arXiv 2404.19733, Appendix A).
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from data_gen.answers import final_response, judge
from data_gen.records import Candidate, Preference, Problem, Sft, Side, Trace, hash_fraction
from data_gen.rewrite import render_simply
from data_gen.search import conclusion_of


class _Answer(NamedTuple):
    thinking: str
    response: str
    kind: str


class _Sides(NamedTuple):
    right: list[_Answer]
    wrong: list[_Answer]


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
    by_id = {problem.id: problem for problem in problems}
    left_out: Counter[str] = Counter()
    sides: _Forms = defaultdict(lambda: _Sides([], []))
    for form in explain:
        if "sft" in chosen:
            _add_sft(sides, sft, form, by_id)
        if "trace" in rejected:
            _add_failed(sides, traces, form, by_id, left_out)
    for candidate in candidates:
        if candidate.explain in explain:
            _add_candidate(sides, candidate, by_id, chosen, rejected, left_out)
    pairs = []
    for (problem_id, form), (right, wrong) in sides.items():
        if right and wrong:
            pairs += _pair(by_id[problem_id], form, _once(right), _once(wrong), k)
        else:
            left_out["no right answer" if wrong else "no wrong answer"] += 1
    pairs.sort(key=lambda pair: pair.id)
    return Paired(_capped(pairs, cap, seed, left_out), dict(sorted(left_out.items())))


def _add_sft(sides: _Forms, sft: Iterable[Sft], form: bool, by_id: dict[str, Problem]) -> None:
    """Without an explanation every record's response counts; with one, those that think do."""
    for record in sft:
        if record.problem_id not in by_id or (form and not record.thinking):
            continue
        thinking = record.thinking if form else ""
        answer = _Answer(thinking, record.response, record.kind)
        sides[record.problem_id, form].right.append(answer)


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
        for steps in trace.failed:
            response = conclusion_of(steps)
            if judge(response, by_id[trace.problem_id].answer).outcome != "false":
                left_out["attempt is right by the rule"] += 1
                continue
            answer = _Answer(render_simply(steps) if form else "", response, "trace")
            sides[trace.problem_id, form].wrong.append(answer)


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
    if candidate.correct is None:
        left_out["sample unscored"] += 1
    elif parts is None:
        left_out["sample without the think format"] += 1
    elif bool(parts[0]) != candidate.explain:  # its prompt would not be the other side's
        left_out["sample's thinking does not fit its form"] += 1
    elif candidate.correct and "sample" in chosen:
        sides[candidate.problem_id, candidate.explain].right.append(_Answer(*parts, "sample"))
    elif not candidate.correct and "sample" in rejected:
        sides[candidate.problem_id, candidate.explain].wrong.append(_Answer(*parts, "sample"))


def _parts(candidate: Candidate) -> tuple[str, str] | None:
    if candidate.response is not None and candidate.response.strip():
        thinking = candidate.thinking if candidate.thinking is not None else ""
        return thinking.strip(), candidate.response.strip()
    return None if candidate.text is None else final_response(candidate.text)


def _once(answers: Sequence[_Answer]) -> list[_Answer]:
    """Each text once, the first kind it came with."""
    first: dict[tuple[str, str], _Answer] = {}
    for answer in answers:
        first.setdefault((answer.thinking, answer.response), answer)
    return list(first.values())


def _pair(
    problem: Problem, form: bool, right: list[_Answer], wrong: list[_Answer], k: int
) -> list[Preference]:
    indices = dict.fromkeys((i % len(right), i % len(wrong)) for i in range(k))
    return [_preference(problem, form, right[i], wrong[j]) for i, j in indices]


def _preference(problem: Problem, form: bool, right: _Answer, wrong: _Answer) -> Preference:
    return Preference.model_validate(
        {
            "prompt": [{"role": "user", "content": problem.question}],
            "chosen": Side(thinking=right.thinking, response=right.response),
            "rejected": Side(thinking=wrong.thinking, response=wrong.response),
            "chosen_kind": right.kind,
            "rejected_kind": wrong.kind,
            "explain": form,
            "problem_id": problem.id,
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
