"""Adapters against `peft`: logits, merging, files in both directions, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from medreason_jax.qwen2.lora import (
    Lora,
    Target,
    init_adapter,
    merge_adapter,
    split_adapter,
    with_adapter,
)
from medreason_jax.qwen2.model import abstract_params
from medreason_jax.qwen2.peft import read_peft

torch = pytest.importorskip("torch", reason="the export extra (torch, transformers) is missing")
peft = pytest.importorskip("peft", reason="the export extra (peft) is missing")

from tests.reference.models import (  # noqa: E402
    our_logits,
    our_network,
    our_params,
    relative_error,
    rough_reference,
    whole_rows,
)

TOKENS = np.random.default_rng(0).integers(3, 320, (2, 24))


def peft_folder(tmp_path, reference, **config):
    """A `peft` adapter with rough weights on a copy of `reference`: (folder, its logits)."""
    import copy

    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "lora_dropout": 0.1, **config})
    model = peft.get_peft_model(copy.deepcopy(reference), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2, generator=generator)
    model.save_pretrained(tmp_path / "peft")
    with torch.inference_mode():
        return tmp_path / "peft", model.eval()(torch.tensor(TOKENS)).logits.numpy()


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 4, "lora_alpha": 12, "target_modules": ALL},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["k_proj", "o_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2, "self_attn.o_proj": 6},
        "alpha_pattern": {"down_proj": 5},
    },
    "stabilised": {"r": 4, "lora_alpha": 8, "target_modules": ["up_proj"], "use_rslora": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_adapter_and_merged_logits_equal_peft(tmp_path, name):
    reference = rough_reference({})
    folder, theirs = peft_folder(tmp_path, reference, **CONFIGS[name])
    network, _ = our_network(reference)
    lora, adapter = read_peft(folder, network.sizes)
    adapted, _ = our_network(reference, lora=lora)
    params = with_adapter(our_params(reference), jax.tree.map(jnp.asarray, adapter))
    assert relative_error(our_logits(adapted, params, whole_rows(TOKENS)), theirs) <= 1e-5
    merged = merge_adapter(params, lora)
    assert relative_error(our_logits(network, merged, whole_rows(TOKENS)), theirs) <= 1e-5
    assert (
        relative_error(our_logits(network, our_params(reference), whole_rows(TOKENS)), theirs)
        > 1e-2
    )


def test_without_its_adapter_the_model_is_the_base_exactly():
    reference = rough_reference({})
    network, _ = our_network(reference)
    lora = Lora((Target("q_proj", 4, 8.0), Target("down_proj", 2, 8.0)))
    params, fresh = (
        our_params(reference),
        init_adapter(abstract_params(network.sizes, lora), jax.random.key(0)),
    )
    both = with_adapter(params, fresh)
    base, adapter = split_adapter(both)
    jax.tree.map(np.testing.assert_array_equal, base, params)
    jax.tree.map(np.testing.assert_array_equal, adapter, fresh)
    plain = our_logits(network, params, whole_rows(TOKENS))
    np.testing.assert_array_equal(our_logits(network, base, whole_rows(TOKENS)), plain)
    # A fresh adapter adds exactly nothing: B is 0.
    adapted, _ = our_network(reference, lora=lora)
    np.testing.assert_array_equal(our_logits(adapted, both, whole_rows(TOKENS)), plain)


def test_a_fresh_adapter_is_drawn_as_peft_draws_it():
    reference = rough_reference({})
    network, _ = our_network(reference)
    lora = Lora(tuple(Target(name, 16, 8.0) for name in ALL))
    flat = flatten_dict(init_adapter(abstract_params(network.sizes, lora), jax.random.key(0)))
    config = peft.LoraConfig(r=16, target_modules=ALL)
    theirs = dict(peft.get_peft_model(reference, config).named_parameters())
    for path, ours in flat.items():
        name = f"base_model.model.model.layers.0.{path[1]}.{path[2]}.{path[3]}.default.weight"
        assert ours.shape[1:] == theirs[name].T.shape
        assert float(jnp.abs(ours).max()) == pytest.approx(
            float(theirs[name].abs().max()), rel=0.05, abs=1e-9
        )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj": 2}}, "single layers"),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2}}, "single layers"),
        ({"target_modules": ["model.layers.1.self_attn.q_proj"]}, "names single layers"),
        ({"layers_to_transform": [0, 1]}, "layers_to_transform"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias='all'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "no LoRA of a linear layer"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
    ],
)
def test_a_peft_file_that_is_not_plain_stacked_lora_is_refused_by_name(tmp_path, config, words):
    reference = rough_reference({"tie_word_embeddings": False})
    plain = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    folder, _ = peft_folder(tmp_path, reference, **{**plain, **config})
    network, _ = our_network(reference)
    with pytest.raises(ValueError, match=words):
        read_peft(folder, network.sizes)


def test_an_adapter_for_another_width_is_refused(tmp_path):
    folder, _ = peft_folder(tmp_path, rough_reference({}), **CONFIGS["attention"])
    network, _ = our_network(rough_reference({"hidden_size": 64}))
    with pytest.raises(ValueError, match="q_proj goes from 32 to 32"):
        read_peft(folder, network.sizes)


@pytest.mark.parametrize(
    "targets",
    [(), (Target("x_proj", 4, 8.0),), (Target("q_proj", 0, 8.0),), (Target("q_proj", 4, 8.0),) * 2],
)
def test_targets_that_make_no_sense_are_refused(targets):
    with pytest.raises(ValueError, match="lora"):
        Lora(targets)


def test_ranks_are_written_per_projection(tmp_path):
    """Files of ours, read by `peft` itself: see test_export.py; here the config alone."""
    reference = rough_reference({})
    folder, _ = peft_folder(tmp_path, reference, **CONFIGS["patterns"])
    network, _ = our_network(reference)
    lora, _ = read_peft(folder, network.sizes)
    found = {t.projection: (t.rank, t.alpha) for t in lora.targets}
    assert found == {"k_proj": (4, 8.0), "o_proj": (6, 8.0), "down_proj": (2, 5.0)}
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
