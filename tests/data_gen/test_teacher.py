"""The teacher against a scripted server: faults, limits, what is sent and what is not."""

import asyncio
import json
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from data_gen.budget import Budget, BudgetSpent, Caps
from data_gen.journal import Journal, read_cost
from data_gen.teacher import Endpoint, Patience, Teacher, TeacherFailed, Unreadable
from data_gen.transport import open_wire, read_retry_after
from data_gen.verifiers import TeacherVerifier, parse_verdict
from tests.data_gen.conftest import completion

MESSAGES = [{"role": "user", "content": "q"}]


def ask(url, tmp_path, work=None, budget=None, attempts=4, repairs=1, **endpoint) -> Any:
    """Run `work(teacher)` (default: ask once) with a fresh journal; returns its result."""

    async def run():
        limits = Budget(4) if budget is None else budget()
        journal = Journal(tmp_path / "journal.sqlite")
        urls = (url,) if isinstance(url, str) else tuple(url)
        fields = {"role": "reasoner", "base_urls": urls, "alias": "m", "model": "m"}
        settings = {"temperature": 0.7, "max_tokens": 64, "timeout": 2.0, "seed": 5}
        try:
            async with open_wire() as wire:
                place = Endpoint(**{**fields, **settings, **endpoint})
                patience = Patience(attempts, 0.01, 0.05, repairs=repairs)
                teacher = Teacher(place, wire, journal, limits, patience)
                return await (teacher.ask(MESSAGES) if work is None else work(teacher))
        finally:
            await journal.drain()
            journal.close()

    return asyncio.run(run())


def error(status, headers=None, code=None):
    body = {"error": {"message": "the reason", "type": "t", "code": code}}
    return status, headers or {}, json.dumps(body)


def test_the_request_holds_model_settings_and_a_seed_per_sample(serve, tmp_path):
    server = serve(lambda body, n: "hello")

    async def twice(teacher):
        await teacher.ask(MESSAGES)
        return await teacher.ask(MESSAGES, sample=2)

    assert ask(server.base_url, tmp_path, twice).answer == "hello"
    first, second = server.requests
    wanted = {"model": "m", "messages": MESSAGES, "temperature": 0.7, "max_tokens": 64, "seed": 5}
    assert first == wanted
    assert second == {**wanted, "seed": 7}


@pytest.mark.parametrize(
    "fault",
    [
        error(429, {"Retry-After": "0"}),
        error(500),
        error(503),
        (200, {}, "{ not JSON"),
        (200, {}, "{}"),
        (200, {"Content-Type": "text/html"}, "<html>gateway</html>"),
    ],
)
def test_a_passing_fault_is_tried_again_and_counted(serve, tmp_path, fault):
    server = serve(lambda body, n: fault if n < 2 else "hello")
    call = ask(server.base_url, tmp_path)
    assert (call.answer, call.attempts, len(server.requests)) == ("hello", 3, 3)


def test_retry_after_is_honoured(serve, tmp_path):
    server = serve(lambda body, n: error(429, {"Retry-After": "0.5"}) if n == 0 else "hello")
    start = time.monotonic()
    ask(server.base_url, tmp_path)
    assert time.monotonic() - start >= 0.5


def test_a_server_that_keeps_failing_is_given_up_with_one_line(serve, tmp_path):
    server = serve(lambda body, n: error(500))
    with pytest.raises(TeacherFailed) as caught:
        ask(server.base_url, tmp_path)
    message = str(caught.value)
    assert len(server.requests) == 4
    assert "\n" not in message
    for word in ("reasoner", server.base_url, "HTTP 500", "the reason", "4 tries"):
        assert word in message


def test_a_server_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TeacherFailed, match=r"reasoner at http://127.0.0.1:9/v1: cannot be reache"):
        ask("http://127.0.0.1:9/v1", tmp_path)


def test_a_slow_server_is_given_up_after_the_timeout(serve, tmp_path):
    server = serve(lambda body, n: time.sleep(1) or "late")
    with pytest.raises(TeacherFailed, match=r"no answer within 0.1 s \(2 tries\)"):
        ask(server.base_url, tmp_path, timeout=0.1, attempts=2)


@pytest.mark.parametrize(
    "refusal", [error(400), error(401), error(404), error(429, code="insufficient_quota")]
)
def test_a_refusal_is_not_tried_again(serve, tmp_path, refusal):
    server = serve(lambda body, n: refusal)
    with pytest.raises(TeacherFailed, match=f"HTTP {refusal[0]}"):
        ask(server.base_url, tmp_path)
    assert len(server.requests) == 1


def test_redirects_are_not_followed(serve, tmp_path):
    other = serve(lambda body, n: "from elsewhere")
    server = serve(lambda body, n: (307, {"Location": f"{other.base_url}/chat/completions"}, ""))
    with pytest.raises(TeacherFailed):
        ask(server.base_url, tmp_path)
    assert other.requests == []


def test_the_environment_of_the_client_library_plays_no_part(serve, tmp_path, monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Secret: secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    server = serve(lambda body, n: "hello")
    assert ask(server.base_url, tmp_path).answer == "hello"
    assert "secret" not in json.dumps(server.headers)


def test_a_cap_on_calls_stops_before_the_call_is_sent(serve, tmp_path):
    server = serve(lambda body, n: "hello")

    async def many(teacher):
        for sample in range(5):
            await teacher.ask(MESSAGES, sample=sample)

    with pytest.raises(BudgetSpent, match=r"limits\.max_calls=3"):
        ask(server.base_url, tmp_path, many, budget=lambda: Budget(4, Caps(calls=3)))
    assert len(server.requests) == 3


def test_a_cap_on_tokens_reserves_what_a_call_could_use(serve, tmp_path):
    server = serve(lambda body, n: "hello")

    async def many(teacher):
        await asyncio.gather(*(teacher.ask(MESSAGES, sample=i) for i in range(20)))

    # A call uses 10 tokens: after four, the cap minus 40 does not hold another reservation.
    place = Endpoint("reasoner", (server.base_url,), "m", "m", 0.7, 64, 2.0, 5)
    cap = place.question(MESSAGES, 0, None).most.tokens + 35
    with pytest.raises(BudgetSpent, match=rf"limits\.max_tokens={cap}"):
        ask(server.base_url, tmp_path, many, budget=lambda: Budget(4, Caps(tokens=cap)))
    assert len(server.requests) == 4


def test_no_more_calls_are_out_than_the_limit(serve, tmp_path):
    out = {"now": 0, "most": 0}

    def script(body, n):
        out["now"] += 1
        out["most"] = max(out["most"], out["now"])
        time.sleep(0.02)
        out["now"] -= 1
        return "hello"

    async def many(teacher):
        await asyncio.gather(*(teacher.ask(MESSAGES, sample=i) for i in range(20)))

    ask(serve(script).base_url, tmp_path, many, budget=lambda: Budget(3))
    assert out["most"] <= 3


def test_the_verifier_reads_exactly_one_word():
    assert parse_verdict(" True.\n") is True
    assert parse_verdict("False") is False
    for text in ("untrue", "true", "False. It is not true", "True False", "", "Not True"):
        with pytest.raises(ValueError, match="exactly one word"):
            parse_verdict(text)


@pytest.mark.parametrize(
    ("replies", "outcome", "calls"),
    [
        (["True"], "true", 1),
        (["False."], "false", 1),
        (["It is untrue", "False"], "false", 2),
        (["It is true", "Certainly true"], "unscored", 2),
    ],
)
def test_a_verdict_that_cannot_be_read_is_asked_again_once(
    serve, tmp_path, replies, outcome, calls
):
    server = serve(lambda body, n: replies[n])

    async def verify(teacher):
        verifier = TeacherVerifier(teacher, "{conclusion} {answer}", "again: {error}")
        return await verifier.verify("80 mg", "80 mg", "q")

    verdict = ask(server.base_url, tmp_path, verify)
    assert verdict.outcome == outcome
    assert len(verdict.calls) == len(server.requests) == calls
    if calls == 2:
        assert [m["role"] for m in server.requests[1]["messages"]] == ["user", "assistant", "user"]
        assert "exactly one word" in server.requests[1]["messages"][2]["content"]


def test_a_reply_that_was_cut_off_is_not_read(serve, tmp_path):
    server = serve(lambda body, n: (200, {}, completion("True", "length")) if n == 0 else "False")

    async def verify(teacher):
        return await TeacherVerifier(teacher, "{conclusion}", "{error}").verify("a", "b", "q")

    assert ask(server.base_url, tmp_path, verify).outcome == "false"
    assert "cut off at 64 tokens" in server.requests[1]["messages"][2]["content"]


def test_what_is_out_at_once_settles_at_what_the_server_bears(serve, tmp_path):
    out, lock = [0], threading.Lock()

    def script(body, n):
        with lock:
            out[0] += 1
            crowded = out[0] > 4
        if not crowded:
            time.sleep(0.02)
        with lock:
            out[0] -= 1
        return error(429) if crowded else "hello"

    async def many(teacher):
        return await asyncio.gather(*(teacher.ask(MESSAGES, sample=i) for i in range(200)))

    server = serve(script)
    calls = ask(server.base_url, tmp_path, many, budget=lambda: Budget(32))
    refused = len(server.requests) - len(calls)
    assert 0 < refused < len(calls) / 2


def test_requests_per_minute_hold_for_a_role(serve, tmp_path):
    server = serve(lambda body, n: "hello")

    async def many(teacher):
        start = time.monotonic()
        await asyncio.gather(*(teacher.ask(MESSAGES, sample=i) for i in range(15)))
        return time.monotonic() - start

    # 10 a second: ten at once, then one every 0.1 s
    assert ask(server.base_url, tmp_path, many, requests_per_minute=600) > 0.45


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3), ("0.5", 0.5), ("-1", 0), ("nan", 0), ("inf", 0), ("soon", 0), (None, 0)],
)
def test_a_time_to_wait_is_read_from_a_number(value, seconds):
    assert read_retry_after(value) == seconds


def test_a_time_to_wait_is_read_from_a_date():
    then = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert 85 < read_retry_after(then) <= 90
    assert read_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


# --- several endpoints, refusals, possibly paid -------------------------------------------------


def test_the_load_is_spread_over_several_endpoints_of_a_role(serve, tmp_path):
    servers = [serve(lambda body, n: time.sleep(0.02) or "hello") for _ in range(2)]

    async def many(teacher):
        await asyncio.gather(*(teacher.ask(MESSAGES, sample=i) for i in range(20)))

    ask([server.base_url for server in servers], tmp_path, many)
    assert all(len(server.requests) >= 5 for server in servers)


def test_an_endpoint_that_is_down_is_rested_while_the_other_answers(serve, tmp_path):
    server = serve(lambda body, n: "hello")
    urls = ["http://127.0.0.1:9/v1", server.base_url]

    async def many(teacher):
        start = time.monotonic()
        calls = [await teacher.ask(MESSAGES, sample=i) for i in range(30)]
        return calls, time.monotonic() - start

    calls, seconds = ask(urls, tmp_path, many)
    assert {call.endpoint for call in calls} == {server.base_url}
    assert sum(call.attempts for call in calls) - len(calls) < 10
    assert seconds < 5


def test_a_busy_endpoint_is_waited_for_beyond_the_tries_of_a_broken_one(serve, tmp_path):
    server = serve(lambda body, n: error(429) if n < 9 else "hello")
    assert ask(server.base_url, tmp_path, attempts=2).attempts == 10


def test_a_server_that_asks_for_a_long_wait_is_left_alone_while_another_answers(serve, tmp_path):
    away = serve(lambda body, n: error(429, {"Retry-After": "600"}))
    with pytest.raises(TeacherFailed, match=r"HTTP 429: the reason \(1 tries\)"):
        ask(away.base_url, tmp_path)
    server = serve(lambda body, n: "hello")
    call = ask([away.base_url, server.base_url], tmp_path)
    assert (call.answer, call.endpoint, call.attempts) == ("hello", server.base_url, 2)


def test_a_request_that_is_refused_for_what_it_holds_is_recorded_as_refused(serve, tmp_path):
    def script(body, n):
        bad = "poison" in body["messages"][0]["content"]
        return error(400, code="content_filter") if bad else "hello"

    async def two(teacher):
        parsed = (teacher.ask_parsed(text, str, "again: {error}") for text in ("poison", "good"))
        return await asyncio.gather(*parsed)

    server = serve(script)
    poison, good = ask(server.base_url, tmp_path, two)
    assert good.value == "hello" and poison.value is None
    assert "the endpoint refused the request: HTTP 400: the reason" in poison.error
    again, _ = ask(server.base_url, tmp_path, two)
    assert again == poison and len(server.requests) == 2  # nothing is asked a second time


def test_an_endpoint_that_refuses_everything_stops_the_run(serve, tmp_path):
    server = serve(lambda body, n: error(422))

    async def many(teacher):
        await asyncio.gather(*(teacher.ask(MESSAGES, sample=i) for i in range(6)))

    with pytest.raises(TeacherFailed, match="HTTP 422"):
        ask(server.base_url, tmp_path, many)


def unsettled(tmp_path):
    return read_cost(tmp_path / "journal.sqlite")["possibly_paid"]


def test_a_call_that_timed_out_or_was_cut_is_possibly_paid_and_one_that_was_refused_is_not(
    serve, tmp_path
):
    slow = serve(lambda body, n: time.sleep(0.5) or "late")
    with pytest.raises(TeacherFailed):
        ask(slow.base_url, tmp_path / "slow", timeout=0.1, attempts=2)
    assert unsettled(tmp_path / "slow")["timed out or cut"]["requests"] == 2
    for name, reply in {"busy": error(500), "lasting": error(401)}.items():
        server = serve(lambda body, n, reply=reply: reply)
        with pytest.raises(TeacherFailed):
            ask(server.base_url, tmp_path / name, attempts=2)
        assert unsettled(tmp_path / name) == {}
    with pytest.raises(TeacherFailed):
        ask("http://127.0.0.1:9/v1", tmp_path / "away", attempts=1)
    assert unsettled(tmp_path / "away") == {}


def test_a_call_that_is_given_up_while_it_is_out_is_possibly_paid(serve, tmp_path):
    server = serve(lambda body, n: time.sleep(0.5) or "late")

    async def give_up(teacher):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(teacher.ask(MESSAGES), 0.1)

    ask(server.base_url, tmp_path, give_up)
    assert unsettled(tmp_path)["timed out or cut"]["requests"] == 1


def test_one_that_waits_for_anothers_call_makes_it_itself_when_the_other_gives_up(serve, tmp_path):
    server = serve(lambda body, n: time.sleep(0.3) or "hello")

    async def two(teacher):
        first = asyncio.create_task(teacher.ask(MESSAGES))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(teacher.ask(MESSAGES))
        await asyncio.sleep(0.05)
        first.cancel()
        return await second

    assert ask(server.base_url, tmp_path, two).answer == "hello"
    assert len(server.requests) == 2


# --- the row in the journal ---------------------------------------------------------------------


def test_endpoint_attempts_request_id_usage_and_cached_tokens_are_columns(serve, tmp_path):
    body = json.loads(completion("hello"))
    body["usage"]["prompt_tokens_details"] = {"cached_tokens": 5}
    reply = (200, {"x-request-id": "req-7"}, json.dumps(body))
    server = serve(lambda sent, n: error(500) if n == 0 else reply)
    call = ask(server.base_url, tmp_path, revision="2026-01")
    assert (call.endpoint, call.attempts, call.request_id) == (server.base_url, 2, "req-7")
    assert (call.prompt_tokens, call.completion_tokens, call.cached_tokens) == (7, 3, 5)
    assert json.loads(call.usage) == body["usage"]
    assert (call.alias, call.revision, call.model) == ("m", "2026-01", "m")


def test_an_answer_without_usage_is_counted_by_the_most_that_its_texts_can_be(serve, tmp_path):
    body = json.loads(completion("hé"))
    del body["usage"]
    call = ask(serve(lambda sent, n: (200, {}, json.dumps(body))).base_url, tmp_path)
    assert call.completion_tokens == 3 and call.prompt_tokens > 100 and call.usage == ""


def test_a_schema_is_sent_and_told_apart_only_where_the_endpoint_has_it(serve, tmp_path):
    schema = {"type": "object"}
    server = serve(lambda sent, n: "{}")
    keys = set()
    for mode in ("off", "json_object", "json_schema"):

        async def one(teacher):
            return await teacher.ask(MESSAGES, schema=schema)

        keys.add(ask(server.base_url, tmp_path, one, structured_output=mode).key)
    sent = [request.get("response_format") for request in server.requests]
    described = {"name": "reply", "schema": schema, "strict": True}
    wanted = [None, {"type": "json_object"}, {"type": "json_schema", "json_schema": described}]
    assert sent == wanted and len(keys) == 3


def test_top_p_and_another_name_of_the_limit_are_sent(serve, tmp_path):
    server = serve(lambda sent, n: "hello")
    ask(server.base_url, tmp_path, top_p=0.9, limit_field="max_completion_tokens")
    [sent] = server.requests
    assert sent["top_p"] == 0.9 and sent["max_completion_tokens"] == 64
    assert "max_tokens" not in sent


def test_a_reply_that_cannot_be_read_is_asked_for_as_often_as_set(serve, tmp_path):
    server = serve(lambda sent, n: "bad")

    def parse(text):
        raise Unreadable("no good")

    async def parsed(teacher):
        return await teacher.ask_parsed("q", parse, "again: {error}")

    for repairs in (0, 2):
        before = len(server.requests)
        reply = ask(server.base_url, tmp_path / str(repairs), parsed, repairs=repairs)
        assert reply.value is None and reply.error == "no good"
        assert len(server.requests) - before == len(reply.calls) == 1 + repairs
