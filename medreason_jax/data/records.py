"""The forms of training records, recognised by their fields; the only place that knows them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from medreason_jax.data.chat import ChatTokenizer, Message, Piece, Tools
from medreason_jax.data.sources import Record

Kind = Literal["text", "sft", "preference"]
Items = list[list[Piece]]  # one item, or the two of a pair


class Unusable(Exception):
    """A well-formed record that nothing can be learned from."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Form:
    """Records that hold `fields` (others are ignored), and what they become."""

    kind: Kind
    fields: tuple[str, ...]
    items: Callable[[ChatTokenizer, Record], Items]


def text_of(record: Record, name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r:.80}; allowed: a text")
    return value


def messages_of(record: Record, name: str) -> list[Message]:
    value = record[name]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"{name} is {value!r:.80}; allowed: a list of messages (role, content)")
    return value


def tools_of(record: Record) -> Tools:
    return record["tools"] if "tools" in record else None


def document(tokenizer: ChatTokenizer, record: Record) -> Items:
    text = text_of(record, "text")
    if not text.strip():
        raise Unusable("empty", "the text is empty")
    return [tokenizer.document_pieces(text)]


def answer(
    tokenizer: ChatTokenizer, messages: list[Message], thinking: str, response: str, tools: Tools
) -> Items:
    if not response.strip():
        raise Unusable("empty", "the response is empty")
    return [tokenizer.answer_pieces(messages, thinking, response, tools)]


def reasoning(tokenizer: ChatTokenizer, record: Record) -> Items:
    messages = messages_of(record, "messages")
    thinking, response = text_of(record, "thinking"), text_of(record, "response")
    return answer(tokenizer, messages, thinking, response, tools_of(record))


def published_reasoning(tokenizer: ChatTokenizer, record: Record) -> Items:
    """The spelling of the published HuatuoGPT-o1 files."""
    messages = [{"role": "user", "content": text_of(record, "Question")}]
    thinking, response = text_of(record, "Complex_CoT"), text_of(record, "Response")
    return answer(tokenizer, messages, thinking, response, None)


def chat(tokenizer: ChatTokenizer, record: Record) -> Items:
    return whole_turns(tokenizer, messages_of(record, "messages"), tools_of(record))


def whole_turns(tokenizer: ChatTokenizer, messages: list[Message], tools: Tools) -> Items:
    if not any("role" in message and message["role"] == "assistant" for message in messages):
        raise Unusable("no_answer", "no message is the assistant's")
    return [tokenizer.chat_pieces(messages, tools)]


def prompt_and_completion(tokenizer: ChatTokenizer, record: Record) -> Items:
    """Two texts (a user's turn and its answer) or two lists of messages."""
    if isinstance(record["prompt"], str):
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": text_of(record, "completion")},
        ]
        if not record["completion"].strip():
            raise Unusable("empty", "the completion is empty")
    else:
        messages = messages_of(record, "prompt") + messages_of(record, "completion")
    return whole_turns(tokenizer, messages, tools_of(record))


def pair(tokenizer: ChatTokenizer, record: Record) -> Items:
    """The chosen and the rejected answer to one prompt, each an item of its own."""
    prompt = messages_of(record, "prompt")
    items = []
    for side in ("chosen", "rejected"):
        given = record[side]
        if not isinstance(given, dict) or not {"thinking", "response"} <= set(given):
            raise ValueError(f"{side} is {given!r:.80}; allowed: an object of thinking, response")
        thinking, response = text_of(given, "thinking"), text_of(given, "response")
        items.append(tokenizer.answer_pieces(prompt, thinking, response, earlier_turns=False))
    return items


# Ordered: of a source's kind, the first form whose fields a record holds.
FORMS = (
    Form("text", ("text",), document),
    Form("sft", ("messages", "thinking", "response"), reasoning),
    Form("sft", ("Question", "Complex_CoT", "Response"), published_reasoning),
    Form("sft", ("messages",), chat),
    Form("sft", ("prompt", "completion"), prompt_and_completion),
    Form("preference", ("prompt", "chosen", "rejected"), pair),
)


def recognise(record: Record, kind: Kind) -> Form:
    """The form of a record, by the fields that are not null."""
    held = {name for name, value in record.items() if value is not None}
    fitting = [form for form in FORMS if held.issuperset(form.fields)]
    for form in fitting:
        if form.kind == kind:
            return form
    allowed = " | ".join("{" + ", ".join(f.fields) + "}" for f in FORMS if f.kind == kind)
    others = sorted({form.kind for form in fitting})
    hint = f"; it looks like kind {' or '.join(others)}" if others else ""
    raise ValueError(f"a record of kind {kind} holds {allowed}; found {sorted(held)}{hint}")


def record_items(tokenizer: ChatTokenizer, record: Record, kind: Kind, place: str) -> Items:
    """What a record becomes; a ValueError says where it stands and what is wrong with it."""
    try:
        return recognise(record, kind).items(tokenizer, record)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def record_name(record: Record, place: str) -> Any:
    return record["id"] if "id" in record else place
