"""Files as people and other programs write them, through every reader that we have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meswitch_cli.calibration.data import read_calibration
from meswitch_cli.client.workload import read_prompts
from meswitch_cli.errors import MeswitchError
from meswitch_cli.evaluation.prompts import read_set
from meswitch_cli.jsonl import read_jsonl
from meswitch_cli.router.train.data import read_examples
from meswitch_cli.server.settings import read_keys
from meswitch_cli.textfile import read_text

MARK = b"\xef\xbb\xbf"
SAID = "what\u2028is \u0085 7 \x1c of\u2029 日本?"
#: Every reader of prompts, and what it makes of `SAID` in a line with "prompt" and "response".
READERS: dict[str, Callable[[Path], Any]] = {
    "calibration": lambda path: [item["messages"][0]["content"] for item in read_calibration(path).items],
    "routing": lambda path: [example.text for example in read_examples(path, domain="maths")],
    "bench": lambda path: read_prompts(path),
    "evaluation": lambda path: [item[0]["content"] for item in read_set(path).conversations],
    "tasks": lambda path: [value["prompt"] for _, value in read_jsonl(path, MeswitchError, "data").values],
}


@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "marked"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n", "\r\n\r\n"], ids=repr)
@pytest.mark.parametrize("reader", READERS)
def test_prompts(tmp_path: Path, reader: str, end: str, mark: bytes) -> None:
    lines = [json.dumps({"prompt": f"{SAID} {n}", "response": "yes"}, ensure_ascii=False) for n in range(3)]
    path = tmp_path / "data.jsonl"
    path.write_bytes(mark + (end.join(lines) + end).encode())
    assert READERS[reader](path) == [f"{SAID} {n}" for n in range(3)]


@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "marked"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=repr)
def test_keys(tmp_path: Path, end: str, mark: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(mark + end.join(["first-key", "", "# a note", " second-key "]).encode())
    assert read_keys(path) == ("first-key", "second-key")
    path.write_bytes(mark + f"# a note{end}only{end}".encode())
    assert read_keys(path) == ("only",)
    path.write_bytes(mark + end.encode())
    with pytest.raises(MeswitchError, match="holds no key"):
        read_keys(path)
    path.write_bytes(mark + "key\u2028two".encode())
    with pytest.raises(MeswitchError, match="key 1 has characters"):
        read_keys(path)


def test_plain_text_to_evaluate(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(MARK + "the cat\r\nsat\ufeff".encode())
    assert read_set(path).texts == ("the cat\r\nsat\ufeff",)  # a mark anywhere else is a character


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("a\nb".encode("utf-16"), "line 1: not UTF-8 text but UTF-16; a file of keys must be UTF-8"),
        ("a".encode("utf-16-be"), None),
        (b"\xfe\xff\x00a", "line 1: not UTF-8 text but UTF-16"),
        (b"one\r\ntwo\rth\xe9", "line 3: not UTF-8 text;"),
        (MARK + b"one\n\xff", "line 2: not UTF-8 text;"),
    ],
)
def test_other_encodings_are_named(tmp_path: Path, raw: bytes, said: str | None) -> None:
    path = tmp_path / "file"
    path.write_bytes(raw)
    if said is None:
        assert read_text(path, MeswitchError, "a file of keys").text == "\x00a"
        return
    with pytest.raises(MeswitchError, match=said):
        read_text(path, MeswitchError, "a file of keys")


@pytest.mark.parametrize("reader", READERS)
def test_what_no_tokenizer_takes_is_refused_by_its_line(tmp_path: Path, reader: str) -> None:
    path = tmp_path / "data.jsonl"
    good = '{"prompt": "a \\ud83d\\ude00 face", "response": "\\\\ud800"}\n'
    path.write_text(good)
    assert READERS[reader](path) == ["a 😀 face"]
    path.write_text(good + '{"prompt": "a \\uD800 half", "response": "x"}\n')
    with pytest.raises(MeswitchError, match=r"line 2: .*binary data, not text"):
        READERS[reader](path)
