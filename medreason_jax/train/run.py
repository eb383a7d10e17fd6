"""The run of a training stage on disk and among processes: the one owner of side effects."""

import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

import jax
from tqdm import tqdm

from medreason_jax.checkpoint import StateCheckpoints, abstract_like, remove_states
from medreason_jax.config import ProfileConfig, RunConfig, SourceConfig, TrainConfig
from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.data.dataset import Batches, Source
from medreason_jax.data.prepare import prepare
from medreason_jax.data.sources import open_records
from medreason_jax.manifest import MANIFEST, write_json
from medreason_jax.mesh import Sharder
from medreason_jax.metrics import MetricLog
from medreason_jax.qwen2.folder import save_adapter, save_model
from medreason_jax.qwen2.load import Loaded, load_model
from medreason_jax.qwen2.lora import Lora
from medreason_jax.qwen2.model import Params
from medreason_jax.train.step import TrainState

C = TypeVar("C", bound=RunConfig)


class Stopped(RuntimeError):
    """The run was asked to stop and saved its state; the same command goes on."""


class Run:
    """The files of one stage's run: train states, metric log, clock; survives being killed."""

    def __init__(
        self,
        config: RunConfig,
        fingerprint: str,
        keep_best: str | None = None,
        finish_with_best: bool = False,
    ):
        self.config, self.folder, self.fingerprint = config, config.folder, fingerprint
        self.checkpoints = StateCheckpoints(
            config.folder / "states",
            config.keep_last,
            config.keep_every,
            None if keep_best is None else (keep_best, "min"),
        )
        self.finish_with_best = finish_with_best
        self.main = jax.process_index() == 0
        self.before = 0.0  # seconds of earlier attempts, up to their last saved state
        self.stop_requested = False
        self.restored: dict[str, Any] = {}  # what the checkpoint kept beside the state
        self.log: MetricLog | None = None

    def start(self, state: TrainState, sharder: Sharder) -> tuple[TrainState, int]:
        """The state to go on with and how many units (steps, iterations) it has behind it."""
        restored = self.checkpoints.restore_latest(abstract_like(state, sharder.tree(state)))
        done = 0
        if restored is not None:
            done, state, self.restored = restored
            self._check_fingerprint(self.restored["fingerprint"])
            self.before = self.restored["seconds"]
        self.log = MetricLog(self.folder, done, self.main)
        self.clock = time.monotonic()
        if jax.process_count() == 1:  # else the coordinator of the processes has its own handler
            signal.signal(signal.SIGTERM, self._ask_to_stop)
        return state, done

    def _check_fingerprint(self, before: str) -> None:
        if before != self.fingerprint and "data" not in self.config.accept_changes:
            raise ValueError(
                f"{self.folder}: the data changed since the checkpoint (fingerprint {before} then, "
                f"{self.fingerprint} now); use a new run folder, or accept_changes: [data]"
            )

    def _ask_to_stop(self, *_):
        self.stop_requested = True

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.clock

    def write(self, unit: int, metrics: dict[str, Any], pace: dict[str, Any]) -> None:
        """`metrics` are repeated by a resumed run, `pace` is not: it is for TensorBoard alone."""
        assert self.log is not None
        self.log.write(unit, metrics, pace)

    def stop_agreed(self, unit: int) -> bool:
        """Whether any process was asked to stop; called once a unit by all of them."""
        if jax.process_count() == 1:
            return self.stop_requested
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(unit)

    def is_due(self, unit: int, total: int) -> bool:
        if unit == total:
            return self.config.keep_states or self.finish_with_best
        return unit % self.config.checkpoint_every == 0

    def keep(
        self, unit: int, state: TrainState, facts: dict[str, Any], scores: dict[str, float]
    ) -> None:
        facts = {**facts, "fingerprint": self.fingerprint, "seconds": self.seconds}
        self.checkpoints.save(unit, state, facts, scores)

    def halt_if_broken(self, metrics: dict[str, Any], unit: int) -> None:
        """A loss or gradient that is not finite ends the run; what is saved is from before it.

        A save that is under way is waited for: an interpreter that ends starts no more of Orbax's
        threads, so that the state would be lost.
        """
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                self.checkpoints.close()
                raise RuntimeError(f"{name} is {metrics[name]} at step {unit}; {self.last_saved()}")

    def last_saved(self) -> str:
        steps = self.checkpoints.steps()
        if not steps:
            return "no state had been saved, the same command starts anew"
        return f"the last good state is of step {steps[-1]}, in {self.folder / 'states'}"

    def chosen(self, state: TrainState, unit: int, sharder: Sharder) -> tuple[Params, int]:
        """The parameters that the stage ends with and their unit; `state` is given away."""
        if not self.finish_with_best:
            return state.params, unit
        abstract = abstract_like(state, sharder.tree(state))
        for leaf in jax.tree.leaves(state):
            leaf.delete()  # two states may not fit
        unit, best = self.checkpoints.restore_best(abstract)
        return best.params, unit

    def stop(self, unit: int, total: int) -> None:
        """End in a state that the same command goes on from."""
        self.checkpoints.close()
        raise Stopped(
            f"stopped at {unit} of {total}, saved in {self.folder}; run it again to go on"
        )

    def finish(
        self, params: Params, model: Loaded, lora: Lora | None, facts: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the model (or adapter) folder, then the manifest that makes the stage done."""
        assert self.log is not None
        self.log.close()
        self.checkpoints.close()
        folder = self.folder / "model"
        if lora is None:
            save_model(folder, params, model.description, model.tokenizer)
        else:
            save_adapter(folder, params, lora, self.config.model)
        manifest = {**facts, "model": "model", "seconds": round(self.seconds, 1)}
        if self.main:
            write_json(self.folder / MANIFEST, manifest)
            if not self.config.keep_states:
                remove_states(self.folder / "states")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return manifest


class Trace:
    """A profiler trace of chosen steps, for TensorBoard, in `profile/`."""

    def __init__(self, settings: ProfileConfig | None, folder: Path):
        self.settings, self.folder, self.running = settings, folder / "profile", False

    def before(self, unit: int) -> None:
        if self.settings is not None and unit == self.settings.first_step:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def after(self, unit: int) -> None:
        if self.settings is None or not self.running:
            return
        if unit == self.settings.first_step + self.settings.steps - 1:
            jax.profiler.stop_trace()
            self.running = False

    def close(self) -> None:
        if self.running:
            jax.profiler.stop_trace()


def synchronise(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def load_for_training(config: RunConfig) -> Loaded:
    """The model that a stage starts from; an adapter of the stage before is added to its base."""
    model = load_model(
        config.model,
        config.mesh,
        config.dtype,
        remat=config.remat,
        unroll=config.unroll,
        attention=config.attention,
    )
    model.check_language_model()
    return model.merged()


def resolved(config: C, model: Loaded) -> C:
    """The config with the attention kernel that `auto` became."""
    return config.model_copy(update={"attention": model.network.compute.attention.name})


def way_to(config: RunConfig) -> str:
    """From the stage's folder to the model that it started from: a run can be moved whole."""
    return os.path.relpath(config.model.resolve(), config.folder.resolve())


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


def prepare_sources(
    config: TrainConfig, tokenizer: ChatTokenizer
) -> tuple[list[dict[str, Any]], Batches]:
    """Every source prepared (by the first process) and opened; facts of each, and the batches."""
    facts, sources = [], []
    for number, source in enumerate(config.sources):
        folder = config.folder / "prepared" / f"{number}-{source.path.stem}"
        facts.append(prepare_source(config, source, tokenizer, folder))
        sources.append(Source(folder, source.weight))
    return facts, Batches(sources, config.batch_rows, config.seed)


def prepare_source(
    config: TrainConfig, source: SourceConfig, tokenizer: ChatTokenizer, folder: Path
) -> dict[str, Any]:
    """Prepared by the first process, while the others wait; returns the folder's facts."""
    records = open_records(
        source.path,
        hub=source.hub,
        subset=source.subset,
        split=source.split,
        revision=source.revision,
        columns=source.columns,
    )

    def run() -> dict[str, Any]:
        return prepare(
            records,
            source.kind,
            tokenizer,
            length=config.length,
            reset=source.reset,
            pairs_per_row=None if config.preference is None else config.preference.pairs_per_row,
            seed=config.seed,
            folder=folder,
        )

    if jax.process_index() == 0:
        run()
    synchronise(f"prepared {folder.name}")
    return run()
