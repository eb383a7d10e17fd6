"""Text from tokens one by one, against the tokenizer's own decoding of all of them."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medreason_jax.generate.text_stream import TextStream, TokenTexts

IDS = st.lists(st.integers(0, 330), max_size=40)  # some that no token has


@pytest.fixture(scope="module")
def texts(chat_tokenizer):
    return TokenTexts(chat_tokenizer)


@settings(deadline=None)
@given(ids=IDS)
def test_the_parts_make_the_text_that_the_tokenizer_decodes(texts, chat_tokenizer, ids):
    stream = TextStream(texts, [])
    parts = [stream.push(id) for id in ids]
    whole = chat_tokenizer.decode(ids)
    assert "".join([*parts, stream.finish()]) == whole == texts.decode(ids)
    assert stream.released == len(whole)


@pytest.mark.parametrize("text", ["血圧 is high 🩺!", "a\u0301é", "\n\n  x"])
def test_no_part_holds_half_of_a_character(texts, chat_tokenizer, text):
    stream = TextStream(texts, [])
    parts = [stream.push(id) for id in chat_tokenizer.encode(text)]
    assert not any("\ufffd" in part for part in parts)
    assert "".join([*parts, stream.finish()]) == chat_tokenizer.decode(chat_tokenizer.encode(text))


def cut(texts, ids, stops):
    """The text before a stop of the shortest row of tokens that holds one, found by trying all."""
    for count in range(1, len(ids) + 1):
        so_far = texts.decode(ids[:count]).rstrip("\ufffd")
        found = [so_far.index(stop) for stop in stops if stop in so_far]
        if found:
            return so_far[: min(found)], count
    return texts.decode(ids), None


@settings(deadline=None, max_examples=300)
@given(data=st.data(), letters=st.text("ab é血", min_size=1, max_size=30))
def test_a_stop_string_across_tokens_ends_the_text_before_it(texts, chat_tokenizer, data, letters):
    stop = st.text("ab é血", min_size=1, max_size=4)
    stops = data.draw(st.lists(stop, min_size=1, max_size=4))
    ids = chat_tokenizer.encode(letters)
    expected, count = cut(texts, ids, stops)
    stream, shown, pushed = TextStream(texts, stops), "", 0
    for id in ids:
        shown += stream.push(id)
        pushed += 1
        assert expected.startswith(shown)
        if stream.stopped:
            break
    shown += "" if stream.stopped else stream.finish()
    assert shown == expected
    assert (pushed if stream.stopped else None) == count


def test_text_is_shown_as_soon_as_no_stop_string_can_begin_in_it(texts, chat_tokenizer):
    stream = TextStream(texts, ["abc"])
    parts = [stream.push(id) for char in "xabxabc" for id in chat_tokenizer.encode(char)]
    assert parts == ["x", "", "", "abx", "", "", ""]
    assert stream.stopped


def test_every_token_has_a_name_of_its_own(texts, chat_tokenizer):
    names = [texts.name(id) for id in range(chat_tokenizer.vocab_size)]
    assert len(set(names)) == len(names)
    assert texts.name(chat_tokenizer.end_id) == "<|im_end|>"
    half = chat_tokenizer.encode("🩺")[0]
    assert texts.name(half) == "bytes:\\xf0"


def test_a_tokenizer_that_is_not_byte_level_is_refused(chat_tokenizer, tokenizer_folder):
    from tokenizers import decoders

    from medreason_jax.data.chat import ChatTokenizer

    other = ChatTokenizer(tokenizer_folder)
    other.tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="needs a byte-level one"):
        TokenTexts(other)


def test_random_bytes_are_replaced_as_the_tokenizer_replaces_them(texts, chat_tokenizer):
    draw = random.Random(0)
    one_byte = [id for id in range(3, 320) if len(texts.raw(id)) == 1]
    for _ in range(300):
        ids = [draw.choice(one_byte) for _ in range(12)]
        stream = TextStream(texts, [])
        assert "".join([*map(stream.push, ids), stream.finish()]) == chat_tokenizer.decode(ids)
