"""SFT by two processes of one program: the same rows, the same losses as one process."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml

from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.tokenizer_training import train_tokenizer
from medreason_jax.qwen2.folder import Description, save_model
from medreason_jax.qwen2.model import init_params
from medreason_jax.qwen2.sizes import read_sizes
from tests.tiny import FIELDS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    train_tokenizer(["Velotan is given 2 times a day."] * 20, 320, "", folder / "tokenizer")
    tokenizer = ChatTokenizer(folder / "tokenizer")
    sizes = read_sizes({**FIELDS, "vocab_size": tokenizer.vocab_size})
    save_model(folder, init_params(sizes, jax.random.key(0)), Description(sizes), tokenizer)
    records = [
        {
            "messages": [{"role": "user", "content": f"How often is drug {n} given?"}],
            "thinking": f"It is {n}.",
            "response": f"{n} times",
        }
        for n in range(40)
    ]
    (folder / "sft.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def config(base: Path, folder: Path) -> Path:
    values = {
        "kind": "sft",
        "folder": str(folder),
        "model": str(base),
        "length": 128,
        "batch_rows": 4,
        "steps": 4,
        "checkpoint_every": 2,
        "sources": [{"path": str(base / "sft.jsonl"), "kind": "sft"}],
        "optimizer": {"learning_rate": 1e-3},
    }
    folder.mkdir()
    path = folder / "in.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_two_processes_train_like_one(base, tmp_path):
    medreason = [sys.executable, "-m", "medreason_jax.cli", "sft"]
    launch = [sys.executable, str(ROOT / "launch/local"), "--devices-per-process", "2"]
    one = config(base, tmp_path / "one")
    two = config(base, tmp_path / "two")
    subprocess.run([*launch, "-n", "1", "--", *medreason, str(one)], check=True, cwd=ROOT)
    subprocess.run([*launch, "-n", "2", "--", *medreason, str(two)], check=True, cwd=ROOT)
    assert len(losses(tmp_path / "one")) == 4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
