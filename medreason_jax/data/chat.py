"""The tokenizer contract, and conversations as segments of token ids.

The folder's own chat template writes a conversation. What it writes is cut at its special tokens:
a special token is a control id, and a text between two is encoded alone. A special token that
stands in a message, a tool or a tool call is text. An added token that is not special, such as
Qwen's `<tool_call>`, is ordinary vocabulary wherever it stands.

The cut between prompt and answer lies exactly where generation starts, so that the generation
prompt is a token prefix of the training row.
"""

import json
import re
import shutil
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINKING, FINAL_RESPONSE = "## Thinking\n\n", "## Final Response\n\n"
ROLES = ("system", "user", "assistant", "tool")
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
COPIED_FILES = ("tokenizer.json", TEMPLATE_FILE, "vocab.json", "merges.txt")

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None


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
        added = self.tokenizer.get_added_tokens_decoder()
        self.control_ids = {token.content: id for id, token in added.items() if token.special}
        longest_first = sorted(map(re.escape, self.control_ids), key=len, reverse=True)
        self.controls = re.compile(f"({'|'.join(longest_first)})")
        self.pad_id = self._id(END_OF_TEXT)
        self.start_id, self.end_id = self._id(TURN_START), self._id(TURN_END)
        self.vocab_size = self.tokenizer.get_vocab_size()
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        # Base checkpoints name <|endoftext|> as their end; every model trained here ends its turns.
        self.config = config | {"eos_token": TURN_END, "pad_token": END_OF_TEXT}
        self.template_text = self._template_text()
        self.template = compile_template(self.template_text)

    def _id(self, token: str) -> int:
        if token not in self.control_ids:
            raise ValueError(f"the tokenizer in {self.folder} is not Qwen2.5's kind: no {token!r}")
        return self.control_ids[token]

    def _template_text(self) -> str:
        """The chat template: a field of the config, or the file that newer folders hold."""
        file = self.folder / TEMPLATE_FILE
        if file.is_file():
            return file.read_text(encoding="utf-8")
        if not isinstance(self.config.get("chat_template"), str):
            raise ValueError(f"{self.folder} has no one chat template; write it to {TEMPLATE_FILE}")
        return self.config["chat_template"]

    def save(self, folder: Path) -> None:
        """Write what a model folder needs of the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in COPIED_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
        (folder / "tokenizer_config.json").write_text(json.dumps(self.config, indent=2))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def prompt(self, messages: list[Message], prefix: str = "", tools: Tools = None) -> list[int]:
        """Ids up to where generation starts; `prefix` is assistant text that is already given."""
        return self.turns(messages, tools, generation_prompt=True) + self.encode(prefix)

    def turns(
        self, messages: list[Message], tools: Tools = None, *, generation_prompt: bool = False
    ) -> list[int]:
        """Ids of whole turns, as the chat template writes them."""
        segments = self._segments(messages, tools, generation_prompt)
        return [token for segment in segments for token in segment]

    def conversation(self, messages: list[Message], thinking: str, response: str) -> Encoded:
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

    def _segments(
        self, messages: list[Message], tools: Tools, generation_prompt: bool
    ) -> list[list[int]]:
        """The conversation, cut at the special tokens that the template itself writes.

        One character of every special token, the bar of `<|im_end|>`, is hidden from the template
        behind a character that stands nowhere else; so no text can hold or help to build a special
        token. The hiding must not show: a template that writes other text because of it is refused.
        """
        messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
        self._check(messages, tools)
        variables = {k: v for k, v in self.config.items() if k.endswith("_token") and v is not None}
        variables["add_generation_prompt"] = generation_prompt
        variables["strftime_now"] = datetime.now().strftime  # one time for both renderings
        shown = self._render(variables, messages, tools)
        unused = (chr(c) for c in range(0xF0000, 0xFFFFE) if chr(c) not in shown)
        marks = {"|" if "|" in token else token[0] for token in self.control_ids}
        hide = {ord(mark): next(unused) for mark in marks}
        reveal = {ord(stand_in): mark for mark, stand_in in hide.items()}
        hidden = self._render(variables, translate(messages, hide), translate(tools, hide))
        if hidden.translate(reveal) != shown:
            raise ValueError(
                f"the chat template in {self.folder} tests or changes {sorted(marks)} in a text "
                "(a search, an escape, a sort); use a template that writes texts as they are"
            )
        control = self.control_ids
        return [
            [control[piece]] if piece in control else self.encode(piece.translate(reveal))
            for piece in self.controls.split(hidden)
        ]

    def _render(self, variables: dict[str, Any], messages: list[Message], tools: Tools) -> str:
        try:
            return self.template.render(messages=messages, tools=tools, **variables)
        except TemplateError as error:
            raise ValueError(f"the chat template in {self.folder} refuses this: {error}") from error

    def _check(self, messages: list[Message], tools: Tools) -> None:
        if not messages:
            raise ValueError("messages is empty; a conversation needs at least one")
        for message in messages:
            check_message(message)
        if tools is not None and not all(isinstance(tool, dict) for tool in tools):
            raise ValueError(f"tools is {tools!r:.200}; allowed: a list of JSON schemas")
        calls = any(message.get("tool_calls") for message in messages)
        for name, given in (("tools", tools), ("tool_calls", calls)):
            if given and name not in self.template_text:
                raise ValueError(
                    f"the chat template in {self.folder} never reads {name}; leave them out"
                )


class GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text in some templates; here it is only its text."""

    tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType]

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(text: str) -> Template:
    """A chat template in the environment that `transformers` gives it."""
    extensions = [GenerationBlock, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(text)


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def check_message(message: Message) -> None:
    """Refuse what no chat template of Qwen2.5's kind reads."""
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"role is {role!r:.80}; allowed: {', '.join(ROLES)}")
    allowed = ("role", "content", "tool_calls") if role == "assistant" else ("role", "content")
    for field, value in message.items():
        if field not in allowed:
            raise ValueError(
                f"the {role}'s {field} is {value!r:.80}; allowed fields: {', '.join(allowed)}"
            )
    content, calls = message.get("content"), message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls):
        raise ValueError(f"the {role}'s content is {content!r:.80}; allowed: a text")
    if calls is not None and not all(map(is_tool_call, calls)):
        raise ValueError(
            f"tool_calls is {calls!r:.200}; allowed: a list of calls, each with "
            "a name and arguments as an object (not as its JSON text)"
        )


def is_tool_call(call: Any) -> bool:
    """`{"name", "arguments"}`, alone or as the `function` of a call."""
    if isinstance(call, dict) and "function" in call:
        call = call["function"]
    if not isinstance(call, dict):
        return False
    return isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)


def translate(value: Any, table: dict[int, str]) -> Any:
    """`str.translate` on every text of a JSON value."""
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, list):
        return [translate(item, table) for item in value]
    if isinstance(value, dict):
        return {translate(key, table): translate(item, table) for key, item in value.items()}
    return value


def reasoning_text(thinking: str, response: str) -> str:
    return f"{THINKING}{thinking}\n\n{FINAL_RESPONSE}{response}"


# Assistant text given to a model that must answer without explaining.
ANSWER_ONLY = f"{THINKING}\n\n{FINAL_RESPONSE}"
