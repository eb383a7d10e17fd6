"""The architecture's numbers, read from a Hugging Face `config.json`."""

import json
from pathlib import Path
from typing import Any

from flax import struct

# Fields of config.json whose value must be the one that model.py computes.
REQUIRED = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "rope_scaling": None,
}


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
    tie_word_embeddings: bool = struct.field(pytree_node=False)
    initializer_range: float = struct.field(pytree_node=False)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def parameter_count(self) -> int:
        D, F, H = self.hidden_size, self.intermediate_size, self.head_dim
        queries, keys = self.num_attention_heads * H, self.num_key_value_heads * H
        attention = D * (queries + 2 * keys) + queries + 2 * keys + queries * D
        layer = attention + 3 * D * F + 2 * D
        embeddings = self.vocab_size * D * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + D


def read_sizes(fields: dict[str, Any]) -> Sizes:
    """Sizes from the fields of a `config.json`; a setting that is not implemented is refused."""
    rope = fields.get("rope_parameters") or {}  # transformers 5 moved rope_theta in here
    if rope and rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type={rope['rope_type']!r} is not implemented; allowed: 'default'")
    names = [name for name in Sizes.__dataclass_fields__ if name != "rope_theta"]
    missing = [name for name in names if name not in fields]
    if "rope_theta" not in fields and "rope_theta" not in rope:
        missing.append("rope_theta")
    if missing:
        raise ValueError(f"config.json lacks {missing}; it should be a Qwen2.5 model's")
    for name, allowed in REQUIRED.items():
        if name in fields and fields[name] != allowed:
            raise ValueError(f"{name}={fields[name]!r} is not implemented; allowed: {allowed!r}")
    if fields["hidden_size"] % fields["num_attention_heads"]:
        raise ValueError(
            f"hidden_size={fields['hidden_size']} is not a multiple of "
            f"num_attention_heads={fields['num_attention_heads']}"
        )
    if fields["num_attention_heads"] % fields["num_key_value_heads"]:
        raise ValueError(
            f"num_attention_heads={fields['num_attention_heads']} is not a multiple of "
            f"num_key_value_heads={fields['num_key_value_heads']}"
        )
    theta = fields["rope_theta"] if "rope_theta" in fields else rope["rope_theta"]
    return Sizes(rope_theta=float(theta), **{name: fields[name] for name in names})


def read_config_file(path: Path) -> Sizes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a model folder holds a config.json")
    return read_sizes(json.loads(path.read_text()))


def config_fields(sizes: Sizes, eos_token_id: int, pad_token_id: int, dtype: str) -> dict[str, Any]:
    """The `config.json` of `transformers`' Qwen2ForCausalLM for these sizes."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        **REQUIRED,
        **{name: getattr(sizes, name) for name in Sizes.__dataclass_fields__},
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }
