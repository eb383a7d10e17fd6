"""The stages, each from its records to its files, and `run`, which is all of them.

The journal makes a stage repeatable at no cost, so a stage always works from the start of its
input; its files are written once, whole, ordered by id. A run that finished is recognised by the
fingerprint in its report and does nothing.
"""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data_gen.answers import judge
from data_gen.budget import Budget
from data_gen.config import Config, Decontamination, Pairs
from data_gen.decontaminate import Decontaminator, Item
from data_gen.endpoints import Endpoints, alias_of, open_endpoints
from data_gen.journal import Journal, open_journal, summarise
from data_gen.pairs import Paired, make_pairs
from data_gen.problems import ProblemMaker, rejected
from data_gen.progress import map_concurrently
from data_gen.prompting import load_prompts
from data_gen.records import (
    Candidate,
    Mcq,
    Problem,
    Rejected,
    Sft,
    Trace,
    content_id,
    iterate_records,
    read_records,
    write_atomically,
    write_records,
)
from data_gen.report import count_pairs, count_problems, count_search
from data_gen.rewrite import Rewriter, Rewritten
from data_gen.search import Searcher, conclusion_of
from data_gen.split import assign_splits
from data_gen.teacher import Endpoint, Patience, Teacher, make_http_client
from data_gen.verifiers import RuleVerifier, TeacherVerifier, Verifier

REPORT_FORMAT = 2  # of report.json: an older one is made again, which costs no call
FILES = ("problems", "traces", "sft", "rl", "pairs", "rejected")


@dataclass(frozen=True)
class Tools:
    """What the stages that ask a teacher need."""

    reasoner: Teacher
    verifier: Teacher
    rewriter: Teacher
    prompts: dict[str, str]


def run(config: Config) -> dict[str, Any]:
    """Every stage in order; returns the report, which is also written to the out folder."""
    fingerprint = fingerprint_of(config)
    done = _finished_report(config.out, fingerprint)
    if done is not None:
        return done
    report = asyncio.run(_run(config))
    report = {"fingerprint": fingerprint, **report}
    write_atomically(config.out / "report.json", [json.dumps(report, indent=2) + "\n"])
    return report


async def _run(config: Config) -> dict[str, Any]:
    candidates = read_candidates(config.pairs.candidates)
    async with open_tools(config) as tools:
        made = await make_problems(config, tools)
        _write_problems(config.out, made)
        found = await search(config, made.problems, made.keys, tools)
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
    return made.counts


async def run_search(config: Config) -> dict[str, Any]:
    """Only search and rewriting, of the problems in the out folder; returns their counts."""
    problems = read_records(config.out / "problems.jsonl", Problem)
    before = read_records(config.out / "rejected.jsonl", Rejected)
    keys = {mcq.id: mcq.answer for mcq in read_records(config.bank, Mcq)}
    async with open_tools(config) as tools:
        found = await search(config, problems, keys, tools)
    earlier = [record for record in before if record.stage not in ("search", "rewrite")]
    _write_found(config.out, found, earlier)
    return found.counts


def _write_problems(out: Path, made: "Made") -> None:
    write_sorted(out / "problems.jsonl", made.problems)
    write_sorted(out / "rl.jsonl", [p for p in made.problems if p.split == "rl"])


def _write_found(out: Path, found: "Found", earlier: Sequence[Rejected]) -> None:
    write_sorted(out / "traces.jsonl", found.traces)
    write_sorted(out / "sft.jsonl", found.sft)
    write_sorted(out / "rejected.jsonl", [*earlier, *found.rejected])


# --- filter, reformat, split, decontaminate ---------------------------------------------------


@dataclass(frozen=True)
class Made:
    """What the bank became; `keys` are its answers by question id."""

    problems: list[Problem]
    rejected: list[Rejected]
    keys: dict[str, str]
    counts: dict[str, Any]


async def make_problems(config: Config, tools: Tools) -> Made:
    """Every question of the bank, as a problem or rejected."""
    bank = read_records(config.bank, Mcq)
    evaluation = read_evaluation(config.decontamination.evaluation)
    shares = config.split
    mcqs = assign_splits(
        bank,
        {"search": shares.search, "rl": shares.rl, "dev": shares.dev, "test": shares.test},
        config.seed,
    )
    maker = ProblemMaker(
        filterer=tools.reasoner if config.problems.teacher_filter else None,
        reformatter=tools.rewriter,
        prompts=tools.prompts,
        min_question_chars=config.problems.min_question_chars,
    )
    distinct = list({mcq.id: mcq for mcq in reversed(mcqs)}.values())[::-1]
    made = await map_concurrently(distinct, maker.make, config.concurrency, "problems")
    refused = [*_duplicates(mcqs), *(r for r in made if isinstance(r, Rejected))]
    problems, dropped = decontaminate(
        [p for p in made if isinstance(p, Problem)],
        {mcq.id: mcq for mcq in distinct},
        evaluation,
        config.decontamination,
    )
    problems, refused = _by_id(problems), _by_id([*refused, *dropped])
    keys = {mcq.id: mcq.answer for mcq in distinct}
    return Made(problems, refused, keys, count_problems(bank, problems, refused))


def _duplicates(mcqs: Sequence[Mcq]) -> list[Rejected]:
    seen: Counter[str] = Counter()
    found = []
    for mcq in mcqs:
        seen[mcq.id] += 1
        if seen[mcq.id] > 1:
            record = rejected(mcq, "duplicate", "id is in the bank already").model_dump()
            del record["id"]
            found.append(Rejected.model_validate({**record, "occurrence": seen[mcq.id]}))
    return found


def decontaminate(
    problems: Iterable[Problem],
    questions: dict[str, Mcq],
    evaluation: Sequence[Item],
    settings: Decontamination,
) -> tuple[list[Problem], list[Rejected]]:
    """Drop training problems that an evaluation file or the bank's own dev or test split holds."""
    problems = list(problems)
    held_out = [p for p in problems if p.split in ("dev", "test")]
    items = [*evaluation, *(Item(problem.question, problem.answer) for problem in held_out)]
    index = Decontaminator(items, settings.rule, settings.window, settings.coverage)
    kept, dropped = held_out, []
    for problem in problems:
        if problem.split in ("dev", "test"):
            continue
        hit = index.find(problem.question, problem.answer)
        mcq = questions[problem.mcq_id] if problem.mcq_id is not None else None
        if hit is None and mcq is not None:
            hit = index.find_equal(mcq.question, mcq.answer)
        if hit is None:
            kept.append(problem)
            continue
        detail = f"{hit.covered:.2f} of it in: {items[hit.item].question[:80]}"
        record = {"stage": "decontaminate", "reason": hit.how, "detail": detail}
        record |= {"problem_id": problem.id, "mcq_id": problem.mcq_id, "split": problem.split}
        dropped.append(Rejected.model_validate(record))
    return kept, dropped


def read_evaluation(paths: Iterable[Path]) -> list[Item]:
    """The items of evaluation files: problems or multiple-choice questions, one a line."""
    return [
        Item(record.question, record.answer if record.answer is not None else "")
        for path in paths
        for record in iterate_records(path, _Evaluated)
    ]


class _Evaluated(BaseModel, extra="allow"):
    question: str
    answer: str | None = None


# --- search and rewrite -----------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What search and rewriting made of the problems, and its counts."""

    traces: list[Trace]
    sft: list[Sft]
    rejected: list[Rejected]
    counts: dict[str, Any]


async def search(
    config: Config, problems: Sequence[Problem], keys: dict[str, str], tools: Tools
) -> Found:
    """Search every problem of the search split, rewrite what was verified.

    `keys` are the bank's answers by question id: by them wrong traces and records are counted.
    """
    settings = config.search
    weights = settings.strategies
    searcher = Searcher(
        reasoner=tools.reasoner,
        verifier=_verifier(settings.verifier, tools),
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
    )
    rewriter = Rewriter(
        teacher=tools.rewriter,
        prompts=tools.prompts,
        direct_share=config.rewrite.direct_share,
        simple_cot_share=config.rewrite.simple_cot_share,
        seed=config.seed,
    )

    async def work(problem: Problem) -> tuple[Trace | Rejected, Rewritten | None]:
        trace = await searcher.search(problem)
        if isinstance(trace, Rejected):
            return trace, None
        return trace, await rewriter.rewrite(problem, trace)

    own = [problem for problem in problems if problem.split == "search"]
    results = await map_concurrently(own, work, config.concurrency, "search and rewrite")
    return _collect(own, results, keys)


def _verifier(kind: str, tools: Tools) -> Verifier:
    if kind == "rule":
        return RuleVerifier()
    return TeacherVerifier(tools.verifier, tools.prompts["verify"], tools.prompts["repair"])


def _collect(
    problems: Sequence[Problem],
    results: Sequence[tuple[Trace | Rejected, Rewritten | None]],
    keys: dict[str, str],
) -> Found:
    traces = _by_id([trace for trace, _ in results if isinstance(trace, Trace)])
    rewritten = [rewrite for _, rewrite in results if rewrite is not None]
    sft = _by_id([record for rewrite in rewritten for record in rewrite.records])
    lost = [trace for trace, _ in results if isinstance(trace, Rejected)]
    unwritten = [rewrite.rejected for rewrite in rewritten if rewrite.rejected is not None]
    refused = _by_id([*lost, *unwritten])
    answers = {problem.id: _key(problem, keys) for problem in problems}
    ends = [(trace.problem_id, conclusion_of(trace.steps)) for trace in traces]
    wrong_traces = _count_wrong(ends, answers)
    wrong_sft = _count_wrong([(str(r.problem_id), r.response) for r in sft], answers)
    counts = count_search(len(problems), traces, sft, refused, wrong_traces, wrong_sft)
    return Found(traces, sft, refused, counts)


def _count_wrong(ends: Iterable[tuple[str, str]], answers: dict[str, str]) -> int:
    """How many of the (problem id, text) pairs the rule does not find right."""
    return sum(judge(text, answers[problem]).outcome != "true" for problem, text in ends)


def _key(problem: Problem, keys: dict[str, str]) -> str:
    return keys[problem.mcq_id] if problem.mcq_id in keys else problem.answer


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
    with open_endpoints(config.teacher) as endpoints:
        journal = await open_journal(config.out / "journal.sqlite")
        try:
            limits = config.limits
            budget = Budget(
                config.concurrency, limits.max_calls, limits.max_tokens, journal.spent()
            )
            async with make_http_client() as http:
                yield _make_tools(config, endpoints, http, journal, budget, prompts)
        finally:
            await journal.drain()
            journal.close()


def _make_tools(
    config: Config,
    endpoints: Endpoints,
    http: Any,
    journal: Journal,
    budget: Budget,
    prompts: dict[str, str],
) -> Tools:
    retries = config.retries
    patience = Patience(retries.attempts, retries.first_wait, retries.longest_wait)

    def teacher(endpoint: Endpoint) -> Teacher:
        return Teacher(endpoint, http, journal, budget, patience)

    return Tools(
        reasoner=teacher(endpoints.reasoner),
        verifier=teacher(endpoints.verifier),
        rewriter=teacher(endpoints.rewriter),
        prompts=prompts,
    )


def fingerprint_of(config: Config) -> str:
    """A hash of all that shapes the outputs: settings, and the contents of the files they name."""
    settings = config.model_dump(
        mode="json", exclude={"out", "concurrency", "retries", "limits", "teacher"}
    )
    roles = (config.teacher.reasoner, config.teacher.verifier, config.teacher.rewriter)
    teachers = [
        role if role is None else [alias_of(role), role.temperature, role.max_tokens, role.seed]
        for role in roles
    ]
    files = [config.bank, *config.decontamination.evaluation]
    files += [path for path in (config.pairs.candidates,) if path is not None]
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    prompts = load_prompts(config.language, config.prompts)
    return content_id(
        {"settings": settings, "teachers": teachers, "files": contents, "prompts": prompts}
        | {"report_format": REPORT_FORMAT}
    )


def summarise_calls(out: Path) -> dict[str, Any]:
    """Calls and tokens by role, without what differs from one run to the next."""
    kept = ("calls", "prompt_tokens", "completion_tokens")
    summary = summarise(out / "journal.sqlite")
    return {role: {name: counts[name] for name in kept} for role, counts in summary.items()}


def read_status(out: Path) -> dict[str, Any]:
    """What a folder holds so far, also beside a run that is writing it."""
    journal = out / "journal.sqlite"
    if not journal.exists():
        raise ValueError(f"{out}: no run has written here (journal.sqlite is missing)")
    counts = {}
    for name in FILES:
        path = out / f"{name}.jsonl"
        if path.exists():
            with open(path, "rb") as lines:
                counts[name] = sum(1 for _ in lines)
    return {
        "finished": (out / "report.json").exists(),
        "calls": summarise(journal),
        "records": counts,
    }


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
