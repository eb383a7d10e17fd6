"""`medreason …`: parses, loads a config, calls one function."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn an open base model into a domain reasoning model with checkable answers.",
)
Config = Annotated[Path, typer.Argument(help="YAML file")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="override a field: a.b=value (repeatable)")
]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


@app.command()
def run(
    recipe: Config,
    set_: Set = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="also the stages for comparison only")
    ] = False,
    json_: Json = False,
) -> None:
    """Every stage of a recipe, in order; run it again to go on.

    Example: medreason run configs/recipes/formulary.yaml --set seed=1
    """
    from medreason_jax.config import load_yaml, validate
    from medreason_jax.pipeline import run_recipe
    from medreason_jax.recipe import RecipeConfig
    from medreason_jax.report.table import stage_table

    config = validate(RecipeConfig, load_yaml(recipe, set_ or []), str(recipe))
    summary = run_recipe(config, controls)
    if json_:
        print(json.dumps(summary))
        return
    print(stage_table(summary))
    print(f"report  {summary['report']}\nmodel   {summary['export']}")


def _stage(config: Path, overrides: list[str] | None, json_: bool, kind: str) -> None:
    from medreason_jax.config import PPOConfig, TrainConfig, load_yaml, validate
    from medreason_jax.rl.loop import ppo_stage
    from medreason_jax.train.stage import train_stage

    values = {"kind": kind, **load_yaml(config, overrides or [])}
    if values["kind"] != kind:
        raise ValueError(f"{config}: kind={values['kind']!r}, this command runs {kind!r}")
    if kind == "ppo":
        stage = validate(PPOConfig, values, str(config))
        manifest = ppo_stage(stage)
    else:
        stage = validate(TrainConfig, values, str(config))
        manifest = train_stage(stage)
    print(json.dumps(manifest) if json_ else f"model   {stage.folder / manifest['model']}")


@app.command()
def cpt(config: Config, set_: Set = None, json_: Json = False) -> None:
    """Continued pretraining.  Example: medreason cpt cpt.yaml --set steps=100"""
    _stage(config, set_, json_, "cpt")


@app.command()
def sft(config: Config, set_: Set = None, json_: Json = False) -> None:
    """Supervised fine-tuning.  Example: medreason sft sft.yaml"""
    _stage(config, set_, json_, "sft")


@app.command()
def prefer(config: Config, set_: Set = None, json_: Json = False) -> None:
    """Preference optimisation: RPO, or DPO with alpha 0.  Example: medreason prefer rpo.yaml"""
    _stage(config, set_, json_, "prefer")


@app.command()
def ppo(config: Config, set_: Set = None, json_: Json = False) -> None:
    """Proximal policy optimisation.  Example: medreason ppo ppo.yaml"""
    _stage(config, set_, json_, "ppo")


@app.command()
def evaluate(config: Config, set_: Set = None, json_: Json = False) -> None:
    """Accuracy with and without explanation.  Example: medreason evaluate eval.yaml"""
    from medreason_jax.config import EvaluateConfig, load_yaml, validate
    from medreason_jax.evaluate.runner import evaluate as run_evaluation

    values = validate(EvaluateConfig, load_yaml(config, set_ or []), str(config))
    result = run_evaluation(values)
    print(json.dumps(result) if json_ else json.dumps(result["parts"], indent=2))


@app.command()
def generate(
    model: Annotated[Path, typer.Option(help="model, stage or Hugging Face folder")],
    prompts: Annotated[Path, typer.Option(help="JSON Lines: messages, prompt or token_ids")],
    out: Annotated[Path, typer.Option(help="JSON Lines to write")],
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(min=1e-6, max=1)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1)] = 0,
    slots: Annotated[int, typer.Option(min=1, help="prompts decoded at a time")] = 64,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    logprobs: Annotated[bool, typer.Option("--logprobs")] = False,
) -> None:
    """Answer a file of prompts.

    Example: medreason generate --model Qwen2.5-0.5B --prompts p.jsonl --out o.jsonl
    """
    one_of("--dtype", dtype, ("float32", "bfloat16"))
    from medreason_jax.generate.prompts import generate_file
    from medreason_jax.generate.sampling import Sampling

    count = generate_file(
        model,
        prompts,
        out,
        sampling=Sampling(temperature, top_k, top_p, max_new_tokens),
        seed=seed,
        dtype=dtype,
        slots=slots,
        with_logprobs=logprobs,
    )
    print(f"answers {count} in {out}")


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="model, stage or Hugging Face folder")],
    host: Annotated[str, typer.Option(help="other than loopback needs --api-key-env")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port")] = 8000,
    slots: Annotated[int, typer.Option(min=1, help="answers decoded at a time")] = 64,
    queue: Annotated[int, typer.Option(min=0, help="answers that may wait beside them")] = 256,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="tokens of prompt and answer; 4096, or the model's most if less"),
    ] = None,
    max_body: Annotated[int, typer.Option(min=1024, help="bytes of a request")] = 4 * 2**20,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    name: Annotated[
        str | None, typer.Option(help="what clients call the model; the folder's name if not given")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="environment variable with the key that clients have to send")
    ] = None,
    warm_up: Annotated[
        bool, typer.Option("--warm-up", help="compile for every length before the first request")
    ] = False,
    json_: Json = False,
) -> None:
    """Serve a model to OpenAI clients until SIGTERM, which lets running answers finish.

    Example: medreason serve runs/formulary/sft --port 8000
    """
    one_of("--dtype", dtype, ("float32", "bfloat16"))
    alone("serve")
    from medreason_jax.generate.serve import serve_model

    def ready(name: str, url: str) -> None:
        said = {"model": name, "base_url": url}
        print(json.dumps(said) if json_ else f"serving {name} at {url}", flush=True)

    serve_model(
        model,
        host=host,
        port=port,
        slots=slots,
        length=length,
        queue=queue,
        max_body=max_body,
        dtype=dtype,
        name=name,
        api_key_env=api_key_env,
        warm=warm_up,
        ready=ready,
    )


@app.command()
def chat(
    url: Annotated[str, typer.Argument(help="base URL of a server")] = "http://127.0.0.1:8000/v1",
    model: Annotated[
        str | None, typer.Option(help="its name at the server; the first one there if not given")
    ] = None,
    system: Annotated[str | None, typer.Option(help="system prompt")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.7,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="of an answer; all that there is room for if not")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="environment variable with the server's key")
    ] = None,
) -> None:
    """Talk to a server in the terminal: /clear, /quit; Ctrl-C cancels an answer.

    Example: medreason chat http://127.0.0.1:8000/v1
    """
    from medreason_jax.generate.chat_client import Chat, converse, served_model

    key = None if api_key_env is None else os.environ.get(api_key_env)
    if api_key_env is not None and not key:
        raise ValueError(f"--api-key-env {api_key_env}: the environment variable is not set")
    url = url.rstrip("/")
    settings: dict[str, Any] = {"temperature": temperature}
    settings |= {} if max_tokens is None else {"max_tokens": max_tokens}
    talk = Chat(url, model or served_model(url, key), key, system, settings)
    converse(talk, input, lambda text: print(text, end="", flush=True))


@app.command("import")
def import_model(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder, or peft folder")],
    target: Annotated[Path, typer.Argument(help="checkpoint to write")],
    base: Annotated[Path | None, typer.Option(help="the model that a peft adapter is for")] = None,
    fsdp: Annotated[
        int | None, typer.Option(min=1, help="mesh axis; all devices / tensor if not given")
    ] = None,
    tensor: Annotated[int, typer.Option(min=1, help="mesh axis")] = 1,
) -> None:
    """A Hugging Face folder (or a peft adapter) to a checkpoint.

    Example: medreason import Qwen2.5-0.5B ckpt
    """
    import jax

    from medreason_jax.config import MeshConfig
    from medreason_jax.mesh import start_processes
    from medreason_jax.qwen2.importing import import_folder, import_peft_folder
    from medreason_jax.qwen2.peft import is_peft_folder

    start_processes()
    if is_peft_folder(source):
        alone("import of a peft adapter")
        if base is None:
            raise ValueError(f"{source} is a peft adapter; give the model it is for: --base MODEL")
        lora = import_peft_folder(source, target, base)
        names = ", ".join(f"{t.projection} r={t.rank}" for t in lora.targets)
        print(f"adapter {target}\ntargets {names}")
        return
    if base is not None:
        raise ValueError(f"--base {base} is for peft adapters; {source} is a model")
    fsdp = max(jax.device_count() // tensor, 1) if fsdp is None else fsdp
    facts = import_folder(source, target, MeshConfig(data=-1, fsdp=fsdp, tensor=tensor))
    print(f"read    {facts.bytes_read} of {facts.total_bytes} bytes")
    print(f"model   {target}")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="checkpoint, stage, adapter or model folder")],
    target: Annotated[Path, typer.Argument(help="Hugging Face folder to write")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the model's own if not given")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="a peft folder of the adapter")
    ] = False,
    merged: Annotated[bool, typer.Option("--merged", help="base and adapter as one model")] = False,
    base: Annotated[
        Path | None, typer.Option(help="with --adapter: the base model's Hugging Face folder")
    ] = None,
    gate: Annotated[str, typer.Option(help="parity gate: auto, full or layerwise")] = "auto",
) -> None:
    """A checkpoint to a Hugging Face folder, checked against transformers.

    Example: medreason export ckpt out
    """
    from medreason_jax.mesh import start_processes
    from medreason_jax.model_card import model_card
    from medreason_jax.qwen2.export import export_adapter, export_model
    from medreason_jax.qwen2.folder import ModelFolder

    start_processes()
    alone("export")
    one_of("--gate", gate, ("auto", "full", "layerwise"))
    if dtype is not None:
        one_of("--dtype", dtype, ("float32", "bfloat16", "float16"))
    is_adapter = ModelFolder(source).lora is not None
    if is_adapter != (adapter or merged) or (adapter and merged):
        what = "an adapter: give --adapter or --merged" if is_adapter else "no adapter"
        raise ValueError(f"{source} is {what}; found --adapter={adapter}, --merged={merged}")
    if not adapter and base is not None:
        raise ValueError(f"--base {base} goes with --adapter")
    if adapter and (gate != "auto" or dtype is not None):
        raise ValueError(
            f"--gate {gate} and --dtype {dtype} have no effect with --adapter: it is written in "
            "float32 and compared with peft"
        )
    card = model_card(source, target.name)
    options: Any = {"gate": gate, "dtype": dtype}
    if adapter:
        facts = export_adapter(source, target, base, card=card)
    else:
        facts = export_model(source, target, card=card, **options)
    print(f"model   {target}\nparity  {json.dumps(facts)}")


@app.command()
def plan(
    config: Config,
    target: Annotated[str, typer.Option(help="v5e:4x4, v6e:8x8, v5p:4x4x4, h100:8, h200:8, cpu:8")],
    model: Annotated[
        Path | None, typer.Option(help="folder or known name, in place of the config's")
    ] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Whether a CPT, SFT or preference stage fits devices that are not here, compiled for them.

    Needs no weights and no data; exit code 1 when it does not fit.

    Example: medreason plan configs/stages/huatuogpt_sft_7b.yaml --target v5e:4x4
    """
    from medreason_jax.targets import parse_target, set_environment

    devices = parse_target(target)
    set_environment(devices)
    from medreason_jax.config import TrainConfig, load_yaml, validate
    from medreason_jax.plan import make_plan, plan_table

    stage = validate(TrainConfig, load_yaml(config, set_ or []), str(config))
    found = make_plan(stage, devices, model)
    print(json.dumps(found.record()) if json_ else plan_table(found))
    if not found.fits:
        raise SystemExit(1)


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(help="where runs are to be written")] = Path("runs"),
    json_: Json = False,
) -> None:
    """Versions, devices, the attention kernels that pass here, disk, network.

    Example: medreason doctor runs
    """
    from medreason_jax.doctor import examine, table

    records = examine(folder)
    print(json.dumps(records) if json_ else table(records))
    if any(entry["ok"] is False for entry in records):
        raise SystemExit(1)


def alone(what: str) -> None:
    """Refuse to do by several processes what one has to do."""
    import jax

    if jax.process_count() > 1:
        raise ValueError(f"{what} is one process; start it without a launcher, on one host")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is not allowed; give one of {', '.join(allowed)}")


@app.command()
def report(run_dir: Path) -> None:
    """The HTML report of a run or of a stage.  Example: medreason report runs/formulary"""
    from medreason_jax.report import write_report

    print(f"report  {write_report(run_dir)}")


def exit_code_of(call: Callable[[], Any]) -> int:
    """0, 2 for bad input, 1 for a failure; errors are one line."""
    try:
        call()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("medreason_jax", "data_gen"):
            raise
        extra = "export" if missing in ("torch", "transformers", "peft") else "cpu, gpu or tpu"
        said = f"failed: {missing} is not installed; install medreason with its extra {extra}"
        print(said, file=sys.stderr)
        return 1
    except (RuntimeError, OSError) as error:
        print(f"failed: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def run_arguments(arguments: list[str]) -> None:
    """Parse and run one command; what is wrong with the arguments is a ValueError of one line."""
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="medreason", standalone_mode=False)
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:
        told: Any = error
        if hasattr(told, "format_message"):  # the parser's own errors
            raise ValueError(told.format_message()) from None
        raise
    if code:
        raise SystemExit(code)


def main() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(exit_code_of(lambda: run_arguments(sys.argv[1:])))


if __name__ == "__main__":
    main()
