"""`medreason generate`: a file of prompts to a file of answers, to compare with others."""

import json
from pathlib import Path
from typing import Any

from medreason_jax.config import MeshConfig
from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.sources import iterate_lines, write_lines
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
    vocab_size = model.network.sizes.vocab_size
    lines = list(iterate_lines(prompts))
    if not lines:
        raise ValueError(f"{prompts} holds no prompt; write one JSON object a line")
    asked = [prompt_ids(model.tokenizer, record, place, vocab_size) for place, record in lines]
    model.check_length(max(map(len, asked)) + sampling.max_new_tokens)
    engine = model.engine(min(slots, len(asked)))
    done = engine.generate(model.params, asked, sampling, seed)
    answers = []
    for (_, record), ids, completion in zip(lines, asked, done, strict=True):
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


def prompt_ids(
    tokenizer: ChatTokenizer, record: dict[str, Any], place: object, vocab_size: int
) -> list[int]:
    """Token ids of a line's prompt; exactly one of the three forms is allowed.

    `place` names the line in errors; `vocab_size` is the model's.
    """
    try:
        ids = _ids(tokenizer, record)
        if not ids:
            raise ValueError(f"an empty prompt cannot be continued: {record!r:.80}")
        others = [id for id in ids if type(id) is not int or not 0 <= id < vocab_size]
        if others:
            raise ValueError(
                f"token_ids holds {others[0]!r:.80}; allowed: whole numbers from 0 to "
                f"{vocab_size - 1}, the model's last token"
            )
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return ids


def _ids(tokenizer: ChatTokenizer, record: dict[str, Any]) -> list[int]:
    _check_unicode(record)
    forms = [name for name in ("messages", "prompt", "token_ids") if name in record]
    if len(forms) != 1:
        raise ValueError(
            f"a line needs one of messages, prompt and token_ids; found {sorted(record)}"
        )
    value = record[forms[0]]
    if forms == ["messages"]:
        return tokenizer.prompt(value)
    kind, allowed = {"prompt": (str, "a text"), "token_ids": (list, "a list of ids")}[forms[0]]
    if not isinstance(value, kind):
        raise ValueError(f"{forms[0]} is {value!r:.80}; allowed: {allowed}")
    return tokenizer.encode(value) if forms == ["prompt"] else value


def _check_unicode(record: dict[str, Any]) -> None:
    r"""JSON can spell half of a character (`\ud800`); no tokenizer or file takes it."""
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise ValueError(
            f"the line holds {half!r}, half of a character; allowed: text that UTF-8 can write"
        ) from None
