"""The JSON schemas of replies, for endpoints with structured output; the parsers check the rest."""

from collections.abc import Mapping
from typing import Any

from data_gen.records import PROBLEM_SPELLING

Schema = Mapping[str, Any]


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    """Every property required and no other allowed, as strict structured output asks for."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _step(action: str, *names: str) -> dict[str, Any]:
    texts = {name: {"type": "string"} for name in names}
    return _object({"action": {"type": "string", "enum": [action]}, **texts})


REFORMAT: Schema = _object({name: {"type": "string"} for name in PROBLEM_SPELLING.values()})
STEPS: Schema = _object(
    {
        "CoT": {
            "type": "array",
            "items": {
                "anyOf": [
                    _step("Inner Thinking", "title", "content"),
                    _step("Final Conclusion", "content"),
                    _step("Verification", "content"),
                ]
            },
        }
    }
)
NATURAL_REASONING: Schema = _object({"NaturalReasoning": {"type": "string"}})
