"""The metric log of a stage: JSON Lines that a resumed run continues without a seam."""

import json
import os
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


class MetricLog:
    """One line a step; on resume the lines after the checkpoint's step are cut off."""

    def __init__(self, folder: Path, resume_step: int, active: bool):
        self.file, self.board = None, None
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        truncate_after(path, resume_step)
        self.file = path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: dict[str, Any], pace: dict[str, Any]) -> None:
        """`values` go into the file and TensorBoard, `pace` (seconds and such) into the second."""
        if self.file is None or self.board is None:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in {**values, **pace}.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.file is not None and self.board is not None:
            self.file.close()
            self.board.close()


def truncate_after(path: Path, step: int) -> None:
    """Keep the records whose `step` is at most `step`; what a kill cut off at the end goes too."""
    if not path.is_file():
        return
    *whole, _cut_off = path.read_text(encoding="utf-8").split("\n")
    kept = [line + "\n" for line in whole if json.loads(line)["step"] <= step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)
