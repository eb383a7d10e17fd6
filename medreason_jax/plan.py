"""Whether a training stage fits devices that are not there: its real step, compiled for them.

The compiler's bytes stand beside an arithmetic by kind, so that a plan says what to change. B
rows, T time, D model, F feed-forward, V vocabulary, N query heads, K key/value heads, H head size.
"""

import difflib
import math
import re
import time
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from medreason_jax.checkpoint import abstract_like
from medreason_jax.collectives import Collective, find_collectives
from medreason_jax.config import TrainConfig
from medreason_jax.manifest import model_folder
from medreason_jax.mesh import batch_sharding, check_rows, make_mesh, make_sharder, tensor_parts
from medreason_jax.qwen2.folder import read_description
from medreason_jax.qwen2.load import make_compute
from medreason_jax.qwen2.model import KEPT, Network, abstract_params, make_network
from medreason_jax.qwen2.sizes import Sizes
from medreason_jax.targets import GIB, Target, open_devices
from medreason_jax.train.held_out import HeldOut
from medreason_jax.train.program import Program, abstract_split, lora_of, make_program

FULL = 0.92  # of the usable memory: the rest is the runtime's and fragments
STEPS = 1000  # where epochs are asked for and no data is there to count; changes no size


@dataclass(frozen=True)
class Stage:
    """A stage's program and the shapes of what it is called with, placed on a mesh."""

    config: TrainConfig
    sizes: Sizes
    mesh: Mesh
    network: Network
    program: Program
    state: Any
    frozen: Any
    batch: dict[str, jax.ShapeDtypeStruct]

    def lower(self):
        with self.traced_for():
            return self.program.step(self.state).lower(self.state, self.frozen, self.batch)

    def lower_held_out(self):
        """The held-out loss, of as many rows as a step holds at a time."""
        rows = self.config.batch_rows // self.config.accumulation
        held_out = HeldOut(self.program.policy, {}, 1, rows, self.mesh)
        batch = {
            name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=x.sharding)
            for name, x in self.batch.items()
        }
        with self.traced_for():
            return held_out.sums.lower(self.state.params, self.frozen, batch)

    def traced_for(self):
        """A context in which kernels that ask for the device are told that of the mesh."""
        return jax.default_device(self.mesh.devices.flat[0])


def read_model_sizes(model: Path) -> tuple[str, Sizes]:
    """(name, sizes) of a model folder, or of the model in configs/models that is called so."""
    if model.is_dir():
        path = model_folder(model) / "config.json"
        return str(model), read_description(path).sizes
    models = files("medreason_jax.configs") / "models"
    known = sorted(entry.name.removesuffix(".json") for entry in models.iterdir())
    name = model.name.lower()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"model={model} is neither a folder nor a known model's name; {hint}")
    return name, read_description(Path(str(models / f"{name}.json"))).sizes


def make_stage(config: TrainConfig, sizes: Sizes, devices: list[Any]) -> Stage:
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    check_rows(mesh, "batch_rows", config.batch_rows, config.accumulation)
    if config.length > sizes.max_length:
        raise ValueError(
            f"length={config.length} is beyond the model's longest row, {sizes.max_length} tokens"
        )
    sharder = make_sharder(mesh, sizes.num_attention_heads, sizes.num_key_value_heads)
    compute = make_compute(
        sharder,
        sizes,
        config.dtype,
        remat=config.remat,
        unroll=config.unroll,
        attention=config.attention,
    )
    network, _ = make_network(sizes, compute)
    steps = STEPS if config.steps is None else config.steps
    program = make_program(config, network, sharder, steps)
    reference = config.preference is not None
    trainable, frozen = abstract_split(network, sharder, lora_of(config.lora), reference)
    state = jax.eval_shape(program.init, trainable)
    state = abstract_like(state, sharder.tree(state))
    batch = abstract_batch(config, mesh)
    return Stage(config, sizes, mesh, network, program, state, frozen, batch)


def abstract_batch(config: TrainConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what `data.dataset.Batches` gives."""

    def shaped(width: int, dtype) -> jax.ShapeDtypeStruct:
        shape = (config.batch_rows, width)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

    names = ("tokens", "targets", "segments", "positions")
    batch = {name: shaped(config.length, jnp.int32) for name in names}
    batch["weights"] = shaped(config.length, jnp.float32)
    if config.preference is not None:
        batch["pairs"] = shaped(config.preference.pairs_per_row, jnp.float32)
    return batch


def bytes_per_device(tree: Any) -> int:
    """Of shapes with shardings: what one device holds; a TPU fills the tiles of its memory."""

    def held(leaf) -> int:
        size = tiled_size if leaf.sharding.mesh.devices.flat[0].platform == "tpu" else math.prod
        return size(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(held(leaf) for leaf in jax.tree.leaves(tree))


def tiled_size(shape: tuple[int, ...]) -> int:
    """Elements with padding to tiles of 8 x 128, the last two axes in the order that pads less.

    Fewer than 8 rows take a tile of the next power of two.
    """
    if len(shape) < 2:
        return math.prod(shape)

    def padded(rows: int, lanes: int) -> int:
        tile = min(8, 1 << (rows - 1).bit_length())
        return math.ceil(rows / tile) * tile * math.ceil(lanes / 128) * 128

    *outer, m, n = shape
    return math.prod(outer) * min(padded(m, n), padded(n, m))


def count_parameters(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@dataclass(frozen=True)
class Arithmetic:
    """Bytes a device by kind. The first four are exact, and are the step's arguments."""

    parameters: int
    optimizer: int
    frozen: int
    batch: int
    gradients: int  # float32; two of each where a micro-batch's are added to the sum
    activations: int  # what the layers keep for the backward pass
    temporaries: int  # of the vocabulary projection or one layer, whichever needs more

    @property
    def arguments(self) -> int:
        return self.parameters + self.optimizer + self.frozen + self.batch

    @property
    def total(self) -> int:
        return self.arguments + self.gradients + self.activations + self.temporaries


def arithmetic_of(stage: Stage) -> Arithmetic:
    parameters = bytes_per_device(stage.state.params)
    copies = 1 if stage.config.accumulation == 1 else 2
    return Arithmetic(
        parameters=parameters,
        optimizer=bytes_per_device(stage.state) - parameters,
        frozen=bytes_per_device(stage.frozen),
        batch=bytes_per_device(stage.batch),
        gradients=copies * parameters,
        activations=activation_bytes(stage),
        temporaries=max(head_bytes(stage), layer_bytes(stage)),
    )


def micro_rows(stage: Stage) -> int:
    """Rows of one micro-batch on one device."""
    tokens = stage.batch["tokens"]
    return tokens.sharding.shard_shape(tokens.shape)[0] // stage.config.accumulation


def widths(stage: Stage) -> dict[str, int]:
    """Elements a token of what a layer may keep, on one device."""
    s, parts = stage.sizes, tensor_parts(stage.mesh)
    heads = s.num_attention_heads // parts
    kv_heads = s.num_key_value_heads
    kv_heads = kv_heads // parts if kv_heads % parts == 0 else kv_heads
    return {
        "input": s.hidden_size,
        "qkv": (heads + 2 * kv_heads) * s.head_dim,
        "context": heads * s.head_dim,
        "projected": s.hidden_size,
        "gate_up": 2 * s.intermediate_size // parts,
        "rest": 2 * s.hidden_size + 2 * s.intermediate_size // parts,
    }


def activation_bytes(stage: Stage) -> int:
    remat = stage.config.remat
    kept = ("input", *(KEPT[remat] if remat != "none" else (*KEPT["products"], "rest")))
    tokens = micro_rows(stage) * stage.config.length
    width = sum(widths(stage)[name] for name in kept)
    itemsize = stage.network.compute.dtype.itemsize
    return stage.sizes.num_hidden_layers * tokens * width * itemsize


def head_bytes(stage: Stage) -> int:
    """W in the computed type, its float32 gradient, and logits and their gradient of a chunk."""
    s = stage.sizes
    V = s.vocab_size // tensor_parts(stage.mesh)
    chunk = min(stage.config.head_chunk, micro_rows(stage) * stage.config.length)
    return V * s.hidden_size * (stage.network.compute.dtype.itemsize + 4) + 2 * 4 * chunk * V


def layer_bytes(stage: Stage) -> int:
    """One layer's kernels gathered, what its backward pass holds, and scores where they exist."""
    s, parts = stage.sizes, tensor_parts(stage.mesh)
    layers = abstract_params(s)["layers"]
    itemsize = stage.network.compute.dtype.itemsize
    gathered = count_parameters(layers) // s.num_hidden_layers // parts * itemsize
    T = stage.config.length
    rows = micro_rows(stage)
    scores = 0
    if stage.network.compute.attention.name == "xla":
        scores = 2 * 4 * rows * (s.num_attention_heads // parts) * T * T
    inside = 2 * rows * T * sum(widths(stage).values()) * itemsize
    return gathered + max(inside, scores)


def start_bytes(stage: Stage) -> int:
    """Of the program that makes the stage's trees: float32 weights in, what is trained and frozen
    out; the weights' own place is used again for what has their type."""
    sharder = stage.program.sharder
    params = abstract_params(stage.sizes)
    loaded = bytes_per_device(abstract_like(params, sharder.tree(params)))
    made = bytes_per_device(stage.state.params) + bytes_per_device(stage.frozen)
    return loaded + made - (loaded if stage.config.lora is None else 0)


@dataclass(frozen=True)
class Memory:
    """The compiler's bytes a device."""

    argument: int
    output: int
    temporary: int
    alias: int
    code: int

    @property
    def total(self) -> int:
        return self.argument + self.output + self.temporary - self.alias + self.code


def memory_of(compiled) -> Memory:
    found = compiled.memory_analysis()
    return Memory(
        argument=found.argument_size_in_bytes,
        output=found.output_size_in_bytes,
        temporary=found.temp_size_in_bytes,
        alias=found.alias_size_in_bytes,
        code=found.generated_code_size_in_bytes,
    )


def needed_bytes(message: str) -> int | None:
    """What a compiler that ran out of device memory says the program needs; None if it did not.

    Other memories (a kernel's vector memory, this machine's) run out with the same status. What a
    TPU's compiler calls temporaries holds arguments and outputs too (seen with x + 1).
    """
    if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    for pattern in (
        r"[Uu]sed ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm",
        r"memory required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds",
    ):
        if hit := re.search(pattern, message):
            return int(float(hit[1]) * units[hit[2]])
    return None


def try_compile(lowered) -> tuple[Any, int]:
    """(compiled, bytes a device that it needs); None in place of what device memory cannot hold."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needs = needed_bytes(str(error))
        if needs is None:
            raise
        return None, needs
    return compiled, memory_of(compiled).total


@dataclass(frozen=True)
class Plan:
    """`memory` and `collectives` are None where the compiler gave up for want of memory."""

    target: str
    devices: int
    device_kind: str
    mesh: dict[str, int]
    model: str
    parameters: int
    trained: int
    attention: str
    compile_seconds: float
    processor_seconds: float  # of all threads; on a busy machine less than the time that passed
    arithmetic: Arithmetic
    memory: Memory | None
    collectives: list[Collective] | None
    needs: int  # bytes a device, of the step
    others: dict[str, int]  # of the other programs, with what stays on the device beside them
    has: int
    not_counted: list[str]

    @property
    def most(self) -> int:
        return max(self.needs, *self.others.values())

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.most <= FULL * self.has

    def record(self) -> dict[str, Any]:
        return {"fits": self.fits, "limit": FULL, "most": self.most, **asdict(self)}


def make_plan(config: TrainConfig, target: Target, model: Path | None = None) -> Plan:
    """Compile the config's step for the target; `model` in place of the config's own."""
    name, sizes = read_model_sizes(config.model if model is None else model)
    stage = make_stage(config, sizes, open_devices(target))
    arithmetic, begun, used = arithmetic_of(stage), time.monotonic(), time.process_time()
    compiled, needs = try_compile(stage.lower())
    seconds, processor = time.monotonic() - begun, time.process_time() - used
    memory = collectives = None
    if compiled is not None:
        program = compiled.as_text()
        assert program is not None, "a compiler that shows no program"
        memory, collectives = memory_of(compiled), find_collectives(program)
    others = {"start": start_bytes(stage)}
    if config.held_out is not None:
        others["held_out"] = arithmetic.optimizer + try_compile(stage.lower_held_out())[1]
    return Plan(
        target=str(target),
        devices=target.count,
        device_kind=stage.mesh.devices.flat[0].device_kind,
        mesh=dict(stage.mesh.shape),
        model=name,
        parameters=sizes.parameter_count,
        trained=count_parameters(stage.state.params),
        attention=stage.network.compute.attention.name,
        compile_seconds=round(seconds, 1),
        processor_seconds=round(processor, 1),
        arithmetic=arithmetic,
        memory=memory,
        collectives=collectives,
        needs=needs,
        others=others,
        has=target.memory,
        not_counted=[] if config.samples is None else ["samples"],
    )


def gib(size: int) -> str:
    return f"{size / GIB:9.3f} GiB"


def plan_table(plan: Plan) -> str:
    """What `medreason plan` prints."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    share = plan.most / plan.has
    verdict = "fits" if plan.fits else "does not fit"
    lines = [
        f"target      {plan.target}, {plan.devices} x {plan.device_kind}, mesh {mesh}",
        f"model       {plan.model}, {plan.parameters:,} parameters, {plan.trained:,} trained",
        f"attention   {plan.attention}",
        f"compiled    in {plan.compile_seconds} s, {plan.processor_seconds} s of processor time",
        f"{verdict}: needs {gib(plan.most).strip()} a device, has {gib(plan.has).strip()}: "
        f"{share:.0%}, at most {FULL:.0%}",
        "",
        "arithmetic, a device",
        *(f"  {name:<14}{gib(size)}" for name, size in asdict(plan.arithmetic).items()),
        f"  {'total':<14}{gib(plan.arithmetic.total)}",
        "",
        "programs beside the step, with what stays on the device",
        *(f"  {name:<14}{gib(size)}" for name, size in plan.others.items()),
        *(f"  {name:<14} not counted" for name in plan.not_counted),
    ]
    if plan.memory is None:
        return "\n".join([*lines, "", "the compiler ran out of device memory; no exact bytes"])
    lines += ["", "compiler, a device"]
    lines += [f"  {name:<14}{gib(size)}" for name, size in asdict(plan.memory).items()]
    lines += [
        f"  {'total':<14}{gib(plan.memory.total)}  (argument + output + temporary - alias + code)"
    ]
    lines += ["", "collectives of a step   in loops   count    runs  bytes of the largest, of all"]
    for c in plan.collectives or []:
        where = "yes" if c.in_loop else "no"
        lines.append(
            f"  {c.kind:<22}{where:<8}{c.count:>8}{c.runs:>8}  {c.largest:>20,}  {c.bytes:>22,}"
        )
    return "\n".join(lines)
