"""The peers' parts of `gpu.py`: `transformers` (with peft, Liger, cuDNN), TRL and google-tunix, on
the card that ours were measured on."""

import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from contestants import Task, torch, tunix, write_model
from gpu_parts import REPETITIONS, Figures, Record, Scale, rate, seconds_of, task, tokens_per_second


def peers_train(s: Scale) -> Figures:
    best = {"cudnn": True, "liger": True}
    ways = {
        "cuDNN, Liger, float32 masters": best | {"masters": True},  # what ours do
        "cuDNN, Liger": best,
        "defaults": {},
    }
    for size in ("1.5B", "7B", "0.5B"):
        tokens = s.tokens[-1]
        one = task(s, size, tokens, remat="full" if size == "7B" else "none")
        for name, options in ways.items():
            figure = f"transformers, {name}: train {size}; {tokens} tokens a step"
            yield figure, partial(peer_step, partial(torch, **options), one)
    lora = task(s, "7B", s.tokens[-1], remat="full", lora=16)
    yield (
        "transformers, cuDNN, Liger: train 7B lora",
        partial(peer_step, partial(torch, **best), lora),
    )
    for size in ("0.5B", "1.5B"):
        yield f"tunix: train {size}", partial(tunix_rate, s, size, "step")
    yield "TRL: train 0.5B", partial(trl_step, s, "0.5B")
    compiled = partial(torch, cudnn=True, compiled=True)
    one = task(s, "1.5B", s.tokens[-1])
    yield "transformers, cuDNN, compiled: train 1.5B", partial(peer_step, compiled, one)


def peer_step(contestant: Callable, one: Task) -> Record:
    times = seconds_of(contestant(one, None)["step"], inner=3)
    return rate(one.rows * one.length, "tok/s", times, None)


def peers_decode(s: Scale) -> Figures:
    """`transformers` gets a quarter of the new tokens, and so less to attend to: it is slow."""
    batch, fewer = s.batches[0], replace(s, new=s.new // 4)
    for size in ("7B", "1.5B", "0.5B"):
        for name, options in {"dynamic cache": {}, "static cache": {"static": True}}.items():
            figure = f"transformers, {name}: decode {size}, batch {batch}, {fewer.new} new"
            contestant = partial(torch, **options)
            yield figure, partial(tokens_per_second, fewer, size, batch, contestant)
    yield f"tunix: decode 0.5B, batch {batch}", partial(tunix_rate, s, "0.5B", "decode")


def tunix_rate(s: Scale, size: str, what: str) -> Record:
    """It reads its weights from a folder."""
    import tunix as installed  # noqa: F401  before gigabytes are written

    one = task(s, size, s.tokens[-1])
    with tempfile.TemporaryDirectory() as folder:
        write_model(one, Path(folder))
        contestant = lambda task, _: tunix(task, Path(folder))  # noqa: E731
        if what == "decode":
            return tokens_per_second(s, size, s.batches[0], contestant)
        return peer_step(contestant, one)


def trl_step(s: Scale, size: str) -> Record:
    """Its SFTTrainer on rows of random tokens; the steps after the first."""
    import torch as pytorch
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    one, steps = task(s, size, s.tokens[-1]), 1 + 3 * REPETITIONS
    begun: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments, **others):
            begun.append(time.perf_counter())

    with pytorch.device(s.device):
        model = Qwen2ForCausalLM(Qwen2Config(**one.fields)).to(getattr(pytorch, s.dtype))
    rows = [row for _ in range(steps) for row in one.tokens_BT().tolist()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=one.rows,
                max_length=one.length,
                bf16=s.dtype == "bfloat16",
                gradient_checkpointing=False,
                report_to=[],
                use_cpu=s.device == "cpu",
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=_no_tokenizer(folder),
            callbacks=[Clock()],
        )
        trainer.train()
    times = [b - a for a, b in itertools.pairwise(begun[1:])]
    return rate(one.rows * one.length, "tok/s", times, None)


def _no_tokenizer(folder: str):
    """TRL wants one even for rows of ids."""
    from transformers import AutoTokenizer

    from medreason_jax.data.tokenizer_training import train_tokenizer

    train_tokenizer(["a b c"] * 20, 320, "", Path(folder) / "tokenizer")
    return AutoTokenizer.from_pretrained(str(Path(folder) / "tokenizer"))
