"""A training stage from its config to its manifest: the one owner of side effects."""

import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from tqdm import tqdm

from medreason_jax.checkpoint import StateCheckpoints, abstract_like, remove_states
from medreason_jax.config import (
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    check_unchanged,
    save_yaml,
)
from medreason_jax.data.dataset import Batches, Source
from medreason_jax.data.prepare import prepare
from medreason_jax.manifest import MANIFEST, read_manifest, write_json
from medreason_jax.mesh import Sharder, check_rows, gather_to_host, start_processes
from medreason_jax.metrics import MetricLog
from medreason_jax.qwen2.folder import save_model
from medreason_jax.qwen2.load import Loaded, load_model
from medreason_jax.train.objectives import Objective, Scorer, language_modelling, preference
from medreason_jax.train.optimizer import Rate, make_optimizer, make_schedule
from medreason_jax.train.step import TrainState, init_state, make_train_step

C = TypeVar("C", bound=RunConfig)


class Stopped(RuntimeError):
    """The run was asked to stop and saved its state; the same command goes on."""


class Run:
    """The files of one stage's run: train states, metric log, clock; survives being killed."""

    def __init__(self, folder: Path, checkpoint_every: int, fingerprint: str):
        self.folder, self.every, self.fingerprint = folder, checkpoint_every, fingerprint
        self.checkpoints = StateCheckpoints(folder / "states")
        self.main = jax.process_index() == 0
        self.before = 0.0  # seconds of earlier attempts, up to their last saved state
        self.stop_requested = False
        self.log: MetricLog | None = None

    def start(self, state: TrainState, sharder: Sharder) -> tuple[TrainState, int]:
        """The state to go on with and how many units (steps, iterations) it has behind it."""
        done = self.checkpoints.latest()
        if done is not None:
            target = abstract_like(state, sharder.tree(state))
            state, facts = self.checkpoints.restore(done, target)
            if facts["fingerprint"] != self.fingerprint:
                raise ValueError(
                    f"{self.folder}: the data changed since the checkpoint (fingerprint "
                    f"{facts['fingerprint']} then, {self.fingerprint} now); use a new run folder"
                )
            self.before = facts["seconds"]
        done = 0 if done is None else done
        self.log = MetricLog(self.folder, done, self.main)
        self.clock = time.monotonic()
        signal.signal(signal.SIGTERM, self._ask_to_stop)
        return state, done

    def _ask_to_stop(self, *_):
        self.stop_requested = True

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.clock

    def write(self, unit: int, metrics: dict[str, Any]) -> None:
        assert self.log is not None
        self.log.write(unit, metrics)

    def stop_agreed(self) -> bool:
        """Whether any process was asked to stop; called once a unit by all of them."""
        if jax.process_count() == 1:
            return self.stop_requested
        from jax.experimental import multihost_utils

        flags = multihost_utils.process_allgather(jnp.int32(self.stop_requested))
        return bool(flags.max())

    def keep(self, unit: int, state: TrainState, total: int, stop: bool) -> None:
        """Save by cadence; when stopping, save and stop."""
        if (unit % self.every == 0 and unit < total) or stop:
            facts = {"fingerprint": self.fingerprint, "seconds": self.seconds}
            self.checkpoints.save(unit, state, facts)
        if stop:
            self.checkpoints.close()
            raise Stopped(
                f"stopped at {unit} of {total}, saved in {self.folder}; run it again to go on"
            )

    def finish(self, params, model: Loaded, facts: dict[str, Any]) -> dict[str, Any]:
        """Write the model folder, then the manifest that makes the stage done."""
        assert self.log is not None
        self.log.close()
        self.checkpoints.close()
        save_model(self.folder / "model", params, model.description, model.tokenizer)
        manifest = {**facts, "model": "model", "seconds": round(self.seconds, 1)}
        if self.main:
            write_json(self.folder / MANIFEST, manifest)
            remove_states(self.folder / "states")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return manifest


def optimizer_of(config: OptimizerConfig, steps: int, rates: Sequence[Rate] = ()):
    warmup = int(config.warmup_ratio * steps)
    schedule = make_schedule(
        config.schedule, config.learning_rate, steps, warmup, config.final_ratio
    )
    optimizer = make_optimizer(
        schedule,
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        rates=[*(Rate(rule.pattern, rule.scale, rule.layers) for rule in config.rates), *rates],
    )
    return optimizer, schedule


def load_for_training(config: RunConfig) -> Loaded:
    model = load_model(
        config.model,
        config.mesh,
        config.dtype,
        remat=config.remat,
        unroll=config.unroll,
        attention=config.attention,
    )
    if model.lora is not None:
        raise ValueError(
            f"model={config.model} is an adapter; add it to its base first: medreason export "
            f"--merged {config.model} MERGED"
        )
    return model


def resolved(config: C, model: Loaded) -> C:
    """The config with the attention kernel that `auto` became."""
    return config.model_copy(update={"attention": model.network.compute.attention.name})


def halt_if_broken(metrics: dict[str, Any], unit: int, folder: Path) -> None:
    """A loss or gradient that is not finite ends the run; the saved states are from before it."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise RuntimeError(
                f"{name} is {metrics[name]} at step {unit}; the last good state is in {folder}"
            )


def progress_bar(label: str, total: int, done: int) -> tqdm:
    """A bar on a terminal, a line every ten seconds in a log."""
    terminal = sys.stderr.isatty()
    quiet = jax.process_index() != 0
    return tqdm(
        total=total,
        initial=done,
        desc=label,
        mininterval=0.2 if terminal else 10.0,
        ascii=not terminal,
        disable=quiet,
    )


def train_stage(config: TrainConfig) -> dict[str, Any]:
    """Run (or go on with) a CPT, SFT or preference stage; returns its manifest."""
    start_processes(config.folder)
    check_unchanged(config, config.folder / "config.yaml")
    finished = read_manifest(config.folder)
    if finished is not None:
        return finished
    model = load_for_training(config)
    model.check_length(config.length)
    check_rows(model.mesh, "batch_rows", config.batch_rows, config.accumulation)
    facts, batches = prepare_sources(config, model)
    steps = _step_count(config, facts)
    objective, frozen = _objective(config, model)
    optimizer, schedule = optimizer_of(config.optimizer, steps)
    state = init_state(model.params, optimizer)
    step = make_train_step(objective, optimizer, model.sharder, state, config.accumulation)

    if jax.process_index() == 0:
        save_yaml(resolved(config, model), config.folder / "config.yaml")
    run = Run(config.folder, config.checkpoint_every, batches.fingerprint)
    state, done = run.start(state, model.sharder)
    bar = progress_bar(config.folder.name, steps, done)
    pending: tuple[int, dict[str, Any]] | None = None

    def report(unit: int, metrics: dict[str, Any]) -> None:
        """Read a step's metrics while the next one runs."""
        values = {name: float(value) for name, value in gather_to_host(metrics).items()}
        halt_if_broken(values, unit, config.folder)
        del values["halted"]
        run.write(unit, {**values, "learning_rate": float(schedule(unit - 1))})
        bar.set_postfix_str(f"loss {values['loss']:.3f}", refresh=False)
        bar.update(1)

    for unit in range(done + 1, steps + 1):
        batch = batches.global_batch(unit - 1, model.mesh)
        state, metrics = step(state, frozen, batch)
        if pending is not None:
            report(*pending)
        pending, stop = (unit, metrics), run.stop_agreed()
        if unit % config.checkpoint_every == 0 or stop:
            report(*pending)  # a state is saved only after its step was found good
            pending = None
        run.keep(unit, state, steps, stop)
    if pending is not None:
        report(*pending)
    bar.close()
    summary = {"kind": config.kind, "steps": steps, "parent": str(config.model), "data": facts}
    return run.finish(state.params, model, summary)


def prepare_sources(config: TrainConfig, model: Loaded) -> tuple[list[dict[str, Any]], Batches]:
    """Every source prepared (by the first process) and opened."""
    facts, sources = [], []
    for number, source in enumerate(config.sources):
        folder = config.folder / "prepared" / f"{number}-{source.path.stem}"
        arguments: dict[str, Any] = {
            "length": config.length,
            "pairs_per_row": None if config.preference is None else config.preference.pairs_per_row,
            "seed": config.seed,
            "folder": folder,
        }
        _first_process_first(
            lambda s=source, a=arguments: prepare(s.path, s.kind, model.tokenizer, **a)
        )
        facts.append(prepare(source.path, source.kind, model.tokenizer, **arguments))
        sources.append(Source(folder, source.weight))
    return facts, Batches(sources, config.batch_rows, config.seed)


def _first_process_first(action: Callable[[], Any]) -> None:
    if jax.process_index() == 0:
        action()
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("prepared")


def _step_count(config: TrainConfig, facts: list[dict[str, Any]]) -> int:
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    share = config.sources[0].weight / sum(source.weight for source in config.sources)
    return max(math.ceil(config.epochs * facts[0]["rows"] / share / config.batch_rows), 1)


def _objective(config: TrainConfig, model: Loaded) -> tuple[Objective, Any]:
    """The objective, and what it needs frozen: the reference policy for preferences."""
    scorer: Scorer = model.scorer(config.head_chunk)
    if config.preference is not None:
        reference = jax.tree.map(jnp.copy, model.params)  # the trained copy is donated
        return preference(scorer, config.preference.beta, config.preference.alpha), reference
    return language_modelling(scorer), None
