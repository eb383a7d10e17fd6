"""The teacher against a scripted server: faults, limits, what is sent and what is not."""

import asyncio
import json
import time

import pytest
from openai import DefaultAsyncHttpxClient

from data_gen.budget import Budget, BudgetSpent
from data_gen.journal import Journal
from data_gen.teacher import Endpoint, Patience, Teacher, TeacherFailed, make_http_client
from data_gen.verifiers import TeacherVerifier, parse_verdict

MESSAGES = [{"role": "user", "content": "q"}]


def ask(url, tmp_path, work=None, budget=None, attempts=4, **endpoint):
    """Run `work(teacher)` (default: ask once) with a fresh journal; returns its result."""

    async def run():
        limits = Budget(4) if budget is None else budget()
        journal = Journal(tmp_path / "journal.sqlite")
        fields = {"role": "reasoner", "base_url": url, "alias": "m", "model": "m"}
        settings = {"temperature": 0.7, "max_tokens": 64, "timeout": 2.0, "seed": 5}
        try:
            async with make_http_client() as http:
                place = Endpoint(**{**fields, **settings, **endpoint})
                teacher = Teacher(place, http, journal, limits, Patience(attempts, 0.01, 0.05))
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


def test_the_http_client_comes_from_the_client_library():
    assert isinstance(make_http_client(), DefaultAsyncHttpxClient)


def test_a_cap_on_calls_stops_before_the_call_is_sent(serve, tmp_path):
    server = serve(lambda body, n: "hello")

    async def many(teacher):
        for sample in range(5):
            await teacher.ask(MESSAGES, sample=sample)

    with pytest.raises(BudgetSpent, match=r"limits\.max_calls=3"):
        ask(server.base_url, tmp_path, many, budget=lambda: Budget(4, max_calls=3))
    assert len(server.requests) == 3


def test_a_cap_on_tokens_reserves_what_a_call_could_use(serve, tmp_path):
    server = serve(lambda body, n: "hello")

    async def many(teacher):
        await asyncio.gather(*(teacher.ask(MESSAGES, sample=i) for i in range(20)))

    # A call may use 1 + 64 tokens and uses 10: after four, 100 - 40 does not hold another 65.
    with pytest.raises(BudgetSpent, match=r"limits\.max_tokens=100"):
        ask(server.base_url, tmp_path, many, budget=lambda: Budget(4, max_tokens=100))
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
    from tests.data_gen.conftest import completion

    server = serve(lambda body, n: (200, {}, completion("True", "length")) if n == 0 else "False")

    async def verify(teacher):
        return await TeacherVerifier(teacher, "{conclusion}", "{error}").verify("a", "b", "q")

    assert ask(server.base_url, tmp_path, verify).outcome == "false"
    assert "cut off at 64 tokens" in server.requests[1]["messages"][2]["content"]
