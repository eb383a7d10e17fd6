"""`medreason generate` over a file, against `transformers` on the same folder."""

import json

import numpy as np
import pytest

from medreason_jax.cli import exit_code_of, run_arguments
from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.tokenizer_training import train_tokenizer
from medreason_jax.qwen2.export import export_model
from medreason_jax.qwen2.folder import Description, save_model
from tests.tiny import tiny_model

torch = pytest.importorskip("torch", reason="the export extra (torch, transformers) is missing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    train_tokenizer(["Velotan is given 2 times a day."] * 20, 320, "Answer.", root / "tokenizer")
    tokenizer = ChatTokenizer(root / "tokenizer")
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
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["generate", "--model", str(folder), "--prompts", str(tmp_path / "p.jsonl")]
    arguments += ["--out", str(tmp_path / "o.jsonl"), "--max-new-tokens", "20", "--logprobs"]
    assert exit_code_of(lambda: run_arguments(arguments)) == 0
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


@pytest.mark.parametrize("line", [{}, {"prompt": "a", "token_ids": [1]}, {"prompt": ""}])
def test_a_line_that_cannot_be_answered_is_one_line_of_error(folder, tmp_path, capsys, line):
    (tmp_path / "p.jsonl").write_text(json.dumps(line) + "\n")
    arguments = ["generate", "--model", str(folder), "--prompts", str(tmp_path / "p.jsonl")]
    code = exit_code_of(lambda: run_arguments([*arguments, "--out", str(tmp_path / "o.jsonl")]))
    assert code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "o.jsonl").exists()
