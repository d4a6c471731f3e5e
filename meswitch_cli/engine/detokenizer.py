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

    def push_shown(self, token: int) -> str:
        """Add a special token whose text is shown; return that, behind what is held back."""
        rest = self.pending()
        self._tokens.append(token)
        self._start, self._told = len(self._tokens) - 1, len(self._tokens)
        return rest + self.left_out(token)

    def pending(self) -> str:
        """What is held back: an incomplete character is U+FFFD, as decoding it whole would have it."""
        before, after = self._decode(self._told), self._decode(len(self._tokens))
        return after[len(before) :]

    def flush(self) -> str:
        """What is left when no token follows."""
        rest = self.pending()
        self._start, self._told = self._told, len(self._tokens)
        return rest

    def left_out(self, token: int) -> str:
        """The text of a special token, which the answer leaves out; empty for every other token."""
        shown, whole = (self._tokenizer.decode([token], skip_special_tokens=skip) for skip in (True, False))
        return "" if shown == whole else whole

    def _decode(self, stop: int) -> str:
        return self._tokenizer.decode(self._tokens[self._start : stop], skip_special_tokens=True)


class StopStrings:
    """Holds text back while it may still become a stop string.

    A stop string is looked for in the text as it is shown, and in the text with its special tokens in their places.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        # The end of the text with special tokens, and how much of the shown text stood before each character of it.
        self._whole, self._places = "", list[int]()
        self._given = 0
        self.found: str | None = None

    def __bool__(self) -> bool:
        return bool(self._stops)

    def push(self, text: str, special: str = "") -> str:
        """Add text, or a special token; return the text that can no longer be part of a stop string.

        `found` is set at the first stop string, and what stands before it is returned.
        """
        if not self._stops:
            return text
        before = self._given + len(self._held)
        self._held += text
        self._whole += text + special
        self._places += [*range(before, before + len(text)), *[before + len(text)] * len(special)]
        ends = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        ends += [(self._place(self._whole.find(stop)), stop) for stop in self._stops if stop in self._whole]
        if ends:
            place, self.found = min(ends, key=lambda item: (item[0], -len(item[1])))
            result, self._held = self._held[:place], ""
            return result
        overlap = self._overlap(self._whole)
        self._whole, self._places = (
            self._whole[len(self._whole) - overlap :],
            self._places[len(self._places) - overlap :],
        )
        free = min(len(self._held) - self._overlap(self._held), self._place(0) if overlap else len(self._held))
        result, self._held = self._held[:free], self._held[free:]
        self._given += free
        return result

    def flush(self) -> str:
        result, self._held = self._held, ""
        return result

    def _place(self, index: int) -> int:
        """Where in the held text a character of the whole text stands."""
        return self._places[index] - self._given

    def _overlap(self, text: str) -> int:
        """Length of the longest end of a text that begins a stop string."""
        longest = min(max(map(len, self._stops)) - 1, len(text))
        return next((size for size in range(longest, 0, -1) if self._begins_a_stop(text[len(text) - size :])), 0)

    def _begins_a_stop(self, end: str) -> bool:
        return any(len(stop) > len(end) and stop.startswith(end) for stop in self._stops)
