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
    tokens = s.tokens[-1]
    variants: dict[str, dict[str, bool]] = {
        "transformers": {},
        "transformers, cuDNN": {"cudnn": True},
        "transformers, cuDNN, compiled": {"cudnn": True, "compiled": True},
        "transformers, cuDNN, Liger": {"cudnn": True, "liger": True},
    }
    for size in s.models:
        for name, options in variants.items():
            one = task(s, size, tokens, remat="full" if size == "7B" else "none")
            yield f"{name}: train {size}", partial(peer_step, s, partial(torch, **options), one)
        yield f"tunix: train {size}", partial(peer_with_weights, s, size, "step")
    lora = task(s, "7B", tokens, remat="full", lora=16)
    yield (
        "transformers, cuDNN: train 7B lora",
        partial(peer_step, s, partial(torch, cudnn=True), lora),
    )
    yield "TRL: train 0.5B", partial(trl_step, s, "0.5B")


def peer_step(s: Scale, contestant: Callable, one: Task) -> Record:
    times = seconds_of(contestant(one, None)["step"], inner=3)
    return rate(one.rows * one.length, "tok/s", times, None)


def peers_decode(s: Scale) -> Figures:
    for size in s.models:
        for batch in (64, 256) if s.device == "cuda" else (2,):
            for name, options in {"dynamic cache": {}, "static cache": {"static": True}}.items():
                figure = f"transformers, {name}: decode {size}, batch {batch}"
                measured = partial(tokens_per_second, s, size, batch, partial(torch, **options))
                yield figure, measured
    yield "tunix: decode 0.5B", partial(peer_with_weights, s, "0.5B", "decode")


def peer_with_weights(s: Scale, size: str, what: str) -> Record:
    one = replace(task(s, size, s.tokens[-1]), prompts=s.batches[-2])
    with tempfile.TemporaryDirectory() as folder:
        write_model(one, Path(folder))
        times = seconds_of(tunix(one, Path(folder))[what])
    amount = one.rows * one.length if what == "step" else one.prompts * one.new
    return rate(amount, "tok/s", times, None)


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
