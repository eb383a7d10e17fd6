"""A Hugging Face folder to a parameter tree and back."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from medreason_jax.data.chat import TOKENIZER_FILES, ChatTokenizer
from medreason_jax.mesh import path_name
from medreason_jax.qwen2.model import Params
from medreason_jax.qwen2.sizes import Sizes, config_fields


def tensor_name(path: str, layer: int | None) -> str:
    """`transformers`' name of one of our parameters, of one layer where they are stacked."""
    name = path.replace(".kernel", ".weight").replace(
        "embed_tokens.embedding", "embed_tokens.weight"
    )
    if layer is not None:
        name = name.replace("layers.", f"layers.{layer}.", 1)
    return name if name.startswith("lm_head") else f"model.{name}"


def to_hf(path: str, array: np.ndarray) -> np.ndarray:
    """torch stores a linear layer [out, in]."""
    return np.ascontiguousarray(array.T) if path.endswith("kernel") else np.ascontiguousarray(array)


def _open_tensors(folder: Path) -> tuple[dict[str, Path], Callable[[str], np.ndarray]]:
    index_file = folder / "model.safetensors.index.json"
    if index_file.is_file():
        index = json.loads(index_file.read_text())["weight_map"]
        outside = [name for name in index.values() if Path(name).name != name]
        if outside:
            raise ValueError(f"{index_file} points outside its folder: {outside[0]!r}; refused")
        where = {name: folder / file for name, file in index.items()}
    else:
        single = folder / "model.safetensors"
        if not single.is_file():
            raise FileNotFoundError(
                f"{folder} holds no model.safetensors (pickled .bin files are refused)"
            )
        with safe_open(single, framework="numpy") as file:
            where = dict.fromkeys(file.keys(), single)

    def read(name: str) -> np.ndarray:
        # numpy alone has no bfloat16, the published weights' type
        host = jax.local_devices(backend="cpu")[0]
        with jax.default_device(host), safe_open(where[name], framework="flax") as file:
            return np.asarray(file.get_tensor(name))

    return where, read


def import_params(folder: Path, abstract: Params, shardings: Params) -> Params:
    """Parameters of a Hugging Face folder as float32 arrays on the mesh, tensor by tensor."""
    where, read = _open_tensors(folder)
    expected: set[str] = set()

    def load(key_path, leaf, sharding):
        path = path_name(key_path)
        stacked = path.startswith("layers.")
        layers = range(leaf.shape[0]) if stacked else [None]
        names = [tensor_name(path, layer) for layer in layers]
        expected.update(names)
        missing = [name for name in names if name not in where]
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} tensors of {path}: {missing[:3]}")
        arrays = [to_hf(path, read(name)).astype(np.float32) for name in names]
        shape = leaf.shape[1:] if stacked else leaf.shape
        for name, array in zip(names, arrays, strict=True):
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, config.json needs {shape}")
        whole = np.stack(arrays) if stacked else arrays[0]
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    params = jax.tree_util.tree_map_with_path(load, abstract, shardings)
    tied = {"lm_head.weight"}  # some folders store the tied head a second time
    unexpected = sorted(set(where) - expected - tied)
    if unexpected:
        raise ValueError(f"{folder} holds {len(unexpected)} unexpected tensors: {unexpected[:3]}")
    return params


def export_folder(
    params: Params, sizes: Sizes, tokenizer: ChatTokenizer, folder: Path, card: str
) -> None:
    """Write weights (float32), configs, tokenizer and model card; the folder appears at once."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors: dict[str, np.ndarray] = {}
    for key_path, array in jax.tree_util.tree_leaves_with_path(jax.device_get(params)):
        path = path_name(key_path)
        if path.startswith("layers."):
            for layer, part in enumerate(array):
                tensors[tensor_name(path, layer)] = to_hf(path, part)
        else:
            tensors[tensor_name(path, None)] = to_hf(path, array)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    config = config_fields(sizes, tokenizer.end_id, tokenizer.pad_id, "float32")
    generation = {
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
        "do_sample": False,
    }
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2))
    (partial / "README.md").write_text(card, encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer.folder / name, partial / name)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
