"""`medreason generate` over a file, against `transformers` on the same folder."""

import json
import re

import numpy as np
import pytest

from medreason_jax.cli import exit_code_of, run_arguments
from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.tokenizer_training import train_tokenizer
from medreason_jax.generate.prompts import prompt_ids
from medreason_jax.qwen2.export import export_model
from medreason_jax.qwen2.folder import Description, save_model
from medreason_jax.qwen2.load import Loaded
from tests.tiny import tiny_model

torch = pytest.importorskip("torch", reason="the export extra (torch, transformers) is missing")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(["Velotan is given 2 times a day."] * 20, 320, "Answer.", folder)
    return ChatTokenizer(folder)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    _, network, params, _ = tiny_model()
    save_model(root / "ckpt", params, Description(network.sizes), tokenizer)
    export_model(root / "ckpt", root / "hf", card="card")
    return root / "hf"


def test_every_kind_of_prompt_is_answered_as_transformers_answers(folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": "How often is Velotan given?"}]
    lines = [
        {"id": "a", "messages": messages},
        {"id": "b", "prompt": "Velotan is given"},
        {"id": "c", "token_ids": [7, 8, 9, 10, 11, 12, 13]},
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    assert generate(folder, tmp_path, content, "--max-new-tokens", "20", "--logprobs") == 0
    answers = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    expected_ids = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False),
        tokenizer("Velotan is given")["input_ids"],
        lines[2]["token_ids"],
    ]
    assert [answer["id"] for answer in answers] == ["a", "b", "c"]
    for answer, ids in zip(answers, expected_ids, strict=True):
        assert answer["prompt_token_ids"] == ids
        whole = torch.tensor([[*ids, *answer["token_ids"]]])
        with torch.inference_mode():
            logp = torch.log_softmax(model(whole).logits[0, len(ids) - 1 : -1], -1)
        taken = logp[torch.arange(len(answer["token_ids"])), torch.tensor(answer["token_ids"])]
        np.testing.assert_allclose(answer["logprobs"], taken.numpy(), atol=1e-4)
        assert (logp.max(-1).values - taken < 1e-4).all()  # greedy, near ties either way


def generate(folder, tmp_path, content: str, *options: str) -> int:
    (tmp_path / "p.jsonl").write_text(content)
    arguments = ["generate", "--model", str(folder), "--prompts", str(tmp_path / "p.jsonl")]
    arguments += ["--out", str(tmp_path / "o.jsonl"), *options]
    return exit_code_of(lambda: run_arguments(arguments))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({}, "a line needs one of messages, prompt and token_ids"),
        ({"prompt": "a", "token_ids": [1]}, "a line needs one of messages, prompt and token_ids"),
        ({"prompt": ""}, "an empty prompt cannot be continued"),
        ({"prompt": 5}, "prompt is 5; allowed: a text"),
        ({"prompt": None}, "prompt is None"),
        ({"prompt": "a\ud800"}, "the line holds '\\ud"),
        ({"prompt": "a", "id": "\udfff"}, "the line holds '\\udfff', half of a character"),
        ({"token_ids": []}, "an empty prompt cannot be continued"),
        ({"token_ids": 5}, "token_ids is 5; allowed: a list of ids"),
        ({"token_ids": "5"}, "token_ids is '5'"),
        (
            {"token_ids": [1, 999999]},
            "token_ids holds 999999; allowed: whole numbers from 0 to 319",
        ),
        ({"token_ids": [320]}, "token_ids holds 320"),
        ({"token_ids": [-1]}, "token_ids holds -1"),
        ({"token_ids": [3.7]}, "token_ids holds 3.7"),
        ({"token_ids": [True]}, "token_ids holds True"),
        ({"token_ids": ["a"]}, "token_ids holds 'a'"),
        ({"token_ids": [[1]]}, "token_ids holds [1]"),
        ({"messages": "hi"}, "messages is 'hi'; allowed: a list of objects"),
        ({"messages": ["hi"]}, "messages is ['hi']"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, "the line holds '\\ud"),
        ({"messages": [{"role": "user", "content": 5}]}, "the user's content is 5"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_named_by_its_line(tokenizer, line, said):
    with pytest.raises(ValueError, match=re.escape(f"p.jsonl:2: {said}")):
        prompt_ids(tokenizer, line, "p.jsonl:2", 320)


def test_every_id_of_the_model_may_be_given(tokenizer):
    """Also those that the tokenizer lacks: a model's vocabulary is padded."""
    assert prompt_ids(tokenizer, {"token_ids": [0, 499]}, "p.jsonl:1", 500) == [0, 499]


LONG = json.dumps({"token_ids": [7] * 600})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('\n{"prompt": "a"}\n{"token_ids": [-1]}\n', "p.jsonl:3: token_ids holds -1"),
        ("", "p.jsonl holds no prompt"),
        (LONG, "length=604 is beyond the model's longest row, 512 tokens"),
        (json.dumps({"token_ids": [7] * 509}), "length=513 is beyond"),
    ],
)
def test_a_file_that_cannot_be_answered_is_one_line_of_error(
    folder, tmp_path, capsys, content, said
):
    assert generate(folder, tmp_path, content, "--max-new-tokens", "4") == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert said in error
    assert not (tmp_path / "o.jsonl").exists()


def test_no_more_slots_are_computed_than_there_are_prompts(folder, tmp_path, monkeypatch):
    slots = []
    engine = Loaded.engine
    monkeypatch.setattr(Loaded, "engine", lambda self, n: slots.append(n) or engine(self, n))
    assert generate(folder, tmp_path, '{"prompt": "a"}\n' * 3, "--max-new-tokens", "2") == 0
    assert slots == [3]
