"""Bad configs: one line that names the field, the value and what was allowed."""

from pathlib import Path

import pytest
import yaml

from medreason_jax.config import TrainConfig, load_yaml, save_yaml, validate
from medreason_jax.recipe import RecipeConfig

STAGE = {
    "kind": "sft",
    "folder": "f",
    "model": "m",
    "length": 64,
    "batch_rows": 2,
    "steps": 1,
    "sources": [{"path": "x.jsonl", "kind": "sft"}],
    "optimizer": {"learning_rate": 1e-3},
}


def recipe(**changes):
    stages = [
        {"name": "cpt", "kind": "cpt", "settings": {}},
        {"name": "sft", "kind": "sft", "start": "cpt", "settings": {}},
    ]
    values = {
        "name": "x",
        "model": {"folder": "m"},
        "formulary": {},
        "data_gen": {"teacher": {"reasoner": {}}},
        "stages": stages,
        "evaluation": {"part": "p"},
    }
    return {**values, **changes}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({**STAGE, "lenght": 5}, ["lenght", "length"]),
        (
            {**STAGE, "optimizer": {"learning_rate": 1e-3, "warmup": 1}},
            ["optimizer.warmup", "warmup_ratio"],
        ),
        ({**STAGE, "length": 0}, ["length", "1", "0"]),
        ({**STAGE, "dtype": "float16"}, ["dtype", "float16", "bfloat16"]),
        ({**STAGE, "unroll": "foo"}, ["unroll: a number of layers", "'auto'", "foo"]),
        ({**STAGE, "unroll": 0}, ["unroll: a number of layers", "at least 1", "0"]),
        ({**STAGE, "unroll": True}, ["unroll: a number of layers", "True"]),
        ({**STAGE, "epochs": 2}, ["steps", "epochs"]),
        ({k: v for k, v in STAGE.items() if k != "model"}, ["model", "required"]),
    ],
)
def test_a_bad_stage_config_is_one_line(values, words):
    with pytest.raises(ValueError) as error:
        validate(TrainConfig, values, "sft.yaml")
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in ["sft.yaml", *words])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"stages": [{"name": "a", "kind": "cpt", "start": "b", "settings": {}}]},
            ["start", "'b'", "base"],
        ),
        ({"stages": [{"name": "a", "kind": "cpt", "settings": {}}] * 2}, ["'a'", "twice"]),
        ({"formulary": None}, ["formulary", "question_bank"]),
        (
            {"stages": [{"name": "a", "kind": "cpt", "replay": 0.5, "settings": {}}]},
            ["replay", "sft"],
        ),
    ],
)
def test_a_recipe_whose_stages_do_not_connect_is_refused(changes, words):
    with pytest.raises(ValueError) as error:
        validate(RecipeConfig, recipe(**changes), "recipe.yaml")
    assert all(word in str(error.value) for word in words)


CONTROL = {"name": "c", "kind": "sft", "start": "base", "against": "sft", "settings": {}}
PAIRS = {**CONTROL, "kind": "prefer", "start": "sft", "pairs_of": "rpo"}
RPO = {"name": "rpo", "kind": "prefer", "settings": {}}
PPO = {"name": "ppo", "kind": "ppo", "settings": {}}


def with_controls(*controls):
    stages = [*recipe()["stages"], RPO, PPO]
    return validate(RecipeConfig, recipe(stages=stages, controls=controls), "recipe.yaml")


def test_controls_name_stages_before_them():
    config = with_controls(CONTROL, {**PAIRS, "name": "d", "seconds_of": "ppo"})
    assert [control.against for control in config.controls] == ["sft", "sft"]


@pytest.mark.parametrize(
    ("control", "words"),
    [
        ({**CONTROL, "start": None}, ["'c'", "start"]),
        ({**CONTROL, "start": "x"}, ["controls.c.start='x'", "base"]),
        ({**CONTROL, "seconds_of": "ppo"}, ["controls.c.start='base'", "allowed: ['cpt', 'sft'"]),
        ({**CONTROL, "start": "ppo", "seconds_of": "ppo"}, ["controls.c.start='ppo'"]),
        ({**CONTROL, "against": "base"}, ["controls.c.against='base'", "cpt"]),
        ({**PAIRS, "pairs_of": "sft"}, ["controls.c.pairs_of='sft'", "allowed: [None, 'rpo']"]),
        ({**PAIRS, "candidates": {"problems": 3}}, ["'c'", "candidates"]),
        ({**PAIRS, "pairs_of": None}, ["kind prefer", "pairs_of"]),
        ({**CONTROL, "kind": "ppo"}, ["kind ppo", "allowed: cpt, sft"]),
        ({**PAIRS, "seconds_of": "x"}, ["controls.c.seconds_of='x'"]),
        ({**PAIRS, "seconds_of": "sft", "settings": {"steps": 3}}, ["seconds_of", "'steps'"]),
        ({**CONTROL, "name": "sft"}, ["name", "twice"]),
    ],
)
def test_a_control_that_does_not_connect_is_refused(control, words):
    with pytest.raises(ValueError) as error:
        with_controls(control)
    assert all(word in str(error.value) for word in words), error.value


def test_overrides_reach_fields_and_named_items(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe()))
    values = load_yaml(path, ["seed=3", "stages.sft.settings.steps=7", "formulary.drugs=80"])
    config = validate(RecipeConfig, values, "recipe.yaml")
    assert config.seed == 3 and config.formulary == {"drugs": 80}
    assert config.stages[1].settings == {"steps": 7}
    with pytest.raises(ValueError, match=r"no item named 'sfd'; found \['cpt', 'sft'\]"):
        load_yaml(path, ["stages.sfd.settings.steps=7"])


def test_a_saved_config_loads_back_to_the_same(tmp_path):
    stage = validate(TrainConfig, STAGE, "stage")
    save_yaml(stage, tmp_path / "stage.yaml")
    assert validate(TrainConfig, load_yaml(tmp_path / "stage.yaml", []), "again") == stage
    for name in ("formulary", "formulary_short", "medical_smoke", "own_bank"):
        values = load_yaml(Path(__file__).parents[1] / f"configs/recipes/{name}.yaml", [])
        config = validate(RecipeConfig, values, name)
        save_yaml(config, tmp_path / "recipe.yaml")
        again = validate(RecipeConfig, load_yaml(tmp_path / "recipe.yaml", []), "again")
        assert again == config
