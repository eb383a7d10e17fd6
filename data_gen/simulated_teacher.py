"""The built-in teacher: an OpenAI-compatible server on the loopback that needs no network.

`python -m data_gen.simulated_teacher --bank private/teacher_bank.jsonl --port 0` prints one JSON
line with its base URL once it listens. What it answers is in `simulated_replies.py`; here are the
server and the faults it can be asked to make. An answer is a function of (seed, request); a fault
is one of (seed, request, how often this request has come), so that a second try can succeed.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from data_gen.simulated_batches import Batches
from data_gen.simulated_replies import (
    JSON_KINDS,
    REPLIES,
    Bank,
    Draw,
    Rates,
    kind_of,
    malformed,
    read_request,
)

MODEL = "simulated-teacher"
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Faults:
    """How often a call fails, as shares of one, and how."""

    too_many: float = 0.0  # HTTP 429
    server_error: float = 0.0  # HTTP 500
    timeout: float = 0.0  # answers, but only after `stall_seconds`
    malformed_json: float = 0.0
    cut: float = 0.0  # the connection ends in the middle of the answer
    latency_seconds: float = 0.0  # before every answer
    stall_seconds: float = 30.0
    retry_after_seconds: float = 1.0
    batch_seconds: float = 0.0  # that a batch takes


class CutAnswer(JSONResponse):
    """An answer whose connection ends in the middle."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        half = self.body[: len(self.body) // 2]
        await send({"type": "http.response.body", "body": half, "more_body": True})
        # Returning here makes the server close the connection.


def is_no_cut(record: logging.LogRecord) -> bool:
    """Whether a line of the server's log is about something else than a cut that was asked for."""
    return "without completing response" not in record.getMessage()


@dataclass
class Teacher:
    """The bank, the settings, and the counts of what was asked."""

    bank: Bank
    seed: int = 0
    rates: Rates = field(default_factory=Rates)
    faults: Faults = field(default_factory=Faults)
    calls: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    unknown: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    completed: int = 0
    tokens: Counter[str] = field(default_factory=Counter)

    async def answer(self, body: dict[str, Any], in_batch: bool = False) -> JSONResponse:
        """Answer one chat request whose form has been checked; a batch knows no delays or cuts."""
        prompt, kind, used = _prompt_of(body["messages"])
        whole = _digest(body)
        attempt = self.seen[whole]
        self.seen[whole] += 1
        self.calls[kind] += 1
        chance = Draw(self.seed, f"{whole}|{attempt}")
        if chance.below(self.faults.too_many, "429"):
            self.injected["429"] += 1
            wait = f"{self.faults.retry_after_seconds:g}"
            return _error(429, "Too many requests; try later.", "rate_limit", {"Retry-After": wait})
        if chance.below(self.faults.server_error, "500"):
            self.injected["500"] += 1
            return _error(500, "The server had an error.", "server_error")
        if not in_batch and self.faults.latency_seconds:
            await asyncio.sleep(self.faults.latency_seconds)
        stalled = not in_batch and chance.below(self.faults.timeout, "timeout")
        if stalled:
            self.injected["timeout"] += 1
            await asyncio.sleep(self.faults.stall_seconds)
        # A repaired reply is the reply that the earlier prompt gets.
        draw = Draw(self.seed, _digest({**body, "messages": used}))
        request = read_request(prompt, kind, self.bank, draw, self.rates)
        self.unknown += kind != "verify" and request.record is None
        text = REPLIES[kind](request)
        if kind in JSON_KINDS and chance.below(self.faults.malformed_json, "malformed"):
            self.injected["malformed_json"] += 1
            text = malformed(text, chance)
        completion = _completion(body, text, whole)
        self.tokens.update(completion["usage"])
        headers = {"x-request-id": f"req-{whole[:16]}-{attempt}"}
        if not in_batch and not stalled and chance.below(self.faults.cut, "cut"):
            self.injected["cut"] += 1
            return CutAnswer(completion, headers=headers)
        self.completed += 1
        return JSONResponse(completion, headers=headers)

    async def answer_in_batch(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body of one request of a batch."""
        refusal = _refusal(body)
        if refusal is not None:
            return 400, json.loads(bytes(_error(400, refusal, "invalid_request_error").body))
        response = await self.answer(body, in_batch=True)
        return response.status_code, json.loads(bytes(response.body))

    def stats(self) -> dict[str, Any]:
        return {
            "calls": sum(self.calls.values()),
            "calls_by_kind": dict(self.calls),
            "faults": dict(self.injected),
            "unknown_problems": self.unknown,
            "completed": self.completed,
            "tokens": dict(self.tokens),
        }


def _digest(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _prompt_of(messages: list[dict[str, Any]]) -> tuple[str, str, list[dict[str, Any]]]:
    """The last prompt that is no request for repair, its kind, and the messages up to it."""
    prompt, kind, used = "", "other", messages
    for end in range(len(messages), 0, -1):
        if messages[end - 1]["role"] != "user":
            continue
        prompt, used = messages[end - 1]["content"], messages[:end]
        kind = kind_of(prompt)
        if kind != "repair":
            return prompt, kind, used
    return prompt, "other", used


def _completion(body: dict[str, Any], text: str, digest: str) -> dict[str, Any]:
    said = "\n".join(message["content"] for message in body["messages"])
    most = body.get("max_completion_tokens") or body.get("max_tokens")
    cut = most is not None and _tokens(text) > most
    if most is not None and cut:
        text = " ".join(text.split(" ")[: int(most / 1.3)])
    usage = {"prompt_tokens": _tokens(said), "completion_tokens": _tokens(text)}
    return {
        "id": f"chatcmpl-{digest[:24]}",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "length" if cut else "stop",
            }
        ],
        "usage": {**usage, "total_tokens": sum(usage.values())},
    }


def _tokens(text: str) -> int:
    return round(1.3 * len(text.split()))


# --- HTTP -------------------------------------------------------------------------------------


def _error(
    status: int, message: str, kind: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(body, status_code=status, headers=headers)


def _refusal(body: Any) -> str | None:
    """Why a request cannot be answered, in one line; None if it can."""
    if not isinstance(body, dict):
        return "the body should be a JSON object"
    if not isinstance(body.get("model"), str):
        return "model should be the name of a model"
    if body.get("n") not in (None, 1):
        return f"n={body['n']} is not allowed; it should be 1"
    if body.get("stream"):
        return "stream=true is not allowed; it should be false"
    for name in ("max_tokens", "max_completion_tokens"):
        most = body.get(name)
        if most is not None and (not isinstance(most, int) or most < 1):
            return f"{name}={most!r} is not allowed; it should be a whole number from 1"
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return "messages should be a list of at least one message"
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return f"messages[{i}] should have a role and a content"
        if not isinstance(message["content"], str):
            return f"messages[{i}].content should be a text"
    return None


def make_app(teacher: Teacher) -> Starlette:
    """The HTTP application: chat completions, files and batches, models, health, stats."""
    batches = Batches(teacher.answer_in_batch, teacher.faults.batch_seconds)

    async def chat(http: HttpRequest) -> JSONResponse:
        try:
            body = json.loads(await http.body())
        except ValueError as error:
            return _error(400, f"the body is not JSON: {error}", "invalid_request_error")
        refusal = _refusal(body)
        if refusal is not None:
            return _error(400, refusal, "invalid_request_error")
        return await teacher.answer(body)

    async def models(_: HttpRequest) -> JSONResponse:
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "data_gen"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(_: HttpRequest) -> JSONResponse:
        return JSONResponse({"status": "ok", "problems": len(teacher.bank.by_question)})

    async def stats(_: HttpRequest) -> JSONResponse:
        counts = {"files": len(batches.files), "batches": len(batches.batches)}
        return JSONResponse({**teacher.stats(), **counts})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            *batches.routes(),
            *(Route(f"{start}/health", health) for start in ("", "/v1")),
            *(Route(f"{start}/stats", stats) for start in ("", "/v1")),
        ]
    )


# --- the command ------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; it should be from 0 to 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not allowed; it should be 0 or more")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; it should be from 0 to 65535")
    return value


_RATE_OPTIONS = {
    "--error-reasoning": "reasoning",
    "--error-strategy": "strategy",
    "--error-rewrite": "rewrite",
    "--error-filter": "filter",
    "--error-reformat": "reformat",
    "--verifier-false-positive": "verifier_false_positive",
    "--verifier-false-negative": "verifier_false_negative",
}
_FAULT_OPTIONS = {
    "--fault-429": "too_many",
    "--fault-500": "server_error",
    "--fault-timeout": "timeout",
    "--fault-json": "malformed_json",
    "--fault-cut": "cut",
    "--latency-seconds": "latency_seconds",
    "--stall-seconds": "stall_seconds",
    "--retry-after-seconds": "retry_after_seconds",
    "--batch-seconds": "batch_seconds",
}


def make_parser() -> argparse.ArgumentParser:
    """The command line; every default is the one of `Rates` and `Faults`."""
    parser = OneLineParser(
        prog="python -m data_gen.simulated_teacher",
        description="Serve the built-in teacher on the loopback (OpenAI-compatible).",
        epilog="example: python -m data_gen.simulated_teacher "
        "--bank formulary/private/teacher_bank.jsonl --port 0 --fault-429 0.05",
    )
    parser.add_argument(
        "--bank",
        required=True,
        action="append",
        type=Path,
        metavar="FILE",
        help="what the teacher knows (JSON Lines); may be given more than once",
    )
    parser.add_argument("--port", type=_port, default=0, help="0 takes any free port")
    parser.add_argument("--seed", type=int, default=0)
    for options, group in ((_RATE_OPTIONS, Rates()), (_FAULT_OPTIONS, Faults())):
        for option, name in options.items():
            kind = _seconds if name.endswith("_seconds") else _share
            parser.add_argument(
                option,
                dest=name,
                type=kind,
                default=getattr(group, name),
                metavar="SECONDS" if kind is _seconds else "SHARE",
                help="default: %(default)s",
            )
    return parser


def read_bank(paths: Sequence[Path]) -> Bank:
    """Read the private bank; ValueError names the file, the line and what is missing."""
    records = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028 in a text
        except OSError as error:
            raise ValueError(f"--bank {path}: {error.strerror}; give the teacher's file") from None
        records += [_read_record(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    return Bank(records)


_NEEDED = {
    "dose": ("drug", "weight", "condition"),
    "recall": ("drug", "fact"),
    "generic": (),
}


def _read_record(path: Path, number: int, line: str) -> dict[str, Any]:
    where = f"--bank {path} line {number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind not in _NEEDED:
        raise ValueError(
            f"{where}: kind={kind!r} is not allowed; it should be one of {', '.join(_NEEDED)}"
        )
    needed = ("question", "open_question", "answer", "options", *_NEEDED[kind])
    missing = [name for name in needed if name not in record]
    if missing:
        raise ValueError(
            f"{where}: {', '.join(missing)} missing; a {kind} record needs {', '.join(needed)}"
        )
    return record


def listen(port: int) -> socket.socket:
    """A listening socket on the loopback; ValueError if the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ValueError(f"--port {port}: {error.strerror}; take another, or 0 for any") from None
    return listener


def serve(teacher: Teacher, port: int) -> None:
    """Serve until interrupted; print the base URL as one JSON line when connections are taken."""
    listener = listen(port)
    config = uvicorn.Config(
        make_app(teacher), log_level="warning", access_log=False, timeout_graceful_shutdown=1
    )
    logging.getLogger("uvicorn.error").addFilter(is_no_cut)
    url = f"http://{HOST}:{listener.getsockname()[1]}/v1"
    print(json.dumps({"base_url": url}), flush=True)
    uvicorn.Server(config).run(sockets=[listener])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 2 for bad input, with one line on stderr."""
    try:
        given = make_parser().parse_args(arguments)
        rates = Rates(**{f.name: getattr(given, f.name) for f in fields(Rates)})
        faults = Faults(**{f.name: getattr(given, f.name) for f in fields(Faults)})
        serve(Teacher(read_bank(given.bank), given.seed, rates, faults), given.port)
    except ValueError as error:
        print(f"simulated_teacher: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
