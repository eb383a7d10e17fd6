"""Answers in OpenAI's shapes: choices as they grow, whole or in parts, log-probs and usage."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from medreason_jax.generate.engine_thread import PromptScores
from medreason_jax.generate.requests import Progress
from medreason_jax.generate.text_stream import TextStream, TokenTexts

LEAST_LOGPROB = -9999.0  # what OpenAI writes for a token that cannot come


class Entry(NamedTuple):
    """One token with its log-prob and the likeliest ones; `offset` is where its text begins."""

    id: int
    logprob: float | None
    top: Sequence[tuple[int, float]] | None
    offset: int


class Part(NamedTuple):
    """What one choice has got: text and its tokens. `finish_reason` comes with the last."""

    text: str
    entries: list[Entry]
    finish_reason: str | None


class Choice:
    """One choice of an answer. The end of the turn is a token of it, without text.

    With a stop string the tokens that begin before it count, up to the one that completes it.
    """

    def __init__(self, index: int, texts: TokenTexts, prompt: Sequence[int], stops: Sequence[str]):
        self.index, self.prompt, self._texts = index, prompt, texts
        self._stream = TextStream(texts, stops)
        self._entries: list[Entry] = []
        self._echoed = 0
        self.tokens = 0
        self.finish_reason: str | None = None
        self.stopped = False  # by a stop string: the engine may still be at it

    def echo(self, scores: PromptScores | None, *, last: bool) -> Part:
        """The prompt, with the log-probs of its tokens; `last` where no token follows."""
        if last:
            self.finish_reason = "length"
        entries = [] if scores is None else self._prompt_entries(scores)
        text = self._texts.decode(self.prompt)
        self._echoed = len(text)
        return Part(text, entries, self.finish_reason)

    def _prompt_entries(self, scores: PromptScores) -> list[Entry]:
        stream = TextStream(self._texts, [])
        entries = [Entry(self.prompt[0], None, None, 0)]
        stream.push(self.prompt[0])
        for id, logprob, top in zip(self.prompt[1:], scores.logprobs, scores.top, strict=True):
            stream.push(id)
            entries.append(Entry(id, logprob, top, stream.begins))
        return entries

    def take(self, progress: Progress) -> Part:
        """What the engine has drawn, as far as it is sure to be shown."""
        text = ""
        tops = progress.top if progress.top else [()] * len(progress.ids)
        for id, logprob, top in zip(progress.ids, progress.logprobs, tops, strict=True):
            text += self._stream.push(id)
            self._entries.append(Entry(id, logprob, top, self._stream.begins))
            self.tokens += 1
            if self._stream.stopped:
                break
        if progress.finish_reason is not None and not self._stream.stopped:
            text += self._stream.finish()
        self.stopped = self._stream.stopped
        self.finish_reason = "stop" if self.stopped else progress.finish_reason
        return Part(text, self._sure_entries(), self.finish_reason)

    def _sure_entries(self) -> list[Entry]:
        """Those whose text has begun to be shown; all where the answer ends by itself."""
        ended = self.finish_reason is not None and not self.stopped
        end = self._stream.decoded + 1 if ended else self._stream.released
        sure = [entry for entry in self._entries if entry.offset < end]
        self._entries = self._entries[len(sure) :]
        return [entry._replace(offset=entry.offset + self._echoed) for entry in sure]


Logprobs = dict[str, Any] | None
LogprobsOf = Callable[[TokenTexts, Sequence[Entry]], dict[str, Any]]


@dataclass(frozen=True)
class Shape:
    """How one endpoint writes: names, a whole choice, a part of one, and log-probs.

    `choice` and `part` are functions of (index, text, logprobs, finish_reason); `opening` gives a
    choice's first part, if there is one before any text.
    """

    prefix: str
    whole_name: str
    part_name: str
    choice: Callable[[int, str, Logprobs, str | None], dict[str, Any]]
    part: Callable[[int, str, Logprobs, str | None], dict[str, Any]]
    logprobs: LogprobsOf
    opening: Callable[[int], dict[str, Any]] | None


def chat_choice(index: int, text: str, logprobs: Logprobs, reason: str | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def chat_part(index: int, text: str, logprobs: Logprobs, reason: str | None) -> dict[str, Any]:
    delta = {"content": text} if text or logprobs else {}
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def chat_opening(index: int) -> dict[str, Any]:
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def text_choice(index: int, text: str, logprobs: Logprobs, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def chat_logprobs(texts: TokenTexts, entries: Sequence[Entry]) -> dict[str, Any]:
    def told(id: int, logprob: float) -> dict[str, Any]:
        raw = list(texts.raw(id))
        return {"token": texts.name(id), "logprob": _number(logprob), "bytes": raw}

    content = []
    for id, logprob, top, _ in entries:
        assert logprob is not None and top is not None
        others = [told(*each) for each in top]
        content.append(told(id, logprob) | {"top_logprobs": others})
    return {"content": content, "refusal": None}


def text_logprobs(texts: TokenTexts, entries: Sequence[Entry]) -> dict[str, Any]:
    """The first token of a prompt has no log-prob; the alternatives hold the token itself too."""
    tops = []
    for id, logprob, top, _ in entries:
        if logprob is None or top is None:
            tops.append(None)
            continue
        others = {texts.name(other): _number(value) for other, value in top}
        tops.append(others | {texts.name(id): _number(logprob)} if top else {})
    return {
        "tokens": [texts.name(entry.id) for entry in entries],
        "token_logprobs": [None if e.logprob is None else _number(e.logprob) for e in entries],
        "top_logprobs": tops,
        "text_offset": [entry.offset for entry in entries],
    }


def _number(logprob: float) -> float:
    """JSON has no infinity."""
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


CHAT = Shape(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    chat_choice,
    chat_part,
    chat_logprobs,
    chat_opening,
)
TEXT = Shape(
    "cmpl",
    "text_completion",
    "text_completion",
    text_choice,
    text_choice,
    text_logprobs,
    None,
)


@dataclass(frozen=True)
class Head:
    """What every object of one answer begins with."""

    shape: Shape
    id: str
    model: str
    created: int

    def object(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def make_head(shape: Shape, number: str, model: str) -> Head:
    return Head(shape, f"{shape.prefix}-{number}", model, int(time.time()))


def usage(prompts: Sequence[Sequence[int]], choices: Sequence[Choice]) -> dict[str, int]:
    """A prompt counts once, however many samples it got."""
    asked, drawn = sum(map(len, prompts)), sum(choice.tokens for choice in choices)
    return {"prompt_tokens": asked, "completion_tokens": drawn, "total_tokens": asked + drawn}
