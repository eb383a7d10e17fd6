"""Verified traces → natural reasoning and a final response that still carries the answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from data_gen.answers import has_think_format, judge
from data_gen.problems import parse_json_object
from data_gen.prompting import render
from data_gen.records import Problem, Rejected, Sft, SftKind, Step, Trace, hash_fraction
from data_gen.teacher import Teacher, Unreadable


class Rewritten(NamedTuple):
    """What a trace became."""

    records: list[Sft]
    rejected: Rejected | None


@dataclass(frozen=True)
class Rewriter:
    """Rewrites with a teacher; the shares say how many problems also give ablation records."""

    teacher: Teacher
    prompts: Mapping[str, str]
    direct_share: float
    simple_cot_share: float
    seed: int

    async def rewrite(self, problem: Problem, trace: Trace) -> Rewritten:
        """The SFT records of one trace, or why it gives none."""
        repair = self.prompts["repair"]
        texts = {"question": problem.question, "trace": render_trace(trace.steps)}
        prompt = render(self.prompts["natural_reasoning"], texts)
        thinking = await self.teacher.ask_parsed(prompt, parse_reasoning, repair)
        if thinking.value is None:
            return _reject(trace, "unreadable reasoning", thinking.error, thinking.calls)
        texts = {"question": problem.question, "reasoning": thinking.value}
        prompt = render(self.prompts["final_response"], texts)
        response = await self.teacher.ask_parsed(prompt, parse_response, repair)
        calls = thinking.calls + response.calls
        if response.value is None:
            return _reject(trace, "unreadable response", response.error, calls)
        verdict = judge(response.value, problem.answer)
        if verdict.outcome != "true":
            detail = f"{verdict.reason}: {response.value[:120]} (reference: {problem.answer})"
            return _reject(trace, "answer lost", detail, calls)
        parts: dict[SftKind, str] = {"complex_cot": thinking.value}
        if hash_fraction(self.seed, "direct", problem.id) < self.direct_share:
            parts["direct"] = ""
        if hash_fraction(self.seed, "simple_cot", problem.id) < self.simple_cot_share:
            parts["simple_cot"] = render_simply(trace.steps)
        records = [
            _sft(problem, trace, kind, text, response.value, calls) for kind, text in parts.items()
        ]
        return Rewritten(records, None)


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
        "calls": calls,
    }
    return Rewritten([], Rejected.model_validate(record))


def _sft(
    problem: Problem, trace: Trace, kind: SftKind, thinking: str, response: str, calls: list[str]
) -> Sft:
    return Sft.model_validate(
        {
            "messages": [{"role": "user", "content": problem.question}],
            "thinking": thinking,
            "response": response,
            "kind": kind,
            "problem_id": problem.id,
            "part": problem.part,
            "split": problem.split,
            "group": problem.group,
            "trace_id": trace.id,
            "calls": calls,
        }
    )
