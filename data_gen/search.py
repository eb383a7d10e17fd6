"""The search for a verified conclusion (HuatuoGPT-o1, arXiv 2412.18925, §3.1 and Algorithm 1).

A chain starts with an initial chain of thought; while the verifier finds its conclusion false, one
of four strategies is drawn and the new steps are spliced on: old[:-1] + new, so that the new first
Verification replaces the old last one. At most N rethinks a chain, T chains a problem. If all are
found false, `label_conditioned` allows one more chain by a teacher that is told the answer; it is
verified like any other and the trace says how it came about.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from data_gen.answers import Verdict
from data_gen.problems import parse_json_object
from data_gen.prompting import render
from data_gen.records import (
    Action,
    Problem,
    Rejected,
    Step,
    Trace,
    hash_fraction,
    question_text,
)
from data_gen.schemas import STEPS
from data_gen.teacher import Parsed, Teacher, Unreadable
from data_gen.verifiers import Verifier

INITIAL = "initial_cot"
LABEL = "label_cot"
ACTIONS = get_args(Action)
_LAST_ACTIONS = ["Inner Thinking", "Final Conclusion", "Verification"]


@dataclass
class _Path:
    """What happened so far with one problem."""

    steps: list[Step] = field(default_factory=list)
    strategies: list[str] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    failed: list[list[Step]] = field(default_factory=list)
    unscored: list[list[Step]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    unreadable: str = ""


@dataclass(frozen=True)
class Searcher:
    """Searches with a reasoner and a verifier; `weights` are those of the strategies."""

    reasoner: Teacher
    verifier: Verifier
    prompts: Mapping[str, str]
    weights: Mapping[str, float]
    max_depth: int
    max_restarts: int
    fresh_restart: bool
    backtrack_from: int
    seed: int
    label_conditioned: bool = False

    async def search(self, problem: Problem) -> Trace | Rejected:
        """A trace that ends in a verified conclusion, or the reason why there is none."""
        path = _Path()
        start: list[Step] = []
        verdict = Verdict("unscored", "")
        for restart in range(self.max_restarts):
            if restart == 0 or self.fresh_restart or not start:
                if not await self._begin(problem, path, restart):
                    continue
                verdict = await self._judge(problem, path)
                start, first = list(path.steps), verdict
            else:
                path.steps, verdict = list(start), first
            for depth in range(1, self.max_depth + 1):
                if verdict.outcome != "false":
                    break
                if not await self._rethink(problem, path, restart, depth):
                    break
                verdict = await self._judge(problem, path)
            if verdict.outcome == "true":
                return _trace(problem, path, restart)
        if self.label_conditioned and verdict.outcome == "false" and path.steps:
            if await self._follow_label(problem, path):
                return _trace(problem, path, self.max_restarts - 1, label_conditioned=True)
        return _reject(problem, path)

    async def _follow_label(self, problem: Problem, path: _Path) -> bool:
        """One more chain by a teacher that knows the answer; whether the verifier finds it true."""
        texts = {"answer": problem.answer, "previous": _previous(path.steps)}
        prompt = render(self.prompts[LABEL], {"question": question_text(problem), **texts})
        if not await self._extend(prompt, LABEL, path, self.max_restarts - 1):
            return False
        return (await self._judge(problem, path)).outcome == "true"

    async def _begin(self, problem: Problem, path: _Path, restart: int) -> bool:
        prompt = render(self.prompts[INITIAL], {"question": question_text(problem)})
        steps = await self._ask(prompt, parse_initial, path, restart)
        if steps is None:
            return False
        path.steps = steps
        path.strategies.append(INITIAL)
        return True

    async def _rethink(self, problem: Problem, path: _Path, restart: int, depth: int) -> bool:
        strategy = self._choose(problem.id, restart, depth)
        texts = {"question": question_text(problem), "previous": _previous(path.steps)}
        prompt = render(self.prompts[strategy], texts)
        return await self._extend(prompt, strategy, path, restart)

    async def _extend(self, prompt: str, strategy: str, path: _Path, restart: int) -> bool:
        """Splice the teacher's new steps on; False if they cannot be read."""
        steps = await self._ask(prompt, parse_rethought, path, restart)
        if steps is None:
            return False
        path.steps = path.steps[:-1] + steps
        path.strategies.append(strategy)
        return True

    async def _ask(self, prompt: str, parse: Any, path: _Path, sample: int) -> list[Step] | None:
        reply: Parsed[list[Step]] = await self.reasoner.ask_parsed(
            prompt, parse, self.prompts["repair"], sample, schema=STEPS
        )
        path.calls += reply.calls
        if reply.value is None:
            path.unreadable = reply.error
        return reply.value

    async def _judge(self, problem: Problem, path: _Path) -> Verdict:
        conclusion = conclusion_of(path.steps)
        verdict = await self.verifier.verify(
            conclusion, problem.answer, problem.question, problem.options
        )
        path.calls += verdict.calls
        path.verdicts.append(verdict.outcome)
        if verdict.outcome == "false":
            path.failed.append(list(path.steps))
        elif verdict.outcome == "unscored":
            path.unscored.append(list(path.steps))
        return verdict

    def _choose(self, problem_id: str, restart: int, depth: int) -> str:
        """A strategy by weight; the draw depends on seed, problem, restart and depth only."""
        allowed = {
            name: weight
            for name, weight in self.weights.items()
            if weight > 0 and (name != "backtrack" or depth >= self.backtrack_from)
        }
        draw = hash_fraction(self.seed, "strategy", problem_id, restart, depth)
        point = draw * sum(allowed.values())
        for name, weight in allowed.items():
            point -= weight
            if point < 0:
                return name
        return list(allowed)[-1]


def conclusion_of(steps: list[Step]) -> str:
    """The content of the last Final Conclusion."""
    return next(step.content for step in reversed(steps) if step.action == "Final Conclusion")


def parse_initial(text: str) -> list[Step]:
    """The steps of a first chain of thought: Inner Thinking …, Final Conclusion, Verification."""
    steps = _parse_steps(text)
    _check_end(steps)
    _check_thinking(steps[:-2])
    return steps


def parse_rethought(text: str) -> list[Step]:
    """The steps of a strategy: Verification first, then as in a first chain of thought."""
    steps = _parse_steps(text)
    if not steps or steps[0].action != "Verification":
        raise Unreadable("the first step should be a Verification")
    _check_end(steps)
    _check_thinking(steps[1:-2])
    return steps


def _parse_steps(text: str) -> list[Step]:
    value = parse_json_object(text)
    if not isinstance(value.get("CoT"), list):
        raise Unreadable("the JSON object should have the key 'CoT' with a list of steps")
    return [_parse_step(i, step) for i, step in enumerate(value["CoT"], 1)]


def _parse_step(number: int, step: Any) -> Step:
    if not isinstance(step, dict) or step.get("action") not in ACTIONS:
        raise Unreadable(f"step {number}: action should be one of {', '.join(ACTIONS)}")
    content, title = step.get("content"), step.get("title")
    if not isinstance(content, str) or not content.strip():
        raise Unreadable(f"step {number}: content should be a text")
    if step["action"] != "Inner Thinking":
        return Step(action=step["action"], content=content.strip())
    if not isinstance(title, str) or not title.strip():
        raise Unreadable(f"step {number}: Inner Thinking needs a title")
    return Step(action="Inner Thinking", title=title.strip(), content=content.strip())


def _check_end(steps: list[Step]) -> None:
    if [step.action for step in steps[-3:]] != _LAST_ACTIONS:
        raise Unreadable(f"the last three steps should be {', '.join(_LAST_ACTIONS)}")


def _check_thinking(steps: list[Step]) -> None:
    if any(step.action != "Inner Thinking" for step in steps):
        raise Unreadable("every step before the Final Conclusion should be Inner Thinking")


def _previous(steps: list[Step]) -> str:
    """The steps so far without the last Verification, as a strategy's prompt shows them."""
    shown = [step.model_dump(exclude_none=True) for step in steps[:-1]]
    return json.dumps(shown, ensure_ascii=False)


def _trace(
    problem: Problem, path: _Path, restart: int, *, label_conditioned: bool = False
) -> Trace:
    return Trace.model_validate(
        {
            "problem_id": problem.id,
            "steps": path.steps,
            "verdicts": path.verdicts,
            "strategies": path.strategies,
            "attempts": len(path.verdicts),
            "restart": restart,
            "label_conditioned": label_conditioned,
            "calls": path.calls,
            "failed": path.failed,
            "unscored": path.unscored,
            "split": problem.split,
            "group": problem.group,
            "source": problem.source,
        }
    )


def _reject(problem: Problem, path: _Path) -> Rejected:
    if not path.verdicts:
        reason, detail = "unreadable", path.unreadable
    elif "false" not in path.verdicts:
        reason, detail = "unscored", "no conclusion could be judged"
    else:
        reason, detail = "not verified", f"{len(path.verdicts)} conclusions"
    return Rejected.model_validate(
        {
            "stage": "search",
            "reason": reason,
            "detail": detail,
            "problem_id": problem.id,
            "split": problem.split,
            "group": problem.group,
            "source": problem.source,
            "strategies": path.strategies,
            "verdicts": path.verdicts,
            "failed": _dumped(path.failed),
            "unscored": _dumped(path.unscored),
            "calls": path.calls,
        }
    )


def _dumped(attempts: list[list[Step]]) -> list[list[dict[str, Any]]]:
    return [[step.model_dump() for step in steps] for steps in attempts]
