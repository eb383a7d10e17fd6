"""One HTTP answer: from a checked request to the engine's requests, and back to text."""

import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.generate.engine_thread import Driver, Mailbox, PromptScores, PromptText
from medreason_jax.generate.protocol import (
    LARGEST_SEED,
    ChatRequest,
    CompletionRequest,
    Refusal,
)
from medreason_jax.generate.replies import Choice, Head, Part, usage
from medreason_jax.generate.requests import Progress, Request
from medreason_jax.generate.text_stream import TokenTexts


@dataclass(frozen=True)
class Limits:
    """`length`: tokens of a prompt and its answer; `pieces`: choices and scored prompts of one
    request; `body`: bytes of it."""

    length: int
    pieces: int
    body: int
    vocab_size: int


@dataclass(frozen=True)
class Work:
    """What the engine is to do for one answer: `n` choices of every prompt, in order."""

    prompts: list[list[int]]
    n: int
    requests: list[Request]
    to_score: list[PromptText]
    echo: bool
    stops: list[str]
    top: int | None  # None: no log-probs are told


def plan(asked: ChatRequest | CompletionRequest, tokenizer: ChatTokenizer, limits: Limits) -> Work:
    """The work of a request; a `Refusal` where the model cannot do it."""
    if isinstance(asked, ChatRequest):
        name, echo = "messages", False
        _check_pieces(asked.n, limits)
        prompts = [_chat_prompt(tokenizer, asked)]
    else:
        name, echo = "prompt", asked.echo
        scored = echo and asked.top is not None
        _check_pieces(len(asked.prompts) * (asked.n + scored), limits)
        prompts = _text_prompts(tokenizer, asked)
    for ids in prompts:
        _check_ids(ids, name, limits.vocab_size)
    control = tokenizer.control_ids
    stop_ids = tuple(control[stop] for stop in asked.stop if stop in control)
    seed = secrets.randbelow(LARGEST_SEED + 1) if asked.seed is None else asked.seed
    requests = [
        Request(
            ids,
            most,
            asked.temperature,
            asked.top_k,
            asked.top_p,
            seed=seed,
            number=number,
            top_logprobs=asked.top or 0,
            stop_ids=stop_ids,
        )
        for ids in prompts
        if (most := _room(ids, name, asked.most_tokens, limits.length)) > 0
        for number in range(asked.n)
    ]
    to_score = []
    if echo and asked.top is not None:
        to_score = [PromptText(ids, asked.top) for ids in prompts]
    return Work(prompts, asked.n, requests, to_score, echo, asked.stop, asked.top)


def _check_pieces(pieces: int, limits: Limits) -> None:
    if pieces > limits.pieces:
        message = (
            f"n samples of every prompt are {pieces} answers; this server takes {limits.pieces}"
        )
        raise Refusal(400, message, param="n", code="invalid_value")


def _chat_prompt(tokenizer: ChatTokenizer, asked: ChatRequest) -> list[int]:
    try:
        return tokenizer.prompt(asked.messages)
    except ValueError as error:
        raise Refusal(400, str(error), param="messages", code="invalid_value") from None


def _text_prompts(tokenizer: ChatTokenizer, asked: CompletionRequest) -> list[list[int]]:
    if not asked.prompts:
        raise Refusal(400, "prompt is an empty list", param="prompt", code="invalid_value")
    return [tokenizer.encode(p) if isinstance(p, str) else list(p) for p in asked.prompts]


def _check_ids(ids: Sequence[int], name: str, vocab_size: int) -> None:
    if not ids:
        message = f"{name} is empty; there is nothing to go on from"
        raise Refusal(400, message, param=name, code="invalid_value")
    wrong = [id for id in ids if not 0 <= id < vocab_size]
    if wrong:
        message = f"{name} holds the id {wrong[0]}; allowed: 0 to {vocab_size - 1}"
        raise Refusal(400, message, param=name, code="invalid_value")


def _room(ids: Sequence[int], name: str, most: int | None, length: int) -> int:
    """How many tokens may be drawn."""
    room = length - len(ids)
    wanted = len(ids) + (1 if most is None else most)
    if wanted > length:
        most_told = "at least 1 new token" if most is None else f"{most} new tokens"
        message = (
            f"{name} of {len(ids)} tokens and {most_told} are {wanted} tokens; this server's "
            f"longest is {length}"
        )
        raise Refusal(400, message, param=name, code="context_length_exceeded")
    return room if most is None else most


class Answer:
    """The choices of one answer as they grow. `close` frees what the engine holds for it."""

    def __init__(self, work: Work, head: Head, texts: TokenTexts, driver: Driver, mailbox: Mailbox):
        self._work, self._head, self._texts = work, head, texts
        self._driver, self._mailbox = driver, mailbox
        self._choices = [
            Choice(index, texts, prompt, work.stops)
            for index, prompt in enumerate(p for p in work.prompts for _ in range(work.n))
        ]

    def close(self) -> None:
        self._driver.close(self._mailbox)

    async def whole(self) -> dict[str, Any]:
        """The body of the answer when all of it is there."""
        parts: list[list[Part]] = [[] for _ in self._choices]
        async for choice, part in self._parts():
            parts[choice.index].append(part)
        shape = self._head.shape
        choices = []
        for choice, each in zip(self._choices, parts, strict=True):
            logprobs = self._logprobs([entry for part in each for entry in part.entries])
            text = "".join(part.text for part in each)
            choices.append(shape.choice(choice.index, text, logprobs, choice.finish_reason))
        told = usage(self._work.prompts, self._choices)
        return self._head.object(shape.whole_name, choices) | {"usage": told}

    async def chunks(self, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
        """Parts of the answer as they come; the last has no choice and tells the usage."""
        shape, no_usage = self._head.shape, {"usage": None} if with_usage else {}
        if shape.opening is not None:
            for choice in self._choices:
                yield self._head.object(shape.part_name, [shape.opening(choice.index)]) | no_usage
        async for choice, part in self._parts():
            if not (part.text or part.entries or part.finish_reason):
                continue  # all of it is held back
            logprobs = self._logprobs(part.entries) if part.entries else None
            told = shape.part(choice.index, part.text, logprobs, part.finish_reason)
            yield self._head.object(shape.part_name, [told]) | no_usage
        if with_usage:
            told = usage(self._work.prompts, self._choices)
            yield self._head.object(shape.part_name, []) | {"usage": told}

    def _logprobs(self, entries) -> dict[str, Any] | None:
        if self._work.top is None:
            return None
        return self._head.shape.logprobs(self._texts, entries)

    async def _parts(self) -> AsyncIterator[tuple[Choice, Part]]:
        work = self._work
        ends = not work.requests  # nothing is to be drawn
        if work.echo and not work.to_score:
            for choice in self._choices:
                yield choice, choice.echo(None, last=ends)
        while any(choice.finish_reason is None for choice in self._choices):
            for index, item in await self._mailbox.take():
                if isinstance(item, PromptScores):
                    for choice in self._choices[index * work.n : (index + 1) * work.n]:
                        yield choice, choice.echo(item, last=ends)
                elif self._choices[index].finish_reason is None:
                    yield self._choices[index], self._take(index, item)

    def _take(self, index: int, progress: Progress) -> Part:
        choice = self._choices[index]
        part = choice.take(progress)
        if choice.stopped:
            self._driver.drop(self._mailbox, index)
        return part
