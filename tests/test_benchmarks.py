"""The GPU benchmark with small shapes on a CPU: it runs, goes on where it was cut, and tells."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(out: Path, *arguments: str) -> str:
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(out), "--tiny", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_parts_are_measured_once_and_failures_are_figures(tmp_path):
    said = run(tmp_path, "--parts", "ceilings,head,attention,adapters,decode_0.5B")
    figures = [json.loads(line) for line in (tmp_path / "attention.jsonl").open()]
    by_kernel = {f["figure"].split(",")[0]: f for f in figures}
    assert by_kernel["attention xla"]["unit"] == "ms"
    assert "cuDNN" in by_kernel["attention cudnn causal"]["failed"]
    assert "| train 7B lora; 384 tokens a step |" in said
    assert "| 14110 | 18000 |" in said
    head = tmp_path / "head.jsonl"
    whole = head.read_text().splitlines(keepends=True)
    head.write_text("".join(whole[:2]) + whole[2][:20])  # cut while it wrote
    said = run(tmp_path, "--parts", "head")
    measured = [line for line in said.splitlines() if line.startswith("head: head")]
    assert len(measured) == len(whole) - 2
    assert [f["figure"] for f in map(json.loads, head.read_text().splitlines())] == [
        json.loads(line)["figure"] for line in whole
    ]


def test_an_unknown_part_is_refused(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path), "--parts", "tensors"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'tensors' is none of ceilings, attention" in done.stderr
