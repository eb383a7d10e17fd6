"""A small tokenizer and a server whose answers are known."""

import pytest

from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "tokenizer"
    texts = ["Velotan is given 2 times a day.", "高血圧には何を使いますか。"]
    train_tokenizer(texts * 10, 320, "Answer.", folder)
    return folder


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer_folder):
    return ChatTokenizer(tokenizer_folder)
