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

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from medreason_jax.generate.programs import Programs, Slots
from medreason_jax.generate.requests import MOST_STOPS, Completion, Progress, Request, check
from medreason_jax.generate.sampling import Sampling
from medreason_jax.mesh import batch_shards, gather_to_host
from medreason_jax.qwen2.model import Network, Params

CHUNK = 16  # decode steps of a round
LEAST_SIZE = 16
FEWER = 4  # by which the slots become fewer: each number of them has programs of its own
REFILLS, LEAST_ROWS = 8, 4  # a prefill has rows for this part of the slots, or so many


def size_for(count: int) -> int:
    """The smallest of 16, 32, 48, 64, 96, 128, 192, ... that holds `count`."""
    size = LEAST_SIZE
    while size < count:
        power_of_two = size & (size - 1) == 0
        size = 2 * size if size == LEAST_SIZE else size * 3 // 2 if power_of_two else size * 4 // 3
    return size


class Engine:
    """Generation with one network on one mesh, in so many slots."""

    def __init__(self, network: Network, mesh: Mesh, *, slots: int, end_id: int, pad_id: int):
        self.shards = batch_shards(mesh)
        self.slots = -(-slots // self.shards) * self.shards
        own = self.slots // self.shards  # of one shard
        self.prefill_rows = self.shards * max(own // REFILLS, min(own, LEAST_ROWS))
        self.end_id, self.pad_id = end_id, pad_id
        self.vocab_size = network.sizes.vocab_size
        self.programs = Programs(network, mesh, pad_id)

    @property
    def compiled(self) -> int:
        """Programs compiled so far: what does not grow is warm."""
        return len(self.programs)

    def session(self, params: Params, length: int) -> "Session":
        """Decoding with these parameters; `length` is the longest prompt with its new tokens."""
        return Session(self, self.programs.load(params), size_for(length))

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
        check(request, self.length, self.engine.vocab_size)
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
        drawn = self._collect()
        self._compact()
        self._refill()
        self._start()
        return [each.progress() for each in drawn]

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
        self.state, out = self.engine.programs.decode(
            self.params, self.state, held_B, seen, steps, top
        )
        self.pending = list(self.held), out

    def _collect(self) -> list["Drawn"]:
        """Wait for the round before, and free the slots of what it ended."""
        if self.pending is None:
            return []
        held, out = self.pending
        self.pending = None
        out = gather_to_host(out)
        steps = int(out["steps"])
        self.slot_steps += steps * len(held)
        tokens_CB = out["tokens_CB"][:steps]
        count_B = (tokens_CB >= 0).sum(axis=0)
        last_B = tokens_CB[np.maximum(count_B - 1, 0), np.arange(len(held))]
        drawn = []
        for slot, each in enumerate(held):
            if each is None:
                continue
            number, request = each
            count = int(count_B[slot])
            self.lengths[slot] += count
            self.left[slot] -= count
            stopped = count > 0 and last_B[slot] in (self.engine.end_id, *request.stop_ids)
            ended = stopped or self.left[slot] == 0
            if number in self.cancelled:
                self.cancelled.discard(number)
                self._free(slot)
                continue
            self.kept_steps += count
            reason = ("stop" if stopped else "length") if ended else None
            drawn.append(Drawn(number, request, out, slot, count, reason))
            if ended:
                self._free(slot)
        return drawn

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
            self.state = self.engine.programs.empty(wanted, self.length)
            self.held = [None] * wanted
            self.lengths, self.left = np.zeros(wanted, np.int64), np.zeros(wanted, np.int64)
            return
        rows = [slot for slot, each in enumerate(self.held) if each is not None]
        rows += [-1] * (wanted - len(rows))
        self.state = self.engine.programs.resize(self.state, np.array(rows))
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
            return self.engine.programs.copy(state, batch | {"prompt_size": np.array(width)})
        tokens_RP = np.full((self.engine.prefill_rows, width), self.engine.pad_id, np.int32)
        lengths_R = np.zeros(self.engine.prefill_rows, np.int32)
        for prompt, row in self.rows.items():
            tokens_RP[row, : len(prompt)] = prompt
            lengths_R[row] = len(prompt)
        batch |= {"tokens_RP": tokens_RP, "lengths_R": lengths_R}
        return self.engine.programs.admit(self.session.params, state, batch)


@dataclass(frozen=True)
class Drawn:
    """What a round gave a request, still in the round's arrays: to be told while the next runs."""

    number: int
    request: Request
    out: dict[str, np.ndarray]
    slot: int
    count: int  # tokens
    reason: Literal["stop", "length"] | None

    def progress(self) -> Progress:
        ids = self.out["tokens_CB"][: self.count, self.slot].tolist()
        logprobs = self.out["logp_CB"][: self.count, self.slot].tolist()
        top = _alternatives(self.out, self.slot, self.count, self.request.top_logprobs)
        return Progress(self.number, ids, logprobs, top, self.reason)


def _alternatives(out, slot: int, count: int, top: int) -> list[list[tuple[int, float]]]:
    if top == 0:
        return [[] for _ in range(count)]
    ids, logps = out["top_ids_CBK"][:count, slot, :top], out["top_logp_CBK"][:count, slot, :top]
    return [
        [(int(i), float(p)) for i, p in zip(*pair, strict=True)]
        for pair in zip(ids, logps, strict=True)
    ]
