"""Text a token at a time."""

from __future__ import annotations

import pytest

from meswitch_cli.engine.detokenizer import Detokenizer, StopStrings
from zoo.tiny_tokenizer import tiny_tokenizer

TEXT = "naïve 日本 🙂🏽 done"


def test_only_complete_characters_are_given_out() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(tokens) > len(TEXT)  # characters of several tokens
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("before", add_special_tokens=False))
    parts = [detokenizer.push(token) for token in tokens]
    assert "".join(parts) == TEXT
    assert all("\ufffd" not in part for part in parts)
    assert detokenizer.flush() == ""


def test_an_incomplete_end_is_flushed_as_decoding_would() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode("a🙂", add_special_tokens=False)[:-1]
    detokenizer = Detokenizer(tokenizer, ())
    text = "".join(detokenizer.push(token) for token in tokens)
    assert text == "a"
    assert text + detokenizer.flush() == tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("stops", "pieces", "expected", "found"),
    [
        ((), ["ab", "c"], ["ab", "c"], None),
        (("cd",), ["ab", "c", "d"], ["ab", "", ""], "cd"),
        (("cd",), ["abc", "e"], ["ab", "ce"], None),
        (("aab",), ["a", "a", "a", "b"], ["", "", "a", ""], "aab"),
        (("xyz", "yz"), ["wx", "yz"], ["w", ""], "xyz"),
        (("b", "ab"), ["ab"], [""], "ab"),
        (("stop",), ["st", "ar"], ["", "star"], None),
    ],
)
def test_stop_strings(stops: tuple[str, ...], pieces: list[str], expected: list[str], found: str | None) -> None:
    held = StopStrings(stops)
    assert [held.push(piece) for piece in pieces] == expected
    assert held.found == found


def test_what_is_held_comes_at_the_end() -> None:
    held = StopStrings(("stop",))
    assert held.push("no st") == "no "
    assert held.flush() == "st"
