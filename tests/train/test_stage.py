"""A training stage in one process: what it measures, writes, refuses and leaves on disk."""

import json
import signal
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from medreason_jax.checkpoint import open_stores
from medreason_jax.config import MeshConfig, TrainConfig
from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.dataset import Batches, Rows, Source
from medreason_jax.data.sources import write_lines
from medreason_jax.data.tokenizer_training import train_tokenizer
from medreason_jax.generate.prompts import prompt_ids
from medreason_jax.generate.sampling import Sampling
from medreason_jax.mesh import path_name
from medreason_jax.qwen2.folder import Description, ModelFolder, save_model
from medreason_jax.qwen2.huggingface import leaves
from medreason_jax.qwen2.load import load_model
from medreason_jax.qwen2.sizes import read_sizes
from medreason_jax.train.run import Stopped, Trace
from medreason_jax.train.stage import train_stage
from tests.tiny import FIELDS, rough_params, tiny_model

DRUGS = ("Velotan", "Maridol", "Sorbex", "Tilazin", "Quenol", "Ristane")
ROWS, LENGTH = 8, 64


@pytest.fixture(scope="module", autouse=True)
def untouched_process():
    """A stage sets its compilation cache and the answer to SIGTERM for the whole process."""
    cache, handler = jax.config.jax_compilation_cache_dir, signal.getsignal(signal.SIGTERM)
    yield
    jax.config.update("jax_compilation_cache_dir", cache)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a base model, texts, conversations and prompts."""
    root = tmp_path_factory.mktemp("stage")
    texts = [f"{drug} is given {n} times a day.\n" for drug in DRUGS for n in range(1, 9)]
    train_tokenizer(texts, 340, "Be brief.", root / "tokenizer")
    tokenizer = ChatTokenizer(root / "tokenizer")
    sizes = read_sizes({**FIELDS, "vocab_size": tokenizer.vocab_size})
    save_model(root / "base", rough_params(sizes), Description(sizes), tokenizer)
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"How often is {drug} given?"},
                {"role": "assistant", "content": f"{n} times."},
            ]
        }
        for drug in DRUGS
        for n in range(1, 9)
    ]
    write_lines(root / "texts.jsonl", [{"text": text} for text in texts[8:]])
    write_lines(root / "other_texts.jsonl", [{"text": text} for text in texts[:8]])
    write_lines(root / "chats.jsonl", chats[8:])
    write_lines(root / "other_chats.jsonl", chats[:7])
    write_lines(root / "prompts.jsonl", [{"prompt": f"{drug} is"} for drug in DRUGS])
    return root


FALLS_THEN_RISES = {"learning_rate": 2.0, "warmup_ratio": 0.9}  # the loss


def source(place: Path, name: str) -> dict[str, Any]:
    kind = "sft" if "chats" in name else "text"
    return {"path": str(place / f"{name}.jsonl"), "kind": kind}


def config(place: Path, name: str, **changes) -> TrainConfig:
    values: dict[str, Any] = {
        "folder": str(place / name),
        "model": str(place / "base"),
        "kind": "cpt",
        "length": LENGTH,
        "batch_rows": ROWS,
        "steps": 4,
        "attention": "xla",
        "optimizer": {"learning_rate": 0.01, "warmup_ratio": 0.0},
        "sources": [source(place, "texts")],
    }
    return TrainConfig.model_validate({**values, **changes})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(place) -> Path:
    """A finished stage that measured, sampled and profiled; its train states are kept."""
    held_out = [source(place, "other_texts"), source(place, "other_chats")]
    given = config(
        place,
        "measured",
        steps=8,
        optimizer=FALLS_THEN_RISES,
        sources=[source(place, "texts"), source(place, "chats")],
        checkpoint_every=2,
        keep_last=1,
        keep_states=True,
        held_out={"sources": held_out, "every": 3},
        samples={"prompts": str(place / "prompts.jsonl"), "every": 5, "count": 3}
        | {"max_new_tokens": 6},
        profile={"first_step": 2, "steps": 2},
    )
    train_stage(given)
    return given.folder


def read_tree(model: ModelFolder) -> dict[str, Any]:
    """All parameters of a folder, adapters added, as our tree."""

    def read(path, leaf):
        name = path_name(path)
        if "layers" not in name.split("."):
            return model.read(name, None)
        return np.stack([model.read(name, layer) for layer in range(leaf.shape[0])])

    return jax.tree_util.tree_map_with_path(read, model.abstract)


def state_params(folder: Path, abstract) -> dict[str, Any]:
    """Parameters of a train state, past Orbax's own restore."""
    stores = open_stores(folder / "state")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: stores[f"params.{path_name(path)}"].read().result(), abstract
    )


@cache
def hidden_states(vocab_size: int):
    return jax.jit(tiny_model(vocab_size=vocab_size)[1].hidden)


def plain_sums(params, row: dict[str, np.ndarray]) -> tuple[float, float]:
    """NLL and number of a row's targets, from all logits in float64."""
    inputs = [row[name][None] for name in ("tokens", "positions", "segments")]
    hidden = hidden_states(params["embed_tokens"]["embedding"].shape[0])
    h_TD = np.asarray(hidden(params, *inputs)[0], np.float64)
    z_TV = h_TD @ np.asarray(params["embed_tokens"]["embedding"], np.float64).T
    z_TV -= z_TV.max(axis=-1, keepdims=True)
    label_T = z_TV[np.arange(len(z_TV)), row["targets"]]
    nll_T = np.log(np.exp(z_TV).sum(axis=-1)) - label_T
    return float(np.sum(nll_T * row["weights"])), float(np.sum(row["weights"]))


def plain_loss(params, rows) -> float:
    sums = np.array([plain_sums(params, row) for row in rows])
    nll, weight = sums.sum(axis=0)
    return nll / weight


def held_out_lines(folder: Path) -> dict[int, dict[str, float]]:
    return {
        line["step"]: line for line in lines(folder / "metrics.jsonl") if "held_out_loss" in line
    }


def test_held_out_losses_come_at_the_cadence_and_with_every_saved_state(measured):
    assert list(held_out_lines(measured)) == [2, 3, 4, 6, 8]
    trained = [line["step"] for line in lines(measured / "metrics.jsonl") if "loss" in line]
    assert trained == list(range(1, 9))


def test_held_out_losses_equal_a_plain_pass_over_the_prepared_rows(measured):
    model = ModelFolder(measured)
    names = ("other_texts", "other_chats")
    rows = {name: list(Rows(measured / "prepared" / f"held_out-{name}")) for name in names}
    best = best_saved(measured)
    states = {8: read_tree(model), best: state_params(measured / f"states/{best}", model.abstract)}
    for step, params in states.items():
        found = held_out_lines(measured)[step]
        for name in names:
            expected = plain_loss(params, rows[name])
            assert found[f"held_out_loss/{name}"] == pytest.approx(expected, rel=1e-5)
        expected = plain_loss(params, [row for name in names for row in rows[name]])
        assert found["held_out_loss"] == pytest.approx(expected, rel=1e-5)


def best_saved(folder: Path) -> int:
    return min((2, 4, 6, 8), key=lambda step: held_out_lines(folder)[step]["held_out_loss"])


def test_the_best_state_outlives_later_ones(measured):
    best = best_saved(measured)
    assert best < 6  # or the best would be one of the last anyway
    found = {int(path.name) for path in (measured / "states").iterdir() if path.name.isdigit()}
    assert found == {best, 8}


def test_a_stage_may_finish_with_its_best_state(place, measured):
    held_out = {"sources": [source(place, "other_texts")], "every": 3, "finish_with": "best"}
    changes = {"optimizer": FALLS_THEN_RISES, "checkpoint_every": 2, "keep_last": 1}
    given = config(place, "best", steps=8, keep_states=True, held_out=held_out, **changes)
    manifest = train_stage(given)
    model, best = ModelFolder(given.folder), best_saved(given.folder)
    assert manifest["model_step"] == best < 8
    saved = state_params(given.folder / f"states/{best}", model.abstract)
    jax.tree.map(np.testing.assert_array_equal, read_tree(model), saved)


def test_samples_are_the_greedy_answers_of_the_model(measured, place):
    written = lines(measured / "samples.jsonl")
    assert [line["step"] for line in written] == [5, 5, 5, 8, 8, 8]
    prompts = lines(place / "prompts.jsonl")[:3]
    assert [line["prompt"] for line in written[3:]] == [record["prompt"] for record in prompts]
    model = load_model(measured, MeshConfig(), "float32")
    vocab_size = model.network.sizes.vocab_size
    ids = [prompt_ids(model.tokenizer, record, "prompts", vocab_size) for record in prompts]
    answers = model.engine(3).generate(model.params, ids, Sampling(0.0, 0, 1.0, 6), seed=0)
    for line, answer in zip(written[3:], answers, strict=True):
        assert line["text"] == model.tokenizer.decode(answer.ids)
        assert line["finish_reason"] == answer.finish_reason
    assert any(line["text"] for line in written)


def test_sample_prompts_that_cannot_be_answered_are_refused(place, tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    for prompts, new, message in (
        (tmp_path / "none.jsonl", 6, r"samples\.prompts: .* holds no prompt"),
        (place / "prompts.jsonl", 512, r"length=\d+ is beyond the model's longest row, 512"),
    ):
        samples = {"prompts": str(prompts), "every": 5, "count": 3, "max_new_tokens": new}
        with pytest.raises(ValueError, match=message):
            train_stage(config(place, "x", folder=str(tmp_path / "run"), samples=samples))


def test_pace_is_written_for_every_step(measured):
    found = lines(measured / "speed.jsonl")
    assert [line["step"] for line in found] == list(range(1, 9))
    for line in found:
        assert line["tokens_per_second"] > 0 and line["step_seconds"] > 0
        assert 0 < line["goodput"] < 1 and 0 <= line["padding_share"] < 0.5
        assert line["compile_seconds"] > 0


def test_the_manifest_tells_what_the_stage_did(measured, place):
    found = json.loads((measured / "manifest.json").read_text())
    assert found["kind"] == "cpt" and found["steps"] == 8 and found["model"] == "model"
    assert (measured / found["parent"]).resolve() == (place / "base").resolve()
    assert [facts["records"] for facts in found["data"]] == [40, 40]
    assert 0 < found["goodput"] < 1
    seconds = {"compile_seconds", "held_out_seconds", "samples_seconds", "save_seconds"}
    assert seconds < set(found) and found["seconds"] > found["compile_seconds"]


def test_chosen_steps_are_traced(measured):
    assert list((measured / "profile").rglob("*.xplane.pb"))


def test_a_loss_that_is_not_finite_ends_the_stage_with_the_last_good_state(
    place, tmp_path, monkeypatch
):
    given = config(place, "x", folder=str(tmp_path / "broken"), checkpoint_every=2)
    row = Batches.row

    def broken(self, number):
        found = row(self, number)
        bad = number // ROWS == 2  # of step 3
        return {**found, "weights": found["weights"] * np.float32(np.nan if bad else 1.0)}

    monkeypatch.setattr(Batches, "row", broken)
    with pytest.raises(RuntimeError, match=r"nan at step 3; the last good state is of step 2"):
        train_stage(given)
    monkeypatch.undo()
    before = lines(given.folder / "metrics.jsonl")
    assert [line["step"] for line in before] == [1, 2]
    assert (given.folder / "states/2").is_dir() and not (given.folder / "manifest.json").exists()
    train_stage(given)  # goes on from it
    after = lines(given.folder / "metrics.jsonl")
    assert after[:2] == before and [line["step"] for line in after[2:]] == [3, 4]


def test_a_changed_config_is_refused_by_name_unless_it_is_accepted(place, tmp_path, monkeypatch):
    folder = str(tmp_path / "run")

    def stop(_, unit: int) -> None:
        if unit == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trace, "before", stop)
    steady = {"schedule": "constant", "warmup_ratio": 0.0}
    with pytest.raises(Stopped, match="stopped at 2 of 4"):
        train_stage(config(place, "x", folder=folder, optimizer={"learning_rate": 0.01, **steady}))
    monkeypatch.undo()
    changed = {"folder": folder, "optimizer": {"learning_rate": 0.02, **steady}}
    with pytest.raises(ValueError, match=r"begun with optimizer=.*accept_changes: \[optimizer\]"):
        train_stage(config(place, "x", **changed))
    train_stage(config(place, "x", **changed, accept_changes=["optimizer"]))
    found = lines(Path(folder) / "metrics.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    rates = [line["learning_rate"] for line in found]
    assert rates == pytest.approx([0.01, 0.01, 0.02, 0.02])


LORA = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj", "down_proj"]}
OTHER_LORA = {"rank": 2, "alpha": 6.0, "targets": ["q_proj", "up_proj"]}
SCALES = {"sft": {"q_proj": 2.0, "v_proj": 2.0, "down_proj": 2.0}} | {
    "more_sft": {"q_proj": 3.0, "up_proj": 3.0}
}


def add_adapter(tree, stage: Path, scales: dict[str, float]) -> None:
    """Add a stage's adapter to the kernels, by the formula of arXiv 2106.09685."""
    stores = open_stores(stage / "model/adapter")
    assert {path.split(".")[-2] for path in stores} == set(scales)
    for path in stores:
        *module, part = path.split(".")
        if part == "lora_A":
            A_LDR = stores[path].read().result()
            B_LRE = stores[".".join([*module, "lora_B"])].read().result()
            assert np.any(B_LRE)
            node = tree
            for name in module:
                node = node[name]
            node["kernel"] = node["kernel"] + scales[module[-1]] * np.einsum(
                "ldr,lre->lde", A_LDR, B_LRE
            )


def test_a_chain_of_adapters_is_the_model_merged_by_hand(place, tmp_path):
    stages = {name: tmp_path / name for name in ("cpt", "sft", "more_sft")}
    chats = {"kind": "sft", "sources": [source(place, "chats")], "steps": 3}
    train_stage(config(place, "x", folder=str(stages["cpt"]), steps=2))
    for name, parent, lora in (("sft", "cpt", LORA), ("more_sft", "sft", OTHER_LORA)):
        settings = {"folder": str(stages[name]), "model": str(stages[parent]), "lora": lora}
        train_stage(config(place, "x", **settings, **chats))
        assert not (stages[name] / "model/params").exists()
    by_hand = read_tree(ModelFolder(stages["cpt"]))
    add_adapter(by_hand, stages["sft"], SCALES["sft"])

    # The first loss of a stage is that of the model that it starts from.
    batches = Batches([Source(stages["more_sft"] / "prepared/0-chats", 1.0)], ROWS, seed=0)
    first = lines(stages["more_sft"] / "metrics.jsonl")[0]["loss"]
    rows = [batches.row(number) for number in range(ROWS)]
    assert first == pytest.approx(plain_loss(by_hand, rows), rel=1e-5)

    add_adapter(by_hand, stages["more_sft"], SCALES["more_sft"])
    merged = read_tree(ModelFolder(stages["more_sft"]))
    for (name, ours), (_, expected) in zip(leaves(merged), leaves(by_hand), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7, err_msg=name)
