"""Shards: every group in one of them, merged into what one run would have made."""

import asyncio
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml

from data_gen.cli import main
from data_gen.endpoints import run_simulated
from data_gen.journal import Journal
from data_gen.shards import Shard, join_journals, read_shard
from tests.data_gen.test_engine import (
    SMALL,
    check_none_lost,
    count,
    files,
    make_bank,
    options,
    stats,
    write_config,
)
from tests.data_gen.test_journal import make_call


def test_every_group_is_in_exactly_one_shard_and_shards_are_of_like_size():
    groups = [f"group {n}" for n in range(4000)]
    shards = [Shard(number, 4) for number in range(1, 5)]
    held = Counter(shard for group in groups for shard in shards if shard.holds(group))
    assert sum(held.values()) == 4000
    assert all(900 < size < 1100 for size in held.values())
    assert [shard.holds("x") for shard in shards].count(True) == 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", "1/0"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="it should be i/n with 1 <= i <= n"):
        read_shard(text)


def test_merged_shards_are_what_one_run_would_have_made_and_ask_nothing_anew(tmp_path, capsys):
    bank = make_bank(tmp_path / "bank", **SMALL)
    with run_simulated(options(bank)) as url:
        whole = write_config(tmp_path / "whole" / "c.yaml", bank, url)
        assert main(["run", str(whole)]) == 0
    with run_simulated(options(bank)) as url:
        config = write_config(tmp_path / "parts" / "c.yaml", bank, url)
        out = tmp_path / "parts" / "out"
        for number in (1, 2, 3):
            assert main(["run", str(config), "--shard", f"{number}/3"]) == 0
        asked = stats(url)["completed"]
        capsys.readouterr()
        assert main(["merge", str(config)]) == 0
        told = json.loads(capsys.readouterr().out)
        assert stats(url)["completed"] == asked
    assert told["asked_anew"] == 0
    assert told["calls"] + told["paid_twice"] == asked
    assert files(out) == files(tmp_path / "whole" / "out")
    assert count(out / "journal.sqlite") == count(tmp_path / "whole" / "out" / "journal.sqlite")
    check_none_lost(bank, out)
    check_refusals(tmp_path, config, out, capsys)


def check_refusals(tmp_path: Path, config: Path, out: Path, capsys) -> None:
    first, second, third = (out / f"shard-{number}-of-3" for number in (1, 2, 3))
    copy = tmp_path / "copy"
    shutil.copytree(third, copy)
    moved = json.loads((copy / "problems.jsonl").read_text().splitlines()[0])["mcq_id"]
    with open(copy / "problems.jsonl", "a") as lines:
        lines.write((first / "problems.jsonl").read_text().splitlines()[0] + "\n")
    lost = tmp_path / "lost"
    shutil.copytree(third, lost)
    kept = (lost / "problems.jsonl").read_text().splitlines()[1:]
    (lost / "problems.jsonl").write_text("\n".join(kept) + "\n")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    refusals: dict[str, list[Path]] = {
        "shards missing of 3: 3; run them first": [first, second],
        "shard 2/3 is there twice": [first, second, second],
        "shard.json is missing": [first, second, unfinished],
        " is in ": [first, second, copy],
        f"1 questions of the bank are in no shard, first {moved}": [first, second, lost],
    }
    for words, folders in refusals.items():
        assert main(["merge", str(config), *map(str, folders)]) == 2
        said = capsys.readouterr().err.strip()
        assert words in said and "\n" not in said, said
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "seed": 7}))
    assert main(["merge", str(other)]) == 2
    assert "is a shard of another job" in capsys.readouterr().err


def test_a_call_that_two_shards_paid_is_kept_from_the_first_and_counted(tmp_path):
    async def fill(folder: Path, answer: str, time: float) -> None:
        journal = Journal(folder / "journal.sqlite")

        async def make():
            return make_call("k", answer)._replace(time=time)

        await journal.fetch("k", make)
        journal.close()

    folders = [tmp_path / name for name in ("a", "b", "c")]
    for number, (folder, answer) in enumerate(zip(folders, ["True", "True", "False"], strict=True)):
        asyncio.run(fill(folder, answer, float(number)))
    told = {"calls": 1, "paid_twice": 2, "answered_differently": 1}
    assert join_journals(folders, tmp_path / "out") == told
    assert join_journals(folders, tmp_path / "out") == told  # a merge may be repeated
    journal = Journal(tmp_path / "out" / "journal.sqlite")
    found = journal.find("k")
    journal.close()
    assert found is not None and found.answer == "True"
