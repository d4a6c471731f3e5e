"""The text and the bytes of single tokens, for the two shapes of log-probabilities."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from meswitch_cli.engine.contract import Tokenizer, TokenLogprob

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

#: JSON has no infinity; OpenAI's API writes this for a token that could not be chosen.
LEAST_LOGPROB = -9999.0


class TokenTexts:
    """What each token of a vocabulary stands for. A token may be part of a character; its bytes never lie."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._byte_level = decoder is not None and '"ByteLevel"' in decoder.__getstate__().decode()
        self._added = set(getattr(tokenizer, "get_added_vocab", dict)().values())

    def bytes(self, token: int) -> bytes:
        """The bytes of a token, as they stand in the middle of a text."""
        symbol = self._tokenizer.convert_ids_to_tokens(token)
        if symbol is None:  # the model has more rows than the tokenizer has tokens
            return b""
        if token in self._added:
            return str(symbol).encode()
        if self._byte_level:
            table = _byte_of_character()
            if all(character in table for character in symbol):
                return bytes(table[character] for character in symbol)
        if match := _BYTE_TOKEN.fullmatch(symbol):
            return bytes([int(match[1], 16)])
        return str(symbol).replace("▁", " ").encode()

    def text(self, token: int) -> str:
        """The text of a token; U+FFFD stands for bytes that are no character by themselves."""
        return self.bytes(token).decode("utf-8", "replace")

    def chat(self, logprob: TokenLogprob) -> dict[str, Any]:
        """An element of `logprobs.content` of a chat completion."""
        top = [self._entry(token, value) for token, value in logprob.top]
        return self._entry(logprob.token, logprob.logprob) | {"top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.text(token), "logprob": finite(logprob), "bytes": list(self.bytes(token))}

    def completion(self, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        """`logprobs` of a text completion whose first token begins at character `offset`.

        Alternatives are a mapping from text in OpenAI's format: of two tokens with one text, the likelier is told.
        """
        texts = [self.text(logprob.token) for logprob in logprobs]
        return {
            "tokens": texts,
            "token_logprobs": [finite(logprob.logprob) for logprob in logprobs],
            "top_logprobs": [self._top(logprob) for logprob in logprobs],
            "text_offset": list(itertools.accumulate(map(len, texts), initial=offset))[: len(texts)],
        }

    def prompt(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], special: bool) -> dict[str, Any]:
        """`logprobs` of an echoed prompt: as `completion`, with null for the first token, which follows nothing.

        `special` is whether the echo holds the texts of special tokens.
        """
        texts = [self.text(token) for token in tokens]
        shown = [special or token not in self._added for token in tokens]
        lengths = [len(text) * told for text, told in zip(texts, shown, strict=True)]
        return {
            "tokens": texts,
            "token_logprobs": [None, *(finite(logprob.logprob) for logprob in logprobs)],
            "top_logprobs": [None, *(self._top(logprob) for logprob in logprobs)],
            "text_offset": list(itertools.accumulate(lengths, initial=0))[: len(texts)],
        }

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, value in (*logprob.top, (logprob.token, logprob.logprob)):
            top.setdefault(self.text(token), finite(value))
        return top


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the other 68 the characters from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


def system_fingerprint(digest: str) -> str | None:
    """What OpenAI's API calls so: it changes when the weights that answer do; None for the base."""
    return f"fp_{digest[:16]}" if digest else None


def dumps(value: Any) -> bytes:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
