"""A model folder on disk, opened without a device, and written.

Ours holds `config.json`, the tokenizer and `params/` (Orbax); an adapter of ours holds
`adapter.json` and `adapter/` and names the folder of its base; Hugging Face's holds `*.safetensors`
in place of `params/`.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import struct

from medreason_jax.checkpoint import ParamReader, save_params
from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.manifest import model_folder, write_json
from medreason_jax.qwen2.heads import ScoreHead
from medreason_jax.qwen2.huggingface import HuggingFaceParams, leaves
from medreason_jax.qwen2.lora import Lora, Target, merge_kernel
from medreason_jax.qwen2.model import Params, abstract_params
from medreason_jax.qwen2.sizes import (
    Architecture,
    Sizes,
    WeightsDtype,
    config_fields,
    read_architecture,
    read_sizes,
    weights_dtype,
)

PARAMS, ADAPTER, ADAPTER_FILE = "params", "adapter", "adapter.json"


@struct.dataclass
class Description:
    """What a `config.json` says: sizes, `transformers`' class, and the type of exported weights."""

    sizes: Sizes = struct.field(pytree_node=False)
    architecture: Architecture = struct.field(pytree_node=False, default="Qwen2ForCausalLM")
    labels: int | None = struct.field(pytree_node=False, default=None)
    dtype: WeightsDtype = struct.field(pytree_node=False, default="float32")

    @property
    def score(self) -> ScoreHead | None:
        """The head in place of the vocabulary projection, if any."""
        if self.labels is None:
            return None
        return ScoreHead(self.labels, bias=self.architecture == "Qwen2ForTokenClassification")


def read_description(path: Path) -> Description:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a model folder holds a config.json")
    fields = json.loads(path.read_text(encoding="utf-8"))
    architecture, labels = read_architecture(fields)
    return Description(read_sizes(fields), architecture, labels, weights_dtype(fields))


class ModelFolder:
    """A model or stage folder; `read` gives its parameters one layer at a time, adapter added."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise FileNotFoundError(f"model={folder} does not exist; give a model or stage folder")
        self.folder = model_folder(folder)
        self.base: ModelFolder | None = None
        self.lora: Lora | None = None
        if (self.folder / ADAPTER_FILE).is_file():
            self._open_adapter()
            return
        self.description = read_description(self.folder / "config.json")
        self.tokenizer = ChatTokenizer(self.folder)
        sizes = self.description.sizes
        if self.tokenizer.vocab_size > sizes.vocab_size:
            raise ValueError(
                f"{self.folder}: the tokenizer has {self.tokenizer.vocab_size} tokens, the model's "
                f"vocab_size is {sizes.vocab_size}; they do not belong together"
            )
        self.abstract = abstract_params(sizes, score=self.description.score)
        self.is_ours = (self.folder / PARAMS).is_dir()
        self._reader = (
            ParamReader(self.folder / PARAMS)
            if self.is_ours
            else HuggingFaceParams(self.folder, self.abstract)
        )

    def _open_adapter(self) -> None:
        values = json.loads((self.folder / ADAPTER_FILE).read_text(encoding="utf-8"))
        base = ModelFolder(Path(values["base"]))
        if base.lora is not None:
            raise ValueError(f"{self.folder}: its base {base.folder} is an adapter itself")
        self.base, self.description, self.tokenizer = base, base.description, base.tokenizer
        self.abstract, self.is_ours = base.abstract, True
        self.lora = Lora(tuple(Target(**target) for target in values["targets"]))
        self._reader = ParamReader(self.folder / ADAPTER)

    def read(self, path: str, layer: int | None, rows: slice = slice(None)) -> np.ndarray:
        """A leaf that is not stacked, or one layer of one that is; `rows` are an embedding's."""
        if self.base is None:
            return self._reader.read(path, layer, rows)
        array = self.base.read(path, layer, rows)
        module, _, name = path.rpartition(".")
        target = None if self.lora is None else self.lora.of(module.rpartition(".")[2])
        if name != "kernel" or target is None:
            return array
        A, B = (self.read_adapter(f"{module}.{part}", layer) for part in ("lora_A", "lora_B"))
        return merge_kernel(array.astype(np.float32), A, B, target.scale)

    def read_adapter(self, path: str, layer: int) -> np.ndarray:
        assert self.lora is not None
        return self._reader.read(path, layer)


def save_model(
    folder: Path, params: Params, description: Description, tokenizer: ChatTokenizer
) -> None:
    """A model folder of our own kind; `params/` comes last and whole."""
    if jax.process_index() == 0:
        write_model_files(folder, description, tokenizer)
    save_params(folder / PARAMS, params)


def write_model_files(folder: Path, description: Description, tokenizer: ChatTokenizer) -> None:
    """`config.json` and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = config_fields(
        description.sizes,
        tokenizer.end_id,
        tokenizer.pad_id,
        description.dtype,
        architecture=description.architecture,
        labels=description.labels,
    )
    write_json(folder / "config.json", fields)
    tokenizer.save(folder)


def save_adapter(folder: Path, adapter: Params, lora: Lora, base: Path) -> None:
    """An adapter folder of our own kind; `adapter/` comes last and whole."""
    folder.mkdir(parents=True, exist_ok=True)
    targets: list[dict[str, Any]] = [
        {"projection": t.projection, "rank": t.rank, "alpha": t.alpha} for t in lora.targets
    ]
    if jax.process_index() == 0:
        write_json(folder / ADAPTER_FILE, {"base": str(base.absolute()), "targets": targets})
    save_params(folder / ADAPTER, adapter)


def check_new(folder: Path) -> None:
    """Nothing that exists is overwritten by a command."""
    if folder.exists():
        raise ValueError(f"{folder} exists; choose another folder or remove it")


def parameter_bytes(model: ModelFolder) -> int:
    """Bytes of the model in float32."""
    return 4 * sum(int(np.prod(leaf.shape)) for _, leaf in leaves(model.abstract))
