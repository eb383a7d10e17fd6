"""How fast a run goes: tokens/s, MFU, goodput, memory.

Kept apart from the metrics of what it computes, which a resumed run repeats bit for bit.
"""

import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from medreason_jax.qwen2.lora import Lora
from medreason_jax.qwen2.sizes import Sizes

# Dense bf16 peak of a device, FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def product_parameters(sizes: Sizes) -> int:
    """Parameters in a product of every token: the body and the vocabulary projection."""
    looked_up = 0 if sizes.tie_word_embeddings else sizes.vocab_size * sizes.hidden_size
    return sizes.parameter_count - looked_up


def training_flops(sizes: Sizes, lora: Lora | None, tokens: float, attended: float) -> float:
    """Model FLOPs of a forward and backward pass, what is computed again not counted.

    6 for each parameter of a product (body and vocabulary projection, no embedding look-up) and
    token; with adapters 4, since frozen weights have no gradient. Causal attention adds 12 x layers
    x heads x head size for each (query, key) pair, of which a document of n tokens has n^2 / 2:
    `attended` is the sum of n^2.
    """
    each = 6 if lora is None else 4
    width = sizes.num_attention_heads * sizes.head_dim
    return (
        each * product_parameters(sizes) * tokens + 6 * sizes.num_hidden_layers * width * attended
    )


class Speed:
    """Times of a stage's steps, one line each in `speed.jsonl`; this attempt's only."""

    def __init__(self, folder: Path, sizes: Sizes, lora: Lora | None, active: bool):
        self.sizes, self.lora = sizes, lora
        self.file = (folder / "speed.jsonl").open("a", encoding="utf-8") if active else None
        self.begun = self.last = time.monotonic()
        self.lost = {"compile": 0.0}
        device = jax.devices()[0]
        known = device.device_kind in PEAK_FLOPS
        self.peak = PEAK_FLOPS[device.device_kind] * jax.device_count() if known else None

    @contextmanager
    def apart(self, name: str):
        """Time that is not spent in steps: compiling, saving, evaluating."""
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        self.lost[name] = (self.lost[name] if name in self.lost else 0.0) + seconds
        self.last += seconds

    @property
    def goodput(self) -> float:
        """Share of the wall time that went into steps."""
        wall = time.monotonic() - self.begun
        return max(1.0 - sum(self.lost.values()) / max(wall, 1e-9), 0.0)

    def step(self, unit: int, tokens: float, attended: float, slots: int) -> dict[str, Any]:
        """The line of a step that has just been found finished."""
        now = time.monotonic()
        seconds, self.last = max(now - self.last, 1e-9), now
        values: dict[str, Any] = {
            "step": unit,
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "padding_share": 1.0 - tokens / slots,
            "goodput": self.goodput,
            "compile_seconds": self.lost["compile"],
        }
        if self.peak is not None:
            flops = training_flops(self.sizes, self.lora, tokens, attended)
            values["mfu"] = flops / seconds / self.peak
        memory = jax.local_devices()[0].memory_stats()
        if memory is not None:
            values["peak_bytes"] = memory["peak_bytes_in_use"]
        if self.file is not None:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
        return values

    def close(self) -> dict[str, Any]:
        """What goes into the manifest."""
        if self.file is not None:
            self.file.close()
        lost = {f"{name}_seconds": round(seconds, 1) for name, seconds in self.lost.items()}
        return {"goodput": round(self.goodput, 4), **lost}


class Phases:
    """Seconds of the parts of an iteration, one line each in `speed.jsonl`; this attempt's only."""

    def __init__(self, folder: Path, active: bool):
        self.file = (folder / "speed.jsonl").open("a", encoding="utf-8") if active else None
        self.begun = self.last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def begin(self) -> None:
        self.begun = self.last = time.monotonic()
        self.seconds = {}

    def end_of(self, phase: str) -> None:
        """What happened since the phase before was this one; its results are on the host."""
        now = time.monotonic()
        self.seconds[f"{phase}_seconds"], self.last = now - self.last, now

    def line(self, unit: int, samples: int) -> dict[str, float]:
        """Of the iteration that ends here; saving and dev accuracy come after it."""
        whole = time.monotonic() - self.begun
        values = {
            "samples_per_second": samples / whole,
            "iteration_seconds": whole,
            **self.seconds,
        }
        memory = jax.local_devices()[0].memory_stats()
        if memory is not None:
            values["peak_bytes"] = memory["peak_bytes_in_use"]
        if self.file is not None:
            self.file.write(json.dumps({"step": unit, **values}) + "\n")
            self.file.flush()
        return values

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
