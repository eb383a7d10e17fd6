"""Asking in batches (OpenAI's /v1/files and /v1/batches): cheaper, answered within hours.

Calls that are ready are collected, by count or by seconds, and go out together. A batch is in the
journal, with a tag made from its calls, before anything of it is uploaded; the tag travels in the
batch's metadata. After a kill the provider's list is searched for the tag before anything is sent
again, so a batch is paid for once. Its answers are recorded as calls, all in one commit.
"""

import asyncio
import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from typing import Any

import aiohttp

from data_gen.asking import (
    Answer,
    BatchSettings,
    Endpoint,
    Patience,
    Question,
    TeacherFailed,
    count_usage,
    keep_unsettled,
    make_call,
    refusal,
)
from data_gen.budget import Budget, Reservation
from data_gen.journal import Batch, Journal, now
from data_gen.transport import Failure, Wire, failure_of, read_reply

TAG = "data_gen_tag"  # the name of the tag in a batch's metadata
ENDED = {"completed", "failed", "expired", "cancelled"}
PAGE = 100
_CLOCK_SKEW = 3600.0  # seconds that a provider's clock may differ from this one


class _Asked:
    """A call that waits for its batch."""

    def __init__(self, question: Question, held: Reservation, attempt: int) -> None:
        self.question = question
        self.held = held
        self.attempt = attempt
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.answer.add_done_callback(lambda done: done.cancelled() or done.exception())


class BatchLine:
    """One role's way to its endpoint, many calls at a time."""

    def __init__(
        self, place: Endpoint, wire: Wire, journal: Journal, budget: Budget, patience: Patience
    ) -> None:
        assert place.batch is not None
        self._place = place
        self._settings: BatchSettings = place.batch
        self._journal = journal
        self._budget = budget
        self._patience = patience
        self._provider = Provider(place, wire, patience)
        self._asked: dict[str, _Asked] = {}
        self._collected: list[_Asked] = []
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._found_open: asyncio.Task[None] | None = None

    async def answer(self, question: Question) -> Answer:
        """The answer, from a batch that is out already or from the next one."""
        if self._found_open is None:
            self._found_open = asyncio.create_task(self._take_up_open_batches())
        await asyncio.shield(self._found_open)
        for attempt in range(1, self._patience.attempts + 1):
            asked = await self._join(question, attempt)
            try:
                return await asyncio.shield(asked.answer)
            except Failure as failure:
                if failure.kind == "lasting" or attempt == self._patience.attempts:
                    told = f"{failure} ({attempt} batches)"
                    raise TeacherFailed(self._place.complaint(told)) from None
        raise AssertionError("patience.attempts is at least 1")

    async def close(self) -> None:
        """Stop waiting for batches; the journal knows them, the next run takes them up."""
        if self._timer is not None:
            self._timer.cancel()
        tasks = [*self._tasks, *([self._found_open] if self._found_open is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- collecting ---

    async def _join(self, question: Question, attempt: int) -> _Asked:
        if question.key in self._asked:
            return self._asked[question.key]
        place = self._place
        held = await self._budget.reserve(place.model, question.most, place.rate, leased=False)
        asked = self._asked[question.key] = _Asked(question, held, attempt)
        self._collected.append(asked)
        if len(self._collected) >= self._settings.count:
            self._send_off()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._settings.seconds, self._send_off)
        return asked

    def _send_off(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        collected, self._collected = self._collected, []
        if collected:
            self._run(self._send_new(collected), collected)

    def _run(self, work: Any, asked: Iterable[_Asked]) -> None:
        """Let a batch go on beside the calls; what it fails with reaches all who wait for it."""

        async def run() -> None:
            try:
                await work
            except Exception as error:
                for one in asked:
                    self._end(one, error)

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _end(self, asked: _Asked, outcome: Answer | Exception) -> None:
        self._asked.pop(asked.question.key, None)
        if asked.answer.done():
            return
        if isinstance(outcome, Exception):
            if isinstance(outcome, Failure) and outcome.maybe_paid:
                sent = [(asked.question, asked.held)]
                url = self._place.base_urls[0]
                keep_unsettled(self._journal, self._place, sent, url, str(outcome))
            asked.held.release()
            asked.answer.set_exception(outcome)
        else:
            asked.held.settle(outcome.used)
            asked.answer.set_result(outcome)

    # --- one batch ---

    async def _send_new(self, asked: list[_Asked]) -> None:
        asked = sorted(asked, key=lambda one: one.question.key)
        name = "\n".join(f"{one.question.key} {one.attempt}" for one in asked)
        tag = hashlib.sha256(f"{self._where}\n{name}".encode()).hexdigest()[:32]
        batch = Batch(
            tag=tag,
            place=self._where,
            state="planned",
            provider_id="",
            requests="".join(write_line(one.question) for one in asked),
            prompt_tokens=sum(one.question.most.prompt for one in asked),
            completion_tokens=sum(one.question.most.completion for one in asked),
            model=self._place.model,
            time=now(),
        )
        await self._journal.plan_batch(batch)
        await self._submit(batch, asked)

    @property
    def _where(self) -> str:
        place = self._place
        return f"{place.role} {place.base_urls[0]} {place.model}"

    async def _submit(self, batch: Batch, asked: list[_Asked]) -> None:
        provider_id = await self._provider.submit(batch, self._settings.window)
        batch = batch._replace(state="submitted", provider_id=provider_id)
        await self._journal.mark_batch(batch.tag, batch.state, provider_id)
        await self._follow(batch, asked)

    async def _follow(self, batch: Batch, asked: list[_Asked]) -> None:
        """Wait for the end of a batch, record its answers, hand them out."""
        state = await self._provider.wait(batch.provider_id, self._settings.poll_seconds)
        found = await self._provider.read_results(state)
        outcomes = {
            one.question.key: self._outcome(one, batch, found.get(one.question.key), state)
            for one in asked
        }
        if asked and all(_is_refused(outcome) for outcome in outcomes.values()):
            first = next(iter(outcomes.values()))
            outcomes = dict.fromkeys(outcomes, Failure(_said(first), "lasting"))
        questions = {one.question.key: one.question for one in asked}
        calls = [
            make_call(self._place, questions[key], outcome)
            for key, outcome in outcomes.items()
            if isinstance(outcome, Answer)
        ]
        await self._journal.record_batch(batch, calls)
        for one in asked:
            self._end(one, outcomes[one.question.key])

    def _outcome(
        self, asked: _Asked, batch: Batch, line: dict[str, Any] | None, state: dict[str, Any]
    ) -> Answer | Failure:
        url = self._place.base_urls[0]
        if line is None:
            status = state.get("status")
            said = _errors_of(state) or f"the batch is {status} without this answer"
            kind = "lasting" if status == "failed" else "broken"
            return Failure(said, kind, maybe_paid=status == "completed")
        response = line.get("response")
        if not isinstance(response, dict):
            return Failure(f"an error in the batch: {line.get('error')}", "broken")
        status, content = response.get("status_code"), json.dumps(response.get("body")).encode()
        headers = {"x-request-id": str(response.get("request_id") or "")}
        try:
            if status != 200:
                raise failure_of(int(status or 500), {}, content, self._place.address)
            reply = read_reply(content, headers, self._place.address)
        except Failure as failure:
            if failure.kind != "refused":
                return failure
            reply = refusal(self._place.address.hide(failure))
        used = count_usage(reply, asked.question)
        return Answer(reply, used, asked.attempt, url, batch.provider_id)

    # --- after a kill ---

    async def _take_up_open_batches(self) -> None:
        """Go on with every batch of an earlier run: wait for it, or send what was never sent."""
        for batch in self._journal.open_batches(self._where):
            asked = [self._adopt(question) for question in read_lines(batch, self._place)]
            self._run(self._take_up(batch, asked), asked)

    def _adopt(self, question: Question) -> _Asked:
        place = self._place
        held = self._budget.adopt(place.model, question.most, place.rate)
        self._asked[question.key] = _Asked(question, held, 1)
        return self._asked[question.key]

    async def _take_up(self, batch: Batch, asked: list[_Asked]) -> None:
        provider_id = batch.provider_id or await self._provider.find(batch)
        if provider_id is None:
            # The provider's list may lag behind what it took just before the kill.
            age = now() - batch.time
            await asyncio.sleep(max(0.0, self._settings.list_lag_seconds - age))
            provider_id = await self._provider.find(batch)
        if provider_id is None:
            await self._submit(batch, asked)
            return
        if not batch.provider_id:
            await self._journal.mark_batch(batch.tag, "submitted", provider_id)
        await self._follow(batch._replace(state="submitted", provider_id=provider_id), asked)


class Provider:
    """The batch calls of an endpoint; every one is tried again while it is busy or broken."""

    def __init__(self, place: Endpoint, wire: Wire, patience: Patience) -> None:
        self._place = place
        self._address = place.address
        self._url = place.base_urls[0]
        self._wire = wire
        self._patience = patience

    async def submit(self, batch: Batch, window: str) -> str:
        """Upload and create; returns the provider's id. Never creates a second batch of a tag."""
        file_id = (await self._upload(batch))["id"]
        wanted = {
            "input_file_id": file_id,
            "endpoint": "/v1/chat/completions",
            "completion_window": window,
            "metadata": {TAG: batch.tag},
        }
        for tried in range(self._patience.attempts):
            try:
                return (await self._once("POST", "/batches", json=wanted))["id"]
            except Failure as failure:
                await self._endure(failure, tried)
                if failure.maybe_paid and (made := await self.find(batch)) is not None:
                    return made
        raise AssertionError("the last failure was raised")

    async def find(self, batch: Batch) -> str | None:
        """The provider's id of the batch that carries this tag, by its list, newest first."""
        after: dict[str, str] = {}
        while True:
            page = await self._get("/batches", params={"limit": str(PAGE), **after})
            found = page.get("data") or []
            for one in found:
                if (one.get("metadata") or {}).get(TAG) == batch.tag:
                    return one["id"]
            oldest = found[-1].get("created_at") if found else None
            too_old = isinstance(oldest, int | float) and oldest < batch.time - _CLOCK_SKEW
            if not page.get("has_more") or not found or too_old:
                return None
            after = {"after": found[-1]["id"]}

    async def wait(self, provider_id: str, poll_seconds: float) -> dict[str, Any]:
        """The batch as the provider tells it, once it has ended."""
        while True:
            state = await self._get(f"/batches/{provider_id}")
            if state.get("status") in ENDED:
                return state
            await asyncio.sleep(poll_seconds)

    async def read_results(self, state: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The lines of the output and error files, by the key of the call."""
        lines: dict[str, dict[str, Any]] = {}
        for name in ("error_file_id", "output_file_id"):
            if state.get(name):
                content = await self._retry("GET", f"/files/{state[name]}/content")
                lines |= read_results(content)
        return lines

    async def _upload(self, batch: Batch) -> dict[str, Any]:
        for tried in range(self._patience.attempts):
            form = aiohttp.FormData()
            form.add_field("purpose", "batch")
            form.add_field(
                "file",
                batch.requests.encode(),
                filename=f"{batch.tag}.jsonl",
                content_type="application/jsonl",
            )
            try:
                return await self._once("POST", "/files", data=form)
            except Failure as failure:
                await self._endure(failure, tried)
        raise AssertionError("the last failure was raised")

    async def _get(self, path: str, **request: Any) -> dict[str, Any]:
        return _read_object(await self._retry("GET", path, **request))

    async def _retry(self, method: str, path: str, **request: Any) -> bytes:
        for tried in range(self._patience.attempts):
            try:
                return await self._send(method, path, **request)
            except Failure as failure:
                await self._endure(failure, tried)
        raise AssertionError("the last failure was raised")

    async def _once(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        return _read_object(await self._send(method, path, **request))

    async def _send(self, method: str, path: str, **request: Any) -> bytes:
        status, headers, content = await self._wire.send(
            method, f"{self._url}{path}", self._address, **request
        )
        if status != 200:
            raise failure_of(status, headers, content, self._address)
        return content

    async def _endure(self, failure: Failure, tried: int) -> None:
        """Wait before the next try; `TeacherFailed` if there is no use in one."""
        if failure.kind in ("refused", "lasting") or tried + 1 >= self._patience.attempts:
            raise TeacherFailed(self._place.complaint(str(failure))) from None
        longest = min(self._patience.longest_wait, self._patience.first_wait * 2 ** min(tried, 30))
        await asyncio.sleep(max(failure.wait, random.uniform(0, longest)))


# --- the lines of a batch ---------------------------------------------------------------------


def write_line(question: Question) -> str:
    """A call as a line of the file that is uploaded."""
    line = {
        "custom_id": question.key,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": json.loads(question.body),
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def read_lines(batch: Batch, place: Endpoint) -> Iterator[Question]:
    """The calls of a batch that is in the journal."""
    for line in batch.requests.split("\n"):
        if line:
            value = json.loads(line)
            body = json.dumps(value["body"], ensure_ascii=False).encode()
            yield Question(value["custom_id"], body, value["body"][place.limit_field])


def read_results(content: bytes) -> dict[str, dict[str, Any]]:
    """The lines of a result file by the key of the call; one that cannot be read is no answer."""
    lines: dict[str, dict[str, Any]] = {}
    for line in content.decode(errors="replace").split("\n"):
        try:
            value = json.loads(line)
            lines[value["custom_id"]] = value
        except (ValueError, KeyError, TypeError):
            continue  # the call that it belongs to is missing, and is asked again
    return lines


def _is_refused(outcome: Answer | Failure) -> bool:
    return isinstance(outcome, Answer) and outcome.reply.finish == "refused"


def _said(outcome: Answer | Failure) -> str:
    return outcome.reply.text if isinstance(outcome, Answer) else str(outcome)


def _errors_of(state: dict[str, Any]) -> str:
    errors = state.get("errors")
    data = errors.get("data") if isinstance(errors, dict) else None
    return "; ".join(str(error.get("message")) for error in data[:3]) if data else ""


def _read_object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Failure("an answer that is no JSON object", "broken", maybe_paid=True)
    return value
