"""The one meaning of correct, against a table of what people and models write."""

import json
import subprocess
import sys

import pytest

from data_gen.answers import accuracy_interval, final_response, has_think_format, judge, normalise

DRUGS = {"A": "aspirin", "B": "ibuprofen", "C": "naproxen", "D": "celecoxib"}
DOSES = {"A": "80 mg", "B": "160 mg", "C": "do not give", "D": "80 mg per kg"}
NESTED = {"A": "gout", "B": "gouty arthritis", "C": "septic arthritis", "D": "A dose of iron"}

CASES = [
    # response, reference, options, outcome
    # numbers with units
    ("80 mg", "80 mg", None, "true"),
    ("80mg", "80 mg", None, "true"),
    ("80 mg per dose", "80 mg", None, "true"),
    ("80 mg each time.", "80 mg", None, "true"),
    ("80 milligrams", "80 mg", None, "true"),
    ("0.08 g", "80 mg", None, "true"),
    ("８０ｍｇ", "80 mg", None, "true"),
    ("**80 mg**", "80 mg", None, "true"),
    ("\\boxed{80 mg}", "80 mg", None, "true"),
    ("80", "80 mg", None, "true"),
    ("The answer is 80 mg.", "80 mg", None, "true"),
    ("Give 80 mg per dose.", "80 mg", None, "true"),
    ("A child of 23 kg needs 80 mg.", "80 mg", None, "true"),
    ("80 mg 2 times a day", "80 mg", None, "true"),
    ("161/2 = 80 mg", "80 mg", None, "true"),
    ("80 mg, because 23 kg x 7 mg per kg is 161 mg a day", "80 mg", None, "true"),
    ("Give 80 mg. The daily total of 161 mg is below 240 mg.", "80 mg", None, "true"),
    ("80 mg (half of 161 mg)", "80 mg", None, "true"),
    ("Not 160 mg but 80 mg", "80 mg", None, "true"),
    ("80 mg per kg", "80 mg", None, "false"),
    ("80 mg/kg", "80 mg", None, "false"),
    ("80 mg a day", "80 mg", None, "false"),
    ("80 ml", "80 mg", None, "false"),
    ("80 kg", "80 mg", None, "false"),
    ("80 g", "80 mg", None, "false"),
    ("-80 mg", "80 mg", None, "false"),
    ("180 mg", "80 mg", None, "false"),
    ("80.5 mg", "80 mg", None, "false"),
    ("81 mg", "80 mg", None, "false"),
    ("800 mg", "80 mg", None, "false"),
    ("not 80 mg", "80 mg", None, "false"),
    ("less than 80 mg", "80 mg", None, "false"),
    ("80 mg or 160 mg", "80 mg", None, "false"),
    ("80 or 160 mg", "80 mg", None, "false"),
    ("80-90 mg", "80 mg", None, "false"),
    ("80 to 90 mg", "80 mg", None, "false"),
    ("80 mg. 90 mg.", "80 mg", None, "false"),
    ("80 mg (or 90 mg)", "80 mg", None, "false"),
    ("80 mg. No, 160 mg.", "80 mg", None, "false"),
    ("160 mg. Then later 80 mg might do.", "80 mg", None, "false"),
    ("80 mg, do not give", "80 mg", None, "false"),
    ("80 %", "80 mg", None, "false"),
    ("1,000 mg", "1000 mg", None, "true"),
    ("1 000 mg", "1000 mg", None, "true"),
    ("2,5 mg", "2.5 mg", None, "true"),
    ("2.50 mg", "2.5 mg", None, "true"),
    ("0,125 mg", "0.125 mg", None, "true"),
    ("1.234,5 mg", "1234.5 mg", None, "true"),
    ("25 mg", "2.5 mg", None, "false"),
    ("7 mg/kg", "7 mg per kg", None, "true"),
    ("7 mg per kilogram", "7 mg per kg", None, "true"),
    ("7 mg", "7 mg per kg", None, "false"),
    ("7", "7 mg per kg", None, "true"),
    ("twice a day", "2 times", None, "true"),
    ("two times daily", "2 times", None, "true"),
    ("2", "2 times", None, "true"),
    ("once a day", "2 times", None, "false"),
    ("2 times a week", "2 times", None, "false"),
    ("1 time", "1 times", None, "true"),
    ("at most 240 mg", "240 mg", None, "true"),
    ("12%", "12", None, "false"),
    ("120/80", "120", None, "false"),
    # refusals
    ("do not give", "do not give", None, "true"),
    ("Do not give it.", "do not give", None, "true"),
    ("Don’t give Velotan.", "do not give", None, "true"),
    ("It must not be given.", "do not give", None, "true"),
    ("Velotan is contraindicated.", "do not give", None, "true"),
    ("It is not contraindicated.", "do not give", None, "false"),
    ("Do not give more than 80 mg.", "do not give", None, "false"),
    ("give", "do not give", None, "false"),
    ("80 mg", "do not give", None, "false"),
    ("Do not give. 80 mg.", "do not give", None, "false"),
    ("Do not give 80 mg, give 60 mg.", "do not give", None, "false"),
    # short texts
    ("Asthma", "asthma", None, "true"),
    ("the asthma.", "Asthma", None, "true"),
    ("It must not be given with asthma.", "asthma", None, "true"),
    ("Not with asthma.", "asthma", None, "true"),
    ("Asthma is not allowed.", "asthma", None, "true"),
    ("The most likely diagnosis is asthma. Gout is less likely.", "asthma", None, "true"),
    ("not gout but asthma", "asthma", None, "true"),
    ("asthma, not gout", "asthma", None, "true"),
    ("Asthma, because of the wheezing and the cough.", "asthma", None, "true"),
    ("Crohn's disease", "Crohn’s disease", None, "true"),
    ("beta blocker", "beta-blocker", None, "true"),
    ("not asthma", "asthma", None, "false"),
    ("It is not asthma.", "asthma", None, "false"),
    ("It isn't asthma.", "asthma", None, "false"),
    ("Asthma is unlikely.", "asthma", None, "false"),
    ("gout rather than asthma", "asthma", None, "false"),
    ("anything except asthma", "asthma", None, "false"),
    ("asthma or gout", "asthma", None, "false"),
    ("asthma, gout", "asthma", None, "false"),
    ("asthma and gout", "asthma", None, "false"),
    ("Asthma. Gout.", "asthma", None, "false"),
    ("asthma/gout", "asthma", None, "false"),
    ("diabetes insipidus", "diabetes", None, "false"),
    ("buttermilk", "milk", None, "false"),
    ("milk thistle", "milk", None, "false"),
    ("hypotension", "hypertension", None, "false"),
    ("diabetes", "type 2 diabetes", None, "false"),
    ("喘息", "喘息", None, "true"),
    ("答えは喘息です。", "喘息", None, "true"),
    ("喘息ではない", "喘息", None, "false"),
    ("不是哮喘", "哮喘", None, "false"),
    ("hepatitis", "hepatitis A", None, "false"),
    ("hepatitis A", "hepatitis", None, "false"),
    ("Hepatitis A", "hepatitis A", None, "true"),
    ("hepatitis B", "hepatitis A", None, "false"),
    ("↓ TSH", "↑ TSH", None, "false"),
    ("↑TSH", "↑ TSH", None, "true"),
    ("HLA-B27", "HLA B27", None, "true"),
    ("arcuate fasciculus + frontal gyrus of the left side", "arcuate fasciculus", None, "false"),
    ("↓ ↑ ↓", "↓ ↑ ↓", None, "true"),
    ("↓ ↑ ↑", "↓ ↑ ↓", None, "false"),
    ("The answer is cognitive therapy (CBT).", "cognitive therapy (CBT)", None, "true"),
    ("Answer: HIV, syphilis, and malaria", "HIV, syphilis, and malaria", None, "true"),
    # nothing to judge
    ("", "80 mg", None, "false"),
    ("   \n", "asthma", None, "false"),
    ("...", "asthma", None, "false"),
    ("80 mg", "", None, "unscored"),
    # think format
    ("## Thinking\n\n90 mg\n\n## Final Response\n\n80 mg", "80 mg", None, "true"),
    ("## Thinking\n\n80 mg\n\n## Final Response\n\n90 mg", "80 mg", None, "false"),
    ("## Thinking\n\n80 mg", "80 mg", None, "false"),
    ("## Thinking\n\n\n\n## Final Response\n\n", "80 mg", None, "false"),
    # option letters
    ("B", "B", DRUGS, "true"),
    ("b.", "B", DRUGS, "true"),
    ("(B)", "B", DRUGS, "true"),
    ("B.", "ibuprofen", DRUGS, "true"),
    ("B) ibuprofen", "B", DRUGS, "true"),
    ("B. ibuprofen", "B", DRUGS, "true"),
    ("B: ibuprofen, as it is short-acting", "B", DRUGS, "true"),
    ("The answer is B", "B", DRUGS, "true"),
    ("The answer is (B).", "B", DRUGS, "true"),
    ("The correct answer is **B**.", "B", DRUGS, "true"),
    ("Answer: B", "B", DRUGS, "true"),
    ("I choose option B.", "B", DRUGS, "true"),
    ("Option B is correct.", "B", DRUGS, "true"),
    ("ibuprofen", "B", DRUGS, "true"),
    ("Ibuprofen is the best choice.", "B", DRUGS, "true"),
    ("答案是B", "B", DRUGS, "true"),
    ("B is right. A is wrong since aspirin is worse.", "B", DRUGS, "true"),
    ("The answer is not A but B.", "B", DRUGS, "true"),
    ("The answer is B. ibuprofen", "B", DRUGS, "true"),
    ("B) naproxen", "B", DRUGS, "false"),
    ("A", "B", DRUGS, "false"),
    ("E", "B", DRUGS, "false"),
    ("The answer is A", "B", DRUGS, "false"),
    ("A or B", "B", DRUGS, "false"),
    ("The answer is A or B", "B", DRUGS, "false"),
    ("Both A and B", "B", DRUGS, "false"),
    ("The answer is not B.", "B", DRUGS, "false"),
    ("not ibuprofen", "B", DRUGS, "false"),
    ("ibuprofen or naproxen", "B", DRUGS, "false"),
    ("Because of the pain", "B", DRUGS, "false"),
    ("A patient needs ibuprofen.", "B", DRUGS, "true"),
    ("", "B", DRUGS, "false"),
    ("B", "paracetamol", DRUGS, "unscored"),
    ("80 mg", "A", DOSES, "true"),
    ("80 mg per kg", "A", DOSES, "false"),
    ("80 mg per kg", "D", DOSES, "true"),
    ("do not give", "C", DOSES, "true"),
    ("gouty arthritis", "B", NESTED, "true"),
    ("gouty arthritis", "A", NESTED, "false"),
    ("The answer is a dose of iron", "D", NESTED, "true"),
]  # fmt: skip


@pytest.mark.parametrize(("response", "reference", "options", "outcome"), CASES)
def test_a_response_is_judged_as_a_person_would(response, reference, options, outcome):
    verdict = judge(response, reference, options)
    assert verdict.outcome == outcome, verdict.reason


def test_every_option_of_real_questions_is_told_from_the_others(real_data):
    lines = (real_data / "medqa-usmle" / "phrases_no_exclude_test.jsonl").read_text()
    wrong = []
    for row in map(json.loads, lines.splitlines()):
        options, right = row["options"], row["answer_idx"]
        if len({normalise(text) for text in options.values()}) < len(options):
            continue  # two options with the same text
        for letter, text in options.items():
            for said in (
                text,
                letter,
                f"{letter}. {text}",
                f"The answer is {letter}.",
                f"Answer: {text}",
            ):
                verdict = judge(said, right, options)
                if verdict.outcome != ("true" if letter == right else "false"):
                    wrong.append((said, options, right, verdict.reason))
            if judge(text, row["answer"]).outcome != ("true" if letter == right else "false"):
                wrong.append((text, row["answer"]))
    assert len(wrong) <= 2, wrong[:5]  # of 20,000


def test_reasons_name_empty_and_double_answers():
    assert judge("", "80 mg").reason == "no answer"
    assert judge("80 mg or 90 mg", "80 mg").reason == "two different answers"


def test_every_bank_answer_agrees_with_itself_and_with_no_other():
    answers = [
        "80 mg",
        "8 mg",
        "80 mg per kg",
        "2 times",
        "4 times",
        "asthma",
        "do not give",
        "iron",
    ]
    for left in answers:
        for right in answers:
            assert judge(left, right).outcome == ("true" if left == right else "false")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("## Thinking\n\na\nb\n\n## Final Response\n\nc", ("a\nb", "c")),
        ("## Thinking\n\n\n\n## Final Response\n\nc", ("", "c")),
        ("## Final Response\n\nc\n\n## Thinking\n\na", None),
        ("## Thinking\n\na\n\n## Final Response\nc", None),
        ("## Thinking\n\na\n\n## Thinking\n\n## Final Response\n\nc", None),
        ("## Thinking\n\na\n\n## Final Response\n\nc\n\n## Final Response\n\nd", None),
        ("a\n\n## Final Response\n\nc", None),
        ("## Thinking\n\na", None),
        ("", None),
    ],
)
def test_the_think_format_has_each_heading_once_in_order(text, parts):
    assert final_response(text) == parts
    assert has_think_format(text) == (parts is not None)


def test_wilson_interval_agrees_with_published_values():
    low, high = accuracy_interval(8, 10)  # Newcombe 1998, method 3
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert accuracy_interval(0, 0) == (0.0, 1.0)
    assert accuracy_interval(0, 20)[0] == 0.0
    with pytest.raises(ValueError, match="successes=3 of n=2"):
        accuracy_interval(3, 2)


def test_answers_imports_the_standard_library_only():
    code = (
        "import sys; import data_gen.answers; "
        "print([m for m in sys.modules if m.split('.')[0] not in sys.stdlib_module_names "
        "and not m.startswith(('data_gen', '_', 'site'))])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = [m for m in eval(shown.stdout) if not m.startswith(("sitecustomize", "distutils"))]
    assert not {"pydantic", "openai", "httpx"} & set(loaded)
