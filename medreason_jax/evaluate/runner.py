"""Accuracy of a model on problems: answer only; explain, then answer; the same, but sampled."""

import time
from collections.abc import Callable
from typing import Any

import jax

from data_gen.answers import final_response, judge
from medreason_jax.config import EvaluateConfig, check_unchanged, save_yaml
from medreason_jax.data.chat import ANSWER_ONLY, ChatTokenizer
from medreason_jax.data.sources import question_text, read_problems, write_lines
from medreason_jax.evaluate.scoring import score_parts
from medreason_jax.generate.engine import Engine
from medreason_jax.generate.sampling import Sampling
from medreason_jax.manifest import read_manifest, write_json
from medreason_jax.mesh import start_processes
from medreason_jax.qwen2.load import load_model
from medreason_jax.qwen2.model import Params
from medreason_jax.train.run import progress_bar

SAMPLED_TEMPERATURE = 1.0  # of the form "sampled", whatever the others' is
# What the answer is made to begin with, by form.
PREFIX = {"answer_only": ANSWER_ONLY, "explain": "", "sampled": ""}


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Ask, judge and score; writes predictions.jsonl, then the manifest that ends the step."""
    start_processes(config.folder)
    check_unchanged(config, config.folder / "config.yaml", [])
    finished = read_manifest(config.folder)
    if finished is not None:
        return finished
    start = time.monotonic()
    model = load_model(config.model, config.mesh, config.dtype)
    problems = read_problems(config.problems)
    engine = model.engine(config.slots)
    bar = progress_bar(
        config.folder.parent.name + " evaluation", len(problems) * len(config.forms), 0
    )
    predictions = []
    for form in config.forms:
        limit = config.answer_only_tokens if form == "answer_only" else config.max_new_tokens
        temperature = SAMPLED_TEMPERATURE if form == "sampled" else config.temperature
        sampling = Sampling(temperature, config.top_k, config.top_p, limit)
        predictions += ask(
            engine, model.params, model.tokenizer, problems, form, sampling, config.seed, bar.update
        )
    bar.close()
    facts = {
        "model": str(config.model),
        "problems": str(config.problems),
        "seconds": round(time.monotonic() - start, 1),
        "parts": score_parts(predictions),
    }
    if jax.process_index() == 0:
        save_yaml(config, config.folder / "config.yaml")
        write_lines(config.folder / "predictions.jsonl", predictions)
        write_json(config.folder / "manifest.json", facts)
    return facts


def ask(
    engine: Engine,
    params: Params,
    tokenizer: ChatTokenizer,
    problems: list[dict[str, Any]],
    form: str,
    sampling: Sampling,
    seed: int,
    progress: Callable[[int], Any] = lambda done: None,
) -> list[dict[str, Any]]:
    """A judged prediction for every problem, in their order; judged as answers finish."""
    prompts = [
        tokenizer.prompt([{"role": "user", "content": question_text(p)}], PREFIX[form])
        for p in problems
    ]
    judged = {}
    for number, completion in engine.stream(params, prompts, sampling, seed):
        text = PREFIX[form] + tokenizer.decode(completion.ids)
        judged[number] = prediction(problems[number], form, text, completion.finish_reason)
        progress(1)
    return [judged[number] for number in range(len(problems))]


def accuracy_of(predictions: list[dict[str, Any]]) -> float:
    """The share of answers judged true."""
    return sum(p["outcome"] == "true" for p in predictions) / max(len(predictions), 1)


def part_of(problem: dict[str, Any]) -> str:
    """The part of the test set that a problem belongs to; banks without parts have one, `test`."""
    return problem.get("part") or "test"


def prediction(problem, form: str, text: str, finish_reason: str) -> dict[str, Any]:
    parts = final_response(text)
    verdict = judge(parts[1] if parts else "", problem["answer"], problem.get("options"))
    return {
        "id": problem["id"],
        "part": part_of(problem),
        "form": form,
        "question": problem["question"],
        "text": text,
        "answer": problem["answer"],
        "outcome": verdict.outcome,
        "reason": verdict.reason if parts else "no final response",
        "finish_reason": finish_reason,
    }
