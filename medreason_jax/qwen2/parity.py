"""The gate after an export: the folder, opened by `transformers`, is the model that we have.

B batch, T time, D model, V vocabulary.
"""

import gc
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from medreason_jax.config import MeshConfig
from medreason_jax.generate.sampling import Sampling
from medreason_jax.mesh import (
    batch_shards,
    gather_to_host,
    is_stacked,
    make_mesh,
    make_sharder,
    path_name,
    put_batch,
)
from medreason_jax.qwen2.attention import Places
from medreason_jax.qwen2.folder import Description, ModelFolder, parameter_bytes
from medreason_jax.qwen2.heads import last_of_segments, score
from medreason_jax.qwen2.huggingface import leaves, tensor_name
from medreason_jax.qwen2.load import Loaded, load_model, make_compute, open_model
from medreason_jax.qwen2.model import layer_definition, rms_norm, run_layers
from medreason_jax.qwen2.sizes import WeightsDtype
from medreason_jax.qwen2.tensor_files import STORED, TensorFiles

LOGIT_ERROR = 1e-4  # relative norm, float32
NEAR_TIE = 1e-4  # two best logits closer than this may be ordered either way
HEAD_ROWS = 16_384  # of the vocabulary at a time, layer by layer
GateMode = Literal["full", "layerwise"]


def require_reference(*more: str) -> None:
    """Said before anything is written: what the gate compares with is installed."""
    missing = [n for n in ("torch", "transformers", *more) if importlib.util.find_spec(n) is None]
    if missing:
        raise RuntimeError(
            f"the parity gate needs {', '.join(missing)}: pip install 'medreason[export]'"
        )


def parity_gate(
    folder: Path,
    model: ModelFolder,
    description: Description,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    mode: Literal["auto"] | GateMode,
) -> dict[str, Any]:
    """Compare the exported `folder` with `model`; RuntimeError when they differ.

    Our side is read from the model's own folder, not from what was exported, and rounded as the
    export was. "full" compares logits and one greedy answer, and needs memory for the model in
    float32; "layerwise" compares one decoder layer at a time through the stack, then norm and head.
    """
    if mode == "auto":
        mode = "full" if fits_memory(model) else "layerwise"
    if mode == "full":
        facts = _full(folder, model, description, prompts, max_new_tokens)
    else:
        facts = _layerwise(folder, model, description, max(prompts, key=len))
    _check_error(folder, facts["logit_error"])
    return {"mode": mode, "dtype": description.dtype, **facts}


def fits_memory(model: ModelFolder) -> bool:
    return 1.5 * parameter_bytes(model) < psutil.virtual_memory().available


def adapter_gate(
    folder: Path, base: Path, adapter: ModelFolder, prompts: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Compare the logits of `base` with the `peft` adapter in `folder` with ours, one at a time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if not fits_memory(adapter):
        raise RuntimeError(
            f"comparing with peft needs {1.5 * parameter_bytes(adapter) / 1e9:.0f} GB of free "
            "memory; export --merged, whose gate goes layer by layer, or use a larger host"
        )
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, folder).eval()
    with torch.inference_mode():
        theirs = [adapted(torch.tensor([prompt])).logits[0].numpy() for prompt in prompts]
    del plain, adapted
    gc.collect()
    loaded = load_model(adapter.folder, gate_mesh(adapter.description), "float32", attention="xla")
    ours = [_our_logits(loaded, prompt) for prompt in prompts]
    worst = max(relative_error(o, t) for o, t in zip(ours, theirs, strict=True))
    _check_error(folder, worst)
    return {"mode": "adapter", "logit_error": worst}


def gate_mesh(description: Description) -> MeshConfig:
    """As many shards of the parameters as the model's width allows."""
    width = description.sizes.hidden_size
    return MeshConfig(data=-1, fsdp=math.gcd(jax.device_count(), width))


def _check_error(folder: Path, error: float) -> None:
    if not error <= LOGIT_ERROR:  # not a number fails too
        raise RuntimeError(
            f"{folder}: logits differ from transformers' by {error:.2e}, allowed {LOGIT_ERROR}"
        )


def rounded(x: np.ndarray, dtype: WeightsDtype) -> np.ndarray:
    """float32 that the stored type can hold."""
    return x.astype(STORED[dtype]).astype(np.float32)


# --- full ------------------------------------------------------------------------------------


def _full(folder, model: ModelFolder, description, prompts, max_new_tokens) -> dict[str, Any]:
    """One side at a time: `transformers` first, so that never both are in memory."""
    theirs, answer, gaps = _their_outputs(folder, description, prompts, max_new_tokens)
    gc.collect()
    ours = _our_model(model, description)
    errors = [
        relative_error(_our_logits(ours, prompt), expected)
        for prompt, expected in zip(prompts, theirs, strict=True)
    ]
    facts: dict[str, Any] = {"logit_error": max(errors)}
    if description.score is None:
        facts |= _compare_answers(folder, ours, prompts[0], answer, gaps)
    return facts


def _our_model(model: ModelFolder, description: Description) -> Loaded:
    """The model on the mesh from its own folder, its adapter added, rounded as it was stored."""
    loaded = open_model(model, gate_mesh(description), "float32", attention="xla")

    def whole(path, leaf, sharding):
        name = path_name(path)
        layers = range(leaf.shape[0]) if is_stacked(name) else [None]
        parts = [rounded(model.read(name, layer), description.dtype) for layer in layers]
        return jax.device_put(np.stack(parts) if is_stacked(name) else parts[0], sharding)

    shardings = loaded.sharder.tree(model.abstract)
    params = jax.tree_util.tree_map_with_path(whole, model.abstract, shardings)
    return loaded.replace(params=params)


def _their_outputs(folder: Path, description: Description, prompts, max_new_tokens: int):
    """Logits of every prompt, a greedy answer to the first and its gaps between the two best."""
    import torch
    import transformers

    automatic = {
        "Qwen2ForCausalLM": transformers.AutoModelForCausalLM,
        "Qwen2ForSequenceClassification": transformers.AutoModelForSequenceClassification,
        "Qwen2ForTokenClassification": transformers.AutoModelForTokenClassification,
    }[description.architecture]
    model = automatic.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = [model(torch.tensor([prompt])).logits[0].numpy() for prompt in prompts]
        if description.score is not None:
            return logits, [], []
        out = model.generate(
            torch.tensor([prompts[0]]),
            attention_mask=torch.ones(1, len(prompts[0]), dtype=torch.long),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    answer = out.sequences[0, len(prompts[0]) :].tolist()
    gaps = [float(-torch.topk(step[0], 2).values.diff()) for step in out.logits]
    return logits, answer, gaps


def _our_logits(model: Loaded, ids: Sequence[int]) -> np.ndarray:
    """Logits [T, V] of one row, repeated so that every batch shard has one; scores of a head."""
    tokens = np.tile(np.asarray(ids, np.int32), (batch_shards(model.mesh), 1))
    batch = {
        "tokens": tokens,
        "positions": np.broadcast_to(np.arange(len(ids), dtype=np.int32), tokens.shape),
        "segments": np.ones_like(tokens),
    }
    head, architecture = model.description.score, model.description.architecture

    @jax.jit
    def logits(params, batch):
        h_BTD = model.network.hidden(params, batch["tokens"], batch["positions"], batch["segments"])
        if head is None:
            return h_BTD @ model.network.vocabulary_kernel(params).T
        scores_BTC = score(params, h_BTD)
        if architecture == "Qwen2ForTokenClassification":
            return scores_BTC
        return last_of_segments(scores_BTC, batch["segments"], 1)[:, 0]

    return gather_to_host(logits(model.params, put_batch(model.mesh, batch)))[0]


def _compare_answers(folder: Path, model: Loaded, prompt, answer, gaps) -> dict[str, Any]:
    """Our greedy answer is theirs, up to a place where their two best logits are too close."""
    sampling = Sampling(0.0, 0, 1.0, len(answer))
    ours = model.engine(1).generate(model.params, [prompt], sampling, seed=0)[0].ids
    near = [place for place, gap in enumerate(gaps) if gap < NEAR_TIE]
    compared = near[0] if near else len(answer)
    if ours[:compared] != answer[:compared]:
        place = next(i for i, token in enumerate(answer) if i >= len(ours) or ours[i] != token)
        raise RuntimeError(
            f"{folder}: transformers answers differently at token {place} of a sample"
        )
    return {"greedy_tokens": compared, "near_ties": len(near)}


def relative_error(ours, theirs) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


# --- layer by layer --------------------------------------------------------------------------


def _layerwise(
    folder: Path, model: ModelFolder, description: Description, ids: Sequence[int]
) -> dict[str, Any]:
    files, sizes = TensorFiles(folder), description.sizes
    mesh = make_mesh(-1, 1, 1)
    sharder = make_sharder(mesh, sizes.num_attention_heads, sizes.num_key_value_heads)
    compute = make_compute(sharder, sizes, "float32", attention="xla")
    T, layers = len(ids), sizes.num_hidden_layers
    B = batch_shards(mesh)
    places = Places(jnp.ones((B, T), jnp.int32), jnp.tile(jnp.arange(T), (B, 1)))
    definition = layer_definition(sizes)
    apply = jax.jit(lambda tree, x: run_layers(definition, tree, x, places, sizes, compute))

    def ours_of(path: str, layer: int | None = None, rows: slice = slice(None)) -> np.ndarray:
        return rounded(model.read(path, layer, rows), description.dtype)

    def row_of(token: int) -> slice:
        return slice(token, token + 1)

    name = tensor_name("embed_tokens.embedding", None)
    embedded_TD = [ours_of("embed_tokens.embedding", None, row_of(token)) for token in ids]
    ours_BTD = jnp.tile(jnp.asarray(np.concatenate(embedded_TD)), (B, 1, 1))
    theirs_TD = np.concatenate([files.read(name, row_of(token)) for token in ids])
    stack = _TheirStack(folder, files, theirs_TD.astype(np.float32))
    errors = [relative_error(np.asarray(ours_BTD)[0], stack.hidden)]
    for layer in range(layers):
        tree = _one_layer(model, layer, ours_of)
        ours_BTD = apply(tree, ours_BTD)
        stack.apply_layer(layer)
        errors.append(relative_error(np.asarray(ours_BTD)[0], stack.hidden))
    norm = jnp.asarray(ours_of("norm.weight"))
    ours_TD = np.asarray(rms_norm(ours_BTD[0], norm, sizes.rms_norm_eps))
    theirs_TD = stack.normalised()
    error = _head_error(model, files, description, ours_of, ours_TD, theirs_TD)
    return {"logit_error": error, "layer_error": max(errors), "layers": layers}


def _one_layer(model: ModelFolder, layer: int, read) -> dict[str, Any]:
    """A stack of one layer, as `run_layers` takes it."""
    tree: dict[str, Any] = {}
    for path, _ in leaves(model.abstract):
        first, *parts, last = path.split(".")
        if first == "layers":
            node = tree
            for part in parts:
                node = node.setdefault(part, {})
            node[last] = jnp.asarray(read(path, layer))[None]
    return tree


class _TheirStack:
    """`transformers`' own decoder layers, one at a time, and the hidden states [T, D] so far."""

    def __init__(self, folder: Path, files: TensorFiles, embedded_TD: np.ndarray):
        import torch
        from transformers import AutoConfig
        from transformers.models.qwen2 import modeling_qwen2

        self.torch, self.files, self.classes = torch, files, modeling_qwen2
        self.config = AutoConfig.from_pretrained(folder)
        self.config._attn_implementation = "eager"
        T = len(embedded_TD)
        self.x = torch.tensor(embedded_TD)[None]
        self.positions = torch.arange(T)[None]
        self.mask = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)[None, None]
        rotary = modeling_qwen2.Qwen2RotaryEmbedding(self.config)
        self.rotation = rotary(self.x, self.positions)

    @property
    def hidden(self) -> np.ndarray:
        return self.x[0].numpy()

    def tensor(self, name: str):
        return self.torch.from_numpy(self.files.read(name).astype(np.float32))

    def apply_layer(self, number: int) -> None:
        with self.torch.device("meta"):
            layer = self.classes.Qwen2DecoderLayer(self.config, layer_idx=0)
        weights = {
            name: self.tensor(f"model.layers.{number}.{name}") for name in layer.state_dict()
        }
        layer.load_state_dict(weights, assign=True)
        with self.torch.inference_mode():
            out = layer.eval()(
                self.x,
                attention_mask=self.mask,
                position_ids=self.positions,
                position_embeddings=self.rotation,
            )
        self.x = out if self.torch.is_tensor(out) else out[0]

    def normalised(self) -> np.ndarray:
        norm = self.classes.Qwen2RMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        norm.load_state_dict({"weight": self.tensor("model.norm.weight")})
        with self.torch.inference_mode():
            return norm(self.x)[0].numpy()


def _head_error(model, files, description, ours_of, ours_TD, theirs_TD) -> float:
    """Relative error of the logits, a range of the vocabulary at a time."""
    if description.score is not None:
        ours, theirs = ours_TD @ ours_of("score.kernel"), files.read("score.weight")
        theirs = theirs_TD @ theirs.astype(np.float32).T
        if description.score.bias:
            ours = ours + ours_of("score.bias")
            theirs = theirs + files.read("score.bias").astype(np.float32)
        return relative_error(ours, theirs)
    tied = description.sizes.tie_word_embeddings
    path = "embed_tokens.embedding" if tied else "lm_head.kernel"
    name = tensor_name(path, None)
    head_DV = None if tied else ours_of(path)
    difference = size = 0.0
    for first in range(0, description.sizes.vocab_size, HEAD_ROWS):
        rows = slice(first, min(first + HEAD_ROWS, description.sizes.vocab_size))
        ours_W = ours_of(path, None, rows).T if head_DV is None else head_DV[:, rows]
        theirs = theirs_TD @ files.read(name, rows).astype(np.float32).T
        difference += float(np.sum((ours_TD @ ours_W - theirs) ** 2))
        size += float(np.sum(theirs**2))
    return float(np.sqrt(difference / size))
