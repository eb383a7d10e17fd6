"""Checkpoints: how arrays lie on the disk, and that every way to read them gives them back."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import tensorstore as ts
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medreason_jax import checkpoint
from medreason_jax.checkpoint import (
    ParamReader,
    StateCheckpoints,
    abstract_like,
    load_params,
    save_params,
)
from medreason_jax.mesh import AXES, make_mesh, path_name

SMALL_CHUNK = 2048
BIAS = "layers.self_attn.q_proj.bias"
KERNEL = "layers.mlp.down_proj.kernel"
EMBEDDING = "embed_tokens.embedding"
# {dotted path: (shape, sharding)}: an axis split once, twice, not at all; one layer above the limit
LEAVES = {
    EMBEDDING: ((320, 32), P("tensor", "fsdp")),
    BIAS: ((3, 32), P(None, "tensor")),
    "layers.self_attn.q_proj.kernel": ((3, 32, 32), P(None, "fsdp", "tensor")),
    KERNEL: ((3, 48, 32), P(None, ("tensor", "fsdp"))),
    "layers.input_layernorm.weight": ((3, 32), P()),
    "norm.weight": ((32,), P()),
}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that the tiny model's arrays pass, as real ones pass CHUNK_BYTES."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", SMALL_CHUNK)


def nested(leaves: dict):
    return unflatten_dict({tuple(path.split(".")): leaf for path, leaf in leaves.items()})


def make_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return nested({p: rng.normal(size=shape).astype(dtype) for p, (shape, _) in LEAVES.items()})


def make_shardings(mesh: Mesh, whole: bool = False):
    spec = lambda split: P() if whole else split  # noqa: E731
    return nested({p: NamedSharding(mesh, spec(split)) for p, (_, split) in LEAVES.items()})


def flat(tree) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


def stored_chunks(folder: Path) -> dict[str, tuple[list[int], int]]:
    """{dotted path: (chunk shape, bytes of a chunk)}, from the zarr headers."""
    base = {"driver": "file", "path": f"{folder}/"}
    files = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    found = {}
    for key in files.list().result():
        path, _, name = key.decode().rpartition("/")
        header = json.loads(files[key]) if name in (".zarray", "zarr.json") else {}
        if "chunks" in header:  # zarr 2
            chunk, size = header["chunks"], np.dtype(header["dtype"]).itemsize
        elif "chunk_grid" in header:  # zarr 3
            chunk = header["chunk_grid"]["configuration"]["chunk_shape"]
            size = np.dtype(header["data_type"]).itemsize
        else:
            continue
        found[path] = (chunk, size * int(np.prod(chunk)))
    return found


def check_chunks(folder: Path, tree) -> None:
    chunks = stored_chunks(folder)
    assert chunks.keys() == flat(tree).keys()
    assert {path: size for path, (_, size) in chunks.items() if size > SMALL_CHUNK} == {}
    stacked = {path: shape for path, (shape, _) in chunks.items() if "layers." in path}
    assert len(stacked) >= 4
    assert {path: shape for path, shape in stacked.items() if shape[0] != 1} == {}


@pytest.mark.parametrize("whole", [False, True], ids=["sharded", "replicated"])
def test_no_chunk_of_parameters_spans_two_layers_or_passes_the_limit(
    whole: bool, small_chunks, tmp_path: Path
):
    params = jax.device_put(make_params(), make_shardings(make_mesh(2, 2, 2), whole))
    save_params(tmp_path / "params", params)
    check_chunks(tmp_path / "params", params)


def test_no_chunk_of_a_train_state_spans_two_layers_or_passes_the_limit(
    small_chunks, tmp_path: Path
):
    params = jax.device_put(make_params(), make_shardings(make_mesh(2, 2, 2)))
    state = {"params": params, "optimizer": jax.jit(optax.adamw(1e-3).init)(params)}
    checkpoints = StateCheckpoints(tmp_path)
    checkpoints.save(3, state, {"seconds": 1.5})
    checkpoints.close()
    check_chunks(tmp_path / "3" / "state", state)

    checkpoints = StateCheckpoints(tmp_path)
    target = abstract_like(state, jax.tree.map(lambda x: x.sharding, state))
    restored = checkpoints.restore_latest(target)
    checkpoints.close()
    assert restored is not None
    step, found, facts = restored
    assert (step, facts) == (3, {"seconds": 1.5})
    jax.tree.map(np.testing.assert_array_equal, found, state)


@pytest.mark.parametrize("shape", [(1, 8, 1), (4, 1, 2), (1, 1, 1)])
@pytest.mark.parametrize("saved", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_a_state_is_restored_on_another_mesh_and_in_another_type(
    shape, saved, wanted, small_chunks, tmp_path: Path
):
    params = jax.device_put(make_params(), make_shardings(make_mesh(2, 2, 2)))
    moments = jax.tree.map(lambda x: x.astype(saved), params)
    save = StateCheckpoints(tmp_path)
    save.save(1, {"params": params, "mu": moments}, {})
    save.close()
    shardings = make_shardings(Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), AXES))
    target = {
        "params": abstract_like(params, shardings),
        "mu": jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, wanted, sharding=s), params, shardings
        ),
    }
    checkpoints = StateCheckpoints(tmp_path)
    restored = checkpoints.restore_latest(target)
    checkpoints.close()
    assert restored is not None
    jax.tree.map(np.testing.assert_array_equal, restored[1]["params"], params)
    cast = jax.tree.map(lambda x: x.astype(wanted), moments)
    jax.tree.map(np.testing.assert_array_equal, restored[1]["mu"], cast)
    found = jax.tree.map(lambda x: (x.dtype, x.sharding), restored[1])
    assert found == jax.tree.map(lambda x: (x.dtype, x.sharding), target)


def bytes_read() -> int:
    """Of every read of this process so far, from the page cache or the disk."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


@pytest.mark.parametrize("kind", ["state", "params"])
def test_one_layer_of_24_reads_little_more_than_its_bytes(kind: str, tmp_path: Path):
    shapes = {"q_proj": (24, 256, 256), "up_proj": (24, 256, 1024), "norm": (24, 256)}
    keys = jax.random.split(jax.random.key(0), 3)
    layers = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    tree = {"layers": layers, "embed": jax.random.normal(keys[0], (4096, 256))}
    if kind == "state":
        checkpoints = StateCheckpoints(tmp_path)
        checkpoints.save(1, {"params": tree, "mu": tree}, {})
        checkpoints.close()
        folder, prefix = tmp_path / "1" / "state", "params."
    else:
        folder, prefix = tmp_path / "params", ""
        save_params(folder, tree)
    before = bytes_read()
    reader = ParamReader(folder)
    layer = {name: reader.read(f"{prefix}layers.{name}", layer=17) for name in shapes}
    read = bytes_read() - before
    for name, array in layer.items():
        np.testing.assert_array_equal(array, layers[name][17])
    size = sum(array.nbytes for array in layer.values())
    assert 0.8 * size < read <= 1.5 * size, f"{read} bytes read for a layer of {size}"


@pytest.mark.parametrize("whole", [False, True], ids=["sharded", "replicated"])
@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 1, 1)], ids=["fsdp 8", "one device"])
def test_parameters_load_on_another_mesh_bit_for_bit(
    shape: tuple[int, int, int], whole: bool, small_chunks, tmp_path: Path
):
    params = jax.device_put(make_params(), make_shardings(make_mesh(2, 2, 2), whole))
    save_params(tmp_path / "params", params)
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    shardings = make_shardings(Mesh(devices, AXES))
    loaded = load_params(tmp_path / "params", jax.eval_shape(lambda: params), shardings)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings


def test_every_layer_read_alone_equals_the_saved_leaf(small_chunks, tmp_path: Path):
    params = jax.device_put(make_params(), make_shardings(make_mesh(2, 2, 2)))
    save_params(tmp_path / "params", params)
    saved = flat(params)
    reader = ParamReader(tmp_path / "params")
    assert reader.leaves == {path: (x.shape, x.dtype) for path, x in saved.items()}
    for path, array in saved.items():
        if path.startswith("layers."):
            for layer, expected in enumerate(array):
                np.testing.assert_array_equal(reader.read(path, layer), expected)
        else:
            np.testing.assert_array_equal(reader.read(path), array)


@pytest.mark.parametrize("rows", [slice(0, 7), slice(5, 200), slice(310, None), slice(9, 4)])
def test_a_range_of_rows_equals_those_rows(rows: slice, small_chunks, tmp_path: Path):
    params = make_params()
    save_params(tmp_path / "params", params)
    saved, reader = flat(params), ParamReader(tmp_path / "params")
    np.testing.assert_array_equal(reader.read(EMBEDDING, rows=rows), saved[EMBEDDING][rows])
    np.testing.assert_array_equal(reader.read(KERNEL, 1, rows), saved[KERNEL][1][rows])


def test_bfloat16_comes_back_as_bfloat16(tmp_path: Path):
    params = make_params(ml_dtypes.bfloat16)
    save_params(tmp_path / "params", params)
    layer = ParamReader(tmp_path / "params").read(KERNEL, layer=2)
    assert layer.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(layer, flat(params)[KERNEL][2])


def test_a_missing_or_empty_folder_names_itself(tmp_path: Path):
    missing = tmp_path / "params"
    with pytest.raises(FileNotFoundError, match=f"{missing} does not exist"):
        ParamReader(missing)
    with pytest.raises(FileNotFoundError, match=f"{missing} does not exist"):
        load_params(missing, {}, {})
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no arrays"):
        ParamReader(tmp_path)


def test_what_cannot_be_read_is_refused_with_what_can(tmp_path: Path):
    save_params(tmp_path / "params", make_params())
    reader = ParamReader(tmp_path / "params")
    with pytest.raises(ValueError, match=rf"'norm.bias'; it has 6: {EMBEDDING}, layers.*, layers"):
        reader.read("norm.bias")
    for layer in (None, -1, 3):
        with pytest.raises(ValueError, match=f"{BIAS} has layers 0 to 2, not layer={layer}"):
            reader.read(BIAS, layer)
    with pytest.raises(ValueError, match="not stacked"):
        reader.read(EMBEDDING, layer=0)
    with pytest.raises(ValueError, match="step"):
        reader.read(EMBEDDING, rows=slice(0, 8, 2))


READ_EVERY_LAYER = """
import sys, threading, time
from pathlib import Path
from medreason_jax.checkpoint import ParamReader

def megabytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1000

def watch():
    while True:
        seen.append(megabytes())
        time.sleep(0.001)

reader = ParamReader(Path(sys.argv[1]))
before, seen = megabytes(), []
threading.Thread(target=watch, daemon=True).start()
for path, (shape, _) in reader.leaves.items():
    for layer in range(shape[0]):
        reader.read(path, layer)
print(max(seen) - before)
"""


def peak_of_reading(folder: Path) -> float:
    """MB of memory that a process takes on while it reads layer by layer, with no jax device."""
    command = [sys.executable, "-c", READ_EVERY_LAYER, str(folder)]
    env = {**os.environ, "JAX_PLATFORMS": "none"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_reading_needs_no_device(tmp_path: Path):
    save_params(tmp_path / "params", {"layers": make_params()["layers"]})
    assert peak_of_reading(tmp_path / "params") < 300


@pytest.mark.slow
def test_reading_holds_one_layer_of_a_large_leaf():
    shape = (28, 1536, 8960)
    leaf = jax.random.normal(jax.random.key(0), shape)
    with tempfile.TemporaryDirectory() as folder:
        save_params(Path(folder) / "params", {"layers": {"kernel": leaf}})
        peak = peak_of_reading(Path(folder) / "params")
    layer = leaf[0].nbytes / 1e6
    assert peak < 2 * layer + 300, f"{peak:.0f} MB for layers of {layer:.0f} MB"


def test_a_way_over_the_parent_folder_is_a_path_like_any_other(tmp_path: Path):
    (tmp_path / "a").mkdir()
    winding, params = tmp_path / "a" / ".." / "params", {"w": jnp.arange(6.0)}
    save_params(winding, params)
    np.testing.assert_array_equal(ParamReader(winding).read("w"), params["w"])
    shardings = {"w": jax.sharding.SingleDeviceSharding(jax.devices()[0])}
    np.testing.assert_array_equal(load_params(winding, params, shardings)["w"], params["w"])
