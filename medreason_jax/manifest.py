"""The manifest of a finished step: written last, read by the steps that start from it."""

import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage, None when it is not finished."""
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)


def model_folder(folder: Path) -> Path:
    """The model of a stage's folder, by its manifest; any other folder is the model itself."""
    manifest = read_manifest(folder)
    return folder if manifest is None else folder / manifest["model"]
