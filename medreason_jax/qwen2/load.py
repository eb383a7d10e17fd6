"""A model folder opened on a mesh: ours (`params/`) or Hugging Face's (`*.safetensors`)."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from medreason_jax.checkpoint import load_params, save_params
from medreason_jax.config import MeshConfig
from medreason_jax.data.chat import TOKENIZER_FILES, ChatTokenizer
from medreason_jax.generate.engine import Engine
from medreason_jax.manifest import model_folder
from medreason_jax.mesh import Sharder, TokenShards, make_mesh, tree_shardings
from medreason_jax.qwen2.attention import choose_attention
from medreason_jax.qwen2.huggingface import import_params
from medreason_jax.qwen2.model import Compute, Network, Params, make_network
from medreason_jax.qwen2.sizes import Sizes, config_fields, read_config_file
from medreason_jax.train.objectives import Scorer


@struct.dataclass
class Loaded:
    """A model on a mesh, with its tokenizer."""

    mesh: Mesh = struct.field(pytree_node=False)
    network: Network = struct.field(pytree_node=False)
    tokenizer: ChatTokenizer = struct.field(pytree_node=False)
    params: Params

    def check_length(self, length: int) -> None:
        most = self.network.sizes.max_position_embeddings
        if length > most:
            raise ValueError(
                f"length={length} is beyond the model's max_position_embeddings={most}"
            )

    def scorer(self, chunk: int, temperature: float = 1.0) -> Scorer:
        return Scorer(self.network, TokenShards(self.mesh), chunk, temperature)

    def engine(self, slots: int) -> Engine:
        ids = {"end_id": self.tokenizer.end_id, "pad_id": self.tokenizer.pad_id}
        return Engine(self.network, self.mesh, slots=slots, **ids)


def load_model(folder: Path, mesh_config: MeshConfig, dtype: str, remat: bool = False) -> Loaded:
    """Open a model or stage folder on the mesh that the config asks for; float32 masters."""
    if not folder.is_dir():
        raise FileNotFoundError(f"model={folder} does not exist; give a model or stage folder")
    folder = model_folder(folder)
    mesh = make_mesh(mesh_config.data, mesh_config.fsdp, mesh_config.tensor)
    sizes = read_config_file(folder / "config.json")
    tokenizer = ChatTokenizer(folder)
    if tokenizer.vocab_size > sizes.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is "
            f"{sizes.vocab_size}; they do not belong together"
        )
    network, abstract = make_network(sizes, make_compute(mesh, dtype, remat))
    if (folder / "params").is_dir():
        params = load_params(folder / "params", abstract, mesh)
    else:
        params = import_params(folder, abstract, tree_shardings(mesh, abstract))
    return Loaded(mesh, network, tokenizer, params)


def make_compute(mesh: Mesh, dtype: str, remat: bool) -> Compute:
    """float32 asks for full float32 matrix products, which no accelerator does by default."""
    if dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    _, attention = choose_attention(mesh.devices.flat[0].platform)
    return Compute(jnp.dtype(dtype), attention, Sharder(mesh), remat)


def save_model(folder: Path, params: Params, sizes: Sizes, tokenizer: ChatTokenizer) -> None:
    """A model folder of our own kind; `params/` comes last and whole."""
    if jax.process_index() == 0:
        write_model_files(folder, sizes, tokenizer)
    save_params(folder / "params", params)


def write_model_files(folder: Path, sizes: Sizes, tokenizer: ChatTokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fields = config_fields(sizes, tokenizer.end_id, tokenizer.pad_id, "float32")
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer.folder / name, folder / name)
