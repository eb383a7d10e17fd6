"""Verifiers: does a conclusion give the reference answer? By rule, by a teacher, or by both.

All have one interface, whose outcome is true, false or unscored with a reason. A teacher is shown
the conclusion between marks that the conclusion cannot hold, so that no text in it can pass for
what stands outside; its reply counts only if it is exactly the word True or False.
"""

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Protocol

from data_gen.answers import OtherWords, Reference, Verdict, judge
from data_gen.prompting import placeholders, render
from data_gen.rule_process import RuleProcess
from data_gen.teacher import Parsed, Teacher, Unreadable
from data_gen.verdict import VerifierKind

Options = Mapping[str, str]


class Verifier(Protocol):
    """What search, reward and evaluation ask; what cannot be judged is unscored, never false."""

    async def verify(
        self,
        conclusion: str,
        reference: str | Reference,
        question: str,
        options: Options | None = None,
    ) -> Verdict: ...

    async def close(self) -> None:
        """Wait for calls that go on, end processes; the next verdict starts them again."""
        ...


class RuleVerifier:
    """`answers.judge`, at no cost; in a process of its own it has a time limit.

    `other_words` is the outcome of a free text that does not hold the reference's words.
    """

    def __init__(
        self, process: RuleProcess | None = None, other_words: OtherWords = "false"
    ) -> None:
        self._process = process
        self._other_words: OtherWords = other_words

    async def verify(
        self,
        conclusion: str,
        reference: str | Reference,
        question: str,
        options: Options | None = None,
    ) -> Verdict:
        words = self._other_words
        if self._process is None:
            return judge(conclusion, reference, options, other_words=words)
        ask = self._process.judge
        return await asyncio.to_thread(ask, conclusion, reference, options, other_words=words)

    async def close(self) -> None:
        if self._process is not None:
            self._process.close()


class TeacherVerifier:
    """A language model that compares conclusion and reference. It sees question and options where
    its prompt holds {question} and {options}, and nothing else."""

    def __init__(
        self, teacher: Teacher, prompt: str, repair: str, seconds: float | None = None
    ) -> None:
        self._teacher = teacher
        self._prompt = prompt
        self._repair = repair
        self._seconds = seconds
        self._late: set[asyncio.Task[Parsed[bool]]] = set()

    async def verify(
        self,
        conclusion: str,
        reference: str | Reference,
        question: str,
        options: Options | None = None,
    ) -> Verdict:
        texts = {
            "conclusion": quote(conclusion),
            "answer": _in_words(reference),
            "question": quote(question),
            "options": _listed(options),
        }
        used = {name: texts[name] for name in placeholders(self._prompt) & set(texts)}
        reply = await self._ask(render(self._prompt, used))
        if reply is None:
            return Verdict("unscored", f"no verdict of the verifier within {self._seconds} s")
        calls = tuple(reply.calls)
        if reply.value is None:
            return Verdict("unscored", f"the verifier's reply: {reply.error}", calls)
        return Verdict("true" if reply.value else "false", "the verifier's reply", calls)

    async def close(self) -> None:
        await asyncio.gather(*self._late, return_exceptions=True)

    async def _ask(self, prompt: str) -> Parsed[bool] | None:
        """The reply, or None when its time is up. The call itself goes on, since it may be paid
        already: its answer is journalled when it comes, and the next run finds it."""
        asking = self._teacher.ask_parsed(prompt, parse_verdict, self._repair)
        if self._seconds is None:
            return await asking
        task = asyncio.ensure_future(asking)
        done, _ = await asyncio.wait({task}, timeout=self._seconds)
        if done:
            return task.result()
        self._late.add(task)
        task.add_done_callback(self._forget)
        return None

    def _forget(self, task: asyncio.Task[Parsed[bool]]) -> None:
        self._late.discard(task)
        if not task.cancelled():
            task.exception()  # a teacher that is down fails the next call too, which reports it


class Cascade:
    """The first verifier, and the second for what the first leaves unscored."""

    def __init__(self, first: Verifier, second: Verifier) -> None:
        self._first = first
        self._second = second

    async def verify(
        self,
        conclusion: str,
        reference: str | Reference,
        question: str,
        options: Options | None = None,
    ) -> Verdict:
        found = await self._first.verify(conclusion, reference, question, options)
        if found.outcome != "unscored":
            return found
        then = await self._second.verify(conclusion, reference, question, options)
        reason = f"{then.reason} (unscored before: {found.reason})"
        return Verdict(then.outcome, reason, found.calls + then.calls)

    async def close(self) -> None:
        await self._first.close()
        await self._second.close()


def make_verifier(
    kind: VerifierKind,
    teacher: Teacher,
    prompts: Mapping[str, str],
    *,
    sees_question: bool = False,
    rule_seconds: float,
    teacher_seconds: float | None = None,
) -> Verifier:
    """The verifier of a configuration. In front of a teacher the rules leave a free text open
    that has other words than the reference."""
    prompt = prompts["verify_with_question" if sees_question else "verify"]
    by_teacher = TeacherVerifier(teacher, prompt, prompts["repair"], teacher_seconds)
    if kind == "teacher":
        return by_teacher
    process = RuleProcess(rule_seconds)
    if kind == "rule":
        return RuleVerifier(process)
    if kind == "rule_then_teacher":
        return Cascade(RuleVerifier(process, other_words="unscored"), by_teacher)
    return Cascade(by_teacher, RuleVerifier(process))


def _listed(options: Options | None) -> str:
    if options is None:
        return "-"
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def quote(text: str) -> str:
    """The text between two marks made from its hash, which it can therefore not hold."""
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"<<<{mark}\n{text}\n{mark}>>>"


def parse_verdict(text: str) -> bool:
    """True or False for exactly that word, a full stop aside; all else is unreadable."""
    word = text.strip().removesuffix(".").rstrip()
    if word not in ("True", "False"):
        raise Unreadable("it should be exactly one word, True or False")
    return word == "True"


def _in_words(reference: str | Reference) -> str:
    """The reference as a teacher reads it, with its other names and its limits."""
    if isinstance(reference, str):
        return reference
    said = reference.text
    if reference.aliases:
        said += f" (the same answer: {'; '.join(reference.aliases)})"
    if reference.limits is not None:
        said += f" (right from {reference.low} to {reference.high})"
    if reference.tolerance is not None:
        said += f" (right within {100 * reference.tolerance:g} %)"
    return said
