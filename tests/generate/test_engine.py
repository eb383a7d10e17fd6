"""Slots that are refilled while others decode: whose tokens are whose, and what is compiled."""

import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medreason_jax.generate.engine import Engine, Session, size_for
from medreason_jax.generate.programs import Programs
from medreason_jax.generate.requests import Completion, Request
from medreason_jax.generate.sampling import Sampling
from medreason_jax.rl.rollout import rollout_rows
from tests.tiny import tiny_model

END, PAD = 2, 0


def make_engine(slots=4, mesh_shape=(1, 1, 1), **fields):
    mesh, network, params, _ = tiny_model(mesh_shape, **fields)
    params = jax.device_put(params, network.compute.constrain.tree(params))
    return Engine(network, mesh, slots=slots, end_id=END, pad_id=PAD), params


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def prompts(count: int, seed=0, least=17, most=23) -> list[list[int]]:
    """Of one size, as is the cache that they and 20 more tokens need (32 and 48)."""
    random = np.random.default_rng(seed)
    return [random.integers(3, 320, random.integers(least, most)).tolist() for _ in range(count)]


def finish(session: Session) -> dict[int, tuple[list[int], list[float], str]]:
    """Every request's ids, log-probs and end."""
    done: dict[int, tuple[list[int], list[float], str]] = {}
    while not session.idle:
        for part in session.round():
            ids, logprobs, _ = done.get(part.request, ([], [], ""))
            reason = part.finish_reason or ""
            done[part.request] = (ids + part.ids, logprobs + part.logprobs, reason)
    return done


def answer(engine, params, requests: list[Request], length=48) -> list[tuple]:
    session = engine.session(params, length)
    numbers = [session.submit(request) for request in requests]
    done = finish(session)
    return [done[number] for number in numbers]


def requests(count: int, temperature=1.0, new=20) -> list[Request]:
    return [
        Request(prompt, new - n % 3, temperature, seed=7, number=n)
        for n, prompt in enumerate(prompts(count))
    ]


def test_sizes_grow_by_a_third_or_a_half():
    assert [size_for(n) for n in (1, 16, 17, 33, 49, 65, 100, 1300)] == [
        *(16, 16, 32, 48, 64, 96, 128, 1536)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_has_the_same_bits_alone_and_among_any_neighbours(engine, temperature):
    engine, params = engine
    asked = requests(9, temperature)
    together = answer(engine, params, asked)
    backwards = answer(engine, params, asked[::-1])[::-1]
    alone = [answer(engine, params, [request])[0] for request in asked[:3]]
    assert together == backwards and together[:3] == alone
    assert len({len(ids) for ids, _, _ in together}) > 1  # lengths differ: slots were refilled
    other = answer(engine, params, [Request(**{**vars(asked[0]), "seed": 8})])[0]
    assert (other[0] == alone[0][0]) == (temperature == 0.0)


def test_in_bfloat16_the_bits_are_a_request_s_own_too_and_the_trainer_is_near():
    mesh, network, params, scorer = tiny_model(options={"dtype": jnp.bfloat16})
    engine = Engine(network, mesh, slots=4, end_id=END, pad_id=PAD)
    asked = requests(9)
    together = answer(engine, params, asked)
    assert [answer(engine, params, [request])[0] for request in asked[:3]] == together[:3]
    done = [Completion(*each) for each in together]
    rows = rollout_rows([request.prompt for request in asked], done, 64, PAD)
    logp_BT = scorer.scores(params, {name: jnp.asarray(x) for name, x in rows.items()}).logp
    gap = float(jnp.max(jnp.abs(logp_BT - rows["sampled_logp"]) * rows["weights"]))
    print(f"largest gap between sampler and trainer in bfloat16: {gap:.4f}")
    assert 0 < gap < 0.05


def test_settings_are_each_request_s_own(engine):
    engine, params = engine
    (prompt,) = prompts(1)
    asked = [
        Request(prompt, 12),
        Request(prompt, 12, temperature=1.0, seed=1),
        Request(prompt, 12, temperature=5.0, top_k=1, seed=1),
        Request(prompt, 12, temperature=5.0, top_p=1e-6, seed=1),
        Request(prompt, 5),
    ]
    greedy, drawn, first, likely, short = answer(engine, params, asked)
    assert greedy[0] == first[0] == likely[0] != drawn[0]
    assert short[0] == greedy[0][:5] and short[2] == "length"


def test_a_stop_id_of_one_request_ends_it_alone(engine):
    engine, params = engine
    (prompt,) = prompts(1)
    plain = answer(engine, params, [Request(prompt, 12)])[0][0]
    stop = plain[4]
    asked = [Request(prompt, 12, stop_ids=(stop,)), Request(prompt, 12)]
    stopped, other = answer(engine, params, asked)
    assert stopped[0] == plain[: plain.index(stop) + 1] and stopped[2] == "stop"
    assert other[0] == plain


def test_the_likeliest_tokens_come_with_their_log_probs(engine):
    engine, params = engine
    network = engine.programs.network
    (prompt,) = prompts(1)
    session = engine.session(params, 48)
    session.submit(Request(prompt, 6, top_logprobs=3))
    session.submit(Request(prompt, 6))
    parts = [part for _ in range(3) for part in session.round()]
    with_top, without = parts
    assert without.top == [[]] * len(without.ids)
    ids = [*prompt, *with_top.ids]
    tokens = jnp.asarray(ids)[None]
    h_BTD = network.hidden(params, tokens, jnp.arange(len(ids))[None], jnp.ones_like(tokens))
    logits_TV = h_BTD[0] @ network.vocabulary_kernel(params).T
    expected = np.asarray(jax.nn.log_softmax(logits_TV, axis=-1))[len(prompt) - 1 : -1]
    for row, top in zip(expected, with_top.top, strict=True):
        assert [i for i, _ in top] == list(np.argsort(-row)[:3])
        np.testing.assert_allclose([p for _, p in top], np.sort(row)[::-1][:3], atol=1e-5)


def test_samples_of_one_prompt_share_its_prefill(engine, monkeypatch):
    engine, params = engine
    (prompt,) = prompts(1)
    rows: list[int] = []
    admit = Programs.admit
    counted = lambda self, p, s, batch: (  # noqa: E731
        rows.append(int((batch["lengths_R"] > 0).sum())) or admit(self, p, s, batch)
    )
    monkeypatch.setattr(Programs, "admit", counted)
    asked = [Request(prompt, (10, 26)[n % 2], 1.0, seed=3, number=n) for n in range(7)]
    done = answer(engine, params, asked)
    assert rows == [1]  # the later three take it from a slot that still holds it
    monkeypatch.undo()
    assert done == [answer(engine, params, [request])[0] for request in asked]
    assert len({tuple(ids) for ids, _, _ in done}) == 7


def test_nothing_is_compiled_once_every_size_was_met(engine, caplog):
    engine, params = engine
    sampling = Sampling(1.0, 0, 1.0, 20)
    first = engine.generate(params, prompts(9), sampling, seed=1)
    before = engine.compiled
    with caplog.at_level(logging.INFO, "medreason_jax.generate.programs"):
        again = engine.generate(params, prompts(9), sampling, seed=1)
    assert engine.compiled == before and not caplog.records and again == first
    assert all(program._cache_size() == 1 for program in engine.programs._compiled.values())


def test_a_cancelled_request_makes_room_and_changes_no_other(engine):
    engine, params = engine
    asked = requests(6)
    expected = answer(engine, params, asked)
    session = engine.session(params, 48)
    numbers = [session.submit(request) for request in asked]
    session.round()
    session.cancel(numbers[1])  # decodes
    session.cancel(numbers[5])  # waits
    done = finish(session)
    assert set(done) == set(numbers) - {numbers[1], numbers[5]}
    assert [done[n] for n in done] == [expected[numbers.index(n)] for n in done]
    assert session.active == session.waiting == 0


def test_fewer_slots_in_the_tail_answer_alike():
    """From 8 to 2; with other shapes log-probs agree to rounding."""
    engine, params = make_engine(slots=8)
    asked = [
        Request(prompt, 3 * 2**n, 1.0, seed=7, number=n) for n, prompt in enumerate(prompts(5))
    ]
    expected = answer(engine, params, asked, 80)
    session = engine.session(params, 80)
    session.compacts = True
    numbers = [session.submit(request) for request in asked]
    sizes, done = set(), {number: ([], []) for number in numbers}
    while not session.idle:
        for part in session.round():
            done[part.request][0].extend(part.ids)
            done[part.request][1].extend(part.logprobs)
        sizes.add(len(session.held))
    assert sizes == {8, 2}
    for number, (ids, logprobs, _) in zip(numbers, expected, strict=True):
        assert done[number][0] == ids
        np.testing.assert_allclose(done[number][1], logprobs, atol=1e-4)


@pytest.mark.parametrize("mesh_shape", [(1, 8, 1), (2, 2, 2), (1, 1, 4)])
def test_meshes_answer_alike(mesh_shape):
    fields = {"num_attention_heads": 4, "num_key_value_heads": 4}
    plain, params = make_engine(slots=8, **fields)
    spread, spread_params = make_engine(slots=8, mesh_shape=mesh_shape, **fields)
    for temperature in (0.0, 1.0):
        asked = requests(11, temperature)
        one, many = answer(plain, params, asked), answer(spread, spread_params, asked)
        for (ids, logprobs, _), (other_ids, other_logprobs, _) in zip(one, many, strict=True):
            same = next(
                (
                    i
                    for i, pair in enumerate(zip(ids, other_ids, strict=False))
                    if pair[0] != pair[1]
                ),
                len(ids),
            )
            assert same == len(ids) == len(other_ids)  # no near tie among these
            np.testing.assert_allclose(logprobs, other_logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 4), r"prompt of 0 tokens"),
        (Request([5], 0), r"max_new_tokens=0; both are at least 1"),
        (Request([5] * 40, 9), r"prompt of 40 tokens and max_new_tokens=9 are beyond the 48"),
        (Request([5], 4, top_logprobs=21), r"top_logprobs=21; allowed: 0 to 20"),
        (Request([5], 4, stop_ids=(1,) * 5), r"5 stop ids; allowed: at most 4"),
        (Request([320], 4), r"an id that is not from 0 to 319"),
    ],
)
def test_what_cannot_be_answered_is_refused(engine, request_, message):
    engine, params = engine
    with pytest.raises(ValueError, match=message):
        engine.session(params, 48).submit(request_)


def lengths_of(kind: str, count: int) -> np.ndarray:
    """Of the answers: lognormal about 700 with the longest cut at 1,300, or uniform."""
    random = np.random.default_rng(0)
    if kind == "uniform":
        return random.integers(50, 1301, count)
    return np.clip(random.lognormal(np.log(650), 0.45, count), 50, 1300).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lognormal", "uniform"])
@pytest.mark.parametrize(("count", "bar"), [(1024, 0.90), (256, 0.75)])
def test_few_decoded_tokens_are_thrown_away(kind, count, bar):
    """The share of slot steps whose token is kept, on 64 slots, of answers with set lengths."""
    engine, params = make_engine(slots=64, max_position_embeddings=2048)
    engine.end_id = 320  # no token ends an answer: its length does
    lengths = lengths_of(kind, count)
    session = engine.session(params, 1536)
    session.compacts = True
    asked = prompts(count)
    for number, (prompt, length) in enumerate(zip(asked, lengths, strict=True)):
        session.submit(Request(prompt, int(length), 1.0, seed=1, number=number))
    busy = None
    start = time.monotonic()
    while not session.idle:
        session.round()
        if session.waiting == 0 and busy is None:
            busy = session.kept_steps / session.slot_steps
    assert busy is not None
    share = session.kept_steps / session.slot_steps
    print(
        f"{count} requests, {kind} (mean {lengths.mean():.0f}): {busy:.3f} kept while requests "
        f"wait, {share:.3f} in all, {time.monotonic() - start:.0f} s"
    )
    assert session.kept_steps == lengths.sum()
    assert busy >= 0.97 and share >= bar
