"""LoRA adapters in `peft`'s files: read into stacked parameters, written one tensor a layer.

L layers, r rank.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medreason_jax.manifest import read_json_object, write_json
from medreason_jax.qwen2.folder import ModelFolder
from medreason_jax.qwen2.huggingface import tensor_name
from medreason_jax.qwen2.lora import PROJECTIONS, Lora, Target
from medreason_jax.qwen2.model import Params
from medreason_jax.qwen2.sizes import Sizes
from medreason_jax.qwen2.tensor_files import DTYPES, Tensor, TensorFiles, write_tensor_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULES = {name: "self_attn" for name in PROJECTIONS[:4]} | {
    name: "mlp" for name in PROJECTIONS[4:]
}

# Fields whose value must be one of these; absent ones are the first.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base
}
# Fields that are read, or that cannot change what a trained adapter computes.
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules"}
NEUTRAL = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "exclude_modules", "lora_dropout", "layers_pattern", "megatron_core"),
    *("qalora_group_size", "runtime_config", "eva_config", "corda_config", "loftq_config"),
}


def is_peft_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_peft(folder: Path, sizes: Sizes) -> tuple[Lora, Params]:
    """The adapter of a `peft` folder as (which projections, stacked float32 parameters).

    Rank and scaling must be the same in all layers; whatever else differs from plain LoRA on the
    linear layers is refused by name.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS} (pickled .bin files are refused)")
    config = read_json_object(folder / CONFIG, "a peft adapter's settings")
    _check_config(config, folder / CONFIG)
    files = TensorFiles(path)
    projections = _adapted(files)
    _check_layers(files, projections, sizes)
    targets = tuple(_target(config, files, name, sizes) for name in projections)
    tree: Params = {"layers": {}}
    for projection in projections:
        module = tree["layers"].setdefault(MODULES[projection], {})
        module[projection] = {
            part: np.stack([_read(files, projection, layer, part) for layer in _layers(sizes)])
            for part in ("lora_A", "lora_B")
        }
    _check_shapes(tree, sizes, path)
    return Lora(targets), tree


def write_peft(folder: Path, adapter: ModelFolder, base_name: str) -> None:
    """`peft`'s two files, float32, from an adapter folder of ours."""
    lora, sizes = adapter.lora, adapter.description.sizes
    assert lora is not None
    first = lora.targets[0]
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "r": first.rank,
            "lora_alpha": first.alpha,
            "rank_pattern": {t.projection: t.rank for t in lora.targets if t.rank != first.rank},
            "alpha_pattern": {
                t.projection: t.alpha for t in lora.targets if t.alpha != first.alpha
            },
            "target_modules": [t.projection for t in lora.targets],
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        },
    )
    tensors = [
        _planned(adapter, target, layer, part)
        for layer in _layers(sizes)
        for target in lora.targets
        for part in ("lora_A", "lora_B")
    ]
    write_tensor_file(folder / WEIGHTS, tensors)


def peft_name(projection: str, layer: int, part: str) -> str:
    module = tensor_name(f"layers.{MODULES[projection]}.{projection}", layer)
    return f"base_model.model.{module}.{part}.weight"


def _planned(adapter: ModelFolder, target: Target, layer: int, part: str) -> Tensor:
    path = f"layers.{MODULES[target.projection]}.{target.projection}.{part}"
    _, rows, columns = adapter.adapter_shape(path)
    return Tensor(
        peft_name(target.projection, layer, part),
        DTYPES["F32"],
        (columns, rows),
        lambda: adapter.read_adapter(path, layer).T,
    )


def _layers(sizes: Sizes) -> range:
    return range(sizes.num_hidden_layers)


def _check_config(config: dict[str, Any], path: Path) -> None:
    alpha = config["lora_alpha"] if "lora_alpha" in config else None
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or alpha <= 0:
        raise ValueError(f"{path}: lora_alpha={alpha!r}; give a number above 0")
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in _pattern(config, name):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{path}: {name} {pattern!r} is no pattern: {error}") from None
    for name, allowed in ALLOWED.items():
        if name in config and config[name] not in allowed:
            raise ValueError(f"{path}: {name}={config[name]!r} is not supported; {allowed=}")
    for name, value in config.items():
        if name not in {*ALLOWED, *READ, *NEUTRAL} and value:
            raise ValueError(
                f"{path}: {name}={value!r} is not supported; only plain LoRA on "
                f"{list(PROJECTIONS)} is"
            )
    named = config["target_modules"] if "target_modules" in config else []
    for pattern in named if isinstance(named, list) else []:
        if pattern.rpartition(".")[2] in PROJECTIONS and re.search(r"layers\.\d", pattern):
            raise ValueError(
                f"{path}: target_modules names single layers ({pattern!r}); adapters are stacked "
                "over all layers here"
            )


def _adapted(files: TensorFiles) -> list[str]:
    """The projections that the file holds, in the model's order; nothing else may be in it."""
    known = re.compile(
        r"base_model\.model\.model\.layers\.\d+\.(self_attn|mlp)\.(\w+)\.lora_[AB]\.weight"
    )
    matches = {name: known.fullmatch(name) for name in files.where}
    strange = sorted(
        name for name, m in matches.items() if m is None or m.group(2) not in PROJECTIONS
    )
    if strange or not matches:
        raise ValueError(
            f"{files.path} holds {len(strange)} tensors that are no LoRA of a linear layer: "
            f"{strange[:3]}"
        )
    found = {m.group(2) for m in matches.values() if m is not None}
    return [name for name in PROJECTIONS if name in found]


def _check_layers(files: TensorFiles, projections: list[str], sizes: Sizes) -> None:
    expected = {
        peft_name(projection, layer, part)
        for projection in projections
        for layer in _layers(sizes)
        for part in ("lora_A", "lora_B")
    }
    extra, missing = sorted(set(files.where) - expected), sorted(expected - set(files.where))
    if extra or missing:
        raise ValueError(
            f"{files.path} does not fit a model of {sizes.num_hidden_layers} layers: "
            f"{len(missing)} tensors are missing {missing[:3]}, {len(extra)} too many {extra[:3]}"
        )


def _target(config: dict[str, Any], files: TensorFiles, projection: str, sizes: Sizes) -> Target:
    """Rank from the tensors, alpha by `peft`'s patterns; both must be the same in all layers."""
    names = [peft_name(projection, layer, "lora_A") for layer in _layers(sizes)]
    ranks = {files.shape(name)[0] for name in names}
    patterns = _pattern(config, "alpha_pattern")
    modules = [
        f"model.layers.{layer}.{MODULES[projection]}.{projection}" for layer in _layers(sizes)
    ]
    alphas = {_by_pattern(patterns, module, config["lora_alpha"]) for module in modules}
    if len(ranks) > 1 or len(alphas) > 1:
        keys = [*_pattern(config, "rank_pattern"), *_pattern(config, "alpha_pattern")]
        named = [key for key in keys if re.search(r"\d", key)]
        raise ValueError(
            f"{files.path.parent / CONFIG}: rank_pattern or alpha_pattern names single layers of "
            f"{projection} ({named[:3]}); ranks {sorted(ranks)} and alphas {sorted(alphas)} must "
            "be one for all layers"
        )
    rank, alpha = ranks.pop(), float(alphas.pop())
    stabilised = "use_rslora" in config and config["use_rslora"]  # scale alpha / sqrt(r)
    return Target(projection, rank, alpha * math.sqrt(rank) if stabilised else alpha)


def _pattern(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A `peft` pattern; an absent or null one is empty."""
    return {} if name not in config or config[name] is None else config[name]


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """The first pattern that ends the module's name, as `peft` matches them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _read(files: TensorFiles, projection: str, layer: int, part: str) -> np.ndarray:
    return files.read(peft_name(projection, layer, part)).astype(np.float32).T


def _check_shapes(tree: Params, sizes: Sizes, path: Path) -> None:
    D, F, H = sizes.hidden_size, sizes.intermediate_size, sizes.head_dim
    queries, keys = sizes.num_attention_heads * H, sizes.num_key_value_heads * H
    widths: dict[str, Sequence[int]] = {
        "q_proj": (D, queries),
        "k_proj": (D, keys),
        "v_proj": (D, keys),
        "o_proj": (queries, D),
        "gate_proj": (D, F),
        "up_proj": (D, F),
        "down_proj": (F, D),
    }
    for module in tree["layers"].values():
        for projection, parts in module.items():
            found = (parts["lora_A"].shape[1], parts["lora_B"].shape[2])
            if found != tuple(widths[projection]):
                raise ValueError(
                    f"{path}: {projection} goes from {found[0]} to {found[1]}, the base model's "
                    f"from {widths[projection][0]} to {widths[projection][1]}"
                )
