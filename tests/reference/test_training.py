"""Losses, gradients and updates against `transformers`, `peft` and torch on the same batches.

What is compared is named as `transformers` names it, one tensor a layer.
"""

import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.packing import pack_items
from medreason_jax.data.tokenizer_training import train_tokenizer
from medreason_jax.mesh import is_stacked
from medreason_jax.qwen2.huggingface import is_transposed, leaves, tensor_name
from medreason_jax.qwen2.lora import Lora, Target
from medreason_jax.qwen2.peft import peft_name
from medreason_jax.train.objectives import Policy, language_modelling
from medreason_jax.train.optimizer import make_optimizer, make_schedule
from medreason_jax.train.program import make_policy, split_params
from medreason_jax.train.step import init_state, make_train_step

torch = pytest.importorskip("torch", reason="the export extra (torch, transformers) is missing")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="the export extra (peft) is missing")

from tests.reference.models import (  # noqa: E402
    our_network,
    our_params,
    our_scorer,
    relative_error,
    rough_reference,
)

SYSTEM = "Be brief."
CONVERSATIONS = [
    [
        {"role": "user", "content": "How often is Velotan given?"},
        {"role": "assistant", "content": "2 times a day."},
        {"role": "user", "content": "And Maridol?"},
        {"role": "assistant", "content": "Once.\n\nNever at night."},
    ],
    [
        {"role": "system", "content": "You answer nurses."},
        {"role": "user", "content": "May it be chewed?"},
        {"role": "assistant", "content": "No: 高血圧 patients swallow it whole."},
    ],
    [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "It is coated."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Gladly"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "## Thinking\n\nA farewell.\n\n## Final Response\n\nBye."},
    ],
]
LENGTH = 224


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Velotan is given 2 times a day.\n"] * 20, 340, SYSTEM, folder)
    return ChatTokenizer(folder)


def packed_batch(tokenizer: ChatTokenizer) -> dict[str, jax.Array]:
    """The conversations through our chat layer and packing: fewer rows than conversations."""
    items = [tokenizer.chat(messages) for messages in CONVERSATIONS]
    rows = list(pack_items(items, LENGTH, tokenizer.pad_id, seed=0))
    assert len(rows) < len(items)
    return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}


def labelled(tokenizer: ChatTokenizer, messages):
    """(ids, labels) by `apply_chat_template`: -100 outside of the answers and their turns' ends."""
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer.folder)

    def written(messages, generation: bool) -> list[int]:
        options = {"add_generation_prompt": generation, "return_dict": False}
        return theirs.apply_chat_template(messages, **options)

    ids = written(messages, False)
    labels = [-100] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(written(messages[:number], True))
            end = ids.index(theirs.convert_tokens_to_ids("<|im_end|>"), start) + 1
            labels[start:end] = ids[start:end]
    return torch.tensor([ids]), torch.tensor([labels])


def torch_loss(model, tokenizer: ChatTokenizer):
    """The mean over all targets of the conversations, each in a pass of its own."""
    total, count = 0.0, 0
    for messages in CONVERSATIONS:
        ids, labels = labelled(tokenizer, messages)
        logits, targets = model(ids).logits[0, :-1], labels[0, 1:]
        total = total + torch.nn.functional.cross_entropy(
            logits, targets, ignore_index=-100, reduction="sum"
        )
        count += int((targets != -100).sum())
    return total / count


def by_name(tree) -> dict[str, np.ndarray]:
    """A tree like our parameters as `transformers`' tensors."""
    found = {}
    for path, leaf in leaves(tree):
        layers = range(leaf.shape[0]) if is_stacked(path) else [None]
        for layer in layers:
            array = np.asarray(leaf if layer is None else leaf[layer])
            found[tensor_name(path, layer)] = array.T if is_transposed(path) else array
    return found


def assert_near(ours: dict, theirs: dict, tolerance: float):
    assert ours.keys() == theirs.keys()
    errors = {name: relative_error(ours[name], theirs[name]) for name in ours}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]}"


@pytest.mark.parametrize("tied", [True, False])
def test_sft_loss_and_gradients_equal_those_of_transformers(tokenizer, tied):
    fields = {"vocab_size": tokenizer.vocab_size, "tie_word_embeddings": tied}
    reference = rough_reference(fields)
    network, _ = our_network(reference)
    scorer = our_scorer(network)
    objective = language_modelling(Policy(scorer, scorer, adapted=False))
    batch, params = packed_batch(tokenizer), our_params(reference)

    def loss(params):
        return objective.losses(params, {}, batch, objective.scales(batch))[0]

    ours, gradients = jax.jit(jax.value_and_grad(loss))(params)
    theirs = torch_loss(reference, tokenizer)
    theirs.backward()
    assert float(ours) == pytest.approx(theirs.item(), rel=1e-5)
    expected = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    assert_near(by_name(gradients), expected, 1e-4)


STEPS, WARMUP, PEAK = 12, 3, 0.01


def cosine(step: int, peak=PEAK, steps=STEPS, warmup=WARMUP, final_ratio=0.1) -> float:
    if step < warmup:
        return peak * step / warmup
    done = min((step - warmup) / (steps - warmup), 1.0)
    return peak * (final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * done)) / 2)


def our_adamw(**options):
    schedule = make_schedule("cosine", PEAK, STEPS, WARMUP, 0.1)
    settings = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0, **options}
    return make_optimizer(schedule, **settings)


def drawn_gradients(params, step: int):
    """Of norms around 1, so that some are clipped; elements of very different sizes."""
    flat = flatten_dict(params)
    keys = jax.random.split(jax.random.key(step), len(flat))
    drawn = [jax.random.normal(k, x.shape) ** 3 for k, x in zip(keys, flat.values(), strict=True)]
    norm = (0.3, 0.8, 1.5, 20.0)[step % 4]
    scale = norm / optax.tree.norm(drawn)
    return unflatten_dict({path: scale * x for path, x in zip(flat, drawn, strict=True)})


def ten_updates(optimizer, params):
    """(parameters, optimizer state) after 10 steps of `drawn_gradients`."""
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(10):
        updates, state = update(drawn_gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def decay_groups(parameters: dict):
    """Matrices are decayed, biases and norm gains are not."""
    return [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
    ]


def change(after: dict, before: dict) -> dict:
    return {name: after[name].astype(np.float64) - before[name] for name in before}


def test_ten_updates_equal_those_of_torch():
    params = our_params(rough_reference({"tie_word_embeddings": False}))
    before = by_name(params)
    theirs = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in before.items()}
    optimizer = torch.optim.AdamW(decay_groups(theirs), lr=PEAK, betas=(0.9, 0.95), eps=1e-8)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step) / PEAK)
    clipped = []
    for step in range(10):
        for name, gradient in by_name(drawn_gradients(params, step)).items():
            theirs[name].grad = torch.tensor(gradient)
        clipped.append(float(torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)) > 1.0)
        optimizer.step()
        rates.step()
    assert 0 < sum(clipped) < 10
    after, _ = ten_updates(our_adamw(), params)
    expected = {name: p.detach().numpy() for name, p in theirs.items()}
    assert_near(change(by_name(after), before), change(expected, before), 1e-5)


@pytest.mark.parametrize("types", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_moments_are_kept_in_the_types_that_are_asked_for(types):
    params = our_params(rough_reference({}))
    exact, _ = ten_updates(our_adamw(), params)
    mu_dtype, nu_dtype = types
    near, state = ten_updates(our_adamw(mu_dtype=mu_dtype, nu_dtype=nu_dtype), params)
    (adam,) = [s for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s)]
    assert {str(x.dtype) for x in jax.tree.leaves(adam.mu)} == {mu_dtype}
    assert {str(x.dtype) for x in jax.tree.leaves(adam.nu)} == {nu_dtype}
    before = by_name(params)
    ours, expected = change(by_name(near), before), change(by_name(exact), before)
    assert_near(ours, expected, 0.01)
    with pytest.raises(AssertionError):
        assert_near(ours, expected, 1e-5)


def is_adam(state) -> bool:
    return isinstance(state, optax.ScaleByAdamState)


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
def test_schedules_equal_plain_formulae(kind, warmup):
    steps, peak, final, decay_share = 57, 3e-4, 0.1, 0.2
    rest = steps - warmup
    decay = int(rest * decay_share)

    def expected(step: int) -> float:
        if step < warmup:
            return peak * step / warmup
        done = step - warmup
        share = {
            "constant": 1.0,
            "cosine": cosine(step, 1.0, steps, warmup, final),
            "linear": 1.0 - (1.0 - final) * done / rest,
            "wsd": 1.0 - (1.0 - final) * max(done - (rest - decay), 0) / decay,
        }
        return peak * share[kind]

    schedule = make_schedule(kind, peak, steps, warmup, final, decay_share)
    np.testing.assert_allclose(
        [float(schedule(step)) for step in range(steps + 1)],
        [expected(step) for step in range(steps + 1)],
        rtol=1e-5,
        atol=1e-12,
    )


TARGETS = (Target("q_proj", 4, 8.0), Target("v_proj", 4, 8.0), Target("down_proj", 4, 8.0))


def adapter_by_name(adapter) -> dict[str, np.ndarray]:
    """As `peft` names a live model's tensors."""
    found = {}
    for path, leaf in flatten_dict(adapter).items():
        for layer in range(leaf.shape[0]):
            name = peft_name(path[2], layer, path[3]).replace(".weight", ".default.weight")
            found[name] = np.asarray(leaf[layer]).T
    return found


ADAMW = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0}


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_trained_adapter_equals_peft(tokenizer, kind):
    reference = rough_reference({"vocab_size": tokenizer.vocab_size})
    network, _ = our_network(reference)
    lora, sharder = Lora(TARGETS), network.compute.constrain
    policy = make_policy(network, sharder, lora, chunk=64)
    adapter, frozen = split_params(our_params(reference), network, lora, False, jax.random.key(3))
    before = adapter_by_name(adapter)
    theirs = trained_by_peft(reference, tokenizer, before, kind)
    optimizer = (
        optax.sgd(0.5) if kind == "sgd" else make_optimizer(optax.constant_schedule(0.01), **ADAMW)
    )
    state = init_state(adapter, optimizer)
    step = make_train_step(language_modelling(policy), optimizer, sharder, state, 1)
    batch = packed_batch(tokenizer)
    for _ in range(5):
        state, _ = step(state, frozen, batch)
    ours = adapter_by_name(state.params)
    assert_near(ours, theirs, 1e-4)
    assert_near(change(ours, before), change(theirs, before), 1e-4)


def trained_by_peft(reference, tokenizer, start: dict, kind: str) -> dict[str, np.ndarray]:
    """The adapter after 5 steps of torch from `start`."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=[t.projection for t in TARGETS], lora_dropout=0.0
    )
    model = peft.get_peft_model(copy.deepcopy(reference), config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(torch.tensor(start[name]))
    if kind == "sgd":
        optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    else:
        optimizer = torch.optim.AdamW(
            trained.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1
        )
    for _ in range(5):
        optimizer.zero_grad()
        torch_loss(model, tokenizer).backward()
        if kind == "adamw":
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
    return {name: p.detach().numpy() for name, p in trained.items()}
