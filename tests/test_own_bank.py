"""A team's own bank, from a workbook to a Hugging Face folder, with the edits of its recipe."""

import json
from pathlib import Path

import openpyxl
import pytest
import yaml

from data_gen.cli import main
from data_gen.endpoints import run_simulated
from medreason_jax.data.tokenizer_training import train_tokenizer
from tests.test_pipeline import ROOT, command, finish

pytest.importorskip("torch", reason="the export extra (torch, transformers) is missing")
RECIPE = ROOT / "configs/recipes/own_bank.yaml"
DRUGS = ("Velotan", "Maridol", "Sorbex", "Tilazin", "Quenol", "Ristane")
SIGNS = ("a dry cough", "red eyes", "swollen ankles", "a slow pulse", "pale skin", "hot hands")
SMALL = {
    "mesh.fsdp": 1,
    "dtype": "float32",
    "stages.sft.settings.length": 512,
    "stages.sft.settings.batch_rows": 4,
    "stages.rpo.settings.length": 512,
    "stages.rpo.settings.batch_rows": 4,
    "stages.rpo.candidates.problems": 4,
    "stages.rpo.candidates.max_new_tokens": 16,
    "stages.ppo.settings.iterations": 1,
    "stages.ppo.settings.rollouts": 8,
    "stages.ppo.settings.length": 256,
    "stages.ppo.settings.max_new_tokens": 16,
    "evaluation.max_new_tokens": 16,
    "question_bank.test_share": 0.3,
}


def write_workbook(path: Path) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    sheet.append(["Stem", "A", "B", "C", "Key"])
    for i, drug in enumerate(DRUGS):
        for k, sign in enumerate(SIGNS):
            others = [DRUGS[(i + 1) % 6], DRUGS[(i + 2) % 6]]
            options = [*others[: k % 3], drug, *others[k % 3 :]][:3]
            stem = f"{sign.capitalize()} came {i + 2} days after a new medicine of class {i}{k}."
            sheet.append([f"{stem} Which medicine was it?", *options, "ABC"[options.index(drug)]])
    sheet.append(["What is shown in Figure 1? A drug of that class.", *DRUGS[:3], "A"])
    book.save(path)


def write_base(folder: Path) -> None:
    from tests.reference.models import rough_reference

    texts = [f"{drug} gave {sign}. ## Thinking\n" for drug in DRUGS for sign in SIGNS]
    train_tokenizer(texts, 360, "", folder)
    rough_reference({"vocab_size": 400}).save_pretrained(folder)


def edits() -> list[str]:
    """The lines that the recipe asks its user to edit, without their place in the file."""
    return [line for line in RECIPE.read_text().splitlines() if "# EDIT" in line]


def test_the_recipe_asks_for_three_edits():
    assert [line.strip().split(":")[0] for line in edits()] == ["path", "reasoner", "folder"]


@pytest.mark.slow
def test_three_edits_lead_from_a_workbook_to_a_model(tmp_path: Path, monkeypatch):
    write_workbook(tmp_path / "bank.xlsx")
    write_base(tmp_path / "base")
    check = ["check", str(tmp_path / "bank.xlsx"), "--out", str(tmp_path / "check")]
    assert main([*check, "--column", "question=Stem"]) == 0
    rejected = (tmp_path / "check/rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in rejected] == ["needs an image"]
    everything = ["--search", "1", "--rl", "0", "--dev", "0", "--test", "0", "--source", "own"]
    bank = str(tmp_path / "check/bank.jsonl")
    assert main(["mcq-bank", bank, "--out", str(tmp_path / "teacher"), *everything]) == 0
    monkeypatch.setenv("TEACHER_API_KEY", "sesame")
    with run_simulated([f"--bank={tmp_path / 'teacher/private/teacher_bank.jsonl'}"]) as url:
        recipe = yaml.safe_load(RECIPE.read_text())
        recipe["question_bank"]["path"] = bank
        recipe["data_gen"]["teacher"]["reasoner"]["base_url"] = url
        recipe["model"]["folder"] = str(tmp_path / "base")
        own = tmp_path / "own.yaml"
        own.write_text(yaml.safe_dump(recipe))
        accumulation = {f"stages.{name}.settings.accumulation": 1 for name in ("sft", "rpo", "ppo")}
        arguments = command(tmp_path / "runs", **SMALL, **accumulation)
        finish([str(own) if text.endswith(".yaml") else text for text in arguments])
    root = tmp_path / "runs/own_bank"
    summary = json.loads((root / "summary.json").read_text())
    assert [row["name"] for row in summary["stages"]] == ["data", "sft", "rpo", "ppo", "export"]
    assert json.loads((root / "data/report.json").read_text())["problems"]["in"] > 15
    assert (root / "export/model/config.json").is_file()
    assert "sesame" not in "".join(
        path.read_text(errors="ignore") for path in root.rglob("*") if path.is_file()
    )
