import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from meswitch_cli.calibration.data import read_calibration, token_windows
from meswitch_cli.errors import CalibrationError


def _file(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_three_forms_are_understood(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        {"text": "plain"},
        "",
        {"prompt": "hello", "response": "there"},
        {"prompt": "hello"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "more": 1},
    )
    items = read_calibration(path).items
    assert items[0] == {"text": "plain"}
    assert [len(item["messages"]) for item in items[1:]] == [2, 1, 2]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "3",
        "[]",
        '{"txt": "x"}',
        '{"text": ""}',
        '{"text": 3}',
        '{"messages": []}',
        '{"messages": [{"role": "x"}]}',
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(CalibrationError, match=r"data\.jsonl: line 3: "):
        read_calibration(_file(tmp_path, {"text": "fine"}, "", line, {"text": "fine"}))


def test_unicode_separators_do_not_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read_calibration(path).items == ({"text": "one\u2028two\x85three"},)


def test_empty_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no line with data"):
        read_calibration(_file(tmp_path, "", "  "))
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_calibration(tmp_path / "none.jsonl")
    (tmp_path / "weights.bin").write_bytes(b'{"text": "a"}\n\xff\xfe\x00')
    with pytest.raises(CalibrationError, match="line 2: not UTF-8"):
        read_calibration(tmp_path / "weights.bin")


def test_windows_are_full_seeded_and_bounded(pair: tuple[Path, Path], calibration_file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    data = read_calibration(calibration_file)

    def windows(**options: int) -> torch.Tensor:
        return token_windows(data, tokenizer, **({"samples": 3, "sequence_length": 16, "seed": 0} | options))

    assert windows().shape == (3, 16)
    assert torch.equal(windows(), windows())
    assert not torch.equal(windows(), windows(seed=1))
    assert windows(samples=100_000).shape[0] < 100_000
    everything = windows(samples=1, sequence_length=1_000_000)
    assert everything.shape[0] == 1 and everything.numel() > 100
