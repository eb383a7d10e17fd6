"""Batch i depends on the seed, the schedule and i; on no mesh, and on nothing read before."""

from collections import Counter

import numpy as np
import pytest

from medreason_jax.data.dataset import Batches, Rows, Source, evaluation_batches
from medreason_jax.data.schedule import extend_schedule, start_schedule
from tests.data.test_prepare import ASK, in_memory, run
from tests.tiny import some_mesh

LENGTH = 32


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Two prepared sources of 13 and 7 rows, each row another one."""
    root = tmp_path_factory.mktemp("prepared")
    for name, rows in (("a", 13), ("b", 7)):
        records = [{"text": f"{name}{n:02} 1 2 3 4 5 6 7 8 9"} for n in range(rows)]
        facts = run(in_memory(records), "text", tokenizer, root / name, length=LENGTH)
        assert facts["rows"] == rows
    return root / "a", root / "b"


def identities(folder) -> list[bytes]:
    return [row["tokens"].tobytes() for row in Rows(folder)]


def sources(folders, weights=(1.0, 1.0)):
    return [Source(folder, weight) for folder, weight in zip(folders, weights, strict=True)]


def order(batches: Batches, rows: range) -> list[bytes]:
    return [batches.row(n)["tokens"].tobytes() for n in rows]


@pytest.mark.parametrize("change_at", [0, 8, 24, 40])
def test_each_row_comes_once_an_epoch_of_its_source_across_a_weight_change(folders, change_at):
    schedule = extend_schedule(start_schedule([1, 1]), [3, 1], change_at)
    read = order(Batches(sources(folders), 4, 5, schedule), range(200))
    for folder in folders:
        rows = identities(folder)
        own = [row for row in read if row in set(rows)]
        epochs = [own[i : i + len(rows)] for i in range(0, len(own), len(rows))]
        assert len(epochs) > 2
        for epoch in epochs[:-1]:
            assert sorted(epoch) == sorted(rows)
        assert max(Counter(epochs[-1]).values()) == 1
        assert epochs[0] != epochs[1]  # shuffled anew


def test_nothing_before_a_weight_change_moves(folders):
    before = Batches(sources(folders), 4, 5)
    schedule = extend_schedule(before.schedule, [1, 5], 40)
    after = Batches(sources(folders, (1, 5)), 4, 5, schedule)
    assert order(after, range(40)) == order(before, range(40))
    assert order(after, range(40, 90)) != order(before, range(40, 90))


def test_a_batch_is_the_same_on_any_mesh_and_in_any_order(folders):
    orders = ([0, 1, 2, 7], [7, 2, 1, 0])
    meshes = [some_mesh(shape) for shape in ((8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 1))]
    seen = [
        {i: Batches(sources(folders), 8, 5).global_batch(i, mesh) for i in order}
        for mesh in meshes
        for order in orders
    ]
    for other in seen[1:]:
        for index, batch in seen[0].items():
            for name, array in batch.items():
                assert (np.asarray(array) == np.asarray(other[index][name])).all()
    batches = Batches(sources(folders), 8, 5)
    row = np.asarray(seen[0][2]["tokens"])[3]
    assert (row == batches.row(2 * 8 + 3)["tokens"]).all()
    assert order(batches, range(16)) != order(Batches(sources(folders), 8, 6), range(16))


def test_useful_tokens_of_a_batch_are_countable(folders):
    batch = Batches(sources(folders), 8, 5).global_batch(0, some_mesh((8, 1, 1)))
    useful, counted = int((batch["segments"] > 0).sum()), int(batch["weights"].sum())
    assert counted == useful - 8  # one document a row, whose first token is no target
    assert batch["tokens"].shape == (8, LENGTH)


def test_held_out_rows_come_once_in_order_and_the_last_batch_is_filled_with_nothing(folders):
    mesh = some_mesh((4, 1, 1))
    batches = list(evaluation_batches(folders[0], 4, mesh))
    assert [batch["tokens"].shape[0] for batch in batches] == [4, 4, 4, 4]
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    assert [row.tobytes() for row in tokens[:13]] == identities(folders[0])
    for name in ("weights", "segments"):
        filled = np.concatenate([batch[name] for batch in batches])
        assert (filled[:13].max(1) > 0).all() and (filled[13:] == 0).all()


def test_other_data_have_another_fingerprint(folders, tokenizer, tmp_path):
    a, b = folders
    both = Batches(sources((a, b)), 4, 5).fingerprint
    assert both == Batches(sources((a, b), (1, 9)), 8, 6).fingerprint
    assert both != Batches(sources((b, a)), 4, 5).fingerprint
    run(in_memory([{"text": "other"}]), "text", tokenizer, tmp_path / "b", length=LENGTH)
    assert both != Batches(sources((a, tmp_path / "b")), 4, 5).fingerprint


def test_sources_that_do_not_fit_each_other_or_the_schedule_are_refused(
    folders, tokenizer, tmp_path
):
    side = {"thinking": "x", "response": "y"}
    pair = {"prompt": [ASK], "chosen": side, "rejected": side}
    run(in_memory([pair]), "preference", tokenizer, tmp_path / "p", length=256, pairs_per_row=1)
    with pytest.raises(ValueError, match="cannot be mixed"):
        Batches(sources((folders[0], tmp_path / "p")), 4, 5)
    with pytest.raises(ValueError, match="the schedule is of 1 sources, given are 2"):
        Batches(sources(folders), 4, 5, start_schedule([1]))
