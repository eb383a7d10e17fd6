"""The teacher: an OpenAI-compatible endpoint, asked through the journal.

One call is: look it up, else reserve, send, try again while the endpoint is busy or broken, record,
use. The environment's OPENAI_* variables, proxies and redirects play no part.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, NamedTuple, TypeVar

import tenacity

from data_gen.budget import Budget
from data_gen.journal import Call, Journal, call_key, now
from data_gen.prompting import render
from data_gen.records import canonical_json

Value = TypeVar("Value")
Messages = list[dict[str, str]]

BUSY_OR_BROKEN = {408, 409, 425, 429}  # and every 5xx
LONGEST_RETRY_AFTER = 120.0  # seconds; a server that asks for more is taken as down


class TeacherFailed(RuntimeError):
    """A teacher cannot be used: it is down, or it refuses the call."""


class Unreadable(ValueError):
    """A reply is not in the form that was asked for; the message says why, to the teacher."""


class Parsed(NamedTuple, Generic[Value]):
    """A reply in the form that was asked for, or None and why not; the keys of its calls."""

    value: Value | None
    error: str
    calls: list[str]


@dataclass(frozen=True)
class Endpoint:
    """Where a role's calls go, with which settings; the journal knows the model by `alias`."""

    role: str
    base_url: str
    alias: str
    model: str
    temperature: float
    max_tokens: int
    timeout: float
    seed: int
    api_key: str = "none"


@dataclass(frozen=True)
class Patience:
    """How often a call is tried and how long is waited between (seconds)."""

    attempts: int
    first_wait: float
    longest_wait: float


class Teacher:
    """One role's way to its model."""

    def __init__(
        self, endpoint: Endpoint, http: Any, journal: Journal, budget: Budget, patience: Patience
    ) -> None:
        self._endpoint = endpoint
        self._journal = journal
        self._budget = budget
        self._patience = patience
        self._backoff = tenacity.wait_random_exponential(
            multiplier=patience.first_wait, max=patience.longest_wait
        )
        self._client = _make_client(endpoint, http)

    async def ask(self, messages: Messages, sample: int = 0) -> Call:
        """The answer to the messages; `sample` tells apart the draws of one prompt."""
        place = self._endpoint
        settings = {
            "temperature": place.temperature,
            "max_tokens": place.max_tokens,
            "seed": place.seed,
        }
        key = call_key(place.alias, messages, settings, sample)

        async def make() -> Call:
            reply, attempts = await self._send_until_answered(messages, place.seed + sample)
            text, finish, prompt_tokens, completion_tokens = reply
            self._budget.record(prompt_tokens, completion_tokens)
            request = canonical_json({"messages": messages, "sample": sample, **settings})
            usage = (prompt_tokens, completion_tokens)
            where = (f"{place.base_url} {place.model}", attempts, now())
            return Call(key, place.role, request, text, finish, *usage, *where)

        return await self._journal.fetch(key, make)

    async def ask_parsed(
        self, prompt: str, parse: Callable[[str], Value], repair: str, sample: int = 0
    ) -> Parsed[Value]:
        """The parsed reply to a prompt; a reply that cannot be read is asked for once more."""
        messages = [{"role": "user", "content": prompt}]
        calls: list[str] = []
        error = ""
        for _ in range(2):
            call = await self.ask(messages, sample)
            calls.append(call.key)
            try:
                if call.finish == "length":
                    raise Unreadable(f"it was cut off at {self._endpoint.max_tokens} tokens")
                return Parsed(parse(call.answer), "", calls)
            except Unreadable as unreadable:
                error = str(unreadable)
            messages = [
                *messages,
                {"role": "assistant", "content": call.answer or "(empty)"},
                {"role": "user", "content": render(repair, {"error": error})},
            ]
        return Parsed(None, error, calls)

    async def _send_until_answered(
        self, messages: Messages, seed: int
    ) -> tuple[tuple[str, str, int, int], int]:
        attempts = 0

        async def send() -> tuple[str, str, int, int]:
            nonlocal attempts
            attempts += 1
            return await self._send(messages, seed)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_is_worth_another_try),
            stop=tenacity.stop_after_attempt(self._patience.attempts),
            wait=self._wait,
            reraise=True,
        )
        try:
            return await retrying(send), attempts
        except _Transient as failure:
            raise TeacherFailed(self._complaint(f"{failure} ({attempts} tries)")) from None

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Exponential back-off with full jitter, and never less than the server asks for."""
        failure = state.outcome.exception() if state.outcome is not None else None
        asked = failure.wait if isinstance(failure, _Transient) else 0.0
        return max(asked, self._backoff(state))

    async def _send(self, messages: Messages, seed: int) -> tuple[str, str, int, int]:
        import openai

        place = self._endpoint
        size = sum(len(message["content"].encode()) for message in messages)
        async with self._budget.request(size + place.max_tokens):
            try:
                reply = await self._client.chat.completions.create(
                    model=place.model,
                    messages=messages,
                    temperature=place.temperature,
                    max_tokens=place.max_tokens,
                    seed=seed,
                )
            except openai.APIStatusError as error:
                raise self._failure(error) from None
            except openai.APITimeoutError:
                raise _Transient(f"no answer within {place.timeout:g} s") from None
            except openai.APIConnectionError as error:
                reason = error.__cause__ or error
                raise _Transient(
                    f"cannot be reached: {str(reason) or type(reason).__name__}"
                ) from None
            except (openai.APIError, ValueError) as error:
                raise _Transient(f"an answer that cannot be read: {_one_line(error)}") from None
            return _content(reply)

    def _failure(self, error: Any) -> Exception:
        said = f"HTTP {error.status_code}: {_one_line(error.message)}"
        lasting = error.code == "insufficient_quota"
        if (error.status_code in BUSY_OR_BROKEN or error.status_code >= 500) and not lasting:
            return _Transient(said, _retry_after(error.response.headers.get("retry-after")))
        return TeacherFailed(self._complaint(said))

    def _complaint(self, what: str) -> str:
        return f"teacher for {self._endpoint.role} at {self._endpoint.base_url}: {what}"


class _Transient(Exception):
    """A try that failed where the next may not; `wait` is what the server asked for, in seconds."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


def _is_worth_another_try(failure: BaseException) -> bool:
    return isinstance(failure, _Transient) and failure.wait <= LONGEST_RETRY_AFTER


def make_http_client() -> Any:
    """The one HTTP client of a run: no proxies from the environment, no redirects."""
    import openai

    return openai.DefaultAsyncHttpxClient(trust_env=False, follow_redirects=False)


def read_api_key(variable: str | None) -> str:
    """The key in an environment variable; an endpoint without one takes any text."""
    if variable is None:
        return "none"
    key = os.environ.get(variable)
    if not key:
        raise ValueError(f"api_key_env={variable}: the environment variable is not set")
    return key


def _make_client(endpoint: Endpoint, http: Any) -> Any:
    import openai

    with _without_openai_environment():
        return openai.AsyncOpenAI(
            api_key=endpoint.api_key,
            base_url=endpoint.base_url,
            max_retries=0,
            timeout=endpoint.timeout,
            http_client=http,
        )


@contextmanager
def _without_openai_environment() -> Iterator[None]:
    """The client reads organisation, project and headers from OPENAI_*; here it finds none."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("OPENAI_")}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _content(reply: Any) -> tuple[str, str, int, int]:
    try:
        choice = reply.choices[0]
        text = choice.message.content if choice.message.content is not None else ""
        finish = choice.finish_reason if choice.finish_reason is not None else ""
    except (AttributeError, IndexError, TypeError):
        raise _Transient("an answer that is no chat completion") from None
    if not isinstance(text, str):
        raise _Transient("an answer that is no chat completion")
    usage = reply.usage
    if usage is None:
        return text, finish, 0, 0
    return text, finish, usage.prompt_tokens or 0, usage.completion_tokens or 0


def _retry_after(value: str | None) -> float:
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _one_line(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:197] + "..."
