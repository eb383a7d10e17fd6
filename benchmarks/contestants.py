"""The same work done by medreason and by its peers: one train step, and greedy decoding.

Every builder takes a `Task` and gives callables: "step" makes one AdamW update of a batch and
returns the loss before it, "decode" returns the new token ids of every prompt ("bytes", of ours,
what the compiler said that the step holds). With a folder of safetensors all start from its
weights and must agree; without one each draws its own.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

Work = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Task:
    """A model (fields of its config.json) and what is asked of it."""

    fields: dict[str, Any]
    rows: int
    length: int
    prompts: int
    prompt: int
    new: int
    dtype: str = "float32"
    device: str = "cpu"
    remat: str = "none"
    unroll: int | str = "auto"
    attention: str = "auto"
    deterministic: bool = False
    chunk: int = 2048  # tokens of the vocabulary projection
    mu: str = "float32"  # of AdamW's first moment
    nu: str = "float32"  # and of its second
    lora: int | None = None  # its rank, on every projection
    documents: int = 1  # of equal length in a row
    pairs: int = 0  # of a row: RPO in place of SFT
    threads: int = 2  # of torch on a CPU
    rate: float = 1e-4

    @property
    def segments(self) -> int:
        """Of a row: its documents, or both answers of its pairs."""
        return 2 * self.pairs or self.documents

    def tokens_BT(self):
        import numpy as np

        shape = (self.rows, self.length)
        return np.random.default_rng(1).integers(1, self.fields["vocab_size"], shape)

    def asked(self) -> list[list[int]]:
        import numpy as np

        shape = (self.prompts, self.prompt)
        return np.random.default_rng(2).integers(1, self.fields["vocab_size"], shape).tolist()


def write_model(task: Task, folder: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**task.fields)).save_pretrained(folder)


# --- medreason ----------------------------------------------------------------------------------


def medreason(task: Task, folder: Path | None) -> Work:
    """Float32 weights and moments, computed in `task.dtype`; an adapter over a base in it."""
    import jax
    import jax.numpy as jnp

    from medreason_jax.generate.engine import Engine
    from medreason_jax.generate.sampling import Sampling
    from medreason_jax.mesh import make_mesh, make_sharder
    from medreason_jax.plan import memory_of
    from medreason_jax.qwen2.huggingface import import_params
    from medreason_jax.qwen2.load import make_compute
    from medreason_jax.qwen2.model import abstract_params, init_params, make_network
    from medreason_jax.qwen2.sizes import read_sizes
    from medreason_jax.qwen2.tensor_files import TensorFiles
    from medreason_jax.train.program import lora_of, make_program, place_split

    sizes, config = read_sizes(task.fields), config_of(task)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    sharder = make_sharder(mesh, sizes.num_attention_heads, sizes.num_key_value_heads)
    how = {"remat": task.remat, "unroll": task.unroll, "attention": task.attention}
    compute = make_compute(sharder, sizes, task.dtype, **how)
    network, _ = make_network(sizes, compute)
    program = make_program(config, network, sharder, config.steps)
    made: dict[str, Any] = {}

    def weights():
        if folder is None:
            return jax.jit(partial(init_params, sizes))(jax.random.key(0))
        abstract = abstract_params(sizes)
        return import_params(TensorFiles(folder), abstract, sharder.tree(abstract))

    def train() -> float:
        if "state" not in made:
            trainable, made["frozen"] = place_split(
                *(weights(), network, sharder, lora_of(config.lora)),
                needs_reference=task.pairs > 0,
                key=jax.random.key(1),
            )
            made["state"] = program.init(trainable)
            made["batch"] = jax.tree.map(jnp.asarray, packed(task))
            step = program.step(made["state"])
            made["step"] = step.lower(made["state"], made["frozen"], made["batch"]).compile()
        made["state"], metrics = made["step"](made["state"], made["frozen"], made["batch"])
        return float(jax.block_until_ready((made["state"], metrics))[1]["loss"])

    never = task.fields["vocab_size"]  # no token ends an answer
    greedy = Sampling(0.0, 0, 1.0, task.new)

    def decode() -> list[list[int]]:
        if "engine" not in made:
            made["weights"] = weights()
            made["engine"] = Engine(
                network, sharder.mesh, slots=task.prompts, end_id=never, pad_id=0
            )
        answers = made["engine"].generate(made["weights"], task.asked(), greedy, seed=0)
        return [done.ids for done in answers]

    return {"step": train, "decode": decode, "bytes": lambda: memory_of(made["step"]).total}


def config_of(task: Task):
    """The stage's config: AdamW at a constant rate, neither decay nor clipping."""
    from medreason_jax.config import TrainConfig

    return TrainConfig(
        kind="prefer" if task.pairs else "sft",
        folder="unused",
        model="unused",
        sources=[{"path": "unused", "kind": "preference" if task.pairs else "sft"}],
        steps=1000,
        dtype=task.dtype,
        attention=task.attention,
        deterministic=task.deterministic,
        remat=task.remat,
        unroll=task.unroll,
        head_chunk=task.chunk,
        length=task.length,
        batch_rows=task.rows,
        lora=None if task.lora is None else {"rank": task.lora, "alpha": 2 * task.lora},
        preference={"pairs_per_row": task.pairs} if task.pairs else None,
        optimizer={
            "learning_rate": task.rate,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "b2": 0.999 if task.nu == "float32" else 0.95,
            "weight_decay": 0.0,
            "clip_norm": 1e9,
            "mu_dtype": task.mu,
            "nu_dtype": task.nu,
        },
    )


def packed(task: Task) -> dict[str, Any]:
    """A batch of the trainer's rows: [rows, length], documents of equal length in a row."""
    import numpy as np

    from medreason_jax.data.chat import Encoded
    from medreason_jax.data.packing import make_row

    def row(tokens_T):
        parts = np.array_split(tokens_T, task.segments)
        items = [Encoded(ids, np.ones(len(ids), bool)) for ids in parts]
        return make_row(items, task.length, pad_id=0)

    rows = [row(tokens_T) for tokens_T in task.tokens_BT()]
    batch = {name: np.stack([each[name] for each in rows]) for name in rows[0]}
    if task.pairs:
        batch["pairs"] = np.ones((task.rows, task.pairs), np.float32)
    return batch


# --- transformers -------------------------------------------------------------------------------


def torch(
    task: Task,
    folder: Path | None,
    *,
    cudnn: bool = False,
    compiled: bool = False,
    liger: bool = False,
    static: bool = False,
    masters: bool = False,
) -> Work:
    """`transformers` in `task.dtype` (peft's adapter in float32), or with float32 masters that
    autocast computes in it; cuDNN attention, `compile`, Liger's kernels (of the whole process) and
    a static cache are asked for by name."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    dtype = torch.float32 if masters else getattr(torch, task.dtype)
    cast = partial(torch.autocast, task.device, getattr(torch, task.dtype), enabled=masters)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2()

    def model():
        if folder is not None:
            return Qwen2ForCausalLM.from_pretrained(str(folder), dtype=dtype).to(task.device)
        with torch.device(task.device):
            return Qwen2ForCausalLM(Qwen2Config(**task.fields)).to(dtype)

    made: dict[str, Any] = {}
    attention = partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION) if cudnn else nullcontext

    def train() -> float:
        if "model" not in made:
            trained = model().train()
            if task.lora is not None:
                from peft import LoraConfig, get_peft_model

                names = (
                    "q_proj",
                    "k_proj",
                    "v_proj",
                    "o_proj",
                    "gate_proj",
                    "up_proj",
                    "down_proj",
                )
                options = {"r": task.lora, "lora_alpha": 2 * task.lora}
                trained = get_peft_model(trained, LoraConfig(target_modules=[*names], **options))
            if task.remat != "none":
                trained.gradient_checkpointing_enable()
            parameters = [p for p in trained.parameters() if p.requires_grad]
            fused = {"fused": True} if task.device != "cpu" else {}
            made["optimizer"] = torch.optim.AdamW(
                parameters, lr=task.rate, weight_decay=0.0, **fused
            )
            made["model"] = torch.compile(trained) if compiled else trained
            made["tokens"] = torch.from_numpy(task.tokens_BT()).to(task.device)
        with attention():
            with cast():
                loss = made["model"](input_ids=made["tokens"], labels=made["tokens"]).loss
            loss.backward()
        made["optimizer"].step()
        made["optimizer"].zero_grad(set_to_none=True)
        return loss.item()

    def decode() -> list[list[int]]:
        if "answering" not in made:
            made["answering"] = model().eval()
            made["asked"] = torch.tensor(task.asked(), device=task.device)
        with torch.inference_mode(), attention():
            out = made["answering"].generate(
                made["asked"],
                attention_mask=torch.ones_like(made["asked"]),
                do_sample=False,
                max_new_tokens=task.new,
                min_new_tokens=task.new,
                pad_token_id=0,
                **({"cache_implementation": "static"} if static else {}),
            )
        return out[:, task.prompt :].tolist()

    return {"step": train, "decode": decode}


# --- google-tunix -------------------------------------------------------------------------------


def tunix(task: Task, folder: Path | None) -> Work:
    """Its PeftTrainer's own step, and its vanilla sampler; needs a folder of weights."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen2.params import create_model_from_safe_tensors
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

    fields, (B, T) = task.fields, (task.rows, task.length)
    config = qwen2.ModelConfig(
        num_layers=fields["num_hidden_layers"],
        vocab_size=fields["vocab_size"],
        embed_dim=fields["hidden_size"],
        hidden_dim=fields["intermediate_size"],
        num_heads=fields["num_attention_heads"],
        head_dim=fields["hidden_size"] // fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        rope_theta=int(fields["rope_theta"]),
        norm_eps=fields["rms_norm_eps"],
        use_tied_embedding=fields["tie_word_embeddings"],
    )
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=axes)
    jax.set_mesh(mesh)
    load = partial(
        create_model_from_safe_tensors, str(folder), config, mesh, dtype=jnp.dtype(task.dtype)
    )
    made: dict[str, Any] = {}

    def train() -> float:
        if "trainer" not in made:
            made["trainer"] = PeftTrainer(
                load(),
                optax.adamw(task.rate, weight_decay=0.0),
                TrainingConfig(eval_every_n_steps=10**9, max_steps=10**9),
            )
            made["step"], _ = made["trainer"].jit_train_and_eval_step()
            made["batch"] = {
                "input_tokens": jnp.asarray(task.tokens_BT(), jnp.int32),
                "input_mask": jnp.ones((B, T), jnp.int32),
                "positions": jnp.broadcast_to(jnp.arange(T), (B, T)),
                "attention_mask": jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T)),
            }
        loss = made["step"](made["batch"])[0]
        jax.block_until_ready(nnx.state(made["trainer"].model))
        return float(loss)

    asked, never = task.asked(), fields["vocab_size"] + 7

    class Numbers:
        """A tokenizer whose texts are the prompts' numbers."""

        def encode(self, text):
            return asked[int(text)]

        def decode(self, ids):
            return ""

        def bos_id(self):
            return None

        def eos_id(self):
            return never

        def pad_id(self):
            return 0

    def decode() -> list[list[int]]:
        if "sampler" not in made:
            room = CacheConfig(
                cache_size=task.prompt + task.new,
                num_layers=config.num_layers,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
            )
            made["sampler"] = Sampler(load(), Numbers(), room)
        out = made["sampler"](
            [str(number) for number in range(task.prompts)],
            max_generation_steps=task.new,
            max_prompt_length=task.prompt,
            eos_tokens=[never],
        )
        return [np.asarray(tokens).tolist() for tokens in out.tokens]

    return {"step": train, "decode": decode}


CONTESTANTS: dict[str, Callable[..., Work]] = {
    "medreason": medreason,
    "torch": torch,
    "tunix": tunix,
}
