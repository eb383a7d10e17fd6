"""The report of a run: counts of every stage, from the records it wrote."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_gen.answers import accuracy_interval
from data_gen.records import Mcq, Preference, Problem, Rejected, Sft, Trace

# In the order in which a question meets them; a stage that rejected nothing is counted too.
FILTER_STAGES = ("mix", "duplicate", "split", "rules", "difficulty", "filter")


def count_filtered(
    kept: Sequence[Mcq | Problem], rejected: Sequence[Rejected], notes: Sequence[str]
) -> dict[str, Any]:
    """The questions through the filters: how many each rejected and why, none lost."""
    own = [record for record in rejected if record.stage in FILTER_STAGES]
    by_stage = Counter(record.stage for record in own)
    return {
        "filter": {
            "in": len(kept) + len(own),
            "accepted": len(kept),
            "by_stage": {stage: by_stage[stage] for stage in FILTER_STAGES},
            "rejected": _reasons(own),
        },
        "splits": _sorted(Counter(str(question.split) for question in kept)),
        "groups": len({question.group for question in kept}),
        "notes": list(notes),
    }


def count_problems(
    problems: Sequence[Problem],
    rejected: Sequence[Rejected],
    decontamination: Mapping[str, Any],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The questions through filter, reformat and decontamination; `decontamination` is what both
    of its rules found."""
    stages = (*FILTER_STAGES, "reformat")
    own = [record for record in rejected if record.stage in stages]
    dropped = [record for record in rejected if record.stage == "decontaminate"]
    accepted = len(problems) + len(dropped)
    return {
        "problems": {
            "in": accepted + len(own),
            "accepted": accepted,
            "rejected": _reasons(own),
            "notes": list(notes),
        },
        "decontaminate": {
            "in": accepted,
            "accepted": len(problems),
            "rejected": _reasons(dropped),
            **decontamination,
        },
        "splits": _sorted(Counter(str(problem.split) for problem in problems)),
        "groups": len({problem.group for problem in problems}),
        "sources": _sorted(Counter(problem.source for problem in problems)),
    }


def count_search(
    searched: int,
    traces: Sequence[Trace],
    sft: Sequence[Sft],
    rejected: Sequence[Rejected],
    wrong_traces: int,
    wrong_sft: int,
) -> dict[str, Any]:
    """Search and rewriting: acceptance by strategy and attempt, wrong answers let through.

    `wrong_traces` of the traces, which the verifier accepted, and `wrong_sft` of the SFT records do
    not end in the bank's answer.
    """
    lost = [record for record in rejected if record.stage == "search"]
    unwritten = [record for record in rejected if record.stage == "rewrite"]
    tried = [*traces, *lost]
    return {
        "search": {
            "in": searched,
            "accepted": len(traces),
            "rejected": _reasons(lost),
            "by_strategy": _acceptance(
                pair for r in tried for pair in zip(_strategies(r), _verdicts(r), strict=True)
            ),
            "by_attempt": _acceptance(
                (i, verdict) for r in tried for i, verdict in enumerate(_verdicts(r), 1)
            ),
        },
        "rewrite": {
            "in": len(traces),
            "accepted": len(traces) - len(unwritten),
            "rejected": _reasons(unwritten),
            "records": _sorted(Counter(record.kind for record in sft)),
            "label_conditioned": sum(trace.label_conditioned for trace in traces),
        },
        "verifier_accepted_wrong": _wrong(wrong_traces, len(traces)),
        "wrong_accepted_share": wrong_sft / len(sft) if sft else 0.0,
        "wrong_accepted": _wrong(wrong_sft, len(sft)),
    }


def count_pairs(pairs: Sequence[Preference], left_out: Mapping[str, int]) -> dict[str, Any]:
    """Preference pairs by form and kinds."""
    forms = Counter("with explanation" if p.explain else "answer only" for p in pairs)
    kinds = Counter(f"{pair.chosen_kind} over {pair.rejected_kind}" for pair in pairs)
    tiers = Counter(f"{pair.chosen_tier} over {pair.rejected_tier}" for pair in pairs)
    return {
        "pairs": {
            "accepted": len(pairs),
            "problems": len({pair.problem_id for pair in pairs}),
            "forms": _sorted(forms),
            "kinds": _sorted(kinds),
            "tiers": _sorted(tiers),
            "left_out": dict(left_out),
        }
    }


def _wrong(wrong: int, of: int) -> dict[str, Any]:
    return {"wrong": wrong, "of": of, "interval95": list(accuracy_interval(wrong, of))}


def _strategies(record: Trace | Rejected) -> list[str]:
    return record.model_dump(include={"strategies"})["strategies"]


def _verdicts(record: Trace | Rejected) -> list[str]:
    return record.model_dump(include={"verdicts"})["verdicts"]


def _acceptance(judged: Iterable[tuple[Any, str]]) -> dict[str, dict[str, int]]:
    tried: Counter[Any] = Counter()
    accepted: Counter[Any] = Counter()
    for name, verdict in judged:
        tried[name] += 1
        accepted[name] += verdict == "true"
    return {str(name): {"tried": tried[name], "accepted": accepted[name]} for name in sorted(tried)}


def _reasons(records: Iterable[Rejected]) -> dict[str, int]:
    return _sorted(Counter(f"{record.stage}: {record.reason}" for record in records))


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))
