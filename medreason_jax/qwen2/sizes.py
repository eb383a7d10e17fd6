"""The architecture's numbers, read from a Hugging Face `config.json` and written to one.

Every field of a file is in one of three places: `Sizes`, which the model reads; `REQUIRED`, where
one value is implemented; `IGNORED`, which cannot change what the model computes. Any other field
is refused, because a model that silently differs from its file costs more than an error.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal, get_args

from flax import struct

from medreason_jax.manifest import read_json_object
from medreason_jax.qwen2.rope import Yarn

Architecture = Literal[
    "Qwen2ForCausalLM", "Qwen2ForSequenceClassification", "Qwen2ForTokenClassification"
]
WeightsDtype = Literal["float32", "bfloat16", "float16"]
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

# What a config.json means that names none.
LANGUAGE_MODEL: Architecture = "Qwen2ForCausalLM"
DEFAULT_DTYPE: WeightsDtype = "float32"
DEFAULT_LABELS = 2

# Fields whose value must be the one that model.py computes; absent ones have it already.
REQUIRED = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "attention_bias": True,  # on queries, keys and values; Qwen2 has it without a field
    "qkv_bias": True,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "per_layer_config": None,
    "use_mrope": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}
# What `transformers` 4 and 5 write beside the architecture.
IGNORED = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "tokenizer_class"),
    *("name_or_path", "attn_implementation", "experts_implementation", "use_cache"),
    *("sliding_window", "max_window_layers"),  # read only with use_sliding_window
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
    *("output_attentions", "output_hidden_states", "output_scores", "return_dict"),
    *("return_dict_in_generate", "tie_last_hidden_states", "chunk_size_feed_forward"),
    *("is_decoder", "cross_attention_hidden_size", "tie_encoder_decoder"),
    *("prefix", "task_specific_params", "torchscript", "use_bfloat16", "tf_legacy_loss"),
    # of generation, which transformers 4 wrote here too
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
    *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
    *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id"),
    *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    *("begin_suppress_tokens",),
}
# `transformers` 4 keeps theta outside and calls the rest rope_scaling; 5 has one dictionary.
ROPE_SPELLINGS = ("rope_scaling", "rope_parameters")
DERIVED = {"rope_theta", *ROPE_SPELLINGS, "head_dim", "layer_types"}


@dataclasses.dataclass(frozen=True)
class Labels:
    """A classifier's outputs by name, and the loss that `transformers` trains them with."""

    names: tuple[str, ...]
    problem_type: ProblemType | None = None


@struct.dataclass
class Sizes:
    """Static shape of one Qwen2.5 model; hashable, so that it can be an argument of jit."""

    vocab_size: int = struct.field(pytree_node=False)
    hidden_size: int = struct.field(pytree_node=False)
    intermediate_size: int = struct.field(pytree_node=False)
    num_hidden_layers: int = struct.field(pytree_node=False)
    num_attention_heads: int = struct.field(pytree_node=False)
    num_key_value_heads: int = struct.field(pytree_node=False)
    max_position_embeddings: int = struct.field(pytree_node=False)
    rms_norm_eps: float = struct.field(pytree_node=False)
    rope_theta: float = struct.field(pytree_node=False)
    rope_scaling: Yarn | None = struct.field(pytree_node=False)
    tie_word_embeddings: bool = struct.field(pytree_node=False)
    initializer_range: float = struct.field(pytree_node=False)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def max_length(self) -> int:
        """Tokens of the longest row that the rotary embedding is meant for."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        yarn = self.rope_scaling
        stretched = int(yarn.factor * yarn.original_max_position_embeddings)
        return max(self.max_position_embeddings, stretched)

    @property
    def parameter_count(self) -> int:
        """Parameters of the language model; a classifier's head is not counted."""
        D, F, H = self.hidden_size, self.intermediate_size, self.head_dim
        queries, keys = self.num_attention_heads * H, self.num_key_value_heads * H
        attention = D * (queries + 2 * keys) + queries + 2 * keys + queries * D
        layer = attention + 3 * D * F + 2 * D
        embeddings = self.vocab_size * D * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + D


def read_sizes(fields: dict[str, Any]) -> Sizes:
    """Sizes from the fields of a `config.json`; a setting that is not implemented is refused."""
    kinds = {f.name: f.type for f in dataclasses.fields(Sizes) if f.name not in DERIVED}
    _check_fields(fields, list(kinds))
    values = {name: _read_value(name, fields[name], kind) for name, kind in kinds.items()}
    _check_heads(fields)
    _check_layer_types(fields)
    theta, scaling = _read_rope(fields)
    return Sizes(rope_theta=theta, rope_scaling=scaling, **values)


def read_config_file(path: Path) -> Sizes:
    return read_sizes(read_json_object(path, "a model's configuration"))


def read_architecture(fields: dict[str, Any]) -> tuple[Architecture, Labels | None]:
    """(architecture, labels, None of a language model) of a `config.json`."""
    known = get_args(Architecture)
    names = fields["architectures"] if _is_set(fields, "architectures") else [LANGUAGE_MODEL]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in known:
        raise ValueError(
            f"architectures={names!r} is not implemented; allowed: a list of one of {known}"
        )
    return names[0], None if names[0] == LANGUAGE_MODEL else _read_labels(fields)


def weights_dtype(fields: dict[str, Any]) -> WeightsDtype:
    """The type that the weights of a `config.json` are stored in."""
    names = {name: fields[name] for name in ("dtype", "torch_dtype") if _is_set(fields, name)}
    for name, value in names.items():
        if value not in get_args(WeightsDtype):
            raise ValueError(
                f"{name}={value!r} is not implemented; allowed: {get_args(WeightsDtype)}"
            )
    if len(set(names.values())) > 1:
        raise ValueError(f"config.json contradicts itself: {names}; remove one of the two")
    return next(iter(names.values()), DEFAULT_DTYPE)


def config_fields(
    sizes: Sizes,
    eos_token_id: int,
    pad_token_id: int,
    dtype: str,
    *,
    architecture: Architecture = LANGUAGE_MODEL,
    labels: Labels | None = None,
) -> dict[str, Any]:
    """The `config.json` of one of `transformers`' classes for these sizes."""
    assert architecture in get_args(Architecture), architecture
    assert (labels is None) == (architecture == LANGUAGE_MODEL), (architecture, labels)
    return {
        "architectures": [architecture],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        **{name: getattr(sizes, name) for name in Sizes.__dataclass_fields__},
        "rope_scaling": _rope_scaling_field(sizes.rope_scaling),
        **({} if labels is None else _label_fields(labels)),
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        # transformers below 4.56 reads this name alone, later ones and vLLM read it too; a second
        # name could only contradict it. The same holds of rope_theta with rope_scaling.
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _is_set(fields: dict[str, Any], name: str) -> bool:
    """A null or empty field is an absent one, as `transformers` has it."""
    return name in fields and fields[name] not in (None, {}, [])


def _check_fields(fields: dict[str, Any], needed: list[str]) -> None:
    missing = [name for name in needed if name not in fields or fields[name] is None]
    if not any(_is_set(fields, name) for name in ("rope_theta", *ROPE_SPELLINGS)):
        missing.append("rope_theta")
    if missing:
        raise ValueError(f"config.json lacks {missing}; it should be a Qwen2.5 model's")
    for name, allowed in REQUIRED.items():
        if name in fields and fields[name] != allowed:
            raise ValueError(f"{name}={fields[name]!r} is not implemented; allowed: {allowed!r}")
    known = {*needed, *DERIVED, *REQUIRED, *IGNORED}
    unknown = [name for name in fields if name not in known and not name.startswith("_")]
    if unknown:
        shown = ", ".join(f"{name}={fields[name]!r}" for name in unknown[:3])
        raise ValueError(
            f"config.json sets {len(unknown)} fields that are not implemented: {shown}; remove "
            "a field from config.json if it does not change the computation"
        )


def _read_value(name: str, value: Any, kind: type, above: float = 0) -> Any:
    """A number above a limit or a truth value, of exactly its kind: JSON's true is not 1 and "1e6"
    is not a number. A float may be written without a point."""
    if kind is bool:
        allowed, fits = "true or false", type(value) is bool
    elif kind is int:
        allowed, fits = f"a whole number above {above}", type(value) is int and value > above
    else:
        assert kind is float, kind
        allowed = f"a finite number above {above}"
        fits = type(value) in (int, float) and above < value <= sys.float_info.max
    if not fits:
        raise ValueError(
            f"{name}={value!r:.80} in config.json; allowed: {allowed}; correct it there"
        )
    return kind(value)


def _check_heads(fields: dict[str, Any]) -> None:
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    if width % heads:
        raise ValueError(f"hidden_size={width} is not a multiple of num_attention_heads={heads}")
    if heads % fields["num_key_value_heads"]:
        raise ValueError(
            f"num_attention_heads={heads} is not a multiple of "
            f"num_key_value_heads={fields['num_key_value_heads']}"
        )
    if (width // heads) % 2:
        raise ValueError(
            f"hidden_size={width} / num_attention_heads={heads} is odd; the rotary embedding "
            "turns pairs"
        )
    if "head_dim" in fields and fields["head_dim"] != width // heads:
        raise ValueError(
            f"head_dim={fields['head_dim']!r} is not implemented; allowed: hidden_size / "
            f"num_attention_heads = {width // heads}"
        )


def _check_layer_types(fields: dict[str, Any]) -> None:
    if not _is_set(fields, "layer_types"):
        return
    types, layers = fields["layer_types"], fields["num_hidden_layers"]
    if not isinstance(types, list):
        raise ValueError(f"layer_types={types!r:.80}; allowed: a list with one entry a layer")
    others = [kind for kind in types if kind != "full_attention"]
    if others:
        raise ValueError(f"layer_types holds {others[0]!r}; only 'full_attention' is implemented")
    if len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries for num_hidden_layers={layers}")


def _read_rope(fields: dict[str, Any]) -> tuple[float, Yarn | None]:
    """(theta, scaling) from whichever spelling the file has; two spellings must agree."""
    read = {
        name: _read_rope_dictionary(name, fields)
        for name in ROPE_SPELLINGS
        if _is_set(fields, name)
    }
    if not read:
        return _theta("rope_theta", fields["rope_theta"]), None
    if len(set(read.values())) > 1:
        raise ValueError(
            f"rope_scaling={fields['rope_scaling']} and rope_parameters="
            f"{fields['rope_parameters']} contradict each other; remove one of the two"
        )
    return next(iter(read.values()))


def _read_rope_dictionary(spelling: str, fields: dict[str, Any]) -> tuple[float, Yarn | None]:
    rope = fields[spelling]
    if not isinstance(rope, dict):
        raise ValueError(f"{spelling}={rope!r} should be a dictionary")
    kinds = [rope[name] for name in ("rope_type", "type") if name in rope] or ["default"]
    kind = kinds[0]
    if kind not in ("default", "yarn") or kinds != [kind] * len(kinds):
        raise ValueError(
            f"{spelling}: rope_type={' and '.join(map(repr, kinds))} is not implemented; allowed: "
            "'default' or 'yarn'"
        )
    of_kind = {field.name for field in dataclasses.fields(Yarn)} if kind == "yarn" else set()
    unknown = [name for name in rope if name not in {"rope_type", "type", "rope_theta", *of_kind}]
    if unknown:
        raise ValueError(
            f"{spelling} of type {kind!r} holds {unknown[0]}={rope[unknown[0]]!r}, which is not "
            f"implemented; allowed: {sorted({'rope_theta', *of_kind})}"
        )
    theta = _read_theta(spelling, fields)
    return theta, _read_yarn(spelling, fields) if kind == "yarn" else None


def _read_theta(spelling: str, fields: dict[str, Any]) -> float:
    places = {f"{spelling}.rope_theta": fields[spelling], "rope_theta": fields}
    thetas = {
        place: _theta(place, holder["rope_theta"])
        for place, holder in places.items()
        if _is_set(holder, "rope_theta")
    }
    if not thetas:
        raise ValueError(f"config.json lacks rope_theta, in {spelling} or beside it")
    if len(set(thetas.values())) > 1:
        said = " contradicts ".join(f"{place}={theta}" for place, theta in thetas.items())
        raise ValueError(f"{said}; remove one of the two")
    return next(iter(thetas.values()))


def _theta(name: str, value: Any) -> float:
    """Above 1: at 1 every pair turns alike, and YaRN divides by its logarithm."""
    return _read_value(name, value, float, above=1)


def _read_yarn(spelling: str, fields: dict[str, Any]) -> Yarn:
    """A missing original length is max_position_embeddings and a null factor is the ratio of the
    two, as in `transformers`."""
    rope = fields[spelling]
    if "factor" not in rope:
        raise ValueError(f"{spelling} of type 'yarn' lacks factor")
    # null stands for the default, but a null truncate is false in transformers: Yarn refuses it
    numbers = {
        field.name: rope[field.name]
        for field in dataclasses.fields(Yarn)
        if field.name in rope and (rope[field.name] is not None or field.name == "truncate")
    }
    longest = fields["max_position_embeddings"]
    yarn = Yarn(**{"factor": 1.0, "original_max_position_embeddings": longest, **numbers})
    if "factor" in numbers:
        return yarn
    return dataclasses.replace(yarn, factor=longest / yarn.original_max_position_embeddings)


def _rope_scaling_field(scaling: Yarn | None) -> dict[str, Any] | None:
    """What differs from YaRN's defaults: some readers warn about names that they do not know."""
    if scaling is None:
        return None
    numbers = {
        field.name: getattr(scaling, field.name)
        for field in dataclasses.fields(Yarn)
        if getattr(scaling, field.name) != field.default
    }
    return {"rope_type": "yarn", **numbers}


def _read_labels(fields: dict[str, Any]) -> Labels:
    """`transformers` does not write the two labels of its default."""
    names, count = _label_names(fields), None
    if _is_set(fields, "num_labels"):
        count = _read_value("num_labels", fields["num_labels"], int)
    if names is None:
        count = DEFAULT_LABELS if count is None else count
        names = tuple(f"LABEL_{label}" for label in range(count))
    elif count not in (None, len(names)):
        raise ValueError(
            f"num_labels={count} contradicts id2label, which has {len(names)} labels; remove one "
            "of the two"
        )
    labels = Labels(names, fields["problem_type"] if _is_set(fields, "problem_type") else None)
    if labels.problem_type not in (None, *get_args(ProblemType)):
        raise ValueError(
            f"problem_type={labels.problem_type!r}; allowed: null or one of {get_args(ProblemType)}"
        )
    written = _label_fields(labels)["label2id"]
    if _is_set(fields, "label2id") and fields["label2id"] != written:
        raise ValueError(
            f"label2id={fields['label2id']!r:.80} contradicts the labels {list(names)[:3]}... of "
            "id2label or num_labels; remove label2id"
        )
    return labels


def _label_names(fields: dict[str, Any]) -> tuple[str, ...] | None:
    if not _is_set(fields, "id2label"):
        return None
    names = fields["id2label"]
    ids = [str(label) for label in range(len(names))] if isinstance(names, dict) else []
    if not ids or {*ids} != {*names} or not all(isinstance(names[id], str) for id in ids):
        raise ValueError(
            f'id2label={names!r:.80}; allowed: a name for each of the labels "0", "1" and so on'
        )
    return tuple(names[id] for id in ids)


def _label_fields(labels: Labels) -> dict[str, Any]:
    return {
        "id2label": {str(label): name for label, name in enumerate(labels.names)},
        "label2id": {name: label for label, name in enumerate(labels.names)},
        "problem_type": labels.problem_type,
    }
