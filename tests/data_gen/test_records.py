"""Records on disk: ids, both spellings, errors that name the place, writes that are whole."""

import json

import pytest

from data_gen.records import (
    Candidate,
    Mcq,
    Problem,
    Sft,
    content_id,
    hash_fraction,
    read_records,
    write_records,
)

MCQ = {"question": "Which?", "options": {"A": "x", "B": "y"}, "answer_idx": "A", "answer": "x"}


def test_an_id_depends_on_the_content_and_not_on_the_order_of_fields():
    assert content_id({"a": 1, "b": "é"}) == content_id({"b": "é", "a": 1, "id": "old"})
    assert content_id({"a": 1}) != content_id({"a": 2})
    assert len(content_id({})) == 16


def test_a_record_without_an_id_gets_one_that_extra_fields_do_not_change():
    plain, marked = Mcq.model_validate(MCQ), Mcq.model_validate({**MCQ, "note": "kept"})
    assert plain.id == marked.id
    assert Mcq.model_validate({**MCQ, "answer_idx": "B"}).id != plain.id
    assert Mcq.model_validate({**MCQ, "id": "given"}).id == "given"


def test_unknown_fields_survive_reading_and_writing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({**MCQ, "note": {"deep": [1]}}) + "\n\n")
    [record] = read_records(path, Mcq)
    assert write_records(path, [record]) == 1
    assert json.loads(path.read_text())["note"] == {"deep": [1]}


def test_problems_are_read_from_either_spelling_and_written_in_both():
    published = {"Open-ended Verifiable Question": "Why?", "Ground-True Answer": "so"}
    ours = {"question": "Why?", "answer": "so"}
    left, right = Problem.model_validate(published), Problem.model_validate(ours)
    assert left.model_dump() == right.model_dump()
    assert left.model_dump().items() >= {**published, **ours}.items()


def test_sft_records_are_read_from_the_published_three_fields():
    record = Sft.model_validate({"Question": "Why?", "Complex_CoT": "hmm", "Response": "so"})
    assert record.messages[0].content == "Why?"
    assert (record.thinking, record.response) == ("hmm", "so")


def test_spellings_that_differ_are_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "a", "Open-ended Verifiable Question": "b", "answer": "c"}\n')
    with pytest.raises(ValueError, match=r"line 1: .*'question' and 'Open-ended"):
        read_records(path, Problem)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": 3}', ["line 2", "question", "found 3"]),
        ('{"question": "a"', ["line 2", "not JSON"]),
        ("[]", ["line 2"]),
        ('{"question": "a", "options": {}, "answer_idx": "A"}', ["line 2", "answer", "required"]),
        (json.dumps({**MCQ, "split": "train"}), ["line 2", "split", "'train'", "search"]),
    ],
)
def test_a_bad_line_is_named_with_file_line_field_and_value(tmp_path, line, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(MCQ) + "\n" + line + "\n")
    with pytest.raises(ValueError) as caught:
        read_records(path, Mcq)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert all(word in message for word in words), message


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.jsonl"
    write_records(path, [{"id": "old"}])

    def failing():
        yield {"id": "new"}
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        write_records(path, failing())
    assert path.read_text() == '{"id": "old"}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_line_separators_inside_a_text_do_not_split_a_record(tmp_path):
    path = tmp_path / "a.jsonl"
    record = Candidate(problem_id="p", explain=True, text="a\u2028b\x85c\nd")
    write_records(path, [record])
    assert read_records(path, Candidate) == [record]


def test_hash_fractions_are_spread_evenly_and_repeat():
    draws = [hash_fraction(0, i) for i in range(2000)]
    assert draws == [hash_fraction(0, i) for i in range(2000)]
    assert 0.45 < sum(draws) / 2000 < 0.55
    assert hash_fraction("a", "bc") != hash_fraction("ab", "c")
