"""The prompt files: the same keys in every language, the constant part first."""

import json
import re

import pytest

from data_gen.problems import LABELS
from data_gen.prompting import FOLDER, load_prompts, placeholders, render
from data_gen.records import PROBLEM_SPELLING

LANGUAGES = ("en", "ja", "zh")
SCRIPTS = {"ja": r"[\u3040-\u30ff]", "zh": r"[\u4e00-\u9fff]"}
WITH_STEPS = ("initial_cot", "explore", "backtrack", "verify_again", "correct", "label_cot")


def test_there_is_a_file_for_every_language_and_no_other():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_the_same_keys_and_placeholders(language):
    english, own = load_prompts("en"), load_prompts(language)
    assert list(own) == list(english)
    assert {k: placeholders(t) for k, t in own.items()} == {
        k: placeholders(t) for k, t in english.items()
    }


@pytest.mark.parametrize("language", ["ja", "zh"])
def test_prompts_are_written_in_their_language(language):
    english = load_prompts("en")
    for name, text in load_prompts(language).items():
        assert text != english[name]
        assert re.search(SCRIPTS[language], text.splitlines()[0]), name
        kana = re.search(SCRIPTS["ja"], text)
        assert (kana is not None) == (language == "ja"), name


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_the_code_reads_stays_as_it_is_in_every_language(language):
    prompts = load_prompts(language)
    for label in LABELS:
        assert label in prompts["filter"]
    for key in PROBLEM_SPELLING.values():
        assert f'"{key}"' in prompts["reformat"]
    for name in WITH_STEPS:
        for word in ('{"CoT": [...]}', '"Inner Thinking"', '"Final Conclusion"', '"Verification"'):
            assert word in prompts[name], (name, word)
    assert '{"NaturalReasoning": "..."}' in prompts["natural_reasoning"]
    for name in ("verify", "verify_with_question"):
        assert "True" in prompts[name] and "False" in prompts[name]


@pytest.mark.parametrize("language", LANGUAGES)
def test_two_renderings_share_the_whole_instruction_as_their_prefix(language):
    """What is constant comes first, so that a provider's prompt cache hits."""
    for name, template in load_prompts(language).items():
        if name == "repair":  # it is sent after a conversation, never first
            continue
        instruction, rest = template.split("\n\n", 1)
        for fill in ("one", "two {question}"):
            texts = dict.fromkeys(placeholders(template), fill)
            assert render(template, texts).startswith(instruction), name
        assert not placeholders(instruction) and placeholders(rest), name
        assert len(instruction) > 20, name


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_four_strategies_differ_in_their_instruction_only(language):
    prompts = load_prompts(language)
    texts = [prompts[name] for name in ("explore", "backtrack", "verify_again", "correct")]
    assert len({text.split("\n\n", 1)[0] for text in texts}) == 4
    assert len({text.split("\n\n", 1)[1] for text in texts}) == 1


def test_rendering_puts_json_and_braces_in_unchanged():
    steps = json.dumps([{"action": "Inner Thinking", "content": "{question} is {trace}"}])
    prompt = render(load_prompts("en")["explore"], {"question": "q", "previous": steps})
    assert prompt.endswith(steps)
