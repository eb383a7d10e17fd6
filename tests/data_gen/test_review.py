"""The blinded sample of verdicts that people judge, and what a filled one says."""

import csv
import json
import re
from pathlib import Path

import pytest

from data_gen.cli import main
from data_gen.records import Problem, Rejected, Step, Trace, read_records, write_records
from data_gen.review import COLUMNS, Key, agree, draw, escape, judged_conclusions

HOSTILE = "=HYPERLINK(1) <script>alert(1)</script>"


def steps(conclusion: str) -> list[Step]:
    return [
        Step(action="Inner Thinking", title="Dose", content=f"thinking of {conclusion}"),
        Step(action="Final Conclusion", content=conclusion),
        Step(action="Verification", content="it is so"),
    ]


def make_run(folder: Path, problems: int = 40) -> Path:
    """Every problem is solved at attempt 1, 2 or 3, each tenth never; `right` ends in "!"."""
    made, traces, rejected = [], [], []
    for i in range(problems):
        problem = Problem.model_validate(
            {"question": f"Question {i}? {HOSTILE}", "answer": f"a{i}"}
        )
        made.append(problem)
        failed = [steps(f"{HOSTILE} wrong {i}.{k}") for k in range(i % 3)]
        if i % 10 == 9:
            record = {"stage": "search", "reason": "not verified", "problem_id": problem.id}
            plain = [[step.model_dump() for step in path] for path in failed]
            rejected.append(Rejected.model_validate({**record, "failed": plain}))
            continue
        fields = {"problem_id": problem.id, "steps": steps(f"right {i}"), "failed": failed}
        fields |= {"verdicts": ["false"] * len(failed) + ["true"], "strategies": []}
        traces.append(Trace.model_validate({**fields, "attempts": len(failed) + 1}))
    write_records(folder / "problems.jsonl", made)
    write_records(folder / "traces.jsonl", traces)
    write_records(folder / "rejected.jsonl", rejected)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def fill(folder: Path, path: Path, answer, separator: str = ",") -> Path:
    """A filled file: `answer(key)` for every item."""
    keys = {key.item: key for key in read_records(folder / "review/key.jsonl", Key)}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS), delimiter=separator)
        writer.writeheader()
        for row in rows_of(folder / "review/sample.csv"):
            writer.writerow({**row, "right": answer(keys[row["item"]])})
    return path


def test_every_judged_conclusion_is_drawn_from_once(tmp_path: Path):
    judged = list(judged_conclusions(make_run(tmp_path)))
    assert sum(j.verdict == "true" for j in judged) == 36
    assert sum(j.verdict == "false" for j in judged) == sum(i % 3 for i in range(40))
    assert len({j.id for j in judged}) == len(judged)


def test_half_of_a_sample_is_of_each_verdict_and_attempts_keep_their_shares(tmp_path: Path):
    judged = list(judged_conclusions(make_run(tmp_path, 300)))
    sample = draw(judged, 100, seed=0)
    assert len({j.id for j in sample}) == 100
    accepted = [j for j in sample if j.verdict == "true"]
    assert len(accepted) == 50
    by_attempt = [sum(j.attempt == attempt for j in accepted) for attempt in (1, 2, 3)]
    assert sum(by_attempt) == 50 and max(by_attempt) - min(by_attempt) <= 1  # a third of each
    assert [j.id for j in draw(judged[::-1], 100, seed=0)] == [j.id for j in sample]
    assert {j.id for j in draw(judged, 100, seed=1)} != {j.id for j in sample}
    order = [j.verdict for j in sample]
    assert order != sorted(order) and order != sorted(order, reverse=True)


def test_what_one_verdict_lacks_is_drawn_from_the_other(tmp_path: Path):
    judged = list(judged_conclusions(make_run(tmp_path)))
    sample = draw(judged, 1000, seed=0)
    assert {j.id for j in sample} == {j.id for j in judged}


def test_the_sample_does_not_show_the_verdicts_and_no_cell_is_a_formula(tmp_path: Path, capsys):
    run = make_run(tmp_path)
    assert main(["review", str(run), "--n", "30"]) == 0
    assert json.loads(capsys.readouterr().out)["drawn"] == {"true": 15, "false": 15}
    rows = rows_of(run / "review/sample.csv")
    assert len(rows) == 30 and list(rows[0]) == list(COLUMNS)
    for row in rows:
        assert row["right"] == "" and "verdict" not in row
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in row.values())
    assert any(row["conclusion"].startswith("'=HYPERLINK") for row in rows)
    page = (run / "review/sample.html").read_text()
    assert "<script>alert" not in page and page.count("<article") == 30
    assert not re.search(r"""(?:src|href)=["']""", page)  # nothing is loaded
    assert (run / "review/key.jsonl").stat().st_mode & 0o077 == 0


def test_a_second_sample_does_not_replace_the_first(tmp_path: Path, capsys):
    run = make_run(tmp_path)
    assert main(["review", str(run), "--n", "30"]) == 0
    before = (run / "review/sample.csv").read_bytes()
    assert main(["review", str(run), "--n", "30", "--seed", "1"]) == 2
    assert "holds a sample already" in capsys.readouterr().err
    assert (run / "review/sample.csv").read_bytes() == before


@pytest.mark.parametrize("separator", [",", ";"])
def test_a_reader_who_always_agrees(tmp_path: Path, capsys, separator: str):
    run = make_run(tmp_path)
    main(["review", str(run), "--n", "60"])
    capsys.readouterr()
    said = {"true": "yes", "false": "NO"}
    filled = fill(run, tmp_path / "f.csv", lambda key: said[key.verdict], separator)
    assert main(["review", str(run), "--filled", str(filled)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((run / "review/result.json").read_text())
    assert result["agreement_rate"] == result["kappa"] == 1.0
    assert 0.8 < result["agreement_interval95"][0] < 1.0 == result["agreement_interval95"][1]
    assert result["false_true"]["rate"] == result["false_false"]["rate"] == 0.0
    assert result["false_true"]["interval95"][1] > 0.05


def plain_kappa(pairs: list[tuple[bool, bool]]) -> float:
    """Cohen's, counted one pair at a time."""
    n = len(pairs)
    observed = sum(a == b for a, b in pairs) / n
    first, second = (sum(pair[i] for pair in pairs) / n for i in (0, 1))
    chance = first * second + (1 - first) * (1 - second)
    return (observed - chance) / (1 - chance)


def test_shares_and_kappa_of_a_whole_population_are_those_of_a_count(tmp_path: Path, capsys):
    run = make_run(tmp_path, 60)
    main(["review", str(run), "--n", "1000"])
    capsys.readouterr()
    pairs: list[tuple[bool, bool]] = []

    def answer(key: Key) -> str:
        right = (key.verdict == "true") != (int(key.item[:4], 16) % 4 == 0)
        pairs.append((key.verdict == "true", right))
        return "yes" if right else "no"

    filled = fill(run, tmp_path / "f.csv", answer)
    assert main(["review", str(run), "--filled", str(filled)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kappa"] == pytest.approx(plain_kappa(pairs))
    assert result["agreement_rate"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    accepted = [right for verdict, right in pairs if verdict]
    assert result["false_true"]["wrong"] == accepted.count(False)
    low, high = result["kappa_interval95"]
    assert low < result["kappa"] < high


def test_a_sample_of_halves_is_weighted_back_to_the_verdicts_of_the_run():
    # 90 % of the verdicts are true; of those 95 % are right, of the false ones 40 %
    agreement, kappa = agree(0.9, 0.95, 0.4)
    assert agreement == pytest.approx(0.9 * 0.95 + 0.1 * 0.6)
    population = [(True, True)] * 855 + [(True, False)] * 45
    population += [(False, True)] * 40 + [(False, False)] * 60
    assert kappa == pytest.approx(plain_kappa(population))
    assert agree(1.0, 1.0, 0.0)[1] is None  # chance alone would always agree


def test_what_is_not_filled_counts_for_nothing_and_is_told(tmp_path: Path, capsys):
    run = make_run(tmp_path)
    main(["review", str(run), "--n", "40"])
    first = {"true": True, "false": True}

    def answer(key: Key) -> str:
        if first[key.verdict]:
            first[key.verdict] = False
            return "yes"
        return ("", "unsure")[key.verdict == "true"]

    capsys.readouterr()
    assert main(["review", str(run), "--filled", str(fill(run, tmp_path / "f.csv", answer))]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["reviewed"] == {"accepted": 1, "refused": 1}
    assert result["not_sure_or_empty"] == 38 and result["false_false"]["rate"] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[0].update(right="maybe"), r"line 2: right='maybe'; allowed: yes, no"),
        (lambda rows: rows[1].update(item="0123"), r"line 3: item '0123' is not of this sample"),
        (lambda rows: rows.append(rows[0]), r"is there twice"),
        (lambda rows: None, r"0 accepted and 0 refused conclusions are filled in"),
    ],
)
def test_a_file_that_cannot_be_compared_is_exit_code_2(tmp_path, capsys, change, message):
    run = make_run(tmp_path)
    main(["review", str(run), "--n", "10"])
    rows = [{"item": row["item"], "right": ""} for row in rows_of(run / "review/sample.csv")]
    change(rows)
    path = tmp_path / "f.csv"
    path.write_text("item,right\n" + "".join(f"{r['item']},{r['right']}\n" for r in rows))
    capsys.readouterr()
    assert main(["review", str(run), "--filled", str(path)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (run / "review/result.json").exists()


def test_an_escaped_cell_is_text():
    for text in ("=1+1", "+1", "-5 mmHg", "@x", "\tx"):
        assert escape(text) == "'" + text
    assert escape("5 - 3") == "5 - 3"
