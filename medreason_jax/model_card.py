"""The README.md of an exported model: what it was made from, with hashes of recipes and data."""

import hashlib
from pathlib import Path
from typing import Any

from medreason_jax.manifest import read_manifest


def model_card(source: Path, title: str, note: str = "") -> str:
    """A card of the model in `source`: its stages back to the base model, newest last.

    A stage's recipe hash is that of its resolved `config.yaml`; a source of data carries the
    fingerprint of its prepared rows.
    """
    stages = lineage(source)
    lines = [f"# {title}", ""]
    lines += [note, ""] if note else []
    lines += ["Qwen2.5 architecture, written by medreason.", ""]
    if stages:
        lines += ["| stage | steps | recipe (sha256) | data |", "|---|---:|---|---|"]
        lines += [stage_row(folder, manifest) for folder, manifest in stages]
        first, manifest = stages[0]
        if "parent" in manifest:
            lines += ["", f"Before `{first.name}`: {manifest['parent']}, not a stage of this run."]
    return "\n".join([*lines, ""])


def lineage(source: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, manifest) of every stage that led to the model in `source`, the first one first."""
    stages: list[tuple[Path, dict[str, Any]]] = []
    folder, seen = source.resolve(), set()
    while folder not in seen and (manifest := read_manifest(folder)) is not None:
        seen.add(folder)
        stages.append((folder, manifest))
        if "parent" not in manifest:
            break
        folder = (folder / manifest["parent"]).resolve()
    return stages[::-1]


def stage_row(folder: Path, manifest: dict[str, Any]) -> str:
    config = folder / "config.yaml"
    recipe = hashlib.sha256(config.read_bytes()).hexdigest()[:16] if config.is_file() else ""
    steps = manifest["steps"] if "steps" in manifest else ""
    data = "; ".join(data_text(facts) for facts in manifest["data"]) if "data" in manifest else ""
    return f"| {folder.name} ({manifest['kind']}) | {steps} | {recipe} | {data} |"


def data_text(facts: dict[str, Any]) -> str:
    return f"{facts['source']}: {facts['items']} items, {facts['fingerprint']}"
