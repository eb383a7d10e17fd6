"""`medreason doctor`: versions, devices, attention kernels, disk and network of this machine."""

import os
import platform
import shutil
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from medreason_jax.mesh import HeadShards, make_mesh
from medreason_jax.qwen2.attention import (
    KERNELS,
    KernelName,
    choose_kernel,
    kernel_names,
    self_test,
    tolerance,
)
from medreason_jax.qwen2.decode_attention import TEST_SIZES, XLA_DECODE, DecodeKernel, decode_kernel
from medreason_jax.qwen2.decode_attention import self_test as test_decoding

PACKAGES = (
    *("medreason", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "optax"),
    *("orbax-checkpoint", "grain", "safetensors", "tokenizers", "transformers", "torch", "peft"),
)
HEAD_DIMS = (64, 128)
HOST, SECONDS = "huggingface.co", 2.0


def examine(folder: Path) -> list[dict[str, Any]]:
    """One record a check: {check, found, ok, note}; ok is None where nothing can be wrong."""
    devices = _devices()
    kernels = [] if devices[0]["ok"] is False else [*_kernels(), *_decode_kernels()]
    return [*_versions(), *_machine(folder), *devices, *kernels, _network()]


def record(check: str, found: str, ok: bool | None = None, note: str = "") -> dict[str, Any]:
    return {"check": check, "found": found, "ok": ok, "note": note}


def _versions() -> list[dict[str, Any]]:
    found = [record("python", platform.python_version())]
    for name in PACKAGES:
        try:
            found.append(record(name, version(name)))
        except PackageNotFoundError:
            found.append(record(name, "not installed"))
    return found


def _machine(folder: Path) -> list[dict[str, Any]]:
    while not folder.exists():
        folder = folder.parent
    disk, memory = shutil.disk_usage(folder), psutil.virtual_memory()
    return [
        record("cores", str(os.cpu_count())),
        record("memory", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"),
        record(
            "disk",
            f"{disk.free / 1e9:.1f} of {disk.total / 1e9:.1f} GB free",
            disk.free > 10e9,
            f"at {folder}; a 7B training state is about 110 GB",
        ),
    ]


def _devices() -> list[dict[str, Any]]:
    try:
        devices = jax.devices()
    except RuntimeError as failure:
        return [record("devices", "none", False, str(failure).split("\n")[0][:200])]
    found = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    note = "" if devices[0].platform != "cpu" else "no accelerator: extras gpu and tpu add one"
    processes = record("processes", str(jax.process_count()))
    return [record("devices", found, None, note), processes]


def _kernels() -> list[dict[str, Any]]:
    """Every kernel's self-test, forward and backward, at both head sizes of Qwen2.5."""
    target, shards = jax.devices()[0].platform, HeadShards(make_mesh(-1, 1, 1))
    found = []
    for head_dim in HEAD_DIMS:
        for dtype in (jnp.float32, jnp.bfloat16):
            order = list(kernel_names(target, head_dim, dtype))  # as `auto` tries them
            names: list[KernelName] = [*order, *(name for name in KERNELS if name not in order)]
            taken = False
            for name in names:
                last = name == order[-1]  # nothing stands in for it
                line = _kernel(name, target, head_dim, dtype, shards, must_pass=last)
                if line["ok"] and not taken:
                    notes = ["attention: auto takes it", line["note"]]
                    taken, line["note"] = True, "; ".join(filter(None, notes))
                found.append(line)
    return found


def _kernel(
    name: KernelName, target: str, head_dim: int, dtype, shards, must_pass: bool
) -> dict[str, Any]:
    check = f"attention {name}, head {head_dim}, {jnp.dtype(dtype).name}"
    try:
        kernel = choose_kernel(name, target, head_dim, dtype, shards)
    except ValueError as error:
        return record(check, "not for this platform", None, str(error))
    precision = "highest" if dtype == jnp.float32 else None  # as models are run
    try:
        with jax.default_matmul_precision(precision):
            error = self_test(kernel, heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype)
    except Exception as failure:  # the compiler's own errors: what the command is there to show
        why = str(failure).split("\n")[0][:200]
        return record(check, "does not run", False if must_pass else None, why)
    passed = error <= tolerance(dtype)
    note = kernel.note or ""
    return record(check, f"error {error:.1e}", passed if passed or must_pass else None, note)


def _decode_kernels() -> list[dict[str, Any]]:
    """The decode attention of this platform; one that fails is replaced where an engine starts."""
    target, shards = jax.devices()[0].platform, HeadShards(make_mesh(-1, 1, 1))
    return [
        _decode_kernel(decode_kernel(target, head_dim, shards), head_dim, dtype)
        for head_dim in HEAD_DIMS
        for dtype in (jnp.float32, jnp.bfloat16)
    ]


def _decode_kernel(kernel: DecodeKernel, head_dim: int, dtype) -> dict[str, Any]:
    check = f"decode attention {kernel.name}, head {head_dim}, {jnp.dtype(dtype).name}"
    must_pass = kernel is XLA_DECODE  # nothing stands in for it
    try:
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
            error = max(test_decoding(kernel, 4, 2, head_dim, dtype, S) for S in TEST_SIZES)
    except Exception as failure:
        why = str(failure).split("\n")[0][:200]
        return record(check, "does not run", False if must_pass else None, f"xla is used; {why}")
    passed = error <= tolerance(dtype)
    note = "" if passed else "xla is used"
    return record(check, f"error {error:.1e}", passed if passed or must_pass else None, note)


def _network() -> dict[str, Any]:
    try:
        socket.create_connection((HOST, 443), timeout=SECONDS).close()
    except OSError as error:
        note = f"{error}; only hub names of models and datasets need it"
        return record("network", f"{HOST} is out of reach", None, note)
    return record("network", f"{HOST} answers")


def table(records: list[dict[str, Any]]) -> str:
    marks = {True: "ok", False: "FAILS", None: ""}
    width = max(len(r["check"]) for r in records)
    lines = [
        f"{r['check']:<{width}}  {marks[r['ok']]:<5}  {r['found']}"
        + (f"  ({r['note']})" if r["note"] else "")
        for r in records
    ]
    return "\n".join(lines)
