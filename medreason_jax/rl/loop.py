"""PPO, read from top to bottom: sample, reward, score, update."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medreason_jax.config import PPOConfig, check_unchanged, save_yaml
from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.sources import question_text, read_problems, write_lines
from medreason_jax.generate.sampling import Sampling
from medreason_jax.manifest import read_manifest
from medreason_jax.mesh import (
    check_rows,
    gather_to_host,
    put_batch,
    replicated,
    start_processes,
)
from medreason_jax.metrics import truncate_after
from medreason_jax.qwen2.heads import ScoreHead, init_score
from medreason_jax.rl.reward import Judged, Rewards, judge_response
from medreason_jax.rl.rollout import leave_out, make_rollout_scorer, rollout_rows
from medreason_jax.train.dev_accuracy import make_dev_accuracy
from medreason_jax.train.objectives import proximal_policy
from medreason_jax.train.optimizer import Rate
from medreason_jax.train.program import lora_of, make_policy, optimizer_of, place_split
from medreason_jax.train.run import (
    Run,
    load_for_training,
    progress_bar,
    resolved,
    way_to,
)
from medreason_jax.train.speed import Phases
from medreason_jax.train.step import init_state, make_train_step


def ppo_stage(config: PPOConfig) -> dict[str, Any]:
    """Run (or go on with) PPO; iteration i is a function of (seed, i) and of the state."""
    start_processes(config.folder)
    check_unchanged(config, config.folder / "config.yaml", config.accept_changes)
    finished = read_manifest(config.folder)
    if finished is not None:
        return finished
    model = load_for_training(config)
    model.check_length(config.length)
    minibatch = config.rollouts // config.minibatches
    check_rows(model.mesh, "rollouts / minibatches", minibatch, config.accumulation)
    problems, prompts = load_problems(config, model.tokenizer)
    lora = lora_of(config.lora)
    key = jax.random.key(config.seed)
    policy = make_policy(model.network, model.sharder, lora, config.head_chunk, config.temperature)
    engine = model.replace(network=policy.scorer.network).engine(config.rollouts)
    dev = make_dev_accuracy(config, model, policy)
    sampling = Sampling(config.temperature, 0, 1.0, config.max_new_tokens)
    rewards = Rewards(config.reward_true, config.reward_false, config.reward_unformatted)

    steps = config.iterations * config.ppo_epochs * config.minibatches
    rate = config.optimizer.learning_rate
    scale = 1.0 if config.critic_rate is None else config.critic_rate / rate
    rates = (Rate(r"^critic\.", scale),)
    optimizer, _ = optimizer_of(config.optimizer, steps, rates)
    # Takes the same state: the policy's moments stay 0, count and rate go on.
    warmup, _ = optimizer_of(config.optimizer, steps, rates, first=(Rate(r"^policy\.", 0.0),))
    trainable, frozen = place_split(
        model.params, model.network, model.sharder, lora, needs_reference=True, key=key
    )
    critic = init_score(model.network.sizes.hidden_size, ScoreHead(1, bias=True))
    critic = jax.device_put(critic, replicated(model.mesh))
    state = init_state({"policy": trainable, "critic": critic}, optimizer)
    objective = proximal_policy(policy, config.clip, config.value_clip, config.value_coef)
    how = config.accumulation, config.deterministic
    step, warmup_step = (
        make_train_step(objective, each, model.sharder, state, *how) for each in (optimizer, warmup)
    )
    score_rollouts = make_rollout_scorer(policy, config.kl_coef, config.gamma, config.gae_lambda)

    if jax.process_index() == 0:
        save_yaml(resolved(config, model), config.folder / "config.yaml")
    run = Run(config, fingerprint(problems))
    state, done = run.start(state, model.sharder)
    table = RolloutTable(config.folder / "rollouts.jsonl", done, jax.process_index() == 0)
    bar = progress_bar(config.folder.name, config.iterations, done)
    phases = Phases(config.folder, run.main)

    for iteration in range(done + 1, config.iterations + 1):
        phases.begin()
        chosen = problem_numbers(len(problems), config.rollouts, iteration - 1, config.seed)
        batch_prompts = [prompts[n] for n in chosen]
        seed = int(np.random.default_rng((config.seed, iteration, 2)).integers(2**31))
        params = policy.params(state.params["policy"], frozen)
        rollouts = {}  # judged as they finish, while the others are decoded
        for place, completion in engine.stream(params, batch_prompts, sampling, seed):
            text = model.tokenizer.decode(completion.ids)
            judgement = judge_response(text, problems[chosen[place]], rewards)
            rollouts[place] = completion, text, judgement
        completions, texts, judged = zip(*(rollouts[n] for n in range(len(chosen))), strict=True)
        phases.end_of("generate")
        table.write(iteration, [problems[n]["id"] for n in chosen], texts, judged)

        rows = rollout_rows(batch_prompts, completions, config.length, model.tokenizer.pad_id)
        leave_out(rows, [j.outcome == "unscored" for j in judged])
        scores = np.array([j.reward for j in judged], np.float32)
        batch, score_B = put_batch(model.mesh, rows), put_batch(model.mesh, {"score": scores})
        training_rows, rollout_metrics = score_rollouts(
            state.params, frozen, batch, score_B["score"]
        )
        host_rows = gather_to_host(training_rows)
        phases.end_of("score")
        update_metrics = []
        for numbers in minibatch_numbers(config, iteration):
            minibatch = put_batch(model.mesh, {name: x[numbers] for name, x in host_rows.items()})
            update = step if iteration > config.critic_warmup else warmup_step
            state, metrics = update(state, frozen, minibatch)
            update_metrics.append(metrics)

        values = (
            mean_metrics(update_metrics)
            | floats(rollout_metrics)
            | reward_metrics(judged, completions)
        )
        phases.end_of("update")
        run.halt_if_broken(values, iteration)
        del values["halted"]
        run.write(iteration, values, phases.line(iteration, config.rollouts))
        if dev is not None and (dev.is_due(iteration) or iteration == config.iterations):
            run.write(iteration, dev.measure(state.params["policy"], frozen), {})
        bar.set_postfix_str(f"reward {values['reward']:.3f} kl {values['kl']:.3f}", refresh=False)
        bar.update(1)
        stop = run.stop_agreed(iteration)
        if run.is_due(iteration, config.iterations) or stop:
            run.keep(iteration, state, {}, {})
        if stop:
            run.stop(iteration, config.iterations)
    bar.close()
    phases.close()
    table.close()
    facts = {"kind": "ppo", "steps": steps, "parent": way_to(config), "problems": len(problems)}
    return run.finish(state.params["policy"], model, lora, facts)


def load_problems(config: PPOConfig, tokenizer: ChatTokenizer):
    """Problems whose prompt leaves room for a full response, and the prompts' ids.

    The others are records in `rejected.jsonl`: a cut prompt would lose the question.
    """
    room = config.length - config.max_new_tokens
    kept, prompts, rejected = [], [], []
    for problem in read_problems(config.problems):
        ids = tokenizer.prompt([{"role": "user", "content": question_text(problem)}])
        if len(ids) <= room:
            kept.append(problem)
            prompts.append(ids)
        else:
            detail = f"prompt of {len(ids)} tokens, length - max_new_tokens = {room}"
            rejected.append(
                {"id": problem["id"], "stage": "ppo", "reason": "too_long", "detail": detail}
            )
    if not kept:
        raise ValueError(
            f"no problem of {config.problems} has a prompt of at most "
            f"length - max_new_tokens = {room} tokens; raise length"
        )
    if jax.process_index() == 0:
        write_lines(config.folder / "rejected.jsonl", rejected)
    return kept, prompts


def fingerprint(problems: list[dict[str, Any]]) -> str:
    return hashlib.sha256("".join(problem["id"] for problem in problems).encode()).hexdigest()[:16]


def problem_numbers(count: int, rollouts: int, iteration: int, seed: int) -> list[int]:
    """Which problems an iteration takes: every epoch is a permutation of its own."""
    numbers = []
    for place in range(iteration * rollouts, (iteration + 1) * rollouts):
        order = np.random.default_rng((seed, place // count)).permutation(count)
        numbers.append(int(order[place % count]))
    return numbers


def minibatch_numbers(config: PPOConfig, iteration: int) -> list[np.ndarray]:
    """Row numbers of every optimizer step of an iteration: a fresh permutation each PPO epoch."""
    random = np.random.default_rng((config.seed, iteration, 1))
    epochs = [random.permutation(config.rollouts) for _ in range(config.ppo_epochs)]
    return [part for epoch in epochs for part in np.split(epoch, config.minibatches)]


def floats(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in gather_to_host(metrics).items()}


def mean_metrics(steps: list[dict[str, Any]]) -> dict[str, float]:
    every = [floats(metrics) for metrics in steps]
    return {name: float(np.mean([m[name] for m in every])) for name in every[0]}


def reward_metrics(judged: list[Judged], completions) -> dict[str, float]:
    outcomes = [j.outcome for j in judged]
    return {
        "reward": float(np.mean([j.reward for j in judged if j.outcome != "unscored"] or [0.0])),
        "verified": outcomes.count("true") / len(outcomes),
        "formatted": 1.0 - outcomes.count("unformatted") / len(outcomes),
        "unscored": outcomes.count("unscored") / len(outcomes),
        "response_tokens": float(np.mean([len(c.ids) for c in completions])),
        "stopped": float(np.mean([c.finish_reason == "stop" for c in completions])),
    }


class RolloutTable:
    """Every rollout with its reward, as JSON Lines; cut back to the checkpoint on resume."""

    def __init__(self, path: Path, done: int, active: bool):
        self.file = None
        if active:
            truncate_after(path, done)
            self.file = path.open("a", encoding="utf-8")

    def write(self, iteration: int, ids: list[str], texts: list[str], judged: list[Judged]) -> None:
        if self.file is None:
            return
        for problem_id, text, verdict in zip(ids, texts, judged, strict=True):
            record = {
                "step": iteration,
                "problem_id": problem_id,
                "text": text,
                "outcome": verdict.outcome,
                "reward": verdict.reward,
            }
            self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
