"""Logits and gradients against `transformers`, at the true widths of every published size."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra (torch, transformers) is missing")

from tests.reference.models import (  # noqa: E402
    in_type,
    our_logits,
    our_network,
    our_params,
    our_scorer,
    relative_error,
    rough_reference,
    whole_rows,
)
from tests.tiny import model_fields  # noqa: E402

NAMES = [
    f"qwen2.5-{size}{kind}"
    for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")
    for kind in ("", "-instruct")
]
LARGE = ("14b", "32b", "72b")


def cut(name: str) -> dict:
    """True widths, heads and feed-forward; two layers (one from 14B up), 4,096 tokens."""
    depth = 1 if any(size in name for size in LARGE) else 2
    return model_fields(name, num_hidden_layers=depth, vocab_size=4096)


def random_tokens(vocabulary: int, shape, seed=0):
    return np.random.default_rng(seed).integers(3, vocabulary, shape)


def logits_error(fields: dict, length: int = 48) -> float:
    reference = rough_reference(fields)
    tokens = random_tokens(fields["vocab_size"], (2, length))
    with torch.inference_mode():
        theirs = reference(torch.tensor(tokens)).logits.numpy()
    network, _ = our_network(reference)
    params = our_params(reference)
    del reference
    gc.collect()
    logits = jax.jit(lambda p, b: our_hidden_logits(network, p, b))
    return relative_error(logits(params, whole_rows(tokens)), theirs)


def our_hidden_logits(network, params, batch):
    h_BTD = network.hidden(params, batch["tokens"], batch["positions"], batch["segments"])
    return h_BTD @ network.vocabulary_kernel(params).T


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(tied):
    assert logits_error({"tie_word_embeddings": tied, "vocab_size": 320}) <= 1e-5


def test_logits_with_yarn_equal_transformers():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    fields = {"rope_scaling": yarn, "vocab_size": 320, "max_position_embeddings": 128}
    assert logits_error(fields, length=100) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_logits_at_true_widths_equal_transformers(name):
    error = logits_error(cut(name))
    print(f"{name}: {error:.1e}")
    assert error <= 1e-5


@pytest.mark.slow
def test_logits_of_the_whole_half_billion_model_equal_transformers():
    error = logits_error(model_fields("qwen2.5-0.5b"))
    print(f"qwen2.5-0.5b whole: {error:.1e}")
    assert error <= 1e-5


def gradient_errors(fields: dict) -> dict[str, float]:
    """Relative error of every parameter's gradient of the mean log-likelihood, by name."""
    reference = rough_reference(fields)
    tokens = random_tokens(fields["vocab_size"], (2, 33))
    logits = reference(torch.tensor(tokens[:, :-1])).logits
    targets = torch.tensor(tokens[:, 1:])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    network, _ = our_network(reference)
    scorer = our_scorer(network)
    batch = whole_rows(tokens[:, :-1]) | {"targets": jnp.asarray(tokens[:, 1:])}
    loss = lambda params: -jnp.mean(scorer.scores(params, batch).logp)  # noqa: E731
    ours = jax.jit(jax.grad(loss))(our_params(reference))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.grad)
    theirs = our_params(reference)
    errors = jax.tree.map(relative_error, ours, theirs)
    return {
        jax.tree_util.keystr(path): e for path, e in jax.tree_util.tree_leaves_with_path(errors)
    }


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_every_parameter_equals_torch(tied):
    errors = gradient_errors({"tie_word_embeddings": tied, "vocab_size": 320})
    assert max(errors.values()) <= 1e-4, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b"])
def test_gradients_at_true_widths_equal_torch(name):
    errors = gradient_errors(cut(name))
    print(f"{name}: {max(errors.values()):.1e}")
    assert max(errors.values()) <= 1e-4, errors


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bfloat16_logits_are_as_close_as_those_of_transformers(seed):
    """RMS error against float32 `transformers` over 4,096 positions, weights both can hold."""
    fields = cut("qwen2.5-0.5b")
    reference = in_type(in_type(rough_reference(fields, seed), torch.bfloat16), torch.float32)
    tokens = random_tokens(fields["vocab_size"], (8, 512), seed)
    network, _ = our_network(reference, dtype=jnp.bfloat16)
    params = our_params(reference)
    with torch.inference_mode():
        exact = reference(torch.tensor(tokens)).logits.numpy()
        theirs = in_type(reference, torch.bfloat16)(torch.tensor(tokens)).logits.float().numpy()
    jax.config.update("jax_default_matmul_precision", None)
    ours = our_logits(network, params, whole_rows(tokens))
    rms = [float(np.sqrt(np.mean((x - exact) ** 2))) for x in (ours, theirs)]
    print(f"seed {seed}: RMS error ours {rms[0]:.4f}, transformers {rms[1]:.4f}")
    assert rms[0] <= 1.1 * rms[1]
