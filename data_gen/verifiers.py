"""Verifiers: does a conclusion give the reference answer? By rule or by a teacher."""

from typing import Protocol

from data_gen.answers import Verdict, judge
from data_gen.prompting import render
from data_gen.teacher import Teacher, Unreadable


class Verifier(Protocol):
    """What search, reward and evaluation ask; what cannot be judged is unscored, never false."""

    async def verify(self, conclusion: str, reference: str, question: str) -> Verdict: ...


class RuleVerifier:
    """`answers.judge`, at no cost."""

    async def verify(self, conclusion: str, reference: str, question: str) -> Verdict:
        return judge(conclusion, reference)


class TeacherVerifier:
    """A language model that compares conclusion and reference; it is shown nothing else unless its
    prompt holds {question}."""

    def __init__(self, teacher: Teacher, prompt: str, repair: str) -> None:
        self._teacher = teacher
        self._prompt = prompt
        self._repair = repair

    async def verify(self, conclusion: str, reference: str, question: str) -> Verdict:
        texts = {"conclusion": conclusion, "answer": reference, "question": question}
        prompt = render(self._prompt, texts)
        reply = await self._teacher.ask_parsed(prompt, parse_verdict, self._repair)
        calls = tuple(reply.calls)
        if reply.value is None:
            return Verdict("unscored", f"the verifier's reply: {reply.error}", calls)
        return Verdict("true" if reply.value else "false", "the verifier's reply", calls)


def parse_verdict(text: str) -> bool:
    """True or False for exactly that word, a full stop aside; all else is unreadable."""
    word = text.strip().removesuffix(".").rstrip()
    if word not in ("True", "False"):
        raise Unreadable("it should be exactly one word, True or False")
    return word == "True"
