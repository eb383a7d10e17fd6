"""Hugging Face and `peft` folders to checkpoints of our own."""

from pathlib import Path

import jax
from flax import struct

from medreason_jax.config import MeshConfig
from medreason_jax.mesh import make_mesh, make_sharder
from medreason_jax.qwen2.folder import ModelFolder, check_new, save_adapter, save_model
from medreason_jax.qwen2.huggingface import import_params
from medreason_jax.qwen2.lora import Lora
from medreason_jax.qwen2.peft import read_peft
from medreason_jax.qwen2.tensor_files import TensorFiles


@struct.dataclass
class Imported:
    """What this process read of the folder's tensors, in bytes."""

    bytes_read: int
    total_bytes: int


def import_folder(source: Path, target: Path, mesh_config: MeshConfig) -> Imported:
    """A Hugging Face folder to a checkpoint of float32 masters, spread over the mesh on the way."""
    check_new(target)
    model = ModelFolder(source)
    if model.is_ours:
        raise ValueError(f"{source} is a checkpoint already; import reads Hugging Face folders")
    mesh = make_mesh(mesh_config.data, mesh_config.fsdp, mesh_config.tensor)
    sizes = model.description.sizes
    sharder = make_sharder(mesh, sizes.num_attention_heads, sizes.num_key_value_heads)
    files = TensorFiles(model.folder)
    params = import_params(files, model.abstract, sharder.tree(model.abstract))
    save_model(target, params, model.description, model.tokenizer)
    return Imported(files.bytes_read, files.total_bytes)


def import_peft_folder(source: Path, target: Path, base: Path) -> Lora:
    """A `peft` adapter to an adapter checkpoint that names its base; the base is not copied."""
    check_new(target)
    model = ModelFolder(base)
    if model.lora is not None or model.description.score is not None:
        raise ValueError(f"--base {base} must be a causal language model without an adapter")
    lora, adapter = read_peft(source, model.description.sizes)
    save_adapter(target, jax.tree.map(jax.numpy.asarray, adapter), lora, base)
    return lora
