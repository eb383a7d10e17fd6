"""Replies in JSON: the schema where an endpoint takes one, and as many repairs as are set."""

import json

import pytest
import yaml

from data_gen.cli import main
from data_gen.problems import parse_json_object
from data_gen.records import PROBLEM_SPELLING, Rejected, read_records, write_records
from data_gen.schemas import NATURAL_REASONING, REFORMAT, STEPS
from data_gen.search import parse_initial, parse_rethought
from tests.data_gen.test_problems import mcq
from tests.data_gen.test_search import chain

QUESTION = "Which drug lowers a child's fever best when it has measles too?"
REFORMATTED = json.dumps(
    {PROBLEM_SPELLING["question"]: QUESTION, PROBLEM_SPELLING["answer"]: "ibuprofen"}
)


def reply(prompt: str) -> str:
    starts = {
        "You screen": "Pass",
        "You turn": REFORMATTED,
        "You solve": chain("ibuprofen"),
        "You compare": "True",
        "You rewrite": json.dumps({"NaturalReasoning": "hmm\nibuprofen"}),
        "You write": "ibuprofen",
    }
    return next(text for start, text in starts.items() if prompt.startswith(start))


def run(tmp_path, server, command="run", retries=None, **role):
    write_records(tmp_path / "bank.jsonl", [mcq(QUESTION, split="search")])
    config = {
        "bank": str(tmp_path / "bank.jsonl"),
        "out": str(tmp_path / "out"),
        "teacher": {"reasoner": {"base_url": server.base_url, "model": "m", **role}},
        "retries": {"attempts": 1, **({} if retries is None else retries)},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    return main([command, str(tmp_path / "c.yaml")])


def test_every_json_call_carries_its_schema_and_no_other_call_does(serve, tmp_path):
    server = serve(lambda body, number: reply(body["messages"][0]["content"]))
    assert run(tmp_path, server, structured_output="json_schema") == 0
    sent = {
        body["messages"][0]["content"].split()[1]: body["response_format"]["json_schema"]["schema"]
        for body in server.requests
        if "response_format" in body
    }
    assert sent == {"turn": REFORMAT, "solve": STEPS, "rewrite": NATURAL_REASONING}
    assert len(server.requests) == 6


def test_without_structured_output_no_schema_is_sent(serve, tmp_path):
    server = serve(lambda body, number: reply(body["messages"][0]["content"]))
    assert run(tmp_path, server) == 0
    assert len(server.requests) == 6
    assert not any("response_format" in body for body in server.requests)


@pytest.mark.parametrize("repairs", [0, 1, 3])
def test_a_reply_that_cannot_be_read_is_asked_for_again_as_often_as_is_set(
    serve, tmp_path, repairs
):
    def script(body, number):
        prompt = body["messages"][0]["content"]
        return "no JSON" if prompt.startswith("You turn") else reply(prompt)

    server = serve(script)
    assert run(tmp_path, server, "problems", {"repairs": repairs}) == 0
    asked = [b for b in server.requests if b["messages"][0]["content"].startswith("You turn")]
    assert len(asked) == 1 + repairs
    assert all("not JSON" in body["messages"][-1]["content"] for body in asked[1:])
    [record] = read_records(tmp_path / "out" / "rejected.jsonl", Rejected)
    assert (record.stage, record.reason) == ("reformat", "unreadable")


def accepts(schema, value) -> bool:
    """The part of JSON Schema that the schemas here use."""
    if "anyOf" in schema:
        return any(accepts(each, value) for each in schema["anyOf"])
    if schema["type"] == "array":
        return isinstance(value, list) and all(accepts(schema["items"], each) for each in value)
    if schema["type"] == "string":
        return isinstance(value, str) and ("enum" not in schema or value in schema["enum"])
    assert schema["type"] == "object" and schema["additionalProperties"] is False
    properties = schema["properties"]
    same = isinstance(value, dict) and set(value) == set(properties) == set(schema["required"])
    return same and all(accepts(properties[name], value[name]) for name in properties)


def test_the_schemas_accept_what_the_parsers_read_and_refuse_what_they_refuse():
    assert accepts(REFORMAT, json.loads(REFORMATTED))
    assert not accepts(REFORMAT, {**json.loads(REFORMATTED), "more": "x"})
    for text, parse in ((chain("x"), parse_initial), (chain("x", True), parse_rethought)):
        assert parse(text) and accepts(STEPS, parse_json_object(text))
    for step in (
        {"action": "Inner Thinking", "content": "no title"},
        {"action": "Musing", "content": "x"},
        {"action": "Verification", "content": "x", "title": "t"},
    ):
        assert not accepts(STEPS, {"CoT": [step]})
    assert accepts(NATURAL_REASONING, {"NaturalReasoning": "a\nb"})
