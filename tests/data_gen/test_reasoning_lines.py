"""The lines in which the simulated teacher reasons about the invented drugs, right and wrong."""

import json
import re
from collections import Counter
from typing import Any

import pytest

from data_gen.formulary import FormularySettings, write_formulary
from data_gen.simulated_replies import Draw, Thought, outcome, think


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = write_formulary(FormularySettings(seed=5), tmp_path_factory.mktemp("f"))["teacher_bank"]
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of_kind(bank: list[dict[str, Any]], kind: str, count: int) -> list[dict[str, Any]]:
    return [record for record in bank if record["kind"] == kind][:count]


def thought_about(record: dict[str, Any], *, wrong: bool) -> Thought:
    return think(record, wrong, Draw(0, record["open_question"]))


def line_of_facts(drug: dict[str, Any]) -> str:
    plural = "time" if drug["times_a_day"] == 1 else "times"
    return (
        f"{drug['name']}: {drug['dose_mg_per_kg']} mg per kg, {drug['times_a_day']} {plural}, "
        f"at most {drug['maximum_mg']} mg, not with {drug['contraindicated']}."
    )


def halved(total: int, times: int) -> list[str]:
    """The line that shares a day's amount out over its doses; none for one dose a day."""
    assert total % times == 0
    half, quarter = total // 2, total // 4
    return {
        1: [],
        2: [f"{total}/2={half}."],
        4: [f"{total}/2={half}, {half}/2={quarter}."],
    }[times]


def is_barred(record: dict[str, Any]) -> bool:
    return record["condition"] == record["drug"]["contraindicated"]


def test_the_lines_of_a_dose_follow_the_fixed_shape_and_every_sum_in_them_is_right(bank):
    shapes, met = Counter(), set()
    for record in of_kind(bank, "dose", 150):
        thought = thought_about(record, wrong=False)
        said, drug, weight = thought.lines, record["drug"], record["weight"]
        times, most = drug["times_a_day"], drug["maximum_mg"]
        assert said[0] == line_of_facts(drug)
        assert thought.conclusion == record["answer"] == outcome("\n".join(said))
        shapes[len(said)] += 1
        if is_barred(record):
            assert said[1:] == [f"With {record['condition']}: not allowed."]
            assert thought.conclusion == "do not give"
            continue
        assert said[1] == f"With {record['condition']}: fine."
        total = weight * drug["dose_mg_per_kg"]
        products = re.fullmatch(r"(\d+)x(\d)=(\d+), (\d)x(\d)=(\d+), sum (\d+)\.", said[2])
        assert products is not None
        a, dose, left, b, same, right, written = map(int, products.groups())
        assert (a + b, a * dose, b * dose, dose, left + right) == (weight, left, right, same, total)
        assert a % 10 == 0 and dose == drug["dose_mg_per_kg"]
        assert written == total
        assert said[3] == f"Limit {most}: {min(total, most)}."
        assert said[4:] == halved(min(total, most), times)
        assert thought.conclusion == f"{min(total, most) // times} mg"
        met.add((times, total > most))
    assert set(shapes) == {2, 4, 5}
    assert met == {(times, above) for times in (1, 2, 4) for above in (True, False)}


def test_recall_states_the_facts_then_the_asked_one(bank):
    asked = Counter()
    for record in of_kind(bank, "recall", 60):
        first, last = thought_about(record, wrong=False).lines
        asked[record["fact"]] += 1
        assert first == line_of_facts(record["drug"])
        named = record["fact"] in ("contraindicated", "interaction")
        assert last == (f"Not with {record['answer']}." if named else f"{record['answer']}.")
    assert len(asked) == 5


def test_slips_are_of_several_kinds_and_never_use_a_wrong_dose_per_kg(bank):
    kinds = Counter()
    for record in of_kind(bank, "dose", 150):
        thought = thought_about(record, wrong=True)
        said, drug, most = thought.lines, record["drug"], record["drug"]["maximum_mg"]
        assert thought.conclusion == outcome("\n".join(said)) != record["answer"]
        assert said[0].startswith(f"{drug['name']}: {drug['dose_mg_per_kg']} mg per kg, ")
        total = record["weight"] * drug["dose_mg_per_kg"]
        if is_barred(record):
            kinds["contraindication overlooked"] += said[1] == f"With {record['condition']}: fine."
        elif said[0] != line_of_facts(drug):
            kinds["wrong fact"] += 1
        elif not said[2].endswith(f", sum {total}."):
            kinds["addition"] += 1
        elif said[3] != f"Limit {most}: {min(total, most)}.":
            kinds["limit"] += 1
        elif drug["times_a_day"] > 1 and len(said) == 4:
            kinds["division forgotten"] += 1
    assert sum(kinds.values()) == 150
    assert len(kinds) == 5 and min(kinds.values()) >= 5, kinds
