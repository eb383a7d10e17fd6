"""What one GPU does, beside its floor and beside the peers on the same card, as one table.

    python benchmarks/gpu.py --out results [--parts ceilings,attention,...] [--only TEXT] [--tiny]

Every part has processes of its own (memory is given back) and at most nine minutes, and writes each
figure to OUT/<part>.jsonl as it has it: a part that was cut off goes on after its last figure, and
what failed is a figure with its reason. The table is printed from all that lies in OUT. `--tiny`
runs the same parts with small shapes on whatever device is there: to see that they run. A folder
is for one card.

Random weights, real shapes. Peers that are not installed are said to be so.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import gpu_parts
import gpu_peers

LIMIT = 540  # seconds of a part
MORE = 3  # exit code of a part's process that leaves the rest to a new one
SIZES = ("7B", "1.5B", "0.5B")
PARTS = {
    "ceilings": gpu_parts.ceilings,
    "attention": gpu_parts.attention,
    "head": gpu_parts.head,
    **{f"train_{size}": partial(gpu_parts.train, size) for size in SIZES},
    "adapters": gpu_parts.adapters,
    **{f"decode_{size}": partial(gpu_parts.decode, size) for size in SIZES},
    "ppo": gpu_parts.ppo,
    "peers_train": gpu_peers.peers_train,
    "peers_decode": gpu_peers.peers_decode,
}

# Parts whose figures have a process each: whole models, and what changes its process for good.
APART = {name for name in PARTS if name.startswith(("train", "adapters", "decode", "peers"))}

# Bar and stretch of one H200, by what a figure's name begins with, in the figure's unit.
BARS: dict[str, tuple[float, float | None]] = {
    "train 7B": (11_000, 13_200),
    "train 1.5B": (45_000, 52_000),
    "train 0.5B": (110_000, 130_000),
    "train 7B lora": (14_110, 18_000),
    "head 8192x4096x131072": (50.4, 44.0),
    "decode 7B, batch 256": (14_000, 17_000),
    "decode 1.5B, batch 256": (50_000, None),
    "decode 0.5B, batch 256": (100_000, None),
    "ppo 1.5B": (12, 18),
}


def run_part(name: str, out: Path, tiny: bool, only: str) -> bool:
    """In this process: what is in OUT already is not measured again. Whether some may be left."""
    path, begun = out / f"{name}.jsonl", out / f"{name}.begun"
    known = read(path)
    if begun.is_file():
        failed = {"figure": begun.read_text(), "failed": "the process ended: a crash, or the limit"}
        known.append(failed)
    path.write_text("".join(json.dumps(record) + "\n" for record in known), encoding="utf-8")
    done = {record["figure"] for record in known}
    scale = gpu_parts.scale(tiny, read(out / "ceilings.jsonl"))
    for figure, measure in PARTS[name](scale):
        if figure in done or only not in figure:
            continue
        begun.write_text(figure)
        record = {"figure": figure, **measured(measure)}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        begun.unlink()
        print(f"{name}: {line_of(record)}", flush=True)
        if name in APART:
            return True
    return False


def measured(measure) -> dict[str, Any]:
    """What failed is a figure too: out of memory, a kernel that is not there."""
    begun = time.perf_counter()
    try:
        record = measure()
    except ModuleNotFoundError as missing:
        record = {"failed": f"not installed: {missing.name}"}
    except Exception as failure:
        record = {"failed": f"{type(failure).__name__}: {failure!s:.400}"}
    texts = {k: one_line(v) if isinstance(v, str) else v for k, v in record.items()}
    return {**texts, "took": round(time.perf_counter() - begun, 1)}


def one_line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def run_all(names: list[str], out: Path, tiny: bool, only: str, limit: float) -> None:
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "0",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.97",
        "JAX_COMPILATION_CACHE_DIR": str(out / "compile_cache"),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    for name in names:
        command = [sys.executable, __file__, "--part", name, "--out", str(out), "--only", only]
        command += ["--tiny"] if tiny else []
        ends = time.monotonic() + limit
        while time.monotonic() < ends:
            try:
                left = ends - time.monotonic()
                code = subprocess.run(command, env=environment, timeout=left).returncode
            except subprocess.TimeoutExpired:
                print(f"{name}: stopped after {limit} s; the same command goes on", flush=True)
                break
            if code == 0:
                break
            if code != MORE:
                print(f"{name}: its process ended with {code}", flush=True)
                if not (out / f"{name}.begun").is_file():  # not in a figure: it would again
                    break


def read(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: the last one may have been cut off."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def line_of(record: dict[str, Any]) -> str:
    if "failed" in record:
        return f"{record['figure']}: {record['failed']}"
    shown = [f"{name} {value}" for name, value in record.items() if name not in ("figure", "took")]
    return f"{record['figure']}: {', '.join(shown)}"


def table(out: Path) -> list[str]:
    """Markdown: every figure with its floor, its three times and, where there is one, its bar."""
    rows = ["| figure | measured | of its floor | best, worst | bar | stretch | more |"]
    rows.append("|---|---:|---:|---|---:|---:|---|")
    for part in PARTS:
        for record in read(out / f"{part}.jsonl"):
            if "failed" in record:
                rows.append(f"| {record['figure']} | - | | | | | {record['failed']} |")
                continue
            known = ("figure", "value", "unit", "floor", "times", "took")
            more = "; ".join(f"{k} {v}" for k, v in record.items() if k not in known)
            share = ""
            if "floor" in record:
                ratio = record["value"] / record["floor"]
                share = f"{ratio if record['unit'] != 'ms' else 1 / ratio:.0%}"
            times = (
                ", ".join(f"{1e3 * t:.4g} ms" for t in record["times"]) if "times" in record else ""
            )
            name = record["figure"].split(";")[0]
            bar, stretch = BARS[name] if name in BARS else ("", "")
            value = f"{record['value']:,.4g} {record['unit']}" if "value" in record else ""
            cells = (record["figure"], value, share, times, bar, stretch or "", more)
            rows.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--only", default="", help="figures with this text in their names")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a part")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        parser.error(f"--parts {unknown[0]!r} is none of {', '.join(PARTS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.part is not None:
        left = run_part(arguments.part, arguments.out, arguments.tiny, arguments.only)
        sys.exit(MORE if left else 0)
    kind = arguments.out / "shapes"
    shapes = "tiny" if arguments.tiny else "full"
    if kind.is_file() and kind.read_text() != shapes:
        parser.error(
            f"--out {arguments.out} holds figures of {kind.read_text()} shapes; name another"
        )
    kind.write_text(shapes)
    run_all(names, arguments.out, arguments.tiny, arguments.only, arguments.limit)
    rows = "\n".join(table(arguments.out))
    (arguments.out / "table.md").write_text(rows + "\n", encoding="utf-8")
    print(rows)


if __name__ == "__main__":
    main()
