"""Manifests and JSON files that are not what they should be are one line each."""

import pytest

from medreason_jax.manifest import model_folder, read_json_object, write_json


def test_a_manifest_without_a_model_is_refused(tmp_path):
    write_json(tmp_path / "manifest.json", {"kind": "eval"})
    with pytest.raises(ValueError, match="names no model"):
        model_folder(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_a_file_that_holds_no_json_object_is_named(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json"):
        read_json_object(path, "a thing")
    with pytest.raises(FileNotFoundError, match="a thing is needed"):
        read_json_object(tmp_path / "y.json", "a thing")
