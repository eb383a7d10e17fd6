"""The same records come out of every kind of source."""

import gzip
import json
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medreason_jax.config import SourceConfig
from medreason_jax.data import sources
from medreason_jax.data.sources import open_records

RECORDS = [
    {
        "id": f"r{n}",
        "text": f"Velotan é 高 {n}.",
        "messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "a"}],
    }
    for n in range(5)
]


def lines(records) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_jsonl(folder: Path) -> Path:
    (folder / "a.jsonl").write_text(lines(RECORDS) + "\n", "utf-8")
    return folder / "a.jsonl"


def write_gzip(folder: Path) -> Path:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(RECORDS).encode()))
    return folder / "a.jsonl.gz"


def write_parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(RECORDS), folder / "a.parquet", row_group_size=2)
    return folder / "a.parquet"


def write_folder(folder: Path) -> Path:
    (folder / "files").mkdir()
    (folder / "files" / "0.jsonl").write_text(lines(RECORDS[:2]), "utf-8")
    pq.write_table(pa.Table.from_pylist(RECORDS[2:]), folder / "files" / "1.parquet")
    (folder / "files" / "README.md").write_text("not records")
    return folder / "files"


def write_dataset(folder: Path) -> Path:
    datasets.Dataset.from_list(RECORDS).save_to_disk(folder / "saved")
    return folder / "saved"


def read(*arguments, **options) -> list[dict]:
    return [record for _, record in open_records(*arguments, **options).read()]


@pytest.mark.parametrize(
    "write", [write_jsonl, write_gzip, write_parquet, write_folder, write_dataset]
)
def test_every_kind_of_file_and_folder_gives_its_records_each_time(write, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "READ_AT_ONCE", 2)
    records = open_records(write(tmp_path))
    assert [r for _, r in records.read()] == RECORDS == [r for _, r in records.read()]
    assert len({place for place, _ in records.read()}) == len(RECORDS)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_folder])
def test_a_change_of_a_record_changes_the_identity(write, tmp_path, monkeypatch):
    before = open_records(write(tmp_path)).identity
    assert open_records(write_again(write, tmp_path, "same")).identity == before
    monkeypatch.setitem(RECORDS[-1], "text", "changed")
    assert open_records(write_again(write, tmp_path, "other")).identity != before


def write_again(write, folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return write(folder / name)


def test_a_saved_dict_of_datasets_needs_its_split_named(tmp_path):
    parts = {"train": RECORDS[:3], "dev": RECORDS[3:]}
    saved = {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
    datasets.DatasetDict(saved).save_to_disk(tmp_path)
    for name, part in parts.items():
        assert read(tmp_path, split=name) == part
    with pytest.raises(ValueError, match=r"split='test'; choose one of \['dev', 'train'\]"):
        open_records(tmp_path, split="test")
    with pytest.raises(ValueError, match="split='dev' has no effect"):
        open_records(tmp_path / "dev", split="dev")


def test_a_name_is_loaded_by_datasets(tmp_path, monkeypatch):
    """A local repository stands for one of the hub: the same call resolves both."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "train.jsonl").write_text(lines(RECORDS[:3]), "utf-8")
    (tmp_path / "bank" / "test.jsonl").write_text(lines(RECORDS[3:]), "utf-8")
    records = open_records(tmp_path / "bank", hub=True, split="test")
    assert [record for _, record in records.read()] == RECORDS[3:]
    assert open_records(tmp_path / "bank", hub=True, split="test").identity == records.identity
    assert open_records(tmp_path / "bank", hub=True, split="train").identity != records.identity
    with pytest.raises(ValueError, match=r"split=None; choose one of \['test', 'train'\]"):
        open_records(tmp_path / "bank", hub=True)


def test_a_hub_out_of_reach_is_one_clear_line(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'org/bank' on the Hub\n(OfflineModeIsEnabled)")

    monkeypatch.setattr(sources, "get_dataset_split_names", unreachable)
    with pytest.raises(ValueError, match=r"'org/bank' could not be fetched: .*save_to_disk") as e:
        open_records(Path("org/bank"), hub=True, split="train")
    assert "\n" not in str(e.value)


def test_a_tensorflow_datasets_folder_is_read_without_tensorflow(tmp_path):
    reason = "the tfds extra (tensorflow-datasets) is missing"
    tfds = pytest.importorskip("tensorflow_datasets", reason=reason)
    text = tfds.features.Text()
    features = tfds.features.FeaturesDict(
        {
            "id": text,
            "text": text,
            "messages": tfds.features.Sequence({"role": text, "content": text}),
        }
    )

    class Bank(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((record["id"], record) for record in RECORDS)

    builder = Bank(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    found = read(Path(builder.data_path), split="train")
    assert sorted(found, key=lambda record: record["id"]) == RECORDS
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match=r"choose one of \['train'\]"):
        open_records(Path(builder.data_path))


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "features.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'medreason\[tfds\]'"):
        open_records(tmp_path, split="train")


def test_columns_are_read_under_our_names(tmp_path):
    path = tmp_path / "bank.jsonl"
    path.write_text(lines([{"question": "q", "answer": "a"}]))
    columns = {"prompt": "question", "completion": "answer"}
    (record,) = read(path, columns=columns)
    assert record["prompt"] == "q" and record["completion"] == "a"
    assert open_records(path, columns=columns).identity != open_records(path).identity
    with pytest.raises(ValueError, match=r"bank.jsonl:1 has no field 'body'; found \['answer'"):
        read(path, columns={"text": "body"})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text"', r"a.jsonl:2 is not JSON"),
        ("a.jsonl", "[1]\n", r"a.jsonl:1 is '\[1\]\\n'; a record is a JSON object"),
        ("a.txt", "x", r"a.txt: no file of records; allowed: .parquet, .jsonl"),
    ],
)
def test_a_file_that_holds_no_records_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        read(tmp_path / name)


def test_a_path_that_leads_nowhere_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a.jsonl does not exist"):
        open_records(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="holds no records; allowed"):
        open_records(tmp_path)
    with pytest.raises(ValueError, match="split='dev' has no effect on the file"):
        open_records(write_jsonl(tmp_path), split="dev")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "text", "subset": "x"}, "subset=x, revision=None go with hub: true"),
        ({"kind": "sft", "reset": False}, "reset: false is for kind text; this is kind sft"),
    ],
)
def test_settings_of_a_source_that_cannot_take_effect_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        SourceConfig(path=Path("a.jsonl"), **given)
