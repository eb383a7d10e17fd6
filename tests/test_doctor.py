"""`medreason doctor` on this machine, and with a kernel that is wrong."""

import json

import jax.numpy as jnp
import pytest

from medreason_jax import doctor
from medreason_jax.cli import run_arguments
from medreason_jax.qwen2.attention import Kernel, xla_attention
from medreason_jax.qwen2.decode_attention import DecodeKernel, pallas_decode


def test_every_kernel_is_tried_and_the_one_that_auto_takes_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "HOST", "localhost.invalid")
    run_arguments(["doctor", str(tmp_path / "not" / "yet"), "--json"])
    records = {r["check"]: r for r in json.loads(capsys.readouterr().out)}
    xla = records["attention xla, head 64, float32"]
    assert xla["ok"] is True and "auto takes it" in xla["note"]
    assert records["attention splash, head 128, bfloat16"]["found"] == "not for this platform"
    assert records["decode attention xla, head 64, bfloat16"]["ok"] is True
    assert "8 x cpu" in records["devices"]["found"]
    assert records["network"]["ok"] is None and "out of reach" in records["network"]["found"]


def test_a_wrong_kernel_fails_the_command(monkeypatch, capsys, tmp_path):
    def drops_segments(q, k, v, queries, keys):
        ones = lambda places: places.replace(segments_BT=jnp.ones_like(places.segments_BT))  # noqa: E731
        return xla_attention(q, k, v, ones(queries), ones(keys))

    wrong = Kernel("xla", drops_segments)
    monkeypatch.setattr(doctor, "choose_kernel", lambda *arguments: wrong)
    monkeypatch.setattr(doctor, "HOST", "localhost.invalid")
    with pytest.raises(SystemExit, match="1"):
        run_arguments(["doctor", str(tmp_path)])
    assert "FAILS" in capsys.readouterr().out


def test_a_kernel_that_does_not_compile_is_a_line_and_fails_where_nothing_stands_in(monkeypatch):
    def broken(q, k, v, queries, keys):
        raise NotImplementedError("no such instruction\nand more")

    monkeypatch.setattr(doctor, "choose_kernel", lambda *arguments: Kernel("xla", broken))
    records = doctor._kernels()
    assert all(r["note"] == "no such instruction" for r in records)
    assert [r["ok"] for r in records] == 4 * [False, None, None, None]  # xla is the last of a CPU's


@pytest.mark.parametrize("attend", [pallas_decode, lambda q, k, v, lengths: 2 * q])
def test_a_decode_kernel_that_fails_is_told_and_no_failure(attend, monkeypatch):
    """An engine takes the plain twin in its place."""
    kernel = DecodeKernel("pallas", attend, by_length=True)
    monkeypatch.setattr(doctor, "decode_kernel", lambda *arguments: kernel)
    records = doctor._decode_kernels()
    assert all(r["ok"] is None and "xla is used" in r["note"] for r in records)
