"""What one GPU does, beside its floor and beside the peers on the same card, as one table.

    python benchmarks/gpu.py --out results [--parts ceilings,attention,...] [--tiny]

Every part is a process of its own (memory is given back) of at most nine minutes, and writes each
figure to OUT/<part>.jsonl as it has it: a part that was cut off goes on after its last figure, and
what failed is a figure with its reason. The table is printed from all that lies in OUT. `--tiny`
runs the same parts with small shapes on whatever device is there: to see that they run.

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

# (figure, bar, stretch): of the figures of one H200; larger is better but for milliseconds.
BARS = (
    ("train 7B", "tok/s", 11_000, 13_200),
    ("train 1.5B", "tok/s", 45_000, 52_000),
    ("train 0.5B", "tok/s", 110_000, 130_000),
    ("train 7B lora", "tok/s", 14_110, 18_000),
    ("head 8192x4096x131072", "ms", 50.4, 44.0),
    ("decode 7B, batch 256", "tok/s", 14_000, 17_000),
    ("decode 1.5B, batch 256", "tok/s", 50_000, None),
    ("decode 0.5B, batch 256", "tok/s", 100_000, None),
    ("ppo 1.5B", "samples/s", 12, 18),
)


def run_part(name: str, out: Path, tiny: bool) -> None:
    """In this process: figures that are in OUT already are not measured again."""
    path = out / f"{name}.jsonl"
    known = read(path)
    done = {record["figure"] for record in known}
    path.write_text("".join(json.dumps(record) + "\n" for record in known), encoding="utf-8")
    scale = gpu_parts.scale(tiny, read(out / "ceilings.jsonl"))
    with path.open("a", encoding="utf-8") as file:
        for figure, measure in PARTS[name](scale):
            if figure in done:
                continue
            begun = time.perf_counter()
            try:
                record = measure()
            except ImportError as missing:
                record = {"failed": f"not installed: {missing.name or missing}"}
            except Exception as failure:  # out of memory, no such kernel: a figure too
                reason = " ".join(str(failure).replace("|", "/").split())[:200]
                record = {"failed": f"{type(failure).__name__}: {reason}"}
            record = {"figure": figure, **record, "took": round(time.perf_counter() - begun, 1)}
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(f"{name}: {line_of(record)}", flush=True)


def run_all(names: list[str], out: Path, tiny: bool, limit: int) -> None:
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "JAX_COMPILATION_CACHE_DIR": str(out / "compile_cache"),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    for name in names:
        command = [sys.executable, __file__, "--part", name, "--out", str(out)]
        try:
            subprocess.run(
                [*command, *(["--tiny"] if tiny else [])], env=environment, timeout=limit
            )
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {limit} s; the same command goes on with it", flush=True)


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
    bars = {(figure, unit): rest for figure, unit, *rest in BARS}
    rows = ["| figure | measured | of its floor | best, worst | bar | stretch | more |"]
    rows.append("|---|---:|---:|---|---:|---:|---|")
    for name in PARTS:
        for record in read(out / f"{name}.jsonl"):
            if "failed" in record:
                rows.append(
                    f"| {record['figure']} | - | | | | | {record['failed'].replace('|', '/')} |"
                )
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
            key = next((k for k in bars if record["figure"].split(";")[0] == k[0]), None)
            bar, stretch = bars[key] if key is not None else ("", "")
            value = f"{record['value']:,.4g} {record['unit']}" if "value" in record else ""
            cells = (record["figure"], value, share, times, bar, stretch or "", more)
            rows.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds of a part")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        parser.error(f"--parts {unknown[0]!r} is none of {', '.join(PARTS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.part is not None:
        run_part(arguments.part, arguments.out, arguments.tiny)
        return
    run_all(names, arguments.out, arguments.tiny, arguments.limit)
    rows = "\n".join(table(arguments.out))
    (arguments.out / "table.md").write_text(rows + "\n", encoding="utf-8")
    print(rows)


if __name__ == "__main__":
    main()
