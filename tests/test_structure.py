"""The arrows between the parts of the project, held by reading its source.

Every check takes the root of a tree and returns its violations, so that one test can run it on the
project and another on a planted violation.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FILE = 600

# What data_gen must do without, so that it installs and runs on a machine that has none of it.
BARRED_FROM_DATA_GEN = ("medreason_jax", "jax", "jaxlib", "flax", "torch", "transformers")
OPEN_TO_MEDREASON = ("answers", "verifiers", "teacher", "records", "formulary_recital")
BARRED_FROM_LOSSES = (
    "medreason_jax.qwen2",
    "medreason_jax.train.head",
    "medreason_jax.train.objectives",
    "flax.nnx",
    "transformers",
    "torch",
)
# What `judge` is made of: the standard library and itself, without input or output.
JUDGING = ("data_gen.answer", "data_gen.verdict")
WITHOUT_INPUT_OR_OUTPUT = (
    "medreason_jax/qwen2/model.py",
    "medreason_jax/qwen2/attention.py",
    "medreason_jax/qwen2/lora.py",
    "medreason_jax/train/head.py",
    "medreason_jax/train/losses.py",
    "medreason_jax/train/objectives.py",
    "medreason_jax/train/step.py",
    "medreason_jax/train/optimizer.py",
    "medreason_jax/generate/sampling.py",
    "medreason_jax/rl/advantage.py",
)
INPUT_OUTPUT_MODULES = (
    *("fsspec", "httpx", "io", "os", "pathlib", "requests", "shutil"),
    *("socket", "subprocess", "tempfile", "urllib"),
)
INPUT_OUTPUT_CALLS = {"open", "print", "input"}
INPUT_OUTPUT_METHODS = {
    *("open", "read_text", "write_text", "read_bytes", "write_bytes", "tofile", "savez"),
}
NAMES_THE_MESH_AXES = ("medreason_jax/mesh.py", "medreason_jax/config.py")
CONFIG_FILES = ("medreason_jax/config.py", "medreason_jax/recipe.py", "data_gen/config.py")

# Traces of one machine or one day's work; the reader of a file can look none of them up.
BARRED_TEXT = {
    "absolute path of one machine": r"(?<![\w.}>-])/(?:work|root|home|Users)/\w+",
    "number of an issue": r"\b(?:issue|pull request|PR)s? ?#?\d+\b|(?<![\w&/])(?<!\]\()#\d{1,5}\b",
    "host of a package registry": r"pypi\.org|pythonhosted\.org|download\.pytorch|anaconda\.org",
    "note to self": r"\b(?:TODO|FIXME|XXX)\b",
    "document that is not in the tree": r"\b(?:DESIGN|STYLE)\.md\b",
}
TEXT_SUFFIXES = {"", ".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".j2", ".txt", ".lock", ".cfg"}


def python_files(root: Path, *folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, lazy ones included; `from a import b` gives `a.b`."""
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def lies_in(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def barred_imports(root: Path, paths: list[Path], barred: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(root)}:{line} imports {name}"
        for path in paths
        for line, name in imported_names(root, path)
        if lies_in(name, barred)
    ]


def existing(root: Path, names: tuple[str, ...]) -> list[Path]:
    return [root / name for name in names if (root / name).exists()]


def data_gen_reaching_out(root: Path) -> list[str]:
    return barred_imports(root, python_files(root, "data_gen"), BARRED_FROM_DATA_GEN)


def medreason_reaching_into_data_gen(root: Path) -> list[str]:
    allowed = tuple(f"data_gen.{name}" for name in OPEN_TO_MEDREASON)
    return [
        f"{path.relative_to(root)}:{line} imports {name}"
        for path in python_files(root, "medreason_jax")
        for line, name in imported_names(root, path)
        if lies_in(name, ("data_gen",)) and not lies_in(name, allowed)
    ]


def losses_knowing_a_model(root: Path) -> list[str]:
    paths = existing(root, ("medreason_jax/train/losses.py",))
    return barred_imports(root, paths, BARRED_FROM_LOSSES)


def judging_files(root: Path) -> list[Path]:
    found = [*(root / "data_gen").glob("answer*.py"), root / "data_gen/verdict.py"]
    return sorted(path for path in found if path.exists())


def answers_beyond_the_standard_library(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{line} imports {name}"
        for path in judging_files(root)
        for line, name in imported_names(root, path)
        if name.split(".")[0] not in sys.stdlib_module_names and not name.startswith(JUDGING)
    ]


def input_or_output(root: Path) -> list[str]:
    paths = [*existing(root, WITHOUT_INPUT_OR_OUTPUT), *judging_files(root)]
    found = barred_imports(root, paths, INPUT_OUTPUT_MODULES)
    for path in paths:
        for call in (node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)):
            match call.func:
                case ast.Name(id=name) if name in INPUT_OUTPUT_CALLS:
                    found.append(f"{path.relative_to(root)}:{call.lineno} calls {name}")
                case ast.Attribute(attr=name) if name in INPUT_OUTPUT_METHODS:
                    found.append(f"{path.relative_to(root)}:{call.lineno} calls .{name}")
    return found


def string_literals(node: ast.AST) -> Iterator[tuple[int, str]]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.lineno, part.value


def is_partition_spec(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name(id="P" | "PartitionSpec")):
            return True
        case ast.Call(func=ast.Attribute(attr="P" | "PartitionSpec")):
            return True
    return False


def mesh_axes_named_elsewhere(root: Path) -> list[str]:
    """`fsdp` and `tensor` anywhere; `data`, a common word, inside a PartitionSpec."""
    found = set()
    for path in python_files(root, "medreason_jax"):
        name = path.relative_to(root).as_posix()
        if name in NAMES_THE_MESH_AXES:
            continue
        tree = parse(path)
        found |= {(name, *hit) for hit in string_literals(tree) if hit[1] in ("fsdp", "tensor")}
        for spec in filter(is_partition_spec, ast.walk(tree)):
            found |= {(name, *hit) for hit in string_literals(spec) if hit[1] == "data"}
    return [f"{name}:{line} names the mesh axis {axis!r}" for name, line, axis in sorted(found)]


def files_that_are_two_topics(root: Path) -> list[str]:
    folders = ("data_gen", "medreason_jax", "tests", "tools", "launch", "benchmarks")
    lengths = {path: path.read_text().count("\n") for path in python_files(root, *folders)}
    return [
        f"{path.relative_to(root)}: {n} lines" for path, n in lengths.items() if n > LONGEST_FILE
    ]


def packages_without_init(root: Path) -> list[str]:
    folders = {path.parent for path in python_files(root, "data_gen", "medreason_jax")}
    return [
        str(folder.relative_to(root)) for folder in folders if not (folder / "__init__.py").exists()
    ]


def project_text(root: Path) -> Iterator[Path]:
    folders = ("data_gen", "medreason_jax", "tests", "tools", "launch", "benchmarks", "configs")
    inside = (path for folder in (*folders, "docs", ".ci") for path in (root / folder).rglob("*"))
    for path in sorted([*root.glob("*"), *inside]):
        if path.is_file() and path.suffix in TEXT_SUFFIXES and path != Path(__file__).resolve():
            yield path


def barred_text(root: Path) -> list[str]:
    found = []
    for path in project_text(root):
        lines = path.read_text(encoding="utf-8").splitlines()
        for reason, pattern in BARRED_TEXT.items():
            for number, line in enumerate(lines, 1):
                if hit := re.search(pattern, line):
                    found.append(f"{path.relative_to(root)}:{number} {reason}: {hit.group()!r}")
    return found


def config_classes(tree: ast.Module) -> list[ast.ClassDef]:
    """Classes that descend from pydantic's BaseModel, by the names of their parents."""
    known = {"BaseModel"}
    classes = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            parents = {ast.unparse(parent).split("[")[0].split(".")[-1] for parent in node.bases}
            if parents & known:
                known.add(node.name)
                classes.append(node)
    return classes


def config_fields(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in config_classes(tree):
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                if (
                    "ClassVar" not in ast.unparse(part.annotation)
                    and part.target.id != "model_config"
                ):
                    yield node.name, part.target.id


def is_validator(node: ast.AST) -> bool:
    """Checking a value is not using it: reads inside a validator do not count."""
    return isinstance(node, ast.FunctionDef) and any(
        "validator" in ast.unparse(decorator) for decorator in node.decorator_list
    )


def names_read(node: ast.AST) -> Iterator[str]:
    if is_validator(node):
        return
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield node.attr
    if isinstance(node, ast.keyword) and node.arg == "discriminator":
        yield from (value for _, value in string_literals(node.value))
    for child in ast.iter_child_nodes(node):
        yield from names_read(child)


def config_fields_nobody_reads(root: Path) -> list[str]:
    sources = python_files(root, "data_gen", "medreason_jax")
    read = {name for path in sources for name in names_read(parse(path))}
    return [
        f"{path.relative_to(root)}: {owner}.{field}"
        for path in existing(root, CONFIG_FILES)
        for owner, field in config_fields(parse(path))
        if field not in read
    ]


CHECKS: dict[Callable[[Path], list[str]], tuple[str, str]] = {
    # check: (file, source) of a violation it has to see
    data_gen_reaching_out: ("data_gen/a.py", "def f():\n    import jax.numpy"),
    medreason_reaching_into_data_gen: ("medreason_jax/a.py", "from data_gen import search"),
    losses_knowing_a_model: ("medreason_jax/train/losses.py", "from ..qwen2 import model"),
    answers_beyond_the_standard_library: ("data_gen/answer_text.py", "import regex"),
    input_or_output: ("medreason_jax/rl/advantage.py", "def f(p):\n    return p.read_text()"),
    mesh_axes_named_elsewhere: ("medreason_jax/a.py", "spec = P(None, ('data', 'x'))"),
    files_that_are_two_topics: ("tests/test_a.py", "x = 1\n" * 601),
    packages_without_init: ("medreason_jax/new/a.py", ""),
    barred_text: ("docs/log.md", "seen in issue 12"),
    config_fields_nobody_reads: (
        "data_gen/config.py",
        "class A(BaseModel):\n x: int\n @field_validator('x')\n def f(self): return self.x",
    ),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_project_has_none_of(check: Callable[[Path], list[str]]):
    violations = check(ROOT)
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_planted_violation_is_seen(check: Callable[[Path], list[str]], tmp_path: Path):
    name, source = CHECKS[check]
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert check(tmp_path) != []
    path.write_text("")
    if check is not packages_without_init:
        assert check(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("medreason_jax/rl/advantage.py", "import pathlib"),
        ("medreason_jax/rl/advantage.py", "from os import path"),
        ("medreason_jax/rl/advantage.py", "def f():\n    return open('x')"),
    ],
)
def test_every_way_to_the_disk_is_seen(name: str, source: str, tmp_path: Path):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert input_or_output(tmp_path) != []


def test_axis_names_are_free_outside_partition_specs_and_in_the_mesh(tmp_path: Path):
    package = tmp_path / "medreason_jax"
    package.mkdir()
    (package / "mesh.py").write_text("AXES = ('data', 'fsdp', 'tensor')")
    (package / "a.py").write_text("rows = read('data')")
    assert mesh_axes_named_elsewhere(tmp_path) == []
    (package / "a.py").write_text("axis = 'tensor'")
    assert mesh_axes_named_elsewhere(tmp_path) != []


@pytest.mark.parametrize(
    "line",
    [
        "see /" + "home/me/run",
        "index-url = pypi" + ".org",
        "mends #" + "12",
        "# TO" + "DO: later",
        "as DESIGN" + ".md says",
    ],
)
def test_every_kind_of_barred_text_is_seen(line: str, tmp_path: Path):
    (tmp_path / "a.md").write_text(line)
    assert barred_text(tmp_path) != []


def test_data_gen_imports_where_jax_cannot_be_imported():
    program = f"""
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BARRED_FROM_DATA_GEN!r}:
            raise ImportError(f"{{name}} is not installed")

sys.meta_path.insert(0, Blocker())
import data_gen
for module in pkgutil.walk_packages(data_gen.__path__, "data_gen."):
    if not module.name.endswith(".__main__"):
        importlib.import_module(module.name)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_lock_pins_every_requirement_and_names_no_place():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.!]+", pin)] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [
        *project["dependencies"],
        *(line for e in ("train", "cpu", "export", "test") for line in extras[e]),
    ]
    names = {re.split(r"[\[<>=]", line)[0].lower().replace("_", "-") for line in needed} - {
        "medreason"
    }
    assert names - {pin.split("==")[0].lower().replace("_", "-") for pin in pins} == set()


def test_configs_are_found_as_package_data():
    assert (files("medreason_jax.configs") / "recipes").is_dir()
