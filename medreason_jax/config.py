"""Strict models of every stage (those of a recipe: recipe.py); YAML with dotted overrides."""

import difflib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
M = TypeVar("M", bound=BaseModel)
Positive = Annotated[int, Field(ge=1)]


def _layers(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError("a number of layers, at least 1, or 'auto'")


Unroll = Annotated[Literal["auto"] | int, BeforeValidator(_layers)]
MomentType = Literal["float32", "bfloat16"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MeshConfig(Strict):
    data: int = -1
    fsdp: Positive = 1
    tensor: Positive = 1


class RateRule(Strict):
    """Parameters whose path holds `pattern` learn at `scale` x the rate; 0 freezes them.

    `layers` [first, end) limits the rule to some of the stacked layers.
    """

    pattern: str
    scale: Annotated[float, Field(ge=0)]
    layers: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _usable(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"pattern={self.pattern!r} is no regular expression: {error}"
            ) from None
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            raise ValueError(f"layers={list(self.layers)}: give [first, end) with first < end")
        return self


Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraOverride(Strict):
    rank: Positive | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None


class LoraConfig(Strict):
    """Adapters on `targets`, trained over the frozen model; `overrides` for single ones."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    targets: Annotated[list[Projection], Field(min_length=1)] = list(get_args(Projection))
    overrides: dict[Projection, LoraOverride] = {}

    @model_validator(mode="after")
    def _known_overrides(self):
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets={self.targets} names one twice")
        extra = sorted(set(self.overrides) - set(self.targets))
        if extra:
            raise ValueError(f"overrides of {extra[0]!r}, which is none of targets={self.targets}")
        return self


class OptimizerConfig(Strict):
    """AdamW; of `rates` the first rule that fits a parameter decides, 1 where none does."""

    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    warmup_ratio: Share = 0.05
    final_ratio: Share = 0.0
    b1: Share = 0.9
    b2: Share = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    mu_dtype: MomentType = "float32"
    nu_dtype: MomentType = "float32"
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    rates: list[RateRule] = []

    @model_validator(mode="after")
    def _second_moment_moves(self):
        if self.nu_dtype == "bfloat16" and self.b2 > 0.99:
            raise ValueError(
                f"nu_dtype=bfloat16 holds 8 bits, too few for b2={self.b2}: its steps would be "
                "lost; set b2 to at most 0.99, or nu_dtype=float32"
            )
        return self


class SourceConfig(Strict):
    """Records of a file or folder; `weight` is its share of the rows when there are several."""

    path: Path
    kind: Literal["text", "sft", "preference"]
    weight: Annotated[float, Field(gt=0)] = 1.0
    hub: bool = False  # `path` is a name for `datasets.load_dataset`
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    columns: dict[str, str] = {}  # {our field: the data set's}
    reset: bool = True  # attention and positions restart at each document

    @model_validator(mode="after")
    def _takes_effect(self):
        if not self.hub and (self.subset is not None or self.revision is not None):
            raise ValueError(
                f"subset={self.subset}, revision={self.revision} go with hub: true, of a name"
            )
        if not self.reset and self.kind != "text":
            raise ValueError(f"reset: false is for kind text; this is kind {self.kind}")
        return self


class ProfileConfig(Strict):
    """A profiler trace of some steps."""

    first_step: Positive = 10
    steps: Positive = 3


class DevConfig(Strict):
    """Problems whose explained answers are judged every so many steps: the first of a part."""

    problems: Path
    part: str | None = None
    every: Positive = 100
    count: Positive = 64
    max_new_tokens: Positive = 1024


class RunConfig(Strict):
    """What all training stages share."""

    folder: Path
    model: Path
    seed: Seed = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: MeshConfig = MeshConfig()
    attention: Literal["auto", "xla", "splash", "mosaic", "triton"] = "auto"
    deterministic: bool = False  # on GPUs: steps with the same bits in every run, slower
    remat: Literal["none", "products", "context+qkv", "context", "full"] = "products"
    unroll: Unroll = "auto"  # layers that an iteration of the scan holds
    head_chunk: Positive = 2048
    length: Positive
    accumulation: Positive = 1
    checkpoint_every: Positive = 100
    keep_last: Positive = 2
    keep_every: Positive | None = None  # of the saved steps, those that it divides
    keep_states: bool = False  # of a finished stage, its last one too: to compare or to go on from
    accept_changes: list[str] = []  # fields that may differ from the run's so far; "data" too
    profile: ProfileConfig | None = None
    dev: DevConfig | None = None
    optimizer: OptimizerConfig
    lora: LoraConfig | None = None


class PreferenceConfig(Strict):
    """RPO: DPO with `beta` plus `alpha` x the chosen answer's NLL; alpha 0 is DPO."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    alpha: Annotated[float, Field(ge=0)] = 1.0
    pairs_per_row: Positive = 4


class HeldOutConfig(Strict):
    """Records whose loss is measured every so many steps, and of every state that is saved.

    The best state by it is kept; `finish_with: best` makes it the stage's model.
    """

    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    every: Positive = 100
    finish_with: Literal["last", "best"] = "last"

    @model_validator(mode="after")
    def _names(self):
        names = [source.path.stem for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"held_out.sources: two have the same name, of {names}")
        if any(source.weight != 1.0 or source.kind == "preference" for source in self.sources):
            raise ValueError("held_out.sources: kind text or sft, and no weight: all are measured")
        return self


class SamplesConfig(Strict):
    """Greedy answers to the first prompts of a file (lines as `medreason generate` takes them)."""

    prompts: Path
    every: Positive = 100
    count: Positive = 4
    max_new_tokens: Positive = 256


class TrainConfig(RunConfig):
    """CPT, SFT and preference optimisation: one objective over packed rows."""

    kind: Literal["cpt", "sft", "prefer"]
    batch_rows: Positive
    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    preference: PreferenceConfig | None = None  # of kind prefer, and only of it
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    held_out: HeldOutConfig | None = None
    samples: SamplesConfig | None = None

    @model_validator(mode="after")
    def _fitting_options(self):
        if (self.preference is not None) != (self.kind == "prefer"):
            raise ValueError(f"preference goes with kind prefer; this is kind {self.kind}")
        if self.z_loss > 0 and self.kind == "prefer":
            raise ValueError(f"z_loss={self.z_loss} is for cpt and sft; this is kind {self.kind}")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"give steps or epochs, not both: steps={self.steps}, epochs={self.epochs}"
            )
        return self


class PPOConfig(RunConfig):
    """PPO over problems with checkable answers (recipe: HuatuoGPT-o1 stage 2)."""

    kind: Literal["ppo"]
    problems: Path
    iterations: Positive
    rollouts: Positive = 128
    minibatches: Positive = 1
    ppo_epochs: Positive = 3
    max_new_tokens: Positive = 1300
    temperature: Annotated[float, Field(gt=0)] = 0.5
    kl_coef: Annotated[float, Field(ge=0)] = 0.03
    gamma: Share = 1.0
    gae_lambda: Share = 0.95
    clip: Annotated[float, Field(gt=0)] = 0.2
    value_clip: Annotated[float, Field(gt=0)] = 0.2
    value_coef: Annotated[float, Field(ge=0)] = 1.0
    critic_rate: Annotated[float, Field(gt=0)] | None = None
    critic_warmup: Annotated[int, Field(ge=0)] = 0  # iterations that train the critic alone
    reward_true: float = 1.0
    reward_false: float = 0.1
    reward_unformatted: float = 0.0

    @model_validator(mode="after")
    def _whole_minibatches(self):
        if self.length <= self.max_new_tokens:
            raise ValueError(
                f"length={self.length} leaves no room for a prompt beside "
                f"max_new_tokens={self.max_new_tokens}; raise length"
            )
        if self.critic_warmup >= self.iterations:
            raise ValueError(
                f"critic_warmup={self.critic_warmup} leaves none of iterations={self.iterations} "
                "to train the policy; lower critic_warmup"
            )
        if self.rollouts % self.minibatches:
            raise ValueError(
                f"rollouts={self.rollouts} is not a multiple of minibatches={self.minibatches}"
            )
        return self


class EvaluateConfig(Strict):
    """Accuracy on problems: answer only, with explanation, and with an explanation sampled."""

    model: Path
    problems: Path
    folder: Path
    dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: MeshConfig = MeshConfig()
    slots: Positive = 256
    max_new_tokens: Positive = 1024
    answer_only_tokens: Positive = 64
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    seed: Seed = 0
    forms: list[Literal["answer_only", "explain", "sampled"]] = ["answer_only", "explain"]


def load_yaml(path: Path, overrides: list[str]) -> dict[str, Any]:
    """A YAML mapping with `a.b=value` overrides laid over it; items of a list go by their name.

    A file may be another one (`base`, a path beside it) with `changes` ({a.b: value}).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of a YAML file")
    try:
        values = yaml.safe_load(expand_variables(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping of fields")
    if "base" in values:
        changes = values.get("changes") or {}
        if not isinstance(values["base"], str) or not isinstance(changes, dict):
            raise ValueError(f"{path}: base is a path and changes a mapping of a.b: value")
        others = sorted(set(values) - {"base", "changes"})
        if others:
            raise ValueError(f"{path}: beside base stand only changes, found {others}")
        values = load_yaml(path.parent / values["base"], [])
        for name, value in changes.items():
            _set(values, name, value)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--set {override!r} has no '='; write --set a.b=value")
        try:
            _set(values, name, yaml.safe_load(text))
        except yaml.YAMLError:
            raise ValueError(f"--set {name}: {text!r} is not a YAML value") from None
    return values


def expand_variables(text: str) -> str:
    """`${MEDREASON_DATA}` in a config is the folder of real data (default ../shared/data)."""
    return text.replace("${MEDREASON_DATA}", os.environ.get("MEDREASON_DATA", "../shared/data"))


def _set(values: Any, name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for part in parents:
        if isinstance(values, list):
            values = _item(values, part, name)
        else:
            values = values.setdefault(part, {})
        if not isinstance(values, dict | list):
            raise ValueError(f"--set {name}: {part!r} is a value, not a group of fields")
    if isinstance(values, list):
        raise ValueError(f"--set {name}: name a field of an item, such as {name}.FIELD")
    values[last] = value


def _item(values: list, part: str, name: str) -> Any:
    for item in values:
        if isinstance(item, dict) and item.get("name") == part:
            return item
    names = [item["name"] for item in values if isinstance(item, dict) and "name" in item]
    raise ValueError(f"--set {name}: no item named {part!r}; found {names}")


def validate(model: type[M], values: dict[str, Any], where: str) -> M:
    """The config, or a ValueError of one line: field, value, what was allowed, nearest name."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ValueError(f"{where}: {_unknown(model, first['loc'])}") from None
        given = "" if first["type"] == "missing" else f" (given: {first['input']!r})"
        given = given if len(given) < 120 else ""
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {name + ': ' if name else ''}{message}{given}") from None


def _unknown(model: type[BaseModel], location: tuple) -> str:
    """`unknown field 'lenght'; did you mean 'length'?`"""
    fields: list[str] = list(model.model_fields)
    for part in location[:-1]:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        inner = _model_in(annotation)
        if inner is not None:
            model, fields = inner, list(inner.model_fields)
    near = difflib.get_close_matches(str(location[-1]), fields, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"allowed: {sorted(fields)}"
    return f"unknown field {'.'.join(str(part) for part in location)!r}; {hint}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found is not None:
            return found
    return None


def save_yaml(config: BaseModel, path: Path) -> None:
    """The resolved config, as YAML that loads back to the same config; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    values = json.loads(config.model_dump_json())
    partial.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), "utf-8")
    os.replace(partial, path)


# Where and how fast a run goes may change between its attempts; what it computes may not.
FREE = {
    *("folder", "mesh", "attention", "deterministic", "remat", "unroll", "head_chunk"),
    *(
        "checkpoint_every",
        "keep_last",
        "keep_every",
        "keep_states",
        "accept_changes",
        "profile",
        "samples",
        "dev",
        "slots",
    ),
}


def without_weights(value: Any) -> Any:
    if isinstance(value, list):
        return [without_weights(item) for item in value]
    if isinstance(value, dict):
        return {name: item for name, item in value.items() if name != "weight"}
    return value


def check_unchanged(config: BaseModel, path: Path, accepted: list[str]) -> None:
    """Refuse to go on in a folder that another config (`path`) began, but for `accepted` fields.

    The weights of a mixture's sources may change: the data schedule keeps both.
    """
    if not path.is_file():
        return
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    now = json.loads(config.model_dump_json())
    unknown = sorted(set(accepted) - set(now) - {"data"})
    if unknown:
        raise ValueError(f"accept_changes names {unknown[0]!r}; allowed: data, {sorted(now)}")
    free = FREE | set(accepted)
    changed = sorted(
        name
        for name in now
        if name not in free and without_weights(before.get(name)) != without_weights(now[name])
    )
    if changed:
        raise ValueError(
            f"{path.parent} was begun with {changed[0]}={before.get(changed[0])!r}, now "
            f"{now[changed[0]]!r}; choose another folder or name, remove this one, or "
            f"accept_changes: [{changed[0]}]"
        )
