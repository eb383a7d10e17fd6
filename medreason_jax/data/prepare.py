"""Records of a file to a prepared folder: encode, reject what does not fit, pack."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from medreason_jax.data.chat import ChatTokenizer, Encoded
from medreason_jax.data.dataset import read_facts, write_rows
from medreason_jax.data.packing import pack_items, pack_pairs, split_document

Kind = Literal["text", "sft", "preference"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a JSON Lines file (gzip too)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    records = []
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error.msg}") from None
    return records


def field(record: dict[str, Any], name: str, path: Path) -> Any:
    if name not in record:
        raise ValueError(
            f"{path}: record {record.get('id')!r} has no field {name!r}; found {sorted(record)}"
        )
    return record[name]


def encode_sft(tokenizer: ChatTokenizer, record: dict[str, Any], path: Path) -> Encoded:
    return tokenizer.conversation(
        field(record, "messages", path),
        field(record, "thinking", path),
        field(record, "response", path),
    )


def encode_pair(tokenizer: ChatTokenizer, record: dict[str, Any], path: Path):
    prompt = field(record, "prompt", path)
    return tuple(
        tokenizer.conversation(
            prompt, field(answer, "thinking", path), field(answer, "response", path)
        )
        for answer in (field(record, "chosen", path), field(record, "rejected", path))
    )


def prepare(
    path: Path,
    kind: Kind,
    tokenizer: ChatTokenizer,
    *,
    length: int,
    pairs_per_row: int,
    seed: int,
    folder: Path,
    accept: Callable[[dict[str, Any]], bool] = lambda record: True,
) -> dict:
    """Prepare `path` into `folder` once; returns its facts. Over-long items: `rejected.jsonl`."""
    if (folder / "dataset.json").is_file():
        return read_facts(folder)
    records = [record for record in read_lines(path) if accept(record)]
    if kind == "text":
        documents = [tokenizer.document(field(record, "text", path)) for record in records]
        items = [piece for document in documents for piece in split_document(document, length)]
        rejected, rows = [], pack_items(items, length, tokenizer.pad_id, seed)
        tokens = sum(len(item.ids) for item in items)
    else:
        encode: Any = encode_sft if kind == "sft" else encode_pair
        encoded = [(record, encode(tokenizer, record, path)) for record in records]
        fits = [(r, e) for r, e in encoded if _size(e) <= length]
        rejected = [_too_long(r, e, length) for r, e in encoded if _size(e) > length]
        items = [e for _, e in fits]
        tokens = sum(_size(e) for e in items)
        if kind == "sft":
            rows = pack_items(items, length, tokenizer.pad_id, seed)
        else:
            rows = pack_pairs(items, length, tokenizer.pad_id, pairs_per_row, seed)
    facts = {
        "kind": kind,
        "source": path.name,
        "items": len(items),
        "rejected": len(rejected),
        "tokens": tokens,
        "mean_tokens": tokens / max(len(items), 1),
        "length": length,
        "useful_share": tokens / max(len(rows) * length, 1),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_rows(rows, folder, facts)
    with (folder / "rejected.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in rejected)
    return read_facts(folder)


def _size(encoded) -> int:
    items = (encoded,) if isinstance(encoded, Encoded) else encoded
    return sum(len(item.ids) for item in items)


def _too_long(record: dict[str, Any], encoded, length: int) -> dict[str, Any]:
    detail = f"{_size(encoded)} tokens, row length {length}"
    return {"id": record.get("id"), "stage": "prepare", "reason": "too_long", "detail": detail}
