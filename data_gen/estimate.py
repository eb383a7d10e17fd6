"""What a run will cost, before it starts: calls, tokens, money, from low to high.

The prompts' sizes are those of the bank and of the prompt files; the lengths of answers and the
acceptance are assumed (from what HuatuoGPT-o1, arXiv 2412.18925, reports of its searches) until a
journal of the same folder or of a pilot has measured them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from data_gen.config import Config
from data_gen.endpoints import price_list, roles_of
from data_gen.journal_file import open_for_reading
from data_gen.prices import Usage
from data_gen.prompting import load_prompts
from data_gen.records import Mcq, read_records

CHARS_PER_TOKEN = {"en": 4.0, "ja": 1.2, "zh": 1.5}
# Tokens of an answer by the prompt that asks for it.
ANSWER_TOKENS = {
    "answer_options": 3,
    "filter": 3,
    "reformat": 120,
    "initial_cot": 500,
    "explore": 450,
    "verify": 2,
    "natural_reasoning": 760,
    "final_response": 155,
}
STRATEGIES = ("explore", "backtrack", "verify_again", "correct", "label_cot")
ROLE_OF = {
    "filter": "reasoner",
    "reformat": "rewriter",
    "initial_cot": "reasoner",
    "explore": "reasoner",
    "verify": "verifier",
    "natural_reasoning": "rewriter",
    "final_response": "rewriter",
}
SAMPLE = 5000  # calls of a journal that are looked at


@dataclass(frozen=True)
class Scenario:
    """Shares: of questions that pass the filters, of conclusions accepted, of replies repaired, of
    questions that a model of the difficulty filter answers right."""

    passed: float
    accepted: float
    repaired: float
    easy: float


SCENARIOS = {
    "low": Scenario(passed=0.6, accepted=0.85, repaired=0.0, easy=0.4),
    "expected": Scenario(passed=0.8, accepted=0.6, repaired=0.03, easy=0.6),
    "high": Scenario(passed=1.0, accepted=0.3, repaired=0.1, easy=0.8),
}


@dataclass(frozen=True)
class Walk:
    """What the search of one problem comes to, on average."""

    first: float  # initial chains of thought
    rethought: float
    judged: float
    verified: float  # probability that it ends verified


def expect_walk(accepted: float, depth: int, restarts: int, fresh: bool) -> Walk:
    """Expected steps of a search whose every conclusion is accepted with this probability."""
    wrong = 1 - accepted
    first = rethought = judged = 0.0
    reached = 1.0  # probability that this chain is begun
    for restart in range(restarts):
        begun_anew = restart == 0 or fresh
        first += reached * begun_anew
        judged += reached * begun_anew
        still = reached * (wrong if begun_anew else 1.0)
        for _ in range(depth):
            rethought += still
            judged += still
            still *= wrong
        reached = still
    return Walk(first, rethought, judged, 1 - reached)


@dataclass(frozen=True)
class Measured:
    """Mean tokens by kind of prompt, and the acceptance, of calls that were made."""

    tokens: Mapping[str, Usage]
    accepted: float | None


def estimate(config: Config, measured: Measured | None = None) -> dict[str, Any]:
    """Calls, tokens and cost by scenario, in all and by kind of call."""
    bank = list({mcq.id: mcq for mcq in read_records(config.bank, Mcq)}.values())
    sizes = expect_tokens(config, bank)
    if measured is not None:
        sizes |= measured.tokens
    told = {
        name: _price(config, bank, sizes, scenario, measured)
        for name, scenario in SCENARIOS.items()
    }
    roles = [*roles_of(config.teacher).values(), *config.problems.difficulty_models]
    unpriced = sorted({role.model for role in roles} - set(config.prices.models))
    return {
        "questions": len(bank),
        "currency": config.prices.currency,
        "models_without_price": unpriced,
        "measured": sorted(measured.tokens) if measured is not None else [],
        **told,
    }


def _price(
    config: Config,
    bank: Sequence[Mcq],
    sizes: Mapping[str, Usage],
    scenario: Scenario,
    measured: Measured | None,
) -> dict[str, Any]:
    roles, prices = roles_of(config.teacher), price_list(config.prices)
    accepted = scenario.accepted
    if measured is not None and measured.accepted is not None:
        # A measured acceptance takes the place of the assumed one, with the same spread about it.
        accepted = measured.accepted ** _SPREAD[scenario.accepted]
    calls = count_calls(config, bank, scenario, accepted)
    asked = [(kind, kind, roles[ROLE_OF[kind]], count) for kind, count in calls.items()]
    for number, role in enumerate(config.problems.difficulty_models):
        # They are asked in turn, until one is wrong.
        count = len(bank) * scenario.easy**number
        asked.append((f"difficulty {number + 1}, {role.model}", "answer_options", role, count))
    parts = {}
    for name, kind, role, count in asked:
        count *= 1 + scenario.repaired * (kind not in ("answer_options", "final_response"))
        size = sizes[kind]
        used = Usage(round(count * size.prompt), round(count * size.completion))
        cost = prices.rate(role.model, role.batch is not None).of(used)
        parts[name] = {"calls": round(count), "prompt_tokens": used.prompt}
        parts[name] |= {"completion_tokens": used.completion, "cost": round(cost, 4)}
    total = {name: sum(part[name] for part in parts.values()) for name in _SUMMED}
    return {**total, "cost": round(total["cost"], 2), "parts": parts}


_SUMMED = ("calls", "prompt_tokens", "completion_tokens", "cost")
_SPREAD = {0.85: 0.5, 0.6: 1.0, 0.3: 2.0}  # exponents of the low, expected and high scenario


def count_calls(
    config: Config, bank: Sequence[Mcq], scenario: Scenario, accepted: float
) -> dict[str, float]:
    """Expected calls by kind."""
    passed = len(bank) * scenario.passed
    search = config.search
    walk = expect_walk(accepted, search.max_depth, search.max_restarts, search.fresh_restart)
    searched = passed * search_share(config, bank)
    told = searched * (1 - walk.verified) if search.label_conditioned else 0.0
    by_teacher = searched * walk.judged + told if search.verifier != "rule" else 0.0
    if config.rewrite.verifier != "rule":
        by_teacher += searched * walk.verified
    calls = {
        "filter": float(len(bank)) if config.problems.teacher_filter else 0.0,
        "reformat": passed if config.problems.teacher_filter else float(len(bank)),
        "initial_cot": searched * walk.first,
        "explore": searched * walk.rethought + told,
        "verify": by_teacher,
        "natural_reasoning": searched * walk.verified,
        "final_response": searched * walk.verified,
    }
    return {kind: count for kind, count in calls.items() if count}


def search_share(config: Config, bank: Sequence[Mcq]) -> float:
    """The share of the bank that is searched: the bank's own splits, else the settings'."""
    own = [mcq.split for mcq in bank if mcq.split is not None]
    shares = config.split
    whole = shares.search + shares.rl + shares.dev + shares.test
    drawn = shares.search / whole
    return (own.count("search") + drawn * (len(bank) - len(own))) / max(1, len(bank))


def expect_tokens(config: Config, bank: Sequence[Mcq]) -> dict[str, Usage]:
    """Tokens of a call by kind, from the prompt files and the bank."""
    prompts = load_prompts(config.language, config.prompts)
    per_token = CHARS_PER_TOKEN[config.language] if config.language in CHARS_PER_TOKEN else 2.0
    question = fmean([len(mcq.question) for mcq in bank] or [0]) / per_token
    options = fmean([sum(map(len, mcq.options.values())) for mcq in bank] or [0]) / per_token
    answer = fmean([len(mcq.answer) for mcq in bank] or [0]) / per_token
    cot = ANSWER_TOKENS["initial_cot"]
    added = {
        "answer_options": question + options,
        "filter": question + options + answer,
        "reformat": question + options + answer,
        "initial_cot": question,
        "explore": question + 1.5 * cot,
        "verify": 2 * answer + 20,
        "natural_reasoning": question + 1.5 * cot,
        "final_response": question + ANSWER_TOKENS["natural_reasoning"],
    }
    said = {**ANSWER_TOKENS, "reformat": round(question + answer + 30)}
    return {
        kind: Usage(round(len(prompts[kind]) / per_token + more), said[kind])
        for kind, more in added.items()
    }


def measure(config: Config, journal: Path) -> Measured:
    """Mean tokens by kind of call and the share of verdicts True, of a journal's calls."""
    starts = {
        kind: text[: text.find("{")] if "{" in text else text
        for kind, text in load_prompts(config.language, config.prompts).items()
    }
    found: dict[str, list[Usage]] = {}
    verdicts: list[bool] = []
    for prompt, answer, used in _sample(journal):
        kind = next((name for name, start in starts.items() if prompt.startswith(start)), None)
        kind = "explore" if kind in STRATEGIES else kind
        kind = "verify" if kind == "verify_with_question" else kind
        if kind in ANSWER_TOKENS:
            found.setdefault(kind, []).append(used)
        if kind == "verify" and answer.strip(" .") in ("True", "False"):
            verdicts.append(answer.strip(" .") == "True")
    tokens = {
        kind: Usage(
            round(fmean(used.prompt for used in calls)),
            round(fmean(used.completion for used in calls)),
        )
        for kind, calls in found.items()
    }
    return Measured(tokens, fmean(verdicts) if verdicts else None)


def _sample(journal: Path) -> Iterator[tuple[str, str, Usage]]:
    """(first message, answer, tokens) of calls; keys are hashes, so their order is no order."""
    with closing(open_for_reading(journal)) as db:
        for request, answer, prompt, completion in db.execute(
            "SELECT request, answer, prompt_tokens, completion_tokens FROM calls"
            f" ORDER BY key LIMIT {SAMPLE}"
        ):
            messages = json.loads(request)["messages"]
            if len(messages) == 1:
                yield messages[0]["content"], answer, Usage(prompt, completion)


def describe(told: Mapping[str, Any]) -> Iterator[str]:
    """The estimate as lines for a person."""
    yield f"{told['questions']} questions; tokens measured for: {_list(told['measured'])}"
    for name in SCENARIOS:
        part = told[name]
        cost = f", {part['cost']:.2f} {told['currency']}"
        tokens = f"{part['prompt_tokens']} + {part['completion_tokens']} tokens"
        yield f"{name}: {part['calls']} calls, {tokens}{cost}"
    for kind, part in told["expected"]["parts"].items():
        tokens = f"{part['prompt_tokens']} + {part['completion_tokens']} tokens"
        yield f"  {kind}: {part['calls']} calls, {tokens}, {part['cost']:.2f}"
    if told["models_without_price"]:
        models = ", ".join(told["models_without_price"])
        yield f"no price in prices.models for {models}: counted as free"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none, all are assumed"
