"""Conversations equal `transformers`' own, except that a special token in a text is text."""

import json
import re
from functools import cache
from pathlib import Path
from unicodedata import normalize

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medreason_jax.data.chat import ANSWER_ONLY, ChatTokenizer, reasoning_text

REAL = "qwen2.5-tokenizer"
ASK = {"role": "user", "content": "How often?"}
TOOL = {"type": "function", "function": {"name": "bmi", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "tool_calls": [{"name": "bmi", "arguments": {"kg": 70}}]}
TURN = "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"

# The second: what could make a special token, break the hiding of one, or meet JSON's escapes.
PLAIN = st.text(st.sampled_from("ab 1\n|<>\"'\\é́高、🙂\U000f0000\U000f0001"), max_size=12)
HOSTILE = st.lists(
    st.sampled_from(
        '<|im_end|> <|im_start|> <|endoftext|> <| |> im_end < | > x " \\ <tool_call>'.split(" ")
        + list("\n \U000f0000\U000f0001")
    ),
    max_size=6,
).map("".join)
# Function-scoped fixtures are constant here; real encodings are slow on two cores.
PROPERTY = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def turns(text, roles=("user", "assistant")):
    """Conversations of texts: a system turn or none, then any turns of `roles`."""
    message = lambda role: st.fixed_dictionaries({"role": role, "content": text})  # noqa: E731
    system = st.lists(message(st.just("system")), max_size=1)
    others = st.lists(message(st.sampled_from(roles)), min_size=1, max_size=4)
    return st.tuples(system, others).map(lambda parts: parts[0] + parts[1])


def json_objects(text):
    scalar = st.none() | st.booleans() | st.integers(-9, 9) | text
    return st.dictionaries(text, scalar | st.lists(scalar, max_size=2), max_size=2)


def tool_turns(text):
    """Conversations with tools, tool calls and their answers, and the tools."""
    function = st.fixed_dictionaries({"name": text, "arguments": json_objects(text)})
    call = function | st.fixed_dictionaries({"type": st.just("function"), "function": function})
    calling = st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "content": text | st.none(),
            "tool_calls": st.lists(call, min_size=1, max_size=2),
        }
    )
    mixed = st.tuples(
        turns(text), st.lists(calling, max_size=1), turns(text, ("user", "tool"))
    ).map(lambda parts: parts[0] + parts[1] + [m for m in parts[2] if m["role"] != "system"])
    return st.tuples(mixed, st.none() | st.lists(json_objects(text), max_size=2))


@cache
def real_tokenizer(data: Path) -> ChatTokenizer:
    return ChatTokenizer(data / REAL)


@cache
def transformers_tokenizer(folder: Path):
    reason = "the export extra (transformers) is missing"
    return pytest.importorskip("transformers", reason=reason).AutoTokenizer.from_pretrained(folder)


def theirs(folder: Path, messages, tools=None, *, generation=True) -> list[int]:
    return transformers_tokenizer(folder).apply_chat_template(
        messages, tools=tools, add_generation_prompt=generation, return_dict=False
    )


def with_template(tokenizer: ChatTokenizer, folder: Path, template: str) -> ChatTokenizer:
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(template)
    return ChatTokenizer(folder)


def control_ids(tokenizer: ChatTokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if i in tokenizer.control_ids.values()]


def written(tokenizer: ChatTokenizer, ids: list[int]) -> str:
    return tokenizer.tokenizer.decode(ids, skip_special_tokens=False)


def test_the_real_tokenizer_gives_its_golden_encodings(real_data):
    tokenizer = real_tokenizer(real_data)
    golden = real_data / REAL / "golden"
    texts = (golden / "ggml-vocab-qwen2.gguf.inp").read_text(encoding="utf-8")
    expected = (golden / "ggml-vocab-qwen2.gguf.out").read_text().splitlines()
    texts = texts.split("\n__ggml_vocab_test__\n")
    assert len(expected) == 46
    for text, line in zip(texts, expected, strict=False):
        assert tokenizer.encode(text) == [int(i) for i in line.split()]


def test_every_golden_chat_template_case_is_kept(real_data):
    tokenizer = real_tokenizer(real_data)
    lines = (real_data / REAL / "golden/chat_template_cases.jsonl").read_text("utf-8")
    cases = {case["name"]: case for case in map(json.loads, lines.splitlines())}
    assert len(cases) == 10
    for name, case in cases.items():
        generation = case["add_generation_prompt"]
        ids = tokenizer.turns(case["messages"], case["tools"], generation_prompt=generation)
        assert written(tokenizer, ids) == case["text"], name
        if name == "special_token_in_text":  # the golden ids hold " " and <|im_end|> there
            golden, cut = case["input_ids"], case["input_ids"].index(tokenizer.end_id, 21)
            tail = len(golden) - cut - 1
            assert ids[: cut - 1] == golden[: cut - 1] and ids[-tail:] == golden[-tail:], name
            assert ids[cut - 1 : -tail] == tokenizer.encode(" <|im_end|>"), name
            assert tokenizer.end_id not in ids[cut - 1 : -tail]
        else:
            assert ids == case["input_ids"], name
            if generation:
                assert tokenizer.prompt(case["messages"], tools=case["tools"]) == ids


@PROPERTY
@given(tool_turns(PLAIN), st.booleans())
def test_real_conversations_equal_those_of_transformers(real_data, conversation, generation):
    messages, tools = conversation
    tokenizer = real_tokenizer(real_data)
    ours = tokenizer.turns(messages, tools, generation_prompt=generation)
    assert ours == theirs(real_data / REAL, messages, tools, generation=generation)


@PROPERTY
@given(turns(PLAIN, ("user", "assistant", "tool")), st.booleans())
def test_trained_conversations_equal_those_of_transformers(tokenizer, messages, generation):
    ours = tokenizer.turns(messages, generation_prompt=generation)
    assert ours == theirs(tokenizer.folder, messages, generation=generation)


@PROPERTY
@given(tool_turns(HOSTILE))
def test_no_text_of_a_real_conversation_becomes_a_control_id(real_data, conversation):
    """The same conversation without bars has the same control ids; the text is the template's."""
    messages, tools = conversation
    tokenizer = real_tokenizer(real_data)
    ids = tokenizer.prompt(messages, tools=tools)
    bare_messages, bare_tools = json.loads(json.dumps(conversation).replace("|", "-"))
    bare = tokenizer.prompt(bare_messages, tools=bare_tools)
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, bare)
    text = transformers_tokenizer(real_data / REAL).apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=False
    )
    assert written(tokenizer, ids) == text


@PROPERTY
@given(turns(HOSTILE), HOSTILE, HOSTILE)
def test_a_conversation_is_chatml_cut_where_generation_starts(
    tokenizer, messages, thinking, response
):
    """Against ChatML built by hand; the generation prompt is a prefix of the row."""
    expected, counts = [], []
    opening = len(tokenizer.encode("assistant\n"))
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "Be brief."}, *messages]
    for message in messages:
        text = tokenizer.encode(f"{message['role']}\n{message['content']}")
        expected += [tokenizer.start_id, *text, tokenizer.end_id, *tokenizer.encode("\n")]
        answer = message["role"] == "assistant"  # earlier answers and their ends count too
        counts += [False] * (1 + opening) + [answer] * (len(text) - opening + 1)
        counts += [False] * (len(expected) - len(counts))
    expected += [tokenizer.start_id, *tokenizer.encode("assistant\n")]
    assert tokenizer.prompt(messages, response) == expected + tokenizer.encode(response)
    prefix, answer = "", reasoning_text(thinking, response)
    if not thinking:
        prefix, answer = ANSWER_ONLY, response
    expected += tokenizer.encode(prefix)
    row, prompt = tokenizer.conversation(messages, thinking, response), expected
    assert tokenizer.prompt(messages, prefix) == prompt
    assert row.ids == [*prompt, *tokenizer.encode(answer), tokenizer.end_id]
    given = [False] * (len(prompt) - len(counts))
    assert row.is_target == counts + given + [True] * (len(row.ids) - len(prompt))


def answered(text):
    """Conversations whose last turn is the assistant's."""
    answer = st.fixed_dictionaries({"role": st.just("assistant"), "content": text})
    return st.tuples(turns(text), answer).map(lambda parts: [*parts[0], parts[1]])


@PROPERTY
@given(answered(PLAIN))
def test_whole_turns_are_those_of_transformers_and_every_answer_counts(real_data, messages):
    """By decoding: what counts is each answer and its end, and nothing else."""
    tokenizer = real_tokenizer(real_data)
    row = tokenizer.chat(messages)
    prompt = tokenizer.prompt(messages[:-1])
    assert row.ids[: len(prompt)] == prompt
    whole = theirs(real_data / REAL, messages, generation=False)
    assert written(tokenizer, list(row.ids)) == written(tokenizer, whole[:-1])
    targets = [i for i, counts in zip(row.ids, row.is_target, strict=True) if counts]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert targets.count(tokenizer.end_id) == len(answers)
    text = written(tokenizer, targets).split("<|im_end|>")
    for found, answer in zip(text, answers, strict=False):
        # leading white space of an earlier answer joins the newline before it, and is given
        assert found.lstrip() == normalize("NFC", answer).lstrip()


def test_each_turn_of_a_chat_trains_what_its_own_prompt_would_generate(real_data):
    tokenizer = real_tokenizer(real_data)
    messages = [ASK, CALL, {"role": "tool", "content": "24"}]
    messages += [{"role": "assistant", "content": "Once."}, {**ASK, "content": "Sure?"}]
    messages += [{"role": "assistant", "content": "Yes <|im_end|>, once a day."}]
    row = tokenizer.chat(messages, tools=[TOOL])
    flags = list(row.is_target)
    for k in (1, 3, 5):
        prompt = tokenizer.prompt(messages[:k], tools=[TOOL])
        assert row.ids[: len(prompt)] == prompt and not flags[len(prompt) - 1]
        length = flags[len(prompt) :].index(False) if False in flags[len(prompt) :] else None
        answer = list(row.ids[len(prompt) :][:length])
        assert answer[-1] == tokenizer.end_id and answer.count(tokenizer.end_id) == 1
        content = messages[k]["content"] if "content" in messages[k] else "<tool_call>"
        assert content in written(tokenizer, answer[:-1])


def test_pairs_count_only_their_own_answers(tokenizer):
    asked = [ASK, {"role": "assistant", "content": "Hm."}, ASK]
    every = tokenizer.encode_items([tokenizer.answer_pieces(asked, "a", "b")])[0]
    own = tokenizer.encode_items([tokenizer.answer_pieces(asked, "a", "b", earlier_turns=False)])[0]
    assert (every.ids == own.ids).all()
    prompt = len(tokenizer.prompt(asked))
    assert not own.is_target[:prompt].any() and own.is_target[prompt:].all()
    assert every.is_target[:prompt].sum() == len(tokenizer.encode("Hm.")) + 1


def test_a_template_that_drops_earlier_answers_gets_no_loss_on_them(tokenizer, tmp_path):
    ours = with_template(
        tokenizer,
        tmp_path,
        "{% for m in messages %}{% if m.role != 'assistant' %}" + TURN + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    )
    asked = [ASK, {"role": "assistant", "content": "Hm."}, ASK]
    with pytest.raises(ValueError, match="before every answer"):
        ours.conversation(asked, "a", "b")
    with pytest.raises(ValueError, match="no message is the assistant's"):
        ours.chat([ASK])


@PROPERTY
@given(turns(PLAIN), PLAIN.filter(bool), PLAIN)
def test_a_training_row_equals_the_whole_turns_of_transformers(
    real_data, messages, thinking, response
):
    row = real_tokenizer(real_data).conversation(messages, thinking, response)
    answer = {"role": "assistant", "content": reasoning_text(thinking, response)}
    whole = theirs(real_data / REAL, [*messages, answer], generation=False)
    assert row.ids == whole[:-1]  # the newline after the last turn


@pytest.mark.parametrize(
    ("thinking", "answer"),
    [
        ("Hmm.\n2 times.", "## Thinking\n\nHmm.\n2 times.\n\n## Final Response\n\n2 times"),
        ("", "2 times"),
    ],
)
def test_the_generation_prompt_is_a_prefix_of_the_training_row(tokenizer, thinking, answer):
    row = tokenizer.conversation([ASK], thinking, "2 times")
    prompt = tokenizer.prompt([ASK], "" if thinking else ANSWER_ONLY)
    assert row.ids[: len(prompt)] == prompt
    assert row.is_target == [False] * len(prompt) + [True] * (len(row.ids) - len(prompt))
    assert row.ids[-1] == tokenizer.end_id
    assert tokenizer.decode(row.ids[len(prompt) :]) == answer


def test_digits_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("1234")) == 4


@pytest.mark.parametrize(
    "template",
    [
        # trl's kind: the assistant's text is marked; loop controls; a time; a special token's name
        "{% for m in messages %}\n{% if m.role == 'tool' %}{% continue %}{% endif %}\n"
        f"{{% generation %}}{TURN}{{% endgeneration %}}\n{{% endfor %}}{{{{ strftime_now('%Y') }}}}"
        "{{ eos_token }}{{ pad_token }}{{ bos_token }}",
        # QwQ's kind: thoughts are dropped, and JSON keeps its characters
        "{%- for m in messages %}{{- '<|im_start|>' + m.content.split('</think>')[-1] | trim }}"
        "{{- m.content | tojson(indent=2) + '<|im_end|>\\n' }}{%- endfor %}",
    ],
)
def test_templates_run_as_in_transformers(tokenizer, tmp_path, template):
    ours = with_template(tokenizer, tmp_path, template)
    messages = [
        {"role": "user", "content": "a | b < 'é' & \U000f0000"},
        {"role": "assistant", "content": "<think>a|b</think> 1 "},
        {"role": "tool", "content": "2"},
    ]
    assert ours.turns(messages) == theirs(tmp_path, messages, generation=False)


def test_a_none_is_absent_for_the_template_as_in_transformers(tokenizer, tmp_path):
    template = "{% for m in messages %}{{ m.tool_calls is defined }}{{ m.content is defined }}"
    ours = with_template(tokenizer, tmp_path, template + "{% endfor %}")
    messages = [{**ASK, "tool_calls": None}, {**CALL, "content": None}]
    assert ours.turns(messages) == theirs(tmp_path, messages)
    assert ours.decode(ours.turns(messages)) == "FalseTrueTrueFalse"


@pytest.mark.parametrize(
    "change", ["replace('|', '!')", "replace('<|', '')", "tojson(ensure_ascii=True)", "urlencode"]
)
def test_a_template_that_changes_the_marks_of_special_tokens_is_refused(
    tokenizer, tmp_path, change
):
    ours = with_template(
        tokenizer, tmp_path, f"{{{{ '<|im_start|>' + messages[0].content | {change} }}}}"
    )
    assert ours.turns([ASK])
    with pytest.raises(ValueError, match=r"tests or changes \['\|'\] in a text"):
        ours.turns([{"role": "user", "content": "a <|im_end|>"}])


def test_a_template_cannot_join_the_pieces_of_a_special_token(tokenizer, tmp_path):
    template = "{{ '<|im_start|>' + messages[0].content | replace('x', '') }}"
    ours = with_template(tokenizer, tmp_path, template)
    ids = ours.turns([{"role": "user", "content": "<x|im_xend|x>"}])
    assert ids == [ours.start_id, *ours.encode("<|im_end|>")]


def test_what_a_template_refuses_is_refused_with_its_words(tokenizer, tmp_path):
    ours = with_template(tokenizer, tmp_path, "{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(ValueError, match="Roles must alternate"):
        ours.prompt([ASK])


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "judge", "content": "x"}, "role is 'judge'; allowed: system, user"),
        ({"content": "x"}, "role is None"),
        (
            {"role": "user", "content": "x", "name": "Ann"},
            "the user's name is 'Ann'; allowed fields: role, content",
        ),
        ({**CALL, "role": "user"}, "the user's tool_calls is"),
        ({"role": "user", "content": ["x"]}, "the user's content is \\['x'\\]"),
        ({"role": "assistant"}, "the assistant's content is None"),
        ({**CALL, "tool_calls": [{"name": "bmi", "arguments": "{}"}]}, "not as its JSON text"),
        ({**CALL, "tool_calls": [{"function": {"name": "bmi"}}]}, "tool_calls is"),
        ({**CALL, "tool_calls": 5}, "tool_calls is 5"),
        ({**CALL, "tool_calls": {"a": 1}}, "tool_calls is {'a': 1}"),
    ],
)
def test_a_message_outside_the_contract_is_refused(tokenizer, message, said):
    with pytest.raises(ValueError, match=said):
        tokenizer.prompt([ASK, message])


def test_an_empty_conversation_and_tools_of_another_kind_are_refused(tokenizer):
    with pytest.raises(ValueError, match="messages is empty"):
        tokenizer.prompt([])
    for tools, said in (("bmi", "tools is 'bmi'"), (5, "tools is 5"), (["bmi"], "tools is")):
        with pytest.raises(ValueError, match=said):
            tokenizer.prompt([ASK], tools=tools)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("messages", ["hi", 5, None, ASK, ["hi"], [ASK, None]])
def test_messages_that_are_no_list_of_objects_are_refused(tokenizer, messages):
    with pytest.raises(ValueError, match=r"messages is .*; allowed: a list of objects"):
        tokenizer.prompt(messages)


def test_tools_that_the_template_would_drop_are_refused(tokenizer):
    with pytest.raises(ValueError, match="never reads tools"):
        tokenizer.prompt([ASK], tools=[TOOL])
    with pytest.raises(ValueError, match="never reads tool_calls"):
        tokenizer.prompt([ASK, CALL])
    answer = {"role": "assistant", "content": "x"}
    for nothing in ([], None):
        ids = tokenizer.prompt([{**answer, "tool_calls": nothing}], tools=nothing)
        assert ids == tokenizer.prompt([answer])


def test_turns_end_as_chatml_whatever_the_base_checkpoint_says(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "base")
    config = {**tokenizer.config, "eos_token": "<|endoftext|>", "pad_token": None, "kept": "é"}
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(config))
    base = ChatTokenizer(tmp_path / "base")
    assert base.end_id == base.tokenizer.token_to_id("<|im_end|>")
    assert base.pad_id == base.tokenizer.token_to_id("<|endoftext|>")
    assert base.conversation([ASK], "x", "y").ids[-1] == base.end_id
    base.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert saved == {**config, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def test_a_saved_tokenizer_holds_every_file_and_gives_the_same_prompts(tokenizer, tmp_path):
    source, saved = tmp_path / "source", tmp_path / "deep/saved"
    newer = with_template(tokenizer, source, f"{{% for m in messages %}}{TURN}{{% endfor %}}newer")
    for name in ("vocab.json", "merges.txt", "model.safetensors"):
        (source / name).write_text(name)
    newer.save(saved)
    newer.save(saved)  # again, over its own files
    kept = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {file.name for file in saved.iterdir()} == kept | {"vocab.json", "merges.txt"}
    assert (saved / "merges.txt").read_text() == "merges.txt"
    for name in ("vocab.json", "merges.txt"):  # not real ones: transformers would read them
        (saved / name).unlink()
    assert ChatTokenizer(saved).prompt([ASK]) == newer.prompt([ASK]) == theirs(saved, [ASK])
    assert newer.prompt([ASK]) != tokenizer.prompt([ASK])
    assert transformers_tokenizer(saved).eos_token == "<|im_end|>"


def test_a_trained_tokenizer_is_saved_without_a_change(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (tokenizer.folder / file.name).read_bytes()


def test_a_folder_without_one_chat_template_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = {**tokenizer.config, "chat_template": [{"name": "default", "template": "x"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no one chat template"):
        ChatTokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", b"{}", "is no file of the tokenizers library"),
        ("tokenizer.json", b"\xff", "is no file of the tokenizers library"),
        ("tokenizer_config.json", b"{", "is not JSON"),
        ("tokenizer_config.json", b"[]", "not a JSON object"),
        ("tokenizer_config.json", b'{"chat_template": "a\\n{% if %}"}', "line 2 of the chat temp"),
        ("chat_template.jinja", b"{% if %}", "line 1 of the chat template is broken"),
        ("chat_template.jinja", b"{{ 'a' | nofilter }}", "No filter named 'nofilter'"),
        ("chat_template.jinja", b"\xff", "is not UTF-8"),
    ],
)
def test_a_broken_file_of_a_tokenizer_is_named(tokenizer, tmp_path, name, content, words):
    tokenizer.save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))}.*{words}"):
        ChatTokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_of_a_tokenizer_is_named(tokenizer, tmp_path, name):
    tokenizer.save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / name} does not exist")):
        ChatTokenizer(tmp_path)


def test_the_vocabulary_reaches_to_the_last_id_over_gaps(tokenizer, tmp_path):
    assert tokenizer.vocab_size == tokenizer.tokenizer.get_vocab_size()
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    vocab[last] += 50
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    gapped = ChatTokenizer(tmp_path)
    assert gapped.tokenizer.get_vocab_size() == tokenizer.vocab_size
    assert gapped.vocab_size == tokenizer.vocab_size + 50
