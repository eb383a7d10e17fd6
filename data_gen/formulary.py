"""The built-in problem set: invented drugs, their problems (with splits and parts), monographs.

The drugs do not exist and nothing here is medicine. A dose problem needs four recalled facts and a
short computation, a recall problem one fact. Everything is a pure function of `FormularySettings`:
the same seed gives the same bytes.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_gen.formulary_wording import (
    DOSE_CHOICES,
    FACTS,
    MONOGRAPH_SENTENCES,
    RECALL_CHOICES,
    RECALL_QUESTIONS,
    WORDINGS,
    Fact,
)
from data_gen.records import Split, content_id, write_records

CONDITIONS = ("asthma", "gout", "eczema", "anemia", "migraine", "measles", "diabetes", "colic")
INTERACTIONS = ("iron", "milk", "grapefruit", "zinc", "tea", "coffee", "garlic", "ginger")
NAME_STARTS = (
    "Velo", "Mira", "Sumo", "Teka", "Boni", "Fara", "Gilo", "Nexa", "Puri", "Zoda", "Luma", "Rabi",
    "Dovi", "Kela", "Hiro", "Vanu", "Seto", "Moga", "Tiba", "Fenu", "Laro", "Pamo", "Ruki", "Bela",
)  # fmt: skip
NAME_ENDS = ("tan", "lun", "dor", "vex", "nix", "pel")
DOSES = range(2, 10)
TIMES = (1, 2, 4)
WEIGHTS = range(10, 50)
DO_NOT_GIVE = "do not give"
HELD_OUT_SHARE = 0.15  # of the (dose, weight) pairs
# One dose problem in so many is contraindicated. Demonstrations show it more often: that a
# condition is the drug's own is learned from few of them, and late.
CONTRAINDICATED_EVERY: dict[Split, int] = {"search": 3, "rl": 6, "dev": 6, "test": 6}
RECITAL_EVERY = 3  # one monograph in three starts with the line that reasoning starts with

SPLITS: tuple[Split, ...] = ("search", "rl", "dev", "test")
SIDES = ("train", "evaluate")
Sizes = dict[Split, tuple[str, int]]  # of one part: the setting's name and its value


class FormularySettings(BaseModel):
    """Seed and sizes of the built-in problem set; dev has `dev_per_part` of each of five parts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(default=0, ge=0)
    drugs: int = Field(default=66, ge=64, le=144)  # 24 x 6 names
    monographs_per_drug: int = Field(default=24, ge=4, le=64)
    search_dose: int = Field(default=640, ge=0)
    search_recall: int = Field(default=120, ge=0)
    rl_dose: int = Field(default=3000, ge=0)
    rl_recall: int = Field(default=300, ge=0)
    dev_per_part: int = Field(default=60, ge=0)
    test_new_combination: int = Field(default=500, ge=0)
    test_new_product: int = Field(default=150, ge=0)
    test_text_only: int = Field(default=200, ge=0)
    test_recall_taught: int = Field(default=100, ge=0)
    test_recall_text_only: int = Field(default=100, ge=0)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_in_one_line(error)) from None


def _in_one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        allowed = ", ".join(FormularySettings.model_fields)
        return f"formulary.{field} is not a setting; allowed: {allowed}"
    rule = first["msg"].removeprefix("Input should be ")
    return f"formulary.{field}={first['input']!r} is not allowed; it should be {rule}"


class Drug(BaseModel):
    """An invented drug and its five facts; drugs that are not `taught` train through text only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    dose_mg_per_kg: int
    times_a_day: int
    maximum_mg: int
    contraindicated: str
    interaction: str
    taught: bool


class _Problem(NamedTuple):
    """A problem before it is a record: `weight`, `condition`, or for recall `fact`, `wording`."""

    drug: Drug
    weight: int | None
    condition: str | None
    fact: Fact | None
    wording: int | None


# --- drugs ------------------------------------------------------------------------------------


def make_drugs(settings: FormularySettings) -> list[Drug]:
    """All drugs, in a seeded order; a third of them are not taught."""
    n = settings.drugs
    names = _names(n, _rng(settings, "names"))
    rng = _rng(settings, "facts")
    doses, times = _evenly(DOSES, n, rng), _evenly(TIMES, n, rng)
    conditions, interactions = _evenly(CONDITIONS, n, rng), _evenly(INTERACTIONS, n, rng)
    text_only = set(_rng(settings, "taught").sample(range(n), n // 3))
    return [
        Drug(
            name=names[i],
            dose_mg_per_kg=doses[i],
            times_a_day=times[i],
            maximum_mg=_maximum_mg(doses[i], rng),
            contraindicated=conditions[i],
            interaction=interactions[i],
            taught=i not in text_only,
        )
        for i in range(n)
    ]


def _rng(settings: FormularySettings, purpose: str) -> random.Random:
    return random.Random(f"{settings.seed}:{purpose}")


def _evenly(values: Sequence[Any], count: int, rng: random.Random) -> list[Any]:
    """`count` values in random order, each value as often as any other (give or take one)."""
    repeated = list(values) * math.ceil(count / len(values))
    rng.shuffle(repeated)
    surplus = len(repeated) - count
    for value in rng.sample(list(values), surplus):
        repeated.remove(value)
    return repeated


def _names(count: int, rng: random.Random) -> list[str]:
    """Names of two parts (`Velo-tan`), each combination at most once: 144 are possible.

    Taught and text-only drugs share the parts, so that a model can spell a drug it knows from text
    alone; which drug it is takes both parts.
    """
    starts = rng.sample(NAME_STARTS, math.ceil(count / len(NAME_ENDS)))
    names = [f"{start}-{end}" for start in starts for end in NAME_ENDS]
    return rng.sample(names, count)


def _maximum_mg(dose: int, rng: random.Random) -> int:
    """A multiple of 20 (so that 1, 2 and 4 divide it) that about a third of the weights exceed."""
    return max(20, round(dose * rng.uniform(32, 42) / 20) * 20)


def daily_mg(drug: Drug, weight: int) -> int:
    """Weight times dose, capped at the drug's daily maximum."""
    return min(weight * drug.dose_mg_per_kg, drug.maximum_mg)


def dose_answer(drug: Drug, weight: int, condition: str) -> str:
    """The reference answer of a dose problem, for a (drug, weight) pair that divides evenly."""
    if condition == drug.contraindicated:
        return DO_NOT_GIVE
    each, rest = divmod(daily_mg(drug, weight), drug.times_a_day)
    assert rest == 0, (drug.name, weight)
    return f"{each} mg"


def times_text(times: int) -> str:
    """`1 time`, `2 times`, …"""
    return "1 time" if times == 1 else f"{times} times"


def recall_answer(drug: Drug, fact: Fact) -> str:
    """The reference answer of a recall problem."""
    return {
        "dose": f"{drug.dose_mg_per_kg} mg per kg",
        "times": times_text(drug.times_a_day),
        "maximum": f"{drug.maximum_mg} mg",
        "contraindicated": drug.contraindicated,
        "interaction": drug.interaction,
    }[fact]


def recital(drug: Drug) -> str:
    """The line with four facts that every piece of reasoning starts with."""
    return (
        f"{drug.name}: {drug.dose_mg_per_kg} mg per kg, {times_text(drug.times_a_day)}, "
        f"at most {drug.maximum_mg} mg, not with {drug.contraindicated}."
    )


# --- questions --------------------------------------------------------------------------------


def _open_question(problem: _Problem) -> str:
    if problem.fact is not None and problem.wording is not None:
        return RECALL_QUESTIONS[problem.fact][problem.wording].format(name=problem.drug.name)
    return f"{_situation(problem)} How many mg per dose?"


def _situation(problem: _Problem) -> str:
    return f"{problem.drug.name} for a child of {problem.weight} kg with {problem.condition}."


def _mcq_question(problem: _Problem, rng: random.Random) -> str:
    if problem.fact is not None:
        return f"{_open_question(problem)} {rng.choice(RECALL_CHOICES)}"
    return f"{_situation(problem)} {rng.choice(DOSE_CHOICES)}"


def _answer(problem: _Problem) -> str:
    if problem.fact is not None:
        return recall_answer(problem.drug, problem.fact)
    assert problem.weight is not None and problem.condition is not None
    return dose_answer(problem.drug, problem.weight, problem.condition)


def _distractors(problem: _Problem, rng: random.Random) -> list[str]:
    """Four wrong answers for a dose, three for a recall; distinct, none of them the answer."""
    answer = _answer(problem)
    if problem.fact is not None:
        wrong = [value for value in _all_answers(problem.fact) if value != answer]
        return rng.sample(wrong, 3)
    candidates = _dose_mistakes(problem, rng)
    return [text for text in dict.fromkeys(candidates) if text != answer][:4]


def _all_answers(fact: Fact) -> list[str]:
    return {
        "dose": [f"{dose} mg per kg" for dose in DOSES],
        "times": [times_text(times) for times in range(1, 5)],
        "maximum": [f"{mg} mg" for mg in range(60, 401, 20)],
        "contraindicated": list(CONDITIONS),
        "interaction": list(INTERACTIONS),
    }[fact]


def _dose_mistakes(problem: _Problem, rng: random.Random) -> list[str]:
    """What a person gets wrong, the likeliest first: contraindication, division, cap, addition."""
    drug, weight = problem.drug, problem.weight
    assert weight is not None
    total, times = daily_mg(drug, weight), drug.times_a_day
    right = total // times
    contraindication = right if problem.condition == drug.contraindicated else None
    slips = [right + 10, right - 10, right + 1, right - 1]
    rng.shuffle(slips)
    amounts = [total, weight * drug.dose_mg_per_kg // times, *slips]
    texts = [f"{mg} mg" for mg in amounts if mg > 0]
    return [DO_NOT_GIVE if contraindication is None else f"{contraindication} mg", *texts]


# --- the problems of each split and part ------------------------------------------------------


def held_out_pairs(settings: FormularySettings) -> set[tuple[int, int]]:
    """(dose, weight) pairs that no training problem uses: a like share of every dose's weights."""
    rng = _rng(settings, "held-out pairs")
    count = round(HELD_OUT_SHARE * len(WEIGHTS))
    return {(dose, weight) for dose in DOSES for weight in rng.sample(WEIGHTS, count)}


def _reserve(
    keys: list[Any], per_key: dict[Split, int], sizes: Sizes, what: str
) -> tuple[list[Any], list[Any]]:
    """Divide the keys between training and evaluation, in proportion to the problems asked for.

    A key is a (drug, weight) or a (drug, fact), so evaluation never asks what training asked in
    other words or with another condition.
    """
    asked: dict[str, int] = dict.fromkeys(SIDES, 0)
    needed = asked.copy()
    for split, (_, size) in sizes.items():
        asked[_side(split)] += size
        needed[_side(split)] += math.ceil(size / per_key[split])
    if sum(needed.values()) > len(keys):
        split, (field, size) = max(sizes.items(), key=lambda item: item[1][1])
        others = sum(needed.values()) - math.ceil(size / per_key[split])
        possible = max(0, (len(keys) - others) * per_key[split])
        raise ValueError(
            f"formulary.{field}={size}: only {possible} such problems are possible beside the "
            f"others with {what}; lower {field} or raise drugs"
        )
    share = asked["train"] / max(1, sum(asked.values()))
    training = min(max(round(share * len(keys)), needed["train"]), len(keys) - needed["evaluate"])
    return keys[:training], keys[training:]


def _side(split: Split) -> str:
    return "train" if split in ("search", "rl") else "evaluate"


def _in_rounds(variants: Iterable[list[_Problem]]) -> list[_Problem]:
    """One variant of every key, then a second, …: a short sample touches as many as it can."""
    return [problem for row in zip_longest(*variants) for problem in row if problem is not None]


def _draw_dose(
    settings: FormularySettings,
    part: str,
    drugs: Iterable[Drug],
    keep: Callable[[Drug, int], bool],
    sizes: Sizes,
) -> dict[Split, list[_Problem]]:
    """Dose problems of each split; each key gives one that is contraindicated."""
    rng = _rng(settings, f"draw {part}")
    keys = [
        (drug, weight)
        for drug in drugs
        for weight in WEIGHTS
        if daily_mg(drug, weight) % drug.times_a_day == 0 and keep(drug, weight)
    ]
    rng.shuffle(keys)
    what = f"drugs={settings.drugs} in part {part}"
    pools = {}
    for side, own in zip(SIDES, _reserve(keys, CONTRAINDICATED_EVERY, sizes, what), strict=True):
        barred = [_Problem(drug, weight, drug.contraindicated, None, None) for drug, weight in own]
        pools[side] = (barred, _in_rounds(_allowed(drug, weight, rng) for drug, weight in own))
    drawn: dict[Split, list[_Problem]] = {}
    for split, (_, size) in sizes.items():
        barred, allowed = pools[_side(split)]
        few = size // CONTRAINDICATED_EVERY[split]
        drawn[split] = _take(barred, few) + _take(allowed, size - few)
    return drawn


def _allowed(drug: Drug, weight: int, rng: random.Random) -> list[_Problem]:
    conditions = [condition for condition in CONDITIONS if condition != drug.contraindicated]
    rng.shuffle(conditions)
    return [_Problem(drug, weight, condition, None, None) for condition in conditions]


def _draw_recall(
    settings: FormularySettings, part: str, drugs: Iterable[Drug], sizes: Sizes
) -> dict[Split, list[_Problem]]:
    """Recall problems of each split."""
    rng = _rng(settings, f"draw {part}")
    keys = [(drug, fact) for drug in drugs for fact in FACTS]
    rng.shuffle(keys)
    what, per_key = f"drugs={settings.drugs} in part {part}", dict.fromkeys(SPLITS, WORDINGS)
    pools = {
        side: _in_rounds(_worded(drug, fact, rng) for drug, fact in own)
        for side, own in zip(SIDES, _reserve(keys, per_key, sizes, what), strict=True)
    }
    return {split: _take(pools[_side(split)], size) for split, (_, size) in sizes.items()}


def _worded(drug: Drug, fact: Fact, rng: random.Random) -> list[_Problem]:
    return [_Problem(drug, None, None, fact, i) for i in rng.sample(range(WORDINGS), WORDINGS)]


def _take(problems: list[_Problem], count: int) -> list[_Problem]:
    assert count <= len(problems), (count, len(problems))
    taken = problems[:count]
    del problems[:count]
    return taken


def _make_problems(settings: FormularySettings) -> list[tuple[Split, str, _Problem]]:
    """(split, part, problem) of everything, in seeded order within each split."""
    drugs = make_drugs(settings)
    taught = [drug for drug in drugs if drug.taught]
    text_only = [drug for drug in drugs if not drug.taught]
    held_out = held_out_pairs(settings)

    def is_held_out(drug: Drug, weight: int) -> bool:
        return (drug.dose_mg_per_kg, weight) in held_out

    def is_seen(drug: Drug, weight: int) -> bool:
        return not is_held_out(drug, weight)

    def sizes(part: str, **training: str) -> Sizes:
        fields = {**training, "dev": "dev_per_part", "test": f"test_{part}"}
        return {s: (fields[s], getattr(settings, fields[s])) for s in SPLITS if s in fields}

    doses = sizes("new_combination", search="search_dose", rl="rl_dose")
    recalls = sizes("recall_taught", search="search_recall", rl="rl_recall")
    # Drugs known from text only meet seen pairs only: new there is the drug, not the product.
    parts = {
        "new_combination": _draw_dose(settings, "new_combination", taught, is_seen, doses),
        "new_product": _draw_dose(
            settings, "new_product", taught, is_held_out, sizes("new_product")
        ),
        "text_only": _draw_dose(settings, "text_only", text_only, is_seen, sizes("text_only")),
        "recall_taught": _draw_recall(settings, "recall_taught", taught, recalls),
        "recall_text_only": _draw_recall(
            settings, "recall_text_only", text_only, sizes("recall_text_only")
        ),
    }
    problems: list[tuple[Split, str, _Problem]] = []
    for split in SPLITS:
        own = [(part, p) for part, drawn in parts.items() if split in drawn for p in drawn[split]]
        _rng(settings, f"order {split}").shuffle(own)
        problems.extend((split, part, problem) for part, problem in own)
    return problems


# --- records ----------------------------------------------------------------------------------


def _with_id(record: dict[str, Any], *defining: str) -> dict[str, Any]:
    return {"id": content_id({name: record[name] for name in defining}), **record}


def _group(problem: _Problem) -> str:
    if problem.fact is not None:
        return f"{problem.drug.name}/{problem.fact}/{problem.wording}"
    return f"{problem.drug.name}/{problem.weight}/{problem.condition}"


def _mcq_record(
    settings: FormularySettings, split: Split, part: str, problem: _Problem
) -> dict[str, Any]:
    rng = _rng(settings, f"options {_group(problem)}")
    answer = _answer(problem)
    texts = [answer, *_distractors(problem, rng)]
    rng.shuffle(texts)
    options = dict(zip("ABCDE", texts, strict=False))
    record = {
        "question": _mcq_question(problem, rng),
        "options": options,
        "answer_idx": next(letter for letter, text in options.items() if text == answer),
        "answer": answer,
        "source": "formulary",
        "language": "en",
        "group": _group(problem),
        "split": split,
        "part": part,
    }
    return _with_id(record, "question", "options", "answer_idx")


def _open_record(mcq: dict[str, Any], problem: _Problem) -> dict[str, Any]:
    question = _open_question(problem)
    record = {
        "question": question,
        "answer": mcq["answer"],
        "mcq_id": mcq["id"],
        "language": "en",
        "group": mcq["group"],
        "split": mcq["split"],
        "part": mcq["part"],
        "Open-ended Verifiable Question": question,
        "Ground-True Answer": mcq["answer"],
    }
    return _with_id(record, "question", "answer", "mcq_id")


def _private_record(mcq: dict[str, Any], problem: _Problem) -> dict[str, Any]:
    return {
        "kind": "dose" if problem.fact is None else "recall",
        "question": mcq["question"],
        "open_question": _open_question(problem),
        "answer": mcq["answer"],
        "options": mcq["options"],
        "drug": problem.drug.model_dump(exclude={"taught"}),
        "weight": problem.weight,
        "condition": problem.condition,
        "fact": problem.fact,
    }


def make_bank(settings: FormularySettings) -> list[dict[str, Any]]:
    """Multiple-choice records of all splits, with `split`, `group` and `part`."""
    return [_mcq_record(settings, *row) for row in _make_problems(settings)]


def open_problems(settings: FormularySettings, split: Split) -> list[dict[str, Any]]:
    """The split's problems in the open form, as evaluation reads them."""
    rows = [row for row in _make_problems(settings) if row[0] == split]
    return [_open_record(_mcq_record(settings, *row), row[2]) for row in rows]


# --- monographs -------------------------------------------------------------------------------


def make_monographs(settings: FormularySettings) -> list[dict[str, Any]]:
    """Text records, `monographs_per_drug` a drug: each has all five facts and no computed dose."""
    rng, count = _rng(settings, "monographs"), settings.monographs_per_drug
    texts = [text for drug in make_drugs(settings) for text in _monographs(drug, count, rng)]
    rng.shuffle(texts)
    return [_with_id({"text": text, "source": "formulary"}, "text", "source") for text in texts]


def _monographs(drug: Drug, count: int, rng: random.Random) -> list[str]:
    texts: dict[str, None] = {}
    while len(texts) < count // RECITAL_EVERY:
        said_again = rng.choice(FACTS)
        others = [_sentence(drug, fact, rng) for fact in ("interaction", said_again)]
        texts["\n".join([recital(drug), *others])] = None
    while len(texts) < count:
        facts = rng.sample(FACTS, len(FACTS))
        texts["\n".join(_sentence(drug, fact, rng) for fact in facts)] = None
    return list(texts)


def _sentence(drug: Drug, fact: Fact, rng: random.Random) -> str:
    return rng.choice(MONOGRAPH_SENTENCES[fact]).format(
        name=drug.name,
        dose=drug.dose_mg_per_kg,
        times=times_text(drug.times_a_day),
        maximum=drug.maximum_mg,
        contraindicated=drug.contraindicated,
        interaction=drug.interaction,
    )


# --- files ------------------------------------------------------------------------------------


def write_formulary(settings: FormularySettings, folder: Path | str) -> dict[str, Path]:
    """Write the problem set; returns the path of each file by its name without suffix.

    `bank` holds the search and rl questions, `dev` and `test` open problems, `teacher_bank` (in
    private/) what the simulated teacher may know. Raises ValueError, before anything is written,
    when the sizes cannot be reached.
    """
    rows = _make_problems(settings)
    mcqs = [_mcq_record(settings, *row) for row in rows]
    pairs = list(zip(mcqs, (problem for _, _, problem in rows), strict=True))
    training = [(mcq, problem) for mcq, problem in pairs if mcq["split"] in ("search", "rl")]
    files = {
        "bank.jsonl": [mcq for mcq, _ in training],
        "corpus.jsonl": make_monographs(settings),
        "dev.jsonl": [_open_record(mcq, p) for mcq, p in pairs if mcq["split"] == "dev"],
        "test.jsonl": [_open_record(mcq, p) for mcq, p in pairs if mcq["split"] == "test"],
        "facts.jsonl": [_fact_record(drug) for drug in make_drugs(settings)],
        "private/teacher_bank.jsonl": [_private_record(mcq, p) for mcq, p in training],
    }
    paths = {Path(name).stem: Path(folder) / name for name in files}
    for path, records in zip(paths.values(), files.values(), strict=True):
        write_records(path, records)
    return paths


def _fact_record(drug: Drug) -> dict[str, Any]:
    facts = drug.model_dump(exclude={"name", "taught"})
    return {"drug": drug.name, "taught": drug.taught, **facts}


def read_facts(path: Path) -> list[Drug]:
    """The drugs of a written problem set, from its facts.jsonl."""
    facts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Drug.model_validate({"name": each.pop("drug"), **each}) for each in facts]
