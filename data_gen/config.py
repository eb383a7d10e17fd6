"""The configuration of `data-gen run`: strict models, YAML with dotted overrides.

Relative paths are relative to the folder the command runs in. A teacher is a `base_url` or the
built-in `simulated` one; the environment gives nothing but the key that `api_key_env` names.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from data_gen.records import describe_error

Settings = TypeVar("Settings", bound=BaseModel)
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]


class Simulated(BaseModel, extra="forbid"):
    """The built-in teacher; a setting left at null is the server's own default."""

    bank: Path
    seed: int = 0
    error_reasoning: Share | None = None
    error_strategy: Share | None = None
    error_rewrite: Share | None = None
    error_filter: Share | None = None
    error_reformat: Share | None = None
    verifier_false_positive: Share | None = None
    verifier_false_negative: Share | None = None
    fault_429: Share | None = None
    fault_500: Share | None = None
    fault_timeout: Share | None = None
    fault_json: Share | None = None
    stall_seconds: Seconds | None = None
    retry_after_seconds: Seconds | None = None


class Role(BaseModel, extra="forbid"):
    """Who answers one kind of call, and how it is asked."""

    base_url: str | None = Field(default=None, pattern=r"^https?://")
    simulated: Simulated | None = None
    model: str = "simulated-teacher"
    api_key_env: str | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    max_tokens: int = Field(default=8192, ge=1)
    timeout: float = Field(default=120.0, gt=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _has_one_place(self) -> "Role":
        if (self.base_url is None) == (self.simulated is None):
            raise ValueError("base_url or simulated is required, and not both")
        if self.base_url is not None and "model" not in self.model_fields_set:
            raise ValueError("model is required with base_url")
        return self


class Teachers(BaseModel, extra="forbid"):
    """The reasoner filters and reasons, the verifier judges, the rewriter rewrites questions and
    reasoning; a role left out is the reasoner's."""

    reasoner: Role
    verifier: Role | None = None
    rewriter: Role | None = None


class Retries(BaseModel, extra="forbid"):
    """Tries of one call when the teacher is busy, broken or away; waits are seconds."""

    attempts: int = Field(default=6, ge=1)
    first_wait: float = Field(default=0.5, ge=0)
    longest_wait: float = Field(default=30.0, ge=0)


class ProblemSettings(BaseModel, extra="forbid"):
    """What makes a question of the bank a problem."""

    min_question_chars: int = Field(default=20, ge=0)
    teacher_filter: bool = True


class Shares(BaseModel, extra="forbid"):
    """Shares of the splits, for questions whose bank gives none."""

    search: float = Field(default=0.5, ge=0)
    rl: float = Field(default=0.5, ge=0)
    dev: float = Field(default=0.0, ge=0)
    test: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _is_something(self) -> "Shares":
        if self.search + self.rl + self.dev + self.test <= 0:
            raise ValueError("at least one share should be above 0")
        return self


class Decontamination(BaseModel, extra="forbid"):
    """Training problems that these evaluation files hold are dropped."""

    evaluation: list[Path] = []
    rule: Literal["coverage", "paper"] = "coverage"
    window: int = Field(default=64, ge=8)
    coverage: float = Field(default=0.3, gt=0, le=1)


class StrategyWeights(BaseModel, extra="forbid"):
    """How often each way of rethinking is drawn, in proportion."""

    explore: float = Field(default=1.0, ge=0)
    backtrack: float = Field(default=1.0, ge=0)
    verify_again: float = Field(default=1.0, ge=0)
    correct: float = Field(default=1.0, ge=0)


class Search(BaseModel, extra="forbid"):
    """The search for a verified conclusion: N rethinks a chain, T chains a problem."""

    max_depth: int = Field(default=3, ge=0)
    max_restarts: int = Field(default=3, ge=1)
    fresh_restart: bool = True
    strategies: StrategyWeights = StrategyWeights()
    backtrack_from: int = Field(default=2, ge=1)
    verifier: Literal["teacher", "rule"] = "teacher"

    @model_validator(mode="after")
    def _can_always_rethink(self) -> "Search":
        weights = self.strategies
        if self.max_depth and weights.explore + weights.verify_again + weights.correct <= 0:
            if weights.backtrack <= 0 or self.backtrack_from > 1:
                raise ValueError("a strategy that the first rethink may use needs a weight above 0")
        return self


class Rewrite(BaseModel, extra="forbid"):
    """Shares of the verified problems that also give the ablation records."""

    direct_share: Share = 0.25
    simple_cot_share: Share = 0.0


class Pairs(BaseModel, extra="forbid"):
    """Preference pairs: where both sides come from, k a problem and form, at most `cap` in all."""

    chosen: list[Literal["sft", "sample"]] = ["sft", "sample"]
    rejected: list[Literal["trace", "sample"]] = ["trace", "sample"]
    explain: list[bool] = [True, False]
    k: int = Field(default=2, ge=1)
    cap: int | None = Field(default=None, ge=1)
    candidates: Path | None = None


class Limits(BaseModel, extra="forbid"):
    """Hard caps on what the whole job, resumed runs included, may spend; null is no cap."""

    max_calls: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)


class Config(BaseModel, extra="forbid"):
    """Everything `data-gen run` reads."""

    bank: Path
    out: Path
    teacher: Teachers
    language: str = "en"
    prompts: Path | None = None
    seed: int = Field(default=0, ge=0)
    concurrency: int = Field(default=32, ge=1)
    retries: Retries = Retries()
    problems: ProblemSettings = ProblemSettings()
    split: Shares = Shares()
    decontamination: Decontamination = Decontamination()
    search: Search = Search()
    rewrite: Rewrite = Rewrite()
    pairs: Pairs = Pairs()
    limits: Limits = Limits()


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply `a.b=c` overrides; what is wrong is a ValueError of one line."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a configuration is a mapping of fields, found {data!r}"[:200])
    for override in overrides:
        _override(data, override)
    return check_settings(Config, data, str(path))


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """The mapping that `a.b=c` settings make, values read as YAML."""
    data: dict[str, Any] = {}
    for override in overrides:
        _override(data, override)
    return data


def check_settings(model: type[Settings], data: dict[str, Any], where: str) -> Settings:
    """The settings, checked; an unknown field is named with the nearest that exists."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{where}: {_explain(error, model)}") from None


def _override(data: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ValueError(f"--set {override}: it should be field.field=value")
    *folders, last = name.split(".")
    for folder in folders:
        if folder not in data or data[folder] is None:
            data[folder] = {}
        data = data[folder]
        if not isinstance(data, dict):
            raise ValueError(f"--set {override}: {folder} has no fields")
    try:
        data[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        data[last] = text


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    unknown = [each for each in error.errors() if each["type"] == "extra_forbidden"]
    if not unknown:
        return describe_error(error)
    *place, name = (str(part) for part in unknown[0]["loc"])
    allowed = _fields_at(model, place)
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.0)
    where = ".".join([*place, name])
    return f"unknown field {where}; did you mean {near[0]}? allowed: {', '.join(allowed)}"


def _fields_at(model: type[BaseModel], place: list[str]) -> list[str]:
    for name in place:
        annotation = model.model_fields[name].annotation
        choices = [annotation, *get_args(annotation)]
        model = next(c for c in choices if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
