"""`data-gen filter`: small models, rules, groups, splits and mixed sources; no question is lost."""

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from data_gen.cli import main
from data_gen.config import Mixed, load_config
from data_gen.difficulty import DifficultyFilter
from data_gen.mcq_bank import open_form
from data_gen.problems import Passed, ProblemMaker
from data_gen.prompting import load_prompts
from data_gen.questions import read_mixed, read_questions
from data_gen.records import Mcq, Rejected, read_records, write_records
from tests.data_gen.test_problems import mcq

PROMPTS = load_prompts("en")


class Answering:
    """A small model that says the same to every question."""

    def __init__(self, answer: str) -> None:
        self._answer = answer
        self.prompts: list[str] = []

    async def ask(self, messages):
        self.prompts.append(messages[0]["content"])
        return type("Answered", (), {"answer": self._answer, "key": f"call {self._answer}"})()


class NeverAsked:
    async def ask_parsed(self, *_, **__):
        raise AssertionError("a filter's prompt was sent")

    ask = ask_parsed


def attempt(answers):
    models = [Answering(answer) for answer in answers]
    named = [(f"model {i}", model) for i, model in enumerate(models)]
    return asyncio.run(DifficultyFilter(named, PROMPTS).attempt(mcq())), models


@pytest.mark.parametrize(
    ("answers", "easy", "asked"),
    [
        (["C", "C. ibuprofen", "The answer is C."], True, 3),
        (["C", "A", "C"], False, 2),
        (["I do not know.", "C", "C"], False, 1),
        (["C", "C", ""], False, 3),
        (["A or C", "C", "C"], False, 1),
        (["C" + " and so on" * 3000, "C", "C"], False, 1),  # too long to be judged
    ],
)
def test_a_question_is_too_easy_only_if_every_model_is_right(answers, easy, asked):
    found, models = attempt(answers)
    assert found.too_easy is easy
    assert [len(model.prompts) for model in models] == [1] * asked + [0] * (len(answers) - asked)
    assert len(found.calls) == len(found.outcomes) == asked
    assert "A. aspirin\nB. iron\nC. ibuprofen" in models[0].prompts[0]
    assert "ibuprofen" not in models[0].prompts[0].replace("C. ibuprofen", "")  # no key is shown


def maker(scripted, answers, label="Pass"):
    models = [(f"model {i}", Answering(answer)) for i, answer in enumerate(answers)]
    teacher = scripted(lambda prompt, sample: label)
    difficulty = DifficultyFilter(models, PROMPTS)
    return ProblemMaker(teacher, teacher, PROMPTS, 20, difficulty), teacher


def test_an_easy_question_is_rejected_before_the_teacher_is_asked(scripted):
    made, teacher = maker(scripted, ["C", "C", "C"])
    record = asyncio.run(made.filter(mcq()))
    assert isinstance(record, Rejected)
    assert (record.stage, record.reason) == ("difficulty", "all models are right")
    assert len(record.calls) == 3 and teacher.prompts == []


def test_what_the_models_did_stands_in_the_record_of_a_hard_question(scripted):
    made, _ = maker(scripted, ["C", "B", "C"])
    passed = asyncio.run(made.filter(mcq(split="rl")))
    assert isinstance(passed, Passed)
    assert passed.as_mcq().model_dump()["difficulty"] == {"model 0": "true", "model 1": "false"}


@pytest.mark.parametrize("split", ["dev", "test"])
def test_held_out_questions_enter_no_filters_prompt(split):
    difficulty = DifficultyFilter([("model", NeverAsked())] * 3, PROMPTS)
    made = ProblemMaker(NeverAsked(), NeverAsked(), PROMPTS, 20, difficulty)
    assert isinstance(asyncio.run(made.filter(mcq(split=split))), Passed)
    record = asyncio.run(made.filter(mcq("Which?", split=split)))
    assert isinstance(record, Rejected) and record.reason == "short question"


# --- the command ------------------------------------------------------------------------------


def write_config(tmp_path: Path, bank: Path, teacher_bank: Path, **fields) -> str:
    config = {
        "bank": str(bank),
        "out": str(tmp_path / "out"),
        "teacher": {"reasoner": {"simulated": {"bank": str(teacher_bank)}}},
        **fields,
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def known(record: Mcq) -> dict:
    fields = {"question": record.question, "open_question": open_form(record.question)}
    return {"kind": "generic", **fields, "answer": record.answer, "options": record.options}


@pytest.fixture
def small_bank(tmp_path) -> tuple[Path, Path]:
    names = "aspirin iron zinc codeine heparin insulin lithium digoxin warfarin quinine".split()
    questions = [
        mcq(f"Which drug did the {a} trial of the {b} group compare with {c}, in short?")
        for a, b, c in zip(names, names[3:] + names[:3], names[5:] + names[:5], strict=True)
    ]
    paths = tmp_path / "bank.jsonl", tmp_path / "private.jsonl"
    write_records(paths[0], questions)
    write_records(paths[1], map(known, questions))
    return paths


def test_the_filter_asks_configured_models_through_the_journal(small_bank, serve, tmp_path):
    def script(body, number):
        return "C" if "zinc trial" in body["messages"][0]["content"] else "A"

    servers = [serve(script) for _ in range(3)]
    models = [{"base_url": s.base_url, "model": f"m{i}"} for i, s in enumerate(servers)]
    split = {"search": 1.0, "rl": 0.0, "dev": 0.0, "test": 0.0}
    problems = {"difficulty_models": models, "teacher_filter": False}
    config = write_config(tmp_path, *small_bank, problems=problems, split=split)
    assert main(["filter", config]) == 0
    asked = [len(server.requests) for server in servers]
    assert asked == [10, 1, 1]
    [dropped] = read_records(tmp_path / "out" / "rejected.jsonl", Rejected)
    assert (dropped.stage, dropped.detail) == ("difficulty", "right: m0, m1, m2")
    assert len(read_records(tmp_path / "out" / "filtered.jsonl", Mcq)) == 9
    assert main(["filter", config]) == 0
    assert [len(server.requests) for server in servers] == asked  # all from the journal


def test_a_bank_that_is_too_small_for_its_held_out_splits_is_told_in_one_line(
    small_bank, tmp_path, capsys
):
    assert main(["filter", write_config(tmp_path, *small_bank)]) == 0
    said = capsys.readouterr()
    line = "10 questions are too few for 200 dev and 200 test questions: the shares stand"
    assert f"data-gen: {line}" in said.err.splitlines()
    assert json.loads(said.out)["notes"] == [line]


def test_fewer_than_three_models_are_refused(small_bank, tmp_path, capsys):
    models = [{"base_url": "http://127.0.0.1:9/v1", "model": "m"}] * 2
    config = write_config(tmp_path, *small_bank, problems={"difficulty_models": models})
    assert main(["filter", config]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert "difficulty_models: 2 given, at least 3" in said


def test_real_questions_through_filter_and_split_are_all_counted(real_data, tmp_path, capsys):
    source = real_data / "medqa-usmle" / "phrases_no_exclude_test.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    fields = ("question", "options", "answer_idx", "answer")
    bank = [
        Mcq.model_validate({**{name: row[name] for name in fields}, "source": "medqa"})
        for row in rows
    ]
    paths = tmp_path / "bank.jsonl", tmp_path / "private.jsonl"
    write_records(paths[0], bank)
    write_records(paths[1], map(known, bank))
    config = write_config(tmp_path, *paths, concurrency=16)
    assert main(["filter", config]) == 0
    told = json.loads(capsys.readouterr().out)
    kept = read_records(tmp_path / "out" / "filtered.jsonl", Mcq)
    rejected = read_records(tmp_path / "out" / "rejected.jsonl", Rejected)
    assert told["filter"]["in"] == 899 == len(kept) + len(rejected)
    assert sorted([m.id for m in kept] + [str(r.mcq_id) for r in rejected]) == sorted(
        m.id for m in bank
    )
    assert Counter(r.stage for r in rejected) == {
        stage: count for stage, count in told["filter"]["by_stage"].items() if count
    }
    assert 0.9 * 899 < len(kept) < 899
    assert told["splits"] == dict(sorted(Counter(str(m.split) for m in kept).items()))
    assert told["splits"]["test"] >= 200 and told["splits"]["dev"] >= 200
    of_group: dict = {}
    assert all(of_group.setdefault(m.group, m.split) == m.split for m in kept)
    print(json.dumps(told))


# --- mixing in --------------------------------------------------------------------------------

LISTED = {"question": "Which metal is liquid at room temperature?", "options": ["tin", "mercury"]}
ROWS = [
    {**LISTED, "answer": "B"},
    {"question": "What is 7 times 8?", "answer": "56"},
    {"Open-ended Verifiable Question": "Which gas do plants take up?", "Ground-True Answer": "CO2"},
    {**LISTED, "answer": "gold"},
    {"question": "What?", "answer": ""},
    {"question": "What is 7 times 8?", "answer": "56"},
]


def mixed(tmp_path, **fields):
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Mixed(path=path, source="general", **fields)


def test_mixed_questions_keep_their_form_and_name_their_source(tmp_path):
    problems, rejected = read_mixed([mixed(tmp_path, to="rl")], 0)
    first, *others = problems
    assert first.options == {"A": "tin", "B": "mercury"} and first.answer == "mercury"
    assert [p.answer for p in others] == ["56", "CO2"]
    assert {(p.source, p.split) for p in problems} == {("general", "rl")}
    reasons = [(r.stage, r.reason, r.source) for r in rejected]
    assert reasons == [
        ("mix", "answer is no option", "general"),
        ("mix", "no answer", "general"),
        ("duplicate", "mixed in already", "general"),
    ]


def test_the_same_ones_are_drawn_in_any_order(tmp_path):
    source = mixed(tmp_path, count=2)
    first = {p.id for p in read_mixed([source], 0)[0]}
    path = Path(source.path)
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert {p.id for p in read_mixed([source], 0)[0]} == first and len(first) == 2


def test_a_mixed_question_goes_where_its_group_is_and_never_to_a_held_out_split(tmp_path):
    stem = "A farmer of 61 years has had pain in his left knee since the last harvest. "
    here = mcq(stem + "What is best for it?", split="rl")
    held = mcq("Which drug lowers the fever of a small child that has measles?", split="test")
    write_records(tmp_path / "bank.jsonl", [here, held])
    rows = [
        {"question": stem + "Which is it?", "options": {"A": "gout", "B": "flu"}, "answer": "A"},
        {"question": held.question, "options": held.options, "answer_idx": "C"},
        {"question": "What is 7 times 8, and what is that divided by 14?", "answer": "4"},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mix = [{"path": str(tmp_path / "m.jsonl"), "source": "other", "to": "search"}]
    paths = tmp_path / "bank.jsonl", tmp_path / "bank.jsonl"
    found = read_questions(load_config(Path(write_config(tmp_path, *paths, mix=mix))))
    assert [p.split for p in found.mixed] == ["rl", "search"]  # the first with its group
    assert found.mixed[0].group == found.mcqs[0].group
    [rejected] = found.rejected
    assert (rejected.stage, rejected.reason) == ("split", "group is held out")


def test_a_training_question_of_a_group_that_the_bank_holds_out_is_rejected(tmp_path):
    stem = "A farmer of 61 years has had pain in his left knee since the last harvest. "
    one = mcq(stem + "What is best for it?", split="search")
    other = mcq(stem + "What else may help?", split="test")
    write_records(tmp_path / "bank.jsonl", [one, other])
    paths = tmp_path / "bank.jsonl", tmp_path / "bank.jsonl"
    found = read_questions(load_config(Path(write_config(tmp_path, *paths))))
    assert [m.id for m in found.mcqs] == [other.id]
    assert [(r.mcq_id, r.reason) for r in found.rejected] == [(one.id, "group is held out")]
