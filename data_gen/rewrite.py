"""Verified traces → natural reasoning and a final response that still carries the answer.

Beside the reasoning records stand those of the ablations, on the same problems: the response alone
(`direct`), the trace's own steps as they are (`simple_cot`), and the question with its options and
the letter of the right one (`option_only`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from data_gen.answers import has_think_format
from data_gen.problems import parse_json_object
from data_gen.prompting import render
from data_gen.records import (
    Mcq,
    Problem,
    Rejected,
    Sft,
    SftKind,
    Step,
    Trace,
    hash_fraction,
    question_text,
)
from data_gen.schemas import NATURAL_REASONING
from data_gen.teacher import Teacher, Unreadable
from data_gen.verifiers import Verifier


class Rewritten(NamedTuple):
    """What a trace became: records to train on, and one of every other ablation."""

    records: list[Sft]
    rejected: Rejected | None
    ablations: Sequence[Sft] = ()


@dataclass(frozen=True)
class Rewriter:
    """Rewrites with a teacher and has the response verified; `shares` say of how many problems an
    ablation's record is trained on too."""

    teacher: Teacher
    verifier: Verifier
    prompts: Mapping[str, str]
    shares: Mapping[SftKind, float]
    seed: int
    mcqs: Mapping[str, Mcq] = field(default_factory=dict)

    async def rewrite(self, problem: Problem, trace: Trace) -> Rewritten:
        """The SFT records of one trace, or why it gives none."""
        repair = self.prompts["repair"]
        question = question_text(problem)
        texts = {"question": question, "trace": render_trace(trace.steps)}
        prompt = render(self.prompts["natural_reasoning"], texts)
        thinking = await self.teacher.ask_parsed(
            prompt, parse_reasoning, repair, schema=NATURAL_REASONING
        )
        if thinking.value is None:
            return _reject(trace, "unreadable reasoning", thinking.error, thinking.calls)
        texts = {"question": question, "reasoning": thinking.value}
        prompt = render(self.prompts["final_response"], texts)
        response = await self.teacher.ask_parsed(prompt, parse_response, repair)
        calls = thinking.calls + response.calls
        if response.value is None:
            return _reject(trace, "unreadable response", response.error, calls)
        verdict = await self.verifier.verify(
            response.value, problem.answer, problem.question, problem.options
        )
        calls += verdict.calls
        if verdict.outcome != "true":
            detail = f"{verdict.reason}: {response.value[:120]} (reference: {problem.answer})"
            return _reject(trace, "answer lost", detail, calls)
        own = _sft(problem, trace, "complex_cot", thinking.value, response.value, calls)
        ablations = [
            _sft(problem, trace, "direct", "", response.value, calls),
            _sft(problem, trace, "simple_cot", render_simply(trace.steps), response.value, calls),
        ]
        mcq = self._with_options(problem)
        if mcq is not None:
            ablations.append(_option_only(problem, trace, mcq, calls))
        drawn = [each for each in ablations if self._is_drawn(each.kind, problem)]
        return Rewritten([own, *drawn], None, ablations)

    def _is_drawn(self, kind: SftKind, problem: Problem) -> bool:
        return hash_fraction(self.seed, kind, problem.id) < self.shares.get(kind, 0.0)

    def _with_options(self, problem: Problem) -> Mcq | Problem | None:
        """The question as it was before it was opened."""
        if problem.options:
            return problem
        return self.mcqs.get(problem.mcq_id) if problem.mcq_id is not None else None


def render_trace(steps: list[Step]) -> str:
    """A trace as headed sections, for the teacher to rewrite."""
    headings = {"Final Conclusion": "Conclusion", "Verification": "Verification"}
    return "\n\n".join(
        f"### {headings[step.action] if step.title is None else step.title}\n{step.content}"
        for step in steps
    )


def render_simply(steps: list[Step]) -> str:
    """The thinking that led to the last conclusion, a line a step, without a teacher."""
    lines: list[str] = []
    for step in steps[:-1]:
        if step.action == "Verification":
            lines = []
        elif step.action == "Inner Thinking":
            lines.append(step.content)
    return "\n".join(lines)


def parse_reasoning(text: str) -> str:
    """The text of {"NaturalReasoning": …}, which should have line breaks and no format headings."""
    value = parse_json_object(text)
    reasoning = value.get("NaturalReasoning")
    if not isinstance(reasoning, str) or not reasoning.strip():
        raise Unreadable("the JSON object should have the key 'NaturalReasoning' with a text")
    if "\n" not in reasoning:
        raise Unreadable("the text should have line breaks")
    _check_headings(reasoning, "")
    return reasoning.strip()


def parse_response(text: str) -> str:
    """A plain answer that leaves the think format whole."""
    if not text.strip():
        raise Unreadable("it is empty")
    _check_headings("", text)
    return text.strip()


def _check_headings(thinking: str, response: str) -> None:
    whole = f"## Thinking\n\n{thinking}\n\n## Final Response\n\n{response}"
    if not has_think_format(whole):
        raise Unreadable("it should not hold the headings '## Thinking' or '## Final Response'")


def _reject(trace: Trace, reason: str, detail: str, calls: list[str]) -> Rewritten:
    record = {
        "stage": "rewrite",
        "reason": reason,
        "detail": detail,
        "problem_id": trace.problem_id,
        "trace_id": trace.id,
        "split": trace.split,
        "group": trace.group,
        "source": trace.source,
        "calls": calls,
    }
    return Rewritten([], Rejected.model_validate(record))


def _sft(
    problem: Problem, trace: Trace, kind: SftKind, thinking: str, response: str, calls: list[str]
) -> Sft:
    return Sft.model_validate(
        {
            "messages": [{"role": "user", "content": question_text(problem)}],
            "thinking": thinking,
            "response": response,
            "kind": kind,
            "problem_id": problem.id,
            "part": problem.part,
            "split": problem.split,
            "group": problem.group,
            "source": problem.source,
            "label_conditioned": trace.label_conditioned,
            "trace_id": trace.id,
            "calls": calls,
        }
    )


def _option_only(problem: Problem, trace: Trace, mcq: Mcq | Problem, calls: list[str]) -> Sft:
    """The question with its options, answered by the option alone."""
    options = mcq.options or {}
    same = [key for key, text in options.items() if text == mcq.answer]
    letter = mcq.answer_idx if isinstance(mcq, Mcq) else same[0]
    record = _sft(problem, trace, "option_only", "", f"{letter}. {options[letter]}", calls)
    fields = record.model_dump(exclude={"id", "Question"})
    fields["messages"] = [{"role": "user", "content": question_text(mcq)}]
    return Sft.model_validate(fields)
