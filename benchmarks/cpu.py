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
from pathlib import Path
from typing import Any

from contestants import CONTESTANTS, Task, write_model

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
TASK = Task(FIELDS, rows=4, length=512, prompts=8, prompt=32, new=128, unroll=4)


def work(name: str, folder: Path) -> None:
    """What each line of standard input names; result and seconds on standard output."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    able = CONTESTANTS[name](TASK, folder)
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
            "OMP_NUM_THREADS": str(TASK.threads),
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
        write_model(TASK, Path(folder))
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
