"""Greedy answers against `transformers`: prompts of different lengths, slots refilled."""

import numpy as np
import pytest

from medreason_jax.generate.engine import Engine
from medreason_jax.generate.sampling import Sampling

torch = pytest.importorskip("torch", reason="the export extra (torch, transformers) is missing")

from tests.reference.models import (  # noqa: E402
    our_network,
    our_params,
    rough_reference,
)
from tests.tiny import model_fields  # noqa: E402

NEAR_TIE = 1e-4


def compare_greedy(reference, prompts, new_tokens: int, end_id: int, pad_id: int, slots: int):
    """(tokens compared, near ties); fails at the first different token before a near tie."""
    network, _ = our_network(reference)
    mesh = network.compute.constrain.mesh
    engine = Engine(network, mesh, slots=slots, end_id=end_id, pad_id=pad_id)
    sampling = Sampling(0.0, 0, 1.0, new_tokens)
    completions = engine.generate(our_params(reference), prompts, sampling, seed=0)
    compared = ties = 0
    for prompt, completion in zip(prompts, completions, strict=True):
        out = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=end_id,
            pad_token_id=pad_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        theirs = out.sequences[0, len(prompt) :].tolist()
        gaps = [float(-torch.topk(step[0], 2).values.diff()) for step in out.logits]
        near = next((place for place, gap in enumerate(gaps) if gap < NEAR_TIE), None)
        end = len(theirs) if near is None else near
        assert completion.ids[:end] == theirs[:end]
        if near is None:
            assert len(completion.ids) == len(theirs)
        compared, ties = compared + end, ties + (near is not None)
    return compared, ties


def test_greedy_answers_equal_transformers():
    random = np.random.default_rng(1)
    lengths = (3, 9, 17, 30, 5, 61, 12, 24, 40, 7)
    prompts = [random.integers(3, 320, n).tolist() for n in lengths]
    reference = rough_reference({})
    compared, ties = compare_greedy(reference, prompts, 128, end_id=2, pad_id=0, slots=3)
    print(f"{compared} tokens identical, {ties} of 10 prompts end at a near tie")
    assert compared >= 10 * 128 - 128 * ties and ties <= 1


QUESTIONS = (
    "Dose?",
    "What is the first-line treatment for anaphylaxis?",
    "高アンモニア血症をきたす疾患はどれか。",
    "A 54-year-old man has had chest pain for two hours; he takes 5 mg of amlodipine a day.",
    "Name the enzyme that is deficient in phenylketonuria, and say how it is inherited.",
    "脑膜炎的首选检查是什么？",
    "Is it true, false, or is there no way to know from what I have told you so far today?",
    "List three causes of hyponatraemia.\n\n1.",
    "Which vitamin is given to newborns to prevent bleeding, when, and by which route? " * 3,
    "Explain the Krebs cycle to a child of ten in a few words, please.",
)


@pytest.mark.slow
def test_the_real_tokenizer_and_true_half_billion_shape_answer_alike(real_data):
    """64 greedy tokens, whole vocabulary and depth, float32."""
    from medreason_jax.data.chat import ChatTokenizer

    tokenizer = ChatTokenizer(real_data / "qwen2.5-tokenizer")
    prompts = [tokenizer.prompt([{"role": "user", "content": text}]) for text in QUESTIONS]
    assert len({len(prompt) for prompt in prompts}) == len(prompts) == 10
    reference = rough_reference(model_fields("qwen2.5-0.5b-instruct"))
    ids = {"end_id": tokenizer.end_id, "pad_id": tokenizer.pad_id}
    compared, ties = compare_greedy(reference, prompts, 64, slots=4, **ids)
    print(f"{compared} tokens identical, {ties} of 10 prompts end at a near tie")
    assert compared >= 320
