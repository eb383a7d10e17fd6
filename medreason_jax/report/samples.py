"""Answers of every stage to the same questions, side by side."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from medreason_jax.report.jsonl import read_rows

FORMS = {
    "answer_only": "answer only",
    "explain": "explain, then answer",
    "sampled": "explain, sampled",
}


class Prediction(BaseModel):
    """A line of predictions.jsonl; `answer` is the expected one, `text` what the model wrote."""

    model_config = ConfigDict(extra="allow")

    id: str
    part: str
    form: Literal["answer_only", "explain", "sampled"]
    question: str
    text: str
    answer: str
    outcome: Literal["true", "false", "unscored"]
    reason: str | None = None


@dataclass(frozen=True)
class Reply:
    stage: str
    form: str
    text: str
    outcome: str
    reason: str | None


@dataclass(frozen=True)
class Sample:
    part: str
    question: str
    answer: str
    replies: list[Reply]


def read_predictions(path: Path) -> list[Prediction]:
    return [Prediction.model_validate(row) for row in read_rows(path)]


def choose_questions(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """The parts in turn, within a part in the order of the ids, which are hashes: no one chose."""
    questions = {p.id: p for p in sorted(predictions, key=lambda p: p.id)}.values()
    parts = sorted({p.part for p in questions})
    columns = [[p for p in questions if p.part == part] for part in parts]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*columns))
    return [question for question in turns if question is not None][:count]


def collect_samples(by_stage: dict[str, list[Prediction]], count: int = 10) -> list[Sample]:
    """Questions that every evaluated stage was asked, with each stage's replies in both forms."""
    evaluated = {stage: predictions for stage, predictions in by_stage.items() if predictions}
    if not evaluated:
        return []
    common = set.intersection(*({p.id for p in predictions} for predictions in evaluated.values()))
    first = next(iter(evaluated.values()))
    chosen = choose_questions([p for p in first if p.id in common], count)
    return [
        Sample(
            part=question.part,
            question=question.question,
            answer=question.answer,
            replies=[
                Reply(stage, FORMS[p.form], p.text, p.outcome, p.reason)
                for form in ("answer_only", "explain")
                for stage, predictions in evaluated.items()
                for p in predictions
                if p.id == question.id and p.form == form
            ],
        )
        for question in chosen
    ]
