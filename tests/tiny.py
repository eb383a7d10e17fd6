"""A tiny Qwen2.5 with rough weights: default ones would hide errors of biases and norm gains."""

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from medreason_jax.mesh import HeadShards, TokenShards, make_mesh, make_sharder, path_name
from medreason_jax.qwen2.attention import choose_kernel
from medreason_jax.qwen2.model import Compute, init_params, make_network
from medreason_jax.qwen2.sizes import read_sizes
from medreason_jax.train.objectives import Scorer

MODELS = Path(__file__).parents[1] / "configs/models"
FIELDS = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}


def model_fields(name: str, **changes) -> dict:
    """Fields of one of the published configs, such as "qwen2.5-7b", with changes."""
    return json.loads((MODELS / f"{name}.json").read_text()) | changes


def rough_params(sizes, seed=0):
    """Weights N(0, 0.05); biases and norm gains shifted by N(0, 0.3)."""

    def shift(path, x):
        name = path_name(path)
        key = jax.random.fold_in(jax.random.key(seed + 1), zlib.crc32(name.encode()))
        plain = name.endswith("kernel") or name.endswith("embedding")
        return x if plain else x + 0.3 * jax.random.normal(key, x.shape)

    params = init_params(sizes, jax.random.key(seed))
    return jax.tree_util.tree_map_with_path(shift, params)


def some_mesh(shape):
    """A data x fsdp x tensor mesh over the first devices."""
    count = int(np.prod(shape))
    if count == jax.device_count():
        return make_mesh(*shape)
    return jax.sharding.Mesh(
        np.array(jax.devices()[:count]).reshape(shape), ("data", "fsdp", "tensor")
    )


def tiny_compute(sizes, mesh, dtype=jnp.float32, **options) -> Compute:
    """float32 has full-precision products."""
    jax.config.update("jax_default_matmul_precision", "highest")
    sharder = make_sharder(mesh, sizes.num_attention_heads, sizes.num_key_value_heads)
    kernel = choose_kernel("xla", "cpu", sizes.head_dim, jnp.float32, HeadShards(mesh))
    return Compute(dtype, kernel, sharder, **options)


def tiny_model(mesh_shape=(1, 1, 1), seed=0, *, options=None, **fields):
    """(mesh, network, params, scorer) of a tiny model; `options` are of Compute."""
    mesh = some_mesh(mesh_shape)
    sizes = read_sizes({**FIELDS, **fields})
    network, _ = make_network(sizes, tiny_compute(sizes, mesh, **(options or {})))
    scorer = Scorer(network, TokenShards(mesh), 24)
    return mesh, network, rough_params(sizes, seed), scorer
