"""A small trained tokenizer."""

import pytest

from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Velotan is given 2 times a day.\n"] * 20, 340, "Be brief.", folder)
    return ChatTokenizer(folder)
