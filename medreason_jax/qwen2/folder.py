"""A model folder on disk, opened without a device, and written.

Ours holds `config.json`, the tokenizer and `params/` (Orbax); an adapter of ours holds
`adapter.json` and `adapter/` and names the folder of its base; Hugging Face's holds `*.safetensors`
in place of `params/`.
"""

import hashlib
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from flax import struct
from pydantic import BaseModel, ConfigDict, ValidationError

from medreason_jax.checkpoint import ParamReader, save_params
from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.manifest import model_folder, read_json_object, write_json
from medreason_jax.qwen2.heads import ScoreHead
from medreason_jax.qwen2.huggingface import HuggingFaceParams, leaves
from medreason_jax.qwen2.lora import Lora, Target, merge_kernel
from medreason_jax.qwen2.model import Params, abstract_params
from medreason_jax.qwen2.sizes import (
    DEFAULT_DTYPE,
    LANGUAGE_MODEL,
    Architecture,
    Labels,
    Sizes,
    WeightsDtype,
    config_fields,
    read_architecture,
    read_sizes,
    weights_dtype,
)

PARAMS, ADAPTER, ADAPTER_FILE = "params", "adapter", "adapter.json"
UNFINISHED = ".unfinished"  # marks a folder that an export has begun


@struct.dataclass
class Description:
    """What a `config.json` says: sizes, `transformers`' class, and the type of exported weights."""

    sizes: Sizes = struct.field(pytree_node=False)
    architecture: Architecture = struct.field(pytree_node=False, default=LANGUAGE_MODEL)
    labels: Labels | None = struct.field(pytree_node=False, default=None)
    dtype: WeightsDtype = struct.field(pytree_node=False, default=DEFAULT_DTYPE)

    @property
    def score(self) -> ScoreHead | None:
        """The head in place of the vocabulary projection, if any."""
        if self.labels is None:
            return None
        has_bias = self.architecture == "Qwen2ForTokenClassification"
        return ScoreHead(len(self.labels.names), bias=has_bias)


def read_description(path: Path) -> Description:
    fields = read_json_object(path, "a model's configuration")
    architecture, labels = read_architecture(fields)
    return Description(read_sizes(fields), architecture, labels, weights_dtype(fields))


class AdapterTarget(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    projection: str
    rank: int
    alpha: float


class AdapterFile(BaseModel):
    """`adapter.json`: where the base is, from the adapter's folder, and which one it has to be."""

    model_config = ConfigDict(extra="forbid", strict=True)
    base: str
    fingerprint: str
    targets: list[AdapterTarget]


class ModelFolder:
    """A model or stage folder; `read` gives its parameters one layer at a time, adapter added.

    The base of an adapter may have an adapter itself: a later stage's over an earlier one's.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise FileNotFoundError(f"model={folder} is no folder; give a model or stage folder")
        self.folder = model_folder(folder)
        self.base: ModelFolder | None = None
        self.lora: Lora | None = None
        if (self.folder / ADAPTER_FILE).is_file():
            self._open_adapter()
        else:
            self._open_model()

    def _open_model(self) -> None:
        self.description = read_description(self.folder / "config.json")
        self.tokenizer = ChatTokenizer(self.folder)
        sizes = self.description.sizes
        if self.tokenizer.vocab_size > sizes.vocab_size:
            raise ValueError(
                f"{self.folder}: the tokenizer needs {self.tokenizer.vocab_size} ids, the model's "
                f"vocab_size is {sizes.vocab_size}; they do not belong together"
            )
        self.abstract = abstract_params(sizes, score=self.description.score)
        self.is_ours = (self.folder / PARAMS).is_dir()
        if self.is_ours:
            self._reader = ParamReader(self.folder / PARAMS)
            _check_leaves(self._reader, self.abstract, self.folder)
        else:
            self._reader = HuggingFaceParams(self.folder, self.abstract)
            # What the file says of its weights' type need not be so.
            dtype = self._reader.files.common_dtype().name
            self.description = self.description.replace(dtype=dtype)

    def _open_adapter(self) -> None:
        path = self.folder / ADAPTER_FILE
        try:
            values = AdapterFile.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path}: {where}: {first['msg']}") from None
        place = self.folder / values.base
        if not place.is_dir():
            raise FileNotFoundError(
                f"{path}: base={values.base!r} is not at {place.resolve()}; move it back, or edit "
                "base"
            )
        base = ModelFolder(place.resolve())  # tensorstore takes no ".." in a path
        if fingerprint(base) != values.fingerprint:
            raise ValueError(
                f"{path}: base={values.base!r} is another model than the adapter was trained on; "
                "edit base to name the right one"
            )
        self.base, self.description, self.tokenizer = base, base.description, base.tokenizer
        self.abstract, self.is_ours = base.abstract, True
        self.lora = Lora(tuple(Target(t.projection, t.rank, t.alpha) for t in values.targets))
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

    def adapter_shape(self, path: str) -> tuple[int, ...]:
        assert isinstance(self._reader, ParamReader) and self.lora is not None
        return self._reader.leaves[path][0]


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
    """An adapter folder of our own kind; `adapter/` comes last and whole.

    The base is named by its way from `folder`, so that a run's folder can be moved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        targets = [
            AdapterTarget(projection=t.projection, rank=t.rank, alpha=t.alpha) for t in lora.targets
        ]
        way = os.path.relpath(base.resolve(), folder.resolve())
        values = AdapterFile(base=way, fingerprint=fingerprint(ModelFolder(base)), targets=targets)
        write_json(folder / ADAPTER_FILE, values.model_dump())
    save_params(folder / ADAPTER, adapter)


def fingerprint(model: ModelFolder) -> str:
    """Of the sizes, some embeddings and the first layer's query projection."""
    digest = hashlib.sha256(repr(model.description.sizes).encode())
    for part in (
        model.read("embed_tokens.embedding", None, slice(0, 64)),
        model.read("layers.self_attn.q_proj.kernel", 0),
    ):
        digest.update(np.ascontiguousarray(part, np.float32).tobytes())
    return digest.hexdigest()[:16]


def _check_leaves(reader: ParamReader, abstract: Params, folder: Path) -> None:
    expected = {path: tuple(leaf.shape) for path, leaf in leaves(abstract)}
    found = {path: shape for path, (shape, _) in reader.leaves.items()}
    wrong = sorted(path for path in expected | found if expected.get(path) != found.get(path))
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} parameters do not fit config.json; {wrong[0]} has shape "
            f"{found.get(wrong[0])}, needed is {expected.get(wrong[0])}"
        )


@contextmanager
def new_folder(target: Path):
    """A folder that appears as `target` when the block ends well; else it stays as TARGET.partial.

    Nothing that exists is overwritten, but what an earlier attempt left.
    """
    check_new(target)
    partial = target.with_name(f"{target.name}.partial")
    if (partial / UNFINISHED).is_file():
        shutil.rmtree(partial)
    check_new(partial)
    partial.mkdir(parents=True)
    (partial / UNFINISHED).touch()
    yield partial
    (partial / UNFINISHED).unlink()
    os.replace(partial, target)


def check_new(folder: Path) -> None:
    """Nothing that exists is overwritten by a command."""
    if folder.exists():
        raise ValueError(f"{folder} exists; choose another folder or remove it")


def parameter_bytes(model: ModelFolder) -> int:
    """Bytes of the model in float32."""
    return 4 * sum(int(np.prod(leaf.shape)) for _, leaf in leaves(model.abstract))
