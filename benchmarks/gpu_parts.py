"""The parts of `gpu.py`: each gives (figure, measure); a measure returns what its line holds.

B rows, T tokens of a row, N query heads, K key/value heads, H head size, D model, F feed-forward,
V vocabulary. Floors are the arithmetic's time at this card's own matrix product and copy rates.
"""

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from contestants import Task, config_of, medreason

ROOT = Path(__file__).resolve().parents[1]
Record = dict[str, Any]
Figures = Iterator[tuple[str, Callable[[], Record]]]
REPETITIONS = 3
QUEUED = 8  # short calls between two waits


@dataclass(frozen=True)
class Scale:
    """Shapes, and this card's rates for the floors."""

    models: dict[str, dict[str, Any]]  # fields of config.json by size
    length: int
    tokens: tuple[int, ...]  # of a step, the most first
    head: tuple[int, int, int]  # tokens, D, V
    batches: tuple[int, ...]  # of decoding
    prompt: int
    new: int
    ppo: tuple[int, int, int]  # rollouts, prompt, new tokens
    device: str
    dtype: str
    flops: float = 790e12
    bandwidth: float = 4.3e12


def scale(tiny: bool, ceilings: list[Record]) -> Scale:
    if tiny:
        fields = fields_of("0.5b") | {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_window_layers": 2,
            "max_position_embeddings": 512,
        }
        models = dict.fromkeys(("0.5B", "1.5B", "7B"), fields)
        return Scale(
            models,
            length=128,
            tokens=(512, 384, 256, 128),
            head=(128, 64, 512),
            batches=(1, 4),
            prompt=16,
            new=32,
            ppo=(8, 16, 16),
            device="cpu",
            dtype="float32",
        )
    models = {size.upper(): fields_of(size) for size in ("0.5b", "1.5b", "7b")}
    full = Scale(
        models,
        length=4096,
        tokens=(32768, 16384, 12288, 8192),
        head=(8192, 4096, 131072),
        batches=(256, 64, 1, 512),
        prompt=512,
        new=512,
        ppo=(512, 256, 512),
        device="cuda",
        dtype="bfloat16",
    )
    products = [r["tflops"] for r in ceilings if "tflops" in r]
    copies = [r["tb_per_second"] for r in ceilings if "tb_per_second" in r]
    if not (products and copies):
        return full
    return replace(full, flops=1e12 * max(products), bandwidth=1e12 * max(copies))


def fields_of(size: str) -> dict[str, Any]:
    path = ROOT / "configs" / "models" / f"qwen2.5-{size}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def seconds_of(call: Callable[[], Any], inner: int = 1) -> list[float]:
    """Of each repetition, once it has been compiled and run."""
    call()
    times = []
    for _ in range(REPETITIONS):
        begun = time.perf_counter()
        for _ in range(inner):
            call()
        times.append((time.perf_counter() - begun) / inner)
    return times


def rate(amount: float, unit: str, times: list[float], floor_seconds: float | None) -> Record:
    seconds = statistics.median(times)
    record = {"value": amount / seconds, "unit": unit, "times": [min(times), max(times)]}
    if floor_seconds is not None:
        record["floor"] = amount / floor_seconds
    return record


def milliseconds(times: list[float], floor_seconds: float | None) -> Record:
    record = {"value": 1e3 * statistics.median(times), "unit": "ms"}
    record["times"] = [min(times), max(times)]
    if floor_seconds is not None:
        record["floor"] = 1e3 * floor_seconds
    return record


def peak_gib() -> float | None:
    import jax

    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else round(stats["peak_bytes_in_use"] / 2**30, 2)


# --- what the card can do -----------------------------------------------------------------------


def ceilings(s: Scale) -> Figures:
    yield "machine", machine
    for size, fields in s.models.items():
        D, F, V = (fields[n] for n in ("hidden_size", "intermediate_size", "vocab_size"))
        for n in (F, V):
            yield f"product {size}, {s.tokens[-1]} x {D} x {n}", partial(product, s, D, n)
    yield "copy", partial(copy, s)


def machine() -> Record:
    import jax
    import jaxlib

    record = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
        record["nvidia_smi"] = said.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        record["nvidia_smi"] = "not there"
    for name in ("torch", "transformers", "trl", "peft", "liger-kernel", "google-tunix", "tokamax"):
        try:
            record[name] = version(name)
        except PackageNotFoundError:
            record[name] = "not installed"
    return record


def product(s: Scale, D: int, n: int) -> Record:
    import jax
    import jax.numpy as jnp

    M = s.tokens[-1]
    a, b = (
        jax.random.normal(jax.random.key(n), shape).astype(s.dtype)
        for n, shape in enumerate([(M, D), (D, n)])
    )
    call = jax.jit(jnp.dot)
    times = seconds_of(lambda: jax.block_until_ready([call(a, b) for _ in range(QUEUED)]))
    times = [each / QUEUED for each in times]
    tflops = 2 * M * D * n / statistics.median(times) / 1e12
    return milliseconds(times, None) | {"tflops": round(tflops, 3)}


def copy(s: Scale) -> Record:
    import jax
    import jax.numpy as jnp

    size = 2**31 if s.device == "cuda" else 2**24
    x = jnp.ones(size // 4, jnp.float32)
    call = jax.jit(lambda x: x + 1)
    times = seconds_of(lambda: jax.block_until_ready([call(x) for _ in range(QUEUED)]))
    times = [each / QUEUED for each in times]
    return milliseconds(times, None) | {
        "tb_per_second": round(2 * size / statistics.median(times) / 1e12, 3)
    }


# --- attention ----------------------------------------------------------------------------------


def attention(s: Scale) -> Figures:
    shapes = {64: s.models["0.5B"], 128: s.models["7B"]}
    for name in candidates():
        for H, fields in shapes.items():
            N, K = fields["num_attention_heads"], fields["num_key_value_heads"]
            for documents in (1, 8):
                kind = "causal" if documents == 1 else f"{documents} documents a row"
                figure = f"attention {name}, {N}/{K} heads of {H}, {kind}, forward + backward"
                yield figure, partial(attend, s, name, N, K, H, documents)


def candidates() -> dict[str, Callable]:
    """(q, k, v, places) -> context, by name."""
    import jax
    import jax.numpy as jnp

    from medreason_jax.qwen2.attention import mosaic_attention, triton_attention, xla_attention

    def cudnn_causal(q, k, v, places):  # right for one document a row only
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    def cudnn_mask(q, k, v, places):
        seg, pos = places.segments_BT, places.positions_BT
        same = seg[:, :, None] == seg[:, None, :]
        mask = (same & (pos[:, :, None] >= pos[:, None, :]))[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")

    def cudnn_packed(q_BTNH, k_BSKH, v_BSKH, places):
        """A sequence a document; its backward holds as much as so many whole rows: here few."""
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

        B, T, _, H = q_BTNH.shape
        M = max(8, T // 256)
        inside_BT = places.segments_BT > 0
        first_BT = inside_BT & (places.positions_BT == 0)
        number_BT = jnp.cumsum(first_BT, axis=1) - 1
        rows_B1 = jnp.arange(B)[:, None]
        lengths_BM = jnp.zeros((B, M), jnp.int32).at[rows_B1, number_BT].add(inside_BT, mode="drop")
        first_BM = jnp.full((B, M + 1), -1, jnp.int32)
        place_BT = jnp.where(first_BT, number_BT, M + 1)  # others are dropped
        first_BM = first_BM.at[rows_B1, place_BT].set(jnp.arange(T, dtype=jnp.int32), mode="drop")
        lengths_BM = jnp.where(lengths_BM > 0, lengths_BM, -1)
        # Outside the documents nothing is written, neither of the context nor of the gradients.
        inside = lambda x: jnp.where(inside_BT[..., None, None], x, 0)  # noqa: E731
        context_BTNH = dot_product_attention(
            *(inside(x) for x in (q_BTNH, k_BSKH, v_BSKH)),
            q_seqlen=lengths_BM,
            kv_seqlen=lengths_BM,
            q_offsets=first_BM,
            kv_offsets=first_BM,
            scale=H**-0.5,
            mask_type=MaskType.PADDING_CAUSAL,
        )
        return inside(context_BTNH)

    def of(attend):
        return lambda q, k, v, places: attend(q, k, v, places, places)

    return {
        "mosaic": of(mosaic_attention),
        "triton": of(triton_attention),
        "cudnn packed": cudnn_packed,
        "cudnn causal": cudnn_causal,
        "cudnn mask": cudnn_mask,
        "xla": of(xla_attention),
    }


def attend(s: Scale, name: str, N: int, K: int, H: int, documents: int) -> Record:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from medreason_jax.qwen2.attention import Kernel, Places, self_test

    T = s.length
    B = max(1, s.tokens[-1] // T)
    attends = candidates()[name]
    random = np.random.default_rng(0)
    draw = lambda n: jnp.asarray(random.normal(size=(B, T, n, H)), s.dtype)  # noqa: E731
    q, k, v = draw(N), draw(K), draw(K)
    each = T // documents
    place = jnp.broadcast_to(jnp.arange(T), (B, T))
    places = Places((place // each + 1).astype(jnp.int32), (place % each).astype(jnp.int32))

    def loss(q, k, v, places):
        return jnp.sum(attends(q, k, v, places).astype(jnp.float32) ** 2)

    step, forward = jax.jit(jax.grad(loss, argnums=(0, 1, 2))), jax.jit(attends)
    inputs = (q, k, v, places)
    times = seconds_of(lambda: jax.block_until_ready([step(*inputs) for _ in range(QUEUED)]))
    alone = seconds_of(lambda: jax.block_until_ready([forward(*inputs) for _ in range(QUEUED)]))
    times = [each / QUEUED for each in times]
    flops = 3.5 * 2 * B * N * H * T * each  # causal: half of 4 T^2; the backward is 2.5 forwards
    record = milliseconds(times, flops / s.flops)
    record["forward_ms"] = round(1e3 * statistics.median(alone) / QUEUED, 4)
    kernel = Kernel(name, lambda q, k, v, queries, keys: attends(q, k, v, queries))
    try:
        record["packed_error"] = f"{self_test(kernel, N, K, H, jnp.dtype(s.dtype), T=512):.1e}"
    except Exception as failure:
        record["packed_error"] = f"does not run: {str(failure)[:80]}"
    return record


# --- the vocabulary projection ------------------------------------------------------------------


def head(s: Scale) -> Figures:
    tokens, D, V = s.head
    for chunk in (1024, 2048, 4096, 8192):
        yield f"head {tokens}x{D}x{V}; chunk {chunk}", partial(project, s, chunk)


def project(s: Scale, chunk: int) -> Record:
    import jax
    import jax.numpy as jnp

    from medreason_jax.mesh import TokenShards, make_mesh
    from medreason_jax.train.head import token_loss

    tokens, D, V = s.head
    shards = TokenShards(make_mesh(1, 1, 1, jax.devices()[:1]))
    h = 0.02 * jax.random.normal(jax.random.key(0), (1, tokens, D)).astype(s.dtype)
    W = (0.02 * jax.random.normal(jax.random.key(1), (V, D))).astype(s.dtype)
    labels, mean = jnp.zeros((1, tokens), jnp.int32), jnp.full((1, tokens), 1 / tokens)

    def loss(h, W):
        nll = lambda scores, mean: -scores.logp * mean  # noqa: E731
        return token_loss(h, W, labels, nll, mean, shards=shards, chunk=chunk)[0]

    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    times = seconds_of(lambda: jax.block_until_ready(step(h, W)), inner=3)
    temporaries = step.lower(h, W).compile().memory_analysis().temp_size_in_bytes
    record = milliseconds(times, 6 * tokens * D * V / s.flops)
    return record | {"temporaries_gib": round(temporaries / 2**30, 2)}


# --- training -----------------------------------------------------------------------------------


def task(s: Scale, size: str, tokens: int, **changes: Any) -> Task:
    rows = max(1, tokens // s.length)
    shape = {"rows": rows, "length": s.length, "prompts": 1, "prompt": s.prompt, "new": s.new}
    return Task(s.models[size], **shape, dtype=s.dtype, device=s.device, **changes)


# Of a model: remat, tokens of a step (as the Scale's number), and what else is other than usual.
VARIANTS: dict[str, list[tuple[str, int, dict[str, Any]]]] = {
    "7B": [
        ("products", 2, {"mu": "bfloat16"}),
        ("products", 2, {"mu": "bfloat16", "documents": 8}),
        ("products", 1, {"mu": "bfloat16", "nu": "bfloat16"}),
        ("products", 3, {"mu": "bfloat16"}),
        ("products", 3, {"mu": "bfloat16", "attention": "triton"}),
        ("context+qkv", 1, {"mu": "bfloat16"}),
    ],
    "1.5B": [
        ("products", 0, {}),
        ("products", 0, {"documents": 8}),
        ("products", 1, {}),
        ("products", 0, {"attention": "triton"}),
        ("none", 1, {}),
    ],
    "0.5B": [
        ("products", 0, {}),
        ("products", 0, {"documents": 8}),
        ("products", 0, {"chunk": 16384}),
        ("products", 0, {"unroll": 1}),
        ("products", 0, {"deterministic": True}),
        ("products", 0, {"attention": "triton"}),
        ("none", 0, {}),
    ],
}


def train(size: str, s: Scale) -> Figures:
    for remat, number, changes in VARIANTS[size]:
        tokens = s.tokens[number]
        told = "".join(f", {name} {n}" for name, n in changes.items())
        one = task(s, size, tokens, **{"remat": remat, "chunk": 4096, **changes})
        yield (
            f"train {size}; remat {remat}, {tokens} tokens a step{told}",
            partial(step_of, s, size, one),
        )


def adapters(s: Scale) -> Figures:
    one = task(s, "7B", s.tokens[1], remat="products", lora=16)
    yield f"train 7B lora; {s.tokens[1]} tokens a step", partial(step_of, s, "7B", one)
    pairs = task(s, "1.5B", s.tokens[1], remat="context+qkv", pairs=4)
    yield (
        f"rpo 1.5B; {s.tokens[1]} tokens a step, 4 pairs a row",
        partial(step_of, s, "1.5B", pairs),
    )


def step_of(s: Scale, size: str, one: Task) -> Record:
    """Steady state, after the first step has compiled; `plan_gib` is what the compiler asks for."""
    from medreason_jax.qwen2.sizes import read_sizes
    from medreason_jax.train.program import lora_of
    from medreason_jax.train.speed import training_flops

    begun = time.perf_counter()
    work = medreason(one, None)
    step = work["step"]
    step()
    compiled = time.perf_counter() - begun
    times = seconds_of(step, inner=3)
    loss = step()
    tokens = one.rows * one.length
    sizes, config = read_sizes(one.fields), config_of(one)
    attended = tokens * one.length / one.segments
    flops = training_flops(sizes, lora_of(config.lora), tokens, attended)
    if one.pairs:
        flops *= 4 / 3  # the reference's forward pass
    record = rate(tokens, "tok/s", times, flops / s.flops)
    record |= {"tflops": round(flops / statistics.median(times) / 1e12, 1)}
    record |= {"first_step_s": round(compiled, 1), "peak_gib": peak_gib(), "loss": loss}
    return record | {"plan_gib": round(work["bytes"]() / 2**30, 2)}


# --- decoding -----------------------------------------------------------------------------------


def decode(size: str, s: Scale) -> Figures:
    for batch in s.batches:
        yield f"decode {size}, batch {batch}", partial(tokens_per_second, s, size, batch, medreason)


def tokens_per_second(s: Scale, size: str, batch: int, contestant: Callable) -> Record:
    """Of greedy decoding alone: a long run less a short one with the same prompts."""
    short = max(1, s.new // 16)
    one = replace(task(s, size, s.tokens[-1]), prompts=batch)
    work = contestant(replace(one, new=s.new), None)["decode"]
    longer = seconds_of(work)
    del work
    work = contestant(replace(one, new=short), None)["decode"]
    shorter = statistics.median(seconds_of(work))
    times = [each - shorter for each in longer]
    steps = s.new - short
    record = rate(batch * steps, "tok/s", times, steps * floor_of_decoding(s, size, batch))
    return record | {"prefill_s": round(shorter, 3)}


def floor_of_decoding(s: Scale, size: str, batch: int) -> float:
    """Seconds of a step: all weights and the cache are read, then the products made."""
    from medreason_jax.qwen2.sizes import read_sizes
    from medreason_jax.train.speed import product_parameters

    sizes = read_sizes(s.models[size])
    weights = product_parameters(sizes)
    itemsize = 2 if s.dtype == "bfloat16" else 4
    context = s.prompt + s.new / 2
    width = 2 * sizes.num_key_value_heads * sizes.head_dim * itemsize
    read = weights * itemsize + batch * context * sizes.num_hidden_layers * width
    attended = 4 * sizes.num_hidden_layers * sizes.num_attention_heads * sizes.head_dim * context
    return read / s.bandwidth + batch * (2 * weights + attended) / s.flops


# --- PPO ----------------------------------------------------------------------------------------


def ppo(s: Scale) -> Figures:
    yield "ppo 1.5B", partial(ppo_iteration, s, "1.5B")


def ppo_iteration(s: Scale, size: str) -> Record:
    """The stage itself on a folder of random weights: seconds of its phases, from its own log."""
    import jax

    from medreason_jax.config import PPOConfig
    from medreason_jax.data.chat import ChatTokenizer
    from medreason_jax.data.tokenizer_training import train_tokenizer
    from medreason_jax.qwen2.folder import Description, save_model
    from medreason_jax.qwen2.model import init_params
    from medreason_jax.qwen2.sizes import read_sizes
    from medreason_jax.rl.loop import ppo_stage

    rollouts, prompt, new = s.ppo
    sizes, iterations = read_sizes(s.models[size]), 1 + REPETITIONS
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        text = "how many mg of which drug are given each time ? " * 20
        train_tokenizer([text], 320, "", here / "tokenizer")
        tokenizer = ChatTokenizer(here / "tokenizer")
        params = jax.jit(partial(init_params, sizes))(jax.random.key(0))
        save_model(here / "model", params, Description(sizes), tokenizer)
        del params
        question = "how"
        while len(tokenizer.prompt([{"role": "user", "content": question}])) < prompt:
            question += " many mg"
        records = [
            {"id": f"{n}", "question": f"{n} {question}", "answer": "1 mg"} for n in range(rollouts)
        ]
        asked = [tokenizer.prompt([{"role": "user", "content": r["question"]}]) for r in records]
        problems = here / "problems.jsonl"
        problems.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        ppo_stage(
            PPOConfig(
                kind="ppo",
                folder=here / "ppo",
                model=here / "model",
                problems=problems,
                iterations=iterations,
                rollouts=rollouts,
                minibatches=4,
                ppo_epochs=1,
                length=max(map(len, asked)) + new,
                max_new_tokens=new,
                temperature=1.0,
                dtype=s.dtype,
                accumulation=max(1, rollouts // 4 // 16),
                checkpoint_every=10**6,
                optimizer={"learning_rate": 1e-6, "mu_dtype": "bfloat16"},
            )
        )
        lines = (here / "ppo" / "speed.jsonl").read_text(encoding="utf-8").splitlines()
    warm = [json.loads(line) for line in lines[1:]]
    phases = ("generate_seconds", "score_seconds", "update_seconds")
    mean = {name: statistics.mean(line[name] for line in warm) for name in phases}
    times = [line["iteration_seconds"] for line in warm]
    shares = {
        n.replace("_seconds", ""): f"{x / statistics.mean(times):.0%}" for n, x in mean.items()
    }
    rest = 1 - sum(mean.values()) / statistics.mean(times)
    return (
        rate(rollouts, "samples/s", times, None)
        | shares
        | {"other": f"{rest:.0%}", "peak_gib": peak_gib()}
    )
