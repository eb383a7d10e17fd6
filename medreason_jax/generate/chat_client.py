"""`medreason chat`: a terminal that talks to a server of the OpenAI kind, answers as they come."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

HELP = "/clear starts over, /quit ends, Ctrl-C cancels an answer"
CONNECT_SECONDS = 10.0
LONGEST_EVENT = 2**20  # bytes


@dataclass
class Chat:
    """A conversation with one model; `history` is what was asked and answered.

    `settings` are fields of every request. RuntimeError, one line, when the server refuses.
    """

    url: str
    model: str
    api_key: str | None = None
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, str]] = field(default_factory=list)

    def clear(self) -> None:
        self.history = []

    def ask(self, text: str, show: Callable[[str], Any]) -> str:
        """The answer, shown as it comes; Ctrl-C ends it where it is.

        Question and answer are kept, unless there is an error or nothing was shown.
        """
        question, shown = {"role": "user", "content": text}, []

        def tell(part: str) -> None:
            shown.append(part)
            show(part)

        try:
            asyncio.run(self._stream(question, tell))
        except KeyboardInterrupt:
            show(" [cancelled]")
        answer = "".join(shown)
        if answer:
            self.history += [question, {"role": "assistant", "content": answer}]
        return answer

    async def _stream(self, question: dict[str, str], tell: Callable[[str], None]) -> None:
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*first, *self.history, question]
        body = {"model": self.model, "messages": messages, "stream": True, **self.settings}
        async with (
            opened(self.api_key) as session,
            session.post(f"{self.url}/chat/completions", json=body) as response,
        ):
            await check(response)
            async for event in read_events(response.content):
                for choice in event["choices"]:
                    if choice["delta"].get("content"):
                        tell(choice["delta"]["content"])


def served_model(url: str, api_key: str | None) -> str:
    """The model that the server names first."""

    async def ask() -> str:
        async with opened(api_key) as session, session.get(f"{url}/models") as response:
            await check(response)
            return (await response.json())["data"][0]["id"]

    return asyncio.run(ask())


@asynccontextmanager
async def opened(api_key: str | None) -> AsyncIterator[aiohttp.ClientSession]:
    """A session without proxies, keys or cookies of the environment; errors are one line."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
    try:
        async with aiohttp.ClientSession(
            headers=headers, timeout=timeout, trust_env=False, read_bufsize=LONGEST_EVENT
        ) as session:
            yield session
    except (aiohttp.ClientError, TimeoutError) as error:
        raise RuntimeError(f"the server cannot be reached: {error or 'no answer'}") from None


async def check(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        raise RuntimeError(f"HTTP {response.status}: {message_of(await response.text())}")


def message_of(body: str) -> str:
    """What an error's body says."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200]


async def read_events(stream: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON of server-sent events up to `[DONE]`; RuntimeError where one is an error."""
    async for line in stream:
        name, _, data = line.decode().strip().partition(":")
        if name != "data":
            continue
        if data.strip() == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise RuntimeError(message_of(data))
        yield event
    raise RuntimeError("the server ended the answer in the middle")


def converse(chat: Chat, read: Callable[[str], str], write: Callable[[str], Any]) -> None:
    """Read a line, answer it, until /quit or the end of input; errors are shown."""
    write(f"{chat.model} at {chat.url}; {HELP}\n")
    while True:
        try:
            line = read("> ").strip()
        except KeyboardInterrupt:
            write("\n")
            continue
        except EOFError:
            write("\n")
            return
        match line:
            case "":
                continue
            case "/quit":
                return
            case "/clear":
                chat.clear()
            case _ if line.startswith("/"):
                write(f"{line} is no command; {HELP}\n")
            case _:
                answer_line(chat, line, write)


def answer_line(chat: Chat, line: str, write: Callable[[str], Any]) -> None:
    try:
        chat.ask(line, write)
        write("\n")
    except RuntimeError as error:
        write(f"\nfailed: {error}\n")
