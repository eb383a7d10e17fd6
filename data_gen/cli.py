"""`data-gen …`: parses, builds settings, calls one function.

Exit codes: 0 done, 1 failed (a teacher is down, a budget is spent, stopped), 2 bad input; a failure
is one line on stderr.
"""

import asyncio
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, model_validator

from data_gen.answers import Reference, accuracy_interval
from data_gen.config import (
    Config,
    Decontamination,
    Pairs,
    Prices,
    check_settings,
    load_config,
    parse_overrides,
)
from data_gen.parent import end_with_parent, expected_parent
from data_gen.records import (
    Mcq,
    Problem,
    Sft,
    Split,
    Trace,
    read_records,
    write_atomically,
    write_records,
)
from data_gen.rule_process import RuleProcess
from data_gen.shards import read_shard, write_manifest
from data_gen.verdict import DateOrder

app = typer.Typer(
    name="data-gen",
    help="Make reasoning data with checkable answers from a bank of questions and a teacher.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_UsageError: Any = typer.BadParameter.__base__  # typer names it only through its subclasses
_INTERRUPTED = 130  # what typer makes of ctrl-c

ConfigFile = Annotated[Path, typer.Argument(help="YAML configuration.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="A setting, as a.b=c; may be given again.")
]
Seed = Annotated[int, typer.Option(min=0)]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder to write to.")]
ShardOption = Annotated[
    str | None, typer.Option("--shard", help="Part i of n of the bank, as 1/4; see merge.")
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Only this machine's teachers; no hub, no telemetry.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        parent = expected_parent()
        if parent is not None:
            end_with_parent(parent)
        with _stopping_on_sigterm():
            code = app(args=arguments, standalone_mode=False)
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except _UsageError as error:
        return _fail(error.format_message(), 2)
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        return _fail(error, 2)
    except (KeyboardInterrupt, asyncio.CancelledError, typer.Abort):
        return _fail("stopped; run again to go on from here", 1)
    except (RuntimeError, OSError) as error:
        return _fail(error, 1)


def _fail(error: Any, code: int) -> int:
    if isinstance(error, OSError) and error.filename is not None:
        error = f"{error.filename}: {error.strerror}"
    print(f"data-gen: {' '.join(str(error).split())}", file=sys.stderr)
    return code


@contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """SIGTERM ends a command as ctrl-c does: children are stopped, what was paid for is kept."""
    previous = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    hook, sys.unraisablehook = sys.unraisablehook, _interrupt_again
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        sys.unraisablehook = hook


def _interrupt_again(lost: Any) -> None:
    """An interrupt that came while a finalizer ran is lost there: it comes once more."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(lost)


# --- problem sets -----------------------------------------------------------------------------


@app.command(epilog="example: data-gen formulary --out runs/formulary --set drugs=66")
def formulary(out: OutFolder, seed: Seed = 0, settings: Overrides = None) -> None:
    """Write the built-in problem set: invented drugs, questions, texts, the teacher's bank."""
    from data_gen.formulary import FormularySettings, write_formulary

    values = parse_overrides(settings or [])
    _say_written(write_formulary(FormularySettings(**{"seed": seed, **values}), out))


@app.command(epilog="example: data-gen mcq-bank medqa.jsonl --out runs/medqa --source medqa")
def mcq_bank(
    questions: Annotated[Path, typer.Argument(help="JSON Lines: question, options, answer, …")],
    out: OutFolder,
    source: Annotated[str, typer.Option(help="Name of the source in the records.")],
    language: str = "en",
    search: Annotated[float, typer.Option(min=0, help="Share of the split.")] = 0.4,
    rl: Annotated[float, typer.Option(min=0, help="Share of the split.")] = 0.4,
    dev: Annotated[float, typer.Option(min=0, help="Share of the split.")] = 0.05,
    test: Annotated[float, typer.Option(min=0, help="Share of the split.")] = 0.15,
    seed: Seed = 0,
) -> None:
    """Turn examination questions into a bank, an evaluation file and a simulated teacher's bank."""
    from data_gen.mcq_bank import write_mcq_bank

    shares: dict[Split, float] = {"search": search, "rl": rl, "dev": dev, "test": test}
    if sum(shares.values()) <= 0:
        raise ValueError("search, rl, dev and test are all 0; one share should be above 0")
    named = {"source": source, "language": language}
    _say_written(write_mcq_bank(questions, out, shares=shares, seed=seed, **named))


@app.command(epilog="example: data-gen check bank.xlsx --out runs/bank --column question=Stem")
def check(
    bank: Annotated[Path, typer.Argument(help=".jsonl, .csv, .tsv or .xlsx", metavar="BANK")],
    out: OutFolder,
    column: Annotated[
        list[str] | None,
        typer.Option("--column", help="FIELD=COLUMN, such as options.A=Choice1; repeatable."),
    ] = None,
    sheet: Annotated[str | None, typer.Option(help="Sheet of a workbook; the first.")] = None,
    source: Annotated[str, typer.Option(help="Name of the source in the records.")] = "own",
    language: str = "en",
    first_option: Annotated[
        int, typer.Option(min=0, max=1, help="What a key in digits calls the first option.")
    ] = 1,
    min_question_chars: Annotated[int, typer.Option(min=0)] = 20,
    keep: Annotated[
        list[str] | None, typer.Option(help="A reason that does not reject; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What is wrong with a bank: writes bank.jsonl, rejected.jsonl and check.json."""
    from data_gen.bank_check import check_bank, describe
    from data_gen.bank_table import read_rows

    checked = check_bank(
        read_rows(bank, sheet),
        columns=_pairs(column or [], "--column", "FIELD=COLUMN"),
        source=source,
        language=language,
        first_option=first_option,
        min_question_chars=min_question_chars,
        keep=keep or [],
    )
    write_records(out / "bank.jsonl", checked.mcqs)
    write_records(out / "rejected.jsonl", checked.rejected)
    write_atomically(out / "check.json", [json.dumps(checked.facts, indent=2) + "\n"])
    print(json.dumps(checked.facts) if as_json else "\n".join(describe(checked.facts)))
    if not checked.mcqs:
        raise ValueError(f"{bank}: no question is left; reasons are in {out / 'rejected.jsonl'}")


def _pairs(texts: list[str], option: str, form: str) -> dict[str, str]:
    split = [text.partition("=") for text in texts]
    for (name, equals, value), text in zip(split, texts, strict=True):
        if not (name and equals and value):
            raise ValueError(f"{option} {text}: it should be {form}")
    return {name: value for name, _, value in split}


# --- the pipeline -----------------------------------------------------------------------------


@app.command(epilog="example: data-gen run configs/data.yaml --set concurrency=64")
def run(
    config: ConfigFile,
    settings: Overrides = None,
    shard: ShardOption = None,
    offline: Offline = False,
) -> None:
    """Every stage in order; run again to resume, no answered call is repeated."""
    from data_gen import pipeline

    loaded = _load(config, settings, shard, offline)
    report = pipeline.run(loaded)
    _finish_shard(loaded)
    told = ("splits", "wrong_accepted_share", "verifier_accepted_wrong", "calls")
    _say_json({name: report[name] for name in told})


@app.command("filter", epilog="example: data-gen filter configs/data.yaml")
def filter_questions(
    config: ConfigFile,
    settings: Overrides = None,
    shard: ShardOption = None,
    offline: Offline = False,
) -> None:
    """Only the filters, groups and splits of the bank: writes filtered.jsonl, rejected.jsonl."""
    from data_gen import pipeline

    loaded = _load(config, settings, shard, offline)
    _say_json(asyncio.run(pipeline.run_filter(loaded)))


@app.command(
    epilog="example: data-gen decontaminate corpus.jsonl --evaluation test.jsonl --out clean.jsonl"
)
def decontaminate(
    texts: Annotated[Path, typer.Argument(help="JSON Lines (.gz too): text, or question, answer.")],
    out: Annotated[Path, typer.Option("--out", help="File for the records that are kept.")],
    evaluation: Annotated[
        list[Path], typer.Option("--evaluation", help="Items: question, answer; repeatable.")
    ],
    settings: Overrides = None,
) -> None:
    """Drop texts or problems that hold an evaluation item; --set rule, window or coverage.

    Beside OUT stands OUT.rejected.jsonl; counts of both rules and the commonest shared windows are
    printed.
    """
    from data_gen.decontaminate import Decontaminator
    from data_gen.decontaminate_files import decontaminate_file, read_evaluation

    own = check_settings(Decontamination, parse_overrides(settings or []), "decontaminate")
    if own.evaluation:
        raise ValueError("--set evaluation: give the files as --evaluation FILE")
    items = read_evaluation(evaluation)
    index = Decontaminator(items, own.rule, own.window, own.coverage)
    _say_json(decontaminate_file(texts, out, index))


@app.command(epilog="example: data-gen problems configs/data.yaml")
def problems(
    config: ConfigFile,
    settings: Overrides = None,
    shard: ShardOption = None,
    offline: Offline = False,
) -> None:
    """Filter and reformat the bank: writes problems.jsonl, rl.jsonl, rejected.jsonl."""
    from data_gen import pipeline

    loaded = _load(config, settings, shard, offline)
    _say_json(asyncio.run(pipeline.run_problems(loaded)))


@app.command(epilog="example: data-gen search configs/data.yaml --set search.max_depth=2")
def search(
    config: ConfigFile,
    settings: Overrides = None,
    shard: ShardOption = None,
    offline: Offline = False,
) -> None:
    """Search and rewrite the problems in the out folder: writes traces.jsonl, sft.jsonl."""
    from data_gen import pipeline

    loaded = _load(config, settings, shard, offline)
    _say_json(asyncio.run(pipeline.run_search(loaded)))
    _finish_shard(loaded)


@app.command(epilog="example: data-gen merge configs/data.yaml")
def merge(
    config: ConfigFile,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Shards' folders; default: those in the out folder.", metavar="SHARD"),
    ] = None,
    settings: Overrides = None,
) -> None:
    """Join finished shards: one journal, and the files a run without shards would have made."""
    from data_gen import pipeline
    from data_gen.shards import check_shards, join_journals

    loaded = load_config(config, settings or [])
    shards = folders if folders else sorted(loaded.out.glob("shard-*-of-*"))
    questions = {mcq.id for mcq in read_records(loaded.bank, Mcq)}
    check_shards(shards, pipeline.fingerprint_of(loaded), questions)
    joined = join_journals(shards, loaded.out)
    report = pipeline.run(loaded)
    asked = sum(role["calls"] for role in pipeline.summarise_calls(loaded.out).values())
    _say_json({**joined, "asked_anew": asked - joined["calls"], "splits": report["splits"]})


@app.command(epilog="example: data-gen price configs/data.yaml --pilot runs/pilot")
def price(
    config: ConfigFile,
    settings: Overrides = None,
    pilot: Annotated[
        Path | None, typer.Option(help="Folder of a run whose calls show lengths and acceptance.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate calls, tokens and cost before a run: low, expected and high."""
    from data_gen.estimate import describe, estimate, measure

    loaded = load_config(config, settings or [])
    journal = (loaded.out if pilot is None else pilot) / "journal.sqlite"
    if pilot is not None and not journal.exists():
        raise ValueError(f"--pilot {pilot}: no run has written there (journal.sqlite is missing)")
    told = estimate(loaded, measure(loaded, journal) if journal.exists() else None)
    if as_json:
        print(json.dumps(told))
        return
    print("\n".join(describe(told)))


@app.command(epilog="example: data-gen pilot configs/data.yaml -n 20")
def pilot(
    config: ConfigFile,
    settings: Overrides = None,
    count: Annotated[int, typer.Option("-n", min=2, help="Questions of the bank.")] = 20,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Every step on a few questions: acceptance, and calls, cost and hours of the whole bank."""
    from data_gen.pilot import describe, run_pilot

    told = run_pilot(_load(config, settings, None, offline), count)
    print(json.dumps(told) if as_json else "\n".join(describe(told)))


@app.command(
    epilog="example: data-gen pairs runs/data --candidates samples.jsonl --out p.jsonl --set k=4"
)
def pairs(
    data: Annotated[Path, typer.Argument(help="Out folder of a run.", metavar="FOLDER")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    candidates: Annotated[Path | None, typer.Option(help="A model's samples, JSON Lines.")] = None,
    settings: Overrides = None,
    seed: Seed = 0,
) -> None:
    """Make preference pairs from a run's records and a model's samples."""
    from data_gen import pipeline
    from data_gen.report import count_pairs

    values = parse_overrides(settings or [])
    if candidates is not None:
        values["candidates"] = candidates
    chosen = check_settings(Pairs, values, "pairs")
    paired = pipeline.pair(
        chosen,
        seed,
        read_records(data / "problems.jsonl", Problem),
        read_records(data / "sft.jsonl", Sft),
        read_records(data / "traces.jsonl", Trace),
        pipeline.read_candidates(chosen.candidates),
    )
    pipeline.write_sorted(out, paired.pairs)
    _say_json(count_pairs(paired.pairs, paired.left_out))


# --- looking ----------------------------------------------------------------------------------


@app.command(epilog="example: data-gen status runs/data --json")
def status(
    data: Annotated[Path, typer.Argument(help="Out folder of a run.", metavar="FOLDER")],
    config: Annotated[
        Path | None, typer.Option("--config", help="Its configuration, for the price table.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Progress, calls, cost, acceptance, rejects and records; also while a run is going on."""
    from data_gen.endpoints import price_list
    from data_gen.status import describe, read_status

    prices = price_list(Prices() if config is None else load_config(config).prices)
    found = read_status(data, prices)
    print(json.dumps(found) if as_json else "\n".join(describe(found)))


@app.command(epilog="example: data-gen review runs/data --n 200; then --filled review.csv")
def review(
    data: Annotated[Path, typer.Argument(help="Out folder of a run.", metavar="FOLDER")],
    count: Annotated[int, typer.Option("--n", min=2, help="Conclusions to draw.")] = 200,
    filled: Annotated[Path | None, typer.Option(help="The filled CSV file.")] = None,
    seed: Seed = 0,
) -> None:
    """A blinded sample of verdicts for people to judge; with --filled, how far they agree."""
    from data_gen.review import read_review, write_review

    _say_json(write_review(data, count, seed) if filled is None else read_review(data, filled))


class _Response(BaseModel, extra="allow"):
    response: str
    answer: str
    options: dict[str, str] | None = None
    aliases: tuple[str, ...] = ()
    low: float | str | None = None
    high: float | str | None = None
    tolerance: float | None = None
    date_order: DateOrder = "mdy"

    @model_validator(mode="after")
    def _has_a_reference(self) -> "_Response":
        self.reference()
        return self

    def reference(self) -> Reference:
        settings = (self.low, self.high, self.tolerance, self.date_order)
        return Reference(self.answer, self.aliases, *settings)


@app.command(epilog="example: data-gen verify responses.jsonl --out verdicts.jsonl")
def verify(
    responses: Annotated[Path, typer.Argument(help="JSON Lines: response, answer[, options …].")],
    out: Annotated[Path | None, typer.Option("--out", help="File for records + verdict.")] = None,
    seconds: Annotated[float, typer.Option(help="Time limit of one verdict.")] = 10.0,
) -> None:
    """Judge responses by rule; prints counts and the accuracy with its 95 % interval.

    A record may also hold aliases (other names of the answer), low and high or tolerance (a share)
    for a number, and date_order (mdy or dmy).
    """
    records = read_records(responses, _Response)
    with RuleProcess(seconds) as process:
        verdicts = [process.judge(r.response, r.reference(), r.options) for r in records]
    if out is not None:
        judged = zip(records, verdicts, strict=True)
        write_records(
            out,
            [{**r.model_dump(), "verdict": v.outcome, "reason": v.reason} for r, v in judged],
        )
    counts = Counter(verdict.outcome for verdict in verdicts)
    scored = counts["true"] + counts["false"]
    share = counts["true"] / scored if scored else 0.0
    interval = accuracy_interval(counts["true"], scored)
    _say_json({"verdicts": dict(sorted(counts.items())), "accuracy": share, "interval95": interval})


@app.command(
    epilog="example: data-gen teacher --bank runs/formulary/private/teacher_bank.jsonl --port 8001",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def teacher(context: typer.Context) -> int:
    """Serve the built-in teacher; its options are those of data_gen.simulated_teacher."""
    from data_gen import simulated_teacher

    return simulated_teacher.main(context.args)


def _load(path: Path, settings: list[str] | None, shard: str | None, offline: bool) -> Config:
    """The configuration with the options that stand for settings; a shard has its own folder."""
    options = [f"shard={json.dumps(shard)}"] if shard is not None else []
    options += ["network.offline=true"] if offline else []
    loaded = load_config(path, [*(settings or []), *options])
    if loaded.shard is None:
        return loaded
    return loaded.model_copy(update={"out": loaded.out / read_shard(loaded.shard).folder})


def _finish_shard(config: Config) -> None:
    from data_gen import pipeline

    if config.shard is not None:
        whole = config.model_copy(update={"shard": None})
        write_manifest(config.out, read_shard(config.shard), pipeline.fingerprint_of(whole))


def _say_written(paths: dict[str, Path]) -> None:
    for path in paths.values():
        print(path)


def _say_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
