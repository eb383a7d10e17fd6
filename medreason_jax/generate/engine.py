"""Generation with the trainer's own model: slots that are refilled while the others decode.

A round decodes up to CHUNK tokens in every slot on the device; then the host retires what is
finished and gives free slots to requests that wait. Every program has a fixed shape: B slots, R
rows of a prefill, P tokens of a prompt and S cache slots come from short lists of sizes, so that
after each was met once nothing is compiled.

A request's tokens depend on its prompt, settings and seed. Among whatever neighbours and in
whatever slot they have the same bits, as long as slots, the prompt's size and the cache's size are
the same (float32, one mesh); across those and meshes log-probs agree to rounding.

B slots, R prefill rows, P prompt size, S cache slots, C steps of a round, M stop ids, V vocabulary.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from medreason_jax.generate.sampling import Draws, Sampling, next_token
from medreason_jax.mesh import Sharder, batch_shards, gather_to_host, put_batch, replicated
from medreason_jax.qwen2.model import Cache, Network, Params, unstack

CHUNK = 16  # decode steps of a round
LEAST_SIZE = 16
FEWER = 4  # by which the slots become fewer: each number of them has programs of its own
REFILLS, LEAST_ROWS = 8, 4  # a prefill has rows for this part of the slots, or so many
MOST_TOP = 20  # alternatives of a token
MOST_STOPS = 4  # stop ids of a request, beside the engine's

log = logging.getLogger(__name__)


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


@struct.dataclass
class Slots:
    """What the device holds of B requests."""

    cache: Cache
    first_BD: jax.Array  # the prompt's last hidden state, for requests with the same prompt
    h_BD: jax.Array  # the last token's hidden state: the next token's logits come from it
    lengths_B: jax.Array  # tokens in the cache
    left_B: jax.Array  # tokens that may still be drawn; 0: the slot is free
    stops_BM: jax.Array  # -1 where there is none
    draws: Draws


def size_for(count: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, 128, ... that holds `count`."""
    size = LEAST_SIZE
    while size < count:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


class Engine:
    """The programs of one network and mesh; `session` decodes with them."""

    def __init__(self, network: Network, mesh: Mesh, *, slots: int, end_id: int, pad_id: int):
        self.shards = batch_shards(mesh)
        self.slots = -(-slots // self.shards) * self.shards
        own = self.slots // self.shards  # of one shard
        self.prefill_rows = self.shards * max(own // REFILLS, min(own, LEAST_ROWS))
        self.network, self.mesh, self.end_id, self.pad_id = network, mesh, end_id, pad_id
        self.sharder: Sharder = network.compute.constrain  # type: ignore[assignment]
        self._programs: dict[tuple, Any] = {}

    @property
    def compiled(self) -> int:
        """Programs compiled so far: what does not grow is warm."""
        return len(self._programs)

    def session(self, params: Params, length: int) -> "Session":
        """Decoding with these parameters; `length` is the longest prompt with its new tokens."""
        return Session(self, self.load(params), size_for(length))

    def load(self, params: Params) -> Params:
        """The parameters in the type and layout of decoding, on the device."""
        dtype = self.network.compute.dtype

        def cast(params: Params) -> Params:
            params = jax.tree.map(lambda x: x.astype(dtype), params)
            return unstack(params) if self.network.unrolls else params

        def make():
            places = self.sharder.decode_tree(params)
            if self.network.unrolls:
                one = self.sharder.unstacked(places["layers"])
                places = {**places, "layers": (one,) * self.network.sizes.num_hidden_layers}
            return jax.jit(cast, out_shardings=places)

        return self.program("load", make)(params)

    def generate(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        progress: Callable[[int], Any] = lambda done: None,
    ) -> list[Completion]:
        """Completions in the order of `prompts`; request r draws from (seed, r)."""
        done: dict[int, Completion] = {}
        for number, completion in self.stream(params, prompts, sampling, seed):
            done[number] = completion
            progress(1)
        return [done[number] for number in range(len(prompts))]

    def stream(
        self, params: Params, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int
    ) -> Iterator[tuple[int, Completion]]:
        """(number, completion) as they finish; the device decodes on while the caller looks."""
        if not prompts:
            return
        new = sampling.max_new_tokens
        session = self.session(params, max(map(len, prompts)) + new)
        session.compacts = True
        numbers: dict[int, int] = {}
        # Prompts of like length share a prefill; equal ones, which lie side by side, one row of it.
        for number in sorted(range(len(prompts)), key=lambda n: (len(prompts[n]), prompts[n], n)):
            draws = (sampling.temperature, sampling.top_k, sampling.top_p)
            request = Request(prompts[number], new, *draws, seed=seed, number=number)
            numbers[session.submit(request)] = number
        parts: dict[int, Completion] = {}
        while not session.idle:
            for part in session.round():
                before = parts.pop(part.request, Completion([], [], ""))
                ids, logprobs = before.ids + part.ids, before.logprobs + part.logprobs
                if part.finish_reason is None:
                    parts[part.request] = Completion(ids, logprobs, "")
                else:
                    done = Completion(ids, logprobs, part.finish_reason)
                    yield numbers.pop(part.request), done

    # --- programs -----------------------------------------------------------------------------

    def program(self, key: Any, make: Callable[[], Any]) -> Any:
        """The compiled program of a key; made, and told, where it is the first time."""
        key = key if isinstance(key, tuple) else (key,)
        if key not in self._programs:
            log.info("compiles %s", key)
            self._programs[key] = make()
        return self._programs[key]

    def empty(self, slots: int, length: int) -> Slots:
        """No request in any slot."""

        def make() -> Slots:
            width, dtype = self.network.sizes.hidden_size, self.network.compute.dtype
            zeros, floats = jnp.zeros(slots, jnp.int32), jnp.zeros(slots, jnp.float32)
            return Slots(
                cache=self.network.empty_cache(slots, length),
                first_BD=jnp.zeros((slots, width), dtype),
                h_BD=jnp.zeros((slots, width), dtype),
                lengths_B=zeros,
                left_B=zeros,
                stops_BM=jnp.full((slots, MOST_STOPS + 1), -1, jnp.int32),
                draws=Draws(floats, zeros, jnp.ones_like(floats), zeros, zeros, zeros),
            )

        return self.program(("empty", slots, length), lambda: self._jit(make))()

    def _jit(self, function: Callable, donate: tuple[int, ...] = (), beside: bool = False):
        """Compiled with the state on its places, so that every program takes any other's state.

        `beside` is for functions that return more than the state.
        """
        rows = self.sharder.place(("batch",))
        stack = () if self.network.unrolls else (None,)
        cache = self.sharder.place((*stack, "batch", "kv_heads", None, None))
        names = (field for field in Slots.__dataclass_fields__ if field != "cache")
        state = Slots(cache=cache, **dict.fromkeys(names, rows))
        out = (state, replicated(self.mesh)) if beside else state
        return jax.jit(function, donate_argnums=donate, out_shardings=out)

    def admit(self, params: Params, state: Slots, batch: dict[str, np.ndarray]) -> Slots:
        """New requests in the slots with row_B >= 0: row row_B of the prefilled tokens_RP."""
        key = ("admit", state.lengths_B.shape[0], slots_of(state), batch["tokens_RP"].shape)
        program = self.program(key, lambda: self._jit(self._admit, donate=(1,)))
        return program(params, state, put_batch(self.mesh, batch))

    def _admit(self, params: Params, state: Slots, batch) -> Slots:
        h_RPD, prompts = self.network.prefill(params, batch["tokens_RP"], batch["lengths_R"])
        last_R = jnp.maximum(batch["lengths_R"] - 1, 0)
        last_RD = jnp.take_along_axis(h_RPD, last_R[:, None, None], axis=1)[:, 0]
        return self._fill(state, prompts, last_RD, batch)

    def copy(self, state: Slots, batch: dict[str, np.ndarray]) -> Slots:
        """As `admit`, row_B being slots whose prompts, of at most P tokens, are the same."""
        P = batch.pop("prompt_size").item()
        key = ("copy", state.lengths_B.shape[0], slots_of(state), P)

        def run(state: Slots, batch) -> Slots:
            prompts = jax.tree.map(lambda x: x[..., :P, :], state.cache)
            return self._fill(state, prompts, state.first_BD, batch)

        return self.program(key, lambda: self._jit(run, donate=(0,)))(
            state, put_batch(self.mesh, batch)
        )

    def _fill(self, state: Slots, prompts: Cache, last_RD, batch) -> Slots:
        row_B = batch["row_B"]
        taken_B, row_B = row_B >= 0, jnp.maximum(row_B, 0)

        def put(cache, prompts_RKPH):
            new = jnp.take(prompts_RKPH, row_B, axis=cache.ndim - 4).astype(cache.dtype)
            old = cache[..., : new.shape[-2], :]
            kept = jnp.where(taken_B[:, None, None, None], new, old)
            return _put_first(cache, kept)

        def choose(new, old):
            return jnp.where(taken_B.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        last_BD = choose(last_RD[row_B], state.first_BD)
        given = {name: batch[name] for name in ("lengths_B", "left_B", "stops_BM")}
        draws = Draws(
            **{name: batch[name] for name in _DRAWN}, drawn_B=jnp.zeros_like(state.lengths_B)
        )
        return Slots(
            cache=jax.tree.map(put, state.cache, prompts),
            first_BD=last_BD,
            h_BD=choose(last_BD, state.h_BD),
            **{name: choose(given[name], getattr(state, name)) for name in given},
            draws=jax.tree.map(choose, draws, state.draws),
        )

    def resize(self, state: Slots, rows_b: np.ndarray) -> Slots:
        """The state of other slots: slot i is the one that was rows_b[i]; -1 makes a free one."""
        key = ("resize", state.lengths_B.shape[0], slots_of(state), len(rows_b))

        def run(state: Slots, rows_b) -> Slots:
            at = jnp.maximum(rows_b, 0)
            cache = jax.tree.map(lambda x: jnp.take(x, at, axis=x.ndim - 4), state.cache)
            rows = jax.tree.map(lambda x: x[at], state.replace(cache=None))
            return rows.replace(cache=cache, left_B=jnp.where(rows_b >= 0, rows.left_B, 0))

        return self.program(key, lambda: self._jit(run))(state, jnp.asarray(rows_b, jnp.int32))

    def decode(
        self, params: Params, state: Slots, held_B: np.ndarray, seen: int, steps: int, top: bool
    ):
        """`steps` tokens in every slot that is held; returns the state and what was drawn."""
        key = ("decode", state.lengths_B.shape[0], slots_of(state), seen, steps, top)

        def run(params: Params, state: Slots, held_B):
            cache = state.cache
            state = state.replace(
                left_B=jnp.where(held_B, state.left_B, 0),  # cancelled ones end
                cache=jax.tree.map(lambda x: x[..., :seen, :], cache),
            )
            state, out = self._decode(params, state, steps, top)
            return state.replace(cache=jax.tree.map(_put_first, cache, state.cache)), out

        program = self.program(key, lambda: self._jit(run, donate=(1,), beside=True))
        return program(params, state, put_batch(self.mesh, {"held_B": held_B})["held_B"])

    def _decode(self, params: Params, state: Slots, steps: int, top: bool):
        B = state.lengths_B.shape[0]
        out = {
            "tokens_CB": jnp.zeros((steps, B), jnp.int32),
            "logp_CB": jnp.zeros((steps, B), jnp.float32),
        }
        if top:
            out["top_ids_CBK"] = jnp.zeros((steps, B, MOST_TOP), jnp.int32)
            out["top_logp_CBK"] = jnp.zeros((steps, B, MOST_TOP), jnp.float32)

        def step(carry):
            c, state, out = carry
            alive_B = state.left_B > 0
            logits_BV = self.network.logits(params, state.h_BD)
            token_B, logp_B, logp_BV = next_token(logits_BV, state.draws)
            drawn = {"tokens_CB": jnp.where(alive_B, token_B, -1), "logp_CB": logp_B}
            if top:
                drawn["top_logp_CBK"], drawn["top_ids_CBK"] = jax.lax.top_k(logp_BV, MOST_TOP)
            out = {name: out[name].at[c].set(value) for name, value in drawn.items()}
            token_B = jnp.where(alive_B, token_B, self.pad_id)
            h_BD, cache = self.network.decode(params, token_B, state.lengths_B, state.cache)
            stopped_B = jnp.any(token_B[:, None] == state.stops_BM, axis=1)
            new = Slots(
                cache=cache,
                first_BD=state.first_BD,
                h_BD=jnp.where(alive_B[:, None], h_BD, state.h_BD),
                lengths_B=state.lengths_B + alive_B,
                left_B=jnp.where(stopped_B, 0, jnp.maximum(state.left_B - 1, 0)),
                stops_BM=state.stops_BM,
                draws=state.draws.replace(drawn_B=state.draws.drawn_B + alive_B),
            )
            return c + 1, new, out

        def goes_on(carry):
            c, state, _ = carry
            return (c < steps) & jnp.any(state.left_B > 0)

        steps_done, state, out = jax.lax.while_loop(goes_on, step, (jnp.int32(0), state, out))
        return state, {**out, "steps": steps_done}


_DRAWN = ("temperature_B", "top_k_B", "top_p_B", "seed_B", "number_B")


def _put_first(cache, slots):
    """The cache with these in place of its first slots."""
    return jax.lax.dynamic_update_slice(cache, slots, (0,) * cache.ndim)


def slots_of(state: Slots) -> int:
    """S: the tokens that a slot has room for."""
    return jax.tree.leaves(state.cache)[0].shape[-2]


class Session:
    """Requests on their way through the slots; one thread calls `round`.

    With `compacts` there are as few slots, by quarters of the engine's, as the requests need.
    """

    def __init__(self, engine: Engine, params: Params, length: int):
        self.engine, self.params, self.length = engine, params, length
        self.compacts = False
        self.state: Slots | None = None  # until the first round
        self.waits: deque[tuple[int, Request]] = deque()
        self.held: list[tuple[int, Request] | None] = []
        self.lengths = np.zeros(0, np.int64)  # tokens in the cache, as the host knows
        self.left = np.zeros(0, np.int64)
        self.pending: tuple[list[tuple[int, Request] | None], Any] | None = None
        self.count = 0
        self.cancelled: set[int] = set()
        self.kept_steps = self.slot_steps = 0  # tokens that were kept, of slots x steps decoded

    @property
    def waiting(self) -> int:
        return len(self.waits)

    @property
    def active(self) -> int:
        return sum(held is not None for held in self.held)

    @property
    def idle(self) -> bool:
        return self.pending is None and not self.waits and self.active == 0

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number. ValueError where it cannot fit."""
        check(request, self.length, self.engine.network.sizes.vocab_size)
        self.count += 1
        self.waits.append((self.count, request))
        return self.count

    def cancel(self, request: int) -> None:
        """Forget a request: its slot is free at the next round."""
        self.waits = deque(each for each in self.waits if each[0] != request)
        if any(held is not None and held[0] == request for held in self.held):
            self.cancelled.add(request)

    def round(self) -> list[Progress]:
        """Retire, refill and start to decode; returns what the round before has drawn.

        The device decodes while the caller looks at it.
        """
        told = self._collect()
        self._compact()
        self._refill()
        self._start()
        return told

    # --- a round's parts ------------------------------------------------------------------------

    def _start(self) -> None:
        if self.active == 0:
            self.pending = None
            return
        assert self.state is not None
        held = [each for each in self.held if each is not None]
        steps = min(CHUNK, int(self.left.max()))
        steps = min(size_for(steps), CHUNK)
        seen = min(size_for(int(self.lengths.max()) + steps), self.length)
        top = any(request.top_logprobs > 0 for _, request in held)
        held_B = np.array([each is not None for each in self.held])
        self.state, out = self.engine.decode(self.params, self.state, held_B, seen, steps, top)
        self.pending = list(self.held), out

    def _collect(self) -> list[Progress]:
        if self.pending is None:
            return []
        held, out = self.pending
        self.pending = None
        out = gather_to_host(out)
        steps = int(out["steps"])
        self.slot_steps += steps * len(held)
        told = []
        for slot, each in enumerate(held):
            if each is None:
                continue
            number, request = each
            ids = [int(i) for i in out["tokens_CB"][:steps, slot] if i >= 0]
            self.lengths[slot] += len(ids)
            self.left[slot] -= len(ids)
            stopped = bool(ids) and ids[-1] in (self.engine.end_id, *request.stop_ids)
            ended = stopped or self.left[slot] == 0
            if number in self.cancelled:
                self.cancelled.discard(number)
                self._free(slot)
                continue
            self.kept_steps += len(ids)
            logprobs = [float(x) for x in out["logp_CB"][: len(ids), slot]]
            reason = ("stop" if stopped else "length") if ended else None
            top = _alternatives(out, slot, len(ids), request.top_logprobs)
            told.append(Progress(number, ids, logprobs, top, reason))
            if ended:
                self._free(slot)
        return told

    def _free(self, slot: int) -> None:
        self.held[slot] = None
        self.left[slot] = 0
        self.lengths[slot] = 0

    def _compact(self) -> None:
        """As many slots as are needed."""
        wanted, needed = self.engine.slots, self.active + self.waiting
        if self.compacts:
            while wanted % (FEWER * self.engine.shards) == 0 and needed <= wanted // FEWER:
                wanted //= FEWER
        if wanted == len(self.held) or needed == 0:
            return
        if self.state is None:
            self.state = self.engine.empty(wanted, self.length)
            self.held = [None] * wanted
            self.lengths, self.left = np.zeros(wanted, np.int64), np.zeros(wanted, np.int64)
            return
        rows = [slot for slot, each in enumerate(self.held) if each is not None]
        rows += [-1] * (wanted - len(rows))
        self.state = self.engine.resize(self.state, np.array(rows))
        self.held = [None if row < 0 else self.held[row] for row in rows]
        self.lengths = np.array([0 if row < 0 else self.lengths[row] for row in rows])
        self.left = np.array([0 if row < 0 else self.left[row] for row in rows])

    def _refill(self) -> None:
        """Give the free slots to the first that wait, a prefill at a time."""
        free = deque(slot for slot, each in enumerate(self.held) if each is None)
        while free and self.waits:
            fill = Fill(self)
            while free and self.waits and fill.takes(self.waits[0][1]):
                number, request = self.waits.popleft()
                slot = free.popleft()
                fill.add(slot, request)
                self.held[slot] = (number, request)
                self.lengths[slot] = len(request.prompt)
                self.left[slot] = request.max_new_tokens
            assert self.state is not None
            self.state = fill.run(self.state)


class Fill:
    """The requests of one prefill, or of one copy of prompts that other slots hold."""

    def __init__(self, session: Session):
        self.engine, self.session = session.engine, session
        slots = len(session.held)
        self.rows: dict[tuple[int, ...], int] = {}  # prompt -> row of the prefill
        self.copies = False
        self.there = {
            tuple(held[1].prompt): slot
            for slot, held in enumerate(session.held)
            if held is not None
        }
        self.row_B = np.full(slots, -1, np.int32)
        self.settings = {
            "lengths_B": np.zeros(slots, np.int32),
            "left_B": np.zeros(slots, np.int32),
            "stops_BM": np.full((slots, MOST_STOPS + 1), -1, np.int32),
            "temperature_B": np.zeros(slots, np.float32),
            "top_k_B": np.zeros(slots, np.int32),
            "top_p_B": np.ones(slots, np.float32),
            "seed_B": np.zeros(slots, np.int32),
            "number_B": np.zeros(slots, np.int32),
        }

    def takes(self, request: Request) -> bool:
        """Whether the request fits this prefill, or this copy."""
        prompt = tuple(request.prompt)
        copied = prompt in self.there
        if not self.row_B.max() >= 0:
            self.copies = copied
            return True
        if self.copies != copied:
            return False
        return copied or prompt in self.rows or len(self.rows) < self.engine.prefill_rows

    def add(self, slot: int, request: Request) -> None:
        prompt = tuple(request.prompt)
        row = self.there[prompt] if self.copies else self.rows.setdefault(prompt, len(self.rows))
        self.row_B[slot] = row
        stops = (self.engine.end_id, *request.stop_ids)
        self.settings["stops_BM"][slot, : len(stops)] = stops
        for name, value in (
            ("lengths_B", len(prompt)),
            ("left_B", request.max_new_tokens),
            ("temperature_B", request.temperature),
            ("top_k_B", request.top_k),
            ("top_p_B", request.top_p),
            ("seed_B", request.seed),
            ("number_B", request.number),
        ):
            self.settings[name][slot] = value

    def run(self, state: Slots) -> Slots:
        batch = {"row_B": self.row_B, **self.settings}
        longest = size_for(int(self.settings["lengths_B"].max()))
        width = min(longest, self.session.length)
        if self.copies:
            return self.engine.copy(state, batch | {"prompt_size": np.array(width)})
        tokens_RP = np.full((self.engine.prefill_rows, width), self.engine.pad_id, np.int32)
        lengths_R = np.zeros(self.engine.prefill_rows, np.int32)
        for prompt, row in self.rows.items():
            tokens_RP[row, : len(prompt)] = prompt
            lengths_R[row] = len(prompt)
        batch |= {"tokens_RP": tokens_RP, "lengths_R": lengths_R}
        return self.engine.admit(self.session.params, state, batch)


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


def _alternatives(out, slot: int, count: int, top: int) -> list[list[tuple[int, float]]]:
    if top == 0:
        return [[] for _ in range(count)]
    ids, logps = out["top_ids_CBK"][:count, slot, :top], out["top_logp_CBK"][:count, slot, :top]
    return [
        [(int(i), float(p)) for i, p in zip(*pair, strict=True)]
        for pair in zip(ids, logps, strict=True)
    ]
