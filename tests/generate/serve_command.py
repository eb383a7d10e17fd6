"""`medreason serve` in a process of its own, and a model folder for it."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.qwen2.folder import Description, save_model
from tests.tiny import tiny_model


def write_model(folder: Path, tokenizer: ChatTokenizer) -> Path:
    """A tiny model of ours; returns its folder."""
    _, network, params, _ = tiny_model(num_hidden_layers=2)
    save_model(folder, params, Description(network.sizes), tokenizer)
    return folder


@contextmanager
def served(folder: Path, *options: str):
    """(process, base URL) of a server on one CPU device; killed at the end if it still is there."""
    command = [sys.executable, "-m", "medreason_jax.cli", "serve", str(folder), "--port", "0"]
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        [*command, "--json", *options], env=kept | {"JAX_PLATFORMS": "cpu"}, **pipes
    )
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, json.loads(line)["base_url"]
    finally:
        process.kill()
        process.communicate()
