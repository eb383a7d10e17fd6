"""The report and the terminal's table, from a made-up run."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from medreason_jax.report import write_report
from medreason_jax.report.acceptance import tabulate_counts
from medreason_jax.report.figures import PANELS, matching_columns, read_panel, thin_out
from medreason_jax.report.jsonl import read_rows
from medreason_jax.report.summary import format_seconds
from medreason_jax.report.table import stage_table

HOSTILE = "<script>alert('x')</script> & {{ 7 * 7 }}"
VOID = {"meta", "br", "hr", "img", "input", "link"}

SUMMARY = {
    "name": "formulary",
    "not_for_reporting": True,
    "seed": 7,
    "split": "test",
    "part": "dosing",
    "export": "export/final",
    "report": None,
    "stages": [
        {"name": "data", "seconds": 3.21, "accuracy": None, "accuracy_explain": None, "n": 0},
        {
            "name": "sft",
            "seconds": 200.0,
            "accuracy": 0.415,
            "accuracy_explain": 0.6,
            "n": 200,
            "ci95": [0.35, 0.48],
            "ci95_explain": [0.53, 0.67],
            "parts": {"dosing": {"n": 80, "accuracy": 0.25, "ci95": [0.17, 0.35]}},
        },
        {"name": "ppo", "seconds": 4000, "accuracy": 0.5, "accuracy_explain": 0.0, "n": 200},
    ],
    "facts_recited": {"sft": {"dosing": 0.75, "text_only": 0.5}, "ppo": {"dosing": 0.875}},
    "gaps": [
        {"stage": "sft", "n": 80, "difference": 0.125, "ci95": [0.02, 0.23], "change": None},
        {
            "stage": "ppo",
            "n": 80,
            "difference": -0.025,
            "ci95": [-0.1, 0.05],
            "change": {"n": 80, "difference": -0.15, "ci95": [-0.25, -0.05]},
        },
    ],
    "comparisons": [
        {
            "stage": "ppo",
            "against": against,
            "part": "dosing",
            "form": form,
            "n": 80,
            "difference": 0.05,
            "ci95": interval,
        }
        for against, interval in (("sft", [0.01, 0.09]), ("longer", [-0.01, 0.11]))
        for form in ("answer_only", "explain")
    ],
}
COUNTS = {
    "problems": {"in": 1000, "accepted": 900, "rejected": {"filter: Too Simple": 60, HOSTILE: 40}},
    "splits": {"rl": 433, "search": 467},
    "search": {
        "in": 467,
        "accepted": 411,
        "rejected": {"attempts used up": 56},
        "by_strategy": {
            "backtrack": {"tried": 48, "accepted": 12},
            "verify": {"tried": 200, "accepted": 81},
        },
        "by_attempt": {"1": {"tried": 71, "accepted": 71}},
    },
    "wrong_accepted_share": 0.0,
    "wrong_accepted": {"wrong": 0, "of": 431, "interval95": [0.0, 0.0088]},
    "verifier_accepted_wrong": {"wrong": 5, "of": 407, "interval95": [0.004, 0.028]},
}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(run_dir: Path) -> Path:
    (run_dir / "data").mkdir(parents=True)
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY))
    (run_dir / "data" / "report.json").write_text(json.dumps(COUNTS))
    (run_dir / "recipe.resolved.yaml").write_text(f"name: formulary  # {HOSTILE}\n")
    for stage in ("sft", "ppo"):
        rows = [
            {"step": i, "loss": 2.0 / (i + 1), "reward": i / 900, "kl": 0.1, "kl_coef": 3.0}
            for i in range(900)
        ]
        write_lines(run_dir / stage / "metrics.jsonl", rows)
        predictions = [
            {
                "id": f"{part}{i:02d}",
                "part": part,
                "form": form,
                "question": f"Question {part} {i} {HOSTILE}",
                "text": f"{stage} says {HOSTILE}",
                "answer": "forty milligrams",
                "outcome": ("true", "false", "unscored")[i % 3],
                "reason": "no answer found",
            }
            for form in ("answer_only", "explain")
            for part in ("dosing", "interactions")
            for i in range(8)
        ]
        write_lines(run_dir / stage / "eval-test" / "predictions.jsonl", predictions)
    return run_dir


class Reader(HTMLParser):
    """Collects text and attributes and insists on balanced tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.bold: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "b":
            self.bold.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return read(write_report(make_run(tmp_path_factory.mktemp("run"))))


def test_the_report_shows_each_stage_with_its_interval_and_time(report: Reader):
    text = " ".join(" ".join(report.text).split())
    assert "sft 41.5% 35.0 to 48.0 60.0% 53.0 to 67.0 200 3 min 20 s" in text
    assert "ppo 50.0% 0.0% 200 1 h 06 min" in text
    assert "data – – – 3.2 s" in text
    assert "dosing sft 25.0% 17.0 to 35.0 – 80" in text
    trained = "of the records written for SFT end in a wrong answer by the bank's key"
    assert f"0.0% {trained} (0 of 431, 95% interval 0.0 to 0.9%)" in text
    passed = "of the traces that the verifier accepted end in a wrong answer by the bank's key"
    assert f"1.2% {passed} (5 of 407, 95% interval 0.4 to 2.8%)" in text
    assert "Not for reporting" in text
    assert "Accuracy on the part “dosing” of the test problems" in text


def test_differences_gaps_and_facts_are_shown(report: Reader):
    text = " ".join(" ".join(report.text).split())
    assert "longer dosing +5.0 -1.0 to 11.0 +5.0 -1.0 to 11.0" in text
    assert "ppo sft dosing +5.0 1.0 to 9.0 +5.0 1.0 to 9.0" in text
    bold = [t for t in report.bold if "+5.0" in t]
    assert bold == ["+5.0"] * 2  # only where 0 is left out
    gaps = "sft +12.5 2.0 to 23.0 yes – ppo -2.5 -10.0 to 5.0 no gap to close -15.0"
    assert f"{gaps} -25.0 to -5.0" in text
    assert "facts recited right (%)" in text and "text only" in text


def test_the_report_draws_the_columns_that_exist(report: Reader):
    text = "".join(report.text)
    drawn = sum(tag == "svg" for tag, _ in report.tags)
    assert (
        drawn == 2 + 2 * 3
    )  # accuracies, facts recited; loss, reward and KL of two stages, no dev accuracy
    for label in (
        "loss (nats)",
        "mean reward (0 to 1)",
        "KL to the reference (nats a reply)",
        "step",
    ):
        assert label in text
    assert "Dev accuracy" not in text


def test_ten_questions_are_shown_with_the_replies_of_every_stage(report: Reader):
    classes = [attributes["class"] for _, attributes in report.tags if "class" in attributes]
    assert classes.count("sample") == 10
    assert classes.count("reply") == 10 * 2 * 2


def test_nothing_a_model_wrote_becomes_markup(report: Reader):
    assert "script" not in {tag for tag, _ in report.tags}
    assert f"sft says {HOSTILE}" in report.text
    assert any(HOSTILE in text for text in report.text if "name: formulary" in text)


def test_the_report_needs_nothing_from_outside(tmp_path: Path):
    html = write_report(make_run(tmp_path / "run")).read_text()
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"'\s<)]+", html)) <= namespaces
    assert re.findall(r"(?:src|href)=\"(?!#)[^\"]*\"|url\((?!#)[^)]*\)|@import", html) == []


def test_ids_of_the_figures_differ(report: Reader):
    ids = [attributes["id"] for _, attributes in report.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_same_run_gives_the_same_report(tmp_path: Path):
    first, second = (write_report(make_run(tmp_path / name)).read_bytes() for name in "ab")
    assert first == second


def test_a_summary_alone_is_enough_and_no_summary_is_an_error(tmp_path: Path):
    (tmp_path / "summary.json").write_text(
        json.dumps({"name": "bare", "not_for_reporting": False, "stages": []})
    )
    text = "".join(read(write_report(tmp_path)).text)
    assert "bare" in text and "Not for reporting" not in text
    with pytest.raises(ValueError, match=r"neither summary\.json nor metrics\.jsonl"):
        write_report(tmp_path / "elsewhere")


def test_a_stage_alone_has_a_report_of_its_curves(tmp_path: Path):
    rows = [{"step": i, "loss": 5.0 / i} for i in range(1, 9)]
    rows += [{"step": i, "held_out_loss": loss} for i, loss in ((4, 7.0), (8, 2.0))]
    write_lines(tmp_path / "metrics.jsonl", rows)
    (tmp_path / "config.yaml").write_text("kind: cpt\n")
    text = "".join(read(write_report(tmp_path)).text)
    assert "Loss" in text and "kind: cpt" in text
    assert "Held-out perplexity" in text and "Reward" not in text
    held_out = next(panel for panel in PANELS if panel.perplexity)
    assert read_panel(held_out, rows) == {"held_out_loss": ([4, 8], [math.exp(7), math.exp(2)])}


def test_a_failed_report_leaves_the_last_one(tmp_path: Path):
    run_dir = make_run(tmp_path / "run")
    before = write_report(run_dir).read_bytes()
    (run_dir / "sft" / "metrics.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1 is not JSON"):
        write_report(run_dir)
    assert [path.name for path in (run_dir / "report").iterdir()] == ["index.html"]
    assert (run_dir / "report" / "index.html").read_bytes() == before


def test_a_line_still_being_written_is_left_out(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_rows(tmp_path / "a.jsonl") == [{"step": 1}]


def test_values_that_are_not_finite_are_left_out_of_curves(tmp_path: Path):
    run_dir = make_run(tmp_path / "run")
    rows = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": None}]
    write_lines(run_dir / "sft" / "metrics.jsonl", rows)
    assert "nan" not in "".join(read(write_report(run_dir)).text)


def test_columns_are_matched_by_whole_words():
    row: dict[str, object] = dict.fromkeys(
        [
            "step",
            "loss",
            "held_out_loss/books",
            "ppo/value_loss",
            "kl",
            "approx_kl",
            "kl_coef",
            "dev_accuracy",
            "accuracy",
            "glossary",
        ],
        1,
    )
    found = {panel.title: matching_columns(panel, [row]) for panel in PANELS}
    assert found == {
        "Loss": ["loss", "ppo/value_loss"],
        "Held-out perplexity": ["held_out_loss/books"],
        "Reward": [],
        "KL": ["kl"],
        "KL of the update": ["approx_kl"],
        "Dev accuracy": ["dev_accuracy"],
    }


def test_thinning_keeps_the_mean_and_the_order():
    steps, values = thin_out(([float(i) for i in range(5000)], [float(i) for i in range(5000)]))
    assert len(steps) == 500 and steps == sorted(steps)
    assert sum(values) / len(values) == pytest.approx(4999 / 2)


def test_every_count_of_data_generation_without_a_tile_appears_in_some_table():
    tables = {table.title: table.rows for table in tabulate_counts(COUNTS)}
    assert tables == {
        "stages": [("problems", ["1,000", "900", "90.0%"]), ("search", ["467", "411", "88.0%"])],
        "rejected, by reason": [
            ("problems, filter: Too Simple", ["60"]),
            (f"problems, {HOSTILE}", ["40"]),
            ("search, attempts used up", ["56"]),
        ],
        "splits": [("rl", ["433"]), ("search", ["467"])],
        "search: by strategy": [
            ("backtrack", ["48", "12", "25.0%"]),
            ("verify", ["200", "81", "40.5%"]),
        ],
        "search: by attempt": [("1", ["71", "71", "100.0%"])],
    }


def test_counts_no_one_foresaw_are_shown():
    counts = {"seconds": 1.5, "calls": {"model a": {"cached": 3, "sent": 4}}, "none": {}}
    cells = [cell for table in tabulate_counts(counts) for _, row in table.rows for cell in row]
    assert sorted(cells) == ["1.5", "3", "4"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (3725, "1 h 02 min")],
)
def test_times_are_readable(seconds: float | None, text: str):
    assert format_seconds(seconds) == text


def test_the_terminal_table_holds_the_same_figures():
    text = stage_table(SUMMARY)
    assert "41.5% (35.0 to 48.0)" in text and "60.0% (53.0 to 67.0)" in text
    assert "Not for reporting" in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "\x1b" not in text
