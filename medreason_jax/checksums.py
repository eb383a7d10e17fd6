"""Size and checksum of every file of a folder: written when it is complete, checked before it is
trusted. Orbax alone restores a flipped bit without a word."""

import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from medreason_jax.manifest import write_json

CHECKSUMS = "checksums.json"
READ_BYTES = 4_000_000
READERS = 4  # zlib leaves the interpreter lock while it computes


class FileSum(BaseModel):
    """What a file has to be."""

    model_config = ConfigDict(strict=True, extra="forbid")
    bytes: int
    crc32: int


class Checksums(BaseModel):
    """What a folder has to hold, by paths relative to it."""

    model_config = ConfigDict(strict=True, extra="forbid")
    files: dict[str, FileSum]


def write_checksums(folder: Path, except_for: Collection[str]) -> None:
    """List every file of `folder`, but not those of its top named in `except_for`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    names = [name for name in names if name not in except_for]
    with ThreadPoolExecutor(READERS) as pool:
        sums = list(pool.map(lambda name: sum_file(folder / name), names))
    found = Checksums(files=dict(zip(names, sums, strict=True)))
    write_json(folder / CHECKSUMS, found.model_dump())


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """The first listed file that is not as it was written, and what is wrong; None if all are.

    Looks at each `parts`-th file by size from the `part`-th on, so that processes share the work.
    """
    try:
        listed = Checksums.model_validate_json((folder / CHECKSUMS).read_bytes()).files
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read: {str(error).splitlines()[0]}"
    names = sorted(listed, key=lambda name: (-listed[name].bytes, name))[part::parts]
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda name: compare(folder / name, name, listed[name]), names)
        return next((damage for damage in found if damage is not None), None)


def compare(path: Path, name: str, wanted: FileSum) -> str | None:
    try:
        size = path.stat().st_size
        if size != wanted.bytes:
            return f"{name} has {size} bytes, {wanted.bytes} were written"
        found = sum_file(path)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    if found != wanted:
        return f"{name} has the checksum {found.crc32:08x}, not {wanted.crc32:08x}"
    return None


def sum_file(path: Path) -> FileSum:
    size, crc = 0, 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return FileSum(bytes=size, crc32=crc)
