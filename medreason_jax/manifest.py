"""The manifest of a finished step: written last, read by the steps that start from it.

And how this and every other JSON file of a run or a model is read and written.
"""

import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; one line that names the file when there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {what} is needed there")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{path} is not JSON ({error}); {what} is needed there") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {str(values)[:40]!r}, not a JSON object: {what}")
    return values


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage, None when it is not finished."""
    path = folder / MANIFEST
    return read_json_object(path, "a step's manifest") if path.is_file() else None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)


def model_folder(folder: Path) -> Path:
    """The model of a stage's folder, by its manifest; any other folder is the model itself."""
    manifest = read_manifest(folder)
    if manifest is None:
        return folder
    if "model" not in manifest or not isinstance(manifest["model"], str):
        raise ValueError(
            f"{folder / MANIFEST} names no model; give the folder of a stage that trains one, or "
            "a model's own folder"
        )
    return folder / manifest["model"]
