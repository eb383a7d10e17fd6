"""A session of the engine's kind whose answers are known, and a server around it.

`python -m tests.generate.fake_engine FOLDER ROUND_SECONDS` serves it from a process of its own.
"""

import asyncio
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import openai

from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.generate.answering import Limits
from medreason_jax.generate.engine_thread import Driver, PromptScores, PromptText
from medreason_jax.generate.requests import Progress, Request
from medreason_jax.generate.serve import base_url, bind, run
from medreason_jax.generate.server import Service

MODEL, LENGTH, VOCAB, BODY = "tiny", 200, 320, 20_000


def answer_ids(request: Request, end_id: int) -> list[int]:
    """A function of prompt, seed and number: ids among which are parts of characters."""
    draw = random.Random(repr((list(request.prompt), request.seed, request.number)))
    ids = [draw.randrange(3, VOCAB) for _ in range(draw.randrange(5, 60))]
    cut = ids[: request.max_new_tokens]
    return cut if len(cut) == request.max_new_tokens else [*ids, end_id]


def logprob_of(id: int) -> float:
    return -1.0 - id / 1000


class FakeSession:
    """`slots` requests get up to 4 tokens a round; `round_seconds` is how long one takes."""

    def __init__(self, tokenizer: ChatTokenizer, slots: int = 4, round_seconds: float = 0.0):
        self.tokenizer, self.slots, self.round_seconds = tokenizer, slots, round_seconds
        self.requests: dict[int, Request] = {}
        self.left: dict[int, list[int]] = {}
        self.count = 0
        self.cancelled: list[int] = []
        self.fails = False
        self.threads: set[int] = set()

    @property
    def idle(self) -> bool:
        return not self.left

    def submit(self, request: Request) -> int:
        self.threads.add(threading.get_ident())
        if len(request.prompt) + request.max_new_tokens > LENGTH:
            raise ValueError("too long for the fake")
        self.count += 1
        self.requests[self.count] = request
        self.left[self.count] = answer_ids(request, self.tokenizer.end_id)
        return self.count

    def cancel(self, request: int) -> None:
        self.cancelled.append(request)
        del self.left[request]

    def round(self) -> list[Progress]:
        self.threads.add(threading.get_ident())
        time.sleep(self.round_seconds)
        if self.fails:
            raise RuntimeError("out of memory\non the device")
        told = []
        for number in list(self.left)[: self.slots]:
            ids, rest = self.left[number][:4], self.left[number][4:]
            request = self.requests[number]
            reason = None
            if rest:
                self.left[number] = rest
            else:
                del self.left[number]
                reason = "stop" if ids[-1] == self.tokenizer.end_id else "length"
            top = [[(id, logprob_of(id)), (3, -5.0)][: request.top_logprobs] for id in ids]
            told.append(Progress(number, ids, [logprob_of(id) for id in ids], top, reason))
        return told


class FakeScoring:
    """One text at a time; a token's log-prob is `logprob_of` it."""

    def fitting(self, texts: Sequence[PromptText]) -> int:
        return 1

    def score(self, texts: Sequence[PromptText]) -> list[PromptScores]:
        return [
            PromptScores(
                [logprob_of(id) for id in text.ids[1:]],
                [[(id, logprob_of(id)), (3, -5.0)][: text.top] for id in text.ids[1:]],
            )
            for text in texts
        ]


class Running:
    """A server in a thread of this process."""

    def __init__(self, service: Service, url: str, api_key: str):
        self.service, self.url, self.key = service, url, api_key
        self.session = service.driver._session
        self.error: BaseException | None = None

    def client(self, **options) -> openai.OpenAI:
        http = openai.DefaultHttpxClient(trust_env=False)
        fixed = {"base_url": self.url, "max_retries": 0, "timeout": 60, "api_key": self.key}
        return openai.OpenAI(http_client=http, **{**fixed, **options})

    def wait_until(self, holds, seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it did not come to hold"
            time.sleep(0.005)


def fake_service(tokenizer, session=None, *, queue: int = 4, api_key=None) -> Service:
    session = FakeSession(tokenizer) if session is None else session
    driver = Driver(session, FakeScoring(), session.slots + queue)
    limits = Limits(LENGTH, driver.capacity, BODY, VOCAB)
    return Service(MODEL, tokenizer, driver, limits, api_key)


@contextmanager
def running(service: Service, api_key: str = "none", send_buffer: int | None = None):
    """A `Running` server on the loopback; `send_buffer` bounds what a socket holds for a client."""
    listener, is_ready = bind("127.0.0.1", 0), threading.Event()
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = Running(service, base_url("127.0.0.1", listener), api_key)

    def work() -> None:
        try:
            asyncio.run(run(service, listener, is_ready.set))
        except RuntimeError as error:
            server.error = error

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert is_ready.wait(30)
        yield server
    finally:
        if thread.is_alive():
            service.driver._loop.call_soon_threadsafe(service.stop)
        thread.join(30)
        assert not thread.is_alive()


def main() -> None:
    folder, round_seconds = Path(sys.argv[1]), float(sys.argv[2])
    tokenizer = ChatTokenizer(folder)
    session = FakeSession(tokenizer, round_seconds=round_seconds)
    session.fails = "fails" in sys.argv
    listener = bind("127.0.0.1", 0)
    url = base_url("127.0.0.1", listener)
    service = fake_service(tokenizer, session)
    asyncio.run(run(service, listener, lambda: print(json.dumps(url), flush=True)))


if __name__ == "__main__":
    from medreason_jax.cli import exit_code_of

    sys.exit(exit_code_of(main))
