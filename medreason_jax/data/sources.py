"""Records of files and of published data sets, read one at a time.

JSON Lines (gzip too), Parquet, folders of such files, `datasets` (a saved folder, or a name of the
hub) and prepared `tensorflow-datasets` folders.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, get_dataset_split_names, load_dataset, load_from_disk

PUBLISHED = {
    "question": "Open-ended Verifiable Question",
    "answer": "Ground-True Answer",
}
LINE_FILES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
RECORD_FILES = (".parquet", *LINE_FILES)
READ_AT_ONCE = 1000

Record = dict[str, Any]
Placed = Iterator[tuple[str, Record]]  # where a record stands, for messages, and the record


@dataclass(frozen=True)
class Records:
    """Records in an order that is the same at each reading; `identity` changes with them."""

    name: str
    identity: str
    read: Callable[[], Placed]


def open_records(
    path: Path,
    *,
    hub: bool = False,
    subset: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Records:
    """The records of a file, a folder, or (`hub`) of a name for `datasets.load_dataset`.

    `columns` is {our field: the data set's}.
    """
    if hub:
        records = _hub(path.as_posix(), subset, split, revision)
    elif path.is_dir():
        records = _folder(path, split)
    elif not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    elif split is not None:
        raise ValueError(f"split={split!r} has no effect on the file {path}; remove it")
    else:
        records = Records(path.name, digest_files([path]), lambda: _read_file(path))
    return _renamed(records, columns) if columns else records


def digest_files(files: Iterable[Path]) -> str:
    """Changes with the content of the files and with their order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _read_file(path: Path) -> Placed:
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            yield from _placed(path, (batch.to_pylist() for batch in _batches(file)))
    elif path.name.endswith(LINE_FILES):
        yield from iterate_lines(path)
    else:
        raise ValueError(f"{path}: no file of records; allowed: {', '.join(RECORD_FILES)}")


def _batches(file: pq.ParquetFile):
    return file.iter_batches(batch_size=READ_AT_ONCE)


def _placed(name: object, batches: Iterable[list[Record]]) -> Placed:
    number = 0
    for batch in batches:
        for record in batch:
            number += 1
            yield f"{name} record {number}", record


def _folder(path: Path, split: str | None) -> Records:
    """A saved `datasets` folder, a `tensorflow-datasets` folder, or a folder of record files."""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        return _folder(path / _choose_split(str(path), split, splits), None)
    if (path / "features.json").is_file():
        return _tfds(path, split)
    if split is not None:
        raise ValueError(f"split={split!r} has no effect on {path}, which has no splits; remove it")
    if (path / "state.json").is_file():
        dataset = load_from_disk(str(path))
        assert isinstance(dataset, Dataset)
        return Records(path.name, digest_files(_files(path)), lambda: _read_dataset(path, dataset))
    files = [file for file in _files(path) if file.name.endswith(RECORD_FILES)]
    if not files:
        raise ValueError(
            f"{path} holds no records; allowed: {', '.join(RECORD_FILES)} files, a folder saved by "
            "datasets, or a tensorflow-datasets folder (the one with features.json)"
        )
    read = lambda: (placed for file in files for placed in _read_file(file))  # noqa: E731
    return Records(path.name, digest_files(files), read)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file())


def _choose_split(name: str, split: str | None, found: Iterable[str]) -> str:
    if split is None or split not in found:
        raise ValueError(f"{name}: split={split!r}; choose one of {sorted(found)}")
    return split


def _read_dataset(name: object, dataset: Dataset) -> Placed:
    tables: Any = dataset.with_format("arrow").iter(batch_size=READ_AT_ONCE)
    return _placed(name, (table.to_pylist() for table in tables))


def _hub(name: str, subset: str | None, split: str | None, revision: str | None) -> Records:
    """A data set that `datasets` downloads; it lies memory-mapped in its cache."""
    try:
        found = get_dataset_split_names(name, subset, revision=revision)
        chosen = _choose_split(name, split, found)
        dataset = load_dataset(name, subset, split=chosen, revision=revision)
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"the data set {name!r} could not be fetched: {' '.join(str(error).split())[:200]}; "
            "check the name and the network, or save it (save_to_disk) elsewhere and give the "
            "folder's path"
        ) from None
    assert isinstance(dataset, Dataset)
    facts = (name, subset, chosen, revision, len(dataset), dataset.info.download_checksums)
    identity = hashlib.sha256(repr((facts, dataset.features)).encode()).hexdigest()
    return Records(name, identity, lambda: _read_dataset(name, dataset))


def _tfds(path: Path, split: str | None) -> Records:
    """A folder that `tensorflow-datasets` prepared as array_record; needs no TensorFlow."""
    try:
        import tensorflow_datasets as tfds  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError(
            f"{path} is a tensorflow-datasets folder, and that is not installed: "
            "pip install 'medreason[tfds]'"
        ) from None
    builder = tfds.builder_from_directory(str(path))
    chosen = _choose_split(str(path), split, builder.info.splits)
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{path} is stored as {builder.info.file_format.value}, which needs TensorFlow; "
            "prepare it with file_format='array_record'"
        )
    source: Any = builder.as_data_source(split=chosen)

    def read() -> Placed:
        rows = (source[index] for index in range(len(source)))
        return _placed(path, ([_plain(row, builder.info.features, tfds.features)] for row in rows))

    identity = f"{chosen} {digest_files(_files(path))}"
    return Records(path.name, identity, read)


def _plain(value: Any, feature: Any, kinds: Any) -> Any:
    """Text for bytes, and a list of records for a sequence of them (stored as lists by field)."""
    if isinstance(feature, kinds.FeaturesDict):
        return {name: _plain(value[name], inner, kinds) for name, inner in feature.items()}
    if isinstance(feature, kinds.Sequence) and isinstance(feature.feature, kinds.FeaturesDict):
        columns = [[(name, each) for each in value[name]] for name in feature.feature]
        rows = map(dict, zip(*columns, strict=True))
        return [_plain(row, feature.feature, kinds) for row in rows]
    if isinstance(feature, kinds.Sequence):
        return [_plain(each, feature.feature, kinds) for each in value]
    return value.decode("utf-8") if isinstance(value, bytes) else np.asarray(value).tolist()


def _renamed(records: Records, columns: Mapping[str, str]) -> Records:
    def read() -> Placed:
        for place, record in records.read():
            for theirs in columns.values():
                if theirs not in record:
                    raise ValueError(f"{place} has no field {theirs!r}; found {sorted(record)}")
            yield place, record | {ours: record[theirs] for ours, theirs in columns.items()}

    return Records(records.name, f"{records.identity} {sorted(columns.items())}", read)


def iterate_lines(path: Path) -> Placed:
    """The JSON objects of a JSON Lines file (gzip too), one at a time."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error.msg}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number} is {line[:40]!r}; a record is a JSON object")
            yield f"{path}:{number}", record


def read_lines(path: Path) -> list[Record]:
    """All of `iterate_lines`, for files that fit in memory."""
    return [record for _, record in iterate_lines(path)]


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """A JSON Lines file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    os.replace(partial, path)


def field(record: dict[str, Any], name: str, path: Path) -> Any:
    if name not in record:
        raise ValueError(
            f"{path}: record {record.get('id')!r} has no field {name!r}; found {sorted(record)}"
        )
    return record[name]


def read_problems(path: Path) -> list[dict[str, Any]]:
    """Problems with their `id`, `question` and `answer`, the published spelling understood."""
    problems = []
    for record in read_lines(path):
        for name, published in PUBLISHED.items():
            if name not in record and published in record:
                record[name] = record[published]
            field(record, name, path)
        field(record, "id", path)
        problems.append(record)
    if not problems:
        raise ValueError(f"{path} holds no problem")
    return problems


def question_text(problem: dict[str, Any]) -> str:
    """The question as it is asked: followed by its lettered options when it has them."""
    if not problem.get("options"):
        return problem["question"]
    options = "\n".join(f"{letter}. {text}" for letter, text in problem["options"].items())
    return f"{problem['question']}\n{options}"
