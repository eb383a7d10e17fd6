"""An import by two processes: each reads its half, and the checkpoint is that of one process."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from medreason_jax.config import MeshConfig
from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.tokenizer_training import train_tokenizer
from medreason_jax.qwen2.load import load_model

torch = pytest.importorskip("torch", reason="the export extra (torch, transformers) is missing")

from tests.reference.models import in_type, rough_reference  # noqa: E402

ROOT = Path(__file__).parents[1]
FIELDS = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "vocab_size": 512,
    "tie_word_embeddings": False,
}


def test_two_processes_read_half_each_and_write_one_checkpoint(tmp_path):
    in_type(rough_reference(FIELDS), torch.bfloat16).save_pretrained(tmp_path / "hf")
    train_tokenizer(["Velotan is given 2 times a day."] * 20, 320, "", tmp_path / "tokenizer")
    ChatTokenizer(tmp_path / "tokenizer").save(tmp_path / "hf")
    launch = [sys.executable, str(ROOT / "launch/local"), "--devices-per-process", "2", "-n", "2"]
    command = [sys.executable, "-m", "medreason_jax.cli", "import"]
    done = subprocess.run(
        [*launch, "--", *command, str(tmp_path / "hf"), str(tmp_path / "ckpt")],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    read = {
        number: float(part) / float(whole)
        for number, part, whole in re.findall(r"\[(\d)\] read +(\d+) of (\d+) bytes", done.stdout)
    }
    assert set(read) == {"0", "1"}, done.stdout
    assert max(read.values()) <= 0.6 and sum(read.values()) == pytest.approx(1.0, abs=0.02)
    ours = load_model(tmp_path / "ckpt", MeshConfig(data=-1), "float32")
    theirs = load_model(tmp_path / "hf", MeshConfig(data=-1), "float32")
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
