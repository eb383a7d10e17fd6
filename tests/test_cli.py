"""Bad input at the command line: one line on stderr, exit code 2, nothing half-written."""

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medreason_jax.cli import exit_code_of, run_arguments
from tests.test_config import STAGE, recipe


def run(arguments, capsys):
    code = exit_code_of(lambda: run_arguments(arguments))
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return code, error


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_a_missing_file_is_named(capsys, tmp_path):
    code, error = run(["run", str(tmp_path / "nothing.yaml")], capsys)
    assert code == 2 and "nothing.yaml" in error


def test_an_unknown_field_is_named_with_the_nearest(capsys, tmp_path):
    path = write(tmp_path / "r.yaml", recipe(sed=1))
    code, error = run(["run", path], capsys)
    assert code == 2 and "'sed'" in error and "'seed'" in error


def test_an_unknown_command_is_one_line(capsys):
    code, error = run(["rum"], capsys)
    assert code == 2 and "rum" in error


def test_a_mesh_that_does_not_match_is_refused(capsys, tmp_path):
    (tmp_path / "model").mkdir()
    values = {
        **STAGE,
        "folder": str(tmp_path / "f"),
        "model": str(tmp_path / "model"),
        "mesh": {"fsdp": 3},
    }
    code, error = run(["sft", write(tmp_path / "s.yaml", values)], capsys)
    assert code == 2 and "fsdp=3" in error and "found 8" in error
    assert not (tmp_path / "f").exists()


def test_a_missing_model_is_named(capsys, tmp_path):
    values = {**STAGE, "folder": str(tmp_path / "f"), "model": str(tmp_path / "none")}
    code, error = run(["sft", write(tmp_path / "s.yaml", values)], capsys)
    assert code == 2 and str(tmp_path / "none") in error


@pytest.mark.parametrize("kind", ["cpt", "ppo"])
def test_a_config_of_another_stage_is_refused(capsys, tmp_path, kind):
    code, error = run([kind, write(tmp_path / "s.yaml", STAGE)], capsys)
    assert code == 2 and "'sft'" in error and repr(kind) in error


SHORT = str(Path(__file__).parents[1] / "configs/recipes/formulary_short.yaml")


def test_a_run_folder_in_use_is_refused_with_host_and_pid(capsys, tmp_path):
    root = tmp_path / "formulary_short"
    root.mkdir()
    with (root / "lock").open("w") as held:
        held.write("host here pid 42")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        code, error = run(["run", SHORT, f"--set=runs={tmp_path}"], capsys)
    assert code == 2 and "host here pid 42" in error
    assert [p.name for p in root.iterdir()] == ["lock"]


def test_a_bad_setting_of_a_late_stage_is_refused_before_anything_runs(capsys, tmp_path):
    arguments = ["run", SHORT, f"--set=runs={tmp_path}", "--set=stages.ppo.settings.gama=1"]
    code, error = run(arguments, capsys)
    assert code == 2 and "gama" in error and "'gamma'" in error
    assert not any(tmp_path.iterdir())


def test_a_recipe_by_several_processes_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDREASON_COORDINATOR", "127.0.0.1:1")
    code, error = run(["run", SHORT, f"--set=runs={tmp_path}"], capsys)
    assert code == 2 and "one process" in error


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.sizes.hiden_size=3", ["hiden_size", "hidden_size"]),
        ("model.sizes.num_key_value_heads=3", ["num_key_value_heads=3"]),
        ("stages.cpt.settings.folder=x", ["folder", "recipe itself"]),
        ("stages.cpt.settings.preference={}", ["preference", "kind cpt"]),
        ("stages.cpt.settings.batch_rows=3", ["cpt", "3", "8"]),
        ("stages.cpt.name=data", ["'data'", "reserved"]),
        ("stages.ppo.settings.length=20", ["length=20", "max_new_tokens=24"]),
        ("data_gen.teacher=[]", ["data_gen.teacher"]),
        ("evaluation.slots=0", ["slots"]),
        ("seed=[", ["seed", "'['"]),
        ("tokenizer.folder=nowhere", ["tokenizer"]),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_anything_is_written(
    capsys, tmp_path, override, words
):
    code, error = run(["run", SHORT, f"--set=runs={tmp_path}", f"--set={override}"], capsys)
    assert code == 2 and all(word in error for word in words), error
    assert not any(tmp_path.iterdir())


def test_a_teacher_that_is_down_is_one_line_and_a_failure(tmp_path):
    settings = {
        "name": "down",
        "runs": str(tmp_path),
        "data_gen.teacher": '{reasoner: {base_url: "http://127.0.0.1:9/v1", model: m}}',
        "data_gen.retries": "{attempts: 2, first_wait: 0.01}",
    }
    overrides = [f"--set={name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "medreason_jax.cli", "run", SHORT, *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "127.0.0.1:9" in line]
    assert done.returncode == 1 and len(said) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "down" / "data" / "manifest.json").exists()


def test_a_missing_extra_is_named(capsys):
    def call():
        raise ModuleNotFoundError("No module named 'jax'", name="jax")

    assert exit_code_of(call) == 1
    assert "jax is not installed" in capsys.readouterr().err
