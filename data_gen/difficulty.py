"""Questions that small models answer anyway teach nothing (HuatuoGPT-o1, arXiv 2412.18925, §2).

A question is too easy when every one of the models answers it right. They are asked one after the
other, and no more of them once one has failed.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data_gen.answers import judge
from data_gen.prompting import render
from data_gen.records import Mcq, question_text
from data_gen.teacher import Teacher


class Attempts(NamedTuple):
    """What the models' answers are worth, by the model's name, and the keys of their calls."""

    outcomes: dict[str, str]
    calls: list[str]
    too_easy: bool


class DifficultyFilter:
    """Asks models for the letter of the right option; the rule alone judges what they say."""

    def __init__(self, models: Sequence[tuple[str, Teacher]], prompts: Mapping[str, str]) -> None:
        self._models = models
        self._prompts = prompts

    async def attempt(self, mcq: Mcq) -> Attempts:
        """How the models do; an answer that cannot be judged does not make a question easy."""
        prompt = render(self._prompts["answer_options"], {"question": question_text(mcq)})
        outcomes: dict[str, str] = {}
        calls: list[str] = []
        for name, model in self._models:
            call = await model.ask([{"role": "user", "content": prompt}])
            calls.append(call.key)
            outcomes[name] = judge(call.answer, mcq.answer_idx, mcq.options).outcome
            if outcomes[name] != "true":
                return Attempts(outcomes, calls, False)
        return Attempts(outcomes, calls, bool(self._models))
