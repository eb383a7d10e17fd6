"""A CPT, SFT or preference stage, read from top to bottom."""

import math
from typing import Any

import jax

from medreason_jax.config import TrainConfig, check_unchanged, save_yaml
from medreason_jax.data.dataset import Batches
from medreason_jax.data.schedule import Schedule, extend_schedule
from medreason_jax.manifest import read_manifest
from medreason_jax.mesh import check_rows, gather_to_host, start_processes
from medreason_jax.train.dev_accuracy import make_dev_accuracy
from medreason_jax.train.held_out import make_held_out
from medreason_jax.train.program import lora_of, make_program, place_split
from medreason_jax.train.run import (
    Run,
    Trace,
    load_for_training,
    prepare_sources,
    progress_bar,
    resolved,
    synchronise,
    way_to,
)
from medreason_jax.train.samples import make_samples
from medreason_jax.train.speed import Speed


def train_stage(config: TrainConfig) -> dict[str, Any]:
    """Run (or go on with) the stage; returns its manifest."""
    start_processes(config.folder)
    check_unchanged(config, config.folder / "config.yaml", config.accept_changes)
    finished = read_manifest(config.folder)
    if finished is not None:
        return finished
    model = load_for_training(config)
    model.check_length(config.length)
    check_rows(model.mesh, "batch_rows", config.batch_rows, config.accumulation)
    facts, batches = prepare_sources(config, model.tokenizer)
    steps = step_count(config, facts)
    lora = lora_of(config.lora)
    program = make_program(config, model.network, model.sharder, steps)
    held_out = make_held_out(config, model, program.policy)
    samples = make_samples(config, model, program.policy)
    dev = make_dev_accuracy(config, model, program.policy)
    trainable, frozen = place_split(
        model.params,
        model.network,
        model.sharder,
        lora,
        needs_reference=config.preference is not None,
        key=jax.random.key(config.seed),
    )
    state = program.init(trainable)

    if jax.process_index() == 0:
        save_yaml(resolved(config, model), config.folder / "config.yaml")
    run = Run(
        config,
        batches.fingerprint,
        keep_best=None if held_out is None else held_out.metric,
        finish_with_best=config.held_out is not None and config.held_out.finish_with == "best",
    )
    state, done = run.start(state, model.sharder)
    batches = with_schedule(config, batches, run, done)
    speed = Speed(config.folder, model.network.sizes, lora, run.main)
    with speed.apart("compile"):
        first = batches.global_batch(done, model.mesh)
        step = program.step(state).lower(state, frozen, first).compile()
        synchronise("compiled")  # before the first collective, which does not wait for long
    trace = Trace(config.profile, config.folder)
    bar = progress_bar(config.folder.name, steps, done)
    pending: tuple[int, dict[str, Any]] | None = None

    def report(unit: int, metrics: dict[str, Any]) -> None:
        """Read a step's metrics while the next one runs."""
        values = {name: float(value) for name, value in gather_to_host(metrics).items()}
        run.halt_if_broken(values, unit)
        attended = values.pop("attended")
        del values["halted"]
        slots = config.batch_rows * config.length
        pace = speed.step(unit, values["tokens"], attended, slots)
        run.write(unit, {**values, "learning_rate": float(program.schedule(unit - 1))}, pace)
        bar.set_postfix_str(f"loss {values['loss']:.3f}", refresh=False)
        bar.update(1)

    for unit in range(done + 1, steps + 1):
        trace.before(unit)
        batch = batches.global_batch(unit - 1, model.mesh)
        state, metrics = step(state, frozen, batch)
        if pending is not None:
            report(*pending)
        pending, stop = (unit, metrics), run.stop_agreed(unit)
        last = unit == steps
        due = run.is_due(unit, steps)
        saving = due or stop
        # what is saved is measured too, so that the best by it can be kept
        measuring = held_out is not None and (held_out.is_due(unit) or due or last)
        sampling = samples is not None and (samples.is_due(unit) or last)
        judging = dev is not None and (dev.is_due(unit) or last)
        if saving or measuring or sampling or judging or last:
            report(*pending)  # a state is saved only after its step was found good
            pending = None
        trace.after(unit)
        scores: dict[str, float] = {}
        if measuring:
            with speed.apart("held_out"):
                scores = held_out.measure(state.params, frozen)
                run.write(unit, scores, {})
        if sampling:
            with speed.apart("samples"):
                samples.write(unit, state.params, frozen)
        if judging:
            with speed.apart("dev"):
                run.write(unit, dev.measure(state.params, frozen), {})
        if saving:
            with speed.apart("save"):
                run.keep(unit, state, {"schedule": batches.schedule.model_dump()}, scores)
        if stop:
            trace.close()
            run.stop(unit, steps)
    bar.close()
    trace.close()
    pace = speed.close()
    params, chosen = run.chosen(state, steps, model.sharder)
    summary = {"kind": config.kind, "steps": steps, "parent": way_to(config), "data": facts}
    return run.finish(params, model, lora, {**summary, **pace, "model_step": chosen})


def step_count(config: TrainConfig, facts: list[dict[str, Any]]) -> int:
    """Steps in which the first source is seen `epochs` times, at its share of the rows."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    share = config.sources[0].weight / sum(source.weight for source in config.sources)
    return max(math.ceil(config.epochs * facts[0]["rows"] / share / config.batch_rows), 1)


def with_schedule(config: TrainConfig, batches: Batches, run: Run, done: int) -> Batches:
    """The checkpoint's schedule, continued with the config's weights from the next row on."""
    if "schedule" not in run.restored:
        return batches
    before = Schedule.model_validate(run.restored["schedule"])
    weights = [source.weight for source in config.sources]
    batches.schedule = extend_schedule(before, weights, done * config.batch_rows)
    return batches
