"""The batch API of the simulated teacher: /v1/files and /v1/batches, as OpenAI's, in memory."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Answer = Callable[[dict[str, Any]], Awaitable[tuple[int, dict[str, Any]]]]


@dataclass
class Batches:
    """Uploaded files and the batches made of them; `answer` gives (status, body) of one request."""

    answer: Answer
    seconds: float = 0.0  # that a batch takes
    files: dict[str, bytes] = field(default_factory=dict)
    batches: list[dict[str, Any]] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def add_file(self, content: bytes) -> dict[str, Any]:
        name = f"file-{len(self.files) + 1}"
        self.files[name] = content
        return {"id": name, "object": "file", "bytes": len(content), "purpose": "batch"}

    def create(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Start on a batch, at once as far as its caller can see."""
        batch = {
            "id": f"batch_{len(self.batches) + 1}",
            "object": "batch",
            "endpoint": wanted["endpoint"],
            "input_file_id": wanted["input_file_id"],
            "completion_window": wanted["completion_window"],
            "metadata": wanted.get("metadata"),
            "status": "in_progress",
            "created_at": int(time.time()),
            "output_file_id": None,
            "error_file_id": None,
        }
        self.batches.append(batch)
        task = asyncio.create_task(self._work(batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return batch

    def find(self, name: str) -> dict[str, Any] | None:
        return next((batch for batch in self.batches if batch["id"] == name), None)

    def page(self, after: str | None, limit: int) -> dict[str, Any]:
        """Batches, newest first, from the one that follows `after`."""
        newest = self.batches[::-1]
        names = [batch["id"] for batch in newest]
        start = names.index(after) + 1 if after in names else 0
        found = newest[start : start + limit]
        more = start + limit < len(newest)
        return {"object": "list", "data": found, "has_more": more}

    async def _work(self, batch: dict[str, Any]) -> None:
        await asyncio.sleep(self.seconds)
        lines: dict[bool, list[str]] = {True: [], False: []}
        for line in self.files[batch["input_file_id"]].decode().split("\n"):
            if not line:
                continue
            asked = json.loads(line)
            status, body = await self.answer(asked["body"])
            response = {"status_code": status, "request_id": f"req-{asked['custom_id'][:12]}"}
            told = {"custom_id": asked["custom_id"], "response": {**response, "body": body}}
            lines[status == 200].append(json.dumps({**told, "error": None}) + "\n")
        for good, name in ((True, "output_file_id"), (False, "error_file_id")):
            if lines[good]:
                batch[name] = self.add_file("".join(lines[good]).encode())["id"]
        batch["status"] = "completed"

    def routes(self) -> list[Route]:
        """The HTTP surface."""
        return [
            Route("/v1/files", self._post_file, methods=["POST"]),
            Route("/v1/files/{name}/content", self._get_file),
            Route("/v1/batches", self._post_batch, methods=["POST"]),
            Route("/v1/batches", self._get_batches),
            Route("/v1/batches/{name}", self._get_batch),
        ]

    async def _post_file(self, http: Request) -> Response:
        parts = read_form(http.headers.get("content-type", ""), await http.body())
        if parts.get("purpose") != b"batch" or "file" not in parts:
            return refuse(400, "a form with purpose=batch and a file is needed")
        return JSONResponse(self.add_file(parts["file"]))

    async def _get_file(self, http: Request) -> Response:
        name = http.path_params["name"]
        if name not in self.files:
            return refuse(404, f"no file {name}")
        return Response(self.files[name], media_type="application/octet-stream")

    async def _post_batch(self, http: Request) -> Response:
        wanted = json.loads(await http.body())
        if wanted.get("endpoint") != "/v1/chat/completions":
            return refuse(400, f"endpoint={wanted.get('endpoint')!r} is not /v1/chat/completions")
        if wanted.get("input_file_id") not in self.files:
            return refuse(400, f"no file {wanted.get('input_file_id')}")
        return JSONResponse(self.create(wanted))

    async def _get_batches(self, http: Request) -> Response:
        limit = int(http.query_params.get("limit", "20"))
        return JSONResponse(self.page(http.query_params.get("after"), limit))

    async def _get_batch(self, http: Request) -> Response:
        batch = self.find(http.path_params["name"])
        return refuse(404, "no such batch") if batch is None else JSONResponse(batch)


def read_form(content_type: str, body: bytes) -> dict[str, bytes]:
    """The parts of a multipart form by name."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + body)
    parts: dict[str, bytes] = {}
    for part in message.walk() if message.is_multipart() else ():
        name = part.get_param("name", header="content-disposition")
        payload = part.get_payload(decode=True)
        if isinstance(name, str) and isinstance(payload, bytes):
            parts[name] = payload
    return parts


def refuse(status: int, message: str) -> JSONResponse:
    """An error body as the chat endpoint has it."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status)
