"""Architectures read from config.json: the published ones, `transformers`' own, the refused."""

import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from medreason_jax.qwen2.rope import Yarn, rope_frequencies
from medreason_jax.qwen2.sizes import (
    DEFAULT_DTYPE,
    LANGUAGE_MODEL,
    REQUIRED,
    Labels,
    config_fields,
    read_architecture,
    read_config_file,
    read_sizes,
    weights_dtype,
)
from tests.tiny import FIELDS

MODELS = Path(__file__).parents[2] / "configs/models"
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
CLASSIFIERS = ["Qwen2ForSequenceClassification", "Qwen2ForTokenClassification"]
ARCHITECTURES = [LANGUAGE_MODEL, *CLASSIFIERS]
NEW_FIELDS = {name: value for name, value in FIELDS.items() if name != "rope_theta"}


@pytest.fixture
def transformers():
    reason = "the export extra (torch, transformers) is not installed"
    pytest.importorskip("torch", reason=reason)
    return pytest.importorskip("transformers", reason=reason)


def unnamed(count: int) -> Labels:
    return Labels(tuple(f"LABEL_{label}" for label in range(count)))


def saved_fields(transformers, folder, architecture=LANGUAGE_MODEL, **fields):
    """The config.json that `transformers` writes beside a tiny bfloat16 model's weights."""
    config = transformers.Qwen2Config(**{**FIELDS, **fields})
    getattr(transformers, architecture)(config).bfloat16().save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def frequencies(transformers, folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    embedding = transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding(config)
    return embedding.inv_freq.numpy(), embedding.attention_scaling


def test_the_14_models_have_the_published_sizes_and_parameter_counts(real_data):
    published = json.loads((real_data / "qwen2.5-configs/qwen2.5_configs.json").read_text())
    assert len(list(MODELS.glob("*.json"))) == len(published) == 14
    for name, fields in published.items():
        sizes = read_config_file(MODELS / f"{name.lower()}.json")
        assert sizes == read_sizes(fields), name
        assert sizes.parameter_count == fields["_param_count"], name
        assert sizes.max_length == fields["max_position_embeddings"], name
        assert weights_dtype(fields) == "bfloat16", name
        assert read_architecture(fields) == (LANGUAGE_MODEL, None), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_that_transformers_saved_is_read(transformers, architecture, tmp_path):
    fields = saved_fields(transformers, tmp_path, architecture, num_labels=3)
    assert read_sizes(fields) == read_sizes(FIELDS)
    labels = None if architecture == LANGUAGE_MODEL else unnamed(3)
    assert read_architecture(fields) == (architecture, labels)
    assert weights_dtype(fields) == "bfloat16"


def test_all_that_transformers_knows_of_a_config_is_read(transformers):
    config = transformers.Qwen2Config(**FIELDS)
    assert read_sizes(json.loads(config.to_json_string(use_diff=False))) == read_sizes(FIELDS)
    assert read_sizes(transformers.Qwen2Config().to_diff_dict()).rope_theta == 10000.0


def test_what_is_implemented_may_be_spelled_out():
    spelled = {"head_dim": 8, "layer_types": ["full_attention"] * 3, "sliding_window": 4096}
    assert read_sizes({**FIELDS, **REQUIRED, **spelled, "_note": "x"}) == read_sizes(FIELDS)
    assert read_sizes({**FIELDS, "partial_rotary_factor": 1.0}) == read_sizes(FIELDS)


@pytest.mark.parametrize(
    "labels",
    [
        unnamed(1),
        unnamed(2),
        Labels(("wrong", "right", "unscored"), "single_label_classification"),
        Labels(("score",), "regression"),
        Labels(tuple(f"{n}" for n in reversed(range(12)))),
    ],
    ids=lambda labels: f"{labels.names[0]}-{len(labels.names)}",
)
@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_transformers_reads_back_the_classifier_that_is_written(
    transformers, architecture, labels, tmp_path
):
    sizes = read_sizes(FIELDS)
    fields = config_fields(sizes, 3, 4, "bfloat16", architecture=architecture, labels=labels)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.num_labels, str(config.dtype)) == (len(labels.names), "torch.bfloat16")
    assert (config.id2label, config.problem_type) == (
        dict(enumerate(labels.names)),
        labels.problem_type,
    )
    assert (config.eos_token_id, config.pad_token_id) == (3, 4)
    assert config.architectures == [architecture]
    assert read_sizes(fields) == sizes
    assert read_architecture(fields) == (architecture, labels)
    assert weights_dtype(fields) == "bfloat16"
    named = {"id2label": config.id2label, "label2id": config.label2id}
    named["problem_type"] = labels.problem_type
    saved = saved_fields(transformers, tmp_path / "saved", architecture, **named)
    assert read_architecture(saved) == (architecture, labels)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        YARN,
        {"factor": 2.0},
        {"factor": None, "original_max_position_embeddings": 128},
        {**YARN, "attention_factor": 1.5},
        {**YARN, "beta_fast": 8, "beta_slow": 2.0, "truncate": False},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
        {**YARN, "mscale": None, "beta_fast": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("spelling", ["type", "rope_type", "rope_parameters"])
def test_rope_scaling_is_read_and_written_as_transformers_reads_it(
    transformers, spelling, scaling, tmp_path
):
    kind = "default" if scaling is None else "yarn"
    if spelling == "rope_parameters":
        rope = {"rope_type": kind, "rope_theta": 1e6, **(scaling or {})}
        fields = {"model_type": "qwen2", **NEW_FIELDS, "rope_parameters": rope}
    else:
        rope = {spelling: kind, **(scaling or {})}
        fields = {"model_type": "qwen2", **FIELDS, "rope_scaling": rope}
    sizes = read_sizes(fields)
    for name, content in (
        ("given", fields),
        ("written", config_fields(sizes, 0, 0, "float32")),
        ("saved", saved_fields(transformers, tmp_path / "tmp", **fields)),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
        assert read_sizes(content) == sizes, name
    given_h, given_factor = frequencies(transformers, tmp_path / "given")
    written_h, written_factor = frequencies(transformers, tmp_path / "written")
    np.testing.assert_array_equal(given_h, written_h)
    assert given_factor == written_factor
    ours_h, ours_factor = rope_frequencies(sizes.head_dim, sizes.rope_theta, sizes.rope_scaling)
    np.testing.assert_array_max_ulp(ours_h, given_h, maxulp=2)
    assert ours_factor == pytest.approx(given_factor, rel=1e-12)


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (None, 512),
        ({"factor": 4.0}, 2048),
        ({"factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"factor": 2.0, "original_max_position_embeddings": 128}, 512),
        ({"factor": 1.5, "original_max_position_embeddings": 1001}, 1501),
    ],
)
def test_the_longest_row_is_the_stretched_one_where_that_is_longer(scaling, longest):
    rope = None if scaling is None else {"type": "yarn", **scaling}
    assert read_sizes({**FIELDS, "rope_scaling": rope}).max_length == longest


def test_sizes_are_static_in_jit():
    calls = []

    @jax.jit
    def scaled(sizes, x):
        calls.append(sizes)
        return x * sizes.max_length

    yarn = {**FIELDS, "rope_scaling": {"type": "yarn", "factor": 2.0}}
    assert scaled(read_sizes(yarn), 1) == 1024
    assert scaled(read_sizes(yarn), 2) == 2048
    assert scaled(read_sizes(FIELDS), 1) == 512
    assert len(calls) == len({hash(sizes) for sizes in calls}) == 2
    assert calls[0].rope_scaling == Yarn(2.0, 512)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen2_moe"}, "model_type='qwen2_moe'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "'sliding_attention'"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types has 2 entries"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"qkv_bias": False}, "qkv_bias=False"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"is_causal": False}, "is_causal=False.*remove"),
        ({"dual_chunk_attention_config": {}}, "dual_chunk_attention_config={}.*remove"),
        ({"original_max_position_embeddings": 128}, "original_max_position_embeddings=128"),
        ({"num_attention_heads": 5}, "hidden_size=32"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_attention_heads": 32}, "is odd"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words):
        read_sizes({**FIELDS, **changes})


INTEGERS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
]


@pytest.mark.parametrize(
    ("names", "values", "allowed"),
    [
        (INTEGERS, [0, -1, "32", 32.0, True, [32]], "a whole number above 0"),
        (
            ["rms_norm_eps", "initializer_range"],
            [0, -1, "1e-6", True, math.nan, math.inf, 10**400, {"a": 1}],
            "a finite number above 0",
        ),
        (["rope_theta"], [0.0, 1.0, 1, "1e6", True, math.inf, 10**400], "a finite number above 1"),
        (["tie_word_embeddings"], ["false", 0, 1, 1.0], "true or false"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(names, values, allowed):
    for name in names:
        for value in values:
            words = re.escape(f"{name}={value!r:.80} in config.json; allowed: {allowed}")
            with pytest.raises(ValueError, match=words):
                read_sizes({**FIELDS, name: value})


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_theta": "1e6"}, ".rope_theta='1e6' in config.json; allowed: a finite number"),
        ({"rope_theta": [1e6]}, ".rope_theta=[1000000.0] in config.json"),
        ({"rope_theta": 1.0, "type": "yarn", **YARN}, ".rope_theta=1.0 in config.json"),
        ({"rope_type": ["yarn"]}, "rope_type=['yarn'] is not implemented"),
        ({"rope_type": {}, "type": "yarn"}, "rope_type={} and 'yarn'"),
        ({"type": "yarn", "factor": [4.0]}, "factor=[4.0] should be a number"),
        ({"type": "yarn", **YARN, "factor": 10**400}, "should be a number"),
        (
            {"type": "yarn", "factor": None, "original_max_position_embeddings": 0},
            "original_max_position_embeddings=0 should be above 0",
        ),
        (
            {"type": "yarn", "factor": None, "original_max_position_embeddings": "128"},
            "original_max_position_embeddings='128' should be a whole number",
        ),
    ],
    ids=str,
)
def test_a_rotary_value_of_another_kind_is_refused_by_name(spelling, rope, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        read_sizes({**NEW_FIELDS, spelling: {"rope_theta": 1e6, **rope}})


@pytest.mark.parametrize("types", [3, "full_attention", {"0": "full_attention"}, [["x"], 1]])
def test_layer_types_of_another_kind_are_refused_by_name(types):
    with pytest.raises(ValueError, match="layer_types"):
        read_sizes({**FIELDS, "layer_types": types})


def test_a_number_may_be_written_without_a_point():
    sizes = read_sizes({**FIELDS, "rope_theta": 1000000, "rms_norm_eps": 1})
    assert sizes == read_sizes({**FIELDS, "rms_norm_eps": 1.0})
    assert type(sizes.rope_theta) is type(sizes.rms_norm_eps) is float


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"{", "is not JSON"), (b"\xff{}", "is not JSON"), (b"[]", "not a JSON object")],
)
def test_a_config_file_that_holds_no_object_is_named(tmp_path, content, words):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=re.escape(f"{path} does not exist")):
        read_config_file(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{words}"):
        read_config_file(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope_type='llama3'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling of type 'yarn' lacks factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "finetuned": 1}}, "finetuned=1"),
        ({"rope_scaling": {"type": "default", "factor": 2.0}}, "factor=2.0"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "default"}}, "rope_type="),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor=0.5"),
        ({"rope_scaling": 4.0}, "rope_scaling=4.0 should be a dictionary"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "contradicts"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn", **YARN}},
            "contradict each other",
        ),
        (
            {
                "rope_parameters": {"rope_type": "yarn", **YARN},
                "rope_scaling": {"type": "yarn", "factor": 4.0},
            },
            "contradict each other",
        ),
    ],
)
def test_a_rotary_embedding_that_is_not_implemented_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        read_sizes({**FIELDS, **changes})


def test_two_spellings_that_agree_are_read():
    yarn = {"type": "yarn", **YARN}
    new = {"rope_type": "yarn", "rope_theta": 1e6, **YARN}
    both = {**FIELDS, "rope_scaling": yarn, "rope_parameters": new}
    assert read_sizes(both).rope_scaling == Yarn(4.0, 128)


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta", "tie_word_embeddings"])
def test_a_config_that_lacks_fields_names_them(name):
    with pytest.raises(ValueError, match=name):
        read_sizes({key: value for key, value in FIELDS.items() if key != name})
    with pytest.raises(ValueError, match=name):
        read_sizes({**FIELDS, name: None})


def test_theta_is_not_guessed_where_the_rope_parameters_lack_it():
    with pytest.raises(ValueError, match="lacks rope_theta"):
        read_sizes({**NEW_FIELDS, "rope_parameters": {"rope_type": "default"}})


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({}, DEFAULT_DTYPE),
        ({"torch_dtype": None}, DEFAULT_DTYPE),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "torch_dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_the_type_of_the_weights_has_two_names(fields, dtype):
    assert weights_dtype(fields) == dtype


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn'"),
        ({"torch_dtype": "auto"}, "torch_dtype='auto'"),
        ({"dtype": ["float32"]}, "dtype=.'float32'. is not implemented"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "contradicts itself"),
    ],
)
def test_other_types_of_weights_are_refused_by_name(fields, words):
    with pytest.raises(ValueError, match=words):
        weights_dtype(fields)


def test_a_config_without_architecture_is_a_language_model():
    assert read_architecture({}) == (LANGUAGE_MODEL, None)
    assert read_architecture({"architectures": None}) == (LANGUAGE_MODEL, None)
    assert read_architecture({"architectures": [CLASSIFIERS[0]], "num_labels": 7})[1] == unnamed(7)
    assert read_architecture({"architectures": [CLASSIFIERS[0]]})[1] == unnamed(2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": ["Qwen2ForQuestionAnswering"]}, "Qwen2ForQuestionAnswering"),
        ({"architectures": ARCHITECTURES}, "Qwen2ForCausalLM"),
        ({"architectures": LANGUAGE_MODEL}, "a list of one of"),
        ({"architectures": 5}, "architectures=5"),
        ({"architectures": [["Qwen2ForCausalLM"]]}, "a list of one of"),
    ],
)
def test_other_architectures_are_refused_by_name(fields, words):
    with pytest.raises(ValueError, match=words):
        read_architecture(fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_labels": 3, "id2label": {"0": "a"}}, "num_labels=3 contradicts id2label"),
        ({"num_labels": 0}, "num_labels=0"),
        ({"num_labels": -1}, "num_labels=-1"),
        ({"num_labels": "2"}, "num_labels='2'"),
        ({"num_labels": True}, "num_labels=True"),
        ({"id2label": ["a", "b"]}, "id2label=['a', 'b']"),
        ({"id2label": 2}, "id2label=2"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label={'0': 'a', '2': 'b'}"),
        ({"id2label": {"0": None}}, "id2label={'0': None}"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1, "b": 0}}, "label2id={'a': 1"),
        ({"label2id": {"a": 0, "b": 1}}, "label2id={'a': 0"),
        ({"problem_type": "ranking"}, "problem_type='ranking'; allowed: null or one of"),
        ({"problem_type": ["regression"]}, "problem_type=['regression']"),
    ],
    ids=str,
)
def test_labels_that_cannot_be_kept_are_refused_by_name(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        read_architecture({"architectures": [CLASSIFIERS[0]], **fields})
    assert read_architecture({"architectures": [LANGUAGE_MODEL], **fields})[1] is None
