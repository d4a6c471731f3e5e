"""Text a token at a time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from meswitch_cli.engine.contract import Chunk, GenerationRequest, Sampling
from meswitch_cli.engine.detokenizer import Detokenizer, StopStrings
from meswitch_cli.engine.expert import ServedModel
from meswitch_cli.engine.generation import Generation
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


def told(stops: tuple[str, ...], text: str) -> tuple[str, str | None, int]:
    """The answer, the stop string found, and after how many tokens; a token is a character or a special one."""
    tokenizer = tiny_tokenizer()
    held, detokenizer = StopStrings(stops), Detokenizer(tokenizer, ())
    tokens = tokenizer.encode(text, add_special_tokens=False)
    answer = ""
    for count, token in enumerate(tokens, 1):
        shown = detokenizer.push(token)
        answer += held.push(shown, "" if shown else detokenizer.left_out(token))
        if held.found is not None:
            return answer, held.found, count
    return answer + held.push(detokenizer.flush()) + held.flush(), None, len(tokens)


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (("<|user|>",), "one<|user|>two", ("one", "<|user|>", 4)),
        (("<|user|>",), "<|user|>two", ("", "<|user|>", 1)),
        (("Human:", "<|user|>"), "ab<|user|>", ("ab", "<|user|>", 3)),
        (("</s><|user|>",), "a</s>b</s><|user|>c", ("ab", "</s><|user|>", 5)),
        (("done<|user|>",), "not done. done<|user|>", ("not done. ", "done<|user|>", 15)),
        (("</s>\nQ",), "a</s>\n</s>\nQ:", ("a\n", "</s>\nQ", 6)),
        (("x</s>y",), "ax</s>z</s>xx</s>y", ("axzx", "x</s>y", 9)),
        (("ab",), "a</s>b", ("", "ab", 3)),  # the answer that is shown may not hold a stop string either
        (("ab", "</s>"), "a</s>b", ("a", "</s>", 2)),
        (("<|us",), "a<|user|>b", ("a", "<|us", 2)),
        (("<|user|>",), "a<|assistant|>b<|user", ("ab<|user", None, 9)),
        (("日</s>",), "日</s>", ("", "日</s>", 4)),
        (("<|user|>",), "naïve<|user|>", ("naïve", "<|user|>", 7)),
    ],
)
def test_stop_strings_with_special_tokens(
    stops: tuple[str, ...], text: str, expected: tuple[str, str | None, int]
) -> None:
    assert told(stops, text) == expected


def test_special_tokens_without_end_are_not_kept() -> None:
    held = StopStrings(("ab</s></s>", "never"))
    assert held.push("a") == ""
    for _ in range(1000):
        assert held.push("", "<pad>") == ""
    assert sum(len(value) for value in vars(held).values() if isinstance(value, str | list)) < 50
    assert held.push("c") == "ac" and held.found is None


def test_stop_strings_are_found_as_a_search_of_the_whole_would() -> None:
    """Random texts over few characters and a special token `#`, against looking at every end of every text."""
    draw = random.Random(0)
    for _ in range(2000):
        stops = tuple("".join(draw.choices("ab#", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3)))
        text = "".join(draw.choices("ab#", k=draw.randint(0, 12)))
        held, answer = StopStrings(stops), ""
        for character in text:
            answer += held.push("", "#") if character == "#" else held.push(character)
            if held.found is not None:
                break
        else:
            answer += held.flush()
        assert answer == shown_before_a_stop(text, stops), (text, stops)


def shown_before_a_stop(text: str, stops: tuple[str, ...]) -> str:
    for length in range(1, len(text) + 1):
        whole = text[:length]
        shown = whole.replace("#", "")
        places = [shown.find(stop) for stop in stops if stop in shown]
        places += [len(whole[: whole.find(stop)].replace("#", "")) for stop in stops if stop in whole]
        if places:
            return shown[: min(places)]
    return text.replace("#", "")


class Chosen:
    """A continuation that only remembers."""

    complete = False

    def __init__(self) -> None:
        self.generated: list[int] = []

    def take(self, token: int) -> None:
        self.generated.append(token)


@pytest.mark.parametrize(
    ("stop", "text", "answer", "reason"),
    [
        ("done</s>", "not done</s>", "not ", "done</s>"),
        ("done", "not do</s>", "not do", None),
        ("<|user|></s>", "ab<|user|></s>", "ab", "<|user|></s>"),
        ("</s>", "ab</s>", "ab", "</s>"),
    ],
)
def test_an_end_of_text_may_complete_a_stop_string(stop: str, text: str, answer: str, reason: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    model = ServedModel(
        name="red", path=Path("red"), digest="", tokenizer=tokenizer, vocabulary=268, end_ids=frozenset({tokens[-1]})
    )
    request = GenerationRequest("1", "red", (5,), Sampling(stop=(stop,), max_tokens=50))
    chunks: list[Chunk] = []
    generation = Generation(request, model, Chosen(), chunks.append)
    assert [generation.accept(token, None) for token in tokens] == [False] * (len(tokens) - 1) + [True]
    assert "".join(chunk.text for chunk in chunks) == answer
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", reason)


@pytest.mark.parametrize("sampling", [
    Sampling(max_tokens=9), Sampling(max_tokens=50, ignore_eos=True), Sampling(max_tokens=50),
    Sampling(max_tokens=50, stop_token_ids=(40,)), Sampling(max_tokens=50, stop=("ab",)),
])  # fmt: skip
def test_what_is_told_later_is_the_same(sampling: Sampling) -> None:
    tokenizer = tiny_tokenizer()
    model = ServedModel(
        name="red", path=Path("red"), digest="", tokenizer=tokenizer, vocabulary=268, end_ids=frozenset({1})
    )
    tokens = [5, 200, 201, 7, 66, 67, 40, 1, *tokenizer.encode("abc \u00e9", add_special_tokens=False), *range(60, 130)]

    def told(later: bool, told_after: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        generation = Generation(GenerationRequest("1", "red", (5,), sampling), model, Chosen(), chunks.append)
        for index, token in enumerate(tokens):
            before = len(chunks)
            over = generation.accept(token, None, later)
            assert len(chunks) > before or (later and not over)
            if over:
                break
            if index % told_after == 0:
                generation.tell()
        assert generation.finished
        return chunks

    expected = told(False, 1)
    assert told(True, 1) == expected and told(True, 3) == expected


def test_what_waits_is_told_before_an_early_end() -> None:
    model = ServedModel(
        name="red", path=Path("red"), digest="", tokenizer=tiny_tokenizer(), vocabulary=268, end_ids=frozenset()
    )
    chunks: list[Chunk] = []
    request = GenerationRequest("1", "red", (5,), Sampling(max_tokens=50))
    generation = Generation(request, model, Chosen(), chunks.append)
    generation.accept(70, None, True)
    assert chunks == []
    generation.end("cancelled")
    assert [(chunk.tokens, chunk.finish_reason) for chunk in chunks] == [((70,), None), ((), "cancelled")]
