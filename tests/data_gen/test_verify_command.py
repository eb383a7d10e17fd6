"""`data-gen verify`: records of responses in, verdicts and an accuracy out."""

import json

import pytest

from data_gen.cli import main

ROWS = [
    ({"response": "heart attack", "answer": "myocardial infarction"}, "false"),
    (
        {"response": "MI", "answer": "myocardial infarction", "aliases": ["heart attack", "MI"]},
        "true",
    ),
    ({"response": "67.1 mL/min", "answer": "67", "low": "63.6", "high": 70.4}, "true"),
    ({"response": "71", "answer": "67", "low": 63.6, "high": 70.4}, "false"),
    ({"response": "104 mg", "answer": "100 mg", "tolerance": 0.05}, "true"),
    ({"response": "05/06/2017", "answer": "5 June 2017", "date_order": "dmy"}, "true"),
    ({"response": "05/06/2017", "answer": "5 June 2017"}, "unscored"),
    ({"response": "a, c", "answer": "ac", "options": {"a": "x", "b": "y", "c": "z"}}, "true"),
]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_every_setting_of_a_reference_is_used(tmp_path, capsys):
    responses = write(tmp_path / "r.jsonl", [row for row, _ in ROWS])
    out = tmp_path / "v.jsonl"
    assert main(["verify", responses, "--out", str(out)]) == 0
    verdicts = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["verdict"] for row in verdicts] == [outcome for _, outcome in ROWS]
    found = json.loads(capsys.readouterr().out)
    assert found["verdicts"] == {"false": 2, "true": 5, "unscored": 1}
    assert found["accuracy"] == 5 / 7  # of those that were scored


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"low": 1}, "low=1.0, high=None; give both limits or neither"),
        ({"low": 2, "high": 1}, "low=2.0 is above high=1.0; exchange them"),
        ({"low": "x", "high": 1}, "low='x'; it should be a number such as 12.5"),
        ({"tolerance": 5}, "tolerance=5.0; it is a share, from 0 to below 1"),
        ({"tolerance": 0.1, "low": 1, "high": 2}, "tolerance=0.1 and limits; give one of the two"),
        ({"date_order": "ymd"}, "'mdy' or 'dmy'"),
    ],
)
def test_a_wrong_reference_is_one_line_with_the_remedy(tmp_path, capsys, settings, words):
    row = {"response": "1", "answer": "1", **settings}
    assert main(["verify", write(tmp_path / "r.jsonl", [row])]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert "\n" not in said
