import json
from pathlib import Path

import pytest

from meswitch_cli.errors import EvaluationError
from meswitch_cli.evaluation.prompts import encode_set, read_set
from zoo.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def lines(path: Path, *values: object) -> Path:
    path.write_text("\n".join(json.dumps(value) for value in values))
    return path


def test_only_the_answer_counts_through_the_chat_template(tmp_path: Path) -> None:
    file = lines(
        tmp_path / "a.jsonl",
        {"prompt": "two and two", "response": "four"},
        {"messages": [{"role": "user", "content": "two and two"}, {"role": "assistant", "content": "four"}]},
    )
    data = read_set(file, "maths")
    assert (data.name, data.kind, data.owner, len(data.sha256)) == ("a", "responses", "maths", 64)
    encoded = encode_set(data, TOKENIZER, vocabulary=268, context=512)
    assert encoded.items[0] == encoded.items[1] and encoded.kept == (0, 1)
    item = encoded.items[0]
    assert TOKENIZER.decode(item.tokens) == "<|user|>two and two<|assistant|>four</s>"
    assert TOKENIZER.decode(item.tokens[item.answer_start :]) == "four</s>"
    assert data.conversations[0][-2] == {"role": "user", "content": "two and two"}


def test_a_tokenizer_without_template_joins_the_turns(tmp_path: Path) -> None:
    plain = tiny_tokenizer()
    plain.chat_template = None
    data = read_set(lines(tmp_path / "a.jsonl", {"prompt": "two", "response": "four"}))
    item = encode_set(data, plain, vocabulary=268, context=512).items[0]
    assert plain.decode(item.tokens[item.answer_start :]) == "four</s>"


def test_plain_text_is_cut_into_windows_that_count_every_token_once(tmp_path: Path) -> None:
    file = tmp_path / "neutral.txt"
    file.write_text("abcdefghij" * 10)
    data = read_set(file)
    assert data.kind == "text"
    encoded = encode_set(data, TOKENIZER, vocabulary=268, context=512, window=32)
    assert [len(item.tokens) for item in encoded.items] == [32, 32, 32, 4]
    assert all(item.answer_start == 1 for item in encoded.items)
    assert TOKENIZER.decode([token for item in encoded.items for token in item.tokens]) == file.read_text()
    assert len(encode_set(data, TOKENIZER, vocabulary=268, context=512, window=32, limit=2).items) == 2


def test_what_does_not_fit_is_counted_and_nothing_left_is_an_error(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"prompt": "x" * 100, "response": "y"}, {"prompt": "x", "response": "y"})
    encoded = encode_set(read_set(file), TOKENIZER, vocabulary=268, context=20)
    assert (encoded.kept, encoded.skipped) == ((1,), 1)
    with pytest.raises(EvaluationError, match="no example with an answer fits"):
        encode_set(read_set(file), TOKENIZER, vocabulary=268, context=3)
    with pytest.raises(EvaluationError, match="tokenizer and weights do not belong together"):
        encode_set(read_set(file), TOKENIZER, vocabulary=50, context=512)


def test_files_that_hold_nothing_to_measure_are_named(tmp_path: Path) -> None:
    mixed = lines(tmp_path / "mixed.jsonl", {"text": "x"}, {"prompt": "x", "response": "y"})
    unanswered = lines(tmp_path / "open.jsonl", {"messages": [{"role": "user", "content": "x"}]})
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (mixed, "two files"),
        (unanswered, "example 1 has no answer"),
        (tmp_path / "empty.txt", "empty"),
        (tmp_path / "bytes.txt", "not UTF-8"),
        (tmp_path / "none.txt", "cannot be read"),
    ):
        with pytest.raises(EvaluationError, match=message):
            read_set(path)
