"""Records of a file to a prepared folder: encode, reject what does not fit, pack."""

import hashlib
from pathlib import Path
from typing import Any, Literal

from medreason_jax.data.chat import TOKENIZER_FILES, ChatTokenizer, Encoded
from medreason_jax.data.dataset import read_facts, write_rows
from medreason_jax.data.packing import pack_items, pack_pairs, split_document
from medreason_jax.data.sources import field, read_lines

Kind = Literal["text", "sft", "preference"]


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
    pairs_per_row: int | None,
    seed: int,
    folder: Path,
) -> dict:
    """Prepare `path` into `folder`, unless it is there already; returns its facts.

    Items longer than a row are records in the folder's `rejected.jsonl`.
    """
    key = preparation_key(path, tokenizer, (kind, length, pairs_per_row, seed))
    if (folder / "dataset.json").is_file() and read_facts(folder)["key"] == key:
        return read_facts(folder)
    records = read_lines(path)
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
            assert pairs_per_row is not None
            rows = pack_pairs(items, length, tokenizer.pad_id, pairs_per_row, seed)
    facts = {
        "key": key,
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
    write_rows(rows, folder, facts, rejected)
    return read_facts(folder)


def preparation_key(path: Path, tokenizer: ChatTokenizer, settings: tuple) -> str:
    """Changes with the records, the tokenizer and the settings that rows depend on."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    digest = hashlib.sha256(repr((settings, tokenizer.template_text)).encode())
    for file in (path, *(tokenizer.folder / name for name in TOKENIZER_FILES)):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def _size(encoded) -> int:
    items = (encoded,) if isinstance(encoded, Encoded) else encoded
    return sum(len(item.ids) for item in items)


def _too_long(record: dict[str, Any], encoded, length: int) -> dict[str, Any]:
    detail = f"{_size(encoded)} tokens, row length {length}"
    return {"id": record.get("id"), "stage": "prepare", "reason": "too_long", "detail": detail}
