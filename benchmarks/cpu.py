"""One train step, or greedy decoding, on a CPU, beside `transformers` + torch and google-tunix.

    python benchmarks/cpu.py step [--peers torch,tunix] [--repetitions 9]
    python benchmarks/cpu.py decode [--at-least torch=3.0]

The same Qwen2 (4 layers, width 256, vocabulary 8,192, float32, weights from one safetensors
folder); the layers are unrolled, as both peers' are. A step is of 4 x 512 tokens, AdamW without
decay; decoding is of 8 prompts of 32 tokens, 128 new ones each. Every contestant is a process of
its own that sleeps unless it is its turn; turns are interleaved, and what is printed is the median
of the ratios of neighbouring turns. Losses must agree, and tokens be equal. google-tunix is not a
dependency: `pip install google-tunix` into an environment that also holds medreason, or leave it
out of --peers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FIELDS = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "initializer_range": 0.06,
}
B, T, RATE = 4, 512, 1e-4
PROMPTS, PROMPT, NEW = 8, 32, 128
THREADS = 2
# By name: "step" makes one update and returns the loss before it, "decode" returns token ids.
Work = dict[str, Callable[[], Any]]


def tokens_BT():
    import numpy as np

    return np.random.default_rng(1).integers(1, FIELDS["vocab_size"], (B, T))


def prompts() -> list[list[int]]:
    import numpy as np

    shape = (PROMPTS, PROMPT)
    return np.random.default_rng(2).integers(1, FIELDS["vocab_size"], shape).tolist()


def write_model(folder: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**FIELDS)).save_pretrained(folder)


def medreason(folder: Path) -> Work:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from medreason_jax.generate.engine import Engine
    from medreason_jax.generate.sampling import Sampling
    from medreason_jax.mesh import make_mesh, make_sharder
    from medreason_jax.qwen2.huggingface import import_params
    from medreason_jax.qwen2.load import make_compute
    from medreason_jax.qwen2.model import abstract_params, make_network
    from medreason_jax.qwen2.sizes import read_sizes
    from medreason_jax.qwen2.tensor_files import TensorFiles
    from medreason_jax.train.objectives import language_modelling
    from medreason_jax.train.optimizer import make_optimizer, make_schedule
    from medreason_jax.train.program import make_policy
    from medreason_jax.train.step import init_state, make_train_step

    sizes = read_sizes(json.loads((folder / "config.json").read_text()))
    sharder = make_sharder(make_mesh(1, 1, 1), sizes.num_attention_heads, sizes.num_key_value_heads)
    unrolled = make_compute(sharder, sizes, "float32", unroll=sizes.num_hidden_layers)
    network, _ = make_network(sizes, unrolled)
    abstract = abstract_params(sizes)
    params = import_params(TensorFiles(folder), abstract, sharder.tree(abstract))
    optimizer = make_optimizer(
        make_schedule("constant", RATE, steps=1000, warmup_steps=0, final_ratio=1.0),
        b1=0.9,
        b2=0.999,
        weight_decay=0.0,
        clip_norm=float("inf"),
    )
    objective = language_modelling(make_policy(network, sharder, None, chunk=2048))
    state = init_state(params, optimizer)
    step = make_train_step(objective, optimizer, sharder, state, accumulation=1)
    tokens = tokens_BT().astype(np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "weights": np.broadcast_to(np.arange(T) < T - 1, (B, T)).astype(np.float32),
        "segments": np.ones((B, T), np.int32),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
    }
    batch = jax.tree.map(jnp.asarray, batch)

    def train() -> float:
        nonlocal state
        state, metrics = step(state, {}, batch)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    never = FIELDS["vocab_size"]  # no token ends an answer
    engine = Engine(network, sharder.mesh, slots=PROMPTS, end_id=never, pad_id=0)
    weights = import_params(TensorFiles(folder), abstract, sharder.tree(abstract))
    greedy = Sampling(0.0, 0, 1.0, NEW)

    def decode() -> list[list[int]]:
        return [done.ids for done in engine.generate(weights, prompts(), greedy, seed=0)]

    return {"step": train, "decode": decode}


def torch(folder: Path) -> Work:
    import torch
    from transformers import Qwen2ForCausalLM

    torch.set_num_threads(THREADS)
    model = Qwen2ForCausalLM.from_pretrained(str(folder), dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    tokens = torch.from_numpy(tokens_BT())

    def train() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    answering = Qwen2ForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    asked = torch.tensor(prompts())

    def decode() -> list[list[int]]:
        with torch.inference_mode():
            out = answering.generate(
                asked,
                attention_mask=torch.ones_like(asked),
                do_sample=False,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                pad_token_id=0,
            )
        return out[:, PROMPT:].tolist()

    return {"step": train, "decode": decode}


def tunix(folder: Path) -> Work:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen2.params import create_model_from_safe_tensors
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

    config = qwen2.ModelConfig(
        num_layers=FIELDS["num_hidden_layers"],
        vocab_size=FIELDS["vocab_size"],
        embed_dim=FIELDS["hidden_size"],
        hidden_dim=FIELDS["intermediate_size"],
        num_heads=FIELDS["num_attention_heads"],
        head_dim=FIELDS["hidden_size"] // FIELDS["num_attention_heads"],
        num_kv_heads=FIELDS["num_key_value_heads"],
        rope_theta=int(FIELDS["rope_theta"]),
        norm_eps=FIELDS["rms_norm_eps"],
        use_tied_embedding=False,
    )
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=axes)
    jax.set_mesh(mesh)
    model, answering = (
        create_model_from_safe_tensors(str(folder), config, mesh, dtype=jnp.float32)
        for _ in range(2)
    )
    trainer = PeftTrainer(
        model,
        optax.adamw(RATE, weight_decay=0.0),
        TrainingConfig(eval_every_n_steps=10**9, max_steps=10**9),
    )
    step, _ = trainer.jit_train_and_eval_step()
    batch = {
        "input_tokens": jnp.asarray(tokens_BT(), jnp.int32),
        "input_mask": jnp.ones((B, T), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(T), (B, T)),
        "attention_mask": jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T)),
    }

    def train() -> float:
        loss = step(batch)[0]
        jax.block_until_ready(nnx.state(trainer.model))
        return float(loss)

    asked, never = prompts(), FIELDS["vocab_size"] + 7

    class Numbers:
        """A tokenizer whose texts are the prompts' numbers."""

        def encode(self, text):
            return asked[int(text)]

        def decode(self, ids):
            return ""

        def bos_id(self):
            return None

        def eos_id(self):
            return never

        def pad_id(self):
            return 0

    room = CacheConfig(
        cache_size=PROMPT + NEW,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    sampler = Sampler(answering, Numbers(), room)

    def decode() -> list[list[int]]:
        out = sampler(
            [str(number) for number in range(PROMPTS)],
            max_generation_steps=NEW,
            max_prompt_length=PROMPT,
            eos_tokens=[never],
        )
        return [np.asarray(tokens).tolist() for tokens in out.tokens]

    return {"step": train, "decode": decode}


CONTESTANTS = {"medreason": medreason, "torch": torch, "tunix": tunix}


def work(name: str, folder: Path) -> None:
    """What each line of standard input names; result and seconds on standard output."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    able = CONTESTANTS[name](folder)
    for line in sys.stdin:
        start = time.perf_counter()
        result = able[line.strip()]()
        print(json.dumps({"result": result, "seconds": time.perf_counter() - start}), file=out)
        out.flush()


class Contestant:
    """A process that waits for its turn."""

    def __init__(self, name: str, folder: Path):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": str(THREADS),
            "OMP_WAIT_POLICY": "PASSIVE",
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }
        command = [sys.executable, __file__, "step", "--work", name, "--folder", str(folder)]
        pipe = subprocess.PIPE
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment
        )

    def turn(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended without an answer; its error is above")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def check_step(contestants: list[Contestant]) -> None:
    for number in (1, 2):
        losses = {c.name: round(c.turn("step")["result"], 4) for c in contestants}
        print(f"loss of step {number}: {losses}", flush=True)
        if max(losses.values()) - min(losses.values()) > 1e-3:
            raise SystemExit("the losses differ: not the same work")


def check_decode(contestants: list[Contestant]) -> None:
    answers = {c.name: c.turn("decode")["result"] for c in contestants}
    ours = answers["medreason"]
    for name, theirs in answers.items():
        pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
        same = sum(a == b for a, b in pairs)
        print(f"{name}: {same} of {len(pairs)} tokens equal medreason's", flush=True)
        if same < 0.9 * len(pairs):  # behind a near tie an answer goes its own way
            raise SystemExit("the answers differ: not the same work")


def compare(what: str, peers: list[str], repetitions: int, bars: dict[str, float]) -> None:
    """Print times and ratios; exit code 1 where a ratio is below the peer's bar."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        contestants = [Contestant(name, Path(folder)) for name in ["medreason", *peers]]
        check = check_step if what == "step" else check_decode
        check(contestants)
        seconds: dict[str, list[float]] = {c.name: [] for c in contestants}
        for repetition in range(repetitions):
            order = contestants if repetition % 2 == 0 else contestants[::-1]
            for contestant in order:
                seconds[contestant.name].append(contestant.turn(what)["seconds"])
        for contestant in contestants:
            contestant.close()
    ours, low = seconds["medreason"], []
    for name, theirs in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        print(
            f"{name:9s} median {statistics.median(theirs) * 1e3:5.0f} ms, best "
            f"{min(theirs) * 1e3:5.0f} ms; medreason's speed / its speed {ratio:.2f}"
        )
        if name in bars and ratio < bars[name]:
            low.append(f"{ratio:.2f} x {name}, bar {bars[name]}")
    print("load average", os.getloadavg())
    if low:
        raise SystemExit(f"{what} is slower than it was: {'; '.join(low)}")


def bar(text: str) -> tuple[str, float]:
    name, _, ratio = text.partition("=")
    return name, float(ratio)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["step", "decode"])
    parser.add_argument("--peers", default="torch,tunix")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--at-least", type=bar, action="append", default=[], metavar="PEER=RATIO")
    parser.add_argument("--work", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work, arguments.folder)
    else:
        peers = [peer for peer in arguments.peers.split(",") if peer]
        compare(arguments.what, peers, arguments.repetitions, dict(arguments.at_least))
