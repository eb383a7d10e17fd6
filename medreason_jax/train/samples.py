"""Answers to a few prompts while a stage trains, to read."""

import json
from itertools import islice
from pathlib import Path

import jax

from medreason_jax.config import SamplesConfig, TrainConfig
from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.sources import iterate_lines
from medreason_jax.generate.engine import Engine
from medreason_jax.generate.prompts import prompt_ids
from medreason_jax.generate.sampling import Sampling
from medreason_jax.qwen2.load import Loaded
from medreason_jax.train.objectives import Policy


class Samples:
    """Greedy answers, a line each in `samples.jsonl`; a resumed run may write a step twice."""

    def __init__(
        self,
        settings: SamplesConfig,
        policy: Policy,
        engine: Engine,
        tokenizer: ChatTokenizer,
        path: Path,
    ):
        lines = list(islice(iterate_lines(settings.prompts), settings.count))
        if not lines:
            raise ValueError(f"samples.prompts: {settings.prompts} holds no prompt")
        self.records = [record for _, record in lines]
        vocab_size = policy.scorer.network.sizes.vocab_size
        self.prompts = [prompt_ids(tokenizer, r, place, vocab_size) for place, r in lines]
        self.settings, self.policy, self.engine = settings, policy, engine
        self.tokenizer, self.path = tokenizer, path

    def is_due(self, unit: int) -> bool:
        return unit % self.settings.every == 0

    def write(self, unit: int, trainable, frozen) -> None:
        params = self.policy.params(trainable, frozen)
        sampling = Sampling(0.0, 0, 1.0, self.settings.max_new_tokens)
        completions = self.engine.generate(params, self.prompts, sampling, seed=0)
        if jax.process_index() != 0:
            return
        with self.path.open("a", encoding="utf-8") as file:
            for record, completion in zip(self.records, completions, strict=True):
                text = self.tokenizer.decode(completion.ids)
                line = {
                    "step": unit,
                    **record,
                    "text": text,
                    "finish_reason": completion.finish_reason,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def make_samples(config: TrainConfig, model: Loaded, policy: Policy) -> Samples | None:
    """None where the config asks for none."""
    if config.samples is None:
        return None
    engine = model.replace(network=policy.scorer.network).engine(config.samples.count)
    path = config.folder / "samples.jsonl"
    samples = Samples(config.samples, policy, engine, model.tokenizer, path)
    model.check_length(max(map(len, samples.prompts)) + config.samples.max_new_tokens)
    return samples
