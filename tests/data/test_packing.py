"""Packing loses and doubles nothing; conversations cut where generation starts."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medreason_jax.data.chat import ANSWER_ONLY, ChatTokenizer, Encoded, reasoning_text
from medreason_jax.data.packing import first_fit, pack_items, pack_pairs, split_document
from medreason_jax.data.tokenizer_training import train_tokenizer


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_first_fit_places_every_item_once_within_capacity(lengths, seed):
    rows = first_fit(lengths, 50, seed)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= 50 for row in rows)


@given(st.lists(st.integers(2, 20), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_packed_rows_hold_each_token_once(lengths):
    items, start = [], 1
    for n in lengths:
        items.append(Encoded(list(range(start, start + n)), [True] * n))
        start += n
    rows = pack_items(items, 32, 0, seed=0)
    tokens = np.concatenate([row["tokens"][row["segments"] > 0] for row in rows])
    assert sorted(tokens) == list(range(1, start))
    assert sum(row["weights"].sum() for row in rows) == sum(n - 1 for n in lengths)
    for row in rows:  # a target is the next token of the same item
        counted = np.flatnonzero(row["weights"])
        assert (row["targets"][counted] == row["tokens"][counted + 1]).all()
        assert (row["segments"][counted] == row["segments"][counted + 1]).all()


def test_pairs_stand_as_neighbouring_segments():
    item = lambda n: Encoded([5] * n, [True] * n)  # noqa: E731
    rows = pack_pairs([(item(3), item(4))] * 5, 20, 0, per_row=2, seed=0)
    assert sum(row["pairs"].sum() for row in rows) == 5
    first = rows[0]
    assert [int((first["segments"] == s).sum()) for s in (1, 2, 3, 4)] == [3, 4, 3, 4]


def test_a_split_document_predicts_every_token_once():
    pieces = split_document(Encoded(list(range(100)), [True] * 100), 33)
    predicted = [token for piece in pieces for token in piece.ids[1:]]
    assert predicted == list(range(1, 100))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Velotan is given 2 times a day.\n"] * 20, 340, "", folder)
    return ChatTokenizer(folder)


@pytest.mark.parametrize("thinking", ["Hmm.\n2 times.", ""])
def test_the_generation_prompt_is_a_prefix_of_the_training_row(tokenizer, thinking):
    messages = [{"role": "user", "content": "How often?"}]
    row = tokenizer.conversation(messages, thinking, "2 times")
    prompt = tokenizer.prompt(messages, "" if thinking else ANSWER_ONLY)
    assert row.ids[: len(prompt)] == prompt
    assert row.is_target == [False] * len(prompt) + [True] * (len(row.ids) - len(prompt))
    assert row.ids[-1] == tokenizer.end_id
    answer = reasoning_text(thinking, "2 times") if thinking else "2 times"
    assert tokenizer.decode(row.ids[len(prompt) :]) == answer


def test_digits_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("1234")) == 4


def test_the_real_tokenizer_gives_its_golden_encodings(real_data):
    folder = real_data / "qwen2.5-tokenizer"
    tokenizer = ChatTokenizer(folder)
    texts = (folder / "golden/ggml-vocab-qwen2.gguf.inp").read_text(encoding="utf-8")
    expected = (folder / "golden/ggml-vocab-qwen2.gguf.out").read_text().splitlines()
    texts = texts.split("\n__ggml_vocab_test__\n")
    assert len(expected) == 46
    for text, line in zip(texts, expected, strict=False):
        assert tokenizer.encode(text) == [int(i) for i in line.split()]
    assert tokenizer.default_system.startswith("You are Qwen")


def test_prompts_equal_the_golden_chat_template_cases(real_data):
    folder = real_data / "qwen2.5-tokenizer"
    tokenizer = ChatTokenizer(folder)
    compared = 0
    lines = (folder / "golden/chat_template_cases.jsonl").read_text("utf-8").splitlines()
    for case in map(json.loads, lines):
        plain = case["tools"] is None and all(
            m.keys() == {"role", "content"} for m in case["messages"]
        )
        if not plain or case["name"] == "special_token_in_text":
            continue  # tools are refused below; a special token in a text is text with us
        ids = tokenizer.prompt(case["messages"])
        if not case["add_generation_prompt"]:
            ids = ids[: -len(tokenizer.encode("assistant\n")) - 1]
        assert ids == case["input_ids"], case["name"]
        compared += 1
    assert compared == 7


@pytest.mark.parametrize(
    "message",
    [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "x", "tool_calls": []}],
)
def test_messages_of_tools_are_refused(tokenizer, message):
    with pytest.raises(ValueError, match="a message holds a role"):
        tokenizer.prompt([{"role": "user", "content": "x"}, message])
