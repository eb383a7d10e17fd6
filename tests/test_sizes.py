"""Architectures read from config.json: the published ones, and what is refused."""

import json
from pathlib import Path

import pytest

from medreason_jax.qwen2.sizes import read_config_file, read_sizes
from tests.tiny import FIELDS

MODELS = Path(__file__).parents[1] / "configs/models"


def test_the_14_models_have_the_published_sizes_and_parameter_counts(real_data):
    published = json.loads((real_data / "qwen2.5-configs/qwen2.5_configs.json").read_text())
    assert len(list(MODELS.glob("*.json"))) == len(published) == 14
    for name, fields in published.items():
        sizes = read_config_file(MODELS / f"{name.lower()}.json")
        assert sizes == read_sizes(fields), name
        assert sizes.parameter_count == fields["_param_count"], name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type='yarn'"),
        ({"num_attention_heads": 5}, "hidden_size=32"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        read_sizes({**FIELDS, **changes})


def test_a_config_that_lacks_fields_names_them():
    with pytest.raises(ValueError, match="rms_norm_eps"):
        read_sizes({name: value for name, value in FIELDS.items() if name != "rms_norm_eps"})
