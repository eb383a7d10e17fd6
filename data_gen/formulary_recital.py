"""How many of a drug's facts a piece of reasoning recites right, in the line it starts with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_gen.formulary import Drug, read_facts, times_text

LINE = re.compile(
    r"(?P<name>[A-Z][a-z]+-[a-z]+): (?P<dose>\d+) mg per kg, (?P<times>\d+ times?), "
    r"at most (?P<maximum>\d+) mg, not with (?P<contraindicated>\w+)\."
)
FACTS_OF_LINE = 4
NAME = re.compile(r"[A-Z][a-z]+-[a-z]+")


def recited_by_part(facts: Path, predictions: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The share of the four facts that explained answers to dose problems recite right, by part.

    `facts` is a problem set's facts.jsonl; of the predictions those of form `explain` count.
    """
    drugs = {drug.name: drug for drug in read_facts(facts)}
    shares: dict[str, list[float]] = {}
    for p in predictions:
        name = NAME.match(p["question"])
        if p["form"] == "explain" and not p["part"].startswith("recall") and name is not None:
            recited = facts_recited(drugs[name.group()], p["text"]) / FACTS_OF_LINE
            shares.setdefault(p["part"], []).append(recited)
    return {part: round(sum(own) / len(own), 4) for part, own in sorted(shares.items())}


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
