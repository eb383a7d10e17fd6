"""The stages, each from its records to its files, and `run`, which is all of them.

The journal makes a stage repeatable at no cost, so a stage always works from the start of its
input; its files are written once, whole, ordered by id. A run that finished is recognised by the
fingerprint in its report and does nothing.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_gen.answers import judge
from data_gen.config import Config, Pairs, Search
from data_gen.decontaminate_files import decontaminate_problems, read_evaluation
from data_gen.difficulty import DifficultyFilter
from data_gen.endpoints import alias_of, roles_of
from data_gen.engine import open_teachers, workers_of
from data_gen.journal import summarise
from data_gen.pairs import Paired, make_pairs
from data_gen.parquet import load_pyarrow, write_parquet
from data_gen.problems import Passed, ProblemMaker
from data_gen.progress import map_concurrently, tell
from data_gen.prompting import load_prompts
from data_gen.questions import read_questions
from data_gen.records import (
    Candidate,
    Mcq,
    Problem,
    Rejected,
    Sft,
    SftKind,
    Trace,
    VerifierSample,
    content_id,
    read_records,
    write_atomically,
    write_records,
)
from data_gen.report import count_filtered, count_pairs, count_problems, count_search
from data_gen.rewrite import Rewriter, Rewritten
from data_gen.search import Searcher, conclusion_of
from data_gen.teacher import Teacher
from data_gen.verdict import VerifierKind
from data_gen.verifier_samples import verifier_samples
from data_gen.verifiers import Verifier, make_verifier

REPORT_FORMAT = 3  # of report.json: an older one is made again, which costs no call
SHAPES_NO_OUTPUT = {"out", "concurrency", "retries", "limits", "prices", "network", "teacher"}
SHAPES_ANSWERS = {"revision", "temperature", "top_p", "max_tokens", "seed", "structured_output"}
FILES = ("problems", "traces", "sft", "rl", "pairs", "rejected", "verifier")
ABLATIONS: tuple[SftKind, ...] = ("direct", "simple_cot", "option_only")


@dataclass(frozen=True)
class Tools:
    """What the stages that ask a teacher need."""

    reasoner: Teacher
    verifier: Teacher
    rewriter: Teacher
    models: list[Teacher]
    prompts: dict[str, str]


def run(config: Config) -> dict[str, Any]:
    """Every stage in order; returns the report, which is also written to the out folder."""
    fingerprint = fingerprint_of(config)
    done = _finished_report(config.out, fingerprint)
    if done is not None:
        return done
    _check_formats(config)
    report = asyncio.run(_run(config))
    _write_formats(config)
    report = {"fingerprint": fingerprint, **report}
    write_atomically(config.out / "report.json", [json.dumps(report, indent=2) + "\n"])
    return report


async def _run(config: Config) -> dict[str, Any]:
    candidates = read_candidates(config.pairs.candidates)
    async with open_tools(config) as tools:
        made = await make_problems(config, tools)
        _write_problems(config.out, made)
        found = await search(config, made.problems, made.mcqs, tools)
    _write_found(config.out, found, made.rejected)
    paired = pair(config.pairs, config.seed, made.problems, found.sft, found.traces, candidates)
    write_sorted(config.out / "pairs.jsonl", paired.pairs)
    return {
        **made.counts,
        **found.counts,
        **count_pairs(paired.pairs, paired.left_out),
        "calls": summarise_calls(config.out),
    }


async def run_problems(config: Config) -> dict[str, Any]:
    """Only the stages that make problems; returns their counts."""
    async with open_tools(config) as tools:
        made = await make_problems(config, tools)
    _write_problems(config.out, made)
    write_sorted(config.out / "rejected.jsonl", made.rejected)
    _write_formats(config)
    return made.counts


async def run_search(config: Config) -> dict[str, Any]:
    """Only search and rewriting, of the problems in the out folder; returns their counts."""
    problems = read_records(config.out / "problems.jsonl", Problem)
    before = read_records(config.out / "rejected.jsonl", Rejected)
    mcqs = {mcq.id: mcq for mcq in read_records(config.bank, Mcq)}
    async with open_tools(config) as tools:
        found = await search(config, problems, mcqs, tools)
    earlier = [record for record in before if record.stage not in ("search", "rewrite")]
    _write_found(config.out, found, earlier)
    _write_formats(config)
    return found.counts


def _check_formats(config: Config) -> None:
    """Better said before the first call than after the last."""
    if config.parquet:
        load_pyarrow()


def _write_formats(config: Config) -> None:
    if config.parquet:
        paths = [config.out / f"{name}.jsonl" for name in FILES]
        paths += sorted((config.out / "ablations").glob("*.jsonl"))
        write_parquet(path for path in paths if path.exists())


def _write_problems(out: Path, made: "Made") -> None:
    write_sorted(out / "problems.jsonl", made.problems)
    write_sorted(out / "rl.jsonl", [p for p in made.problems if p.split == "rl"])


def _write_found(out: Path, found: "Found", earlier: Sequence[Rejected]) -> None:
    write_sorted(out / "traces.jsonl", found.traces)
    write_sorted(out / "sft.jsonl", found.sft)
    write_sorted(out / "verifier.jsonl", found.verifier)
    for kind in ABLATIONS:
        path = out / "ablations" / f"{kind}.jsonl"
        write_sorted(path, [record for record in found.ablations if record.kind == kind])
    write_sorted(out / "rejected.jsonl", [*earlier, *found.rejected])


# --- filter, reformat, split, decontaminate ---------------------------------------------------


@dataclass(frozen=True)
class Made:
    """What the bank became; `mcqs` are its questions by id."""

    problems: list[Problem]
    rejected: list[Rejected]
    mcqs: dict[str, Mcq]
    counts: dict[str, Any]


async def make_problems(config: Config, tools: Tools) -> Made:
    """Every question, as a problem or rejected."""
    asked = read_questions(config)
    tell(asked.notes)
    made = await map_concurrently(
        asked.mcqs, _maker(config, tools).make, workers_of(config), "problems"
    )
    refused = [*asked.rejected, *(record for record in made if isinstance(record, Rejected))]
    own = config.decontamination
    problems, dropped, told = decontaminate_problems(
        [*asked.mixed, *(record for record in made if isinstance(record, Problem))],
        {mcq.id: mcq for mcq in asked.mcqs},
        read_evaluation(own.evaluation),
        rule=own.rule,
        window=own.window,
        coverage=own.coverage,
    )
    problems, refused = _by_id(problems), _by_id([*refused, *dropped])
    counts = count_problems(problems, refused, told, asked.notes)
    return Made(problems, refused, {mcq.id: mcq for mcq in asked.mcqs}, counts)


async def run_filter(config: Config) -> dict[str, Any]:
    """Only rules, groups, splits and filters; writes filtered.jsonl, rejected.jsonl."""
    asked = read_questions(config)
    tell(asked.notes)
    async with open_tools(config) as tools:
        work = _maker(config, tools).filter
        passed = await map_concurrently(asked.mcqs, work, workers_of(config), "filter")
    refused = [*asked.rejected, *(record for record in passed if isinstance(record, Rejected))]
    kept = [record.as_mcq() for record in passed if isinstance(record, Passed)]
    write_sorted(config.out / "filtered.jsonl", kept)
    write_sorted(config.out / "rejected.jsonl", refused)
    return count_filtered([*kept, *asked.mixed], refused, asked.notes)


def _maker(config: Config, tools: Tools) -> ProblemMaker:
    models = [(config.problems.difficulty_models[i].model, t) for i, t in enumerate(tools.models)]
    return ProblemMaker(
        filterer=tools.reasoner if config.problems.teacher_filter else None,
        reformatter=tools.rewriter,
        prompts=tools.prompts,
        min_question_chars=config.problems.min_question_chars,
        difficulty=DifficultyFilter(models, tools.prompts) if models else None,
    )


# --- search and rewrite -----------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What search and rewriting made of the problems, and its counts."""

    traces: list[Trace]
    sft: list[Sft]
    ablations: list[Sft]
    verifier: list[VerifierSample]
    rejected: list[Rejected]
    counts: dict[str, Any]


async def search(
    config: Config, problems: Sequence[Problem], mcqs: dict[str, Mcq], tools: Tools
) -> Found:
    """Search every problem of the search split, rewrite what was verified.

    `mcqs` are the bank's questions by id: by their answers wrong traces and records are counted.
    """
    settings = config.search
    weights = settings.strategies
    searcher = Searcher(
        reasoner=tools.reasoner,
        verifier=_verifier(settings.verifier, settings, tools),
        prompts=tools.prompts,
        weights={
            "explore": weights.explore,
            "backtrack": weights.backtrack,
            "verify_again": weights.verify_again,
            "correct": weights.correct,
        },
        max_depth=settings.max_depth,
        max_restarts=settings.max_restarts,
        fresh_restart=settings.fresh_restart,
        backtrack_from=settings.backtrack_from,
        seed=config.seed,
        label_conditioned=settings.label_conditioned,
    )
    rewriter = Rewriter(
        teacher=tools.rewriter,
        verifier=_verifier(config.rewrite.verifier, settings, tools),
        prompts=tools.prompts,
        shares={
            "direct": config.rewrite.direct_share,
            "simple_cot": config.rewrite.simple_cot_share,
            "option_only": config.rewrite.option_only_share,
        },
        seed=config.seed,
        mcqs=mcqs,
    )

    async def work(problem: Problem) -> tuple[Trace | Rejected, Rewritten | None]:
        trace = await searcher.search(problem)
        if isinstance(trace, Rejected):
            return trace, None
        return trace, await rewriter.rewrite(problem, trace)

    own = [problem for problem in problems if problem.split == "search"]
    results = await map_concurrently(own, work, workers_of(config), "search and rewrite")
    for verifier in (searcher.verifier, rewriter.verifier):
        await verifier.close()
    return _collect(own, results, mcqs, settings.verifier)


def _verifier(kind: VerifierKind, settings: Search, tools: Tools) -> Verifier:
    return make_verifier(
        kind,
        tools.verifier,
        tools.prompts,
        sees_question=settings.verifier_sees_question,
        rule_seconds=settings.rule_seconds,
        teacher_seconds=settings.teacher_seconds,
    )


def _collect(
    problems: Sequence[Problem],
    results: Sequence[tuple[Trace | Rejected, Rewritten | None]],
    mcqs: dict[str, Mcq],
    judged_by: VerifierKind,
) -> Found:
    traces = _by_id([trace for trace, _ in results if isinstance(trace, Trace)])
    rewritten = [rewrite for _, rewrite in results if rewrite is not None]
    sft = _by_id([record for rewrite in rewritten for record in rewrite.records])
    lost = [trace for trace, _ in results if isinstance(trace, Rejected)]
    unwritten = [rewrite.rejected for rewrite in rewritten if rewrite.rejected is not None]
    refused = _by_id([*lost, *unwritten])
    ablations = [record for rewrite in rewritten for record in rewrite.ablations]
    samples = verifier_samples(problems, [trace for trace, _ in results], judged_by)
    answers = {problem.id: _key(problem, mcqs) for problem in problems}
    ends = [(trace.problem_id, conclusion_of(trace.steps)) for trace in traces]
    wrong_traces = _count_wrong(ends, answers)
    wrong_sft = _count_wrong([(str(r.problem_id), r.response) for r in sft], answers)
    counts = count_search(len(problems), traces, sft, refused, wrong_traces, wrong_sft)
    counts["search"]["verifier_samples"] = len(samples)
    return Found(traces, sft, ablations, samples, refused, counts)


class _Key(NamedTuple):
    answer: str
    options: dict[str, str] | None


def _count_wrong(ends: Iterable[tuple[str, str]], keys: dict[str, _Key]) -> int:
    """How many of the (problem id, text) pairs the rule does not find right."""
    return sum(judge(text, *keys[problem]).outcome != "true" for problem, text in ends)


def _key(problem: Problem, mcqs: dict[str, Mcq]) -> _Key:
    known = mcqs.get(problem.mcq_id) if problem.mcq_id is not None else None
    return _Key(problem.answer if known is None else known.answer, problem.options)


# --- pairs ------------------------------------------------------------------------------------


def pair(
    settings: Pairs,
    seed: int,
    problems: Iterable[Problem],
    sft: Iterable[Sft],
    traces: Iterable[Trace],
    candidates: Iterable[Candidate],
) -> Paired:
    """Preference pairs by the settings."""
    return make_pairs(
        problems,
        list(sft),
        list(traces),
        candidates,
        chosen=settings.chosen,
        rejected=settings.rejected,
        explain=settings.explain,
        k=settings.k,
        cap=settings.cap,
        seed=seed,
    )


def read_candidates(path: Path | None) -> list[Candidate]:
    """A model's samples; none without a file."""
    return [] if path is None else read_records(path, Candidate)


# --- tools, files -----------------------------------------------------------------------------


@asynccontextmanager
async def open_tools(config: Config) -> AsyncIterator[Tools]:
    """Prompts, journal and teachers; on the way out what has arrived is made durable."""
    prompts = load_prompts(config.language, config.prompts)
    models = {model_role(i): role for i, role in enumerate(config.problems.difficulty_models, 1)}
    async with open_teachers(config, {**roles_of(config.teacher), **models}) as teachers:
        yield Tools(
            reasoner=teachers["reasoner"],
            verifier=teachers["verifier"],
            rewriter=teachers["rewriter"],
            models=[teachers[name] for name in models],
            prompts=prompts,
        )


def model_role(number: int) -> str:
    """What the journal calls a small model that judges how hard questions are."""
    return f"difficulty model {number}"


def fingerprint_of(config: Config) -> str:
    """A hash of all that shapes the outputs: settings, and the contents of the files they name."""
    settings = config.model_dump(mode="json", exclude=SHAPES_NO_OUTPUT)
    del settings["problems"]["difficulty_models"]
    roles = (config.teacher.reasoner, config.teacher.verifier, config.teacher.rewriter)
    roles = (*roles, *config.problems.difficulty_models)
    teachers = [
        None
        if role is None
        else [alias_of(role), *role.model_dump(include=SHAPES_ANSWERS).values()]
        for role in roles
    ]
    files = [config.bank, *config.decontamination.evaluation]
    files += [path for path in (config.pairs.candidates,) if path is not None]
    files += [source.path for source in config.mix]
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    prompts = load_prompts(config.language, config.prompts)
    return content_id(
        {"settings": settings, "teachers": teachers, "files": contents, "prompts": prompts}
        | {"report_format": REPORT_FORMAT, "repairs": config.retries.repairs}
    )


def summarise_calls(out: Path) -> dict[str, Any]:
    """Calls and tokens by role, without what differs from one run to the next."""
    kept = ("calls", "prompt_tokens", "completion_tokens")
    summary = summarise(out / "journal.sqlite")
    return {role: {name: counts[name] for name in kept} for role, counts in summary.items()}


def write_sorted(path: Path, records: Iterable[Any]) -> int:
    """Write records ordered by id."""
    return write_records(path, _by_id(list(records)))


def _by_id(records: list[Any]) -> list[Any]:
    return sorted(records, key=lambda record: record.id)


def _finished_report(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """The report of a finished run with the same inputs, if all of its files are there."""
    path = out / "report.json"
    if not path.exists() or not all((out / f"{name}.jsonl").exists() for name in FILES):
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    return report if report["fingerprint"] == fingerprint else None
