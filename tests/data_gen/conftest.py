"""A scripted OpenAI-compatible server on the loopback; a teacher that is a function."""

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from data_gen.teacher import Parsed, Unreadable

Script = Callable[[dict[str, Any], int], Any]


class FakeServer:
    """Answers request n (from 0) with `script(body, n)`: a text, or (status, headers, body)."""

    def __init__(self, script: Script) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        owner, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(owner.requests)
                    owner.requests.append(body)
                    owner.headers.append(dict(self.headers))
                    owner.paths.append(self.path)
                reply = script(body, number)
                if isinstance(reply, str):
                    reply = (200, {}, completion(reply))
                status, headers, text = reply
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def secure(self, context: ssl.SSLContext) -> None:
        """Speak TLS from now on."""
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.base_url = self.base_url.replace("http:", "https:")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def completion(text: str | None, finish: str = "stop") -> str:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish,
    }
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return json.dumps(
        {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        | {"choices": [choice], "usage": usage}
    )


@pytest.fixture
def serve() -> Iterator[Callable[[Script], FakeServer]]:
    """Start scripted servers; they stop with the test."""
    servers: list[FakeServer] = []

    def start(script: Script) -> FakeServer:
        servers.append(FakeServer(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


class ScriptedTeacher:
    """As `Teacher.ask_parsed`; `script(prompt, sample)` gives a reply, or also its repair."""

    def __init__(self, script: Callable[[str, int], str | list[str]]) -> None:
        self._script = script
        self.prompts: list[str] = []

    async def ask_parsed(self, prompt, parse, repair, sample=0, schema=None):
        self.prompts.append(prompt)
        replies = self._script(prompt, sample)
        error, calls = "", []
        for reply in [replies] if isinstance(replies, str) else replies:
            calls.append(f"call-{len(self.prompts)}-{len(calls)}")
            try:
                return Parsed(parse(reply), "", calls)
            except Unreadable as unreadable:
                error = str(unreadable)
        return Parsed(None, error, calls)


@pytest.fixture
def scripted() -> type[ScriptedTeacher]:
    return ScriptedTeacher
