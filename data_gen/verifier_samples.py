"""What the search's verdicts teach a verifier: every judged conclusion with its label."""

from collections.abc import Iterable, Iterator, Sequence

from data_gen.answers import judge
from data_gen.records import Problem, Rejected, Step, Trace, VerifierSample
from data_gen.search import conclusion_of
from data_gen.verdict import VerifierKind


def verifier_samples(
    problems: Iterable[Problem], searched: Sequence[Trace | Rejected], judged_by: VerifierKind
) -> list[VerifierSample]:
    """Each judged conclusion of a problem once; `judged_by` is the verifier that labelled it.

    What nobody could judge gives no sample. A conclusion that was judged both ways gives none
    either: its label is not known.
    """
    by_id = {problem.id: problem for problem in problems}
    labels: dict[tuple[str, str], set[bool]] = {}
    for record in searched:
        for steps, label in _judged(record):
            key = str(record.problem_id), conclusion_of(steps)
            labels.setdefault(key, set()).add(label)
    return [
        _sample(by_id[problem_id], conclusion, label, judged_by)
        for (problem_id, conclusion), found in labels.items()
        if len(found) == 1
        for label in found
    ]


def _judged(record: Trace | Rejected) -> Iterator[tuple[list[Step], bool]]:
    if isinstance(record, Trace):
        yield record.steps, True
        failed = record.failed
    else:
        dumped = record.model_dump(include={"failed"})["failed"]
        failed = [[Step.model_validate(step) for step in steps] for steps in dumped]
    yield from ((steps, False) for steps in failed)


def _sample(
    problem: Problem, conclusion: str, label: bool, judged_by: VerifierKind
) -> VerifierSample:
    return VerifierSample.model_validate(
        {
            "question": problem.question,
            "options": problem.options,
            "answer": problem.answer,
            "conclusion": conclusion,
            "label": label,
            "label_source": judged_by,
            "rule": judge(conclusion, problem.answer, problem.options).outcome,
            "problem_id": problem.id,
            "split": problem.split,
            "group": problem.group,
            "source": problem.source,
        }
    )
