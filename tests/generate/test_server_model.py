"""The server over the real engine: its answers are the engine's, its log-probs the scorer's."""

import random
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medreason_jax.generate.requests import Request
from medreason_jax.generate.serve import make_service
from medreason_jax.generate.text_stream import TokenTexts
from medreason_jax.qwen2.folder import Description
from medreason_jax.qwen2.load import Loaded
from medreason_jax.train.objectives import Scorer
from tests.generate.fake_engine import running
from tests.reference.models import whole_rows
from tests.tiny import tiny_model

MODEL, LENGTH = "tiny", 96
MESSAGES = [{"role": "user", "content": "How often is Velotan given?"}]


@pytest.fixture(scope="module")
def loaded(chat_tokenizer):
    mesh, network, params, _ = tiny_model(num_hidden_layers=2)
    description = Description(network.sizes)
    sharder = network.compute.constrain
    return Loaded(mesh, sharder, network, description, None, chat_tokenizer, params)


def service_of(loaded, slots=4, **options):
    fixed = {"length": LENGTH, "queue": 64, "max_body": 100_000, "api_key": None, "warm": False}
    return make_service(loaded, MODEL, slots=slots, **{**fixed, **options})


@pytest.fixture(scope="module")
def server(loaded):
    with running(service_of(loaded)) as server:
        yield server


@pytest.fixture(scope="module")
def api(server):
    return server.client()


@pytest.fixture(scope="module")
def alone(loaded):
    """[(ids, log-probs)] that a session of its own gives for requests."""
    session = loaded.engine(4).session(loaded.params, length=LENGTH)

    def answer(requests):
        numbers = [session.submit(request) for request in requests]
        drawn = {number: ([], []) for number in numbers}
        while not session.idle:
            for part in session.round():
                drawn[part.request][0].extend(part.ids)
                drawn[part.request][1].extend(part.logprobs)
        return [drawn[number] for number in numbers]

    return answer


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_an_answer_is_the_engines_own(api, alone, chat_tokenizer, temperature):
    fields = {"model": MODEL, "messages": MESSAGES, "seed": 7, "n": 2, "max_tokens": 20}
    sampling = {"temperature": temperature, "top_p": 0.9}
    reply = api.chat.completions.create(**fields, **sampling, logprobs=True)
    prompt = chat_tokenizer.prompt(MESSAGES)
    requests = [Request(prompt, 20, seed=7, number=k, **sampling) for k in range(2)]
    drawn = alone(requests)
    for choice, (ids, logprobs) in zip(reply.choices, drawn, strict=True):
        assert choice.message.content == chat_tokenizer.decode(ids)
        told = [token.logprob for token in choice.logprobs.content]
        np.testing.assert_allclose(told, logprobs, atol=1e-4)
    assert reply.usage.completion_tokens == sum(len(ids) for ids, _ in drawn)


@pytest.fixture(scope="module")
def score(loaded):
    """The trainer's log-probs of texts' tokens from the second on, and of all others there."""
    scorer = Scorer(loaded.network, loaded.scorer(24).shards, 24)

    @jax.jit
    def run(batch):
        h_BTD = scorer.hidden(loaded.params, batch)
        z_BTV = h_BTD @ loaded.network.vocabulary_kernel(loaded.params).T
        return scorer.scores(loaded.params, batch, h_BTD).logp, jax.nn.log_softmax(z_BTV)

    def of(texts):
        tokens = np.zeros((len(texts), LENGTH), np.int32)
        for row, ids in enumerate(texts):
            tokens[row, : len(ids)] = ids
        batch = whole_rows(tokens) | {"targets": jnp.asarray(np.roll(tokens, -1, axis=1))}
        logp_BT, all_BTV = map(np.asarray, run(batch))
        return [(logp_BT[n, : len(t) - 1], all_BTV[n]) for n, t in enumerate(texts)]

    return of


@pytest.mark.parametrize(("top", "most"), [(0, 0), (1, 1), (5, 6)])
def test_an_echo_has_the_scorers_logprobs(api, alone, score, top, most):
    draw = random.Random(top)
    prompts = [[draw.randrange(320) for _ in range(n)] for n in (1, 2, 30, 64, 65, 80)]
    fields = {"echo": True, "logprobs": top, "max_tokens": most, "temperature": 0}
    reply = api.completions.create(model=MODEL, prompt=prompts, **fields)
    drawn = alone([Request(prompt, most) for prompt in prompts]) if most else [([], [])] * 6
    texts = [prompt + ids for prompt, (ids, _) in zip(prompts, drawn, strict=True)]
    for choice, (logp_T, all_TV) in zip(reply.choices, score(texts), strict=True):
        told = choice.logprobs
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        np.testing.assert_allclose(told.token_logprobs[1:], logp_T, atol=1e-4)
        for others, all_V in zip(told.top_logprobs[1:], all_TV, strict=False):
            mine = sorted(others.values(), reverse=True)[:top]
            np.testing.assert_allclose(mine, np.sort(all_V)[::-1][:top], atol=1e-4)
            assert len(others) in ((top, top + 1) if top else (0,))


def test_a_greedy_continuation_is_seen_as_lm_evaluation_harness_sees_it(api, chat_tokenizer):
    """Its local-completions asks with echo, logprobs=1, max_tokens=1, and compares exactly."""
    context = chat_tokenizer.encode("Velotan is given")
    fields = {"model": MODEL, "temperature": 0, "seed": 1234, "logprobs": 1}
    drawn = api.completions.create(prompt=[context], max_tokens=4, **fields).choices[0]
    texts = TokenTexts(chat_tokenizer)
    id_of = {texts.name(id): id for id in range(320)}
    for change, greedy in ((0, True), (1, False)):
        rest = [(id_of[name] + change) % 320 for name in drawn.logprobs.tokens]
        ask = {"prompt": [context + rest], "echo": True, "max_tokens": 1}
        told = api.completions.create(**ask, **fields).choices[0].logprobs
        logprobs = told.token_logprobs[len(context) : -1]
        tops = told.top_logprobs[len(context) : -1]
        assert len(logprobs) == 4
        is_greedy = all(p == max(top.values()) for p, top in zip(logprobs, tops, strict=True))
        assert is_greedy == greedy
        if greedy:
            np.testing.assert_allclose(logprobs, drawn.logprobs.token_logprobs, atol=1e-4)


def test_the_same_request_gets_the_same_answer_among_others(api):
    """Neighbours come and go; text, reason and usage stay."""

    def ask(number):
        fields = {"seed": number, "max_tokens": 5 + number % 30, "temperature": 1}
        reply = api.completions.create(model=MODEL, prompt=f"drug {number}", **fields)
        return reply.choices[0].text, reply.choices[0].finish_reason, reply.usage

    first = [ask(number) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        for order in (range(12), range(11, -1, -1)):
            again = dict(zip(order, pool.map(ask, order), strict=True))
            assert [again[number] for number in range(12)] == first


def test_a_warm_server_compiles_nothing_more(loaded):
    service = service_of(loaded, slots=2, length=32, warm=True)
    engine = service.driver._session.engine
    before = engine.compiled
    with running(service) as server:
        api = server.client()
        for count in (3, 12, 17):
            fields = {"model": MODEL, "prompt": [7] * count, "max_tokens": 15}
            api.completions.create(**fields)
            api.completions.create(**fields, n=2, logprobs=3, temperature=0.5, top_p=0.8)
    assert engine.compiled == before
