"""How many of a drug's facts a piece of reasoning recites right, in the line it starts with."""

from __future__ import annotations

import re

from data_gen.formulary import Drug, times_text

LINE = re.compile(
    r"(?P<name>[A-Z][a-z]+-[a-z]+): (?P<dose>\d+) mg per kg, (?P<times>\d+ times?), "
    r"at most (?P<maximum>\d+) mg, not with (?P<contraindicated>\w+)\."
)
FACTS_OF_LINE = 4


def facts_recited(drug: Drug, text: str) -> int:
    """0 to 4: facts of the drug's last such line in `text` that are right; 0 without a line."""
    lines = [match for match in LINE.finditer(text) if match["name"] == drug.name]
    if not lines:
        return 0
    line = lines[-1]
    return sum(
        (
            line["dose"] == str(drug.dose_mg_per_kg),
            line["times"] == times_text(drug.times_a_day),
            line["maximum"] == str(drug.maximum_mg),
            line["contraindicated"] == drug.contraindicated,
        )
    )
