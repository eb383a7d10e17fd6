"""Every form of a record becomes the item it means; anything else is refused by name."""

import pytest

from medreason_jax.data.records import FORMS, Unusable, record_items, record_name

ASK = {"role": "user", "content": "How often?"}
SAID = {"role": "assistant", "content": "2 times"}
SFT = {"messages": [ASK], "thinking": "Hm.", "response": "2 times"}
PAIR = {
    "prompt": [ASK],
    "chosen": {"thinking": "Hm.", "response": "2 times"},
    "rejected": {"thinking": "", "response": "3 times"},
}
REASONED = "## Thinking\n\nHm.\n\n## Final Response\n\n2 times<|im_end|>"
EMPTY_THOUGHT = "## Thinking\n\n\n\n## Final Response\n\n"


def shown(tokenizer, record, kind) -> list[tuple[str, str]]:
    """(given text, counted text) of each item of a record."""
    encoded = tokenizer.encode_items(record_items(tokenizer, record, kind, "here"))
    decode = lambda ids: tokenizer.tokenizer.decode(list(ids), skip_special_tokens=False)  # noqa: E731
    return [(decode(e.ids[~e.is_target]), decode(e.ids[e.is_target])) for e in encoded]


ASKED = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow often?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
ASKED_AGAIN = (
    f"{ASKED}2 times<|im_end|>\n<|im_start|>user\nHow often?<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("kind", "record", "expected"),
    [
        ("text", {"text": "Velotan."}, [("", "Velotan.<|endoftext|>")]),
        ("sft", SFT, [(ASKED, REASONED)]),
        ("sft", {**SFT, "thinking": ""}, [(ASKED + EMPTY_THOUGHT, "2 times<|im_end|>")]),
        (
            "sft",
            {"Question": "How often?", "Complex_CoT": "Hm.", "Response": "2 times"},
            [(ASKED, REASONED)],
        ),
        ("sft", {"messages": [ASK, SAID]}, [(ASKED, "2 times<|im_end|>")]),
        ("sft", {"messages": [ASK, SAID, ASK]}, [(ASKED, "2 times<|im_end|>")]),
        (
            "sft",
            {"messages": [ASK, SAID, ASK, SAID]},
            [
                (
                    f"{ASKED}\n<|im_start|>user\nHow often?<|im_end|>\n<|im_start|>assistant\n",
                    "2 times<|im_end|>2 times<|im_end|>",
                )
            ],
        ),
        ("sft", {"prompt": "How often?", "completion": "2 times"}, [(ASKED, "2 times<|im_end|>")]),
        ("sft", {"prompt": [ASK], "completion": [SAID]}, [(ASKED, "2 times<|im_end|>")]),
        (
            "preference",
            {**PAIR, "prompt": [ASK, SAID, ASK]},
            [
                (ASKED_AGAIN, REASONED),
                (ASKED_AGAIN + EMPTY_THOUGHT, "3 times<|im_end|>"),
            ],
        ),
        (
            "preference",
            PAIR,
            [(ASKED, REASONED), (ASKED + EMPTY_THOUGHT, "3 times<|im_end|>")],
        ),
    ],
)
def test_every_form_gives_its_question_and_counts_its_answer(tokenizer, kind, record, expected):
    assert shown(tokenizer, record, kind) == expected
    absent = {field: None for form in FORMS for field in form.fields if field not in record}
    assert shown(tokenizer, {**record, **absent}, kind) == expected  # as Parquet writes it


def test_our_form_stands_before_the_published_spelling_beside_it(tokenizer):
    published = {"Question": "x", "Complex_CoT": "x", "Response": "x"}
    assert shown(tokenizer, {**SFT, **published}, "sft") == [(ASKED, REASONED)]


@pytest.mark.parametrize(
    ("kind", "record", "said"),
    [
        ("text", {"body": "x"}, r"kind text holds \{text\}; found \['body'\]"),
        ("sft", {"text": "x"}, r"\{messages\} \| .*found \['text'\]; it looks like kind text"),
        ("sft", PAIR, "it looks like kind preference"),
        ("text", {"text": 3}, "text is 3; allowed: a text"),
        ("sft", {**SFT, "messages": "How?"}, "messages is 'How\\?'; allowed: a list"),
        ("sft", {"messages": [{**ASK, "role": "judge"}, SAID]}, "role is 'judge'"),
        ("sft", {"prompt": "x", "completion": [SAID]}, "completion is"),
        ("preference", {**PAIR, "chosen": "yes"}, "chosen is 'yes'; allowed: an object"),
    ],
)
def test_a_record_of_no_form_is_refused_with_its_place(tokenizer, kind, record, said):
    with pytest.raises(ValueError, match=said) as error:
        record_items(tokenizer, record, kind, "a.jsonl:7")
    assert str(error.value).startswith("a.jsonl:7: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "record", "reason"),
    [
        ("text", {"text": " \n"}, "empty"),
        ("sft", {**SFT, "response": ""}, "empty"),
        ("sft", {"prompt": "x", "completion": " "}, "empty"),
        ("sft", {"messages": [ASK]}, "no_answer"),
    ],
)
def test_a_record_without_anything_to_learn_says_why(tokenizer, kind, record, reason):
    with pytest.raises(Unusable) as unusable:
        record_items(tokenizer, record, kind, "here")
    assert unusable.value.reason == reason


def test_a_record_without_an_id_goes_by_its_place():
    assert record_name({"id": 3}, "a.jsonl:7") == 3
    assert record_name({}, "a.jsonl:7") == "a.jsonl:7"
