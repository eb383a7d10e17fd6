"""`transformers` models with rough weights, and the same weights as our parameters."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from medreason_jax.mesh import TokenShards, is_stacked
from medreason_jax.qwen2.folder import Description
from medreason_jax.qwen2.huggingface import is_transposed, leaves, tensor_name
from medreason_jax.qwen2.model import abstract_params, make_network
from medreason_jax.qwen2.sizes import LANGUAGE_MODEL, read_architecture, read_sizes
from medreason_jax.train.objectives import Scorer
from tests.tiny import FIELDS, some_mesh, tiny_compute

LM = LANGUAGE_MODEL


def rough_reference(fields: dict, seed: int = 0, architecture: str = LM):
    """Weights N(0, 0.05), biases and norm gains shifted by N(0, 0.3): default ones hide errors."""
    fields = {**FIELDS, **fields, "architectures": [architecture]}
    config = transformers.Qwen2Config(**fields)
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    model.to_empty(device="cpu")
    model.tie_weights()  # two tensors until now
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            small = parameter.ndim == 1
            parameter.normal_(0.0, 0.3 if small else 0.05, generator=generator)
            if small and "norm" in name:
                parameter += 1.0
    return in_type(model, torch.float32).eval()


def in_type(model, dtype):
    """The model with weights of a type; its rotary frequencies stay float32, as when loaded."""
    model = model.to(dtype)
    rotary = transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding(model.config)
    model.model.rotary_emb = rotary
    return model


def config_of(reference) -> dict:
    """The fields of a `transformers` model's config.json."""
    return json.loads(reference.config.to_json_string(use_diff=False))


def our_params(reference, dtype=jnp.float32):
    """The parameters of a `transformers` model as our tree, through our names and layouts."""
    fields = config_of(reference)
    description = Description(read_sizes(fields), *read_architecture(fields))
    abstract = abstract_params(description.sizes, score=description.score)
    state = reference.state_dict()

    def tensor(path, layer):
        array = state[tensor_name(path, layer)].float().numpy()
        return array.T if is_transposed(path) else array

    tree: dict = {}
    for path, leaf in leaves(abstract):
        *parents, last = path.split(".")
        node = functools.reduce(lambda node, part: node.setdefault(part, {}), parents, tree)
        if is_stacked(path):
            stack = np.empty(leaf.shape, np.float32)
            for layer in range(leaf.shape[0]):
                stack[layer] = tensor(path, layer)
            node[last] = jnp.asarray(stack, dtype)
        else:
            node[last] = jnp.array(tensor(path, None), dtype)  # torch may change its own
    return tree


def our_network(reference, mesh_shape=(1, 1, 1), lora=None, score=None, **options):
    """(network, abstract) of a `transformers` model on some of the simulated devices."""
    sizes = read_sizes(config_of(reference))
    return make_network(sizes, tiny_compute(sizes, some_mesh(mesh_shape), **options), lora, score)


def our_scorer(network, chunk: int = 64) -> Scorer:
    return Scorer(network, TokenShards(network.compute.constrain.mesh), chunk)


def whole_rows(tokens) -> dict:
    """A batch of rows without padding."""
    tokens = np.asarray(tokens)
    return {
        "tokens": jnp.asarray(tokens),
        "positions": jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        "segments": jnp.ones(tokens.shape, jnp.int32),
    }


def our_logits(network, params, batch):
    h_BTD = network.hidden(params, batch["tokens"], batch["positions"], batch["segments"])
    W_VD = network.vocabulary_kernel(params).astype(h_BTD.dtype)
    return np.asarray(jnp.einsum("btd,vd->btv", h_BTD, W_VD, preferred_element_type=jnp.float32))


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
