"""`medreason generate`: a file of prompts to a file of answers, to compare with others."""

from pathlib import Path
from typing import Any

from medreason_jax.config import MeshConfig
from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.sources import read_lines, write_lines
from medreason_jax.generate.sampling import Sampling
from medreason_jax.qwen2.load import load_model


def generate_file(
    model_folder: Path,
    prompts: Path,
    out: Path,
    *,
    sampling: Sampling,
    seed: int,
    dtype: str,
    slots: int,
    with_logprobs: bool,
) -> int:
    """Answer every line of `prompts`; returns how many.

    A line holds `messages`, `prompt` (plain text) or `token_ids`. `out` repeats it with
    prompt_token_ids, token_ids, text, finish_reason and, when asked for, logprobs.
    """
    model = load_model(model_folder, MeshConfig(), dtype)
    records = read_lines(prompts)
    asked = [prompt_ids(model.tokenizer, record, prompts) for record in records]
    done = model.engine(slots).generate(model.params, asked, sampling, seed)
    answers = []
    for record, ids, completion in zip(records, asked, done, strict=True):
        answer = {
            **record,
            "prompt_token_ids": ids,
            "token_ids": completion.ids,
            "text": model.tokenizer.decode(completion.ids),
            "finish_reason": completion.finish_reason,
        }
        answers.append(answer | ({"logprobs": completion.logprobs} if with_logprobs else {}))
    write_lines(out, answers)
    return len(answers)


def prompt_ids(tokenizer: ChatTokenizer, record: dict[str, Any], path: Path) -> list[int]:
    """Token ids of a line's prompt; exactly one of the three forms is allowed."""
    forms = [name for name in ("messages", "prompt", "token_ids") if name in record]
    if len(forms) != 1:
        raise ValueError(
            f"{path}: a line needs one of messages, prompt and token_ids; found {sorted(record)}"
        )
    if forms == ["messages"]:
        ids = tokenizer.prompt(record["messages"])
    else:
        ids = tokenizer.encode(record["prompt"]) if forms == ["prompt"] else record["token_ids"]
    if not ids:
        raise ValueError(f"{path}: an empty prompt cannot be continued: {record}")
    return ids
