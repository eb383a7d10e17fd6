"""Small CPT and SFT (LoRA) runs on mixtures of text and conversations, and what is left of them."""

import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from medreason_jax.checkpoint import open_stores
from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.tokenizer_training import train_tokenizer
from medreason_jax.qwen2.folder import Description, save_model
from medreason_jax.qwen2.model import init_params
from medreason_jax.qwen2.sizes import read_sizes
from tests.tiny import FIELDS

WORDS_IN_TEXT = 500
SYLLABLES = "ka ve lo tan mi ru pol dex cor in al sa mo tri fen zo".split()


def write_base(folder: Path, texts: int, conversations: int, **sizes: int) -> Path:
    """A model with its tokenizer, and `text.jsonl`, `chat.jsonl`, `held.jsonl` to train it on."""
    chance = random.Random(0)
    words = ["".join(chance.choices(SYLLABLES, k=3)) for _ in range(4000)]
    train_tokenizer([" ".join(words[:300])] * 5, 320, "", folder / "tokenizer")
    tokenizer = ChatTokenizer(folder / "tokenizer")
    fields = read_sizes({**FIELDS, **sizes, "vocab_size": tokenizer.vocab_size})
    save_model(folder, init_params(fields, jax.random.key(0)), Description(fields), tokenizer)

    def text(_) -> dict[str, Any]:
        return {"text": " ".join(chance.choices(words, k=WORDS_IN_TEXT))}

    def conversation(number: int) -> dict[str, Any]:
        asked = {"role": "user", "content": f"How often is {words[number]} given?"}
        return {
            "messages": [asked],
            "thinking": f"It is drug {number}.",
            "response": f"{number % 9} times",
        }

    for name, record, count in (
        ("text", text, texts),
        ("chat", conversation, conversations),
        ("held", conversation, 20),
    ):
        lines = [json.dumps(record(number)) + "\n" for number in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def stage(base: Path, kind: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """A config: accumulation 2, two sources, held-out loss; SFT trains an adapter."""
    text, chat = (1.0, 0.5) if kind == "cpt" else (0.25, 1.0)
    return {
        "kind": kind,
        "folder": str(folder),
        "model": str(base),
        "length": 128,
        "batch_rows": 16,
        "accumulation": 2,
        "keep_states": True,
        "sources": [
            {"path": str(base / "text.jsonl"), "kind": "text", "weight": text},
            {"path": str(base / "chat.jsonl"), "kind": "sft", "weight": chat},
        ],
        "held_out": {"sources": [{"path": str(base / "held.jsonl"), "kind": "sft"}], "every": 5},
        "optimizer": {"learning_rate": 3e-3},
        **({"lora": {"rank": 4}} if kind == "sft" else {}),
        **changes,
    }


def write_config(values: dict[str, Any]) -> Path:
    """The config in a file beside its run's folder."""
    path = Path(values["folder"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def metrics(folder: Path, name: str) -> dict[int, float]:
    """{step: value} of the log's whole lines."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return {}
    records = map(json.loads, path.read_text().split("\n")[:-1])
    return {record["step"]: record[name] for record in records if name in record}


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("states/*") if path.name.isdigit())


def facts_of_state(folder: Path) -> dict[str, Any]:
    """What the newest train state keeps beside its arrays."""
    newest = folder / "states" / str(saved_steps(folder)[-1])
    return json.loads((newest / "facts/metadata").read_text())


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {path: store.read().result() for path, store in open_stores(folder).items()}


def assert_same_bits(folder: Path, other: Path) -> None:
    """Finished runs with the same model, train state, metric lines and prepared data."""
    assert (folder / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    for prepared in other.glob("prepared/*/dataset.json"):
        assert (folder / prepared.relative_to(other)).read_text() == prepared.read_text()
    model = "model/params" if (other / "model/params").is_dir() else "model/adapter"
    for part in (model, f"states/{saved_steps(other)[-1]}/state"):
        found, wanted = arrays(folder / part), arrays(other / part)
        assert found.keys() == wanted.keys()
        for path, array in wanted.items():
            assert array.dtype == found[path].dtype, path
            assert array.tobytes() == found[path].tobytes(), path
