"""Dev accuracy: the part that is asked for, and what is refused."""

import json

import pytest

from medreason_jax.config import DevConfig
from medreason_jax.generate.engine import Engine
from medreason_jax.generate.requests import Completion
from medreason_jax.train.dev_accuracy import DevAccuracy


class Answering:
    """An engine that answers every second prompt right; sampled, every fourth."""

    def stream(self, params, prompts, sampling, seed):
        right = 2 if sampling.temperature == 0 else 4
        for number in reversed(range(len(prompts))):
            text = "40 mg" if number % right == 0 else "50 mg"
            yield number, Completion([text], [0.0], "stop")  # type: ignore[list-item]


class Tokenizer:
    def prompt(self, messages, prefix=""):
        return [len(messages[0]["content"])]

    def decode(self, ids):
        return f"## Thinking\n\nIt is so.\n\n## Final Response\n\n{ids[0]}"


class Policy:
    def params(self, trainable, frozen):
        return {}


def write_problems(path):
    records = [
        {"id": str(n), "question": f"drug {n}?", "answer": "40 mg", "part": ("a", "b")[n % 2]}
        for n in range(24)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make(tmp_path, **settings) -> DevAccuracy:
    config = DevConfig(problems=write_problems(tmp_path / "dev.jsonl"), **settings)
    engine: Engine = Answering()  # type: ignore[assignment]
    return DevAccuracy(config, Policy(), engine, Tokenizer())  # type: ignore[arg-type]


def test_greedy_and_sampled_answers_of_one_part_are_scored(tmp_path):
    dev = make(tmp_path, part="b", count=8, every=3)
    assert [problem["id"] for problem in dev.problems] == [str(n) for n in range(1, 17, 2)]
    assert dev.measure({}, {}) == {"dev_accuracy": 0.5, "dev_accuracy_sampled": 0.25}
    assert [unit for unit in range(1, 10) if dev.is_due(unit)] == [3, 6, 9]


def test_without_a_part_all_problems_count(tmp_path):
    assert len(make(tmp_path, count=100).problems) == 24


def test_a_part_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dev\.part='c': no problem .*allowed: \['a', 'b'\]"):
        make(tmp_path, part="c")
