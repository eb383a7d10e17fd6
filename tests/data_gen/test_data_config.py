"""The configuration: strict, one-line errors that name the nearest field, overrides."""

import pytest

from data_gen.config import Pairs, Simulated, check_settings, load_config, parse_overrides
from data_gen.endpoints import arguments
from data_gen.prompting import load_prompts, render
from data_gen.simulated_teacher import make_parser

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
        ("search.verifier=maybe", ["search.verifier", "'rule_then_teacher'", "'maybe'"]),
        ("rewrite.direct_share=1.5", ["rewrite.direct_share", "1.5"]),
        ("teacher.reasoner.base_url=null", ["teacher.reasoner", "base_url or simulated"]),
        ("teacher.reasoner.base_url=ftp://x", ["teacher.reasoner.base_url:", "ftp://x", "http(s)"]),
        ("teacher.reasoner.base_url=[]", ["teacher.reasoner.base_url:", "or a list of them"]),
        ("teacher.reasoner.base_url=https://me:pw@x", ["without user", "https://***@x"]),
        ("network.proxy=https://x/?key=1", ["network.proxy:", "without user, password or query"]),
        ("teacher.reasoner.batch.cont=1", ["teacher.reasoner.batch.cont", "did you mean count?"]),
        ("prices.models={a: {inputt: 1}}", ["prices.models.a.inputt", "did you mean input?"]),
        ("problems.difficulty_models=[{base_ur: x}]", ["difficulty_models.0.base_ur", "base_url"]),
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


def test_every_setting_of_the_simulated_teacher_reaches_its_server():
    names = set(Simulated.model_fields) - {"bank", "seed"}
    given = arguments(Simulated.model_validate({"bank": "b", **dict.fromkeys(names, 0.25)}))
    parsed = vars(make_parser().parse_args(given))
    assert sum(value == 0.25 for value in parsed.values()) == len(names) == len(given) - 2


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


@pytest.mark.parametrize(
    ("setting", "judge", "other"),
    [
        ("verifier_sees_question=true", "teacher", "rule"),
        ("teacher_seconds=5", "teacher", "rule"),
        ("rule_seconds=5", "rule", "teacher"),
    ],
)
def test_a_setting_of_a_verifier_that_is_not_asked_is_refused(config_file, setting, judge, other):
    """Search and rewriting each have a verifier; one that asks the judge is enough."""
    both = [f"search.verifier={other}", f"rewrite.verifier={other}", f"search.{setting}"]
    with pytest.raises(ValueError, match=rf"search\.{setting.split('=')[0]} has no effect with"):
        load_config(config_file, both)
    for asked in (f"search.verifier={judge}", "rewrite.verifier=rule_then_teacher"):
        assert load_config(config_file, [*both, asked]).search.model_fields_set
