"""Preparation loses nothing silently, holds no source in memory, and survives being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from medreason_jax.data import prepare as preparation
from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.dataset import Rows, read_facts
from medreason_jax.data.prepare import prepare
from medreason_jax.data.sources import Records, open_records, read_lines, write_lines

ASK = {"role": "user", "content": "How often is Velotan given?"}


def texts(count: int) -> list[dict]:
    return [{"id": n, "text": f"Velotan {n} is given. " * (1 + n % 5)} for n in range(count)]


def conversations(sizes: list[int]) -> list[dict]:
    return [
        {"id": n, "messages": [ASK], "thinking": "x" * size, "response": f"{n} times"}
        for n, size in enumerate(sizes)
    ]


def in_memory(records: list[dict]) -> Records:
    placed = [(f"record {n}", record) for n, record in enumerate(records)]
    return Records("memory", json.dumps(records), lambda: iter(placed))


def run(records, kind, tokenizer, folder, **options):
    if not isinstance(records, Records):
        records = in_memory(records)
    settings = {"length": 128, "pairs_per_row": None, "seed": 0, **options}
    return prepare(records, kind, tokenizer, folder=folder, **settings)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def segments(folder: Path) -> list[list[int]]:
    """The tokens of every segment of every row."""
    return [
        row["tokens"][row["segments"] == number].tolist()
        for row in Rows(folder)
        for number in range(1, row["segments"].max() + 1)
    ]


def test_every_document_stands_in_the_rows_once_with_its_separator(tokenizer, tmp_path):
    records = texts(40)
    facts = run(records, "text", tokenizer, tmp_path / "out")
    expected = [[*tokenizer.encode(r["text"]), tokenizer.pad_id] for r in records]
    assert sorted(segments(tmp_path / "out")) == sorted(expected)
    rows = list(Rows(tmp_path / "out"))
    assert facts["records"] == facts["items"] == 40 and facts["rejected"] == 0
    assert facts["tokens"] == sum(map(len, expected))
    assert facts["tokens"] == sum((row["segments"] > 0).sum() for row in rows)
    assert facts["rows"] == len(rows)
    assert facts["useful_share"] == pytest.approx(facts["tokens"] / (len(rows) * 128))


def test_without_a_reset_a_row_is_one_segment(tokenizer, tmp_path):
    alone = run(texts(40), "text", tokenizer, tmp_path / "alone")
    joined = run(texts(40), "text", tokenizer, tmp_path / "joined", reset=False)
    assert joined["fingerprint"] != alone["fingerprint"] and not joined["reset"]
    pairs = zip(Rows(tmp_path / "alone"), Rows(tmp_path / "joined"), strict=True)
    for restarting, going_on in pairs:
        assert (restarting["tokens"] == going_on["tokens"]).all()
        assert going_on["segments"].max() == 1 < restarting["segments"].max()
        assert (np.diff(going_on["positions"][going_on["segments"] > 0]) == 1).all()


def test_a_long_document_is_split_and_a_long_answer_left_out_with_a_record(tokenizer, tmp_path):
    facts = run([{"text": "Velotan. " * 200}], "text", tokenizer, tmp_path / "text")
    pieces = segments(tmp_path / "text")
    whole = [*tokenizer.encode("Velotan. " * 200), tokenizer.pad_id]
    assert facts["items"] == len(pieces) > 1 and facts["rejected"] == 0
    assert sum(len(piece) - 1 for piece in pieces) == len(whole) - 1

    records = conversations([1, 500, 2])
    facts = run(records, "sft", tokenizer, tmp_path / "sft")
    (left_out,) = read_lines(tmp_path / "sft" / "rejected.jsonl")
    size = len(tokenizer.conversation([ASK], "x" * 500, "1 times").ids)
    assert left_out == {
        "id": 1,
        "stage": "prepare",
        "reason": "too_long",
        "detail": f"{size} tokens, row length 128",
    }
    assert facts["items"] == 2 and facts["rejected"] == 1 and facts["records"] == 3
    prompt = tokenizer.prompt([ASK])
    assert all(item[: len(prompt)] == prompt for item in segments(tmp_path / "sft"))


def test_records_without_anything_to_learn_are_left_out_with_a_record(tokenizer, tmp_path):
    facts = run([*texts(3), {"text": " "}], "text", tokenizer, tmp_path / "out")
    (left_out,) = read_lines(tmp_path / "out" / "rejected.jsonl")
    assert left_out["id"] == "record 3" and left_out["reason"] == "empty"
    assert facts["items"] == 3 and facts["rejected"] == 1
    with pytest.raises(ValueError, match="nothing to train on in memory: of 1 records 1 were left"):
        run([{"text": " "}], "text", tokenizer, tmp_path / "empty")


def test_pairs_are_packed_whole_and_left_out_whole(tokenizer, tmp_path):
    side = lambda size: {"thinking": "x" * size, "response": "y"}  # noqa: E731
    records = [
        {"id": n, "prompt": [ASK], "chosen": side(1), "rejected": side(size)}
        for n, size in enumerate([1, 2, 300, 3])
    ]
    facts = run(records, "preference", tokenizer, tmp_path, length=256, pairs_per_row=2)
    rows = list(Rows(tmp_path))
    assert facts["items"] == sum(row["pairs"].sum() for row in rows) == 3
    assert [r["id"] for r in read_lines(tmp_path / "rejected.jsonl")] == [2]
    chosen = list(tokenizer.conversation([ASK], "x", "y").ids)
    for row in rows:
        for number in range(1, row["segments"].max() + 1, 2):
            assert row["tokens"][row["segments"] == number].tolist() == chosen


def test_a_source_is_never_held_whole(tokenizer, tmp_path):
    alive, most = 0, 0

    class Tracked(dict):
        def __init__(self, *arguments, **values):
            nonlocal alive, most
            super().__init__(*arguments, **values)
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    def read():
        for number in range(500):
            yield f"record {number}", Tracked(text=f"Velotan {number}. " * 10)

    facts = run(
        Records("endless", "x", read), "text", tokenizer, tmp_path / "out", shard_characters=2000
    )
    assert facts["items"] == 500
    assert most < 30


def test_a_prepared_folder_is_used_until_something_changes(tokenizer, tmp_path, monkeypatch):
    first = run(texts(20), "text", tokenizer, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_tokenise", None)
        assert run(texts(20), "text", tokenizer, tmp_path / "out") == first
    for count, settings in (
        (21, {}),
        (20, {"seed": 1}),
        (20, {"length": 100}),
        (20, {"reset": False}),
    ):
        changed = run(texts(count), "text", tokenizer, tmp_path / "out", **settings)
        assert changed["fingerprint"] != first["fingerprint"]
        assert run(texts(20), "text", tokenizer, tmp_path / "out") == first


class Killed(BaseException):
    pass


def count_writes(monkeypatch, kill_at: int | None = None) -> list[str]:
    """Names of shards that appear from here on; a kill comes just before number `kill_at` does."""
    written, replace = [], os.replace

    def counted(source, target):
        if Path(target).parent.name == "shards":
            if len(written) == kill_at:
                raise Killed
            written.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", counted)
    return written


@pytest.mark.parametrize("kill_at", [0, 1, 4, 9])
def test_only_missing_shards_are_made_after_a_kill(tokenizer, tmp_path, monkeypatch, kill_at):
    options = {"shard_characters": 500}
    records = [*texts(60), {"text": ""}, *texts(60)]
    with monkeypatch.context() as patch:
        names = count_writes(patch)
        run(records, "text", tokenizer, tmp_path / "whole", **options)
    assert len(names) > 10
    with monkeypatch.context() as patch:
        count_writes(patch, kill_at)
        with pytest.raises(Killed):
            run(records, "text", tokenizer, tmp_path / "killed", **options)
    assert not (tmp_path / "killed").exists()
    again = count_writes(monkeypatch)
    run(records, "text", tokenizer, tmp_path / "killed", **options)
    assert again == names[kill_at:]
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert not (tmp_path / "killed.partial").exists()
    run(records, "text", tokenizer, tmp_path / "one_shard")
    assert files(tmp_path / "one_shard") == files(tmp_path / "whole")


def test_a_kill_while_packing_repeats_no_tokenising(tokenizer, tmp_path, monkeypatch):
    whole = run(texts(60), "text", tokenizer, tmp_path / "whole")
    pack = preparation.pack_items

    def killed(*arguments, **options):
        yield from islice(pack(*arguments, **options), 2)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "pack_items", killed)
        with pytest.raises(Killed):
            run(texts(60), "text", tokenizer, tmp_path / "killed")
    again = count_writes(monkeypatch)
    assert run(texts(60), "text", tokenizer, tmp_path / "killed") == whole
    assert again == []
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize(("kind", "pairs_per_row"), [("text", None), ("preference", 2)])
def test_windows_bound_what_is_packed_together_and_lose_nothing(
    tokenizer, tmp_path, monkeypatch, kind, pairs_per_row
):
    side = lambda n: {"thinking": f"{n}", "response": "y"}  # noqa: E731
    pairs = [
        {"id": n, "prompt": [ASK], "chosen": side(n), "rejected": side(-n)} for n in range(1, 31)
    ]
    records = pairs if kind == "preference" else [*texts(30), {"text": " "}]
    options = {"shard_characters": 1, "length": 256, "pairs_per_row": pairs_per_row}
    one = run(records, kind, tokenizer, tmp_path / "one", **options)
    monkeypatch.setattr(preparation, "WINDOW_ITEMS", 8)
    several = run(records, kind, tokenizer, tmp_path / "several", **options, seed=1)
    assert several["rows"] > one["rows"]
    assert sorted(segments(tmp_path / "several")) == sorted(segments(tmp_path / "one"))
    together = [set(row["segments"]) for row in Rows(tmp_path / "several")]
    assert max(map(len, together)) <= 9  # the items of a window, and padding


def test_work_for_other_settings_is_forgotten(tokenizer, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        count_writes(patch, kill_at=3)
        with pytest.raises(Killed):
            run(texts(60), "text", tokenizer, tmp_path / "out", shard_characters=500)
    run(texts(60), "text", tokenizer, tmp_path / "out", shard_characters=500, length=20)
    run(texts(60), "text", tokenizer, tmp_path / "fresh", shard_characters=500, length=20)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


PROGRAM = """
import sys
from pathlib import Path
from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.prepare import prepare
from medreason_jax.data.sources import open_records
tokenizer, records, folder = map(Path, sys.argv[1:])
prepare(open_records(records), "text", ChatTokenizer(tokenizer), length=128, pairs_per_row=None,
        seed=0, folder=folder, shard_characters=300)
"""


def test_a_process_that_is_killed_and_started_again_ends_with_the_same_bytes(tokenizer, tmp_path):
    write_lines(tmp_path / "texts.jsonl", texts(6000))
    arguments = [str(tokenizer.folder), str(tmp_path / "texts.jsonl"), str(tmp_path / "killed")]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    shards_folder = tmp_path / "killed.partial" / "shards"
    while len(list(shards_folder.glob("*.arrow"))) < 5:
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    options = {"shard_characters": 300}
    records = open_records(tmp_path / "texts.jsonl")
    done = run(records, "text", tokenizer, tmp_path / "killed", **options)
    assert done == run(records, "text", tokenizer, tmp_path / "whole", **options)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.slow
def test_real_text_is_prepared_fast_and_packed_tight(real_data, tmp_path):
    """At 4,096, the last row counted: 98 % useful; 0.7 MB of text a second of one core's time."""
    tokenizer = ChatTokenizer(real_data / "qwen2.5-tokenizer")
    path = real_data / "medquad" / "medquad_with_answers.jsonl.gz"
    answers = open_records(path, columns={"prompt": "question", "completion": "answer"})
    start = time.process_time()
    facts = run(answers, "sft", tokenizer, tmp_path / "medquad", length=4096)
    seconds = time.process_time() - start
    assert facts["useful_share"] >= 0.98
    assert facts["items"] + facts["rejected"] == facts["records"] == 16_359
    read = sum(len(r["question"].encode()) + len(r["answer"].encode()) for _, r in answers.read())
    assert read / 1e6 / seconds >= 0.7
    starts = [row["positions"][row["segments"] > 0] == 0 for row in Rows(tmp_path / "medquad")]
    assert sum(map(np.sum, starts)) == facts["items"]  # each answer is one segment

    start = time.process_time()
    facts = run(
        open_records(real_data / "openstax-medical"),
        "text",
        tokenizer,
        tmp_path / "openstax",
        length=4096,
    )
    seconds = time.process_time() - start
    assert 12.5e6 / 1e6 / seconds >= 0.7
    assert read_facts(tmp_path / "openstax") == facts
