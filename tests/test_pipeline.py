"""`medreason run` in small: it ends, repeats nothing, and survives being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTROLS = ["no_cpt", "rpo_longer", "sft_longer", "dpo"]


def command(runs: Path, recipe: str = "formulary_short", **settings) -> list[str]:
    overrides = [f"--set={name}={value}" for name, value in settings.items()]
    path = str(ROOT / f"configs/recipes/{recipe}.yaml")
    return [
        sys.executable,
        "-m",
        "medreason_jax.cli",
        "run",
        path,
        f"--set=runs={runs}",
        *overrides,
    ]


def environment(devices: int = 1) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    kept = {name: value for name, value in os.environ.items() if name != "NPROC"}
    threads = {"NPROC": str(4 * devices)} if devices > 1 else {}
    return {**kept, **threads, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def finish(arguments: list[str], devices: int = 1) -> str:
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment(devices), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def table(root: Path) -> list[dict]:
    """The summary's rows of the recipe's own stages, without their clocks."""
    rows = json.loads((root / "summary.json").read_text())["stages"]
    own = [row for row in rows if not row.get("control")]
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in own]


def kill_when(arguments: list[str], event: Callable[[], bool], delay: float) -> bool:
    """SIGKILL a run (not its children) `delay` s after the event; False if it ended before."""
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None:
            if event():
                time.sleep(delay)
                process.kill()
                process.wait()
                return True
            time.sleep(0.05)
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("reference")
    out = finish(command(runs))
    root = runs / "formulary_short"
    assert str(root / "report" / "index.html") in out and str(root / "export" / "model") in out
    return root


def test_every_stage_leaves_its_row_and_the_export_opens(reference):
    rows = table(reference)
    assert [row["name"] for row in rows] == ["data", "cpt", "sft", "rpo", "ppo", "export"]
    for row in rows[1:-1]:
        assert row["n"] == 8 and 0 <= row["ci95"][0] <= row["accuracy"] <= row["ci95"][1] <= 1
        assert {"new_combination", "new_product", "text_only"} <= set(row["parts"])
        assert 0 <= row["accuracy_sampled"] <= 1
    for name, every in (("sft", 3), ("ppo", 2)):
        metrics = [json.loads(r) for r in (reference / name / "metrics.jsonl").open()]
        measured = [m for m in metrics if "dev_accuracy" in m]
        assert [m["step"] for m in measured] == [every, 2 * every]
        assert all(0 <= m["dev_accuracy_sampled"] <= 1 for m in measured)
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["parity"]["logit_error"] < 1e-4
    assert Path(summary["report"]).is_file() and (Path(summary["export"]) / "config.json").is_file()


def test_a_second_run_repeats_nothing(reference):
    manifests = {p: p.stat().st_mtime_ns for p in reference.rglob("manifest.json")}
    start = time.monotonic()
    finish(command(reference.parent))
    assert {p: p.stat().st_mtime_ns for p in reference.rglob("manifest.json")} == manifests
    assert time.monotonic() - start < 60


def test_a_finished_step_contradicts_a_changed_recipe(reference):
    for name, value in (("formulary.seed", 5), ("stages.sft.settings.steps", 7)):
        arguments = [*command(reference.parent), f"--set={name}={value}"]
        done = subprocess.run(
            arguments, cwd=ROOT, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 2 and name.split(".")[-1 if "steps" in name else 0] in done.stderr


def test_controls_are_run_when_asked_for_and_compared(reference):
    before = json.loads((reference / "summary.json").read_text())
    finish([*command(reference.parent), "--controls"])
    summary = json.loads((reference / "summary.json").read_text())
    rows = {row["name"]: row for row in summary["stages"]}
    assert [name for name, row in rows.items() if row.get("control")] == CONTROLS
    pairs = {(row["stage"], row["against"]) for row in summary["comparisons"]}
    stages = {("sft", "cpt"), ("rpo", "sft"), ("ppo", "rpo")}
    assert pairs == stages | {
        ("sft", "no_cpt"),
        ("ppo", "rpo_longer"),
        ("ppo", "sft_longer"),
        ("rpo", "dpo"),
    }
    assert {row["form"] for row in summary["comparisons"]} == {"answer_only", "explain", "sampled"}
    assert [row["stage"] for row in summary["gaps"]] == ["cpt", "sft", "rpo", "ppo"]
    assert set(summary["facts_recited"]) == {"cpt", "sft", "rpo", "ppo", *CONTROLS}
    # the longer control had as many steps as fill PPO's seconds at RPO's pace
    ppo, longer = (
        json.loads((reference / name / "manifest.json").read_text())
        for name in ("ppo", "rpo_longer")
    )
    speed = (reference / "rpo" / "speed.jsonl").read_text().splitlines()
    paces = sorted(json.loads(line)["step_seconds"] for line in speed)
    least, most = (ppo["seconds"] / pace for pace in (paces[-1], paces[0]))
    assert least <= longer["steps"] <= most + 1
    finish(
        [*command(reference.parent), "--controls"]
    )  # again: nothing is done twice, and nothing lost
    assert json.loads((reference / "summary.json").read_text()) == summary
    finish(command(reference.parent))
    assert json.loads((reference / "summary.json").read_text()) == summary
    own = [row for row in summary["stages"] if not row.get("control")]
    assert (own, summary["gaps"]) == (before["stages"], before["gaps"])


def test_the_recipe_runs_on_eight_devices(tmp_path):
    finish(command(tmp_path, **{"mesh.fsdp": 2}), devices=8)
    summary = json.loads((tmp_path / "formulary_short" / "summary.json").read_text())
    assert summary["parity"]["logit_error"] < 1e-4


def killed_run(runs: Path, events: list[Callable[[], bool]]) -> list[bool]:
    return [kill_when(command(runs), event, 0.1 * n) for n, event in enumerate(events)]


def test_a_killed_run_goes_on_to_the_same_table(reference, tmp_path):
    root = tmp_path / "formulary_short"
    events = [
        lambda: (root / "data/generated/journal.sqlite").is_file(),
        lambda: lines(root / "sft/metrics.jsonl") >= 3,
        lambda: lines(root / "ppo/metrics.jsonl") >= 2,
    ]
    assert killed_run(tmp_path, events) == [True, True, True]
    finish(command(tmp_path))
    assert table(root) == table(reference)
    for stage in ("sft", "ppo"):
        assert (root / stage / "metrics.jsonl").read_text() == (
            reference / stage / "metrics.jsonl"
        ).read_text()


@pytest.mark.kill
@pytest.mark.timeout(3000)
def test_a_run_killed_in_every_stage_goes_on_to_the_same_table(reference, tmp_path):
    root = tmp_path / "formulary_short"
    events = [
        lambda: (root / "data/generated").is_dir(),
        lambda: (root / "base").is_dir(),
        lambda: lines(root / "cpt/metrics.jsonl") >= 3,
        lambda: (root / "cpt/manifest.json").is_file(),
        lambda: any((root / "sft").glob("states/*tmp*")) or lines(root / "sft/metrics.jsonl") >= 5,
        lambda: (root / "rpo/candidates.jsonl").is_file(),
        lambda: lines(root / "rpo/metrics.jsonl") >= 1,
        lambda: lines(root / "ppo/rollouts.jsonl") >= 20,
        lambda: (root / "export/model.partial").is_dir() or (root / "export/model").is_dir(),
    ]
    assert sum(killed_run(tmp_path, events)) >= 8
    finish(command(tmp_path))
    assert table(root) == table(reference)


MEDICAL = {
    "question_bank.questions": 40,
    "question_bank.documents": 12,
    "stages.ppo.settings.iterations": 1,
    "evaluation.max_new_tokens": 6,
    "evaluation.answer_only_tokens": 3,
}


def test_the_recipe_runs_on_real_text_with_the_real_vocabulary(real_data, tmp_path):
    finish(command(tmp_path, "medical_smoke", **MEDICAL))
    root = tmp_path / "medical_smoke"
    summary = json.loads((root / "summary.json").read_text())
    assert summary["not_for_reporting"] is True
    assert all(row["n"] >= 5 for row in summary["stages"][1:-1])
    assert "Not for reporting" in (root / "export/model/README.md").read_text()
    assert summary["parity"]["logit_error"] < 1e-4
