"""What an artifact carries beside its shards: all that the expert's tokenizer and chats need, and no more."""

from __future__ import annotations

import ast
import fnmatch
import json
import shutil
from pathlib import Path

import pytest
import transformers
from transformers import AutoTokenizer

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.artifact.sidefiles import CARRIED_FILES, TEMPLATE_FOLDER, expert_files
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.source import CHECKPOINT_FILES
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.errors import ArtifactError, CheckpointError

Pair = tuple[Path, Path]
TEMPLATES = {"default": "{{ messages[0]['content'] }}", "tool_use": "TOOLS", "rag": "DOCUMENTS"}


@pytest.fixture
def expert(pair: Pair, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[1], tmp_path / "expert"))


def _file_names_of_all_tokenizers() -> set[str]:
    """What transformers' tokenizers call their files: read off the sources, since importing all takes minutes."""
    names: set[str] = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id in ("VOCAB_FILES_NAMES", "vocab_files_names")
                for target in node.targets
            ):
                values = node.value.values if isinstance(node.value, ast.Dict) else []
                names |= {item.value for item in values if isinstance(item, ast.Constant)}
    return {name for name in names if "." in name}


def test_every_tokenizer_of_transformers_finds_its_files() -> None:
    names = _file_names_of_all_tokenizers()
    assert {"sentencepiece.bpe.model", "bpe.codes", "source.spm", "entity_vocab.json"} <= names
    assert [name for name in sorted(names) if not any(fnmatch.fnmatchcase(name, item) for item in CARRIED_FILES)] == []


def test_what_is_carried_is_fetched_from_the_hub() -> None:
    names = [pattern.replace("*", "x") for pattern in CARRIED_FILES] + [f"{TEMPLATE_FOLDER}/rag.jinja"]
    assert [name for name in names if not any(fnmatch.fnmatchcase(name, item) for item in CHECKPOINT_FILES)] == []


def test_files_without_a_pattern_of_transformers(expert: Path) -> None:
    carried = ["tekken.json", "qwen.tiktoken", "vocab.bpe", "tokenizer.model.v3", "chat_template.json", "LICENSE.txt"]
    left = ["training_args.bin", "optimizer.pt", "trainer_state.json", "modeling_own.py", "README.md", "notes.md"]
    for name in carried + left:
        (expert / name).write_text("{}")
    files = expert_files(expert)
    assert set(carried) <= set(files) and not set(left) & set(files)


def test_named_chat_templates_survive(pair: Pair, expert: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(expert)
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(expert)
    assert (expert / TEMPLATE_FOLDER / "rag.jinja").is_file()
    job = prepare(str(pair[0]), str(expert), tmp_path / "art", CompressionSettings(salient=2), None)
    compress(job)
    artifact = Artifact.open(tmp_path / "art")
    assert f"{TEMPLATE_FOLDER}/tool_use.jinja" in {file.name for file in artifact.manifest.files}
    assert [file.name for file in artifact.verify()] != []
    back = restore(artifact, Checkpoint.open(str(pair[0])), tmp_path / "back")
    for folder in (artifact.path, back):
        assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATES
    (artifact.path / TEMPLATE_FOLDER / "rag.jinja").write_text("changed!!")
    with pytest.raises(ArtifactError, match=r"rag\.jinja"):
        list(artifact.verify())


def test_a_list_of_templates_inside_the_tokenizers_config_survives(expert: Path) -> None:
    path = expert / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "chat_template": [{"name": name, "template": text} for name, text in TEMPLATES.items()]
    }
    (expert / "chat_template.jinja").unlink(missing_ok=True)
    path.write_text(json.dumps(config))
    carried = json.loads(expert_files(expert)["tokenizer_config.json"])
    assert carried["chat_template"] == config["chat_template"]


def test_a_template_whose_name_no_manifest_can_hold_is_refused_before_the_work(expert: Path) -> None:
    (expert / TEMPLATE_FOLDER).mkdir()
    (expert / TEMPLATE_FOLDER / "tool use.jinja").write_text("x")
    with pytest.raises(CheckpointError, match=r"tool use\.jinja.*rename the file"):
        expert_files(expert)


def test_a_pointer_in_place_of_a_file_is_refused(expert: Path) -> None:
    (expert / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: a Git LFS pointer"):
        expert_files(expert)


def test_the_config_is_the_models_where_the_file_says_otherwise(expert: Path) -> None:
    path = expert / "config.json"
    config = json.loads(path.read_text())
    assert expert_files(expert, config)["config.json"] == path.read_bytes()
    private = {"_name_or_path": "/home/me", "transformers_weights": "mine.safetensors"}
    path.write_text(json.dumps(config | private))
    assert json.loads(expert_files(expert)["config.json"]) == config
    path.write_text(json.dumps(config | private | {"tie_word_embeddings": True}))
    assert json.loads(expert_files(expert, config)["config.json"]) == config
