"""Fixtures: real data where it is present, and a small tokenizer."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("MEDREASON_DATA", "../shared/data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data; tests that need it are skipped where it is missing."""
    if not DATA.is_dir():
        pytest.skip(f"no real data in {DATA}; set MEDREASON_DATA")
    return DATA.resolve()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    from medreason_jax.data.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("small") / "tokenizer"
    texts = ["Velotan is given 2 times a day.", "高血圧には何を使いますか。"]
    train_tokenizer(texts * 10, 320, "Answer.", folder)
    return folder


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer_folder):
    from medreason_jax.data.chat import ChatTokenizer  # data generation's tests do without jax

    return ChatTokenizer(tokenizer_folder)
