"""Accuracy on dev problems while a stage trains: the curve that says when it is flat."""

from medreason_jax.config import DevConfig, PPOConfig, TrainConfig
from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.sources import question_text, read_problems
from medreason_jax.evaluate.runner import SAMPLED_TEMPERATURE, accuracy_of, ask, part_of
from medreason_jax.generate.engine import Engine
from medreason_jax.generate.sampling import Sampling
from medreason_jax.qwen2.load import Loaded
from medreason_jax.train.objectives import Policy


class DevAccuracy:
    """Explained answers to the same problems every time, greedy and sampled."""

    def __init__(
        self, settings: DevConfig, policy: Policy, engine: Engine, tokenizer: ChatTokenizer
    ):
        problems = read_problems(settings.problems)
        kept = [p for p in problems if settings.part in (None, part_of(p))][: settings.count]
        if not kept:
            parts = sorted({part_of(problem) for problem in problems})
            raise ValueError(
                f"dev.part={settings.part!r}: no problem of {settings.problems}; allowed: {parts}"
            )
        self.problems = kept
        self.settings, self.policy, self.engine = settings, policy, engine
        self.tokenizer = tokenizer

    @property
    def longest_prompt(self) -> int:
        questions = (question_text(problem) for problem in self.problems)
        return max(
            len(self.tokenizer.prompt([{"role": "user", "content": text}])) for text in questions
        )

    def is_due(self, unit: int) -> bool:
        return unit % self.settings.every == 0

    def measure(self, trainable, frozen) -> dict[str, float]:
        params = self.policy.params(trainable, frozen)
        scores = {}
        temperatures = (("dev_accuracy", 0.0), ("dev_accuracy_sampled", SAMPLED_TEMPERATURE))
        for name, temperature in temperatures:
            sampling = Sampling(temperature, 0, 1.0, self.settings.max_new_tokens)
            predictions = ask(
                *(self.engine, params, self.tokenizer, self.problems),
                *("explain", sampling, 0),
            )
            scores[name] = accuracy_of(predictions)
        return scores


def make_dev_accuracy(
    config: TrainConfig | PPOConfig, model: Loaded, policy: Policy
) -> DevAccuracy | None:
    """None where the config asks for none."""
    if config.dev is None:
        return None
    engine = model.replace(network=policy.scorer.network).engine(config.dev.count)
    dev = DevAccuracy(config.dev, policy, engine, model.tokenizer)
    model.check_length(dev.longest_prompt + config.dev.max_new_tokens)
    return dev
