"""`data-gen …`: parses, builds settings, calls one function.

Exit codes: 0 done, 1 failed (a teacher is down, a budget is spent, stopped), 2 bad input; a failure
is one line on stderr.
"""

import asyncio
import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from data_gen.answers import accuracy_interval, judge
from data_gen.config import Pairs, check_settings, load_config, parse_overrides
from data_gen.parent import end_with_parent, expected_parent
from data_gen.records import Problem, Sft, Split, Trace, read_records, write_records

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
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


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


# --- the pipeline -----------------------------------------------------------------------------


@app.command(epilog="example: data-gen run configs/data.yaml --set concurrency=64")
def run(config: ConfigFile, settings: Overrides = None) -> None:
    """Every stage in order; run again to resume, no answered call is repeated."""
    from data_gen import pipeline

    report = pipeline.run(load_config(config, settings or []))
    told = ("splits", "wrong_accepted_share", "verifier_accepted_wrong", "calls")
    _say_json({name: report[name] for name in told})


@app.command(epilog="example: data-gen problems configs/data.yaml")
def problems(config: ConfigFile, settings: Overrides = None) -> None:
    """Filter and reformat the bank: writes problems.jsonl, rl.jsonl, rejected.jsonl."""
    from data_gen import pipeline

    loaded = load_config(config, settings or [])
    _say_json(asyncio.run(pipeline.run_problems(loaded)))


@app.command(epilog="example: data-gen search configs/data.yaml --set search.max_depth=2")
def search(config: ConfigFile, settings: Overrides = None) -> None:
    """Search and rewrite the problems in the out folder: writes traces.jsonl, sft.jsonl."""
    from data_gen import pipeline

    loaded = load_config(config, settings or [])
    _say_json(asyncio.run(pipeline.run_search(loaded)))


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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Calls, tokens and records so far; also while a run is going on."""
    from data_gen import pipeline

    found = pipeline.read_status(data)
    if as_json:
        print(json.dumps(found))
        return
    print("finished" if found["finished"] else "not finished")
    for role, counts in found["calls"].items():
        tokens = f"{counts['prompt_tokens']} + {counts['completion_tokens']} tokens"
        print(f"{role}: {counts['calls']} calls in {counts['requests']} requests, {tokens}")
    for name, count in found["records"].items():
        print(f"{name}.jsonl: {count} records")


class _Response(BaseModel, extra="allow"):
    response: str
    answer: str
    options: dict[str, str] | None = None


@app.command(epilog="example: data-gen verify responses.jsonl --out verdicts.jsonl")
def verify(
    responses: Annotated[Path, typer.Argument(help="JSON Lines: response, answer[, options].")],
    out: Annotated[Path | None, typer.Option("--out", help="File for records + verdict.")] = None,
) -> None:
    """Judge responses by rule; prints counts and the accuracy with its 95 % interval."""
    records = read_records(responses, _Response)
    verdicts = [judge(record.response, record.answer, record.options) for record in records]
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


def _say_written(paths: dict[str, Path]) -> None:
    for path in paths.values():
        print(path)


def _say_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
