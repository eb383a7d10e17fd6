"""The architecture's numbers, read from a Hugging Face `config.json` and written to one.

Every field of a file is in one of three places: `Sizes`, which the model reads; `REQUIRED`, where
one value is implemented; `IGNORED`, which cannot change what the model computes. Any other field
is refused, because a model that silently differs from its file costs more than an error.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_args

from flax import struct

from medreason_jax.qwen2.rope import Yarn

Architecture = Literal[
    "Qwen2ForCausalLM", "Qwen2ForSequenceClassification", "Qwen2ForTokenClassification"
]
WeightsDtype = Literal["float32", "bfloat16", "float16"]

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
    names = [name for name in Sizes.__dataclass_fields__ if name not in DERIVED]
    _check_fields(fields, names)
    _check_heads(fields)
    _check_layer_types(fields)
    theta, scaling = _read_rope(fields)
    return Sizes(rope_theta=theta, rope_scaling=scaling, **{name: fields[name] for name in names})


def read_config_file(path: Path) -> Sizes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a model folder holds a config.json")
    return read_sizes(json.loads(path.read_text()))


def read_architecture(fields: dict[str, Any]) -> tuple[Architecture, int | None]:
    """(architecture, number of labels, None of a language model) of a `config.json`."""
    known = get_args(Architecture)
    names = fields["architectures"] if _is_set(fields, "architectures") else [known[0]]
    if len(names) != 1 or names[0] not in known:
        raise ValueError(f"architectures={names} is not implemented; allowed: one of {known}")
    return names[0], None if names[0] == known[0] else _read_labels(fields)


def weights_dtype(fields: dict[str, Any]) -> WeightsDtype:
    """The type that the weights of a `config.json` are stored in; float32 where it names none."""
    names = {name: fields[name] for name in ("dtype", "torch_dtype") if _is_set(fields, name)}
    for name, value in names.items():
        if value not in get_args(WeightsDtype):
            raise ValueError(
                f"{name}={value!r} is not implemented; allowed: {get_args(WeightsDtype)}"
            )
    if len(set(names.values())) > 1:
        raise ValueError(f"config.json contradicts itself: {names}; remove one of the two")
    return next(iter(names.values()), "float32")


def config_fields(
    sizes: Sizes,
    eos_token_id: int,
    pad_token_id: int,
    dtype: str,
    *,
    architecture: Architecture = "Qwen2ForCausalLM",
    labels: int | None = None,
) -> dict[str, Any]:
    """The `config.json` of one of `transformers`' classes for these sizes."""
    assert architecture in get_args(Architecture), architecture
    assert (labels is None) == (architecture == "Qwen2ForCausalLM"), (architecture, labels)
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
    if set(types) != {"full_attention"}:
        raise ValueError(
            f"layer_types holds {sorted(set(types))}; only 'full_attention' is implemented"
        )
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
        return float(fields["rope_theta"]), None
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
    kinds = {rope[name] for name in ("rope_type", "type") if name in rope} or {"default"}
    if not kinds <= {"default", "yarn"} or len(kinds) > 1:
        raise ValueError(
            f"{spelling}: rope_type={' and '.join(map(repr, kinds))} is not implemented; allowed: "
            "'default' or 'yarn'"
        )
    kind = next(iter(kinds))
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
    within = [fields[spelling]["rope_theta"]] if _is_set(fields[spelling], "rope_theta") else []
    outside = [fields["rope_theta"]] if _is_set(fields, "rope_theta") else []
    if not within + outside:
        raise ValueError(f"config.json lacks rope_theta, in {spelling} or beside it")
    if len({*within, *outside}) > 1:
        raise ValueError(
            f"rope_theta={outside[0]} contradicts rope_theta={within[0]} in {spelling}; "
            "remove one of the two"
        )
    return float((within + outside)[0])


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
    original = numbers.setdefault("original_max_position_embeddings", longest)
    if "factor" not in numbers:
        numbers["factor"] = longest / original
    return Yarn(**numbers)


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


def _read_labels(fields: dict[str, Any]) -> int:
    counts = {fields["num_labels"]} if _is_set(fields, "num_labels") else set()
    counts |= {len(fields["id2label"])} if _is_set(fields, "id2label") else set()
    if len(counts) > 1:
        raise ValueError(
            f"num_labels={fields['num_labels']} contradicts id2label, which has "
            f"{len(fields['id2label'])} labels; remove one of the two"
        )
    return next(iter(counts), 2)  # transformers does not write the two labels of its default


def _label_fields(labels: int) -> dict[str, Any]:
    names = [f"LABEL_{label}" for label in range(labels)]
    return {
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
    }
