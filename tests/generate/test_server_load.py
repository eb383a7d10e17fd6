"""Many clients for minutes, some of whom leave: no wrong answer, no growing memory."""

import asyncio
import random
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import openai
import pytest

from tests.generate.serve_command import served, write_model

CLIENTS, MINUTES = 64, 10
FIRST_MINUTE = 2  # from which on memory may not grow
QUESTIONS = 200
LEAVING = 0.1  # of the requests


def request_of(number: int) -> dict:
    """One of `QUESTIONS` requests: lengths, settings and kinds differ."""
    draw = random.Random(number)
    words = " ".join(f"drug {draw.randrange(100)}" for _ in range(draw.randrange(1, 15)))
    sampling = {"temperature": draw.choice([0, 0.7, 1.0]), "top_p": draw.choice([0.9, 1.0])}
    fields = {"model": "tiny", "seed": number, "max_tokens": draw.randrange(5, 100), **sampling}
    if draw.random() < 0.2:
        fields["stop"] = [draw.choice("abcd"), "9 x"]
    if draw.random() < 0.2:
        return fields | {"prompt": words}
    if draw.random() < 0.2:
        fields |= {"logprobs": True, "top_logprobs": 2}
    return fields | {"messages": [{"role": "user", "content": words}]}


async def ask(api, fields: dict, stream: bool, first_token=None) -> str:
    """The text of an answer; `first_token` gets the seconds until a stream's first text."""
    is_chat = "messages" in fields
    create = (api.chat.completions if is_chat else api.completions).create
    start = time.monotonic()
    reply = await create(**fields, stream=stream)
    if not stream:
        return reply.choices[0].message.content if is_chat else reply.choices[0].text
    text = ""
    async for chunk in reply:
        choice = chunk.choices[0]
        part = (choice.delta.content or "") if is_chat else choice.text
        if part and not text and first_token is not None:
            first_token.append(time.monotonic() - start)
        text += part
    return text


async def leave(api, fields: dict, draw: random.Random) -> None:
    """Ask, and go away before the answer is there."""
    doing = asyncio.create_task(ask(api, fields, stream=draw.random() < 0.5))
    await asyncio.wait({doing}, timeout=draw.random() * 0.5)
    doing.cancel()
    await asyncio.gather(doing, return_exceptions=True)


def anonymous_memory(pid: int) -> int:
    """Bytes of a process that no file is behind."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


async def load(url: str, pid: int) -> dict:
    """What `CLIENTS` clients saw in `MINUTES`, and the server's memory by the minute."""
    limits = openai.DefaultAsyncHttpxClient(trust_env=False, timeout=120)
    api = openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0, http_client=limits)
    known = [await ask(api, request_of(number), False) for number in range(QUESTIONS)]
    counts, first_token, memory = Counter(), [], []
    end = time.monotonic() + 60 * MINUTES

    async def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            which = draw.randrange(QUESTIONS)
            if draw.random() < LEAVING:
                await leave(api, request_of(which), draw)
                counts["left"] += 1
                continue
            stream = draw.random() < 0.5
            text = await ask(api, request_of(which), stream, first_token)
            counts["right" if text == known[which] else "wrong"] += 1

    async def watch() -> None:
        for _ in range(MINUTES):
            await asyncio.sleep(60)
            memory.append(anonymous_memory(pid))

    await asyncio.gather(watch(), *map(client, range(CLIENTS)))
    seconds = {f"p{p}": float(np.percentile(first_token, p)) for p in (50, 90, 99)}
    return {**counts, "memory": memory, "first_token": seconds}


@pytest.mark.slow
@pytest.mark.timeout(60 * (MINUTES + 15))
def test_many_clients_get_their_own_answers_and_memory_stays(chat_tokenizer, tmp_path):
    folder = write_model(tmp_path / "tiny", chat_tokenizer)
    with served(folder, "--length", "256", "--warm-up") as (process, url):
        seen = asyncio.run(load(url, process.pid))
        print(seen)
        process.terminate()
        _, error = process.communicate(timeout=60)
        assert (process.returncode, error) == (0, "")
    assert seen.get("wrong", 0) == 0 and seen["right"] > 1000 and seen["left"] > 100
    assert seen["memory"][-1] <= 1.05 * seen["memory"][FIRST_MINUTE - 1]
