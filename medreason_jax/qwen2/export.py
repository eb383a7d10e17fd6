"""A model folder to a Hugging Face folder, tensor by tensor, through the parity gate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.manifest import write_json
from medreason_jax.qwen2.folder import Description, ModelFolder, new_folder, write_model_files
from medreason_jax.qwen2.huggingface import is_transposed, named_tensors
from medreason_jax.qwen2.parity import GateMode, adapter_gate, parity_gate, require_reference
from medreason_jax.qwen2.peft import write_peft
from medreason_jax.qwen2.sizes import WeightsDtype
from medreason_jax.qwen2.tensor_files import STORED, Tensor, write_tensor_files

PARITY = "parity.json"


def export_model(
    source: Path,
    target: Path,
    *,
    card: str,
    prompts: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 64,
    dtype: WeightsDtype | None = None,
    gate: Literal["auto"] | GateMode = "auto",
) -> dict[str, Any]:
    """Write `target`, compare it with `transformers`, and only then let it appear.

    An adapter is added to its base. Weights are stored as `dtype`, by default the type that the
    model was published in. Returns what the gate found, which is also in `parity.json`. When it
    finds a difference the folder keeps its name `….partial`. Needs memory for two tensors, and for
    what the gate's mode needs.
    """
    require_reference()
    model = ModelFolder(source)
    description = model.description
    if dtype is not None:
        description = description.replace(dtype=dtype)
    prompts = default_prompts(model.tokenizer) if prompts is None else prompts
    with new_folder(target) as folder:
        write_tensor_files(folder, planned_tensors(model, description))
        write_model_files(folder, description, model.tokenizer)
        if description.score is None:
            write_json(folder / "generation_config.json", generation_fields(model.tokenizer))
        (folder / "README.md").write_text(card, encoding="utf-8")
        facts = parity_gate(folder, model, description, prompts, max_new_tokens, gate)
        write_json(folder / PARITY, facts)
    return facts


def planned_tensors(model: ModelFolder, description: Description) -> list[Tensor]:
    dtype = STORED[description.dtype]

    def reader(path: str, layer: int | None):
        def read() -> np.ndarray:
            array = model.read(path, layer)
            return (array.T if is_transposed(path) else array).astype(dtype, order="C")

        return read

    return [
        Tensor(name, dtype, shape, reader(path, layer))
        for name, path, layer, shape in named_tensors(model.abstract)
    ]


def generation_fields(tokenizer: ChatTokenizer) -> dict[str, Any]:
    return {
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
        "do_sample": False,
    }


def default_prompts(tokenizer: ChatTokenizer) -> list[list[int]]:
    """Three conversations of different lengths for the gate."""
    questions = (
        "How are you?",
        "A 54-year-old man has had chest pain for two hours. Which test comes first, and why?",
        "発熱と咳が続く患者に必要な検査は何か。Answer in one sentence, then give the reason.",
    )
    return [tokenizer.prompt([{"role": "user", "content": text}]) for text in questions]


def export_adapter(source: Path, target: Path, base: Path | None, *, card: str) -> dict[str, Any]:
    """Write the adapter in `source` as a `peft` folder, compare it with `peft`, then show it.

    `base` is the Hugging Face folder that `peft` loads it on; not needed where the adapter's own
    base is one.
    """
    require_reference("peft")
    adapter = ModelFolder(source)
    assert adapter.base is not None
    if base is None:
        if adapter.base.is_ours:
            raise ValueError(
                f"{source}: its base {adapter.base.folder} is a checkpoint, which peft cannot "
                "load; export it (medreason export BASE OUT) and give --base OUT"
            )
        base = adapter.base.folder
    with new_folder(target) as folder:
        write_peft(folder, adapter, str(base))
        (folder / "README.md").write_text(card, encoding="utf-8")
        facts = adapter_gate(folder, base, adapter, default_prompts(adapter.tokenizer))
        write_json(folder / PARITY, facts)
    return facts
