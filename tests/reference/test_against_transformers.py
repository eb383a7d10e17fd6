"""The model against `transformers`: logits, gradients, packing, generation, the exported folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.tokenizer_training import train_tokenizer
from medreason_jax.generate.engine import Engine
from medreason_jax.generate.sampling import Sampling
from medreason_jax.mesh import tree_shardings
from medreason_jax.qwen2.huggingface import export_folder, import_params
from medreason_jax.qwen2.model import make_network
from medreason_jax.qwen2.sizes import read_config_file
from tests.tiny import tiny_model

torch = pytest.importorskip(
    "torch", reason="the export extra (torch, transformers) is not installed"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Velotan is given 2 times a day."] * 20, 320, "Answer.", folder)
    return ChatTokenizer(folder)


def export(tmp_path, tokenizer, **fields):
    from transformers import AutoModelForCausalLM

    mesh, network, params, scorer = tiny_model(vocab_size=tokenizer.vocab_size, **fields)
    export_folder(params, network.sizes, tokenizer, tmp_path / "hf", "card")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    return mesh, network, params, scorer, reference


def relative_error(ours, theirs) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_equal_transformers(tmp_path, tokenizer, tied):
    _, network, params, scorer, reference = export(tmp_path, tokenizer, tie_word_embeddings=tied)
    tokens = np.random.default_rng(0).integers(3, tokenizer.vocab_size, (2, 40))
    batch = {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "positions": jnp.broadcast_to(jnp.arange(39), (2, 39)),
        "segments": jnp.ones((2, 39), jnp.int32),
    }
    hidden = scorer.hidden(params, batch)
    ours = np.asarray(hidden @ network.vocabulary_kernel(params).T)
    inputs = torch.tensor(tokens[:, :-1])
    theirs = reference(inputs).logits
    assert relative_error(ours, theirs.detach().numpy()) < 1e-5

    logp, entropy = scorer.logprobs(params, batch)
    expected = torch.log_softmax(theirs, -1)
    picked = expected.gather(-1, torch.tensor(tokens[:, 1:])[..., None])[..., 0]
    assert relative_error(np.asarray(logp), picked.detach().numpy()) < 1e-5
    expected_entropy = -(expected.exp() * expected).sum(-1).detach().numpy()
    assert relative_error(np.asarray(entropy), expected_entropy) < 1e-5

    (-picked.mean()).backward()
    grads = jax.grad(lambda p: -jnp.mean(scorer.logprobs(p, batch)[0]))(params)
    ours_q = np.asarray(grads["layers"]["self_attn"]["q_proj"]["kernel"])
    theirs_q = [layer.self_attn.q_proj.weight.grad.T.numpy() for layer in reference.model.layers]
    assert relative_error(ours_q, np.stack(theirs_q)) < 1e-4
    ours_embedding = np.asarray(grads["embed_tokens"]["embedding"])
    assert relative_error(ours_embedding, reference.model.embed_tokens.weight.grad.numpy()) < 1e-4
    ours_gain = np.asarray(grads["layers"]["input_layernorm"]["weight"])
    theirs_gain = [layer.input_layernorm.weight.grad.numpy() for layer in reference.model.layers]
    assert relative_error(ours_gain, np.stack(theirs_gain)) < 1e-4


def test_greedy_generation_equals_transformers(tmp_path, tokenizer):
    mesh, network, params, _, reference = export(tmp_path, tokenizer)
    engine = Engine(network, mesh, slots=4, end_id=tokenizer.end_id, pad_id=tokenizer.pad_id)
    random = np.random.default_rng(1)
    prompts = [random.integers(3, tokenizer.vocab_size, n).tolist() for n in (3, 9, 17, 30, 5)]
    completions = engine.generate(params, prompts, Sampling(0.0, 0, 1.0, 24), seed=0)
    for prompt, completion in zip(prompts, completions, strict=True):
        out = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            output_logits=True,
            return_dict_in_generate=True,
        )
        expected = out.sequences[0, len(prompt) :].tolist()
        gaps = [float(torch.topk(step[0], 2).values.diff().abs()) for step in out.logits]
        for place, (mine, theirs) in enumerate(zip(completion.ids, expected, strict=False)):
            if gaps[place] < 1e-4:
                break
            assert mine == theirs


def test_import_of_an_export_is_bit_identical(tmp_path, tokenizer):
    mesh, network, params, _, _ = export(tmp_path, tokenizer)
    sizes = read_config_file(tmp_path / "hf" / "config.json")
    assert sizes == network.sizes
    _, abstract = make_network(sizes, network.compute)
    again = import_params(tmp_path / "hf", abstract, tree_shardings(mesh, abstract))
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_our_chat_equals_the_exported_template(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    export(tmp_path, tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": "How often is Velotan given?"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.prompt(messages) == ids


def test_a_special_token_in_a_text_is_text(tokenizer):
    ids = tokenizer.encode("a <|im_end|> b")
    assert tokenizer.end_id not in ids
    assert tokenizer.decode(ids) == "a <|im_end|> b"


def test_published_bfloat16_weights_are_read_exactly(tmp_path, tokenizer):
    mesh, network, _, _, reference = export(tmp_path, tokenizer)
    reference.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    _, abstract = make_network(network.sizes, network.compute)
    params = import_params(tmp_path / "bf16", abstract, tree_shardings(mesh, abstract))
    ours = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"])[1]
    theirs = reference.model.layers[1].mlp.up_proj.weight.float().detach().numpy().T
    np.testing.assert_array_equal(ours, theirs)


def test_a_missing_or_misshapen_tensor_is_named(tmp_path, tokenizer):
    from safetensors.numpy import load_file, save_file

    mesh, network, _, _, _ = export(tmp_path, tokenizer)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    _, abstract = make_network(network.sizes, network.compute)
    shardings = tree_shardings(mesh, abstract)

    def importing(changed):
        save_file(changed, file)
        return import_params(tmp_path / "hf", abstract, shardings)

    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=name):
        importing({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ValueError, match=rf"{name} has shape \(40, 32\)"):
        importing({**tensors, name: tensors[name].T[:32, :40].copy()})
    with pytest.raises(ValueError, match=r"1 unexpected tensors: \['extra'\]"):
        importing({**tensors, "extra": tensors[name]})
