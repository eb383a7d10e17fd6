"""The tokenizer contract, and conversations as segments of token ids.

A conversation is a list of segments: control ids, or text encoded alone (a special token that
stands
in a text is text). The cut between prompt and answer lies exactly where generation starts, so that
the generation prompt is a token prefix of the training row.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINKING, FINAL_RESPONSE = "## Thinking\n\n", "## Final Response\n\n"
ROLES = ("system", "user", "assistant")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row's item, and for each whether the loss counts it."""

    ids: list[int]
    is_target: list[bool]


class ChatTokenizer:
    """Qwen2.5's tokenizer or one trained by `train_tokenizer`; read from a Hugging Face folder."""

    def __init__(self, folder: Path):
        for name in TOKENIZER_FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} does not exist; a tokenizer needs it")
        self.folder = folder
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True  # text stays text
        self.config = json.loads((folder / "tokenizer_config.json").read_text())
        self.pad_id = self._id(END_OF_TEXT)
        self.start_id, self.end_id = self._id(TURN_START), self._id(TURN_END)
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.default_system = self._default_system()

    def _id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(
                f"the tokenizer in {self.folder} has no token {token!r}; it must be Qwen2.5's kind"
            )
        return found

    def _template(self) -> str:
        """The chat template: a field of the config, or the file that newer folders hold."""
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        if "chat_template" not in self.config:
            raise ValueError(f"{self.folder} has no chat template; add chat_template.jinja")
        return self.config["chat_template"]

    def _default_system(self) -> str | None:
        """The system text that the chat template adds to a conversation without one, if any."""
        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
            self._template()
        )
        text = template.render(messages=[{"role": "user", "content": "x"}], tools=None)
        head = f"{TURN_START}system\n"
        return text[len(head) : text.index(TURN_END)] if text.startswith(head) else None

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def prompt(self, messages: list[dict[str, str]], prefix: str = "") -> list[int]:
        """Ids up to where generation starts; `prefix` is assistant text that is already given."""
        if self.default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        ids: list[int] = []
        for message in messages:
            if message["role"] not in ROLES or set(message) != {"role", "content"}:
                raise ValueError(
                    f"a message holds a role of {ROLES} and a content; found {message!r}"
                )
            text = f"{message['role']}\n{message['content']}"
            ids += [self.start_id, *self.encode(text), self.end_id, *self.encode("\n")]
        return [*ids, self.start_id, *self.encode("assistant\n"), *self.encode(prefix)]

    def conversation(self, messages, thinking: str, response: str) -> Encoded:
        """A training item: loss on the assistant's text and the end of its turn.

        Without thinking the headings are given (they are prompt), as in the answer-only prompt
        form.
        """
        if thinking:
            prompt, answer = self.prompt(messages), reasoning_text(thinking, response)
        else:
            prompt, answer = self.prompt(messages, ANSWER_ONLY), response
        target = [*self.encode(answer), self.end_id]
        ids = prompt + target
        return Encoded(ids, [False] * len(prompt) + [True] * len(target))

    def document(self, text: str) -> Encoded:
        """A pretraining document with its separator."""
        ids = [*self.encode(text), self.pad_id]
        return Encoded(ids, [True] * len(ids))


def reasoning_text(thinking: str, response: str) -> str:
    return f"{THINKING}{thinking}\n\n{FINAL_RESPONSE}{response}"


# Assistant text given to a model that must answer without explaining.
ANSWER_ONLY = f"{THINKING}\n\n{FINAL_RESPONSE}"
