"""`medreason run`: data generation, training stages, evaluations, export and report, each once.

Every step leaves its result under `runs/<name>/` with a manifest that appears last; a second run
finds the manifests and goes on where the first one stopped.
"""

import copy
import fcntl
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import yaml

from medreason_jax.config import (
    EvaluateConfig,
    PPOConfig,
    TrainConfig,
    check_unchanged,
    save_yaml,
    validate,
)
from medreason_jax.data.chat import TOKENIZER_FILES, ChatTokenizer
from medreason_jax.data.sources import question_text, read_lines, read_problems, write_lines
from medreason_jax.data.tokenizer_training import train_tokenizer
from medreason_jax.evaluate.runner import ask, evaluate, part_of
from medreason_jax.generate.sampling import Sampling
from medreason_jax.manifest import read_manifest, write_json
from medreason_jax.mesh import check_rows, make_mesh, start_processes
from medreason_jax.model_card import model_card
from medreason_jax.qwen2.export import export_model
from medreason_jax.qwen2.folder import Description, ModelFolder, save_model
from medreason_jax.qwen2.importing import import_folder
from medreason_jax.qwen2.load import load_model
from medreason_jax.qwen2.model import init_params
from medreason_jax.qwen2.sizes import read_config_file, read_sizes
from medreason_jax.recipe import CandidatesConfig, ControlConfig, RecipeConfig, StageConfig
from medreason_jax.report import write_report
from medreason_jax.results import evaluation_folder, summarise
from medreason_jax.rl.loop import ppo_stage
from medreason_jax.train.run import progress_bar
from medreason_jax.train.stage import train_stage


def run_recipe(recipe: RecipeConfig, controls: bool = False) -> dict[str, Any]:
    """Run (or go on with) every stage of a recipe; returns the summary that is also on disk.

    With `controls` also the stages that are there for comparison only.
    """
    root = recipe.runs / recipe.name
    configs = {stage.name: stage_config(recipe, stage, root) for stage in recipe.stages}
    compared = [stage_config(recipe, control, root) for control in recipe.controls]
    check_inputs(recipe, [*configs.values(), *compared])
    root.mkdir(parents=True, exist_ok=True)
    with run_lock(root):
        start_processes(root)
        keep_recipe(recipe, root, list(configs.values()))
        generate_data(recipe, root)
        make_base(recipe, root)
        for stage in recipe.stages:
            run_stage(recipe, stage, root, configs[stage.name])
            evaluate_stage(recipe, stage, root)
        export_stage(recipe, root, recipe.stages[-1].name)
        for control in recipe.controls if controls else []:
            run_stage(recipe, control, root, stage_config(recipe, control, root))
            evaluate_stage(recipe, control, root)
        summary = summarise(recipe, root)
        write_json(root / "summary.json", summary)
        write_report(root)
        return summary


@contextmanager
def run_lock(root: Path):
    """One run at a time in a folder; the lock is the kernel's, so that a killed run leaves none."""
    path = root / "lock"
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(
            f"{root} is in use by {file.read().strip() or 'another run'}; "
            "wait for it or choose another name"
        ) from None
    file.truncate(0)
    file.write(f"host {socket.gethostname()} pid {os.getpid()}")
    file.flush()
    try:
        yield
    finally:
        file.close()


def check_inputs(recipe: RecipeConfig, configs: list[TrainConfig | PPOConfig]) -> None:
    """Whatever can be known to be wrong is said before anything is written or paid for."""
    if "MEDREASON_COORDINATOR" in os.environ:
        raise ValueError(
            "medreason run is one process; launch its stages (medreason sft …) by several instead"
        )
    mesh = make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor)
    for config in configs:
        rows = (
            config.rollouts // config.minibatches
            if isinstance(config, PPOConfig)
            else config.batch_rows
        )
        check_rows(mesh, f"stage {config.folder.name}: rows a step", rows, config.accumulation)
    if recipe.model.sizes is not None:
        read_sizes({**recipe.model.sizes.model_dump(), "vocab_size": 1})
    if recipe.model.folder is not None:
        read_config_file(recipe.model.folder / "config.json")
    for folder in (recipe.model.folder, recipe.tokenizer.folder):
        if folder is not None:
            ChatTokenizer(folder)
    if recipe.question_bank is not None:
        for path in (recipe.question_bank.path, recipe.question_bank.corpus):
            if path is not None and not path.is_file():
                raise FileNotFoundError(
                    f"question_bank: {path} does not exist; give a bank that data-gen check wrote "
                    "(for the examples of real text set MEDREASON_DATA)"
                )


# Fields of a recipe that may not change once the step that they shape has left this behind.
SHAPED = {
    "seed": "data/bank",
    "formulary": "data/bank",
    "question_bank": "data/bank",
    "data_gen": "data/manifest.json",
    "model": "base/manifest.json",
    "tokenizer": "base/manifest.json",
}


def keep_recipe(recipe: RecipeConfig, root: Path, configs: list[TrainConfig | PPOConfig]) -> None:
    """Save the resolved recipe; a change that a finished step contradicts is refused."""
    for config in configs:
        check_unchanged(config, config.folder / "config.yaml", config.accept_changes)
    path = root / "recipe.resolved.yaml"
    if path.is_file():
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        now = json.loads(recipe.model_dump_json())
        for name, trace in SHAPED.items():
            if (root / trace).exists() and before[name] != now[name]:
                raise ValueError(
                    f"{root} was made with another {name}; choose another name or remove it"
                )
    save_yaml(recipe, path)


# --- data ------------------------------------------------------------------------------------


def data_files(recipe: RecipeConfig) -> dict[str, Path]:
    """Where the records of a run are, by name."""
    folder = recipe.runs / recipe.name / "data"
    bank, generated = folder / "bank", folder / "generated"
    files = {name: generated / f"{name}.jsonl" for name in ("sft", "rl", "pairs")}
    return files | {name: bank / f"{name}.jsonl" for name in ("corpus", "dev", "test")}


def generate_data(recipe: RecipeConfig, root: Path) -> None:
    """The problem set, then `data-gen run` (a process of its own)."""
    folder = root / "data"
    if read_manifest(folder) is not None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    bank, clock = folder / "bank", Clock(folder / "seconds.json")
    with clock:
        if not bank.is_dir():
            partial = bank.with_name("bank.partial")
            shutil.rmtree(partial, ignore_errors=True)
            make_bank(recipe, partial)
            os.replace(partial, bank)
        check_parts(recipe)
        config = folder / "data_gen.yaml"
        settings = data_gen_config(recipe, bank, folder / "generated")
        config.write_text(yaml.safe_dump(settings, sort_keys=False))
        data_gen("run", str(config))
    shutil.copy(folder / "generated" / "report.json", folder / "report.json")
    write_json(folder / "manifest.json", {"kind": "data", "seconds": round(clock.total, 1)})


def check_parts(recipe: RecipeConfig) -> None:
    """The parts that the evaluations name exist: better said now than after the training."""
    evaluation = recipe.evaluation
    asked = [("part", evaluation.part, evaluation.split)]
    asked += [("gap_parts", part, evaluation.split) for part in evaluation.gap_parts]
    if any("dev" in stage.settings for stage in recipe.stages):
        asked.append(("part", evaluation.part, "dev"))
    for field, part, split in asked:
        problems = read_problems(data_files(recipe)[split])
        parts = sorted({part_of(problem) for problem in problems})
        if part not in parts:
            raise ValueError(
                f"evaluation.{field}: {part!r} is no part of the {split} problems; allowed: {parts}"
            )


def make_bank(recipe: RecipeConfig, bank: Path) -> None:
    """The folder `bank`: bank, corpus, dev and test files, and what the simulated teacher knows."""
    if recipe.formulary is not None:
        settings = [
            set_option(name, value) for name, value in recipe.formulary.items() if name != "seed"
        ]
        seed = recipe.formulary.get("seed", recipe.seed)
        data_gen("formulary", "--seed", str(seed), "--out", str(bank), *settings)
        return
    source = recipe.question_bank
    assert source is not None
    questions = read_lines(source.path)[: source.questions]
    bank.mkdir(parents=True, exist_ok=True)
    write_lines(bank / "questions.jsonl", questions)
    training = (1.0 - source.dev_share - source.test_share) / 2
    shares = {
        "search": training,
        "rl": training,
        "dev": source.dev_share,
        "test": source.test_share,
    }
    options = [text for name, share in shares.items() for text in (f"--{name}", str(share))]
    data_gen(
        "mcq-bank",
        str(bank / "questions.jsonl"),
        "--out",
        str(bank),
        "--source",
        source.source,
        "--language",
        source.language,
        "--seed",
        str(recipe.seed),
        *options,
    )
    evaluation = read_lines(bank / "evaluation.jsonl")
    for split in ("dev", "test"):
        write_lines(bank / f"{split}.jsonl", [r for r in evaluation if r["split"] == split])
    if source.corpus is not None:
        texts = read_lines(source.corpus)[: source.documents]
        whole, clean = bank / "corpus.whole.jsonl", bank / "corpus.jsonl"
        write_lines(whole, [{"id": d["id"], "text": d["text"]} for d in texts])
        evaluation_file = str(bank / "evaluation.jsonl")
        data_gen("decontaminate", str(whole), "--evaluation", evaluation_file, "--out", str(clean))


def data_gen_config(recipe: RecipeConfig, bank: Path, out: Path) -> dict[str, Any]:
    """The recipe's `data_gen` settings with the paths and the seed of this run."""
    values = copy.deepcopy(recipe.data_gen)
    private = {"bank": str(bank / "private" / "teacher_bank.jsonl"), "seed": recipe.seed}
    for role in values["teacher"].values():
        if "simulated" in role:
            role["simulated"] = {**private, **role["simulated"]}
    evaluation = [str(bank / f"{split}.jsonl") for split in ("dev", "test")]
    values.setdefault("decontamination", {}).setdefault("evaluation", evaluation)
    return {"bank": str(bank / "bank.jsonl"), "out": str(out), "seed": recipe.seed, **values}


def set_option(name: str, value: Any) -> str:
    return f"--set={name}={json.dumps(value)}"


def data_gen(*arguments: str) -> None:
    """Run one `data-gen` command; it says itself what is wrong, and its exit code is ours."""
    environment = {**os.environ, "DATA_GEN_END_WITH_PARENT": str(os.getpid())}
    command = [sys.executable, "-m", "data_gen", *arguments]
    done = subprocess.run(command, check=False, env=environment, stdout=2)  # ours is the result's
    if done.returncode != 0:
        raise SystemExit(done.returncode)


class Clock:
    """Seconds spent in a step, added up over attempts."""

    def __init__(self, path: Path):
        self.path = path
        self.total = json.loads(path.read_text())["seconds"] if path.is_file() else 0.0

    def __enter__(self):
        self.start = time.monotonic()

    def __exit__(self, *_):
        self.total += time.monotonic() - self.start
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"seconds": self.total})


# --- base model ------------------------------------------------------------------------------


def make_base(recipe: RecipeConfig, root: Path) -> None:
    """runs/<name>/base: random weights with a trained or given tokenizer, or an imported folder."""
    folder = root / "base"
    if read_manifest(folder) is not None:
        return
    if recipe.model.folder is not None:
        shutil.rmtree(folder / "model", ignore_errors=True)  # of an import that was killed
        import_folder(recipe.model.folder, folder / "model", recipe.mesh)
        write_json(folder / "manifest.json", {"kind": "base", "model": "model"})
        return
    assert recipe.model.sizes is not None
    tokenizer = make_tokenizer(recipe, root)
    fields = recipe.model.sizes.model_dump(exclude_none=True)
    sizes = read_sizes({"vocab_size": tokenizer.vocab_size, **fields})
    if sizes.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.sizes.vocab_size={sizes.vocab_size} is below the tokenizer's "
            f"{tokenizer.vocab_size} ids"
        )
    params = init_params(sizes, jax.random.key(recipe.seed))
    save_model(folder / "model", params, Description(sizes), tokenizer)
    write_json(folder / "manifest.json", {"kind": "base", "model": "model"})


def make_tokenizer(recipe: RecipeConfig, root: Path) -> ChatTokenizer:
    if recipe.tokenizer.folder is not None:
        return ChatTokenizer(recipe.tokenizer.folder)
    folder = root / "tokenizer"
    if not all((folder / name).is_file() for name in TOKENIZER_FILES):
        files = data_files(recipe)
        texts = [record["text"] for record in read_lines(files["corpus"])]
        for record in read_lines(files["sft"]):
            texts += [record["messages"][-1]["content"], record["thinking"], record["response"]]
        vocab_size, system = recipe.tokenizer.vocab_size, recipe.tokenizer.system
        assert vocab_size is not None and system is not None
        train_tokenizer(texts, vocab_size, system, folder)
    return ChatTokenizer(folder)


# --- stages ----------------------------------------------------------------------------------


def stage_config(recipe: RecipeConfig, stage: StageConfig, root: Path) -> TrainConfig | PPOConfig:
    """The resolved config of a stage; `medreason sft <stage>/config.yaml` runs it alone."""
    files = data_files(recipe)
    names = ["base", *(each.name for each in recipe.stages)]
    start = stage.start or names[names.index(stage.name) - 1]
    shared: dict[str, Any] = {
        "kind": stage.kind,
        "folder": root / stage.name,
        "model": root / start,
        "seed": recipe.seed,
        "dtype": recipe.dtype,
        "mesh": recipe.mesh,
    }
    control = stage if isinstance(stage, ControlConfig) else None
    where = f"{'stages' if control is None else 'controls'}.{stage.name}.settings"
    settings = with_dev_problems(recipe, stage.settings)
    if control is not None and control.seconds_of is not None:
        settings = {**settings, "steps": steps_that_fill(root, control)}
    if stage.kind == "ppo":
        return validate(PPOConfig, {**shared, "problems": files["rl"], **settings}, where)
    if stage.kind == "cpt":
        sources = [{"path": files["corpus"], "kind": "text"}]
    elif stage.kind == "sft":
        sources = [{"path": files["sft"], "kind": "sft", "weight": 1.0 - stage.replay}]
        if stage.replay > 0:
            sources.append({"path": files["corpus"], "kind": "text", "weight": stage.replay})
    else:
        sources = [{"path": pairs_file(recipe, stage, root), "kind": "preference"}]
    return validate(TrainConfig, {**shared, "sources": sources, **settings}, where)


def pairs_file(recipe: RecipeConfig, stage: StageConfig, root: Path) -> Path:
    """The preference pairs that a stage trains on."""
    if isinstance(stage, ControlConfig):
        (stage,) = (each for each in recipe.stages if each.name == stage.pairs_of)
    if stage.candidates is None:
        return data_files(recipe)["pairs"]
    return root / stage.name / "pairs.jsonl"


def with_dev_problems(recipe: RecipeConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings whose `dev`, where there is one, asks this run's dev problems of the headline."""
    if not isinstance(settings["dev"] if "dev" in settings else None, dict):
        return settings
    evaluation = recipe.evaluation
    own = {
        "problems": data_files(recipe)["dev"],
        "part": evaluation.part,
        "max_new_tokens": evaluation.max_new_tokens,
    }
    return {**settings, "dev": {**own, **settings["dev"]}}


def steps_that_fill(root: Path, control: ControlConfig) -> int:
    """As many as another stage's seconds have room for; those it was begun with, once it was.

    1 while that is not known, before the stages have run.
    """
    begun = root / control.name / "config.yaml"
    if begun.is_file():
        return yaml.safe_load(begun.read_text(encoding="utf-8"))["steps"]
    assert control.seconds_of is not None and control.start is not None
    filled = read_manifest(root / control.seconds_of)
    if filled is None or read_manifest(root / control.start) is None:
        return 1
    paces = [step["step_seconds"] for step in read_lines(root / control.start / "speed.jsonl")]
    return max(round(filled["seconds"] / statistics.median(paces)), 1)


def run_stage(
    recipe: RecipeConfig, stage: StageConfig, root: Path, config: TrainConfig | PPOConfig
) -> None:
    """One training stage, from the model of the stage that it starts from."""
    if read_manifest(config.folder) is not None:
        return
    if not config.model.is_dir():
        raise FileNotFoundError(
            f"{config.model} does not exist; stage {stage.name!r} starts from it"
        )
    if isinstance(config, PPOConfig):
        ppo_stage(config)
        return
    if stage.candidates is not None:
        with Clock(config.folder / "candidates.seconds.json"):
            make_pairs(recipe, stage.candidates, root, config)
    train_stage(config)


def make_pairs(
    recipe: RecipeConfig, settings: CandidatesConfig, root: Path, config: TrainConfig
) -> None:
    """Preference pairs from samples of the model as it stands, and from the search's attempts."""
    samples, pairs = config.folder / "candidates.jsonl", config.sources[0].path
    if not samples.is_file():
        sample_candidates(recipe, settings, config.model, samples)
    if not pairs.is_file():
        chosen = recipe.data_gen.get("pairs", {}).items()
        arguments = [str(root / "data" / "generated"), "--candidates", str(samples)]
        arguments += ["--out", str(pairs), "--seed", str(recipe.seed)]
        data_gen("pairs", *arguments, *(set_option(name, value) for name, value in chosen))


CORRECT = {"true": True, "false": False, "unscored": None}


def sample_candidates(
    recipe: RecipeConfig, settings: CandidatesConfig, model_path: Path, out: Path
) -> None:
    """Samples of the model for the first problems, in both prompt forms, as candidates of pairs."""
    model = load_model(model_path, recipe.mesh, recipe.dtype)
    chosen = read_problems(data_files(recipe)["rl"])[: settings.problems] * settings.samples
    sampling = Sampling(settings.temperature, 0, 1.0, settings.max_new_tokens)
    engine = model.engine(recipe.evaluation.slots)
    bar = progress_bar(f"{out.parent.name} samples", 2 * len(chosen), 0)
    records = []
    for form in ("answer_only", "explain"):
        seed, more = recipe.seed, bar.update
        judged = ask(engine, model.params, model.tokenizer, chosen, form, sampling, seed, more)
        records += [
            {
                "problem_id": prediction["id"],
                "explain": form == "explain",
                "text": prediction["text"],
                "correct": CORRECT[prediction["outcome"]],
            }
            for prediction in judged
        ]
    bar.close()
    write_lines(out, records)


def evaluate_stage(recipe: RecipeConfig, stage: StageConfig, root: Path) -> dict[str, Any]:
    settings = recipe.evaluation
    config = EvaluateConfig(
        model=root / stage.name,
        problems=data_files(recipe)[settings.split],
        folder=evaluation_folder(recipe, stage, root),
        dtype=recipe.dtype,
        mesh=recipe.mesh,
        slots=settings.slots,
        max_new_tokens=settings.max_new_tokens,
        answer_only_tokens=settings.answer_only_tokens,
        seed=recipe.seed,
        forms=["answer_only", "explain", *(["sampled"] if settings.sampled else [])],
    )
    return evaluate(config)


# --- results ---------------------------------------------------------------------------------


def export_stage(recipe: RecipeConfig, root: Path, last: str) -> dict[str, Any]:
    """The last model as a Hugging Face folder, through the parity gate."""
    finished = read_manifest(root / "export")
    if finished is not None:
        return finished
    start = time.monotonic()
    folder = root / "export" / "model"
    folder.parent.mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed before its manifest
    tokenizer = ModelFolder(root / last).tokenizer
    problems = read_problems(data_files(recipe)["test"])[:4]
    prompts = [
        tokenizer.prompt([{"role": "user", "content": question_text(problem)}])
        for problem in problems
    ]
    gate = export_model(
        root / last,
        folder,
        card=model_card(root / last, recipe.name, card_note(recipe)),
        prompts=prompts,
        max_new_tokens=min(recipe.evaluation.max_new_tokens, 128),
    )
    seconds = round(time.monotonic() - start, 1)
    manifest = {"kind": "export", "model": str(folder), "parity": gate, "seconds": seconds}
    write_json(root / "export" / "manifest.json", manifest)
    return manifest


def card_note(recipe: RecipeConfig) -> str:
    made = (
        "an invented formulary: it is not medicine" if recipe.formulary is not None else "real text"
    )
    text = f"Trained on {made}, seed {recipe.seed}."
    if recipe.not_for_reporting:
        text += " **Not for reporting**: its problems come from a benchmark's test file."
    return text
