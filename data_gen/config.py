"""The configuration of `data-gen run`: strict models, YAML with dotted overrides.

Relative paths are relative to the folder the command runs in. A teacher is a `base_url` or the
built-in `simulated` one; the environment gives nothing but the key that `api_key_env` names.
"""

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from data_gen.network import PLAIN_URL, check_headers, is_plain_url
from data_gen.records import describe_error
from data_gen.verdict import VerifierKind

Settings = TypeVar("Settings", bound=BaseModel)
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]
FEWEST_DIFFICULTY_MODELS = 3


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
    fault_cut: Share | None = None
    latency_seconds: Seconds | None = None
    stall_seconds: Seconds | None = None
    retry_after_seconds: Seconds | None = None


class BatchMode(BaseModel, extra="forbid"):
    """Calls go out through the provider's batch API, when `count` are ready or after `seconds`."""

    count: int = Field(default=1000, ge=1, le=50_000)
    seconds: float = Field(default=60.0, gt=0)
    poll_seconds: float = Field(default=30.0, gt=0)
    window: str = "24h"
    list_lag_seconds: Seconds = 30.0


class Role(BaseModel, extra="forbid"):
    """Who answers one kind of call, and how it is asked.

    `base_url` is one endpoint or a list of them for one model; the least busy is asked first.
    """

    base_url: str | list[str] | None = None
    simulated: Simulated | None = None
    model: str = "simulated-teacher"
    revision: str = ""
    api_key_env: str | None = None
    api_key_file: Path | None = None
    api_key_header: str = "Authorization"
    api_version: str | None = None
    headers: dict[str, str] = {}
    headers_env: dict[str, str] = {}
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int = Field(default=8192, ge=1)
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    structured_output: Literal["off", "json_object", "json_schema"] = "off"
    timeout: float = Field(default=120.0, gt=0)
    seed: int = Field(default=0, ge=0)
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    batch: BatchMode | None = None

    @property
    def urls(self) -> list[str]:
        """Its endpoints; none for the simulated teacher, which has one once it runs."""
        if self.base_url is None:
            return []
        return [self.base_url] if isinstance(self.base_url, str) else list(self.base_url)

    @field_validator("base_url", mode="before")
    @classmethod
    def _is_plain(cls, value: Any) -> Any:
        given = value if isinstance(value, list) else [value]
        if value is not None and (not given or not all(is_plain_url(url) for url in given)):
            raise ValueError(f"{PLAIN_URL}, or a list of them")
        return value

    @model_validator(mode="after")
    def _has_one_place(self) -> "Role":
        if (self.base_url is None) == (self.simulated is None):
            raise ValueError("base_url or simulated is required, and not both")
        if self.base_url is not None and "model" not in self.model_fields_set:
            raise ValueError("model is required with base_url")
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("api_key_env or api_key_file, not both")
        if self.batch is not None and len(self.urls) > 1:
            raise ValueError("batch takes one base_url: a batch lies at one provider")
        check_headers(self.headers)
        return self


class NetworkSettings(BaseModel, extra="forbid"):
    """What may be reached, and how. `proxy_env` names a variable that holds user:password."""

    allow: list[str] | None = None
    offline: bool = False
    ca_bundle: Path | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None
    proxy: str | None = None
    proxy_env: str | None = None

    @field_validator("proxy", mode="before")
    @classmethod
    def _is_plain(cls, value: Any) -> Any:
        if value is not None and not is_plain_url(value):
            raise ValueError(PLAIN_URL)
        return value

    @model_validator(mode="after")
    def _is_whole(self) -> "NetworkSettings":
        if self.client_key is not None and self.client_certificate is None:
            raise ValueError("client_key has no effect without client_certificate")
        if self.proxy_env is not None and self.proxy is None:
            raise ValueError("proxy_env has no effect without proxy")
        return self


class Price(BaseModel, extra="forbid"):
    """What a million tokens of one model cost; a cached prompt token costs `input` if not told."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    cached_input: float | None = Field(default=None, ge=0)


class Prices(BaseModel, extra="forbid"):
    """The price table: by the `model` of a role. A batch costs `batch_share` of a price."""

    currency: str = "USD"
    models: dict[str, Price] = {}
    batch_share: Share = 0.5


class Teachers(BaseModel, extra="forbid"):
    """The reasoner filters and reasons, the verifier judges, the rewriter rewrites questions and
    reasoning; a role left out is the reasoner's."""

    reasoner: Role
    verifier: Role | None = None
    rewriter: Role | None = None


class Retries(BaseModel, extra="forbid"):
    """Tries of one call when the teacher is broken or away; waits are seconds.

    While it only says that it is busy (429), a call is tried for `busy_seconds`, however often.
    A reply that cannot be read is asked for again `repairs` times, with the reason.
    """

    attempts: int = Field(default=8, ge=1)
    first_wait: float = Field(default=0.5, ge=0)
    longest_wait: float = Field(default=30.0, ge=0)
    busy_seconds: Seconds = 3600.0
    repairs: int = Field(default=1, ge=0)


class ProblemSettings(BaseModel, extra="forbid"):
    """What makes a question of the bank a problem.

    A question that all of the `difficulty_models` answer right is dropped: at least three, each as
    a teacher's role is given; none, and the filter is off.
    """

    min_question_chars: int = Field(default=20, ge=0)
    teacher_filter: bool = True
    difficulty_models: list[Role] = []

    @model_validator(mode="after")
    def _has_enough_models(self) -> "ProblemSettings":
        given = len(self.difficulty_models)
        if 0 < given < FEWEST_DIFFICULTY_MODELS:
            raise ValueError(
                f"difficulty_models: {given} given, at least {FEWEST_DIFFICULTY_MODELS} are needed "
                "to call a question too easy; add more, or none to leave the filter off"
            )
        return self


class Mixed(BaseModel, extra="forbid"):
    """A verifiable set that is mixed in as it is (JSON Lines; questions with options keep them).

    `to` sends it to one split, null to search and rl by their shares; `count` is the most of it.
    """

    path: Path
    source: str = Field(min_length=1)
    to: Literal["search", "rl"] | None = None
    count: int | None = Field(default=None, ge=1)


class Shares(BaseModel, extra="forbid"):
    """Shares of the splits, for questions whose bank gives none.

    dev and test get at least `min_dev` and `min_test` questions where the bank has twice as many.
    Questions are of one group from `similarity` on (Jaccard, of 5-character windows); null leaves
    groups to the bank.
    """

    search: float = Field(default=0.45, ge=0)
    rl: float = Field(default=0.45, ge=0)
    dev: float = Field(default=0.05, ge=0)
    test: float = Field(default=0.05, ge=0)
    min_dev: int = Field(default=200, ge=0)
    min_test: int = Field(default=200, ge=0)
    similarity: float | None = Field(default=0.7, ge=0.3, le=1)

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
    label_conditioned: bool = False
    verifier: VerifierKind = "teacher"
    verifier_sees_question: bool = False
    rule_seconds: float = Field(default=10.0, gt=0)
    teacher_seconds: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _can_always_rethink(self) -> "Search":
        weights = self.strategies
        if self.max_depth and weights.explore + weights.verify_again + weights.correct <= 0:
            if weights.backtrack <= 0 or self.backtrack_from > 1:
                raise ValueError("a strategy that the first rethink may use needs a weight above 0")
        return self


class Rewrite(BaseModel, extra="forbid"):
    """Shares of the verified problems that also give ablation records among the SFT records, and
    who checks that the final response still carries the answer."""

    direct_share: Share = 0.25
    simple_cot_share: Share = 0.0
    option_only_share: Share = 0.0
    verifier: VerifierKind = "rule"


class Pairs(BaseModel, extra="forbid"):
    """Preference pairs: where both sides come from, k a problem and form, at most `cap` in all.

    The chosen side's tier is above the rejected one's: the bank's explanation (`ground_truth`),
    verified reasoning (`sft`, a right `sample`), `unverified` reasoning, wrong reasoning (`trace`,
    a wrong `sample`). With `sft` among the rejected, the bank's explanation stands over it too.
    """

    chosen: list[Literal["ground_truth", "sft", "sample"]] = ["ground_truth", "sft", "sample"]
    rejected: list[Literal["sft", "unverified", "trace", "sample"]] = ["trace", "sample"]
    explain: list[bool] = [True, False]
    k: int = Field(default=2, ge=1)
    cap: int | None = Field(default=None, ge=1)
    candidates: Path | None = None


class Limits(BaseModel, extra="forbid"):
    """Hard caps on what the whole job, resumed runs included, may spend; null is no cap.

    What is possibly paid (timed out, cut, out when a run was killed) counts. `max_cost` is in the
    currency of the price table, which then has to hold every model.
    """

    max_calls: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_cost: float | None = Field(default=None, gt=0)


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
    mix: list[Mixed] = []
    split: Shares = Shares()
    decontamination: Decontamination = Decontamination()
    search: Search = Search()
    rewrite: Rewrite = Rewrite()
    pairs: Pairs = Pairs()
    parquet: bool = False
    limits: Limits = Limits()
    prices: Prices = Prices()
    network: NetworkSettings = NetworkSettings()
    shard: str | None = Field(default=None, pattern=r"^[1-9]\d*/[1-9]\d*$")

    @model_validator(mode="after")
    def _verifiers_use_their_settings(self) -> "Config":
        asked = f"search.verifier={self.search.verifier}, rewrite.verifier={self.rewrite.verifier}"
        judges = {"verifier_sees_question": "teacher", "teacher_seconds": "teacher"}
        for name, judge in (judges | {"rule_seconds": "rule"}).items():
            changed = getattr(self.search, name) != Search.model_fields[name].default
            if changed and judge not in asked:
                raise ValueError(f"search.{name} has no effect with {asked}; leave it out")
        return self


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
        if name in model.model_fields:  # else it is a key or a number inside the last field
            model = next(_models_in(model.model_fields[name].annotation))
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
