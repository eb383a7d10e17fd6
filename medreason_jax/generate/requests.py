"""What is asked of the engine, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass

MOST_TOP = 20  # alternatives of a token
MOST_STOPS = 4  # stop ids of a request, beside the engine's


@dataclass(frozen=True)
class Request:
    """A prompt to answer, and how."""

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    seed: int = 0
    number: int = 0  # tells apart the samples of one seed
    top_logprobs: int = 0  # alternatives of every token
    stop_ids: tuple[int, ...] = ()  # beside the engine's own


@dataclass(frozen=True)
class Progress:
    """What a request got in one round; `top` holds (id, log-prob) of the likeliest tokens."""

    request: int
    ids: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    finish_reason: str | None  # "stop", "length"; None while it goes on


@dataclass(frozen=True)
class Completion:
    """Sampled ids (the end of turn included when it came) with the log-prob of each."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop" or "length"


def check(request: Request, length: int, vocab_size: int) -> None:
    """ValueError where a request cannot be answered in `length` cache slots."""
    prompt, new = len(request.prompt), request.max_new_tokens
    if prompt == 0 or new < 1:
        raise ValueError(f"prompt of {prompt} tokens, max_new_tokens={new}; both are at least 1")
    if prompt + new > length:
        raise ValueError(
            f"prompt of {prompt} tokens and max_new_tokens={new} are beyond the {length} tokens "
            "that a slot holds"
        )
    if not 0 <= request.top_logprobs <= MOST_TOP:
        raise ValueError(f"top_logprobs={request.top_logprobs}; allowed: 0 to {MOST_TOP}")
    if len(request.stop_ids) > MOST_STOPS:
        raise ValueError(f"{len(request.stop_ids)} stop ids; allowed: at most {MOST_STOPS}")
    if not all(0 <= i < vocab_size for i in request.prompt):
        raise ValueError(f"the prompt holds an id that is not from 0 to {vocab_size - 1}")
