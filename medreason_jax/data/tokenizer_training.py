"""A byte-level BPE tokenizer with Qwen2.5's rules, trained on a small corpus."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from medreason_jax.data.chat import ANSWER_ONLY, END_OF_TEXT, TURN_END, TURN_START, reasoning_text

# Qwen2.5's pre-tokenizer: single digits, words with at most one leading mark, newlines apart.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def chat_template(system: str) -> str:
    """ChatML with a default system turn, as a Jinja template."""
    default = json.dumps(system)
    return (
        "{%- if messages[0].role != 'system' -%}"
        f"{{{{- '<|im_start|>system\\n' + {default} + '<|im_end|>\\n' -}}}}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int, system: str, folder: Path) -> None:
    """Train on `texts` and the rendered template; a Hugging Face folder appears at once."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(SPLIT), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(token, special=True, normalized=False)
        for token in (END_OF_TEXT, TURN_START, TURN_END)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    frame = [
        f"system\n{system}",
        "user\nx",
        "assistant\n",
        "\n",
        ANSWER_ONLY,
        reasoning_text("x", "y"),
    ]
    tokenizer.train_from_iterator([*texts, *frame * 200], trainer)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save(str(partial / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "model_max_length": 32768,
        "chat_template": chat_template(system),
    }
    (partial / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
