"""PPO by two processes of one program: they sample in lockstep, and as one process does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.generate.serve_command import write_model

ROOT = Path(__file__).parents[2]
MESH = {"data": 2, "fsdp": 1, "tensor": 2}


def run_ppo(folder: Path, model: Path, problems: Path, processes: int) -> tuple[list, list]:
    """Rollouts and metrics of two iterations on four devices."""
    folder.mkdir()
    values = {
        "kind": "ppo",
        "folder": str(folder / "out"),
        "model": str(model),
        "problems": str(problems),
        "mesh": MESH,
        "length": 96,
        "iterations": 2,
        "rollouts": 8,
        "max_new_tokens": 40,
        "temperature": 1.0,
        "ppo_epochs": 1,
        "optimizer": {"learning_rate": 1e-3},
    }
    config = folder / "ppo.yaml"
    config.write_text(yaml.safe_dump(values))
    devices = str(4 // processes)
    launch = [sys.executable, str(ROOT / "launch/local"), "--devices-per-process", devices]
    command = [*launch, "-n", str(processes), "--", sys.executable, "-m", "medreason_jax.cli"]
    subprocess.run([*command, "ppo", str(config)], check=True, cwd=ROOT)
    return tuple(
        [json.loads(line) for line in (folder / "out" / name).read_text().splitlines()]
        for name in ("rollouts.jsonl", "metrics.jsonl")
    )


def test_two_processes_sample_and_learn_like_one(chat_tokenizer, tmp_path):
    model = write_model(tmp_path / "model", chat_tokenizer)
    problems = tmp_path / "problems.jsonl"
    records = [
        {"id": f"p{n}", "question": f"drug {n}: how often?", "answer": f"{n} times"}
        for n in range(12)
    ]
    problems.write_text("".join(json.dumps(record) + "\n" for record in records))
    one, two = (run_ppo(tmp_path / str(n), model, problems, n) for n in (1, 2))
    same = [a["text"] == b["text"] for a, b in zip(one[0], two[0], strict=True) if a["step"] == 1]
    assert same == [True] * 8
    assert [m["step"] for m in two[1]] == [1, 2]
    first, other = one[1][0], two[1][0]
    assert other["loss"] == pytest.approx(first["loss"], rel=1e-3, abs=1e-5)
    assert other["entropy"] == pytest.approx(first["entropy"], rel=1e-4)
    assert max(m["sampler_gap"] for m in (*one[1], *two[1])) < 1e-4
