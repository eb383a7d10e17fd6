"""Low-rank adapters of the linear layers (arXiv 2106.09685): y = x W + b + (alpha / r) x A B.

An adapter is a tree of its own, `layers.….q_proj.{lora_A, lora_B}`, that is laid into the base
model's tree; without it the tree is the base model's, exactly. L layers, r rank.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Path = tuple[str, ...]


@struct.dataclass
class Target:
    """Rank and scaling of one adapted projection, the same in every layer."""

    projection: str = struct.field(pytree_node=False)
    rank: int = struct.field(pytree_node=False)
    alpha: float = struct.field(pytree_node=False)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@struct.dataclass
class Lora:
    """Which projections are adapted; hashable, so that it can be an argument of jit."""

    targets: tuple[Target, ...] = struct.field(pytree_node=False)

    def __post_init__(self):
        names = [target.projection for target in self.targets]
        unknown = sorted(set(names) - set(PROJECTIONS))
        if unknown or not names or len(set(names)) < len(names):
            raise ValueError(f"lora targets={names}: name each once, of {list(PROJECTIONS)}")
        for target in self.targets:
            if target.rank < 1:
                raise ValueError(f"lora rank of {target.projection}={target.rank}; at least 1")

    def of(self, projection: str) -> Target | None:
        return next((t for t in self.targets if t.projection == projection), None)


def is_adapter(path: Path) -> bool:
    return path[-1] in ("lora_A", "lora_B")


def split_adapter(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(base model, adapter) of a tree that holds both."""
    flat = flatten_dict(params)
    base = {path: x for path, x in flat.items() if not is_adapter(path)}
    adapter = {path: x for path, x in flat.items() if is_adapter(path)}
    return unflatten_dict(base), unflatten_dict(adapter)


def with_adapter(base: dict[str, Any], adapter: dict[str, Any]) -> dict[str, Any]:
    """The tree that a model with adapters computes with; nothing is copied."""
    return unflatten_dict(flatten_dict(base) | flatten_dict(adapter))


def merge_kernel(kernel, lora_A, lora_B, scale: float):
    """W + (alpha / r) A B, of one layer or of stacked ones; numpy or jax arrays."""
    return kernel + scale * (lora_A @ lora_B)


def merge_adapter(params: dict[str, Any], lora: Lora) -> dict[str, Any]:
    """The base model's tree with the adapter added to its kernels, float32."""
    base, adapter = (flatten_dict(tree) for tree in split_adapter(params))
    for path in {path[:-1] for path in adapter}:
        target = lora.of(path[-1])
        assert target is not None, path
        A, B = adapter[(*path, "lora_A")], adapter[(*path, "lora_B")]
        base[(*path, "kernel")] = merge_kernel(base[(*path, "kernel")], A, B, target.scale)
    return unflatten_dict(base)


def init_adapter(abstract: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    """A fresh adapter: A uniform within 1/sqrt(fan in) as `peft` draws it, B zero.

    `abstract` is the tree of shapes of a model with adapters (`make_network`).
    """
    _, adapter = split_adapter(abstract)
    flat = {}
    for number, (path, leaf) in enumerate(sorted(flatten_dict(adapter).items())):
        bound = leaf.shape[-2] ** -0.5
        draw = jax.random.uniform(jax.random.fold_in(key, number), leaf.shape, jnp.float32)
        is_A = path[-1] == "lora_A"
        flat[path] = bound * (2.0 * draw - 1.0) if is_A else jnp.zeros(leaf.shape, jnp.float32)
    return unflatten_dict(flat)
