"""The tokenizer contract, and conversations as segments of token ids.

The folder's own chat template writes a conversation. What it writes is cut at its special tokens:
a special token is a control id, and a text between two is encoded alone. A special token that
stands in a message, a tool or a tool call is text. An added token that is not special, such as
Qwen's `<tool_call>`, is ordinary vocabulary wherever it stands.

The cut between prompt and answer lies exactly where generation starts, so that the generation
prompt is a token prefix of the training row. Earlier answers of a training row are written as they
stand in a prompt, and count too.
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from medreason_jax.manifest import read_json_object

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINKING, FINAL_RESPONSE = "## Thinking\n\n", "## Final Response\n\n"
ROLES = ("system", "user", "assistant", "tool")
TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER_FILE, CONFIG_FILE)
TEMPLATE_FILE = "chat_template.jinja"
COPIED_FILES = (TOKENIZER_FILE, TEMPLATE_FILE, "vocab.json", "merges.txt")

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row's item, and for each whether the loss counts it."""

    ids: Sequence[int] | np.ndarray
    is_target: Sequence[bool] | np.ndarray


class Piece(NamedTuple):
    """A text or a control id. The loss counts what follows `given`; nothing where that is None."""

    content: str | int
    given: str | None = None


class ChatTokenizer:
    """Qwen2.5's tokenizer or one trained by `train_tokenizer`; read from a Hugging Face folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tokenizer = read_tokenizer(folder / TOKENIZER_FILE)
        self.tokenizer.encode_special_tokens = True  # text stays text
        added = self.tokenizer.get_added_tokens_decoder()
        self.control_ids = {token.content: id for id, token in added.items() if token.special}
        longest_first = sorted(map(re.escape, self.control_ids), key=len, reverse=True)
        self.controls = re.compile(f"({'|'.join(longest_first)})")
        self.pad_id = self._id(END_OF_TEXT)
        self.start_id, self.end_id = self._id(TURN_START), self._id(TURN_END)
        # What a model's vocabulary must hold: ids may have gaps, so not the count of tokens.
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        config = read_json_object(folder / CONFIG_FILE, "a tokenizer's configuration")
        # Base checkpoints name <|endoftext|> as their end; every model trained here ends its turns.
        self.config = config | {"eos_token": TURN_END, "pad_token": END_OF_TEXT}
        self.template_text, place = self._template_text()
        try:
            self.template = compile_template(self.template_text)
        except TemplateSyntaxError as error:
            raise ValueError(
                f"{place}: line {error.lineno} of the chat template is broken: {error.message}"
            ) from None

    def _id(self, token: str) -> int:
        if token not in self.control_ids:
            raise ValueError(f"the tokenizer in {self.folder} is not Qwen2.5's kind: no {token!r}")
        return self.control_ids[token]

    def _template_text(self) -> tuple[str, Path]:
        """The chat template and where it stands: in the config, or the file of newer folders."""
        file = self.folder / TEMPLATE_FILE
        if file.is_file():
            try:
                return file.read_text(encoding="utf-8"), file
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8 text: {error}") from None
        if not isinstance(self.config.get("chat_template"), str):
            raise ValueError(f"{self.folder} has no one chat template; write it to {TEMPLATE_FILE}")
        return self.config["chat_template"], self.folder / CONFIG_FILE

    def save(self, folder: Path) -> None:
        """Write what a model folder needs of the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in COPIED_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
        (folder / CONFIG_FILE).write_text(json.dumps(self.config, indent=2))

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
        pieces = self._pieces(messages, tools, generation_prompt=generation_prompt)
        return [token for piece in pieces for token in self._piece_ids(piece)]

    def conversation(self, messages: list[Message], thinking: str, response: str) -> Encoded:
        """A training item: loss on the assistant's texts and the ends of its turns.

        Without thinking the headings are given (they are prompt), as in the answer-only prompt
        form.
        """
        return self._as_lists(self.answer_pieces(messages, thinking, response))

    def chat(self, messages: list[Message], tools: Tools = None) -> Encoded:
        """A training item of whole turns: loss on every assistant turn and its end."""
        return self._as_lists(self.chat_pieces(messages, tools))

    def document(self, text: str) -> Encoded:
        """A pretraining document with its separator."""
        return self._as_lists(self.document_pieces(text))

    def answer_pieces(
        self,
        messages: list[Message],
        thinking: str,
        response: str,
        tools: Tools = None,
        *,
        earlier_turns: bool = True,
    ) -> list[Piece]:
        """`messages` and the answer to them; `earlier_turns`: answers in `messages` count too."""
        prompt = self._pieces(messages, tools, generation_prompt=True, targets=earlier_turns)
        if thinking:
            answer = reasoning_text(thinking, response)
        else:
            prompt, answer = [*prompt, Piece(ANSWER_ONLY)], response
        return [*prompt, Piece(answer, ""), Piece(self.end_id, "")]

    def chat_pieces(self, messages: list[Message], tools: Tools = None) -> list[Piece]:
        """Whole turns up to the end of the last answer, which is cut where generation starts."""
        pieces = self._pieces(messages, tools, targets=True)
        counted = [n for n, piece in enumerate(pieces) if piece.given is not None]
        if not counted:
            raise ValueError("no message is the assistant's; there is nothing to learn")
        start = max(n for n in counted if n - 1 not in counted)
        text, given = pieces[start]
        assert isinstance(text, str) and given is not None
        last = [Piece(given), Piece(text.removeprefix(given), "")]
        return [*pieces[:start], *last, *pieces[start + 1 : counted[-1] + 1]]

    def document_pieces(self, text: str) -> list[Piece]:
        return [Piece(text, ""), Piece(self.pad_id, "")]

    def encode_items(self, items: Sequence[Sequence[Piece]]) -> list[Encoded]:
        """Many items at once, as int32 and bool arrays; each distinct text is encoded once."""
        pieces = [piece for item in items for piece in item]
        texts = {piece.content: None for piece in pieces if isinstance(piece.content, str)}
        texts |= {piece.given: None for piece in pieces if piece.given}
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = {
            text: np.array(encoding.ids, np.int32)
            for text, encoding in zip(texts, encodings, strict=True)
        }
        return [self._joined(item, ids) for item in items]

    def _joined(self, item: Sequence[Piece], ids: dict[str, np.ndarray]) -> Encoded:
        """A token that joins the end of `given` with what follows it does not count."""
        parts, flags = [], []
        for content, given in item:
            part = np.array([content], np.int32) if isinstance(content, int) else ids[content]
            flag = np.full(len(part), given is not None)
            if given:
                flag[: len(ids[given])] = False
            parts.append(part)
            flags.append(flag)
        return Encoded(np.concatenate(parts), np.concatenate(flags))

    def _as_lists(self, pieces: Sequence[Piece]) -> Encoded:
        (item,) = self.encode_items([pieces])
        assert isinstance(item.ids, np.ndarray) and isinstance(item.is_target, np.ndarray)
        return Encoded(item.ids.tolist(), item.is_target.tolist())

    def _piece_ids(self, piece: Piece) -> list[int]:
        return [piece.content] if isinstance(piece.content, int) else self.encode(piece.content)

    def _pieces(
        self,
        messages: list[Message],
        tools: Tools,
        *,
        generation_prompt: bool = False,
        targets: bool = False,
    ) -> list[Piece]:
        """The conversation, cut at the special tokens that the template itself writes.

        One character of every special token, the bar of `<|im_end|>`, is hidden from the template
        behind a character that stands nowhere else; so no text can hold or help to build a special
        token. The hiding must not show: a template that writes other text because of it is refused.
        """
        check_list(messages)
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
        if not (targets and any(message["role"] == "assistant" for message in messages)):
            return self._cut(hidden, [], reveal)
        variables["add_generation_prompt"] = not generation_prompt
        other = self._render(variables, translate(messages, hide), translate(tools, hide))
        turns, prompt = sorted((hidden, other), key=len)
        opening = prompt.removeprefix(turns)  # what stands before an answer
        starts = [m.end() for m in re.finditer(re.escape(opening), turns)] if opening else []
        if len(starts) != sum(message["role"] == "assistant" for message in messages):
            raise ValueError(
                f"the chat template in {self.folder} does not write {opening.translate(reveal)!r} "
                "before every answer, so no loss can be put on them; train on one answer a record"
            )
        return self._cut(hidden, starts, reveal)

    def _cut(self, written: str, starts: list[int], reveal: dict[int, int]) -> list[Piece]:
        """Pieces of a rendered conversation; an answer goes from its start to the turn's end."""
        pieces, at, counts = [], 0, False
        for text in self.controls.split(written):
            if text in self.control_ids:
                id = self.control_ids[text]
                pieces.append(Piece(id, "" if counts else None))
                counts = counts and id != self.end_id
            else:
                start = next((s for s in starts if at <= s <= at + len(text)), None)
                given = "" if counts else None
                if start is not None:
                    given, counts = text[: start - at].translate(reveal), True
                pieces.append(Piece(text.translate(reveal), given))
            at += len(text)
        return pieces

    def _render(self, variables: dict[str, Any], messages: list[Message], tools: Tools) -> str:
        try:
            return self.template.render(messages=messages, tools=tools, **variables)
        except TemplateError as error:
            raise ValueError(f"the chat template in {self.folder} refuses this: {error}") from error

    def _check(self, messages: list[Message], tools: Tools) -> None:
        for message in messages:
            check_message(message)
        if tools is not None and not is_list_of_objects(tools):
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


def read_tokenizer(file: Path) -> Tokenizer:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; a tokenizer needs it")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower kind
        raise ValueError(
            f"{file} is no file of the tokenizers library: {error}; copy it again"
        ) from None


def check_list(messages: Any) -> None:
    if not is_list_of_objects(messages):
        raise ValueError(
            f"messages is {messages!r:.80}; allowed: a list of objects with role and content"
        )
    if not messages:
        raise ValueError("messages is empty; a conversation needs at least one")


def is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


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
    if calls is not None and not (isinstance(calls, list) and all(map(is_tool_call, calls))):
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
