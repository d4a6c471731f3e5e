"""A tokenizer from its files alone."""

import json
from pathlib import Path

import pytest

from meswitch_cli.errors import ArtifactError, CheckpointError, MeswitchError, RouterError
from meswitch_cli.model.tokenizer import load_tokenizer
from zoo.tiny_tokenizer import tiny_tokenizer


def test_text_of_any_length_is_taken_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 4
    tokenizer.save_pretrained(tmp_path)
    text = "a text of more than four tokens " * 20
    expected = tokenizer(text).input_ids
    caplog.clear()
    assert load_tokenizer(tmp_path)(text).input_ids == expected
    assert "longer than the specified maximum" not in caplog.text


def test_code_of_the_folder_is_not_run(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    code = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": code, "tokenizer_class": "Tokenizer"}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    try:
        load_tokenizer(tmp_path)
    except MeswitchError as error:  # refused, or loaded as a class of transformers' own
        assert "its tokenizer cannot be loaded" in str(error)


@pytest.mark.parametrize("kind", [ArtifactError, CheckpointError, RouterError])
def test_the_caller_says_what_kind_of_error(tmp_path: Path, kind: type[MeswitchError]) -> None:
    with pytest.raises(kind, match=f"{tmp_path}: its tokenizer cannot be loaded: ") as caught:
        load_tokenizer(tmp_path, kind)
    assert "\n" not in str(caught.value)
