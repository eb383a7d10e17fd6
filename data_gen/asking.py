"""What is asked, of whom, with how much patience: what direct and batched asking have in common."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from data_gen.budget import Reservation
from data_gen.journal import Call, Journal, Unsettled, call_key, now
from data_gen.prices import FREE, Rate, Usage
from data_gen.records import canonical_json
from data_gen.transport import Address, Reply

Messages = list[dict[str, str]]

# A chat template adds marks around every message and may add a system prompt of its own; a text
# of n bytes is at most n tokens. Together with the JSON around the texts this bounds the prompt.
TEMPLATE_TOKENS = 32
REFUSED = "refused"  # the finish of a call that the endpoint will never answer


class TeacherFailed(RuntimeError):
    """A teacher cannot be used: it is down, or it refuses the call."""


@dataclass(frozen=True)
class BatchSettings:
    """When calls are sent as a batch, and how often its state is asked for (seconds)."""

    count: int
    seconds: float
    poll_seconds: float
    window: str
    list_lag_seconds: float


@dataclass(frozen=True)
class Endpoint:
    """Where a role's calls go, with which settings; the journal knows the model by `alias`."""

    role: str
    base_urls: tuple[str, ...]
    alias: str
    model: str
    temperature: float
    max_tokens: int
    timeout: float
    seed: int
    revision: str = ""
    top_p: float | None = None
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    structured_output: Literal["off", "json_object", "json_schema"] = "off"
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    query: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = field(default=(), repr=False)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    rate: Rate = FREE
    batch: BatchSettings | None = None

    @property
    def address(self) -> Address:
        return Address(self.headers, self.query, self.timeout, self.secrets)

    def settings(self, schema: Mapping[str, Any] | None) -> dict[str, Any]:
        """What shapes an answer beside model and messages; part of a call's key."""
        settings: dict[str, Any] = {
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }
        if self.top_p is not None:
            settings["top_p"] = self.top_p
        if schema is not None and self.structured_output != "off":
            settings["response_format"] = self._response_format(schema)
        return settings

    def question(
        self, messages: Messages, sample: int, schema: Mapping[str, Any] | None
    ) -> "Question":
        """The request as it is sent, with its key; every draw of a prompt has its own seed."""
        settings = self.settings(schema)
        key = call_key(self.alias, messages, settings, sample, self.revision)
        sent = {"model": self.model, "messages": messages, **settings}
        sent["seed"] = self.seed + sample
        sent[self.limit_field] = sent.pop("max_tokens")
        body = json.dumps(sent, ensure_ascii=False).encode()
        return Question(key, body, self.max_tokens)

    def request_of(self, body: bytes) -> str:
        """What the journal keeps of a request: messages, settings and the draw's number."""
        asked = json.loads(body)
        del asked["model"]
        asked["max_tokens"] = asked.pop(self.limit_field)
        asked["sample"] = asked["seed"] - self.seed
        asked["seed"] = self.seed
        return canonical_json(asked)

    def complaint(self, what: str) -> str:
        """One line about this role's endpoints, without secrets."""
        where = ", ".join(self.base_urls)
        return f"teacher for {self.role} at {where}: {self.address.hide(what)}"

    def _response_format(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        if self.structured_output == "json_object":
            return {"type": "json_object"}
        described = {"name": "reply", "schema": schema, "strict": True}
        return {"type": "json_schema", "json_schema": described}


@dataclass(frozen=True)
class Patience:
    """How often a call is tried and how long is waited between (seconds).

    `busy_seconds` is how long a call is tried again while the endpoint only says that it is busy.
    """

    attempts: int
    first_wait: float
    longest_wait: float
    busy_seconds: float = 3600.0
    repairs: int = 1


@dataclass(frozen=True)
class Question:
    """One request, ready to be sent, and the most tokens that it can use."""

    key: str
    body: bytes
    most_completion: int

    @property
    def most(self) -> Usage:
        return Usage(len(self.body) + TEMPLATE_TOKENS, self.most_completion)


class Answer(NamedTuple):
    """A reply, what it used, and how it was got."""

    reply: Reply
    used: Usage
    attempts: int
    endpoint: str
    batch: str = ""


class Line(Protocol):
    """A way to an endpoint: one by one, or in batches."""

    async def answer(self, question: Question) -> Answer: ...

    async def close(self) -> None: ...


def count_usage(reply: Reply, question: Question) -> Usage:
    """The provider's count; without one, the most that the texts can be."""
    if reply.usage is not None:
        return reply.usage
    said = min(question.most_completion, len(reply.text.encode()))
    return Usage(question.most.prompt, said)


def refusal(message: str) -> Reply:
    """A request that the endpoint will never answer, as something that can be recorded."""
    return Reply(message, REFUSED, Usage(0, 0), "", "")


def make_call(place: Endpoint, question: Question, answer: Answer) -> Call:
    """The journal's row for an answer."""
    reply, used = answer.reply, answer.used
    return Call(
        key=question.key,
        role=place.role,
        alias=place.alias,
        revision=place.revision,
        model=place.model,
        request=place.request_of(question.body),
        answer=reply.text,
        finish=reply.finish,
        prompt_tokens=used.prompt,
        completion_tokens=used.completion,
        cached_tokens=used.cached,
        usage=reply.raw_usage,
        endpoint=answer.endpoint,
        request_id=reply.request_id,
        batch=answer.batch,
        attempts=answer.attempts,
        time=now(),
    )


def keep_unsettled(
    journal: Journal,
    place: Endpoint,
    sent: Sequence[tuple[Question, Reservation]],
    url: str,
    reason: str,
) -> None:
    """Count transmissions that may have been paid for, and write them down."""
    for question, reservation in sent:
        reservation.keep()
        most = question.most
        named = (question.key, place.role, place.model, url)
        journal.leave_unsettled(
            Unsettled(*named, most.prompt, most.completion, place.address.hide(reason), now())
        )
