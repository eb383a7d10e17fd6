"""The reward of a response: think-before-answer form, then the verifier's verdict."""

from dataclasses import dataclass
from typing import Any

from data_gen.answers import final_response, judge


@dataclass(frozen=True)
class Rewards:
    """Rewards of a verified, a wrong and an unformatted answer (arXiv 2412.18925, 3.2)."""

    true: float
    false: float
    unformatted: float


@dataclass(frozen=True)
class Judged:
    reward: float
    outcome: str  # "true", "false", "unscored" or "unformatted"


def judge_response(text: str, problem: dict[str, Any], rewards: Rewards) -> Judged:
    """An unscored verdict is no false one: `rl/loop.py` leaves its rollout out of the update."""
    parts = final_response(text)
    if parts is None or not parts[0].strip():
        return Judged(rewards.unformatted, "unformatted")
    verdict = judge(parts[1], problem["answer"], problem.get("options"))
    return Judged(rewards.true if verdict.outcome == "true" else rewards.false, verdict.outcome)
