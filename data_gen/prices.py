"""What tokens cost: rates by model, from the price table in the configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

MILLION = 1_000_000


class Usage(NamedTuple):
    """Tokens of one call; `cached` of the prompt's came from the provider's cache."""

    prompt: int
    completion: int
    cached: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt + self.completion


@dataclass(frozen=True)
class Rate:
    """Prices of a million tokens of one model."""

    input: float = 0.0
    output: float = 0.0
    cached_input: float = 0.0

    def of(self, usage: Usage) -> float:
        """What the tokens cost."""
        fresh = usage.prompt - usage.cached
        total = fresh * self.input + usage.cached * self.cached_input
        return (total + usage.completion * self.output) / MILLION

    def times(self, share: float) -> "Rate":
        """The rates with a discount."""
        return Rate(self.input * share, self.output * share, self.cached_input * share)


FREE = Rate()


@dataclass(frozen=True)
class PriceList:
    """Rates by the name of the model, and what a batch pays of them."""

    currency: str
    rates: Mapping[str, Rate]
    batch_share: float

    def rate(self, model: str, batch: bool = False) -> Rate:
        """The rate of a model; one that is not listed is free."""
        rate = self.rates[model] if model in self.rates else FREE
        return rate.times(self.batch_share) if batch else rate


NO_PRICES = PriceList("", {}, 1.0)
