"""The teacher's prompts: one YAML file a language, rendered with a problem's texts."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

import yaml

FOLDER = Path(__file__).parent / "prompts"


def load_prompts(language: str, path: Path | None = None) -> dict[str, str]:
    """The prompts of a language, or of a file of one's own with the same keys and placeholders."""
    if path is None:
        known = sorted(file.stem for file in FOLDER.glob("*.yaml"))
        if language not in known:
            raise ValueError(
                f"language={language}: there are prompts for {', '.join(known)}; "
                "give a file of your own as prompts"
            )
        path = FOLDER / f"{language}.yaml"
    prompts = _read(path)
    _check_same_form(path, prompts, _read(FOLDER / "en.yaml"))
    return prompts


def render(template: str, texts: Mapping[str, str]) -> str:
    """Put the texts in place of {name}, in one pass: braces inside a text stay as they are."""
    names = "|".join(map(re.escape, texts))
    return re.sub(rf"\{{({names})\}}", lambda match: texts[match[1]], template)


def placeholders(template: str) -> set[str]:
    """The names that a template expects."""
    return set(re.findall(r"\{([a-z_]+)\}", template))


def _read(path: Path) -> dict[str, str]:
    try:
        prompts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(prompts, dict) or not all(isinstance(t, str) for t in prompts.values()):
        raise ValueError(f"{path}: prompts should be a mapping of names to texts")
    return prompts


def _check_same_form(path: Path, prompts: dict[str, str], model: dict[str, str]) -> None:
    for name in prompts:
        if name not in model:
            near = difflib.get_close_matches(name, model, n=1, cutoff=0.0)[0]
            raise ValueError(f"{path}: unknown prompt {name}; did you mean {near}?")
    for name, template in model.items():
        if name not in prompts:
            raise ValueError(f"{path}: prompt {name} is missing")
        if placeholders(prompts[name]) != placeholders(template):
            wanted = ", ".join(sorted(placeholders(template)))
            raise ValueError(f"{path}: prompt {name} should hold the placeholders {wanted}")
