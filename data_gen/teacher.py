"""The teacher: an OpenAI-compatible endpoint, asked through the journal.

One call is: look it up, else ask (`direct.py` one by one, `batch.py` in batches), record, use. The
environment's OPENAI_* variables, proxies and redirects play no part.
"""

from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from data_gen.asking import (
    REFUSED,
    Endpoint,
    Line,
    Messages,
    Patience,
    TeacherFailed,
    make_call,
)
from data_gen.batch import BatchLine
from data_gen.budget import Budget
from data_gen.direct import DirectLine
from data_gen.journal import Call, Journal
from data_gen.prompting import render
from data_gen.transport import Wire

__all__ = ["Endpoint", "Parsed", "Patience", "Teacher", "TeacherFailed", "Unreadable"]

Value = TypeVar("Value")


class Unreadable(ValueError):
    """A reply is not in the form that was asked for; the message says why, to the teacher."""


class Parsed(NamedTuple, Generic[Value]):
    """A reply in the form that was asked for, or None and why not; the keys of its calls."""

    value: Value | None
    error: str
    calls: list[str]


class Teacher:
    """One role's way to its model."""

    def __init__(
        self, endpoint: Endpoint, wire: Wire, journal: Journal, budget: Budget, patience: Patience
    ) -> None:
        self._place = endpoint
        self._journal = journal
        self._repairs = patience.repairs
        way = DirectLine if endpoint.batch is None else BatchLine
        self._line: Line = way(endpoint, wire, journal, budget, patience)

    async def ask(
        self, messages: Messages, sample: int = 0, schema: Mapping[str, Any] | None = None
    ) -> Call:
        """The answer to the messages; `sample` tells apart the draws of one prompt.

        `schema` is that of the JSON to reply with, sent where the endpoint's settings say so.
        """
        question = self._place.question(messages, sample, schema)

        async def make() -> Call:
            answer = await self._line.answer(question)
            return make_call(self._place, question, answer)

        return await self._journal.fetch(question.key, make)

    async def ask_parsed(
        self,
        prompt: str,
        parse: Callable[[str], Value],
        repair: str,
        sample: int = 0,
        schema: Mapping[str, Any] | None = None,
    ) -> Parsed[Value]:
        """The parsed reply to a prompt; one that cannot be read is asked for again, with why."""
        messages = [{"role": "user", "content": prompt}]
        calls: list[str] = []
        error = ""
        for _ in range(1 + self._repairs):
            call = await self.ask(messages, sample, schema)
            calls.append(call.key)
            if call.finish == REFUSED:
                return Parsed(None, f"the endpoint refused the request: {call.answer}", calls)
            try:
                if call.finish == "length":
                    raise Unreadable(f"it was cut off at {self._place.max_tokens} tokens")
                return Parsed(parse(call.answer), "", calls)
            except Unreadable as unreadable:
                error = str(unreadable)
            messages = [
                *messages,
                {"role": "assistant", "content": call.answer or "(empty)"},
                {"role": "user", "content": render(repair, {"error": error})},
            ]
        return Parsed(None, error, calls)

    async def close(self) -> None:
        """Stop what runs beside the calls."""
        await self._line.close()
