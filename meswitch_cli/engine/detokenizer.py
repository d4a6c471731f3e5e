"""From tokens to text, a token at a time."""

from __future__ import annotations

from collections.abc import Sequence

from meswitch_cli.engine.contract import Tokenizer

#: Prompt tokens that the first token is decoded after, so that its leading space is known.
CONTEXT_TOKENS = 5
_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Decodes a continuation incrementally; a character is given out when all its tokens are there."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-CONTEXT_TOKENS:])
        self._start, self._told = 0, len(self._tokens)

    def push(self, token: int) -> str:
        """Add a token; return the characters that it completes."""
        self._tokens.append(token)
        before, after = self._decode(self._told), self._decode(len(self._tokens))
        if len(after) <= len(before) or after.endswith(_INCOMPLETE):
            return ""
        self._start, self._told = self._told, len(self._tokens)
        return after[len(before) :]

    def flush(self) -> str:
        """What is left when no token follows: an incomplete character becomes U+FFFD, as decoding it whole would."""
        before, after = self._decode(self._told), self._decode(len(self._tokens))
        self._start, self._told = self._told, len(self._tokens)
        return after[len(before) :]

    def _decode(self, stop: int) -> str:
        return self._tokenizer.decode(self._tokens[self._start : stop], skip_special_tokens=True)


class StopStrings:
    """Holds text back while it may still become a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add text; return what can no longer be part of a stop string. `found` is set at the first stop string."""
        if not self._stops:
            return text
        self._held += text
        places = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if places:
            place, self.found = min(places, key=lambda item: (item[0], -len(item[1])))
            result, self._held = self._held[:place], ""
            return result
        keep = max(self._overlap(stop) for stop in self._stops)
        result, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return result

    def flush(self) -> str:
        result, self._held = self._held, ""
        return result

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
