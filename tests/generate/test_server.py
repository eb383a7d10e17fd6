"""The server, spoken to with the real client; its answers are a function of the request."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from medreason_jax.generate.requests import Request
from medreason_jax.generate.text_stream import TokenTexts
from tests.generate.fake_engine import (
    BODY,
    LENGTH,
    MODEL,
    FakeSession,
    answer_ids,
    fake_service,
    logprob_of,
    running,
)

MESSAGES = [{"role": "user", "content": "How often is Velotan given?"}]


@pytest.fixture(scope="module")
def server(chat_tokenizer):
    service = fake_service(chat_tokenizer, FakeSession(chat_tokenizer, slots=8), queue=64)
    with running(service) as server:
        yield server


@pytest.fixture(scope="module")
def api(server):
    return server.client()


@pytest.fixture(scope="module")
def expected(chat_tokenizer):
    """(text, ids) that a prompt, a seed and a number get."""

    def of(prompt, seed=0, number=0, most=None):
        ids = chat_tokenizer.prompt(prompt) if isinstance(prompt, list) else prompt
        ids = chat_tokenizer.encode(ids) if isinstance(ids, str) else ids
        most = LENGTH - len(ids) if most is None else most
        drawn = answer_ids(Request(ids, most, seed=seed, number=number), chat_tokenizer.end_id)
        return chat_tokenizer.decode(drawn), drawn

    return of


def chat(api, **fields):
    return api.chat.completions.create(
        **{"model": MODEL, "messages": MESSAGES, "seed": 0, **fields}
    )


# --- answers --------------------------------------------------------------------------------------


def test_a_chat_answer_is_the_engines_text_with_its_usage(api, expected, chat_tokenizer):
    text, ids = expected(MESSAGES)
    reply = chat(api)
    assert reply.object == "chat.completion" and reply.model == MODEL
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", text)
    assert choice.finish_reason == "stop" and choice.logprobs is None
    prompt = len(chat_tokenizer.prompt(MESSAGES))
    assert reply.usage.to_dict() == {
        "prompt_tokens": prompt,
        "completion_tokens": len(ids),
        "total_tokens": prompt + len(ids),
    }


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_limit_of_tokens_cuts_the_answer(api, expected, field):
    (choice,) = (reply := chat(api, **{field: 3})).choices
    assert choice.message.content == expected(MESSAGES, most=3)[0]
    assert choice.finish_reason == "length" and reply.usage.completion_tokens == 3


def test_a_stream_brings_the_same_answer_in_parts(api, expected):
    options = {"include_usage": True}
    chunks = list(chat(api, stream=True, stream_options=options))
    first, *parts, last = chunks
    assert {chunk.id for chunk in chunks} == {first.id}
    assert first.choices[0].delta.role == "assistant"
    assert len(parts) > 2
    assert "".join(c.choices[0].delta.content or "" for c in parts) == expected(MESSAGES)[0]
    assert [c.choices[0].finish_reason for c in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in [first, *parts])
    assert last.choices == [] and last.usage == chat(api).usage


def test_without_the_option_a_stream_has_no_usage(api):
    assert all(c.choices and c.usage is None for c in chat(api, stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_n_samples_differ_and_count_the_prompt_once(api, expected, stream):
    texts = ["", "", ""]
    if stream:
        for chunk in chat(api, n=3, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        reply = chat(api, n=3)
        texts = [choice.message.content for choice in reply.choices]
        drawn = sum(len(expected(MESSAGES, number=k)[1]) for k in range(3))
        assert reply.usage.completion_tokens == drawn
        assert reply.usage.prompt_tokens == chat(api).usage.prompt_tokens
    assert texts == [expected(MESSAGES, number=k)[0] for k in range(3)]
    assert len(set(texts)) == 3


def test_a_seed_repeats_an_answer_and_no_seed_does_not(api):
    def text(**fields):
        return chat(api, **fields).choices[0].message.content

    assert text(seed=5) == text(seed=5) != text(seed=6)
    assert len({text(seed=None) for _ in range(4)}) == 4


def test_settings_reach_the_engine(api, server):
    chat(
        api,
        temperature=0.25,
        top_p=0.5,
        seed=9,
        n=2,
        stop=["<|endoftext|>"],
        max_tokens=7,
        logprobs=True,
        top_logprobs=2,
        extra_body={"top_k": 11},
    )
    requests = [server.session.requests[server.session.count - k] for k in (1, 0)]
    assert [r.number for r in requests] == [0, 1]
    for r in requests:
        assert (r.temperature, r.top_p, r.top_k, r.seed) == (0.25, 0.5, 11, 9)
        assert (r.max_new_tokens, r.top_logprobs) == (7, 2)
        # A stop string that is a control token is one.
        assert r.stop_ids == (server.service.tokenizer.control_ids["<|endoftext|>"],)


def test_openai_defaults_hold(api, server):
    api.completions.create(model=MODEL, prompt="Velotan")
    request = server.session.requests[server.session.count]
    assert (request.temperature, request.top_p, request.top_k) == (1.0, 1.0, 0)
    assert request.max_new_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_cuts_the_text_and_frees_the_slot(chat_tokenizer, expected, stream):
    whole, ids = expected(MESSAGES, seed=1)
    stop = whole[6:9]
    session = FakeSession(chat_tokenizer, round_seconds=0.05)
    with running(fake_service(chat_tokenizer, session)) as server:
        reply = chat(server.client(), seed=1, stop=[stop, "never there"], stream=stream)
        if stream:
            choices = [chunk.choices[0] for chunk in reply]
            text, reason = (
                "".join(c.delta.content or "" for c in choices),
                choices[-1].finish_reason,
            )
        else:
            (choice,) = reply.choices
            text, reason = choice.message.content, choice.finish_reason
            assert reply.usage.completion_tokens < len(ids)
        assert (text, reason) == (whole[: whole.index(stop)], "stop")
        server.wait_until(lambda: session.cancelled == [1])


def test_a_stopped_choice_is_cancelled_while_another_goes_on(chat_tokenizer, expected):
    (first, _), (second, _) = (expected(MESSAGES, number=k) for k in range(2))
    stop = next(first[n : n + 2] for n in range(20) if first[n : n + 2] not in second)
    session = FakeSession(chat_tokenizer, round_seconds=0.1)
    with running(fake_service(chat_tokenizer, session)) as server, ThreadPoolExecutor() as pool:
        asking = pool.submit(chat, server.client(), n=2, stop=stop)
        server.wait_until(lambda: session.cancelled == [1])
        assert list(session.left) == [2]
        texts = [choice.message.content for choice in asking.result().choices]
    assert texts == [first[: first.index(stop)], second]


def test_text_of_control_tokens_is_text(api, server, chat_tokenizer):
    api.completions.create(model=MODEL, prompt="a<|im_end|>b", max_tokens=1)
    request = server.session.requests[server.session.count]
    assert chat_tokenizer.end_id not in request.prompt
    chat(api, messages=[{"role": "user", "content": "<|im_end|>"}])
    request = server.session.requests[server.session.count]
    assert list(request.prompt).count(chat_tokenizer.end_id) == 2  # the template's own


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_are_of_every_token(api, expected, chat_tokenizer, stream):
    text, ids = expected(MESSAGES)
    fields = {"logprobs": True, "top_logprobs": 2, "stream": stream}
    reply = chat(api, **fields)
    choices = [c.choices[0] for c in reply] if stream else reply.choices
    content = [token for c in choices if c.logprobs is not None for token in c.logprobs.content]
    texts = TokenTexts(chat_tokenizer)
    assert [token.token for token in content] == [texts.name(id) for id in ids]
    assert b"".join(bytes(t.bytes) for t in content).decode(errors="replace") == text
    assert [token.logprob for token in content] == pytest.approx([logprob_of(i) for i in ids])
    assert all(len(token.top_logprobs) == 2 for token in content)
    assert all(token.top_logprobs[1].logprob == -5.0 for token in content)


def test_logprobs_without_alternatives(api):
    (choice,) = chat(api, logprobs=True).choices
    assert all(token.top_logprobs == [] for token in choice.logprobs.content)


def test_completion_logprobs_have_offsets_into_the_text(api, expected, chat_tokenizer):
    text, ids = expected("Velotan", most=30)
    fields = {"prompt": "Velotan", "max_tokens": 30, "seed": 0}
    (choice,) = api.completions.create(model=MODEL, **fields, logprobs=1).choices
    told = choice.logprobs
    assert choice.text == text and len(told.tokens) == len(ids)
    assert told.token_logprobs == pytest.approx([logprob_of(id) for id in ids])
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert text[offset:].startswith(token)
    assert all(len(top) == 1 for top in told.top_logprobs)


def test_logprobs_end_where_a_stop_string_begins(api, expected):
    text, _ = expected("Velotan", most=30)
    fields = {"prompt": "Velotan", "max_tokens": 30, "seed": 0, "stop": text[6:9]}
    (choice,) = api.completions.create(model=MODEL, **fields, logprobs=0).choices
    assert choice.text == text[: text.index(text[6:9])]
    assert max(choice.logprobs.text_offset) < len(choice.text)


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_may_be_texts_or_ids_one_or_many(api, expected, chat_tokenizer, stream):
    texts = ["Velotan is", "given 2"]
    ids = [chat_tokenizer.encode(text) for text in texts]
    wanted = [expected(text, number=k, most=8)[0] for text in texts for k in range(2)]

    def ask(prompt):
        fields = {"n": 2, "max_tokens": 8, "seed": 0, "stream": stream}
        reply = api.completions.create(model=MODEL, prompt=prompt, **fields)
        if not stream:
            return [choice.text for choice in reply.choices]
        told = {}
        for chunk in reply:
            (choice,) = chunk.choices
            told[choice.index] = told.get(choice.index, "") + choice.text
        return [told[k] for k in sorted(told)]

    assert ask(texts) == ask(ids) == wanted
    assert ask(texts[0]) == ask(ids[0]) == wanted[:2]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("most", [0, 5])
def test_an_echo_brings_the_prompt_with_its_logprobs(api, expected, chat_tokenizer, stream, most):
    prompts = ["Velotan is given", "2 times"]
    fields = {"max_tokens": most, "seed": 0, "echo": True, "logprobs": 1, "n": 2}
    reply = api.completions.create(model=MODEL, prompt=prompts, stream=stream, **fields)
    choices = [c.choices[0] for c in reply] if stream else reply.choices
    for index, prompt in enumerate(p for p in prompts for _ in range(2)):
        parts = [c for c in choices if c.index == index]
        drawn, new = expected(prompt, number=index % 2, most=most) if most else ("", [])
        asked = chat_tokenizer.encode(prompt)
        assert "".join(part.text for part in parts) == prompt + drawn
        assert parts[-1].finish_reason == ("length" if len(new) == most else "stop")
        told = [part.logprobs for part in parts]
        values = [value for each in told for value in each.token_logprobs]
        assert values[0] is None
        wanted = [logprob_of(id) for id in [*asked, *new][1:]]
        assert values[1:] == pytest.approx(wanted)
        offsets = [offset for each in told for offset in each.text_offset]
        assert offsets == sorted(offsets) and offsets[len(asked) :][:1] in ([], [len(prompt)])


def test_an_echo_without_logprobs(api, expected):
    fields = {"prompt": "Velotan", "echo": True, "seed": 0}
    reply = api.completions.create(model=MODEL, max_tokens=4, **fields)
    assert reply.choices[0].text == "Velotan" + expected("Velotan", most=4)[0]
    reply = api.completions.create(model=MODEL, max_tokens=0, **fields)
    assert reply.choices[0].text == "Velotan" and reply.usage.completion_tokens == 0


def test_models_and_health(api, server):
    assert [model.id for model in api.models.list()] == [MODEL]
    reply = httpx.get(server.url.replace("/v1", "/health"), trust_env=False)
    assert reply.status_code == 200 and reply.json()["status"] == "ok"


def test_one_thread_only_drives_the_engine(server, api):
    chat(api)
    assert len(server.session.threads) == 1
    assert threading.get_ident() not in server.session.threads


# --- refusals -------------------------------------------------------------------------------------

UNSUPPORTED = {
    "tools": [],
    "tool_choice": "auto",
    "user": "me",
    "metadata": {},
    "logit_bias": {},
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "parallel_tool_calls": False,
    "service_tier": "auto",
    "store": False,
    "functions": [],
    "reasoning_effort": "low",
    "modalities": ["text"],
    "anything": 1,
}


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize("field", [*UNSUPPORTED, "suffix", "best_of", "stream_options.x"])
def test_a_field_that_is_not_honoured_is_refused_by_name(server, path, field):
    value = UNSUPPORTED.get(field, 1)
    fields = {"stream": True, "stream_options": {"x": 1}} if "." in field else {field: value}
    status, error = post(server, path, fields)
    assert status == 400
    assert error == {
        "message": f"{field} is not supported by this server; leave it out",
        "type": "invalid_request_error",
        "param": field,
        "code": "unsupported_parameter",
    }


def post(server, path, fields):
    """(status, error) of a request with these fields beside the necessary ones."""
    least = {"messages": MESSAGES} if path.startswith("chat") else {"prompt": "a"}
    body = {"model": MODEL, **least, **fields}
    reply = httpx.post(f"{server.url}/{path}", json=body, trust_env=False)
    return reply.status_code, reply.json().get("error")


def test_null_is_as_good_as_left_out(server):
    nothing = dict.fromkeys([*UNSUPPORTED, "max_tokens", "stop", "seed", "n", "stream", "logprobs"])
    assert post(server, "chat/completions", nothing) == (200, None)


WRONG = [
    ("chat/completions", {"temperature": 2.1}, "temperature", "temperature=2.1 is not allowed: "),
    ("chat/completions", {"temperature": -1}, "temperature", "greater than or equal to 0"),
    ("chat/completions", {"temperature": "1"}, "temperature", "temperature='1' is not allowed"),
    ("chat/completions", {"top_p": 0}, "top_p", "greater than 0"),
    ("chat/completions", {"top_k": -1}, "top_k", "top_k=-1"),
    ("chat/completions", {"seed": -1}, "seed", "seed=-1"),
    ("chat/completions", {"seed": 2**31}, "seed", f"less than or equal to {2**31 - 1}"),
    ("chat/completions", {"n": 0}, "n", "n=0"),
    ("chat/completions", {"n": 129}, "n", "less than or equal to 128"),
    ("chat/completions", {"n": 128}, "n", "n samples of every prompt are 128 answers; this server"),
    ("chat/completions", {"n": True}, "n", "n=True"),
    ("chat/completions", {"max_tokens": 0}, "max_tokens", "max_tokens=0"),
    ("chat/completions", {"max_tokens": 5.5}, "max_tokens", "max_tokens=5.5"),
    ("chat/completions", {"max_tokens": 1, "max_completion_tokens": 1}, None, "give one of them"),
    ("chat/completions", {"stop": [*"abcde"]}, "stop", "at most 4"),
    ("chat/completions", {"stop": ""}, "stop", "stop.0=''"),
    ("chat/completions", {"stop": 5}, "stop", "stop=5"),
    ("chat/completions", {"top_logprobs": 1}, None, "top_logprobs=1 needs logprobs=true"),
    ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "equal to 20"),
    ("chat/completions", {"logprobs": 1}, "logprobs", "logprobs=1"),
    ("chat/completions", {"stream_options": {}}, None, "stream_options needs stream=true"),
    ("chat/completions", {"stream": 1}, "stream", "stream=1"),
    (
        "chat/completions",
        {"response_format": {"type": "json_object"}},
        "response_format",
        "response_format.type='json_object' is not allowed: input should be 'text'",
    ),
    ("chat/completions", {"messages": []}, "messages", "messages is empty"),
    ("chat/completions", {"messages": ["a"]}, "messages", "messages.0='a'"),
    ("chat/completions", {"messages": [{"role": "king", "content": "a"}]}, "messages", "role is"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        "messages",
        "the user's content is",
    ),
    ("completions", {"prompt": ""}, "prompt", "prompt is empty"),
    ("completions", {"prompt": []}, "prompt", "prompt is an empty list"),
    ("completions", {"prompt": [[]]}, "prompt", "prompt is empty"),
    ("completions", {"prompt": [1, "a"]}, "prompt", "a text, token ids, or a list of either"),
    ("completions", {"prompt": 5}, "prompt", "prompt=5 is not allowed"),
    ("completions", {"prompt": [1, 320]}, "prompt", "holds the id 320; allowed: 0 to 319"),
    ("completions", {"prompt": [-1]}, "prompt", "holds the id -1"),
    ("completions", {"prompt": ["a"] * 73}, "n", "are 73 answers; this server takes 72"),
    ("completions", {"max_tokens": 0}, None, "max_tokens=0 needs echo=true"),
    ("completions", {"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ("completions", {"logprobs": True}, "logprobs", "logprobs=True"),
    ("completions", {"messages": MESSAGES}, "messages", "messages is not supported"),
    ("chat/completions", {"echo": True}, "echo", "echo is not supported"),
    (
        "chat/completions",
        {"max_tokens": LENGTH},
        "messages",
        re.compile(rf"messages of \d+ tokens and {LENGTH} new tokens are \d+ tokens; .* {LENGTH}"),
    ),
    (
        "completions",
        {"prompt": [5] * (LENGTH - 15)},
        "prompt",
        f"prompt of {LENGTH - 15} tokens and 16 new tokens are {LENGTH + 1} tokens",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "x " * LENGTH}]},
        "messages",
        "and at least 1 new token are",
    ),
]


@pytest.mark.parametrize(("path", "fields", "param", "said"), WRONG)
def test_a_wrong_value_is_refused_with_what_is_allowed(server, path, fields, param, said):
    status, error = post(server, path, fields)
    assert status == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert re.search(said if isinstance(said, re.Pattern) else re.escape(said), error["message"])
    assert "\n" not in error["message"] and len(error["message"]) < 300


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_missing_field_is_named(server, field):
    body = {"model": MODEL, "messages": MESSAGES}
    del body[field]
    reply = httpx.post(f"{server.url}/chat/completions", json=body, trust_env=False)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"] == f"{field} is missing"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the body is not JSON"),
        (b"[]", "the body should be a JSON object"),
        (b'{"model": "\xff"}', "the body is not JSON"),
        (b'{"model": "\\ud800"}', "half of a character"),
        (b"[" * 15_000, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "the body is not JSON"),
        (b'{"model": "tiny", "temperature": NaN, "messages": []}', "temperature=nan"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(server, content, said):
    headers = {"Content-Type": "application/json"}
    reply = httpx.post(
        f"{server.url}/chat/completions", content=content, headers=headers, trust_env=False
    )
    assert reply.status_code == 400 and said in reply.json()["error"]["message"]


def test_another_model_another_path_and_another_method_are_errors_of_openais_shape(server, api):
    with pytest.raises(openai.NotFoundError, match="the model is 'tiny'") as caught:
        chat(api, model="gpt-x")
    assert caught.value.code == "model_not_found"
    for method, path, status in (("GET", "/v1/chat/completions", 405), ("GET", "/v1/nothing", 404)):
        reply = httpx.request(method, server.url.removesuffix("/v1") + path, trust_env=False)
        assert reply.status_code == status and "message" in reply.json()["error"]


def test_a_body_of_another_type_is_refused(server):
    """A page in a browser can send no JSON to the loopback without being asked."""
    body = json.dumps({"model": MODEL, "messages": MESSAGES})
    headers = {"Content-Type": "text/plain"}
    reply = httpx.post(
        f"{server.url}/chat/completions", content=body, headers=headers, trust_env=False
    )
    assert reply.status_code == 415


@pytest.mark.parametrize("times", [1, 20, 1000])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_long_body_is_refused(server, times, chunked):
    content = b" " * (BODY * times + 1)
    sent = iter([content]) if chunked else content
    headers = {"Content-Type": "application/json"}
    url = f"{server.url}/completions"
    try:
        reply = httpx.post(url, content=sent, headers=headers, trust_env=False)
    except httpx.TransportError:
        assert times > 16  # the server takes no more
        return
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "request_too_large"


# --- keys, places, leaving ------------------------------------------------------------------------


def test_a_key_is_asked_for_but_for_health(chat_tokenizer):
    with running(fake_service(chat_tokenizer, api_key="sesame-é"), "sesame-é") as server:
        http = httpx.Client(trust_env=False)
        for given in ({}, {"Authorization": "Bearer sesame"}, {"Authorization": "Basic sesame-é"}):
            encoded = {name: value.encode() for name, value in given.items()}
            reply = http.get(f"{server.url}/models", headers=encoded)
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == "invalid_api_key"
            reply = http.post(f"{server.url}/chat/completions", headers=encoded, content=b"x")
            assert reply.status_code == 401
        right = {"Authorization": "Bearer sesame-é".encode()}
        assert http.get(f"{server.url}/models", headers=right).status_code == 200
        assert http.get(server.url.replace("/v1", "/health")).status_code == 200


def test_more_than_there_are_places_for_is_told_when_to_come_again(chat_tokenizer):
    session = FakeSession(chat_tokenizer, slots=1, round_seconds=0.05)
    with running(fake_service(chat_tokenizer, session, queue=1)) as server:
        api = server.client()
        with ThreadPoolExecutor() as pool:
            running_ones = [pool.submit(chat, api, max_tokens=150) for _ in range(2)]
            server.wait_until(lambda: server.service.driver.used == 2)
            with pytest.raises(openai.RateLimitError, match="all 2 places are taken") as caught:
                chat(api)
            assert int(caught.value.response.headers["retry-after"]) >= 1
            assert all(future.result().choices for future in running_ones)
        server.wait_until(lambda: server.service.driver.used == 0)
        assert chat(api).choices
        with pytest.raises(openai.BadRequestError, match="3 answers; this server takes 2"):
            chat(api, n=3)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_requests(chat_tokenizer, stream):
    session = FakeSession(chat_tokenizer, round_seconds=0.05)
    with running(fake_service(chat_tokenizer, session)) as server:
        driver = server.service.driver
        api = server.client(timeout=0.4) if not stream else server.client()
        if stream:
            reply = chat(api, n=2, stream=True)
            next(iter(reply))
            server.wait_until(lambda: session.count == 2)
            reply.close()
        else:
            session.round_seconds = 0.3
            with pytest.raises(openai.APITimeoutError):
                chat(api, n=2)
        server.wait_until(lambda: driver.used == 0)
        assert sorted(session.cancelled) == [1, 2] and session.idle
        session.round_seconds = 0.0
        assert chat(server.client()).choices


def test_neighbours_never_see_each_others_tokens(server, expected):
    """Many clients at a time, some of which leave; every text is that of its own prompt."""

    def ask(number):
        messages = [{"role": "user", "content": f"How often is drug {number} given?"}]
        api = server.client()
        for _ in range(20):
            try:
                if number % 3 == 0:
                    reply = chat(api, messages=messages, seed=number, stream=True)
                    next(iter(reply))
                    reply.close()
                    continue
                streamed = number % 3 == 1
                reply = chat(api, messages=messages, seed=number, stream=streamed)
                parts = (
                    (c.choices[0].delta.content or "" for c in reply)
                    if streamed
                    else (choice.message.content for choice in reply.choices)
                )
                assert "".join(parts) == expected(messages, seed=number)[0]
            except openai.RateLimitError:
                continue
        return True

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(12)))
    server.wait_until(lambda: server.service.driver.used == 0)
    assert server.session.idle
