"""`transformers`' names and layouts for our parameters, and their way onto a mesh.

A leaf of ours is named by its dotted path; decoder layers are stacked there and single tensors in a
Hugging Face folder.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medreason_jax.mesh import is_stacked, path_name, row_sharding
from medreason_jax.qwen2.model import Params
from medreason_jax.qwen2.tensor_files import TensorFiles

HEAD = "lm_head.weight"
COMPARED_ROWS = 16_384


def tensor_name(path: str, layer: int | None) -> str:
    """`transformers`' name of one of our parameters, of one layer where they are stacked."""
    name = path.replace(".kernel", ".weight").replace(
        "embed_tokens.embedding", "embed_tokens.weight"
    )
    if layer is not None:
        name = name.replace("layers.", f"layers.{layer}.", 1)
    return name if name.startswith(("lm_head", "score")) else f"model.{name}"


def is_transposed(path: str) -> bool:
    """torch stores a linear layer [out, in]."""
    return path.endswith(".kernel")


def leaves(abstract: Params) -> Iterator[tuple[str, Any]]:
    """(dotted path, shape and dtype) of every parameter."""
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        yield path_name(key_path), leaf


def named_tensors(abstract: Params) -> Iterator[tuple[str, str, int | None, tuple[int, ...]]]:
    """(tensor name, path, layer, the tensor's shape in a Hugging Face file) in the files' order."""
    once = [(path, None, leaf.shape) for path, leaf in leaves(abstract) if not is_stacked(path)]
    layered = [(path, leaf.shape) for path, leaf in leaves(abstract) if is_stacked(path)]
    count = layered[0][1][0]
    stacked = [(path, layer, shape[1:]) for layer in range(count) for path, shape in layered]
    first = [entry for entry in once if entry[0].startswith("embed_tokens")]
    for path, layer, shape in [*first, *stacked, *(entry for entry in once if entry not in first)]:
        yield tensor_name(path, layer), path, layer, shape[::-1] if is_transposed(path) else shape


def check_tensors(files: TensorFiles, abstract: Params) -> None:
    """ValueError that names the first missing, unexpected or misshapen tensors."""
    expected = {name: shape for name, _, _, shape in named_tensors(abstract)}
    missing = [name for name in expected if name not in files.where]
    if missing:
        raise ValueError(f"{files.path} lacks {len(missing)} tensors: {missing[:3]}")
    unexpected = sorted(set(files.where) - set(expected))
    has_tied_copy = unexpected == [HEAD] and "score" not in abstract
    if unexpected and not has_tied_copy:
        raise ValueError(
            f"{files.path} holds {len(unexpected)} unexpected tensors: {unexpected[:3]}"
        )
    wrong = [name for name, shape in expected.items() if files.shape(name) != shape]
    if wrong:
        raise ValueError(
            f"{files.path}: {len(wrong)} tensors are misshapen; {wrong[0]} has shape "
            f"{files.shape(wrong[0])}, config.json needs {expected[wrong[0]]}"
        )
    for name in expected:
        files.dtype(name)
    if has_tied_copy:
        _check_tied_head(files)


def _check_tied_head(files: TensorFiles) -> None:
    """Some folders store a tied head a second time; one of its own would change the model."""
    embedding = tensor_name("embed_tokens.embedding", None)
    same = files.shape(HEAD) == files.shape(embedding)
    for first in range(0, files.shape(embedding)[0] if same else 0, COMPARED_ROWS):
        rows = slice(first, first + COMPARED_ROWS)
        same = same and np.array_equal(files.read(HEAD, rows), files.read(embedding, rows))
    if not same:
        raise ValueError(
            f"{files.path}: tie_word_embeddings=true, but {HEAD} differs from {embedding}; set "
            "tie_word_embeddings to false"
        )


def import_params(
    files: TensorFiles, abstract: Params, shardings: Params, dtype: Any = jnp.float32
) -> Params:
    """The parameters of a Hugging Face folder on the mesh, in `dtype`.

    Every process reads its own range of each tensor's rows, one tensor at a time; what its devices
    need of the others' comes over the mesh. The host never holds more than one tensor's range.
    """
    check_tensors(files, abstract)
    # A path's only tensor before the stacked ones: the largest are read while little is held.
    flat = {path: leaf for path, leaf in leaves(abstract)}
    where = dict(leaves(shardings))
    done = {
        path: _import_leaf(files, path, flat[path], where[path], dtype)
        for path in sorted(flat, key=lambda path: (is_stacked(path), path))
    }
    return jax.tree_util.tree_map_with_path(lambda p, _: done[path_name(p)], abstract)


def _import_leaf(files: TensorFiles, path: str, leaf, sharding, dtype) -> jax.Array:
    def ours(x):
        return (x.T if is_transposed(path) else x).astype(dtype)

    if not is_stacked(path):
        whole = _spread_rows(files, tensor_name(path, None), sharding.mesh)
        return jax.block_until_ready(jax.jit(ours, out_shardings=sharding)(whole))

    def put(stack, x, layer):
        return jax.lax.dynamic_update_index_in_dim(stack, ours(x), layer, 0)

    put = jax.jit(put, donate_argnums=0, out_shardings=sharding)
    stack = jnp.zeros(leaf.shape, dtype, device=sharding)
    for layer in range(leaf.shape[0]):
        x = _spread_rows(files, tensor_name(path, layer), sharding.mesh)
        stack = jax.block_until_ready(put(stack, x, layer))
    return stack


def _spread_rows(files: TensorFiles, name: str, mesh) -> jax.Array:
    """A tensor as it is in the file, its rows spread over all devices."""
    shape = files.shape(name)
    return jax.make_array_from_callback(
        shape, row_sharding(mesh, shape), lambda index: files.read(name, index[0])
    )


class HuggingFaceParams:
    """Our parameters read from a Hugging Face folder, one layer at a time, without a mesh."""

    def __init__(self, folder: Path, abstract: Params):
        self.files = TensorFiles(folder)
        check_tensors(self.files, abstract)

    def read(self, path: str, layer: int | None, rows: slice = slice(None)) -> np.ndarray:
        """One layer of a leaf, or a leaf that is not stacked; `rows` is a range of an embedding."""
        array = self.files.read(tensor_name(path, layer), rows)
        return array.T if is_transposed(path) else array
