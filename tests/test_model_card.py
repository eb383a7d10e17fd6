"""The card of an exported model names what it was made from."""

import json

from medreason_jax.model_card import model_card


def stage(folder, kind, parent, **facts):
    folder.mkdir()
    values = {"kind": kind, "model": "model", "parent": f"../{parent.name}", "steps": 3, **facts}
    (folder / "manifest.json").write_text(json.dumps(values))
    (folder / "config.yaml").write_text(f"kind: {kind}\n")


def test_a_card_lists_the_stages_with_hashes_of_recipe_and_data(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/manifest.json").write_text(json.dumps({"kind": "base", "model": "model"}))
    data = [{"source": "sft.jsonl", "items": 40, "fingerprint": "f00dfeed"}]
    stage(tmp_path / "sft", "sft", tmp_path / "base", data=data)
    stage(tmp_path / "ppo", "ppo", tmp_path / "sft")
    card = model_card(tmp_path / "ppo", "my model", "A note.")
    assert card.startswith("# my model\n") and "A note." in card
    rows = [line for line in card.splitlines() if line.startswith("| ") and "sha256" not in line]
    assert [row.split(" ")[1] for row in rows] == ["base", "sft", "ppo"]
    assert "sft.jsonl: 40 items, f00dfeed" in rows[1]
    (tmp_path / "sft/config.yaml").write_text("kind: sft\nchanged: true\n")
    assert model_card(tmp_path / "ppo", "my model", "A note.") != card


def test_a_model_without_a_history_has_a_card_too(tmp_path):
    assert model_card(tmp_path, "plain").startswith("# plain\n")
