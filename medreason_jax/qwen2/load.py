"""A model folder opened on a mesh."""

import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from medreason_jax.checkpoint import load_params
from medreason_jax.config import MeshConfig
from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.generate.engine import Engine
from medreason_jax.mesh import HeadShards, Sharder, TokenShards, make_mesh, make_sharder
from medreason_jax.qwen2.attention import KernelName, choose_checked_kernel, choose_kernel
from medreason_jax.qwen2.folder import ADAPTER, PARAMS, Description, ModelFolder
from medreason_jax.qwen2.huggingface import import_params
from medreason_jax.qwen2.lora import Lora, merge_adapter, split_adapter, with_adapter
from medreason_jax.qwen2.model import (
    UNROLLED,
    Compute,
    Network,
    Params,
    Remat,
    abstract_params,
    make_network,
)
from medreason_jax.qwen2.sizes import Sizes
from medreason_jax.qwen2.tensor_files import TensorFiles
from medreason_jax.train.objectives import Scorer

Attention = Literal["auto"] | KernelName
Unroll = Literal["auto"] | int


@struct.dataclass
class Loaded:
    """A model on a mesh, with its tokenizer."""

    mesh: Mesh = struct.field(pytree_node=False)
    sharder: Sharder = struct.field(pytree_node=False)
    network: Network = struct.field(pytree_node=False)
    description: Description = struct.field(pytree_node=False)
    lora: Lora | None = struct.field(pytree_node=False)
    tokenizer: ChatTokenizer = struct.field(pytree_node=False)
    params: Params

    def check_length(self, length: int) -> None:
        most = self.network.sizes.max_length
        if length > most:
            raise ValueError(f"length={length} is beyond the model's longest row, {most} tokens")

    def check_language_model(self) -> None:
        if self.description.score is not None:
            raise ValueError(
                f"the model is a {self.description.architecture}; this needs a Qwen2ForCausalLM"
            )

    def scorer(self, chunk: int, temperature: float = 1.0) -> Scorer:
        self.check_language_model()
        return Scorer(self.network, TokenShards(self.mesh), chunk, temperature)

    def engine(self, slots: int) -> Engine:
        self.check_language_model()
        ids = {"end_id": self.tokenizer.end_id, "pad_id": self.tokenizer.pad_id}
        return Engine(self.network, self.mesh, slots=slots, **ids)

    def merged(self) -> "Loaded":
        """The same model with its adapter, if it has one, added to the kernels."""
        if self.lora is None:
            return self
        network, _ = make_network(self.network.sizes, self.network.compute)
        params = merge_adapter(self.params, self.lora)
        params = jax.device_put(params, self.sharder.tree(params))
        return self.replace(network=network, params=params, lora=None)


def load_model(
    folder: Path,
    mesh_config: MeshConfig,
    dtype: str,
    *,
    remat: Remat = "none",
    unroll: Unroll = "auto",
    attention: Attention = "auto",
) -> Loaded:
    """Open a model or stage folder on the mesh that the config asks for; float32 masters."""
    make_mesh(mesh_config.data, mesh_config.fsdp, mesh_config.tensor)  # refused before all else
    model = ModelFolder(folder)
    options: Any = {"remat": remat, "unroll": unroll, "attention": attention}
    loaded = open_model(model, mesh_config, dtype, lora=model.lora, **options)
    abstract = abstract_params(model.description.sizes, model.lora, model.description.score)
    return loaded.replace(params=load_tree(model, abstract, loaded.sharder))


def open_model(
    model: ModelFolder,
    mesh_config: MeshConfig,
    dtype: str,
    *,
    lora: Lora | None = None,
    remat: Remat = "none",
    unroll: Unroll = "auto",
    attention: Attention = "auto",
) -> Loaded:
    """The model's program on the mesh, with `lora` or without, and no parameters yet."""
    mesh = make_mesh(mesh_config.data, mesh_config.fsdp, mesh_config.tensor)
    sizes, score = model.description.sizes, model.description.score
    sharder = make_sharder(mesh, sizes.num_attention_heads, sizes.num_key_value_heads)
    compute = make_compute(sharder, sizes, dtype, remat=remat, unroll=unroll, attention=attention)
    network, _ = make_network(sizes, compute, lora, score)
    if compute.attention.note is not None and jax.process_index() == 0:
        print(f"attention: {compute.attention.note}", file=sys.stderr)
    return Loaded(mesh, sharder, network, model.description, lora, model.tokenizer, {})


def load_tree(model: ModelFolder, abstract: Params, sharder: Sharder) -> Params:
    """The folder's parameters on the mesh, base and adapter."""
    if model.base is not None:
        base, adapter = split_adapter(abstract)
        tree = load_params(model.folder / ADAPTER, adapter, sharder.tree(adapter))
        return with_adapter(load_merged(model.base, base, sharder), tree)
    if model.is_ours:
        return load_params(model.folder / PARAMS, abstract, sharder.tree(abstract))
    return import_params(TensorFiles(model.folder), abstract, sharder.tree(abstract))


def load_merged(model: ModelFolder, abstract: Params, sharder: Sharder) -> Params:
    """As `load_tree`, the adapter added to the kernels."""
    if model.lora is None:
        return load_tree(model, abstract, sharder)
    both = abstract_params(model.description.sizes, model.lora, model.description.score)
    merged = merge_adapter(load_tree(model, both, sharder), model.lora)
    return jax.device_put(merged, sharder.tree(merged))


def make_compute(
    sharder: Sharder,
    sizes: Sizes,
    dtype: str,
    *,
    remat: Remat = "none",
    unroll: Unroll = "auto",
    attention: Attention = "auto",
) -> Compute:
    """How the model runs on the mesh, its attention kernel named and confirmed by a self-test.

    float32 asks for full float32 matrix products, which no accelerator does by default.
    """
    precision = "highest" if dtype == "float32" else None
    jax.config.update("jax_default_matmul_precision", precision)
    device = sharder.mesh.devices.flat[0]
    layers = layers_at_once(unroll, sizes.num_hidden_layers, device.platform)
    shards = HeadShards(sharder.mesh)
    if device in jax.devices():
        heads = sizes.num_attention_heads, sizes.num_key_value_heads
        kernel = choose_checked_kernel(
            attention, device.platform, *heads, sizes.head_dim, jnp.dtype(dtype), shards
        )
    else:  # only compiled for
        kernel = choose_kernel(attention, device.platform, sizes.head_dim, jnp.dtype(dtype), shards)
    return Compute(jnp.dtype(dtype), kernel, sharder, remat, layers)


def layers_at_once(unroll: Unroll, layers: int, platform: str) -> int:
    """Of the scan over layers. `auto` is all of them on a GPU, where a loop copies what each keeps
    in and out of stacked arrays, but of no more than UNROLLED."""
    if unroll == "auto":
        return layers if platform == "gpu" and layers <= UNROLLED else 1
    if layers % unroll:
        allowed = ["auto", *(n for n in range(1, layers + 1) if layers % n == 0)]
        raise ValueError(
            f"unroll={unroll} does not divide the model's {layers} layers; allowed: {allowed}"
        )
    return unroll
