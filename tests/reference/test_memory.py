"""Peak anonymous memory of an import and an export of the 1.5B shape, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.tokenizer_training import train_tokenizer
from medreason_jax.qwen2.huggingface import leaves, named_tensors
from medreason_jax.qwen2.model import abstract_params
from medreason_jax.qwen2.sizes import read_config_file
from medreason_jax.qwen2.tensor_files import DTYPES, Tensor, write_tensor_files

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
GIB = 2**30

# Runs in the process that is measured: RssAnon, sampled while `work` runs.
MEASURE = """
import json, sys, threading, time
from pathlib import Path

def anonymous():
    text = open("/proc/self/status").read()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024

peak, running = [anonymous()], [True]
def sample():
    while running[0]:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.005)
threading.Thread(target=sample, daemon=True).start()
source, target = map(Path, sys.argv[1:])
WORK
running[0] = False
print(json.dumps({"peak": peak[0], "end": anonymous()}))
"""
IMPORT = """
from medreason_jax.config import MeshConfig
from medreason_jax.qwen2.importing import import_folder
import_folder(source, target, MeshConfig(data=-1))
"""
EXPORT = """
from medreason_jax.qwen2 import export
export.parity_gate = lambda *arguments: {}  # its memory is its own matter: full or layer by layer
export.export_model(source, target, card="card")
"""
LAYERWISE = """
from medreason_jax.qwen2.export import export_model
export_model(source, target, card="card", gate="layerwise")
"""


def measured(work: str, source: Path, target: Path) -> int:
    program = MEASURE.replace("WORK", work)
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(source), str(target)],
        check=True,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def test_import_and_export_hold_little_beside_the_shards(tmp_path):
    config = ROOT / "configs/models/qwen2.5-1.5b.json"
    abstract = abstract_params(read_config_file(config))
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_bytes(config.read_bytes())
    train_tokenizer(["a b c"], 300, "", tmp_path / "tokenizer")
    ChatTokenizer(tmp_path / "tokenizer").save(source)
    random = np.random.default_rng(0)
    draw = lambda shape: random.standard_normal(shape, np.float32) * 0.02  # noqa: E731
    planned = [
        Tensor(name, DTYPES["BF16"], shape, lambda s=shape: draw(s).astype(DTYPES["BF16"]))
        for name, _, _, shape in named_tensors(abstract)
    ]
    write_tensor_files(source, planned)
    shards = 4 * sum(int(np.prod(leaf.shape)) for _, leaf in leaves(abstract))
    largest = max(tensor.nbytes for tensor in planned)

    peak = measured(IMPORT, source, tmp_path / "ckpt")
    print(f"import: peak {peak / GIB:.2f} GiB, shards {shards / GIB:.2f} GiB")
    assert peak <= shards + GIB
    peak = measured(EXPORT, tmp_path / "ckpt", tmp_path / "out")
    print(f"export: peak {peak / GIB:.2f} GiB, largest tensor {largest / GIB:.2f} GiB")
    assert peak <= 2 * largest + GIB
    written = (tmp_path / "out/model.safetensors").read_bytes()
    assert written[-largest:] == (source / "model.safetensors").read_bytes()[-largest:]
    del written
    peak = measured(LAYERWISE, tmp_path / "ckpt", tmp_path / "again")
    print(f"export with the layerwise gate: peak {peak / GIB:.2f} GiB")
    assert peak <= shards
