"""Safetensors files, read by slices of rows and written tensor by tensor.

Reading goes through the library. Writing is here because the library wants all tensors of a file
in memory at once: the format is a length, a JSON header and the data.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
STORED = {dtype.name: dtype for dtype in DTYPES.values()}  # by the names of config.json
FILE_BYTES = 5_000_000_000


class TensorFiles:
    """The tensors of a folder, or of one file; only what is asked for is read."""

    def __init__(self, path: Path):
        self.path = path
        self.bytes_read = 0
        self._open_files: dict[Path, object] = {}
        self.where = self._find()

    def _find(self) -> dict[str, Path]:
        if self.path.is_file():
            return dict.fromkeys(self._opened(self.path).keys(), self.path)
        index, single = self.path / INDEX, self.path / SINGLE
        if not index.is_file():
            if not single.is_file():
                raise FileNotFoundError(
                    f"{self.path} holds neither {SINGLE} nor params/: an import that did not end "
                    "(remove it and import again), or pickled .bin files, which can run code "
                    "(convert them to safetensors)"
                )
            return dict.fromkeys(self._opened(single).keys(), single)
        names = read_weight_map(index)
        outside = [file for file in names.values() if Path(file).name != file]
        if outside:
            raise ValueError(f"{index} points outside its folder: {outside[0]!r}; refused")
        pickled = [file for file in names.values() if not file.endswith(".safetensors")]
        if pickled:
            raise ValueError(f"{index} names {pickled[0]!r}; only .safetensors files are read")
        absent = sorted({file for file in names.values() if not (self.path / file).is_file()})
        if absent:
            raise FileNotFoundError(f"{index}: {len(absent)} files are missing: {absent[:3]}")
        return {name: self.path / file for name, file in names.items()}

    def _opened(self, path: Path):
        if path not in self._open_files:
            try:
                self._open_files[path] = safe_open(path, framework="numpy")
            except SafetensorError as error:
                raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
        return self._open_files[path]

    def _slice(self, name: str):
        try:
            return self._opened(self.where[name]).get_slice(name)
        except SafetensorError:
            raise ValueError(f"{self.where[name]} lacks {name}, which the index promises") from None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        code = self._slice(name).get_dtype()
        if code not in DTYPES:
            raise ValueError(f"{name} is stored as {code}; allowed: {sorted(DTYPES)}")
        return DTYPES[code]

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A range of the leading axis, in the stored dtype."""
        start, stop, _ = rows.indices(self.shape(name)[0])  # the library refuses an end beyond
        array = self._slice(name)[start:stop]
        self.bytes_read += array.nbytes
        return array

    def common_dtype(self) -> np.dtype:
        """The type that all tensors are stored in, float32 where they are of several."""
        found = {self.dtype(name) for name in self.where}
        return found.pop() if len(found) == 1 else DTYPES["F32"]

    @property
    def total_bytes(self) -> int:
        return sum(int(np.prod(self.shape(n))) * self.dtype(n).itemsize for n in self.where)


def read_weight_map(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{index} is no index: it needs a weight_map {{tensor: file}}") from None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{index}: weight_map must be {{tensor: file}}")
    return names


@dataclass(frozen=True)
class Tensor:
    """One tensor to be written; `read` is called when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write_tensor_files(folder: Path, tensors: Sequence[Tensor], limit: int = FILE_BYTES) -> None:
    """`model.safetensors`, or files of at most `limit` bytes (or one tensor) with their index."""
    groups: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + tensor.nbytes > limit:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        write_tensor_file(folder / SINGLE, groups[0])
        return
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_tensor_file(folder / file, group)
        weight_map |= {tensor.name: file for tensor in group}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_tensor_file(path: Path, tensors: Iterable[Tensor]) -> None:
    tensors, header, start = list(tensors), {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        offsets = [start, start + tensor.nbytes]
        code = CODES[tensor.dtype]
        header[tensor.name] = {"dtype": code, "shape": tensor.shape, "data_offsets": offsets}
        start = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.read(), dtype=tensor.dtype)
            assert array.shape == tensor.shape, (tensor.name, array.shape, tensor.shape)
            array.tofile(file)
