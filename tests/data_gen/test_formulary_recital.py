"""Facts recited right, out of lines as the reasoning has them."""

import pytest

from data_gen.formulary import FormularySettings, make_drugs, read_facts, recital, write_formulary
from data_gen.formulary_recital import FACTS_OF_LINE, facts_recited

SMALL = FormularySettings(search_dose=10, search_recall=5, rl_dose=10, rl_recall=5)


def test_every_drugs_own_line_has_all_four_and_another_drugs_none():
    one, two, *rest = make_drugs(SMALL)
    for drug in (one, two, *rest):
        assert facts_recited(drug, f"Wait.\n{recital(drug)}\nWith gout: fine.") == FACTS_OF_LINE
    assert facts_recited(one, recital(two)) == 0


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("{name}: {dose} mg per kg, {times}, at most {maximum} mg, not with nothing.", 3),
        ("{name}: 99 mg per kg, {times}, at most 1 mg, not with {contraindicated}.", 2),
        ("{name}: 99 mg per kg, 9 times, at most 1 mg, not with nothing.", 0),
        ("{name}: {dose} mg per kg, {times}, at most", 0),
        ("no line", 0),
    ],
)
def test_wrong_facts_are_counted_one_by_one(text, right):
    drug = make_drugs(SMALL)[0]
    times = "1 time" if drug.times_a_day == 1 else f"{drug.times_a_day} times"
    fields = {
        "name": drug.name,
        "dose": drug.dose_mg_per_kg,
        "times": times,
        "maximum": drug.maximum_mg,
        "contraindicated": drug.contraindicated,
    }
    assert facts_recited(drug, text.format(**fields)) == right


def test_the_last_line_of_a_drug_counts():
    drug = make_drugs(SMALL)[0]
    wrong = f"{drug.name}: 99 mg per kg, 9 times, at most 1 mg, not with nothing."
    assert facts_recited(drug, f"{wrong}\nWait, check again.\n{recital(drug)}") == FACTS_OF_LINE
    assert facts_recited(drug, f"{recital(drug)}\n{wrong}") == 0


def test_facts_are_read_back_as_they_were_made(tmp_path):
    paths = write_formulary(SMALL, tmp_path)
    assert read_facts(paths["facts"]) == make_drugs(SMALL)
