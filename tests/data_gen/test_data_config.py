"""The configuration: strict, one-line errors that name the nearest field, overrides."""

import pytest

from data_gen.config import Pairs, check_settings, load_config, parse_overrides
from data_gen.endpoints import arguments
from data_gen.prompting import load_prompts, render

GOOD = """
bank: bank.jsonl
out: out
teacher:
  reasoner: {base_url: "http://127.0.0.1:9/v1", model: m}
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(GOOD)
    return path


def test_overrides_change_nested_fields_and_make_missing_sections(config_file):
    config = load_config(config_file, ["search.max_depth=1", "seed=4", "pairs.explain=[true]"])
    assert (config.search.max_depth, config.seed, config.pairs.explain) == (1, 4, [True])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("search.max_dept=1", ["search.max_dept", "did you mean max_depth?"]),
        ("concurency=1", ["concurency", "did you mean concurrency?"]),
        ("teacher.reasoner.bas_url=x", ["teacher.reasoner.bas_url", "base_url"]),
        ("concurrency=0", ["concurrency", "found 0"]),
        ("search.verifier=maybe", ["search.verifier", "'teacher' or 'rule'", "'maybe'"]),
        ("rewrite.direct_share=1.5", ["rewrite.direct_share", "1.5"]),
        ("teacher.reasoner.base_url=null", ["teacher.reasoner", "base_url or simulated"]),
        ("teacher.reasoner.base_url=ftp://x", ["teacher.reasoner.base_url", "ftp://x"]),
        ("search.strategies={explore: 0, verify_again: 0, correct: 0}", ["search", "strategy"]),
        ("seed", ["seed", "field.field=value"]),
        ("bank.x=1", ["bank has no fields"]),
    ],
)
def test_a_wrong_setting_is_one_line_with_field_value_and_remedy(config_file, override, words):
    with pytest.raises(ValueError) as caught:
        load_config(config_file, [override])
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_model_is_required_beside_a_base_url(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(GOOD.replace(", model: m", ""))
    with pytest.raises(ValueError, match="model is required with base_url"):
        load_config(path)


def test_simulated_settings_become_the_servers_arguments(config_file):
    one = ["teacher.reasoner={simulated: {bank: b.jsonl, seed: 3, fault_429: 0.5}}"]
    simulated = load_config(config_file, one).teacher.reasoner.simulated
    assert simulated is not None
    assert arguments(simulated) == ["--bank=b.jsonl", "--seed=3", "--fault-429=0.5"]


def test_settings_of_one_section_are_checked_alike():
    with pytest.raises(ValueError, match=r"pairs: unknown field kk; did you mean k\?"):
        check_settings(Pairs, parse_overrides(["kk=3"]), "pairs")


def test_prompts_of_another_file_need_the_same_keys_and_placeholders(tmp_path):
    prompts = load_prompts("en")
    path = tmp_path / "mine.yaml"
    import yaml

    path.write_text(yaml.safe_dump({**prompts, "verify": "no placeholders"}))
    with pytest.raises(ValueError, match="prompt verify should hold the placeholders answer"):
        load_prompts("en", path)
    path.write_text(yaml.safe_dump({**prompts, "verfy": "x"}))
    with pytest.raises(ValueError, match="unknown prompt verfy; did you mean verify"):
        load_prompts("en", path)
    with pytest.raises(ValueError, match="language=xx"):
        load_prompts("xx")


def test_a_text_with_braces_is_rendered_as_it_is():
    assert render("{a} {b} {c}", {"a": "{b}", "b": "x"}) == "{b} x {c}"
