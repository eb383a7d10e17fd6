"""Reading the JSON Lines files of a run, also while it still writes them."""

import json
from pathlib import Path


def read_rows(path: Path) -> list[dict[str, object]]:
    """Rows of a file that may be absent; a last line without its newline is still being written."""
    if not path.exists():
        return []
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error.msg}") from error
    return rows
