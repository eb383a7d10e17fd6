"""Text from tokens as they come: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Sequence

from tokenizers import decoders

from medreason_jax.data.chat import ChatTokenizer


def byte_alphabet() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


class TokenTexts:
    """What each token of a byte-level tokenizer stands for."""

    def __init__(self, tokenizer: ChatTokenizer):
        self._tokenizer = tokenizer.tokenizer
        if not isinstance(self._tokenizer.decoder, decoders.ByteLevel):
            raise ValueError(
                f"the tokenizer in {tokenizer.folder} decodes by {self._tokenizer.decoder}; "
                "a stream of text needs a byte-level one, as Qwen2.5's is"
            )
        self._control = {id: name for name, id in tokenizer.control_ids.items()}
        self._alphabet = byte_alphabet()
        self._seen: dict[int, bytes] = {}

    def raw(self, id: int) -> bytes:
        """The token's bytes: none for a control token and an id that no token has."""
        if id not in self._seen:
            token = None if id in self._control else self._tokenizer.id_to_token(id)
            self._seen[id] = b"" if token is None else self._bytes(token)
        return self._seen[id]

    def _bytes(self, token: str) -> bytes:
        if all(char in self._alphabet for char in token):
            return bytes(self._alphabet[char] for char in token)
        return token.encode()  # an added token

    def name(self, id: int) -> str:
        r"""How log-probs name the token; bytes that are no text are `bytes:\xe2\x82`."""
        if id in self._control:
            return self._control[id]
        text = self.whole(id)
        if text is None:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.raw(id))
        return text or f"token_id:{id}"

    def whole(self, id: int) -> str | None:
        """The token's text; None where it holds parts of characters."""
        try:
            return self.raw(id).decode()
        except UnicodeDecodeError:
            return None

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.raw, ids)).decode(errors="replace")


class TextStream:
    """The text of one answer: what is sure is released, what may become a stop string is held.

    `decoded` and `released` count characters; `begins` is where the text of the last token begins.
    The text ends before the first stop string.
    """

    def __init__(self, texts: TokenTexts, stops: Sequence[str]):
        self._texts, self._stops = texts, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.decoded = self.released = self.begins = 0
        self.stopped = False

    def push(self, id: int) -> str:
        before, raw = self.decoded, self._texts.raw(id)
        text = self._add(raw, last=False)
        own = self._texts.whole(id)  # a broken character may have come before it
        self.begins = before if own is None else self.decoded - len(own)
        return text

    def finish(self) -> str:
        """What is left when no token follows; a broken character is U+FFFD."""
        return self._add(b"", last=True)

    def _add(self, raw: bytes, *, last: bool) -> str:
        new = self._decoder.decode(raw, last)
        self.decoded += len(new)
        self._held += new
        starts = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(starts)
        end = min(starts) if starts else len(self._held) - (0 if last else self._possible_stop())
        text, self._held = self._held[:end], "" if starts else self._held[end:]
        self.released += len(text)
        return text

    def _possible_stop(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
